"""One HTTP request over a socket. Knows nothing of certificates.

Not http.client, whose import takes 40 ms (it imports ssl and email) where the request takes 2: HTTP/1.1 with
`Connection: close` needs no keep-alive and no state. `ssl` is imported for https only. Proxies in the environment are
ignored, so that no token goes through one by accident.
"""

from __future__ import annotations

import _socket  # not `socket`: its enums cost 15 ms
import time

from signer.address import Address, NoListener, check_scheme, check_server
from signer.errors import BadFormat, Unavailable

TYPE_CHECKING = False  # type checkers know the name; importing it from typing costs 20 ms
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

SECONDS_FOR_ALL = 10.0
MAX_RESPONSE = 64 * 1024
_MAX_INTERIM = 8  # responses with status 1xx before the final one
_SECONDS_PER_TICK = 1.0
_SETTING = "SAFE_SESSION_ADDR"
_TLS_ALERT = b"\x15"  # TLSPlaintext.type of RFC 8446 section 5.1


class NoResponse(Unavailable):
    """There was no response, or the connection broke before its end; the same request may be sent again."""


class Server:
    """Where requests go: `token` is a secret that no repr shows; `trusted` are the uids that may listen at a plain http
    address."""

    __slots__ = ("address", "token", "trusted")

    def __init__(self, address: Address, token: str, trusted: frozenset[int]) -> None:
        self.address = address
        self.token = token
        self.trusted = trusted


class HttpResponse:
    """A complete HTTP response; `headers` by lower-case name."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body


def send(
    server: Server,
    method: str,
    path: str,
    body: bytes = b"",
    *,
    seconds: float = SECONDS_FOR_ALL,
    largest: int = MAX_RESPONSE,
    tick: Callable[[], None] | None = None,
) -> HttpResponse:
    """Sends `body` (JSON, or nothing) with the server's bearer token; takes at most `seconds`, and a response of at
    most `largest` bytes. `tick` is called about once a second while the response is awaited.

    Over plain http only a user in `server.trusted` (uids) may listen at the address, before the connection is made and
    again before anything is sent.
    Raises `NoResponse` (a retry may help), `Unavailable` (too slow, no such host, TLS, another user's process),
    `BadSettings` (the address has the wrong scheme) or `BadFormat` (not HTTP, too large).
    """
    address = server.address
    deadline = time.monotonic() + seconds
    host = f"[{address.host}]" if ":" in address.host else address.host
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {host}{f':{address.port}' if address.port else ''}\r\n"
        f"Authorization: Bearer {server.token}\r\nContent-Type: application/json\r\nAccept: application/json\r\n"
        f"Accept-Encoding: identity\r\nUser-Agent: safe-session\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    raw = b""
    try:
        connection = _connect(address, deadline, server.trusted)
        try:
            if address.scheme == "http":
                number, port = connection.getpeername()[:2]
                check_server(connection.family, number, port, server.trusted, _SETTING)
            connection.settimeout(_left(deadline))
            connection.sendall(head.encode("ascii") + body)
            raw = _read_all(connection, deadline, largest, tick)
        finally:
            connection.close()
    except TimeoutError:
        raise Unavailable(
            "service_slow",
            f"the signing service at {address.text} did not answer within {seconds:.0f} seconds",
            "check SAFE_SESSION_ADDR and the service's /readyz",
        ) from None
    except OSError as error:
        if _may_be_other_scheme(error):
            check_scheme(address, _SETTING)
        raise _connection_error(address, error) from None
    # A TLS server ends a connection of plain http, with or without an alert; nginx sends a page.
    if not raw or raw[:1] == _TLS_ALERT or raw[:12] in (b"HTTP/1.1 400", b"HTTP/1.0 400"):
        check_scheme(address, _SETTING)
    return parse_response(raw, address.text, largest)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _connect(address: Address, deadline: float, trusted: frozenset[int]) -> _socket.socket | ssl.SSLSocket:
    """A connected socket, verified for https. Raises `OSError`; `Unavailable` from `check_server`."""
    if address.scheme == "unix":
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        connection.settimeout(_left(deadline))
        connection.connect(address.path)
        return connection
    failure: OSError = OSError("no address")
    # As bytes: a str would be encoded by `encodings.idna`, which costs 10 ms to import.
    found = _socket.getaddrinfo(address.host.encode("ascii"), address.port, 0, _socket.SOCK_STREAM)
    for family, kind, protocol, _, place in found:
        if address.scheme == "http":
            try:
                check_server(family, str(place[0]), address.port, trusted, _SETTING)
            except NoListener as error:
                failure = error
                continue
        connection = _socket.socket(family, kind, protocol)
        try:
            connection.settimeout(_left(deadline))
            connection.connect(place)
        except OSError as error:
            connection.close()
            failure = error
            continue
        return connection if address.scheme == "http" else _wrap(connection, address.host, deadline)
    raise failure


def _wrap(connection: _socket.socket, host: str, deadline: float) -> ssl.SSLSocket:
    """TLS with Python's defaults: 1.2 or newer, verified against SSL_CERT_FILE or the system's authorities."""
    import socket
    import ssl

    plain = socket.socket(fileno=connection.detach())
    plain.settimeout(_left(deadline))
    return ssl.create_default_context().wrap_socket(plain, server_hostname=host)


def _may_be_other_scheme(error: OSError) -> bool:
    if type(error).__module__ == "ssl":
        return not getattr(error, "verify_message", "")
    return isinstance(error, (ConnectionResetError, BrokenPipeError))


def _read_all(
    connection: _socket.socket | ssl.SSLSocket,
    deadline: float,
    largest: int = MAX_RESPONSE,
    tick: Callable[[], None] | None = None,
) -> bytes:
    """Reads to the end of the response or of the stream; at most `largest` bytes and one read more."""
    raw = bytearray()
    framing = _Framing(largest)
    while len(raw) <= largest and not framing.is_complete(raw):
        left = _left(deadline)
        connection.settimeout(left if tick is None else min(left, _SECONDS_PER_TICK))
        try:
            piece = connection.recv(16384)
        except TimeoutError:
            if tick is None:
                raise
            tick()
            continue
        if not piece:
            break
        raw += piece
    return bytes(raw)


class _Framing:
    """Finds the end of a response in the bytes so far. Looks at each byte once, as a response may arrive byte by byte.
    Judges nothing: malformed bytes may have no end, and `parse_response` rejects them."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._at = 0  # a head, or a line of a chunked body, begins here
        self._seen = 0  # and does not end before here
        self._end: int | None = None  # of the response
        self._in_chunks = self._in_trailer = False

    def is_complete(self, raw: bytearray) -> bool:
        while self._end is None and self._advance(raw):
            pass
        return self._end is not None and len(raw) >= self._end

    def _advance(self, raw: bytearray) -> bool:
        """Reads one head or line; False if it is not complete yet."""
        mark = b"\r\n" if self._in_chunks else b"\r\n\r\n"
        end = raw.find(mark, max(self._seen, self._at))
        if end < 0:
            self._seen = len(raw) - len(mark) + 1
            return False
        piece, self._at = bytes(raw[self._at : end]), end + len(mark)
        if self._in_chunks:
            self._read_line(piece)
        else:
            self._read_head(piece.lower())
        return True

    def _read_head(self, head: bytes) -> None:
        if head[:10] == b"http/1.1 1":
            return  # an interim response; another head follows
        self._end = self._largest + 1  # unless the head announces one, the response ends with the stream
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            value = value.strip()
            if name == b"transfer-encoding":
                self._in_chunks, self._end = True, None
                return
            if name == b"content-length" and value.isdigit() and len(value) < 8:
                self._end = self._at + int(value)

    def _read_line(self, line: bytes) -> None:
        size = 0 if self._in_trailer else _chunk_size(line)
        if size is None or (self._in_trailer and not line):
            self._end = self._at
        elif size == 0:
            self._in_trailer = True
        else:
            self._at += size + 2


def _chunk_size(line: bytes) -> int | None:
    """The size in the line of a chunk (RFC 9112 section 7.1), None if it is not valid or above seven digits."""
    digits = line.partition(b";")[0].rstrip(b" \t")
    if not digits or len(digits) > 7 or digits.strip(b"0123456789abcdefABCDEF"):
        return None
    return int(digits, 16)


def parse_response(raw: bytes, place: str, largest: int = MAX_RESPONSE) -> HttpResponse:
    """Parses a response (RFC 9112), after any interim ones. Errors name `place`.

    Raises `NoResponse` for no bytes at all, `BadFormat` for anything but one complete response of valid size.
    """
    if not raw:
        raise NoResponse(
            "service_closed", f"the signing service at {place} closed the connection without a response", _CHECK
        )
    if len(raw) > largest:
        raise unexpected_response(place, f"more than {largest // 1024} KiB")
    for _ in range(_MAX_INTERIM + 1):
        head, gap, body = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        words = lines[0].split(" ", 2)
        status = words[1] if len(words) > 1 else ""
        if not (gap and words[0].startswith("HTTP/1.") and len(status) == 3 and status.isascii() and status.isdigit()):
            raise unexpected_response(place, "not HTTP")
        if status[0] != "1":
            break
        raw = body
    else:
        raise unexpected_response(place, f"more than {_MAX_INTERIM} interim responses")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    coding = headers.get("transfer-encoding")
    if coding is not None:
        if coding.lower() != "chunked" or "content-length" in headers:
            raise unexpected_response(place, f"a body in transfer encoding {coding[:40]}")
        return HttpResponse(int(status), headers, _join_chunks(body, place))
    length = headers.get("content-length", str(len(body)))
    if length != str(len(body)):
        raise unexpected_response(place, f"{len(body)} of {length[:8]} bytes")
    return HttpResponse(int(status), headers, body)


def _join_chunks(raw: bytes, place: str) -> bytes:
    """The body in `raw`, which holds all chunks and the trailer (RFC 9112 section 7.1) and nothing after them."""
    pieces: list[bytes] = []
    at = 0
    while (end := raw.find(b"\r\n", at)) >= 0:
        size = _chunk_size(raw[at:end])
        if size is None:
            break
        at = end + 2
        if size == 0:
            if raw[at:] == b"\r\n" or (raw.find(b"\r\n\r\n", at) == len(raw) - 4 and len(raw) >= at + 4):
                return b"".join(pieces)
            break
        pieces.append(raw[at : at + size])
        at += size
        if raw[at : at + 2] != b"\r\n":
            break
        at += 2
    raise unexpected_response(place, "an incomplete chunked body")


_CHECK = "check SAFE_SESSION_ADDR, and that the service runs"


def unexpected_response(place: str, what: str) -> BadFormat:
    """The error for a response that does not come from a signing service; `what` describes it."""
    return BadFormat("not_our_service", f"the response from {place} is not a signing service's: {what}", _CHECK)


def _connection_error(address: Address, error: OSError) -> Unavailable:
    """The error for a failed connection; `NoResponse` only if a retry may succeed."""
    if isinstance(error, _socket.gaierror):
        return Unavailable("service_unknown", f"no such host: {address.host}", "check SAFE_SESSION_ADDR")
    if type(error).__module__ == "ssl":
        reason = getattr(error, "verify_message", "") or getattr(error, "reason", "") or "no TLS"
        hint = "set SSL_CERT_FILE to the authority that signed the service's certificate, or check SAFE_SESSION_ADDR"
        return Unavailable("service_tls", f"no trusted connection to {address.text}: {str(reason).lower()}", hint)
    if isinstance(error, PermissionError):
        return Unavailable("service_forbidden", f"not allowed to connect to {address.text}", "check who may open it")
    if isinstance(error, (ConnectionError, FileNotFoundError)):
        reason = (error.strerror or "connection broken").lower()
        return NoResponse("service_down", f"cannot reach the signing service at {address.text}: {reason}", _CHECK)
    return Unavailable(
        "service_unreachable",
        f"cannot reach the signing service at {address.text}: {(error.strerror or 'no connection').lower()}",
        _CHECK,
    )
