"""One HTTP POST over a socket: address in, answer out. Knows nothing of certificates.

Not http.client, which costs 40 ms to import (it pulls ssl and email) where the request itself takes 2: HTTP/1.0 with
`Connection: close` needs no chunks, no keep-alive and no state. `ssl` is imported for https only. Proxies in the
environment are ignored: a token does not go through one unasked.
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
_LARGEST_ANSWER = 64 * 1024


class NoAnswer(Unavailable):
    """Nothing answered, or the connection broke before the answer was whole: the same request may be sent again."""


class Answer:
    """`headers` by lower-case name; `body` complete."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body


def post(address: Address, path: str, token: str, body: bytes) -> Answer:
    """Sends `body` (JSON) with the bearer `token`, all within `SECONDS_FOR_ALL`.

    Raises `NoAnswer` (may be repeated), `Unavailable` (too slow, no such host, TLS), `BadFormat` (not HTTP, too large).
    """
    deadline = time.monotonic() + SECONDS_FOR_ALL
    host = f"[{address.host}]" if ":" in address.host else address.host
    head = (
        f"POST {path} HTTP/1.0\r\nHost: {host}{f':{address.port}' if address.port else ''}\r\n"
        f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\nAccept: application/json\r\n"
        f"User-Agent: safe-session\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    try:
        link = _connect(address, deadline)
        try:
            link.settimeout(_left(deadline))
            link.sendall(head.encode("ascii") + body)
            raw = _read_all(link, deadline)
        finally:
            link.close()
    except TimeoutError:
        raise Unavailable(
            "service_slow",
            f"the signing service at {address.text} did not answer within {SECONDS_FOR_ALL:.0f} seconds",
            "check SAFE_SESSION_ADDR and the service's /readyz",
        ) from None
    except OSError as error:
        raise _no_answer(address, error) from None
    return parse_answer(raw, address.text)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _connect(address: Address, deadline: float) -> _socket.socket | ssl.SSLSocket:
    """Connected, and for https verified. Raises `OSError`, or `Unavailable` if plain http would leave the machine."""
    if address.scheme == "unix":
        link = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        link.settimeout(_left(deadline))
        link.connect(address.path)
        return link
    failure: OSError = OSError("no address")
    # As bytes: a str would be encoded by `encodings.idna`, which costs 10 ms to import.
    found = _socket.getaddrinfo(address.host.encode("ascii"), address.port, 0, _socket.SOCK_STREAM)
    for family, kind, protocol, _, place in found:
        number = str(place[0])
        if address.scheme == "http" and not is_this_machine(number):
            raise Unavailable(
                "token_in_clear",
                f"{address.text} is another machine, and plain http would show it and others the token",
                "use an https:// address in SAFE_SESSION_ADDR, or a tunnel that ends on this machine",
            )
        link = _socket.socket(family, kind, protocol)
        try:
            link.settimeout(_left(deadline))
            link.connect(place)
        except OSError as error:
            link.close()
            failure = error
            continue
        return link if address.scheme == "http" else _wrap(link, address.host, deadline)
    raise failure


def _wrap(link: _socket.socket, host: str, deadline: float) -> ssl.SSLSocket:
    """TLS as Python does it by default: verified against SSL_CERT_FILE or the system's authorities, 1.2 or newer."""
    import socket
    import ssl

    plain = socket.socket(fileno=link.detach())
    plain.settimeout(_left(deadline))
    return ssl.create_default_context().wrap_socket(plain, server_hostname=host)


def _read_all(link: _socket.socket | ssl.SSLSocket, deadline: float) -> bytes:
    """Up to the announced length, or the end; never more than the bound."""
    raw = bytearray()
    seen, length = 0, _LARGEST_ANSWER + 1  # no end of the head begins in the bytes that were seen
    while len(raw) < length:
        link.settimeout(_left(deadline))
        piece = link.recv(16384)
        if not piece:
            break
        raw += piece
        if seen >= 0:  # the head is looked at once: an answer may come byte by byte
            end = raw.find(b"\r\n\r\n", seen)
            seen = max(len(raw) - 3, 0)
            if end >= 0:
                seen, length = -1, min(_announced(raw, end) or length, length)
    return bytes(raw)


def _announced(raw: bytearray, end: int) -> int | None:
    """How long head and body will be together, if the head that ends at `end` says so."""
    for line in raw[:end].lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            number = line[15:].strip()
            return end + 4 + int(number) if number.isdigit() and len(number) < 8 else None
    return None


def parse_answer(raw: bytes, place: str) -> Answer:
    """Bytes from the wire to status, headers, body (RFC 9112). `place` is named in errors.

    Raises `NoAnswer` for no bytes at all, `BadFormat` for anything that is not one whole HTTP answer within the bound.
    """
    if not raw:
        raise NoAnswer("service_closed", f"the signing service at {place} closed without an answer", _CHECK)
    head, gap, body = raw.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ", 2)
    status = words[1] if len(words) > 1 else ""
    if not (gap and words[0].startswith("HTTP/1.") and len(status) == 3 and status.isascii() and status.isdigit()):
        raise not_ours(place, "no HTTP")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if len(raw) > _LARGEST_ANSWER:
        raise not_ours(place, f"more than {_LARGEST_ANSWER // 1024} KiB")
    if "transfer-encoding" in headers:
        raise not_ours(place, "chunks, which were not asked for")
    length = headers.get("content-length", str(len(body)))
    if length != str(len(body)):
        raise not_ours(place, f"{len(body)} of {length[:8]} bytes")
    return Answer(int(status), headers, body)


_CHECK = "check SAFE_SESSION_ADDR, and that the service runs"


def not_ours(place: str, what: str) -> BadFormat:
    """The error for an answer that no signing service gives; `what` says what came instead."""
    return BadFormat("not_our_service", f"the answer from {place} is not a signing service's: {what}", _CHECK)


def _no_answer(address: Address, error: OSError) -> Unavailable:
    """One sentence for each way a connection fails; only those that pass by themselves are `NoAnswer`."""
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
        return NoAnswer("service_down", f"cannot reach the signing service at {address.text}: {reason}", _CHECK)
    return Unavailable(
        "service_unreachable",
        f"cannot reach the signing service at {address.text}: {(error.strerror or 'no connection').lower()}",
        _CHECK,
    )
