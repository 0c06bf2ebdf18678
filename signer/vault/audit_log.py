"""Reads Vault's audit log (JSON lines): the last signatures, and the other clients since a given time.

Streams, within limits. Also reads rotated files in the same directory (`audit.log.1`, `audit.log-20261122.gz`,
`audit-20261122.log.xz`). Reports each line that is not an entry, and each gap between two files: both may hide a use
of Vault. Uncertain entries count as use of Vault. No value from the log is passed on; an excerpt of a line that is not
an entry is masked.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, BinaryIO, Final

from signer.errors import Unavailable
from signer.files import open_regular, os_errors
from signer.units import plain

MAX_LINE: Final = 16 * 1024 * 1024  # bytes
MAX_BYTES: Final = 16 * 1024**3  # of all files together, unpacked
MAX_FILES: Final = 1000
MAX_CLIENTS: Final = 100  # distinct ones
WITHIN: Final = 300.0  # seconds
MAX_NAME: Final = 80  # fits an HMAC of 76 characters
_RENEWALS: Final = (
    ["auth", "token", "renew"], ["auth", "token", "renew-self"], ["auth", "token", "renew-accessor"],
    ["sys", "renew"], ["sys", "leases", "renew"],
)  # fmt: skip
MAX_FAULTS: Final = 20  # listed; all are counted
EXCERPT: Final = 40  # characters
MAX_SILENCE: Final = 3600  # seconds between two files that no number connects
READ_AGAIN_AFTER: Final = 1.0  # seconds, for a last line that is being written
ROUNDS: Final = 3  # of reading, if the log is rotated meanwhile
KNOWN_PREFIXES: Final = ("@cee: ", "@cee:")  # of the device's option `prefix`, as rsyslog's documentation has them
_SECRET_LIKE: Final = re.compile(r"[A-Za-z0-9+/=_-]{16,}|(?<![\w.-])(?!\d{4}-\d\d-\d\dT)[\w.-]*\d[\w.-]{11,}", re.ASCII)
_NUMBER: Final = re.compile(r"(\d{1,4})(?:\.[a-z0-9]{1,4})?", re.ASCII)
_PACKED: Final = (
    (b"\x1f\x8b", "gzip"), (b"\xfd7zXZ\x00", "xz"), (b"BZh", "bzip2"), (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"), (b"PK\x03\x04", "zip"), (b"7z\xbc\xaf\x27\x1c", "7z"), (b"\x1f\x9d", "compress"),
    (b"LZIP", "lzip"), (b"\x89LZO", "lzop"), (b"]\x00\x00", "lzma"),
)  # fmt: skip


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
class BrokenLine:
    """A line that is not an entry: the file's name, its number from 1, its masked first characters."""

    file: str
    number: int
    excerpt: str


@dataclass(frozen=True, slots=True)
class Gap:
    """A time that no file covers, in seconds since the epoch; `why` names the files around it."""

    begin: int
    end: int
    why: str


@dataclass(frozen=True, slots=True)
class AuditFacts:
    """The content of the log. `first_at` and `last_at` are the times of its oldest and newest entries, 0 if empty.

    `clients` are those since the given time, without signer itself; `broken` counts lines that are not valid entries,
    `broken_lines` are the first of them. `gaps` are those after the given time.
    """

    first_at: int
    last_at: int
    entries: int
    broken: int
    signatures: tuple[Signature, ...]
    clients: tuple[Client, ...]
    broken_lines: tuple[BrokenLine, ...] = ()
    gaps: tuple[Gap, ...] = ()

    def last_signature(self) -> Signature | None:
        return max(self.signatures, key=lambda signature: signature.at, default=None)


@dataclass(slots=True)
class _File:
    """What one file covers. `number` is that of its rotation, 0 for the log itself, None if its name has none."""

    name: str
    number: int | None
    first: int = 0
    last: int = 0


@dataclass(slots=True)
class _Reading:
    since: int
    own: frozenset[str]
    prefixes: tuple[bytes, ...]
    clean: Callable[[str], str]
    entries: int = 0
    broken: int = 0
    broken_lines: list[BrokenLine] = field(default_factory=list)
    signed: dict[tuple[str, str], int] = field(default_factory=dict)
    clients: dict[tuple[str, str, str], tuple[int, int]] = field(default_factory=dict)
    onlookers: set[str] = field(default_factory=set)

    def take(self, file: _File, number: int, line: bytes) -> None:
        """Processes one line, complete or not."""
        if line in (b"\n", b"\r\n"):
            return
        bare = next((line[len(prefix) :] for prefix in self.prefixes if line.startswith(prefix)), line)
        entry = _entry(bare)
        at = None if entry is None else _seconds(entry.get("time"))
        if entry is None or at is None:
            self.broken += 1
            if len(self.broken_lines) < MAX_FAULTS:
                self.broken_lines.append(BrokenLine(file.name, number, self._excerpt(line)))
            return
        self.entries += 1
        file.first = min(file.first or at, at)
        file.last = max(file.last, at)
        self._judge(entry, at)

    def _excerpt(self, line: bytes) -> str:
        """The first characters; secrets are masked before the line is cut, so that no half of one is left."""
        text = self.clean(line[: 16 * EXCERPT].decode("latin-1").strip())
        return plain(_SECRET_LIKE.sub("…", text)[:EXCERPT])

    def _judge(self, entry: dict[str, Any], at: int) -> None:
        request = _object(entry, "request")
        path = str(request.get("path", ""))
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
    prefixes: Iterable[str] = (),
    clean: Callable[[str], str] = str,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> AuditFacts:
    """Reads the log and its rotated files; raises `Unavailable` if any of it cannot be read.

    `since` (seconds since the epoch) limits `clients` and `gaps`; `own` are the accessors of signer's own tokens as the
    log has them. `prefixes` are those of the audit devices; `clean` redacts an excerpt.
    """
    known = tuple(prefix.encode() for prefix in (*prefixes, *KNOWN_PREFIXES) if prefix)
    deadline = monotonic() + WITHIN
    for _ in range(ROUNDS):
        reading = _Reading(since, own, known, clean)
        remaining = MAX_BYTES
        with _opened(path) as log:
            before = _listed(path)
            size = os.fstat(log.fileno()).st_size
            files = [_file(name, path) for name in (*before, path.name)]
            if any(file.number == 0 for file in files[:-1]):
                files[-1].number = -1  # logrotate's `start 0`
            for file in files:
                for number, line in _numbered(path, file.name, log, sleep):
                    remaining -= len(line)
                    if remaining < 0 or monotonic() > deadline:
                        raise Unavailable(
                            "audit_log_too_large",
                            "Vault's audit log is too large to read",
                            "move rotated files from before the cutover elsewhere, or set no audit_log",
                        )
                    reading.take(file, number, line)
            is_same = os.fstat(log.fileno()).st_size >= size and _listed(path) == before and _is_at(log, path)
        if is_same:
            return _facts(reading, files, since)
    raise _unreadable(OSError(0, "it is rotated again and again"), path.name)


def _facts(reading: _Reading, files: list[_File], since: int) -> AuditFacts:
    filled = [file for file in files if file.first]
    return AuditFacts(
        first_at=min((file.first for file in filled), default=0),
        last_at=max((file.last for file in filled), default=0),
        entries=reading.entries,
        broken=reading.broken,
        signatures=tuple(Signature(*key, at) for key, at in sorted(reading.signed.items())),
        clients=reading.others(),
        broken_lines=tuple(reading.broken_lines),
        gaps=tuple(gap for gap in (*_missing_numbers(files), *_silences(filled)) if gap.end > since),
    )


def _missing_numbers(files: list[_File]) -> Iterator[Gap]:
    """Where a number is missing between rotated files: `.1` and `.3` without `.2`; the first one is 0 or 1."""
    numbered = sorted((file for file in files if file.number is not None), key=lambda file: file.number or 0)
    for newer, older in pairwise(numbered):
        if (older.number or 0) - (newer.number or 0) > 1:
            is_newer = [file for file in numbered if (file.number or 0) < (older.number or 0) and file.first]
            end = min((file.first for file in is_newer), default=int(time.time()))
            yield Gap(older.last, max(end, older.last), f"no file between {older.name} and {newer.name}")


def _silences(filled: list[_File]) -> Iterator[Gap]:
    """Long times between the entries of two files, unless both have numbers, which show what is missing."""
    in_order = sorted(filled, key=lambda file: (file.first, file.last))
    covered = in_order[:1]
    for file in in_order[1:]:
        before = max(covered, key=lambda other: other.last)
        is_numbered = file.number is not None and before.number is not None  # see _missing_numbers
        if file.first - before.last > MAX_SILENCE and not is_numbered:
            yield Gap(before.last, file.first, f"no entry between {before.name} and {file.name}")
        covered.append(file)


def _listed(path: Path) -> dict[str, int]:
    """Names of rotated files with their inodes, sorted."""
    with os_errors(lambda error: _unreadable(error, path.name)), os.scandir(path.parent) as entries:
        found = {one.name: one.inode() for one in entries if _is_rotated(one.name, path)}
    if len(found) > MAX_FILES:
        raise _unreadable(OSError(0, f"over {MAX_FILES} rotated files"), path.name)
    return dict(sorted(found.items()))


def _is_rotated(name: str, log: Path) -> bool:
    """True for `audit.log.1`, `audit.log-20261122.gz`, and with the extension last: `audit-20261122.log`."""
    if name == log.name or name.endswith((".sha256", ".asc", ".sig")):
        return False
    return name.startswith((f"{log.name}.", f"{log.name}-")) or _extension_last(log).fullmatch(name) is not None


def _extension_last(log: Path) -> re.Pattern[str]:
    return re.compile(
        rf"{re.escape(log.stem)}[-._](\d[\dT:_.-]{{0,40}}){re.escape(log.suffix)}(?:\.[a-z0-9]{{1,4}})?", re.ASCII
    )


def _file(name: str, log: Path) -> _File:
    """With the number of its rotation: 1 for `audit.log.1.gz` and `audit.1.log`, none for `audit.log-20261122`."""
    if name == log.name:
        return _File(name, 0)
    found = _NUMBER.fullmatch(name.removeprefix(f"{log.name}."))
    text = found[1] if found else ""
    if not text and log.suffix and (other := _extension_last(log).fullmatch(name)):
        text = other[1]
    return _File(name, int(text) if text.isdecimal() and len(text) < 5 else None)


def _is_at(log: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(log.fileno()), path.stat())
    except OSError:
        return False


def _opened(path: Path) -> BinaryIO:
    with os_errors(lambda error: _unreadable(error, path.name)):
        return open_regular(path, follow_links=True)


def _numbered(path: Path, name: str, log: BinaryIO, sleep: Callable[[float], None]) -> Iterator[tuple[int, bytes]]:
    """The lines of one file with their numbers from 1."""
    with nullcontext(log) if name == path.name else _opened(path.with_name(name)) as file:
        yield from enumerate(_lines(file, name, sleep), 1)


def _lines(bare: BinaryIO, name: str, sleep: Callable[[float], None]) -> Iterator[bytes]:
    """Lines with their line ends; a line that is too long is truncated. A last line without its end is read again."""
    try:
        file = _unpacked(bare, name)
        while line := file.readline(MAX_LINE):
            if not line.endswith(b"\n") and len(line) < MAX_LINE and file is bare:
                sleep(READ_AGAIN_AFTER)
                line += file.readline(MAX_LINE - len(line))
            yield line
            while not line.endswith(b"\n") and line:
                line = file.readline(MAX_LINE)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _unreadable(error, name) from None


def _unpacked(bare: BinaryIO, name: str) -> IO[bytes]:
    begin = bare.read(8)
    bare.seek(0)
    kind = next((kind for magic, kind in _PACKED if begin.startswith(magic)), "")
    if not kind:
        return bare
    if kind == "gzip":
        return gzip.GzipFile(fileobj=bare)  # type: ignore[return-value]
    if kind in ("xz", "lzma"):
        return lzma.LZMAFile(bare)
    if kind == "bzip2":
        return bz2.BZ2File(bare)
    raise Unavailable(
        "audit_log_packed",
        f"{name} is packed with {kind}, which cannot be read here",
        "unpack it in place, or pack it with gzip, xz or bzip2",
    )


def _unreadable(error: Exception, name: str) -> Unavailable:
    reason = getattr(error, "strerror", None) or "it is damaged"
    return Unavailable(
        "audit_log_unreadable",
        f"Vault's audit log cannot be read: {name}: {reason}",
        "set audit_log to a readable file",
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
    """The entry in a line, or None. A request to `/v1/` has no path."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.get("type") not in ("request", "response"):
        return None
    request = entry.get("request")
    return entry if isinstance(request, dict) and isinstance(request.get("path", ""), str) else None


def _object(entry: dict[str, Any], name: str) -> dict[str, Any]:
    value = entry.get(name)
    return value if isinstance(value, dict) else {}


def _failed(entry: dict[str, Any]) -> bool:
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
