"""The SSH data types of RFC 4251 section 5: reading and writing, strictly.

Pure functions over bytes. Invalid input raises only `BadFormat`. Imports only `signer.errors`, because
each import delays every `safe-session` login.
"""

from __future__ import annotations

from struct import Struct
from typing import Any

from signer.errors import BadFormat

ENDS_EARLY = "data ends before the value does"


def string(data: bytes) -> bytes:
    """`data` with its length in front, four bytes, big endian (RFC 4251 `string`)."""
    return len(data).to_bytes(4, "big") + data


def uint32(number: int) -> bytes:
    """Four bytes, big endian."""
    return number.to_bytes(4, "big")


def uint64(number: int) -> bytes:
    """Eight bytes, big endian."""
    return number.to_bytes(8, "big")


def mpint(number: int) -> bytes:
    """A non-negative number in its shortest form, with its length in front (RFC 4251 `mpint`)."""
    return string(number.to_bytes(number.bit_length() // 8 + 1, "big") if number else b"")


class Reader:
    """Takes RFC 4251 values from the front of `data`, in order; raises `BadFormat` where they run out."""

    __slots__ = ("_at", "_data", "_size")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._size = len(data)
        self._at = 0

    def take(self, count: int) -> bytes:
        at = self._at
        end = at + count
        if end > self._size:
            raise BadFormat("bad_format", ENDS_EARLY)
        self._at = end
        return self._data[at:end]

    def byte(self) -> int:
        return self.take(1)[0]

    def uint32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def uint64(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def numbers(self, layout: Struct) -> tuple[Any, ...]:
        """Numbers that follow each other."""
        at = self._at
        if at + layout.size > self._size:
            raise BadFormat("bad_format", ENDS_EARLY)
        self._at = at + layout.size
        return layout.unpack_from(self._data, at)

    def string(self) -> bytes:
        # take() twice, inlined for speed: each certificate is read back before signing
        data, start = self._data, self._at + 4
        end = start + int.from_bytes(data[start - 4 : start], "big")
        if start > self._size or end > self._size:
            raise BadFormat("bad_format", ENDS_EARLY)
        self._at = end
        return data[start:end]

    def strings(self, count: int) -> list[bytes]:
        data, size, at = self._data, self._size, self._at
        found = []
        for _ in range(count):  # as `string`, without a call for each
            start = at + 4
            at = start + int.from_bytes(data[at:start], "big")
            if start > size or at > size:
                raise BadFormat("bad_format", ENDS_EARLY)
            found.append(data[start:at])
        self._at = at
        return found

    def encoded_strings(self, count: int) -> bytes:
        """The next `count` strings as they stand in the data, each with its length in front."""
        start = self._at
        self.strings(count)
        return self._data[start : self._at]

    def text(self) -> str:
        """A string that must be UTF-8."""
        try:
            return self.string().decode()
        except UnicodeDecodeError:
            raise BadFormat("bad_format", "a text field is not UTF-8") from None

    def mpint(self) -> int:
        """A non-negative number in its shortest form (RFC 4251 `mpint`)."""
        raw = self.string()
        if raw[:1] >= b"\x80":
            raise BadFormat("bad_format", "a number is negative")
        if raw[:1] == b"\x00" and raw[1:2] < b"\x80":
            raise BadFormat("bad_format", "a number has needless leading zeros")
        return int.from_bytes(raw, "big")

    def at_end(self) -> bool:
        return self._at == len(self._data)

    def expect_end(self) -> None:
        """Raises `BadFormat` if anything is left."""
        if not self.at_end():
            raise BadFormat("bad_format", "there is data after the last value")
