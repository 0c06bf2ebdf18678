"""One client of the API, as the worker's main loop keeps it: bytes in, bytes out, never a wait.

Also the one selector that this needs. Used by `worker.py` only, which has the rules; what is here has the mechanism.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any, Final

from gunicorn import http

from signer.api.framing import Framing

_READ: Final = 64 * 1024
_ENOUGH: Final = 4 * _READ  # more than any request; what follows is read when this much is answered
_PATIENCE: Final = 16  # times `_ENOUGH` bytes, dropped in one go
_EDGES: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_NOT_NOW: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Phase(Enum):
    """What a connection is waiting for."""

    ARRIVING = "a whole request"
    IDLE = "the next request"
    BUSY = "its answer, which a thread makes"
    LEAVING = "the client to take its answer"
    LINGERING = "the client to read a last answer"


def freeze_settings(cfg: Any) -> SimpleNamespace:
    """gunicorn's settings as plain attributes: its parser reads twenty for each request, each by a search."""
    settings = SimpleNamespace(**{name: getattr(cfg, name) for name in cfg.settings})
    settings.is_ssl = cfg.is_ssl
    settings.forwarded_allow_networks = cfg.forwarded_allow_networks
    return settings


class Mailbox:
    """What gunicorn takes for the client's socket: one request to read, and a place for the answer."""

    def __init__(self) -> None:
        self.request = b""
        self.answer = bytearray()

    def recv(self, size: int) -> bytes:
        """The next bytes of the request; empty when the request is over, which never blocks."""
        data, self.request = self.request[:size], self.request[size:]
        return data

    def sendall(self, data: bytes) -> None:
        """Keeps what the client is to get."""
        self.answer += data

    def send(self, data: bytes) -> int:
        """gunicorn sends only its `100 Continue` this way, which the main loop has done when it was due."""
        return len(data)

    def setblocking(self, flag: bool) -> None:
        """Nothing here blocks."""

    def gettimeout(self) -> float:
        """Nothing here blocks. There is no `settimeout`, so that gunicorn knows it for no real socket."""
        return 0.0


class Connection:
    """One client. The main loop owns it, except while a thread answers (`Phase.BUSY`)."""

    initialized = data_ready = True  # gunicorn's `handle` asks; both stay as they are
    is_http2 = False

    def __init__(self, cfg: Any, client_sock: socket.socket, client: Any, server: Any) -> None:
        self.cfg = cfg
        self.client, self.server = client, server
        self.channel = client_sock
        self.descriptor = client_sock.fileno()
        self.sock = Mailbox()
        self.parser = http.get_parser(cfg, self.sock, client)
        self.inbox = bytearray()
        self.framing = Framing()
        self.phase = Phase.ARRIVING
        self.deadline = 0.0
        self.is_shaken = not isinstance(client_sock, ssl.SSLSocket)
        self.is_readable = True
        self.has_ended = False  # the client sends no more
        self.is_last = False  # no request may follow the one in hand
        self.told_to_continue = False

    def init(self) -> None:
        """Everything was done in the constructor."""

    def gather(self) -> None:
        """Reads all that has come, without blocking. Sets `has_ended` at the client's end, or any fault of it."""
        self.is_readable = False
        try:
            if not self.is_shaken:
                self.channel.do_handshake()  # type: ignore[attr-defined]
                self.is_shaken = True
            while True:
                data = self.channel.recv(_READ)
                self.inbox += data
                if not data:
                    self.has_ended = True
                    return
                if len(data) < _READ and not isinstance(self.channel, ssl.SSLSocket):
                    return  # a short read has emptied the socket; TLS may hold more than it gave
                if len(self.inbox) > _ENOUGH:
                    self.is_readable = True
                    return
        except _NOT_NOW:
            return
        except OSError:
            self.has_ended = True

    def discard(self) -> bool:
        """Reads what has come and drops it; False when the client has ended, or sends on as if nothing was said."""
        for _ in range(_PATIENCE):
            self.gather()
            self.inbox.clear()
            if not self.is_readable:
                return not self.has_ended
        return False

    def take_request(self) -> None:
        """Moves the request that has arrived from the inbox to where gunicorn reads it."""
        self.sock.request = self.framing.take(self.inbox)
        self.framing = Framing()
        self.told_to_continue = False

    def has_leftovers(self) -> bool:
        """Bytes that the parser left over mean that it and our framing disagree: nothing after them is trusted."""
        return bool(self.sock.request or self.parser.unreader.take_buffered())

    def deliver(self) -> bool:
        """Sends what the client takes now; True when nothing is left. A fault of the connection raises `OSError`."""
        answer = self.sock.answer
        try:
            while answer:
                del answer[: self.channel.send(answer)]
        except _NOT_NOW:
            return False
        return True

    def close(self) -> None:
        """At once: lingering is a phase, not a wait."""
        with contextlib.suppress(OSError):
            self.channel.close()


class Watch:
    """What gunicorn's main loop takes for a selector: listeners as usual, clients edge-triggered.

    A client is registered once, not twice for each request: at thousands of requests a second that is felt.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[Any], None]] = {}
        self._objects: dict[int, Any] = {}

    def register(self, fileobj: Any, _events: int, callback: Callable[[Any], None]) -> None:
        """Level-triggered, for what gunicorn registers itself."""
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        self._epoll.register(number, select.EPOLLIN)
        self._callbacks[number], self._objects[number] = callback, fileobj

    def unregister(self, fileobj: Any) -> None:
        """The reverse."""
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        self._epoll.unregister(number)
        del self._callbacks[number], self._objects[number]

    def follow(self, connection: Connection, callback: Callable[[Any], None]) -> None:
        """Reports each change of a client's socket until `forget`."""
        self._callbacks[connection.descriptor], self._objects[connection.descriptor] = callback, connection
        self._epoll.register(connection.descriptor, _EDGES)

    def expect_room(self, connection: Connection) -> None:
        """Reports, too, when the client has taken some of its answer."""
        self._epoll.modify(connection.descriptor, _EDGES | select.EPOLLOUT)

    def forget(self, connection: Connection) -> None:
        """Before its socket is closed."""
        del self._callbacks[connection.descriptor], self._objects[connection.descriptor]
        self._epoll.unregister(connection.descriptor)

    def dispatch(self, timeout: float) -> None:
        """Waits for events and calls back."""
        for number, _ in self._epoll.poll(timeout):
            if number in self._callbacks:  # an earlier callback may have closed it
                self._callbacks[number](self._objects[number])

    def close(self) -> None:
        """Gives back the descriptor."""
        self._epoll.close()
