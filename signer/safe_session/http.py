"""One HTTP request over a socket. Knows nothing of certificates.

Not http.client, whose import takes 40 ms (it imports ssl and email) where the request takes 2: HTTP/1.1 with
`Connection: close` needs no keep-alive and no state. `ssl` is imported for https only. Proxies in the environment are
ignored, so that no token goes through one by accident.
"""

from __future__ import annotations

import _socket  # not `socket`: its enums cost 15 ms
import time

from signer.address import Address, NoListener, check_scheme, check_server
from signer.errors import BadFormat, SignerError, Unavailable

TYPE_CHECKING = False  # type checkers know the name; importing it from typing costs 20 ms
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

SECONDS_FOR_ALL = 10.0
MAX_RESPONSE = 64 * 1024
_MAX_INTERIM = 8  # responses with status 1xx before the final one
_SECONDS_PER_TICK = 1.0
_SETTING = "SAFE_SESSION_ADDR"
_BAD_CHUNKS = "an incomplete chunked body"
_TLS_ALERT = b"\x15"  # TLSPlaintext.type of RFC 8446 section 5.1


class NoResponse(Unavailable):
    """There was no response, or the connection broke before its end; the same request may be sent again."""


class Server:
    """Where requests go: `token` is a secret that no repr shows; `trusted` are the uids that may listen at a plain http
    address."""

    def __init__(self, address: Address, token: str, trusted: frozenset[int]) -> None:
        self.address = address
        self.token = token
        self.trusted = trusted


class HttpResponse:
    """A complete HTTP response; `headers` by lower-case name."""

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
    try:
        connection = _connect(address, deadline, server.trusted)
        try:
            if address.scheme == "http":
                number, port = connection.getpeername()[:2]
                check_server(connection.family, number, port, server.trusted, _SETTING)
            connection.settimeout(_left(deadline))
            connection.sendall(head.encode("ascii") + body)
            incoming = Incoming(lambda: _receive(connection, deadline, tick), address.text, largest)
            try:
                response: HttpResponse | SignerError = read_response(incoming)
            except (BadFormat, NoResponse) as error:
                response = error
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
    if incoming.begins_with(b"", _TLS_ALERT, b"HTTP/1.1 400", b"HTTP/1.0 400"):
        check_scheme(address, _SETTING)
    if isinstance(response, HttpResponse):
        return response
    raise response


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


def _receive(connection: _socket.socket | ssl.SSLSocket, deadline: float, tick: Callable[[], None] | None) -> bytes:
    """The next piece, b"" at the end of the stream."""
    while True:
        left = _left(deadline)
        connection.settimeout(left if tick is None else min(left, _SECONDS_PER_TICK))
        try:
            return connection.recv(16384)
        except TimeoutError:
            if tick is None:
                raise
            tick()


class Incoming:
    """A response of at most `largest` bytes from `place`, in the pieces that `receive` returns, b"" at its end.

    Looks at each byte once, as they may arrive one by one. Raises `BadFormat` for one that ends too early or is too
    large, `NoResponse` if nothing arrives at all.
    """

    def __init__(self, receive: Callable[[], bytes], place: str, largest: int = MAX_RESPONSE) -> None:
        self._receive = receive
        self.place = place
        self._largest = largest
        self._raw = bytearray()
        self._at = 0  # what is before it was taken

    def begins_with(self, *starts: bytes) -> bool:
        """True if it has begun with one of these, b"" for nothing at all."""
        return any(self._raw.startswith(start) if start else not self._raw for start in starts)

    def until(self, mark: bytes, without: str) -> bytes:
        """Takes what is before `mark`, and `mark`; `without` says what the response is that lacks it."""
        seen = self._at
        while (end := self._raw.find(mark, seen)) < 0:
            seen = max(self._at, len(self._raw) - len(mark) + 1)
            self._need_more(without)
        piece, self._at = bytes(self._raw[self._at : end]), end + len(mark)
        return piece

    def exactly(self, size: int) -> bytes:
        while (found := len(self._raw) - self._at) < size:
            self._need_more(f"{found} of {size} bytes")
        self._at += size
        return bytes(self._raw[self._at - size : self._at])

    def rest(self) -> bytes:
        """Takes all to the end of the stream."""
        while self._has_more():
            pass
        return self.exactly(len(self._raw) - self._at)

    def end(self) -> None:
        """Raises `BadFormat` if more has arrived than was taken."""
        if len(self._raw) > self._at:
            raise unexpected_response(self.place, "more than its head announces")

    def _need_more(self, otherwise: str) -> None:
        if self._has_more():
            return
        if not self._raw:
            text = f"the signing service at {self.place} closed the connection without a response"
            raise NoResponse("service_closed", text, _CHECK)
        raise unexpected_response(self.place, otherwise)

    def _has_more(self) -> bool:
        piece = self._receive()
        self._raw += piece
        if len(self._raw) > self._largest:
            raise unexpected_response(self.place, f"more than {self._largest // 1024} KiB")
        return bool(piece)


def read_response(incoming: Incoming) -> HttpResponse:
    """One response (RFC 9112), after any interim ones; raises as `Incoming`, and `BadFormat` for anything else."""
    for _ in range(_MAX_INTERIM + 1):
        lines = incoming.until(b"\r\n\r\n", "not HTTP").decode("latin-1").split("\r\n")
        words = lines[0].split(" ", 2)
        status = words[1] if len(words) > 1 else ""
        if not (words[0].startswith("HTTP/1.") and len(status) == 3 and status.isascii() and status.isdigit()):
            raise unexpected_response(incoming.place, "not HTTP")
        if status[0] != "1":
            break
    else:
        raise unexpected_response(incoming.place, f"more than {_MAX_INTERIM} interim responses")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if coding.lower() != "chunked" or length is not None:
            raise unexpected_response(incoming.place, f"a body in transfer encoding {coding[:40]}")
        body = b"".join(_chunks(incoming))
    elif length is None:
        body = incoming.rest()
    elif length.isascii() and length.isdigit() and len(length) < 8:
        body = incoming.exactly(int(length))
    else:
        raise unexpected_response(incoming.place, f"a body of {length[:8]} bytes")
    incoming.end()
    return HttpResponse(int(status), headers, body)


def _chunks(incoming: Incoming) -> Iterator[bytes]:
    """The pieces of a chunked body (RFC 9112 section 7.1); also takes its trailer."""
    while size := _chunk_size(incoming):
        yield incoming.exactly(size)
        if incoming.exactly(2) != b"\r\n":
            raise unexpected_response(incoming.place, _BAD_CHUNKS)
    while incoming.until(b"\r\n", _BAD_CHUNKS):
        pass


def _chunk_size(incoming: Incoming) -> int:
    digits = incoming.until(b"\r\n", _BAD_CHUNKS).partition(b";")[0].rstrip(b" \t")
    if not digits or len(digits) > 7 or digits.strip(b"0123456789abcdefABCDEF"):
        raise unexpected_response(incoming.place, _BAD_CHUNKS)
    return int(digits, 16)


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
