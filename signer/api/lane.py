"""The asynchronous keeper client: sends many commands at once and passes each reply to a callback.

The worker's main loop uses it with its poller. As with `KeeperClient`, a message is sent at most once, because a
lost reply may belong to a certificate that was issued.
"""

from __future__ import annotations

import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from signer.errors import SignerError
from signer.protocol.client import TIMEOUT
from signer.protocol.commands import MAX_REPLY
from signer.protocol.replies import Reply, decode_reply, keeper_gone

MOST: Final = 64  # commands in flight; more would only wait in the keeper instead of here
Outcome = Reply | SignerError
Done = Callable[[Outcome], None]


class Poller(Protocol):
    """The part of the main loop's selector that the client uses."""

    def register(self, fileobj: Any, _events: int, callback: Callable[[Any], None]) -> None: ...
    def unregister(self, fileobj: Any) -> None: ...


class AsyncKeeperClient:
    """Sends commands to the keeper that listens on `path`. Not thread-safe."""

    def __init__(self, path: Path, poller: Poller, later: Callable[[Done, Outcome], object]) -> None:
        self._path = str(path)
        self._poller = poller
        self._later = (
            later  # calls back from the main loop, so that an immediate error is not reported from within `ask`
        )
        self._free: list[socket.socket] = []
        self._out: OrderedDict[socket.socket, tuple[Done, float]] = OrderedDict()  # oldest first
        self._queue: deque[tuple[bytes, Done, float]] = deque()
        self._room = memoryview(bytearray(MAX_REPLY))

    def ask(self, message: bytes, done: Done) -> None:
        """Sends a message; the main loop later calls `done` with the keeper's reply or the error."""
        self._queue.append((message, done, time.monotonic() + TIMEOUT))
        self._send_waiting()

    def expire(self) -> None:
        """Fails messages that have waited too long and retries those for which the keeper had no room."""
        now = time.monotonic()
        while self._out and (oldest := next(iter(self._out.items())))[1][1] <= now:
            self._drop(oldest[0])
            self._later(oldest[1][0], keeper_gone())
        while self._queue and self._queue[0][2] <= now:
            self._later(self._queue.popleft()[1], keeper_gone())
        self._send_waiting()

    def _send_waiting(self) -> None:
        while self._queue and len(self._out) < MOST:
            message, done, due = self._queue[0]
            try:
                connection = self._send(message)
            except BlockingIOError:  # the keeper's backlog is full; `expire` retries
                return
            except OSError:
                self._queue.popleft()
                self._later(done, keeper_gone())
            else:
                self._queue.popleft()
                self._out[connection] = (done, due)

    def close(self) -> None:
        """Ends all connections."""
        for connection in (*self._free, *self._out):
            self._poller.unregister(connection)
            connection.close()

    def _send(self, message: bytes) -> socket.socket:
        """Sends the message on a free connection, or on a new one if the keeper closed those; returns the connection.

        Raises `OSError`; `BlockingIOError` if the keeper has no room for another connection yet.
        """
        while self._free:
            connection = self._free.pop()
            try:
                connection.send(message)
            except OSError:
                self._drop(connection)
            else:
                return connection
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            connection.connect(self._path)
            connection.send(message)
        except OSError:
            connection.close()
            raise
        self._poller.register(connection, 0, self._on_readable)
        return connection

    def _on_readable(self, connection: socket.socket) -> None:
        try:
            size = connection.recv_into(self._room)
        except BlockingIOError:
            return
        except OSError:
            size = 0
        asked = self._out.pop(connection, None)
        if not size or asked is None:  # the keeper closed it or sent an unexpected message
            self._drop(connection)
        else:
            self._free.append(connection)
        if asked is not None:
            asked[0](_outcome(self._room[:size]))
        self._send_waiting()

    def _drop(self, connection: socket.socket) -> None:
        self._out.pop(connection, None)
        if connection in self._free:
            self._free.remove(connection)
        self._poller.unregister(connection)
        connection.close()


def _outcome(raw: memoryview) -> Outcome:
    try:
        return decode_reply(bytes(raw))
    except SignerError as error:
        return error
