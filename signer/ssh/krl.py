"""Key revocation lists: what is revoked to the bytes that sshd reads, and back; and what `ssh-keygen -Qlf` shows of it.

Formats: OpenSSH PROTOCOL.krl, format version 1, and `krl_dump` in OpenSSH's krl.c, 8.3 and later. Pure. Two limits of
OpenSSH decide what is written: it cannot load a bitmap of more than 16,384 bits though `ssh-keygen -k` writes one, and
it refuses a list with a signature section. Its reader is the one that hosts use, so its view of a list decides whether
the list is published.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from operator import eq
from types import MappingProxyType
from typing import Final

from signer.errors import BadFormat
from signer.ssh.fingerprint import fingerprint_of
from signer.ssh.wire import Reader, string, uint32, uint64

MAX_LIST: Final = 4 * 1024 * 1024  # bytes that the reader takes
MAX_RANGES: Final = 500_000  # ranges of serials that the reader takes; a bitmap of 2 kB can hold 8,192
MAX_SERIAL: Final = 2**64 - 1
MAX_BITMAP: Final = 16_384  # bits; `sshbuf_get_bignum2_bytes_direct` takes 2,048 bytes and a zero before them
ANY_CA: Final = b""

_MAGIC: Final = b"SSHKRL\n\0"
_FORMAT: Final = 1
_CERTIFICATES, _SHA256 = 1, 5
_SERIAL_LIST, _SERIAL_RANGE, _SERIAL_BITMAP = 0x20, 0x21, 0x22
_SECTION_HEAD: Final = 5  # bytes: the type, and the length of what follows
_LISTED: Final = 8  # bytes of a serial in a list
_RANGED: Final = _SECTION_HEAD + 16
_MAPPED: Final = _SECTION_HEAD + 8 + 4 + 1  # bytes of a bitmap besides its bits

_LISTED_VERSION: Final = re.compile(r"# KRL version ([0-9]{1,20})")
_LISTED_CA: Final = re.compile(r"# CA key \S+ (SHA256:\S+)")
_LISTED_ANY: Final = "# Wildcard CA"
_LISTED_SHA1: Final = re.compile(r"# hash SHA1:")  # which no list of signer's has
_LISTED_SHA256: Final = re.compile(r"hash: SHA256:([0-9a-f]{64})")
_LISTED_SERIALS: Final = re.compile(r"serial: ([0-9]{1,20})(?:-([0-9]{1,20}))?")

Range = tuple[int, int]  # the first and the last serial


@dataclass(frozen=True, slots=True)
class RevocationList:
    """What sshd refuses. A key is a user's or a CA's: a revoked CA key ends all of its certificates.

    `certificates` maps the CA's public key blob, or `ANY_CA`, to the serials that are revoked of it, as ranges that are
    sorted and neither overlap nor touch; OpenSSH never matches serial 0. `date` is in seconds since 1970, `sha256` are
    digests of public key blobs.
    """

    version: int
    date: int
    comment: str = ""
    certificates: Mapping[bytes, tuple[Range, ...]] = field(default_factory=lambda: MappingProxyType({}))
    sha256: frozenset[bytes] = frozenset()


def merge_ranges(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same serials as sorted ranges that neither overlap nor touch; raises `BadFormat` for an invalid range."""
    merged: list[Range] = []
    for first, last in sorted(ranges):
        if not 0 < first <= last <= MAX_SERIAL:
            raise BadFormat("bad_format", f"serials {first} to {last} are not a range of serials from 1 to 2**64 - 1")
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], last)
        else:
            merged.append((first, last))
    return tuple(merged)


def group_serials(serials: Iterable[int]) -> list[Range]:
    """Serials in any order, repeats allowed, as sorted ranges that neither overlap nor touch; checks no limits.

    Takes no step in Python for a serial in the middle of a range, so contiguous serials cost little more than a sort.
    """
    ordered = sorted(serials)
    if any(map(eq, ordered, islice(ordered, 1, None))):
        ordered = sorted(set(ordered))
    ranges: list[Range] = []
    at = 0
    while at < len(ordered):
        end = _run_end(ordered, at)
        ranges.append((ordered[at], ordered[end - 1]))
        at = end
    return ranges


def _run_end(ordered: Sequence[int], at: int) -> int:
    """The index after the last of the contiguous serials from index `at` on; serials ascend without repeats."""
    base = ordered[at] - at  # each later serial of the run is this plus its index
    step = 1
    while at + step < len(ordered) and ordered[at + step] == base + at + step:
        step *= 2
    if step == 1:
        return at + 1
    between = range(at + step // 2, min(at + step, len(ordered)))
    return between.start + bisect_left(between, True, key=lambda index: ordered[index] != base + index)


# --- writing --------------------------------------------------------------------------------------------------------


def encode_krl(revoked: RevocationList) -> bytes:
    """The list as bytes: the same list always gives the same bytes. Raises `BadFormat` for an invalid range."""
    parts = [_MAGIC, uint32(_FORMAT), uint64(revoked.version), uint64(revoked.date), uint64(0), string(b"")]
    parts.append(string(revoked.comment.encode()))
    for ca, ranges in sorted(revoked.certificates.items()):
        parts.append(
            _section(_CERTIFICATES, b"".join((string(ca), string(b""), *_encode_serials(merge_ranges(ranges)))))
        )
    if revoked.sha256:
        parts.append(_section(_SHA256, b"".join(map(string, sorted(revoked.sha256)))))
    return b"".join(parts)


def _section(kind: int, data: bytes) -> bytes:
    return bytes((kind,)) + string(data)


def _encode_serials(ranges: tuple[Range, ...]) -> Iterator[bytes]:
    """Sections in ascending order: dense parts as bitmaps, the rest as lists and ranges, whichever is smaller."""
    listed: list[int] = []
    for cluster in _clusters(ranges):
        apart = sum(_size(first, last) for first, last in cluster)
        start, end = cluster[0][0], cluster[-1][1]
        if _MAPPED + (end - start) // 8 + 1 < apart:
            yield from _flush(listed)
            yield _section(_SERIAL_BITMAP, uint64(start) + _encode_bitmap(start, end, cluster))
            continue
        for first, last in cluster:
            if _size(first, last) == _RANGED:
                yield from _flush(listed)
                yield _section(_SERIAL_RANGE, uint64(first) + uint64(last))
            else:
                listed += range(first, last + 1)
    yield from _flush(listed)


def _size(first: int, last: int) -> int:
    """Bytes of a range by itself, at most."""
    return min(_RANGED, _LISTED * (last - first + 1))


def _clusters(ranges: tuple[Range, ...]) -> Iterator[list[Range]]:
    """Neighbouring ranges that a bitmap may hold: each makes it longer by fewer bytes than it takes by itself."""
    cluster: list[Range] = []
    for first, last in ranges:
        if cluster:
            grows = (last - cluster[-1][1]) // 8
            if grows >= _size(first, last) or last - cluster[0][0] >= MAX_BITMAP:
                yield cluster
                cluster = []
        cluster.append((first, last))
    if cluster:
        yield cluster


def _encode_bitmap(start: int, end: int, cluster: list[Range]) -> bytes:
    """The bits of the serials from `start` to `end` as an mpint; bit 0 is `start`."""
    bits = bytearray((end - start) // 8 + 1)  # little endian
    for serial in chain.from_iterable(range(first, last + 1) for first, last in cluster):
        at = serial - start
        bits[at // 8] |= 1 << at % 8
    number = bytes(reversed(bits))  # its first byte is not 0, as `end` is in it
    return string(b"\0" + number if number[0] >= 0x80 else number)


def _flush(listed: list[int]) -> Iterator[bytes]:
    if listed:
        yield _section(_SERIAL_LIST, b"".join(map(uint64, listed)))
        listed.clear()


# --- reading --------------------------------------------------------------------------------------------------------


def decode_krl(data: bytes) -> RevocationList:
    """Reads a list with what this module writes; raises `BadFormat` for any other part, and for what sshd refuses."""
    if len(data) > MAX_LIST:
        raise BadFormat("bad_format", f"the list has {len(data)} bytes; at most {MAX_LIST} are read")
    reader = _open(data)
    version, date, flags = reader.uint64(), reader.uint64(), reader.uint64()
    reader.string()  # reserved
    comment = reader.text()
    if flags:
        raise BadFormat("bad_format", f"flags {flags:#x} are unknown")
    found = _Found()
    while not reader.at_end():
        kind, section = reader.byte(), Reader(reader.string())
        if kind == _CERTIFICATES:
            _read_certificates(section, found)
        elif kind == _SHA256:
            _read_digests(section, found)
        else:
            raise BadFormat("bad_format", f"the list has a section of type {kind}")
    certificates = {ca: merge_ranges(ranges) for ca, ranges in found.ranges.items()}
    return RevocationList(version, date, comment, MappingProxyType(certificates), frozenset(found.sha256))


def krl_version(data: bytes) -> int:
    """The version in the head of a list; raises `BadFormat` if it is none."""
    return _open(data).uint64()


def _open(data: bytes) -> Reader:
    """A reader that stands before the version; raises `BadFormat` for another format."""
    reader = Reader(data)
    if reader.take(len(_MAGIC)) != _MAGIC or reader.uint32() != _FORMAT:
        raise BadFormat("bad_format", "this is not a revocation list of OpenSSH's format 1")
    return reader


class _Found:
    """What was read so far."""

    def __init__(self) -> None:
        self.ranges: dict[bytes, list[Range]] = {}
        self.sha256: set[bytes] = set()
        self._left = MAX_RANGES

    def add_range(self, ca: bytes, first: int, last: int) -> None:
        self._left -= 1
        if self._left < 0:
            raise BadFormat("bad_format", f"the list has more than {MAX_RANGES} ranges of serials")
        self.ranges[ca].append((first, last))


def _read_digests(section: Reader, found: _Found) -> None:
    while not section.at_end():
        digest = section.string()
        if len(digest) != 32:
            raise BadFormat("bad_format", f"a digest has {len(digest)} bytes instead of 32")
        found.sha256.add(digest)


def _read_certificates(section: Reader, found: _Found) -> None:
    ca = section.string()
    section.string()  # reserved
    found.ranges.setdefault(ca, [])
    while not section.at_end():
        kind, part = section.byte(), Reader(section.string())
        if kind == _SERIAL_LIST:
            while not part.at_end():
                serial = part.uint64()
                found.add_range(ca, serial, serial)
        elif kind == _SERIAL_RANGE:
            found.add_range(ca, part.uint64(), part.uint64())
        elif kind == _SERIAL_BITMAP:
            for first, last in _runs(part.uint64(), part.string()):
                found.add_range(ca, first, last)
        else:
            raise BadFormat("bad_format", f"the list has a section of type {kind:#x} about certificates")
        part.expect_end()


def _runs(offset: int, mpint: bytes) -> Iterator[Range]:
    """The ranges in a bitmap whose lowest bit is the serial `offset`."""
    if mpint[:1] >= b"\x80" or len(mpint.lstrip(b"\0")) * 8 > MAX_BITMAP:
        raise BadFormat("bad_format", f"a bitmap is negative, or longer than the {MAX_BITMAP} bits that sshd loads")
    bits = bin(int.from_bytes(mpint, "big"))[:1:-1]  # lowest bit first
    at = bits.find("1")
    while at >= 0:
        end = bits.find("0", at)
        end = len(bits) if end < 0 else end
        yield offset + at, offset + end - 1
        at = bits.find("1", end)


# --- listings ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Listing:
    """What a listing shows: digests in hex, CAs by their fingerprints, the CA of any as an empty text."""

    version: int = -1
    sha256: set[str] = field(default_factory=set)
    ranges: dict[str, list[Range]] = field(default_factory=dict)  # of serials, by CA


def check_listing(text: str, meant: RevocationList) -> None:
    """Raises `BadFormat` unless the listing shows exactly what is in `meant`, but for its date, in local time there."""
    shown = _read_listing(text)
    # OpenSSH does not keep a section in which nothing is revoked.
    ranges = {_listed_name(ca): list(found) for ca, found in meant.certificates.items() if found}
    for what, is_shown, is_meant in (
        ("its version", shown.version, meant.version),
        ("the SHA-256 digests of keys", shown.sha256, {digest.hex() for digest in meant.sha256}),
        ("the CAs", shown.ranges.keys(), ranges.keys()),
        ("the serials", shown.ranges, ranges),
    ):
        if is_shown != is_meant:
            raise BadFormat("bad_format", f"ssh-keygen reads another list than was meant: {what} differ")


def _listed_name(ca: bytes) -> str:
    return "" if ca == ANY_CA else fingerprint_of(ca)


def _read_listing(text: str) -> _Listing:
    listing = _Listing()
    section: list[Range] | None = None
    for line in filter(None, text.split("\n")):
        if match := _LISTED_SERIALS.fullmatch(line):
            if section is None:
                raise BadFormat("bad_format", "ssh-keygen shows a certificate of no CA")
            first = int(match[1])
            section.append((first, int(match[2] or first)))
        elif line == _LISTED_ANY:
            section = listing.ranges.setdefault("", [])
        elif match := _LISTED_CA.fullmatch(line):
            section = listing.ranges.setdefault(match[1], [])
        elif match := _LISTED_SHA256.fullmatch(line):
            listing.sha256.add(match[1])
        elif match := _LISTED_VERSION.fullmatch(line):
            listing.version = int(match[1])
        elif not line.startswith("#") or _LISTED_SHA1.match(line):
            raise BadFormat("bad_format", f"ssh-keygen shows an unknown line of the list: {line[:60]!a}")
    return listing
