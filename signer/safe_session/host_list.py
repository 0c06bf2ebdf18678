"""Fetches the signed list of host keys and verifies it, before anything is requested.

`ssh-keygen -Y verify` checks the signature by a key that the user has pinned (SAFE_SESSION_PUBLISHERS_FILE), and the
list's first line says when it was signed: whoever sits in between can neither change it nor serve an old one. Whoever
has pinned a key gets no session without a verified list, as otherwise it would be enough to withhold the list.
"""

# ruff: noqa: PTH102, PTH123
# (pathlib costs more to import than everything here)

from __future__ import annotations

import os
import time

from signer.errors import BadFormat, Unavailable
from signer.safe_session.command import find_command
from signer.safe_session.request import call

TYPE_CHECKING = False  # type checkers know the name; importing it from typing costs 20 ms
if TYPE_CHECKING:
    from signer.safe_session.http import Server
    from signer.safe_session.request import Patience

NAMESPACE = "known-hosts.v1@signer"
LARGEST_LIST = 4 * 1024 * 1024  # bytes; the service publishes no larger one
OLDEST = 900  # seconds; the service signs the list each minute
_PRINCIPAL = "signer"
_FIRST_LINE = f"# {NAMESPACE} version="
_HEAD = 16 * 1024  # bytes of an HTTP head
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_BYTES = bytes(range(0x20, 0x7F)) + b"\n"
_ASK = "ask the operator; `signer hosts key` prints the key that the service signs with"


def fetch_host_list(server: Server, publishers: list[str], folder: str, patience: Patience) -> str:
    """The path of the service's list, written into `folder`, which is created. `publishers` are public keys, each as
    `type base64`.

    List and signature are two files, which the service replaces each minute: a pair that does not match is fetched once
    more. Raises `BadFormat` or `Unavailable`.
    """
    keygen = find_command("ssh-keygen", required=False)
    if not keygen:
        raise Unavailable(
            "no_ssh_keygen",
            "cannot verify the list of host keys: there is no ssh-keygen",
            "install OpenSSH's client (Debian: apt install openssh-client)",
        )
    try:
        os.mkdir(folder, 0o700)
        lines = (f'{_PRINCIPAL} namespaces="{NAMESPACE}" {key}\n' for key in publishers)
        _write(f"{folder}/publishers", "".join(lines).encode("ascii"))
        for _ in range(2):
            content = _fetch(server, "/api/known_hosts", patience)
            _write(f"{folder}/known_hosts", content)
            _write(f"{folder}/signature", _fetch(server, "/api/known_hosts.sig", patience))
            if _is_genuine(keygen, folder):
                _check(content)
                return f"{folder}/known_hosts"
    except OSError as error:
        reason = (error.strerror or "unknown reason").lower()
        raise Unavailable("host_list_not_kept", f"cannot keep the list of host keys in {folder}: {reason}") from None
    raise BadFormat(
        "host_list_not_genuine", "the list of host keys is not signed by a key of SAFE_SESSION_PUBLISHERS_FILE", _ASK
    )


def _fetch(server: Server, path: str, patience: Patience) -> bytes:
    response = call(server, "GET", path, b"", patience, largest=LARGEST_LIST + _HEAD)
    if response.status != 200:
        raise Unavailable(
            "host_list_missing",
            f"the signing service gives no list of host keys (status {response.status})",
            "try again in a minute; if it stays so, ask the operator",
        )
    return response.body


def _is_genuine(keygen: str, folder: str) -> bool:
    """Whether a pinned key signed the list."""
    child = os.posix_spawn(
        keygen,
        [
            *("ssh-keygen", "-Y", "verify", "-f", f"{folder}/publishers", "-I", _PRINCIPAL),
            *("-n", NAMESPACE, "-s", f"{folder}/signature"),
        ],
        {"PATH": os.environ.get("PATH", os.defpath)},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, f"{folder}/known_hosts", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
    )
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _check(content: bytes) -> None:
    """Raises `BadFormat` if a genuine list has another form, `Unavailable` if it is not of now."""
    first = content.partition(b"\n")[0].decode("ascii", "replace")
    version, _, as_of = first.removeprefix(_FIRST_LINE).partition(" as_of=")
    is_time = len(as_of) == 20 and as_of.translate(dict.fromkeys(range(48, 58), "0")) == "0000-00-00T00:00:00Z"
    if not first.startswith(_FIRST_LINE) or not version.isdigit() or not is_time or content.translate(None, _BYTES):
        raise BadFormat("host_list_malformed", "the list of host keys is malformed", "upgrade safe-session")
    now = time.time()
    if not _text(now - OLDEST) <= as_of <= _text(now + OLDEST):
        raise Unavailable(
            "host_list_old",
            f"the list of host keys is of {as_of}, and by this machine's clock it is {_text(now)}",
            "correct the clock; if it is right, ask the operator why the list is not renewed each minute",
        )


def _text(seconds: float) -> str:
    """A time as the list has it; in this form later times are greater."""
    return time.strftime(_TIME, time.gmtime(seconds))


def _write(path: str, content: bytes) -> None:
    with open(path, "wb") as file:  # in a new folder that only this user can enter
        file.write(content)
