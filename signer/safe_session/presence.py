"""The asker's own signature, which roles with `presence` or `break_glass` want: `ssh-keygen -Y sign` makes it.

Imported only for such a request. The private key stays with OpenSSH: in its file, in the user's own agent, or in a
FIDO token, for which ssh-keygen asks for a touch.
"""

# ruff: noqa: PTH111, PTH118, PTH123
# (the rest of this package uses no pathlib)

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager

from signer.errors import BadFormat, BadSettings, Unavailable
from signer.safe_session.approval import HumanRequest, read_request
from signer.safe_session.http import send, unexpected_response
from signer.safe_session.output import render_json
from signer.ssh.statement import APPROVAL_NAMESPACE, approval_statement, request_digest

TYPE_CHECKING = False  # type checkers know the name; importing it from typing costs 20 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

    from signer.safe_session.arguments import Invocation
    from signer.safe_session.settings import Settings

_SECONDS_TO_SIGN = 120.0  # a person looks for the token and touches it
_LARGEST_PUBLIC_KEY = 16_384  # bytes


def sign_presence(settings: Settings, invocation: Invocation, asked: HumanRequest) -> HumanRequest:
    """Signs the statement about the request as it was shown, and sends the signature; returns the request then.

    Raises `BadFormat` if the service's digest is not that of the request, `BadSettings` without a key to sign with,
    `Unavailable` if ssh-keygen fails, and the service's errors.
    """
    place = settings.server.address.text
    digest = request_digest(asked.frozen)  # of what was shown, never a digest that was sent along
    asker = asked.frozen.get("identity")
    if digest != asked.digest or asked.frozen.get("id") != asked.request or type(asker) is not str:
        raise unexpected_response(place, "the digest is not that of the request")
    statement = approval_statement(asked.request, digest, asker, None)
    with _key_file(invocation.sign_key, asked.presence_keys) as (path, inherited):
        signature = _sign(path, inherited, statement, shows=not invocation.is_for_program())
    body = render_json({"signature": signature, "waiver": None}).encode("ascii")
    response = send(settings.server, "POST", f"/api/requests/{asked.request}/approve", body)
    return read_request(response, place)


def _sign(path: str, inherited: tuple[int, ...], statement: bytes, *, shows: bool) -> str:
    """The armored signature (PROTOCOL.sshsig). `shows` leaves ssh-keygen's own words on stderr."""
    try:
        done = subprocess.run(
            ["ssh-keygen", "-q", "-Y", "sign", "-n", APPROVAL_NAMESPACE, "-f", path],
            input=statement,
            stdout=subprocess.PIPE,
            stderr=None if shows else subprocess.PIPE,
            timeout=_SECONDS_TO_SIGN,
            check=False,
            pass_fds=inherited,
        )
        said = (done.stderr or b"").decode(errors="replace").strip().splitlines()[-1:] or ["ssh-keygen failed"]
        if done.returncode == 0:
            return done.stdout.decode("ascii")
    except subprocess.TimeoutExpired:
        said = [f"no signature within {_SECONDS_TO_SIGN:.0f} s"]
    except OSError as error:
        said = [f"cannot start ssh-keygen: {(error.strerror or 'unknown reason').lower()}"]
    except UnicodeDecodeError:
        raise BadFormat("bad_signature_text", "ssh-keygen made a signature that is not text") from None
    raise Unavailable(
        "presence_not_signed",
        f"your own signature could not be made with {path}: {said[0]}",
        "check that the token is plugged in, or that your ssh-agent has the key; --sign-key FILE names another one",
    )


@contextmanager
def _key_file(named: str, lines: list[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The file that `ssh-keygen -Y sign` gets, and the descriptors that it inherits: the file that the command line
    names, the private key in ~/.ssh that belongs to one of the asker's approval keys, otherwise the public key, for the
    user's ssh-agent. `lines` are the approval keys, `type base64`. Raises `BadSettings`."""
    if not (named or lines):
        raise BadSettings(
            "presence_key_missing",
            "the role wants your own signature, and the service named no key of yours to sign with",
            "give --sign-key FILE; policy.toml lists the keys in approval_keys",
        )
    keys = [line.split()[:2] for line in lines]
    if path := named or _find_private_key(keys):
        yield path, ()
        return
    # A public key is no secret; ssh-keygen reads it from a descriptor and asks the agent for the private half.
    descriptor = os.memfd_create("approval-key")
    try:
        os.write(descriptor, (" ".join(keys[0]) + "\n").encode("ascii", "replace"))
        yield f"/proc/self/fd/{descriptor}", (descriptor,)
    finally:
        os.close(descriptor)


def _find_private_key(keys: list[list[str]]) -> str:
    """The private key file in ~/.ssh whose public half is among `keys`; "" if there is none."""
    folder = os.path.join(os.path.expanduser("~"), ".ssh")
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".pub"))  # noqa: PTH208
    except OSError:
        return ""
    for name in names:
        path = os.path.join(folder, name)
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                words = file.read(_LARGEST_PUBLIC_KEY).split()[:2]
        except OSError:
            continue
        private = path.removesuffix(".pub")
        if words in keys and os.access(private, os.R_OK):
            return private
    return ""
