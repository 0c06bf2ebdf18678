"""Vault's raft snapshot: stored 0600, whole or not at all, and compared with its own checksums.

A snapshot is a tar in gzip with `meta.json`, `state.bin` and `SHA256SUMS` of both; OpenBao and Vault add
`SHA256SUMS.sealed`, those sums under Vault's own key. The content of `state.bin` is encrypted by Vault. Headers are
parsed by `tarfile`; `TarFile` itself is not used, as it treats a damaged header as the end. Only these four plain files
are accepted, no links, no paths; all sizes are bounded, nothing is unpacked to disk.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import file_digest, sha256
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Final

from signer.errors import SignerError, write_hint
from signer.files import open_regular, os_errors, sync_directory, write_new
from signer.units import plain, timestamp

FOLDER: Final = "snapshots"
MAX_DOWNLOAD: Final = 256 * 1024**2  # bytes that Vault may send; the operator makes a larger one
DOWNLOAD_WITHIN: Final = 120.0  # seconds
MAX_FILE: Final = 64 * 1024**3  # bytes, packed and unpacked
MAX_SMALL: Final = 1024 * 1024  # bytes of meta.json and the sums
_PIECE: Final = 1024 * 1024
_STATE: Final = "state.bin"
_SMALL: Final = ("meta.json", "SHA256SUMS", "SHA256SUMS.sealed")
_MOUNT: Final = re.compile(rb"logical/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/")
_MOUNT_SIZE: Final = 44  # bytes of it, less one
_SUMMED: Final = {"meta.json", _STATE}


@dataclass(frozen=True, slots=True)
class Origin:
    """What a raft snapshot of this Vault has: its `servers` as (node id, host and port), an index of at least `index`,
    and entries of the mount whose uuid is `mount`. Without servers the storage is not raft."""

    servers: frozenset[tuple[str, str]]
    index: int
    mount: str


class BadSnapshot(SignerError):
    """The file is not a valid snapshot; `code` is the reason."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A checked snapshot. `index` is raft's, None for a file that is not a raft snapshot and has no inner checksums.

    `servers` are those of its raft configuration; `mounts` the uuids of mounts with entries in it; `at` is the time of
    its file in seconds since the epoch.
    """

    sha256: str
    size: int
    index: int | None
    servers: frozenset[tuple[str, str]] = frozenset()
    mounts: frozenset[str] = frozenset()
    at: int = 0

    def as_json(self) -> dict[str, object]:
        checked = "no inner checksums: not a raft snapshot" if self.index is None else "every inner checksum matches"
        return {"sha256": self.sha256, "size": self.size, "raft_index": self.index, "inner_checksums": checked}


def check_origin(found: Snapshot, origin: Origin, since: int = 0) -> None:
    """Raises `BadSnapshot` if a whole snapshot is not of that Vault, or older than its last write.

    A file that is not raft's says nothing of its origin; it must not be older than `since`, seconds since the epoch.
    """
    if found.index is None:
        if found.at < since:
            raise _too_old(f"it is of {timestamp(found.at)}, before the cutover at {timestamp(since)}")
        return
    if not origin.servers:
        raise _of_another("it is raft's, and the storage of this Vault is not")
    if found.servers != origin.servers:
        raise _of_another(f"its servers are {_names(found.servers)}, those of this Vault {_names(origin.servers)}")
    if origin.mount not in found.mounts:
        raise _of_another("it has no entry of this Vault's SSH mount")
    if found.index < origin.index:
        raise _too_old(f"its index is {found.index:,}, the last write of this Vault {origin.index:,}")


def _names(servers: frozenset[tuple[str, str]]) -> str:
    return plain(", ".join(f"{node} at {address}" for node, address in sorted(servers)[:9]) or "unknown")


def _of_another(why: str) -> BadSnapshot:
    return BadSnapshot(
        "snapshot_of_another_vault", f"the snapshot is not of this Vault: {why}", "make one of this Vault"
    )


def _too_old(why: str) -> BadSnapshot:
    return BadSnapshot("snapshot_old", f"the snapshot is too old: {why}", "make a new one, then plan again")


def check_snapshot(path: Path, expected: str = "", *, must_be_raft: bool = True) -> Snapshot:
    """Opens a snapshot and compares every sum in it; raises `BadSnapshot`. `check_origin` tells whose it is.

    `expected` is the hex SHA-256 of the whole file, if known. With `must_be_raft` False another kind of file is
    accepted if it matches `expected`.
    """
    with _opened(path) as file:
        with os_errors(_unreadable):
            found = file_digest(file, "sha256").hexdigest()
        if expected and found != expected:
            raise BadSnapshot("snapshot_differs", "the snapshot does not match snapshot_sha256", "make a new one")
        facts = os.fstat(file.fileno())
        size, at = facts.st_size, int(facts.st_mtime)
        file.seek(0)
        if not must_be_raft and file.read(2) != b"\x1f\x8b":
            return Snapshot(found, size, None, at=at)
        file.seek(0)
        try:
            index, servers, mounts = _read_archive(file)
        except BadSnapshot as error:
            if must_be_raft or error.code != "snapshot_of_another_form":
                raise
            return Snapshot(found, size, None, at=at)
    return Snapshot(found, size, index, servers, mounts, at)


def store_snapshot(content: bytes, target: Path, origin: Origin) -> Snapshot:
    """Writes what Vault sent to a file that must not exist, and checks it; raises `SignerError`, leaving no file."""
    return _stored(target, iter([content]), "", origin, 0, must_be_raft=True)


def copy_snapshot(
    source: Path, target: Path, expected: str, origin: Origin, since: int, *, must_be_raft: bool
) -> Snapshot:
    """As `store_snapshot` for the operator's own file, with the checksum that the operator gave."""
    with _opened(source) as file:
        pieces = iter(lambda: file.read(_PIECE), b"")
        at = int(os.fstat(file.fileno()).st_mtime)
        if not must_be_raft and at < since:
            raise _too_old(f"it is of {timestamp(at)}, before the cutover at {timestamp(since)}")
        return _stored(target, pieces, expected, origin, since, must_be_raft=must_be_raft)


def _stored(
    target: Path, pieces: Iterator[bytes], expected: str, origin: Origin, since: int, *, must_be_raft: bool
) -> Snapshot:
    """Stores under a temporary name until checked; replaces the rest of an interrupted run."""
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        write_new(part, _limited(pieces), 0o600)
        found = check_snapshot(part, expected, must_be_raft=must_be_raft)
        check_origin(found, origin, since)
        os.link(part, target)
        sync_directory(target.parent)
    except OSError as error:
        raise SignerError(
            "snapshot_unwritable",
            f"the snapshot cannot be stored: {error.strerror}",
            f"{write_hint(error, 'the evidence directory')}, then apply the same plan again",
        ) from None
    finally:
        with suppress(OSError):  # keep the original error
            part.unlink(missing_ok=True)
    return found


def _limited(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same pieces; raises `OSError` if their total exceeds `MAX_FILE`."""
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_FILE:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        yield piece


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    with os_errors(_unreadable):
        file = open_regular(path, follow_links=True)
    with file:
        if os.fstat(file.fileno()).st_size > MAX_FILE:
            raise _unreadable(OSError(errno.EFBIG, "it is too large"))
        yield file


def _unreadable(error: OSError) -> BadSnapshot:
    text = f"the snapshot cannot be read: {error.strerror or 'input or output failed'}"
    return BadSnapshot("snapshot_unreadable", text, "name a file that you may read")


# --- archive contents ------------------------------------------------------------------------------------------------


def _read_archive(file: BinaryIO) -> tuple[int, frozenset[tuple[str, str]], frozenset[str]]:
    """Raft index, servers, and uuids of mounts of a complete snapshot; raises `BadSnapshot`.

    Vault encrypts values, not names: `logical/<uuid>/…` shows the mounts that have entries.
    """
    small: dict[str, bytes] = {}
    sums: dict[str, str] = {}
    sizes: dict[str, int] = {}
    mounts: set[str] = set()
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as archive:
            while (header := _header(archive)) is not None:
                name, size = header
                if name in sums:
                    raise _damaged(f"it has {name} twice")
                digest, kept, end = sha256(), b"", b""
                for piece in _content(archive, size):
                    digest.update(piece)
                    kept += piece if name in _SMALL else b""
                    mounts.update(found.decode() for found in _MOUNT.findall(end + piece))
                    end = piece[-_MOUNT_SIZE:]
                sums[name], sizes[name] = digest.hexdigest(), size
                if name in _SMALL:
                    small[name] = kept
            _check_end(archive)
    except EOFError:
        raise BadSnapshot("snapshot_truncated", "the snapshot ends too early", "make a new one") from None
    except gzip.BadGzipFile as error:
        if not sums and "Not a gzipped file" in str(error):
            raise _another_form() from None
        raise _damaged("it cannot be unpacked") from None
    except zlib.error:
        raise _damaged("it cannot be unpacked") from None
    except OSError as error:
        raise _unreadable(error) from None
    _check_sums(small, sums)
    return *_read_meta(small["meta.json"], sizes[_STATE]), frozenset(mounts)


def _header(archive: gzip.GzipFile) -> tuple[str, int] | None:
    """Name and size of the next file; None at the end of the archive."""
    block = _exactly(archive, tarfile.BLOCKSIZE)
    if block == bytes(tarfile.BLOCKSIZE):
        return None
    try:
        member = tarfile.TarInfo.frombuf(block, "latin-1", "strict")
    except tarfile.HeaderError:
        raise _another_form() from None
    if member.name not in (*_SMALL, _STATE) or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise _another_form()
    if not 0 <= member.size <= (MAX_SMALL if member.name in _SMALL else MAX_FILE):
        raise _damaged(f"{member.name} has an impossible size")
    return member.name, member.size


def _content(archive: gzip.GzipFile, size: int) -> Iterator[bytes]:
    """A file's bytes in pieces; also reads the padding of its last block."""
    remaining = size
    while remaining:
        piece = _exactly(archive, min(remaining, _PIECE))
        remaining -= len(piece)
        yield piece
    _exactly(archive, -size % tarfile.BLOCKSIZE)


def _check_end(archive: gzip.GzipFile) -> None:
    """Reads zeros to the end, which also verifies the checksum of gzip."""
    for _ in range(MAX_SMALL // tarfile.BLOCKSIZE):
        rest = archive.read(tarfile.BLOCKSIZE)
        if not rest:
            return
        if any(rest):
            break
    raise _damaged("data follows its end")


def _exactly(archive: gzip.GzipFile, size: int) -> bytes:
    found = archive.read(size)
    if len(found) != size:
        raise EOFError
    return found


def _check_sums(small: dict[str, bytes], sums: dict[str, str]) -> None:
    missing = {*_SUMMED, "SHA256SUMS"} - sums.keys()
    if missing:
        raise _damaged(f"{sorted(missing)[0]} is missing")
    expected: dict[str, str] = {}
    for line in small["SHA256SUMS"].decode("latin-1").splitlines():
        digest, _, name = line.partition("  ")
        if name in expected or name not in _SUMMED:
            raise _damaged("its checksums are for other files")
        expected[name] = digest
    for name in sorted(_SUMMED):
        if expected.get(name) != sums[name]:
            raise _damaged(f"{name} differs from its checksum")


def _read_meta(meta: bytes, state_size: int) -> tuple[int, frozenset[tuple[str, str]]]:
    """Raft's index and servers."""
    try:
        parsed: Any = json.loads(meta)
        index, size = parsed["Index"], parsed["Size"]
        servers = frozenset(
            (str(one["ID"]), str(one["Address"])) for one in (parsed.get("Configuration") or {}).get("Servers") or ()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged("meta.json is not raft's") from None
    if type(index) is not int or type(size) is not int or size != state_size or index < 1:
        raise _damaged("meta.json belongs to another state")
    return index, servers


def _damaged(why: str) -> BadSnapshot:
    return BadSnapshot("snapshot_damaged", f"the snapshot is damaged: {why}", "make a new one")


def _another_form() -> BadSnapshot:
    return BadSnapshot(
        "snapshot_of_another_form",
        "the file is not a raft snapshot of Vault or OpenBao",
        "make one with: bao operator raft snapshot save",
    )
