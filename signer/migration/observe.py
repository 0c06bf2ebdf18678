"""What is in force on a platform: the service's answer, its container and files, what a reboot starts, what listens.

A run records it before its first change and after its last step. Reads only, and raises nothing: what cannot be read is
listed with the reason, as a look must not decide how a run ends.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from signer.api_client import ApiClient, Readiness
from signer.errors import SignerError
from signer.files import read_bounded
from signer.migration.boot import boot_file, files_at_boot
from signer.migration.compose import Compose, ContainerState
from signer.migration.compose_files import MAX_BYTES
from signer.migration.config import CutoverFile

_UNREADABLE: Final = "unreadable"  # in the place of a digest
_TCP_LISTENS: Final = "0A"  # the state of a socket in /proc/net/tcp (proc_pid_net(5))
_UNIX_LISTENS: Final = 0x10000  # __SO_ACCEPTCON in the flags of /proc/net/unix


@dataclass(frozen=True, slots=True)
class Observed:
    """`facts` by name, ready for JSON; `unread` has the reason for each fact that could not be read."""

    facts: dict[str, Any] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {**self.facts, **({"unread": self.unread} if self.unread else {})}


def observe_service(file: CutoverFile, api: ApiClient, compose: Compose) -> Observed:
    """`ready`, `mode`, `ca` and `policy` as the service reports them; `image`, `container`, `health` and
    `compose_files` (path to hex SHA-256) of its container; `starts_at_boot`; `listens`."""
    seen = Observed()
    _observe_answer(api, seen)
    _observe_container(compose, seen)
    _observe_boot(boot_file(file.evidence_dir), seen)
    return seen


def _observe_answer(api: ApiClient, seen: Observed) -> None:
    try:
        answer = api.ready()
    except SignerError as error:
        answer = Readiness(False, code=error.code)
    seen.facts["ready"] = answer.ready
    if answer.ready:
        seen.facts.update(mode=answer.mode, ca=answer.ca_fingerprint, policy=answer.policy)
    else:
        seen.unread.update(dict.fromkeys(("mode", "ca", "policy"), f"the service is not ready: {answer.code}"))


def _observe_container(compose: Compose, seen: Observed) -> None:
    names = ("image", "container", "health", "compose_files", "listens")
    try:
        found = compose.running()
    except SignerError as error:
        seen.unread.update(dict.fromkeys(names, error.text))
        return
    seen.facts["container"] = None if found is None else asdict(found)
    if found is None:
        seen.unread.update(dict.fromkeys(names, "there is no container"))
        return
    seen.facts["image"] = found.image
    seen.facts["health"] = found.health or "no check"
    if found.files:
        seen.facts["compose_files"] = digests_of(*map(Path, found.files))
    else:
        seen.unread["compose_files"] = "compose has not labelled the container with them"
    try:
        seen.facts["listens"] = listens(found)
    except OSError as error:
        seen.unread["listens"] = f"the container's processes cannot be read: {error.strerror}"


def digests_of(*paths: Path) -> dict[str, str]:
    """The hex SHA-256 of each file by its path, `unreadable` for one that cannot be read."""
    found = {}
    for path in paths:
        try:
            found[str(path)] = sha256(read_bounded(path, MAX_BYTES, follow_links=True)).hexdigest()
        except OSError:
            found[str(path)] = _UNREADABLE
    return found


def _observe_boot(path: Path, seen: Observed) -> None:
    try:
        seen.facts["starts_at_boot"] = list(files_at_boot(path))
    except FileNotFoundError:
        seen.unread["starts_at_boot"] = "no run has recorded it"
    except OSError as error:
        seen.unread["starts_at_boot"] = f"{path} cannot be read: {error.strerror}"


# --- what listens ----------------------------------------------------------------------------------------------------


def listens(container: ContainerState) -> list[str]:
    """Every TCP address and unix socket on which a process of the container accepts connections; raises `OSError`.

    The engine names a process of its own host; it counts only if it is the first of another pid namespace here.
    """
    first = Path(f"/proc/{container.pid or 'none'}")
    space = (first / "ns" / "pid").readlink()
    if space == Path("/proc/self/ns/pid").readlink():
        raise ProcessLookupError(errno.ESRCH, "they are not in a container of this host")
    held = set(_sockets(space))
    found = [*_tcp(first / "net" / "tcp", held), *_tcp(first / "net" / "tcp6", held)]
    return [*sorted(found), *sorted(_unix(first / "net" / "unix", held))]


def _sockets(space: Path) -> Iterator[str]:
    """The inodes of the sockets that processes of a pid namespace hold."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):  # it has ended, or belongs to another user
            if (folder / "ns" / "pid").readlink() != space:
                continue
            for descriptor in (folder / "fd").iterdir():
                with suppress(OSError):
                    name = str(descriptor.readlink())
                    if name.startswith("socket:["):
                        yield name[8:-1]


def _tcp(table: Path, held: set[str]) -> Iterator[str]:
    for line in _rows(table):
        words = line.split()
        if len(words) > 9 and words[3] == _TCP_LISTENS and words[9] in held:
            yield _address(words[1])


def _address(text: str) -> str:
    """`127.0.0.1:8222` for `0100007F:201E`; 32 digits are an IPv6 address. Each word is in the host's byte order."""
    host, _, port = text.partition(":")
    raw = b"".join(struct.pack("=I", int(host[at : at + 8], 16)) for at in range(0, len(host), 8))
    if len(raw) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, raw)}:{int(port, 16)}"
    return f"[{socket.inet_ntop(socket.AF_INET6, raw)}]:{int(port, 16)}"


def _unix(table: Path, held: set[str]) -> Iterator[str]:
    for line in _rows(table):
        words = line.split(maxsplit=7)
        if len(words) == 8 and int(words[3], 16) & _UNIX_LISTENS and words[6] in held:
            yield f"unix:{words[7]}"


def _rows(table: Path) -> list[str]:
    """The lines after the heading; none where the kernel has no such table."""
    try:
        return table.read_text(errors="replace").splitlines()[1:]
    except FileNotFoundError:
        return []
