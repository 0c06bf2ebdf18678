"""What supervises a child hears from it: that it is ready, that it is alive, and what a reload did.

The supervisor is the launcher, through a channel that the child inherits, or systemd (sd_notify(3), NOTIFY_SOCKET), or
nothing. No method blocks or raises: supervision that fails must not stop the service. A message is one JSON object; the
launcher does not trust it, because the api's workers have the channel until they are ready.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from typing import Any, Final

from signer.units import cut

MAX_MESSAGE: Final = 128 * 1024  # bytes
MAX_LISTED: Final = 50  # items of a list in a report; the rest is counted
MAX_TEXT: Final = 200  # characters of a text in a report
ALIVE_EVERY: Final = 0.5  # seconds between two signs of life


class Supervisor:
    """A child's side. `channel` is the inherited descriptor of a launcher's channel."""

    def __init__(self, channel: socket.socket | None, environ: MutableMapping[str, str]) -> None:
        self._channel = channel
        self._systemd: socket.socket | None = None
        if address := environ.pop("NOTIFY_SOCKET", ""):  # children of this process are not the unit's main process
            self._systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._systemd.setblocking(False)
            with suppress(OSError):  # then every message fails in the same way
                self._systemd.connect("\0" + address[1:] if address.startswith("@") else address)
        self._told_at = -ALIVE_EVERY

    def ready(self) -> None:
        """The process serves."""
        self._send({"kind": "ready"}, b"READY=1")

    def alive(self) -> None:
        """The process makes progress; called at least once a second, and before each write that may take long."""
        now = time.monotonic()
        if now - self._told_at >= ALIVE_EVERY:
            self._told_at = now
            self._send({"kind": "alive"}, b"WATCHDOG=1")

    def reloaded(self, began: float, report: dict[str, object]) -> None:
        """A reload that began at `began` (seconds, CLOCK_MONOTONIC) has ended; `report` is for `signer reload`."""
        self._send({"kind": "reloaded", "began": began, "report": shorten(report)}, None)

    def leave(self) -> None:
        """Closes this process's copy of the channel: it is the launcher's and the parent's business from now on."""
        for end in (self._channel, self._systemd):
            if end is not None:
                end.close()
        self._channel = self._systemd = None

    def _send(self, message: dict[str, object], state: bytes | None) -> None:
        with suppress(OSError):  # a full queue, or a supervisor that is gone
            if self._channel is not None:
                self._channel.send(json.dumps(message, ensure_ascii=False).encode(errors="replace"))
        with suppress(OSError):
            if self._systemd is not None and state is not None:
                self._systemd.send(state)


def adopt_channel(number: int | None) -> socket.socket | None:
    """The child's end of the launcher's channel, from the number of the inherited descriptor."""
    if number is None:
        return None
    channel = socket.socket(fileno=number)
    channel.set_inheritable(False)
    channel.setblocking(False)
    return channel


def waiting(sock: socket.socket, longest: int, most: int) -> Iterator[bytes]:
    """At most `most` messages that wait at a non-blocking socket of messages; the last one is empty if it has ended.

    A longer message than `longest` bytes is cut off there. Whoever closes the socket meanwhile asks for no more.
    """
    for _ in range(most):
        try:
            data = sock.recv(longest)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        yield data
        if not data:
            return


def read_messages(channel: socket.socket) -> Iterator[dict[str, Any]]:
    """The launcher's side: all messages that wait; those that are malformed are left out."""
    for data in waiting(channel, MAX_MESSAGE, sys.maxsize):
        with suppress(ValueError, RecursionError):
            message = json.loads(data)
            if isinstance(message, dict):
                yield message


def shorten(report: dict[str, object]) -> dict[str, object]:
    """The report with long lists and texts cut off, so that it fits one message."""
    return {name: _shortened(value) for name, value in report.items()}


def _shortened(value: object) -> object:
    if isinstance(value, dict):
        return {str(name): _shortened(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        more = [f"and {len(value) - MAX_LISTED} more"] if len(value) > MAX_LISTED else []
        return [*(_shortened(item) for item in value[:MAX_LISTED]), *more]
    return cut(value, MAX_TEXT) if isinstance(value, str) else value
