"""The api's end of the keeper's socket: one message out, one reply back.

A connection a thread; a sign request is sent at most once, because a reply that was lost may belong to a certificate
that was issued. Raises `Unavailable` for everything that can go wrong here.
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
    """A way to the keeper that listens on `path`; safe to share between threads."""

    def __init__(self, path: Path, timeout: float = TIMEOUT) -> None:
        self.path = path
        self._path = str(path)
        # The kernel's own timeouts: unlike Python's they let connect() wait in a full queue, and cost no poll().
        self._patience = struct.pack("@ll", int(timeout), int(timeout % 1 * 1_000_000))
        self._local = threading.local()

    def ask(self, header: dict[str, object], body: bytes = b"") -> Reply:
        """The keeper's reply; raises the `SignerError` that it sent, or `Unavailable`."""
        connection = self._send(make_message(header, body))
        room: bytearray = self._local.room
        try:
            size = connection.recv_into(room)
        except OSError:
            size = 0
        if not size:
            self._drop()
            raise keeper_gone()
        return decode_reply(bytes(memoryview(room)[:size]))

    def _send(self, message: bytes) -> socket.socket:
        """Sends on this thread's connection; on a new one if the keeper had closed the old one before this message."""
        kept: socket.socket | None = getattr(self._local, "connection", None)
        if kept is not None:
            try:
                kept.send(message)
            except OSError:
                self._drop()
            else:
                return kept
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, self._patience)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, self._patience)
        try:
            connection.connect(self._path)
            connection.send(message)
        except OSError:
            connection.close()
            raise keeper_gone() from None
        self._local.connection = connection
        self._local.room = bytearray(MAX_REPLY)  # kept: a buffer of this size for each reply costs 20 µs
        return connection

    def _drop(self) -> None:
        connection: socket.socket | None = self._local.__dict__.pop("connection", None)
        if connection is not None:
            connection.close()


def make_message(header: dict[str, object], body: bytes) -> bytes:
    """What the keeper reads: a line of JSON, then the body."""
    return json.dumps(header).encode() + b"\n" + body
