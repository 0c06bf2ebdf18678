"""One HTTP POST over a socket. Knows nothing of certificates.

Not http.client, whose import takes 40 ms (it imports ssl and email) where the request takes 2: HTTP/1.0 with
`Connection: close` needs no chunks, no keep-alive and no state. `ssl` is imported for https only. Proxies in the
environment are ignored, so that no token goes through one by accident.
"""

from __future__ import annotations

import _socket  # not `socket`: its enums cost 15 ms
import time

from signer.address import Address, is_this_machine
from signer.errors import BadFormat, Unavailable

TYPE_CHECKING = False  # type checkers know the name; importing it from typing costs 20 ms
if TYPE_CHECKING:
    import ssl

SECONDS_FOR_ALL = 10.0
_MAX_RESPONSE = 64 * 1024


class NoResponse(Unavailable):
    """There was no response, or the connection broke before its end; the same request may be sent again."""


class HttpResponse:
    """A complete HTTP response; `headers` by lower-case name."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body


def post(address: Address, path: str, token: str, body: bytes) -> HttpResponse:
    """Sends `body` (JSON) with the bearer `token`; takes at most `SECONDS_FOR_ALL`.

    Raises `NoResponse` (a retry may help), `Unavailable` (too slow, no such host, TLS) or `BadFormat` (not HTTP, too
    large).
    """
    deadline = time.monotonic() + SECONDS_FOR_ALL
    host = f"[{address.host}]" if ":" in address.host else address.host
    head = (
        f"POST {path} HTTP/1.0\r\nHost: {host}{f':{address.port}' if address.port else ''}\r\n"
        f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\nAccept: application/json\r\n"
        f"User-Agent: safe-session\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    try:
        connection = _connect(address, deadline)
        try:
            connection.settimeout(_left(deadline))
            connection.sendall(head.encode("ascii") + body)
            raw = _read_all(connection, deadline)
        finally:
            connection.close()
    except TimeoutError:
        raise Unavailable(
            "service_slow",
            f"the signing service at {address.text} did not answer within {SECONDS_FOR_ALL:.0f} seconds",
            "check SAFE_SESSION_ADDR and the service's /readyz",
        ) from None
    except OSError as error:
        raise _connection_error(address, error) from None
    return parse_response(raw, address.text)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _connect(address: Address, deadline: float) -> _socket.socket | ssl.SSLSocket:
    """A connected socket, verified for https. Raises `OSError`; `Unavailable` if plain http would leave the machine."""
    if address.scheme == "unix":
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        connection.settimeout(_left(deadline))
        connection.connect(address.path)
        return connection
    failure: OSError = OSError("no address")
    # As bytes: a str would be encoded by `encodings.idna`, which costs 10 ms to import.
    found = _socket.getaddrinfo(address.host.encode("ascii"), address.port, 0, _socket.SOCK_STREAM)
    for family, kind, protocol, _, place in found:
        number = str(place[0])
        if address.scheme == "http" and not is_this_machine(number):
            raise Unavailable(
                "token_in_clear",
                f"{address.text} is another machine, and plain http would send the token in the clear",
                "use an https:// address in SAFE_SESSION_ADDR, or a tunnel that ends on this machine",
            )
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


def _read_all(connection: _socket.socket | ssl.SSLSocket, deadline: float) -> bytes:
    """Reads to the announced length or the end of the stream; at most `_MAX_RESPONSE` and one read more."""
    raw = bytearray()
    seen, length = 0, _MAX_RESPONSE + 1  # the head does not end in the first `seen` bytes
    while len(raw) < length:
        connection.settimeout(_left(deadline))
        piece = connection.recv(16384)
        if not piece:
            break
        raw += piece
        if seen >= 0:  # not after the head is complete: a response may arrive byte by byte
            end = raw.find(b"\r\n\r\n", seen)
            seen = max(len(raw) - 3, 0)
            if end >= 0:
                seen, length = -1, min(_announced(raw, end) or length, length)
    return bytes(raw)


def _announced(raw: bytearray, end: int) -> int | None:
    """Length of head and body together by Content-Length, if the head that ends at `end` has one."""
    for line in raw[:end].lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            number = line[15:].strip()
            return end + 4 + int(number) if number.isdigit() and len(number) < 8 else None
    return None


def parse_response(raw: bytes, place: str) -> HttpResponse:
    """Parses a response (RFC 9112). Errors name `place`.

    Raises `NoResponse` for no bytes at all, `BadFormat` for anything but one complete response of valid size.
    """
    if not raw:
        raise NoResponse(
            "service_closed", f"the signing service at {place} closed the connection without a response", _CHECK
        )
    head, gap, body = raw.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ", 2)
    status = words[1] if len(words) > 1 else ""
    if not (gap and words[0].startswith("HTTP/1.") and len(status) == 3 and status.isascii() and status.isdigit()):
        raise unexpected_response(place, "not HTTP")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if len(raw) > _MAX_RESPONSE:
        raise unexpected_response(place, f"more than {_MAX_RESPONSE // 1024} KiB")
    if "transfer-encoding" in headers:
        raise unexpected_response(place, "a chunked body, which the request excludes")
    length = headers.get("content-length", str(len(body)))
    if length != str(len(body)):
        raise unexpected_response(place, f"{len(body)} of {length[:8]} bytes")
    return HttpResponse(int(status), headers, body)


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
