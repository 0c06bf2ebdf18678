"""A process of the launcher: started, watched, restarted whenever it ends, and replaced when it hangs."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from signer.hardening import die_with_parent
from signer.service.key_channel import hand_over, make_channel
from signer.service.supervisor import read_messages

log = logging.getLogger("signer.serve")

RESTART_PAUSE: Final = (0.0, 0.2, 0.5, 1.0)  # seconds before a restart, by the number of failed starts in a row
KILLED_WITHIN: Final = 5.0  # seconds after SIGKILL; a process that then still exists waits for a disk
_LONGEST_STEP: Final = 1.0  # seconds of a child's silence that one look counts: the launcher may have been stopped
_PASSED_ON: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONWARNINGS")


@dataclass(frozen=True, slots=True)
class Ids:
    """User and group of a child; without supplementary groups."""

    user: int
    group: int


@dataclass(slots=True)
class Child:
    """A process that is restarted whenever it ends, and killed after `hangs_after` seconds without a sign of life.

    `prepare` is called before each start, and repeats what the first start found or made; it may raise `OSError` or
    `SignerError`. `argv` and `descriptors` are read at each start.
    """

    name: str
    argv: Callable[[], Sequence[str]]
    ids: Ids | None
    hangs_after: float  # seconds
    stable_after: float = 0.0  # seconds of running after which a process that was ready was a good start
    prepare: Callable[[], None] = lambda: None
    key_file: Path | None = None  # opened and passed to it at each reload
    descriptors: Callable[[], Sequence[int]] = lambda: ()  # passed to it at each start
    clock: Callable[[], float] = time.monotonic
    process: subprocess.Popen[bytes] | None = None
    channel: socket.socket | None = None
    came_up: bool = False
    reports: list[dict[str, Any]] = field(default_factory=list)  # of reloads, that nobody has taken yet
    failures: int = 0
    due: float = 0.0
    _started: float = 0.0
    _silent: float = 0.0  # seconds since its last sign of life
    _looked_at: float = 0.0
    _killed_at: float | None = None
    _is_stuck: bool = False

    def start(self) -> None:
        """Starts it; raises `OSError`, `SubprocessError` or `SignerError`, and then nothing was started."""
        self.prepare()
        if self.channel is not None:
            self.channel.close()
        # A new channel for each start, without unread messages of the last process.
        self.channel, theirs = make_channel()
        environment = {
            name: value for name, value in os.environ.items() if name.startswith("SIGNER_") or name in _PASSED_ON
        }
        ids: dict[str, object] = {}
        if self.ids is not None:
            ids = {"user": self.ids.user, "group": self.ids.group, "extra_groups": []}
        with theirs:
            self.process = subprocess.Popen(
                [*self.argv(), "--channel", str(theirs.fileno())],
                pass_fds=[*self.descriptors(), theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd="/",
                env=environment,
                preexec_fn=_prepare_child,  # noqa: PLW1509 - the launcher has one thread
                **ids,  # type: ignore[call-overload]
            )
        self.came_up, self.reports = False, []
        self._silent, self._started = 0.0, self.clock()
        self._looked_at = self._started
        self._killed_at, self._is_stuck = None, False

    def is_running(self) -> bool:
        """False also before its first start."""
        return self.process is not None and self.process.poll() is None

    def reload(self) -> None:
        """Passes the current key file, then sends SIGHUP."""
        if self.channel is not None and self.key_file is not None and self.is_running():
            try:
                hand_over(self.channel, self.key_file)
            except OSError as error:
                log.warning("the key file could not be passed to the %s: %s", self.name, error.strerror)
        if self.is_running():
            self.send_signal(signal.SIGHUP)

    def send_signal(self, number: int) -> None:
        """Signals the process, if there is one."""
        if self.process is not None:
            self.process.send_signal(number)

    def look(self) -> None:
        """Reads the messages of a running process, and kills it if it hangs."""
        if self.channel is None:
            return
        now = self.clock()
        self._silent += min(now - self._looked_at, _LONGEST_STEP)
        self._looked_at = now
        for message in read_messages(self.channel):
            self._silent = 0.0
            if message.get("kind") == "ready":
                self.came_up = True
            elif message.get("kind") == "reloaded":
                self.reports.append(message)
        if self._killed_at is not None:
            if not self._is_stuck and now - self._killed_at > KILLED_WITHIN:
                self._is_stuck = True
                log.error(
                    "the %s (process %d) cannot be killed, probably because its disk does not answer; it is replaced as"
                    " soon as it ends",
                    self.name,
                    self.pid,
                )
        elif self._silent > self.hangs_after:
            log.error("the %s has not answered for %.0f s and is killed", self.name, self.hangs_after)
            self.send_signal(signal.SIGKILL)
            self._killed_at = now

    @property
    def pid(self) -> int:
        """Of its process, 0 without one."""
        return 0 if self.process is None else self.process.pid

    def note_end(self) -> None:
        """Logs the end of the process and schedules its restart."""
        assert self.process is not None, "only a child that was started can end"  # noqa: S101
        log.warning("%s ended with status %s, restarting it", self.name, self.process.returncode)
        self.process = None
        was_good = self.came_up and self.clock() - self._started >= self.stable_after
        self._schedule(0 if was_good else self.failures + 1)

    def note_failed_start(self, reason: str) -> None:
        """Logs that the process could not be started, once for each shortage, and schedules another attempt."""
        if not self.failures:
            log.error("the %s could not be started: %s; trying again", self.name, reason)
        self._schedule(self.failures + 1)

    def _schedule(self, failures: int) -> None:
        self.failures = failures
        self.due = self.clock() + RESTART_PAUSE[min(failures, len(RESTART_PAUSE) - 1)]

    def stop(self, within: float) -> None:
        """Sends SIGTERM, and SIGKILL after `within` seconds; leaves a process that cannot be killed."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(within)
        except subprocess.TimeoutExpired:
            log.warning("%s did not stop within %.0f s and was killed", self.name, within)
            self.process.kill()
            try:
                self.process.wait(within)
            except subprocess.TimeoutExpired:
                log.error("%s (process %d) cannot be killed", self.name, self.pid)  # noqa: TRY400 - no stack


def _prepare_child() -> None:
    """Runs in the child before its program: until that has a handler, a reload must not end it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    die_with_parent()
