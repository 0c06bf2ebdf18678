"""The api's client of the keeper: sends one message and reads one reply.

One connection for each thread. A sign request is sent at most once: its certificate may be issued even if the reply is
lost. Every failure here raises `Unavailable`.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from pathlib import Path
from typing import Final

from signer.protocol.commands import MAX_REPLY
from signer.protocol.replies import Reply, decode_reply, keeper_gone

TIMEOUT: Final = 10.0  # seconds for one reply


class KeeperClient:
    """A client of the keeper that listens on `path`; safe to share between threads."""

    def __init__(self, path: Path, timeout: float = TIMEOUT) -> None:
        self.path = path
        self._path = str(path)
        # Kernel timeouts: unlike Python's, they let connect() wait for a full queue and need no poll().
        self._timeout = struct.pack("@ll", int(timeout), int(timeout % 1 * 1_000_000))
        self._local = threading.local()

    def ask(self, header: dict[str, object], body: bytes = b"") -> Reply:
        """The keeper's reply; raises the `SignerError` that it sent, or `Unavailable`."""
        connection = self._send(make_message(header, body))
        buffer: bytearray = self._local.buffer
        try:
            size = connection.recv_into(buffer)
        except OSError:
            size = 0
        if not size:
            self._drop()
            raise keeper_gone()
        return decode_reply(bytes(memoryview(buffer)[:size]))

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
        self._local.buffer = bytearray(MAX_REPLY)  # reused: allocating it for each reply costs 20 µs
        return connection

    def _drop(self) -> None:
        connection: socket.socket | None = self._local.__dict__.pop("connection", None)
        if connection is not None:
            connection.close()


def make_message(header: dict[str, object], body: bytes) -> bytes:
    """A message to the keeper: a line of JSON, then the body."""
    return json.dumps(header).encode() + b"\n" + body
