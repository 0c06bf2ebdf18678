"""The witness's HTTP server: one thread, bounded in connections, bytes and time.

httptools parses, one request at a time on each connection. Everything that arrives is public and everything that leaves
is signed, so there is no TLS and no credential. uvicorn, or asyncio alone, would take a quarter of the memory that a
witness may have.
"""

from __future__ import annotations

import logging
import selectors
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import httptools

from signer.errors import Unavailable

if TYPE_CHECKING:
    from signer.settings import Listen

log = logging.getLogger("signer.witness")

MAX_BODY: Final = 128 * 1024  # bytes; 63 lines of proof and 16 signatures of 5 kB
MAX_HEAD: Final = 8 * 1024  # bytes of request line, fields and chunk lines
MAX_CONNECTIONS: Final = 32
MAX_OF_ADDRESS: Final = 8  # connections of one IP address
ARRIVES_WITHIN: Final = 10.0  # seconds from the start of a request to its end, and for the response to be read
IDLE_WITHIN: Final = 30.0  # seconds between two requests
LEAVES_WITHIN: Final = 1.0  # seconds in which a client reads its last response
_PIECE: Final = 64 * 1024  # bytes read at once
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Response:
    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"

    @classmethod
    def of_text(cls, status: HTTPStatus, text: str) -> Response:
        return cls(status, f"{text}\n".encode())

    def render(self, *, keeps_open: bool, has_body: bool) -> bytes:
        """The response as it is sent (RFC 9112)."""
        head = (
            f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\n"
            f"Content-Type: {self.content_type}\r\n"
            f"Content-Length: {len(self.body)}\r\n"
            f"Connection: {'keep-alive' if keeps_open else 'close'}\r\n\r\n"
        )
        return head.encode() + (self.body if has_body else b"")


Answer = Callable[[str, str, bytes], Response]  # method, path with query, body


class _TooLarge(Exception):
    """The request is larger than a valid one."""


class _Connection:
    """One client: what of its request has arrived, and what of the response is still to be sent."""

    def __init__(self, sock: socket.socket, address: str, answer: Answer) -> None:
        self.sock, self.address = sock, address
        self.deadline = time.monotonic() + ARRIVES_WITHIN
        self.to_send = b""
        self.is_idle = False  # between two requests
        self._answer = answer
        self._closes = False
        self._is_leaving = False  # everything is sent; the client may still send, so that it can read the response
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._method, self._target, self._body = "", b"", bytearray()
        self._received = 0
        self._is_complete = False

    # --- callbacks of the parser --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._is_complete:
            raise _TooLarge  # a second request before the first is answered

    def on_url(self, part: bytes) -> None:
        self._target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"expect" and value.lower() == b"100-continue":
            self.to_send += _CONTINUE

    def on_headers_complete(self) -> None:
        self._method = self._parser.get_method().decode("ascii", "replace")

    def on_body(self, part: bytes) -> None:
        self._body += part
        if len(self._body) > MAX_BODY:
            raise _TooLarge

    def on_message_complete(self) -> None:
        self._is_complete = True

    # --- what the server calls ----------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Takes what has arrived; a complete request is answered."""
        if self._is_leaving:
            return
        if self.is_idle:
            self.is_idle = False
            self.deadline = time.monotonic() + ARRIVES_WITHIN
        self._received += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._closes = True
        except httptools.HttpParserCallbackError:
            if not self._is_complete:
                self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {MAX_BODY} bytes")
                return
            self._closes = True
        except httptools.HttpParserError:
            self._refuse(HTTPStatus.BAD_REQUEST, "this is not an HTTP request")
            return
        if self._received > MAX_BODY + MAX_HEAD:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {MAX_BODY + MAX_HEAD} bytes")
        elif self._is_complete:
            self._respond()

    def _respond(self) -> None:
        method = self._method
        target, body = self._target.decode("ascii", "replace"), bytes(self._body)
        try:
            response = self._answer(method, target, body)
        except Exception:
            log.exception("internal error while answering %s", method)
            response = Response.of_text(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; see the witness's log")
            self._closes = True
        self._closes = self._closes or not self._parser.should_keep_alive()
        self.to_send += response.render(keeps_open=not self._closes, has_body=method != "HEAD")
        self._reset()
        self.deadline = time.monotonic() + ARRIVES_WITHIN

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self._closes = True
        self.to_send = Response.of_text(status, text).render(keeps_open=False, has_body=True)

    def send(self) -> None:
        """Sends what the socket takes; raises `OSError`."""
        if self.to_send:
            self.to_send = self.to_send[self.sock.send(self.to_send) :]
        if self.to_send:
            return
        if self._closes and not self._is_leaving:
            self._is_leaving = True
            self.deadline = time.monotonic() + LEAVES_WITHIN
            self.sock.shutdown(socket.SHUT_WR)
        elif not self._closes and self._received == 0:
            self.is_idle = True
            self.deadline = time.monotonic() + IDLE_WITHIN


class Server:
    """Serves `answer` on a listener until SIGTERM or SIGINT."""

    def __init__(self, listener: socket.socket, answer: Answer) -> None:
        self._listener = listener
        self._answer = answer
        self._selector = selectors.DefaultSelector()
        self._connections: dict[_Connection, None] = {}  # the oldest first
        self._is_stopping = False

    def serve(self) -> None:
        """Runs until a signal ends it; every answer that it began is complete then."""
        wake, woken = socket.socketpair()
        with wake, woken, self._selector:
            for end in (wake, woken, self._listener):
                end.setblocking(False)
            signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._stop)
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._selector.register(woken, selectors.EVENT_READ)
            while not self._is_stopping:
                self._serve_once(woken)
            signal.set_wakeup_fd(-1)
            for connection in list(self._connections):
                self._close(connection)

    def _stop(self, _number: int, _frame: object) -> None:
        self._is_stopping = True

    def _serve_once(self, woken: socket.socket) -> None:
        for key, events in self._selector.select(1.0):
            if key.fileobj is woken:
                woken.recv(64)
            elif key.fileobj is self._listener:
                self._accept()
            elif key.data in self._connections:  # not closed by an earlier event of this round
                self._exchange(key.data, events)
        now = time.monotonic()
        for connection in [one for one in self._connections if one.deadline <= now]:
            self._close(connection)

    def _accept(self) -> None:
        try:
            sock, place = self._listener.accept()
        except OSError:  # the client is gone, or there are no descriptors
            return
        sock.setblocking(False)
        connection = _Connection(sock, str(place[0]), self._answer)
        self._make_room(connection.address)
        self._connections[connection] = None
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _make_room(self, address: str) -> None:
        """Closes the oldest connection, an idle one first, if there are too many, of this address or of all."""
        counts = Counter(one.address for one in self._connections)
        own = counts[address] >= MAX_OF_ADDRESS
        if not own and len(self._connections) < MAX_CONNECTIONS:
            return
        among = [one for one in self._connections if not own or one.address == address]
        self._close(next((one for one in among if one.is_idle), among[0]))

    def _exchange(self, connection: _Connection, events: int) -> None:
        try:
            if events & selectors.EVENT_READ and not connection.to_send:
                data = connection.sock.recv(_PIECE)
                if not data:
                    self._close(connection)
                    return
                connection.receive(data)
            connection.send()
        except (BlockingIOError, InterruptedError):  # the next round sends or reads it
            log.debug("a socket was not ready")
        except OSError:
            self._close(connection)
            return
        wanted = selectors.EVENT_WRITE if connection.to_send else selectors.EVENT_READ
        self._selector.modify(connection.sock, wanted, connection)

    def _close(self, connection: _Connection) -> None:
        del self._connections[connection]
        self._selector.unregister(connection.sock)
        connection.sock.close()


def bind(listen: Listen) -> socket.socket:
    """A listening socket at an address and a port; raises `Unavailable`."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    try:
        return socket.create_server((listen.host, listen.port), family=family, backlog=MAX_CONNECTIONS)
    except OSError as error:
        raise Unavailable(
            "listen_failed",
            f"cannot listen on {listen}: {error.strerror}",
            "stop what listens there (`ss -lp`), or pass another --listen",
        ) from None
