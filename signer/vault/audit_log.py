"""Reads Vault's audit log (JSON lines): the last signatures, and the other clients since a given time.

Streams, within limits. Also reads rotated files in the same directory (`audit.log.1`, `audit.log-20261122.gz`). Counts
and skips incomplete lines, which rotation and concurrent writes leave. Uncertain entries count as use of Vault. Values
from the log are never passed on.
"""

from __future__ import annotations

import gzip
import json
import re
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Final

from signer.errors import Unavailable
from signer.files import open_regular

MAX_LINE: Final = 1024 * 1024  # bytes
MAX_BYTES: Final = 16 * 1024**3  # of all files together, unpacked
MAX_FILES: Final = 1000
MAX_CLIENTS: Final = 100  # distinct ones
WITHIN: Final = 300.0  # seconds
MAX_NAME: Final = 80  # fits an HMAC of 76 characters
_RENEWALS: Final = (
    ["auth", "token", "renew"], ["auth", "token", "renew-self"], ["auth", "token", "renew-accessor"],
    ["sys", "renew"], ["sys", "leases", "renew"],
)  # fmt: skip
_WORTH_READING: Final = (
    b"/sign/", b"/issue/", b"/login", b"/callback",
    b"/public_key", b"/config/ca", b"/issuer/", b"/creds/", b"/verify", b"/renew", b"/token/accessors", b"/roles/",
)  # fmt: skip
_ANY_TIME: Final = re.compile(rb'"time" ?: ?"([^"]{20,40})"')


@dataclass(frozen=True, slots=True)
class Signature:
    """The newest signature for a role. `at` is seconds since the epoch by Vault's clock."""

    mount: str
    role: str
    at: int


@dataclass(frozen=True, slots=True)
class Client:
    """A client of Vault: its token's display name, the kind of use, the time of the last one.

    Use means a signature, a read of the CA key (as by hosts), a login, or a renewal of a token or lease. An operator's
    inspection, cleanup or token creation does not count, because the removal of Vault does not affect it.
    """

    name: str
    what: str
    at: int
    times: int


@dataclass(frozen=True, slots=True)
class AuditFacts:
    """The content of the log. `first_at` and `last_at` are the times of its oldest and newest entries, 0 if empty.

    `clients` are those since the given time, without signer itself; `broken` counts lines that are not valid entries.
    """

    first_at: int
    last_at: int
    entries: int
    broken: int
    signatures: tuple[Signature, ...]
    clients: tuple[Client, ...]

    def last_signature(self) -> Signature | None:
        return max(self.signatures, key=lambda signature: signature.at, default=None)


@dataclass(slots=True)
class _Reading:
    since: int
    own: frozenset[str]
    first: int = 0
    last: int = 0
    entries: int = 0
    broken: int = 0
    signed: dict[tuple[str, str], int] = field(default_factory=dict)
    clients: dict[tuple[str, str, str], tuple[int, int]] = field(default_factory=dict)
    onlookers: set[str] = field(default_factory=set)

    def take(self, line: bytes) -> None:
        """Processes one line, complete or not."""
        found = _ANY_TIME.search(line, 0, 200)
        worth = any(word in line for word in _WORTH_READING)
        if found is None or worth or not line.endswith(b"}\n"):
            entry = _entry(line)
            if entry is None:
                self.broken += 1
                return
            at = _seconds(entry.get("time"))
        else:
            entry, at = None, _seconds(found[1].decode("latin-1"))
        if at is None:
            self.broken += 1
            return
        self.entries += 1
        self.first = min(self.first or at, at)
        self.last = max(self.last, at)
        if entry is not None:
            self._judge(entry, at)

    def _judge(self, entry: dict[str, Any], at: int) -> None:
        request = _object(entry, "request")
        path = request.get("path")
        if not isinstance(path, str):
            return
        parts = path.split("/")
        signs = _mount_above(parts, "sign", "issue")
        logs_in = _login_mount(parts)
        fetches = _fetch(parts)
        if signs and not path.startswith(("auth/", "sys/")):
            if entry.get("type") == "response" and not _failed(entry):
                key = f"{signs}/"[:MAX_NAME], parts[-1][:MAX_NAME]
                self.signed[key] = max(self.signed.get(key, 0), at)
            self._note_client(entry, f"sign at {f'{signs}/'[:MAX_NAME]}", at)
        elif logs_in:
            self._note_client(entry, f"login at auth/{logs_in[:MAX_NAME]}/", at)
        elif any(parts[: len(known)] == known for known in _RENEWALS):
            self._note_client(entry, "renewal of a token or a lease", at)
        elif fetches is not None and request.get("mount_type", "ssh") == "ssh":
            self._note_client(entry, f"{fetches[1]} of {f'{fetches[0]}/'[:MAX_NAME]}", at, True)
        elif _looks_around(parts) and entry.get("type") == "response" and not _failed(entry):
            accessor = _object(entry, "auth").get("accessor")
            if isinstance(accessor, str) and accessor and len(self.onlookers) < MAX_CLIENTS:
                self.onlookers.add(accessor[:MAX_NAME])

    def _note_client(self, entry: dict[str, Any], what: str, at: int, unless_looks: bool = False) -> None:
        """Counts response entries only: each request has two entries, and only the response has a login's name."""
        if entry.get("type") != "response" or at <= self.since:
            return
        auth = _object(entry, "auth")
        accessor = auth.get("accessor")
        accessor = accessor[:MAX_NAME] if isinstance(accessor, str) else ""
        if accessor and accessor in self.own:
            return
        name = auth.get("display_name")
        shown = name[:MAX_NAME] if isinstance(name, str) and name else "an unknown token"
        key = shown, what, accessor if unless_looks else ""
        if key not in self.clients and len(self.clients) >= MAX_CLIENTS:
            key = "others", "any use", ""
        before, times = self.clients.get(key, (0, 0))
        self.clients[key] = max(before, at), times + 1

    def others(self) -> tuple[Client, ...]:
        """The clients, without tokens of earlier plans of signer, which are recognised by their inspection of Vault."""
        found: dict[tuple[str, str], tuple[int, int]] = {}
        for (name, what, accessor), (at, times) in self.clients.items():
            if accessor not in self.onlookers:
                before, so_far = found.get((name, what), (0, 0))
                found[name, what] = max(before, at), so_far + times
        return tuple(Client(*key, at, times) for key, (at, times) in sorted(found.items()))


def read_audit_log(
    path: Path,
    since: int,
    own: frozenset[str] = frozenset(),
    *,
    monotonic: Callable[[], float] = time.monotonic,
) -> AuditFacts:
    """Reads the log and its rotated files; raises `Unavailable` if any of it cannot be read.

    `since` (seconds since the epoch) limits `clients`; `own` are the hashed accessors of signer's own tokens.
    """
    reading = _Reading(since, own)
    deadline = monotonic() + WITHIN
    remaining = MAX_BYTES
    for file in _files(path):
        for line in _lines(file):
            remaining -= len(line)
            if remaining < 0 or monotonic() > deadline:
                raise Unavailable(
                    "audit_log_too_large",
                    "Vault's audit log is too large to read",
                    "move rotated files from before the cutover elsewhere, or set no audit_log",
                )
            reading.take(line)
    return AuditFacts(
        first_at=reading.first,
        last_at=reading.last,
        entries=reading.entries,
        broken=reading.broken,
        signatures=tuple(Signature(*key, at) for key, at in sorted(reading.signed.items())),
        clients=reading.others(),
    )


def _files(path: Path) -> Iterator[Path]:
    """Rotated files first, then the log itself: a file rotated meanwhile is read twice instead of missed."""
    try:
        beside = sorted(other for other in path.parent.iterdir() if _is_rotated(other.name, path.name))
    except OSError as error:
        raise _unreadable(error) from None
    if len(beside) > MAX_FILES:
        raise _unreadable(OSError(0, f"over {MAX_FILES} rotated files"))
    yield from beside
    yield path


def _is_rotated(name: str, log: str) -> bool:
    return name != log and name.startswith((f"{log}.", f"{log}-")) and not name.endswith((".sha256", ".asc", ".sig"))


def _lines(path: Path) -> Iterator[bytes]:
    """Lines with their line ends; a line that is too long is truncated."""
    try:
        with open_regular(path, follow_links=True) as plain:
            packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            file: IO[bytes] = gzip.GzipFile(fileobj=plain) if packed else plain  # type: ignore[assignment]
            while line := file.readline(MAX_LINE):
                yield line
                while not line.endswith(b"\n") and line:
                    line = file.readline(MAX_LINE)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> Unavailable:
    reason = getattr(error, "strerror", None) or "it is damaged"
    return Unavailable(
        "audit_log_unreadable", f"Vault's audit log cannot be read: {reason}", "set audit_log to a readable file"
    )


# Paths are split, not matched by regular expressions: callers choose them freely.


def _mount_above(parts: list[str], *names: str) -> str:
    """The mount of `<mount>/<name>/<something>`, empty for every other path."""
    return "/".join(parts[:-2]) if len(parts) > 2 and parts[-2] in names and parts[-1] else ""


def _login_mount(parts: list[str]) -> str:
    """The mount of `auth/<mount>/login…` or `auth/<mount>/callback…`; empty for every other path."""
    if parts[0] != "auth":
        return ""
    at = next((at for at in range(len(parts) - 1, 1, -1) if parts[at] in ("login", "callback")), 0)
    return "/".join(parts[1:at])


def _fetch(parts: list[str]) -> tuple[str, str] | None:
    """The mount and keyword of a path that reads the CA key or a one-time password; None for every other path."""
    for at in range(1, len(parts)):
        word, *rest = parts[at : at + 3]
        is_last = at == len(parts) - 1
        is_fetch = (
            (is_last and word in ("public_key", "verify"))
            or (word in ("issuer", "creds") and (len(rest) > 1 or rest not in ([], [""])))
            or (word == "config" and rest == ["ca"])
        )
        if is_fetch and (at > 1 or parts[0]):
            return "/".join(parts[:at]), word
    return None


def _looks_around(parts: list[str]) -> bool:
    return parts in (["auth", "token", "accessors"], ["auth", "token", "accessors", ""]) or bool(
        _mount_above(parts, "roles")
    )


def _entry(line: bytes) -> dict[str, Any] | None:
    """The entry in a line, or None."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and entry.get("type") in ("request", "response") else None


def _object(entry: dict[str, Any], name: str) -> dict[str, Any]:
    value = entry.get(name)
    return value if isinstance(value, dict) else {}


def _failed(entry: dict[str, Any]) -> bool:
    """True if the request or the response has an error."""
    return bool(entry.get("error")) or "error" in _object(_object(entry, "response"), "data")


def _seconds(text: object) -> int | None:
    """An RFC 3339 time with a zone as seconds since the epoch; None if it is not valid."""
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.fromisoformat(text)
        return int(moment.timestamp()) if moment.tzinfo is not None else None
    except (ValueError, OverflowError):
        return None
