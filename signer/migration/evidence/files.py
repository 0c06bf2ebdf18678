"""The files of a run's evidence on disk: names, checksums, and reading them as untrusted input.

A directory may come from anywhere: nothing here follows a link, blocks on a pipe or reads beyond its limit.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Final

from signer.files import open_regular

SUMS: Final = "SHA256SUMS"
LEDGER: Final = "ledger.json"
OUTCOME: Final = "outcome.json"
PAGE: Final = "evidence.html"
JSON_LIMIT: Final = 16 << 20  # bytes
MAX_FILES: Final = 5_000
_CHUNK: Final = 1 << 20
_WORD: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
NAME: Final = re.compile(f"{_WORD}(?:/{_WORD})?", re.ASCII)  # of a file: one word, or one folder and one word
_LINE: Final = re.compile(rf"([0-9a-f]{{64}})  ({_WORD}(?:/{_WORD})?)", re.ASCII)


class UnexpectedFile(Exception):
    """`name` is not a file of a run; `what` is the reason, as the rest of the sentence. Never leaves this package."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(name, what)
        self.name = name
        self.what = what


def numbered(folder: str, number: int, name: str, suffix: str) -> str:
    """A valid name for an evidence file, from any target or step name, such as `steps/03-trust.json`."""
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "unnamed"
    return f"{folder}/{number:02}-{word[:60]}.{suffix}"


def found_in(folder: Path) -> list[str]:
    """Names of all files, sorted as bytes; raises `OSError`, or `UnexpectedFile` for any other entry."""
    found: list[str] = []
    for name, facts in entries(folder):
        if len(found) >= MAX_FILES:
            raise UnexpectedFile(name, f"is one file more than {MAX_FILES}")
        if stat.S_ISREG(facts.st_mode):
            found.append(name)
        elif not stat.S_ISDIR(facts.st_mode) or "/" in name:
            raise UnexpectedFile(name, f"is {kind_of(facts)}")
    return sorted(found)


def entries(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Entries of a directory and of its subdirectories, not deeper; raises `OSError`. Follows no link."""
    with os.scandir(folder) as listed:
        for entry in listed:
            facts = entry.stat(follow_symlinks=False)
            yield entry.name, facts
            if stat.S_ISDIR(facts.st_mode):
                with os.scandir(entry.path) as inner:
                    for below in inner:
                        yield f"{entry.name}/{below.name}", below.stat(follow_symlinks=False)


def kind_of(facts: os.stat_result) -> str:
    kinds = {
        stat.S_IFLNK: "a link", stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
        stat.S_IFBLK: "a device", stat.S_IFCHR: "a device",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(facts.st_mode), "not a regular file")


def read_bounded(folder: Path, name: str, limit: int | None) -> bytes:
    """The content of one file of at most `limit` bytes; raises `OSError` or `UnexpectedFile`."""
    return b"".join(read_pieces(folder, name, limit))


def read_pieces(folder: Path, name: str, limit: int | None) -> Iterator[bytes]:
    """The same in pieces."""

    def check(facts: os.stat_result) -> None:
        if not stat.S_ISREG(facts.st_mode):
            raise UnexpectedFile(name, f"is {kind_of(facts)}")

    try:
        file = open_regular(folder / name, check=check)
    except OSError as error:
        if error.errno == errno.ELOOP:  # O_NOFOLLOW at a link
            raise UnexpectedFile(name, "is a link") from None
        raise
    with file:
        left = os.fstat(file.fileno()).st_size if limit is None else limit
        while piece := file.read(_CHUNK):
            left -= len(piece)
            if left < 0:
                raise UnexpectedFile(name, "grew while it was read" if limit is None else f"has over {limit:,} bytes")
            yield piece


def sum_of(folder: Path, name: str, limit: int) -> tuple[str, int]:
    """Hex SHA-256 and size of one file; raises as `read_bounded`."""
    digest, size = sha256(), 0
    for piece in read_pieces(folder, name, limit):
        digest.update(piece)
        size += len(piece)
    return digest.hexdigest(), size


def render_sums(sums: Mapping[str, str]) -> bytes:
    """As `sha256sum -c` reads it, sorted by name."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()


def parse_sums(content: bytes) -> dict[str, str]:
    """Name to checksum; raises `ValueError` unless `render_sums` could have written the content."""
    sums: dict[str, str] = {}
    for line in content.decode("ascii").splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError("a line is not a checksum and a name")
        sums[match[2]] = match[1]
    if not sums or render_sums(sums) != content:
        raise ValueError("lines are out of order, or a file is listed twice")
    return sums


def digest_of(sums: bytes) -> str:
    """The digest of a run's evidence: that of its SHA256SUMS."""
    return "sha256:" + sha256(sums).hexdigest()
