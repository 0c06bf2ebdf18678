"""What `ssh-keygen -Qlf` shows of a revocation list, compared with the list that was meant.

OpenSSH's reader is the one that hosts use, so its view of a list decides whether the list is published. Format:
`krl_dump` in OpenSSH's krl.c, 8.3 and later. Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from signer.errors import BadFormat
from signer.ssh.fingerprint import fingerprint_of
from signer.ssh.krl import ANY_CA, Range, RevocationList

_VERSION: Final = re.compile(r"# KRL version ([0-9]{1,20})")
_CA: Final = re.compile(r"# CA key \S+ (SHA256:\S+)")
_ANY: Final = "# Wildcard CA"
_SHA1: Final = re.compile(r"# hash SHA1:")  # which no list of signer's has
_SHA256: Final = re.compile(r"hash: SHA256:([0-9a-f]{64})")
_SERIALS: Final = re.compile(r"serial: ([0-9]{1,20})(?:-([0-9]{1,20}))?")


@dataclass(slots=True)
class _Listing:
    """What a listing shows: digests in hex, CAs by their fingerprints, the CA of any as an empty text."""

    version: int = -1
    sha256: set[str] = field(default_factory=set)
    ranges: dict[str, list[Range]] = field(default_factory=dict)  # of serials, by CA


def check_listing(text: str, meant: RevocationList) -> None:
    """Raises `BadFormat` unless the listing shows exactly what is in `meant`, but for its date, in local time there."""
    shown = _read(text)
    # OpenSSH does not keep a section in which nothing is revoked.
    ranges = {_name(ca): list(found) for ca, found in meant.certificates.items() if found}
    for what, is_shown, is_meant in (
        ("its version", shown.version, meant.version),
        ("the SHA-256 digests of keys", shown.sha256, {digest.hex() for digest in meant.sha256}),
        ("the CAs", shown.ranges.keys(), ranges.keys()),
        ("the serials", shown.ranges, ranges),
    ):
        if is_shown != is_meant:
            raise BadFormat("bad_format", f"ssh-keygen reads another list than was meant: {what} differ")


def _name(ca: bytes) -> str:
    return "" if ca == ANY_CA else fingerprint_of(ca)


def _read(text: str) -> _Listing:
    listing = _Listing()
    section: list[Range] | None = None
    for line in filter(None, text.split("\n")):
        if match := _SERIALS.fullmatch(line):
            if section is None:
                raise BadFormat("bad_format", "ssh-keygen shows a certificate of no CA")
            first = int(match[1])
            section.append((first, int(match[2] or first)))
        elif line == _ANY:
            section = listing.ranges.setdefault("", [])
        elif match := _CA.fullmatch(line):
            section = listing.ranges.setdefault(match[1], [])
        elif match := _SHA256.fullmatch(line):
            listing.sha256.add(match[1])
        elif match := _VERSION.fullmatch(line):
            listing.version = int(match[1])
        elif not line.startswith("#") or _SHA1.match(line):
            raise BadFormat("bad_format", f"ssh-keygen shows an unknown line of the list: {line[:60]!a}")
    return listing
