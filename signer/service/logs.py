"""The log of the service: lines on stderr that never wait for a reader.

stderr is often a pipe or journald's socket. If nothing reads it, it fills up, and a process that waits for room would
neither sign nor restart anything. Here a line that finds no room is lost and counted.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import struct
from contextlib import suppress
from typing import Final

from signer.files import open_again

_STDERR: Final = 2
_PIECE: Final = 4096  # bytes; PIPE_BUF: a pipe takes a piece whole or not at all
_SEND_TIMEOUT: Final = struct.pack("ll", 0, 50_000)  # struct timeval: 50 ms


def start_log() -> None:
    """Configures logging for a service: warnings and errors on stderr, `signer: ` in front."""
    make_stderr_nonblocking()
    handler = LossyHandler(_STDERR)
    handler.setFormatter(logging.Formatter("signer: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def make_stderr_nonblocking() -> None:
    """Makes writes to stderr fail without room, in this process and its children, not in processes that share it.

    A pipe or terminal is opened anew for that. A pipe that this user may not open is changed for all its writers; a
    socket cannot be opened anew, and its senders wait 50 ms at most.
    """
    mode = os.fstat(_STDERR).st_mode
    if stat.S_ISSOCK(mode):
        with socket.socket(fileno=os.dup(_STDERR)) as shared:
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_TIMEOUT)
    elif stat.S_ISFIFO(mode) or os.isatty(_STDERR):
        try:
            own = open_again(_STDERR)
        except OSError:
            if stat.S_ISFIFO(mode):
                os.set_blocking(_STDERR, False)
            return
        os.dup2(own, _STDERR)
        os.close(own)


class LossyHandler(logging.Handler):
    """Writes to a non-blocking descriptor; says how many lines were lost as soon as there is room again."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._socket: socket.socket | None = None
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            self._socket = socket.socket(fileno=os.dup(descriptor))
        self._lost = 0
        self._is_torn = False  # the last line ended in the middle

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record, or counts it as lost."""
        try:
            text = self.format(record)
        except Exception:  # noqa: BLE001 - as in logging itself: a malformed record must not end the caller
            self.handleError(record)
            return
        if self._lost:
            noun = "line" if self._lost == 1 else "lines"
            if not self._write(f"signer: {self._lost} {noun} of this log found no room\n"):
                self._lost += 1
                return
            self._lost = 0
        if not self._write(f"{text}\n"):
            self._lost += 1

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        super().close()

    def _write(self, text: str) -> bool:
        """False if the text, or a part of it, is lost."""
        data = memoryview(("\n" * self._is_torn + text).encode(errors="backslashreplace"))
        size = len(data)
        with suppress(OSError):  # no room, a full disk, or no reader any more
            while data:
                data = data[self._send(data[:_PIECE]) :]
        if len(data) < size:
            self._is_torn = bool(data)
        return not data

    def _send(self, piece: memoryview) -> int:
        if self._socket is not None:
            return self._socket.send(piece, socket.MSG_DONTWAIT)
        return os.write(self._descriptor, piece)
