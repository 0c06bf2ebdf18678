"""The api's client of the keeper: sends one message and reads one reply, in a thread or in the event loop.

Each connection carries one message at a time. A message begins with a number, and so does its reply: a reply that comes
late, or that nobody asked for, ends its connection and never reaches the next caller. A message is sent at most once:
its certificate may be issued even if the reply is lost. Every failure here raises `Unavailable`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from signer.errors import TOKEN_CODES, SignerError
from signer.protocol.commands import MAX_NUMBER, MAX_REPLY
from signer.protocol.replies import Reply, decode_reply, keeper_gone

TIMEOUT: Final = 10.0  # seconds for one reply
MOST: Final = 64  # messages in flight of the event loop; more would only wait in the keeper instead of here


class KeeperClient:
    """A client of the keeper that listens on `path`.

    `ask` blocks and is safe to call in any thread, each of which gets a connection. `ask_async` and `ask_soon` belong
    to one event loop, which must call `expire` about ten times a second. `judged` is called, in the thread of the
    question, with each token that the keeper accepted or refused.
    """

    def __init__(
        self,
        path: Path,
        timeout: float = TIMEOUT,
        judged: Callable[[str, bool], None] = lambda _token, _accepted: None,
    ) -> None:
        self.path = path
        self.judged = judged
        self._path = str(path)
        self._seconds = timeout
        # Kernel timeouts: unlike Python's, they let connect() wait for a full queue and need no poll().
        self._timeout = struct.pack("@ll", int(timeout), int(timeout % 1 * 1_000_000))
        self._local = threading.local()
        self._numbers = itertools.count(1)
        self._free: list[socket.socket] = []
        self._out: OrderedDict[socket.socket, _Question] = OrderedDict()  # oldest first
        self._queue: deque[_Question] = deque()
        self._room: memoryview | None = None

    def read_answer(self, header: dict[str, object], message: bytes | None) -> Reply:
        """The reply in the keeper's message for the question `header`; raises the `SignerError` that it sent, or
        `Unavailable` if there is no message."""
        if message is None:
            raise keeper_gone()
        token = header.get("token")
        try:
            reply = decode_reply(message)
        except SignerError as error:
            if isinstance(token, str) and error.code in TOKEN_CODES:
                self.judged(token, False)
            raise
        if isinstance(token, str):
            self.judged(token, True)
        return reply

    # --- in a thread --------------------------------------------------------------------------------------------

    def ask(self, header: dict[str, object], body: bytes = b"") -> Reply:
        """The keeper's reply; raises the `SignerError` that it sent, or `Unavailable`."""
        number = b"%d" % next(self._numbers)
        connection = self._send(number + b" " + make_message(header, body))
        buffer: bytearray = self._local.buffer
        try:
            size = connection.recv_into(buffer)
        except OSError:
            size = 0
        message = _open(bytes(memoryview(buffer)[:size]), number)
        if message is None:
            self._drop()
        return self.read_answer(header, message)

    def _send(self, message: bytes) -> socket.socket:
        """Sends on this thread's connection, or on a new one if the keeper has closed it; returns the connection."""
        kept: socket.socket | None = getattr(self._local, "connection", None)
        if kept is not None:
            try:
                kept.send(message)
            except OSError:
                self._drop()
            else:
                return kept
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, self._timeout)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, self._timeout)
        try:
            connection.connect(self._path)
            connection.send(message)
        except OSError:
            connection.close()
            raise keeper_gone() from None
        self._local.connection = connection
        self._local.buffer = bytearray(MAX_REPLY + MAX_NUMBER + 1)  # reused: allocating it for each reply costs 20 µs
        return connection

    def _drop(self) -> None:
        connection: socket.socket | None = self._local.__dict__.pop("connection", None)
        if connection is not None:
            connection.close()

    # --- in the event loop --------------------------------------------------------------------------------------

    async def ask_async(self, header: dict[str, object], body: bytes = b"") -> Reply:
        """As `ask`, without blocking the loop."""
        answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self.ask_soon(header, body, partial(_set_once, answer))
        return self.read_answer(header, await answer)

    def ask_soon(self, header: dict[str, object], body: bytes, take: Callable[[bytes | None], None]) -> None:
        """As `ask_async`, without a task: the loop calls `take` later, with the message for `read_answer`."""
        number = b"%d" % next(self._numbers)
        message = number + b" " + make_message(header, body)
        self._queue.append(_Question(number, message, time.monotonic() + self._seconds, take))
        self._send_waiting()

    def expire(self) -> None:
        """Fails the questions that have waited too long and retries those for which the keeper had no room."""
        now = time.monotonic()
        while self._out and (oldest := next(iter(self._out.items())))[1].due <= now:
            self._discard(oldest[0])
            oldest[1].take(None)
        while self._queue and self._queue[0].due <= now:
            self._queue.popleft().take(None)
        self._send_waiting()

    def close(self) -> None:
        """Ends all connections of the event loop."""
        for connection in (*self._free, *self._out):
            self._discard(connection)

    def _send_waiting(self) -> None:
        while self._queue and len(self._out) < MOST:
            question = self._queue[0]
            try:
                connection = self._send_now(question.message)
            except BlockingIOError:  # the keeper's backlog is full; `expire` retries
                return
            except OSError:  # told later, as `ask_soon` promises
                asyncio.get_running_loop().call_soon(self._queue.popleft().take, None)
            else:
                self._queue.popleft()
                self._out[connection] = question

    def _send_now(self, message: bytes) -> socket.socket:
        """Sends on a free connection, or on a new one if the keeper closed those; returns the connection.

        Raises `OSError`; `BlockingIOError` if the keeper has no room for another connection yet.
        """
        while self._free:
            connection = self._free.pop()
            try:
                connection.send(message)
            except OSError:
                self._discard(connection)
            else:
                return connection
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            connection.connect(self._path)
            connection.send(message)
        except OSError:
            connection.close()
            raise
        asyncio.get_running_loop().add_reader(connection.fileno(), self._on_readable, connection)
        return connection

    def _on_readable(self, connection: socket.socket) -> None:
        if self._room is None:
            self._room = memoryview(bytearray(MAX_REPLY + MAX_NUMBER + 1))
        try:
            size = connection.recv_into(self._room)
        except BlockingIOError:
            return
        except OSError:
            size = 0
        question = self._out.pop(connection, None)
        message = None if question is None else _open(bytes(self._room[:size]), question.number)
        if message is None:  # closed, or a reply to another question
            self._discard(connection)
        else:
            self._free.append(connection)
        if question is not None:
            question.take(message)
        self._send_waiting()

    def _discard(self, connection: socket.socket) -> None:
        self._out.pop(connection, None)
        if connection in self._free:
            self._free.remove(connection)
        asyncio.get_running_loop().remove_reader(connection.fileno())
        connection.close()


@dataclass(slots=True, eq=False)
class _Question:
    """A message of the event loop, with its number; `take` gets the keeper's message, or None if there is none."""

    number: bytes
    message: bytes
    due: float
    take: Callable[[bytes | None], None]


def _set_once(answer: asyncio.Future[bytes | None], message: bytes | None) -> None:
    if not answer.done():  # the caller may be gone
        answer.set_result(message)


def _open(message: bytes, number: bytes) -> bytes | None:
    """The reply in a message that answers the question `number`; None for any other message."""
    found, _, reply = message.partition(b" ")
    return reply if found == number and reply else None


def make_message(header: dict[str, object], body: bytes) -> bytes:
    """A message to the keeper without its number: a line of JSON, then the body."""
    try:
        line = msgspec.json.encode(header)
    except UnicodeEncodeError:  # lone surrogates, which Python's encoder escapes and the keeper reads
        line = json.dumps(header).encode()
    return line + b"\n" + body
