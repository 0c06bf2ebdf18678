"""Child processes with bounded time and memory.

A child has its own process group, an empty stdin and only the environment that the caller passes. At its deadline the
whole group receives SIGTERM, so that an engine can finish what must not be interrupted, and SIGKILL `GRACE` later.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Final

from signer.errors import SignerError

MAX_OUTPUT: Final = 1024 * 1024  # bytes kept of each of stdout and stderr; the rest is read and dropped
GRACE: Final = 2.0  # seconds between SIGTERM and SIGKILL
_PIECE: Final = 65536


class NoSuchCommand(SignerError):
    """The command could not be started."""


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a command ended: `status` is that of a shell (128+n for signal n), None if it was ended at the deadline.

    `is_whole` is False if the output was cut at the limit. `seconds` is the run time.
    """

    status: int | None
    out: str
    err: str
    is_whole: bool
    seconds: float


def run(
    argv: Sequence[str], *, environment: Mapping[str, str], within: float, most: int = MAX_OUTPUT, cwd: str = "/"
) -> CommandResult:
    """Runs a command for at most `within` seconds plus `GRACE`; raises only `NoSuchCommand`.

    An interrupt (Ctrl-C, an exception of a signal handler) also ends the child.
    """
    started = time.monotonic()
    try:
        child = subprocess.Popen(
            argv, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, cwd=cwd,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or "its arguments are malformed").lower()
        raise NoSuchCommand("command_not_started", f"cannot run {argv[0]}: {reason}", "check its name") from None
    pipes = [pipe for pipe in (child.stdout, child.stderr) if pipe is not None]
    reader = _Reader(child, pipes, most)
    try:
        in_time = reader.read_until_end(started + within)
        if not in_time:
            _end(child, signal.SIGTERM)
            if not reader.read_until_end(time.monotonic() + GRACE):
                _end(child, signal.SIGKILL)
    finally:
        if child.poll() is None:
            _end(child, signal.SIGKILL)
        child.wait()
        reader.close()
    status = child.returncode if child.returncode >= 0 else 128 - child.returncode
    out, err = (bytes(kept).decode(errors="replace") for kept in reader.kept)
    return CommandResult(status if in_time else None, out, err, reader.is_whole, time.monotonic() - started)


def _end(child: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):  # the group has just ended
        os.killpg(child.pid, number)


class _Reader:
    """Reads both pipes until the child has ended; its background processes may hold the pipes open for longer."""

    def __init__(self, child: subprocess.Popen[bytes], pipes: Sequence[IO[bytes]], most: int) -> None:
        self.kept = (bytearray(), bytearray())
        self.is_whole = True
        self._most = most
        self._pipes = pipes
        self._ended = os.pidfd_open(child.pid)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._ended, selectors.EVENT_READ)
        for pipe, kept in zip(pipes, self.kept, strict=True):
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, kept)

    def read_until_end(self, deadline: float) -> bool:
        """True when the child has ended, False at the deadline."""
        has_ended = False
        while not has_ended:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            for key, _ in self._selector.select(remaining):
                if key.data is None:
                    has_ended = True
                elif not self._take(key.fileobj, key.data):
                    self._selector.unregister(key.fileobj)
        for pipe, kept in zip(self._pipes, self.kept, strict=True):
            for _ in range(self._most // _PIECE + 2):  # bounded: a background process may write for ever
                if not self._take(pipe, kept):
                    break
        return True

    def _take(self, pipe: object, kept: bytearray) -> bool:
        """One piece of a pipe; False if there is none now."""
        try:
            piece = os.read(pipe.fileno(), _PIECE)  # type: ignore[attr-defined]  # selectors type it as anything
        except BlockingIOError:
            return False
        room = self._most - len(kept)
        kept += piece[:room]
        self.is_whole = self.is_whole and len(piece) <= room
        return bool(piece)

    def close(self) -> None:
        self._selector.close()
        os.close(self._ended)
        for pipe in self._pipes:
            pipe.close()
