"""A client connection and the selector of the worker's main loop; nothing here blocks.

This module has the mechanism, `worker.py` the rules.
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
_ENOUGH: Final = 4 * _READ  # more than any request; further bytes are read after the response
_MAX_DISCARDS: Final = 16  # times `_ENOUGH` bytes, dropped in one call
_EDGES: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_NOT_NOW: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Phase(Enum):
    """The event that a connection waits for."""

    ARRIVING = "a whole request"
    IDLE = "the next request"
    BUSY = "the response from a thread or the keeper"
    LEAVING = "the client to read the response"
    LINGERING = "the client to read the last response"


def freeze_settings(cfg: Any) -> SimpleNamespace:
    """gunicorn's settings as plain attributes, because its parser looks up twenty of them for each request."""
    settings = SimpleNamespace(**{name: getattr(cfg, name) for name in cfg.settings})
    settings.is_ssl = cfg.is_ssl
    settings.forwarded_allow_networks = cfg.forwarded_allow_networks
    return settings


class Mailbox:
    """Stands in for the client's socket in gunicorn: contains one request and collects the response."""

    def __init__(self) -> None:
        self.request = b""
        self.response = bytearray()

    def recv(self, size: int) -> bytes:
        """The next bytes of the request; empty at its end. Never blocks."""
        data, self.request = self.request[:size], self.request[size:]
        return data

    def sendall(self, data: bytes) -> None:
        """Appends to the response."""
        self.response += data

    def send(self, data: bytes) -> int:
        """Ignores `data`: gunicorn sends only `100 Continue` this way, and the main loop has already sent it."""
        return len(data)

    def setblocking(self, flag: bool) -> None:
        """Does nothing: a mailbox never blocks."""

    def gettimeout(self) -> float:
        """0: a mailbox never blocks. It has no `settimeout`, so that gunicorn does not treat it as a real socket."""
        return 0.0


class Connection:
    """One client. The main loop owns it, except while a thread handles its request (`Phase.BUSY`)."""

    initialized = data_ready = True  # constants that gunicorn's `handle` reads
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
        self.has_ended = False  # the client will send nothing more
        self.is_last = False  # no request may follow the current one
        self.has_sent_continue = False

    def init(self) -> None:
        """Does nothing: the constructor has done everything."""

    def gather(self) -> None:
        """Reads all available bytes without blocking. Sets `has_ended` at the end of the stream or on an error."""
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
                    return  # a short read has emptied the socket; TLS may have buffered more
                if len(self.inbox) > _ENOUGH:
                    self.is_readable = True
                    return
        except _NOT_NOW:
            return
        except OSError:
            self.has_ended = True

    def discard(self) -> bool:
        """Reads and drops the available bytes; False if the client has ended or sends without end."""
        for _ in range(_MAX_DISCARDS):
            self.gather()
            self.inbox.clear()
            if not self.is_readable:
                return not self.has_ended
        return False

    def take_request(self) -> None:
        """Moves the complete request from the inbox to the mailbox, where gunicorn reads it."""
        self.sock.request = self.framing.take(self.inbox)
        self.framing = Framing()
        self.has_sent_continue = False

    def has_leftovers(self) -> bool:
        """True if the parser left bytes: it and `framing.py` disagree, so the connection must end."""
        return bool(self.sock.request or self.parser.unreader.take_buffered())

    def deliver(self) -> bool:
        """Sends as much as the client takes now; True when nothing is left. Raises `OSError`."""
        response = self.sock.response
        try:
            while response:
                del response[: self.channel.send(response)]
        except _NOT_NOW:
            return False
        return True

    def close(self) -> None:
        """Closes the socket without waiting; see `Phase.LINGERING`."""
        with contextlib.suppress(OSError):
            self.channel.close()


class EventPoller:
    """Replaces gunicorn's selector: level-triggered for listeners, edge-triggered for clients.

    A client is registered once instead of twice for each request, which matters at thousands of requests a second.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[Any], None]] = {}
        self._objects: dict[int, Any] = {}

    def register(self, fileobj: Any, _events: int, callback: Callable[[Any], None]) -> None:
        """Registers a descriptor level-triggered; gunicorn calls this for its own."""
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        self._epoll.register(number, select.EPOLLIN)
        self._callbacks[number], self._objects[number] = callback, fileobj

    def unregister(self, fileobj: Any) -> None:
        """Reverses `register`."""
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        self._epoll.unregister(number)
        del self._callbacks[number], self._objects[number]

    def follow(self, connection: Connection, callback: Callable[[Any], None]) -> None:
        """Calls back for each change of a client's socket until `forget`."""
        self._callbacks[connection.descriptor], self._objects[connection.descriptor] = callback, connection
        self._epoll.register(connection.descriptor, _EDGES)

    def expect_room(self, connection: Connection) -> None:
        """Also calls back when the client has read some of the response."""
        self._epoll.modify(connection.descriptor, _EDGES | select.EPOLLOUT)

    def forget(self, connection: Connection) -> None:
        """Removes a client; call it before its socket is closed."""
        del self._callbacks[connection.descriptor], self._objects[connection.descriptor]
        self._epoll.unregister(connection.descriptor)

    def dispatch(self, timeout: float) -> None:
        """Waits for events, at most `timeout` seconds, and calls back."""
        for number, _ in self._epoll.poll(timeout):
            if number in self._callbacks:  # an earlier callback may have closed it
                self._callbacks[number](self._objects[number])

    def close(self) -> None:
        """Closes the epoll descriptor."""
        self._epoll.close()
