"""Where one HTTP/1.1 request ends in bytes that arrive piece by piece (RFC 9112, sections 2 and 6). Pure.

It parses nothing for anybody: gunicorn's parser does, from exactly the bytes that this module counted. Chunks are
joined here, so that only one kind of body exists behind it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from signer.protocol.sign_request import MAX_BODY

MAX_HEAD: Final = 32 * 1024  # bytes of request line and fields
MAX_REQUEST: Final = MAX_HEAD + 2 * MAX_BODY  # bytes kept of a chunked request, chunk lines included
_END_OF_HEAD: Final = b"\r\n\r\n"
_FIELDS: Final = re.compile(rb"\r\n(content-length|transfer-encoding|expect)[ \t]*:[ \t]*([^\r\n]*)", re.IGNORECASE)
_CHUNK_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")
_MAX_DIGITS: Final = 18


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
    _at: int = 0
    _head: int = 0  # length of the head, 0 while unknown
    _end: int = 0  # length of the request
    _chunked: re.Match[bytes] | None = None  # the field that says so
    _body: bytearray = field(default_factory=bytearray)  # of chunks so far

    def look(self, inbox: bytearray) -> Arrival:
        """What `inbox`, which only grows, holds by now."""
        if not self._head:
            found = inbox.find(_END_OF_HEAD, max(self._at - 3, 0))
            if (found if found >= 0 else len(inbox)) > MAX_HEAD:
                return Arrival.HEAD_TOO_LARGE
            if found < 0:
                self._at = len(inbox)
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
        start, end = self._chunked.span()
        length = len(self._body) if len(self._body) <= MAX_BODY else MAX_BODY + 1
        body = b"" if length > MAX_BODY else bytes(self._body)
        return request[:start] + b"\r\nContent-Length: %d" % length + request[end : self._head] + body

    def _read_fields(self, inbox: bytearray) -> Arrival | None:
        """Finds out how the body is framed; the verdict if there is one already."""
        length = b""
        for match in _FIELDS.finditer(inbox, 0, self._head - 2):
            name, value = match[1].lower(), match[2].strip()
            if name == b"expect":
                self.expects_continue = value.lower() == b"100-continue"
            elif length or self._chunked is not None:
                return Arrival.BROKEN  # said twice, or both ways: nobody can be sure where the request ends
            elif name == b"content-length" and value.isdigit():
                length = value
            elif name == b"transfer-encoding" and value.lower() == b"chunked":
                self._chunked = re.compile(re.escape(match[0])).search(bytes(inbox[: self._head]))
            else:
                return Arrival.BROKEN
        if self._chunked is not None and not inbox[: inbox.index(b"\r\n")].endswith(b"HTTP/1.1"):
            return Arrival.BROKEN
        if len(length) > _MAX_DIGITS or int(length or b"0") > MAX_BODY:
            return Arrival.OVERSIZED
        self._end = self._head + int(length or b"0")
        return None

    def _follow_chunks(self, inbox: bytearray) -> Arrival:
        """Takes every chunk that is there whole (section 7.1)."""
        while len(inbox) <= MAX_REQUEST:
            line = _CHUNK_SIZE.match(inbox, self._at)
            if line is None:
                return Arrival.PART if inbox.find(b"\r\n", self._at) < 0 else Arrival.BROKEN
            size = int(line[1], 16)
            if size == 0:
                end = inbox.find(_END_OF_HEAD, line.end() - 2)  # the trailer section, empty or not, is dropped
                if end < 0:
                    return Arrival.PART
                self._end = end + len(_END_OF_HEAD)
                return Arrival.WHOLE
            if len(self._body) + size > MAX_BODY:
                break
            after = line.end() + size
            if after + 2 > len(inbox):
                return Arrival.PART
            if inbox[after : after + 2] != b"\r\n":
                return Arrival.BROKEN
            self._body += inbox[line.end() : after]
            self._at = after + 2
        self._body = bytearray(MAX_BODY + 1)
        self._end = self._head
        return Arrival.OVERSIZED
