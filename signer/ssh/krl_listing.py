"""What `ssh-keygen -Qlf` shows of a revocation list, compared with the list that was meant.

OpenSSH's reader is the one that hosts use, so its view of a list decides whether the list is published. Format:
`krl_dump` in OpenSSH's krl.c, 8.3 and later. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from signer.errors import BadFormat
from signer.ssh.fingerprint import fingerprint_of
from signer.ssh.krl import ANY_CA, Range, RevocationList

_VERSION: Final = re.compile(r"# KRL version ([0-9]{1,20})")
_CA: Final = re.compile(r"# CA key \S+ (SHA256:\S+)")
_ANY: Final = "# Wildcard CA"
_KEY: Final = re.compile(r"hash: (SHA256:\S+) # \S+")  # of a key that is listed whole
_SHA256: Final = re.compile(r"hash: SHA256:([0-9a-f]{64})")
_SHA1: Final = re.compile(r"# hash SHA1:([0-9a-f]{40})")
_SERIALS: Final = re.compile(r"serial: ([0-9]{1,20})(?:-([0-9]{1,20}))?")
_ID: Final = "id: "


@dataclass(slots=True)
class _Certificates:
    ranges: list[Range] = field(default_factory=list)
    key_ids: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Listing:
    """What a listing shows: digests in hex, keys and CAs by their fingerprints, the CA of any as an empty text."""

    version: int = -1
    keys: set[str] = field(default_factory=set)
    sha256: set[str] = field(default_factory=set)
    sha1: set[str] = field(default_factory=set)
    certificates: dict[str, _Certificates] = field(default_factory=dict)


def check_listing(text: str, meant: RevocationList) -> None:
    """Raises `BadFormat` unless the listing shows exactly what is in `meant`.

    The date is not compared, because a listing has it in local time. A key id with other characters than printable
    ASCII is shown escaped: then only the number of key ids is compared.
    """
    shown = _read(text)
    # OpenSSH does not keep a section in which nothing is revoked.
    sections = {_name(ca): part for ca, part in meant.certificates.items() if part.ranges or part.key_ids}
    pairs: Mapping[str, tuple[object, object]] = {
        "its version": (shown.version, meant.version),
        "the keys": (shown.keys, {fingerprint_of(blob) for blob in meant.keys}),
        "the SHA-256 digests of keys": (shown.sha256, {digest.hex() for digest in meant.sha256}),
        "the SHA-1 digests of keys": (shown.sha1, {digest.hex() for digest in meant.sha1}),
        "the CAs": (set(shown.certificates), sections.keys()),
    }
    for what, (is_shown, is_meant) in pairs.items():
        if is_shown != is_meant:
            raise _differs(what)
    for ca, part in sections.items():
        found = shown.certificates[ca]
        if tuple(found.ranges) != part.ranges:
            raise _differs("the serials")
        if not _same_ids(found.key_ids, sorted(part.key_ids)):
            raise _differs("the key ids")


def _name(ca: bytes) -> str:
    return "" if ca == ANY_CA else fingerprint_of(ca)


def _same_ids(shown: list[str], meant: list[str]) -> bool:
    if all(one.isascii() and one.isprintable() and "\\" not in one for one in meant):
        return sorted(shown) == meant
    return len(shown) == len(meant)


def _differs(what: str) -> BadFormat:
    return BadFormat("bad_format", f"ssh-keygen reads another list than was meant: {what} differ")


def _read(text: str) -> _Listing:
    listing, section = _Listing(), None
    for line in _lines(text):
        if match := _SERIALS.fullmatch(line):
            first = int(match[1])
            _section(section).ranges.append((first, int(match[2] or first)))
        elif line.startswith(_ID):
            _section(section).key_ids.append(line.removeprefix(_ID))
        elif line == _ANY:
            section = listing.certificates.setdefault("", _Certificates())
        elif match := _CA.fullmatch(line):
            section = listing.certificates.setdefault(match[1], _Certificates())
        elif match := _SHA256.fullmatch(line):
            listing.sha256.add(match[1])
        elif match := _KEY.fullmatch(line):
            listing.keys.add(match[1])
        elif match := _SHA1.fullmatch(line):
            listing.sha1.add(match[1])
        elif match := _VERSION.fullmatch(line):
            listing.version = int(match[1])
        elif not line.startswith("#"):
            raise BadFormat("bad_format", f"ssh-keygen shows an unknown line of the list: {line[:60]!a}")
    return listing


def _lines(text: str) -> Iterator[str]:
    return (line for line in text.split("\n") if line)


def _section(section: _Certificates | None) -> _Certificates:
    if section is None:
        raise BadFormat("bad_format", "ssh-keygen shows a certificate of no CA")
    return section
