"""Where one HTTP/1.1 request ends in bytes that arrive piece by piece (RFC 9112, sections 2 and 6). Pure.

It parses nothing for anybody: gunicorn's parser does, from exactly the bytes that this module counted. Chunks are
joined here, so that only one kind of body exists behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from signer.protocol.sign_request import MAX_BODY

MAX_HEAD: Final = 32 * 1024  # bytes of request line and fields
MAX_REQUEST: Final = MAX_HEAD + 2 * MAX_BODY  # bytes kept of a chunked request, chunk lines included
_END_OF_HEAD: Final = b"\r\n\r\n"
_FRAMING_FIELDS: Final = frozenset({b"content-length", b"transfer-encoding", b"expect"})
_MAX_DIGITS: Final = 18  # of a length
_MAX_HEX_DIGITS: Final = 8  # of a chunk's size
_HEX: Final = frozenset(b"0123456789abcdefABCDEF")


class Arrival(Enum):
    """How much of a request is there."""

    PART = "part"  # wait for more
    WHOLE = "whole"
    OVERSIZED = "oversized"  # its body is over the limit and need not have come: answer, then close
    BROKEN = "broken"  # not framed as HTTP/1.1 is: refuse, then close
    HEAD_TOO_LARGE = "head_too_large"


@dataclass(slots=True)
class Framing:
    """Remembers how far it has looked, so that a request sent byte by byte costs no more than one sent at once."""

    expects_continue: bool = False  # the client waits for a word before it sends the body
    _at: int = 0  # what is before it is done with
    _seen: int = 0  # no end of the line or section that begins at `_at` is before it
    _head: int = 0  # length of the head, 0 while unknown
    _end: int = 0  # length of the request
    _chunked: tuple[int, int] | None = None  # where the field is that says so, with the line end before it
    _data_end: int = 0  # of the chunk that begins at `_at`, 0 where a chunk's line is to come
    _in_trailers: bool = False  # all chunks are there
    _body: bytearray = field(default_factory=bytearray)  # of chunks so far

    def look(self, inbox: bytearray) -> Arrival:
        """What `inbox`, which only grows, holds by now."""
        if not self._head:
            found = self._find(inbox, _END_OF_HEAD)
            if (found if found >= 0 else len(inbox)) > MAX_HEAD:
                return Arrival.HEAD_TOO_LARGE
            if found < 0:
                return Arrival.PART
            self._head = self._at = self._end = found + len(_END_OF_HEAD)
            refused = self._read_fields(inbox)
            if refused is not None:
                return refused
        if self._chunked is not None:
            return self._follow_chunks(inbox)
        return Arrival.WHOLE if len(inbox) >= self._end else Arrival.PART

    def take(self, inbox: bytearray) -> bytes:
        """Removes the request from `inbox` and returns it; chunks come out as one body with a Content-Length.

        Of an oversized request only the head is returned; it says a length over the limit, which its reader refuses.
        """
        request = bytes(inbox[: self._end])
        del inbox[: self._end]
        if self._chunked is None:
            return request
        start, end = self._chunked
        length = len(self._body) if len(self._body) <= MAX_BODY else MAX_BODY + 1
        body = b"" if length > MAX_BODY else bytes(self._body)
        return request[:start] + b"\r\nContent-Length: %d" % length + request[end : self._head] + body

    def _find(self, inbox: bytearray, end: bytes) -> int:
        """Where the line or section that begins at `_at` ends, -1 while it has not come."""
        found = inbox.find(end, max(self._at, self._seen - len(end) + 1))
        self._seen = len(inbox) if found < 0 else 0
        return found

    def _read_fields(self, inbox: bytearray) -> Arrival | None:
        """Finds out how the body is framed; the verdict if there is one already."""
        request_line, *fields = bytes(inbox[: self._head - len(_END_OF_HEAD)]).split(b"\r\n")
        length = b""
        at = len(request_line)
        for line in fields:
            start, at = at, at + len(line) + 2
            name, colon, value = line.partition(b":")
            name = name.rstrip(b" \t").lower()
            if not colon or name not in _FRAMING_FIELDS:
                continue
            value = value.strip()
            if name == b"expect":
                self.expects_continue = value.lower() == b"100-continue"
            elif length or self._chunked is not None:
                return Arrival.BROKEN  # said twice, or both ways: nobody can be sure where the request ends
            elif name == b"content-length" and value.isdigit():
                length = value
            elif name == b"transfer-encoding" and value.lower() == b"chunked":
                self._chunked = start, at
            else:
                return Arrival.BROKEN
        if self._chunked is not None and not request_line.endswith(b"HTTP/1.1"):
            return Arrival.BROKEN
        if len(length) > _MAX_DIGITS or int(length or b"0") > MAX_BODY:
            return Arrival.OVERSIZED
        self._end = self._head + int(length or b"0")
        return None

    def _follow_chunks(self, inbox: bytearray) -> Arrival:
        """Takes every chunk that is there whole, and waits for the end of the trailers (section 7.1)."""
        while len(inbox) <= MAX_REQUEST:
            if self._in_trailers:
                end = self._find(inbox, _END_OF_HEAD)
                if end < 0:
                    return Arrival.PART
                self._end = end + len(_END_OF_HEAD)
                return Arrival.WHOLE
            if not self._data_end:
                line_end = self._find(inbox, b"\r\n")
                if line_end < 0:
                    return Arrival.PART
                size = _read_chunk_size(bytes(inbox[self._at : line_end]))
                if size is None:
                    return Arrival.BROKEN
                if size == 0:
                    self._at, self._in_trailers = line_end, True
                    continue
                if len(self._body) + size > MAX_BODY:
                    break
                self._at = line_end + 2
                self._data_end = self._at + size
            if self._data_end + 2 > len(inbox):
                return Arrival.PART
            if inbox[self._data_end : self._data_end + 2] != b"\r\n":
                return Arrival.BROKEN
            self._body += inbox[self._at : self._data_end]
            self._at, self._data_end = self._data_end + 2, 0
        self._body = bytearray(MAX_BODY + 1)
        self._end = self._head
        return Arrival.OVERSIZED


def _read_chunk_size(line: bytes) -> int | None:
    """The size at the beginning of a chunk's line, whose extensions are ignored; None if there is none."""
    digits, _, comment = line.partition(b";")
    digits = digits.rstrip(b" \t")
    if b"\r" in comment or b"\n" in comment or not 0 < len(digits) <= _MAX_HEX_DIGITS or not _HEX.issuperset(digits):
        return None
    return int(digits, 16)
