"""Finds the end of an HTTP/1.1 request in bytes that arrive in pieces (RFC 9112, sections 2 and 6). Pure.

Only gunicorn parses the request, from exactly the bytes that this module delimits. Chunks are joined here, so that
gunicorn sees only bodies with a Content-Length.
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
    """How much of a request has arrived."""

    PART = "part"  # wait for more
    WHOLE = "whole"
    OVERSIZED = "oversized"  # the body is over the limit and may be incomplete: respond, then close
    BROKEN = "broken"  # not valid HTTP/1.1 framing: refuse, then close
    HEAD_TOO_LARGE = "head_too_large"


@dataclass(slots=True)
class Framing:
    """Tracks the position reached, so that a request sent byte by byte costs no more than one sent at once."""

    expects_continue: bool = False  # the client waits for `100 Continue` before it sends the body
    _at: int = 0  # everything before it is processed
    _seen: int = 0  # the line or section that begins at `_at` does not end before it
    _head: int = 0  # length of the head, 0 while unknown
    _end: int = 0  # length of the request
    _chunked: tuple[int, int] | None = None  # position of the Transfer-Encoding field and the line end before it
    _data_end: int = 0  # of the chunk that begins at `_at`; 0 if a chunk's line comes next
    _in_trailers: bool = False  # all chunks have arrived
    _body: bytearray = field(default_factory=bytearray)  # of chunks so far

    def look(self, inbox: bytearray) -> Arrival:
        """The state of the request in `inbox`, to which bytes are only ever appended."""
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

        Of an oversized request only the head is returned, with a length over the limit, which its reader refuses.
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
        """Position of the end of the line or section that begins at `_at`; -1 if it has not arrived."""
        found = inbox.find(end, max(self._at, self._seen - len(end) + 1))
        self._seen = len(inbox) if found < 0 else 0
        return found

    def _read_fields(self, inbox: bytearray) -> Arrival | None:
        """Reads the framing of the body from the fields; returns a result if it is already known."""
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
                return Arrival.BROKEN  # given twice or both ways: the end of the request is ambiguous
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
        """Consumes every complete chunk and finds the end of the trailers (section 7.1)."""
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
    """The size in a chunk's line, ignoring extensions; None if it is not valid."""
    digits, _, comment = line.partition(b";")
    digits = digits.rstrip(b" \t")
    if b"\r" in comment or b"\n" in comment or not 0 < len(digits) <= _MAX_HEX_DIGITS or not _HEX.issuperset(digits):
        return None
    return int(digits, 16)
