"""A process of the keeper's that does one kind of work outside its loop: started, spoken to, and replaced.

It holds no key and no policy, gets no setting, and ends with its end of the socket.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Final

from signer.service.scheduling import stay_on

RESTART_PAUSE: Final = 1.0  # seconds
BUFFER: Final = 1024 * 1024  # bytes; the longest message
_PASSED_ON: Final = ("LANG", "LC_ALL", "TZ", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONWARNINGS")


class HelperProcess:
    """`python -m MODULE DESCRIPTOR DATA_DIR` with a SEQPACKET socket; what it sends wakes the loop with `owner`."""

    def __init__(
        self,
        module: str,
        data_dir: Path,
        selector: selectors.BaseSelector,
        owner: object,
        processors: Collection[int] = (),
    ) -> None:
        self._module = module
        self._data_dir = data_dir
        self._selector = selector
        self._owner = owner
        self._processors = processors  # that it stays on; none: those of the keeper's loop
        self.process: subprocess.Popen[bytes] | None = None
        self.sock: socket.socket | None = None  # None while no process runs
        self._killed: list[subprocess.Popen[bytes]] = []
        self._started = -RESTART_PAUSE

    def start(self) -> None:
        """Starts it; if that is not possible, `sock` stays None."""
        self._started = time.monotonic()
        self._killed = [process for process in self._killed if process.poll() is None]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        command = [sys.executable, "-P", "-m", self._module, str(theirs.fileno()), str(self._data_dir)]
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        try:
            with theirs:
                self.process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd="/", env=environment
                )
        except OSError:  # no process is left
            ours.close()
            return
        if self._processors:
            stay_on(self._processors, self.process.pid)
        ours.setblocking(False)
        self.sock = ours
        self._selector.register(ours, selectors.EVENT_READ, self._owner)

    def ensure(self) -> bool:
        """True if it runs; starts it again `RESTART_PAUSE` after its last start."""
        if self.sock is None and self.startable_in() <= 0:
            self.start()
        return self.sock is not None

    def startable_in(self) -> float:
        """Seconds until it may be started, 0 or less if it runs or may be started now."""
        return self._started + RESTART_PAUSE - time.monotonic() if self.sock is None else 0.0

    def send(self, message: bytes) -> None:
        """Sends one message; if the process has ended, `receive` tells."""
        if self.sock is not None:
            with suppress(OSError):
                self.sock.send(message)

    def receive(self) -> bytes | None:
        """One message; None if there is none yet, empty if the process has ended."""
        try:
            return self.sock.recv(BUFFER) if self.sock is not None else b""
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def disconnect(self) -> None:
        """Closes the socket, after which an orderly process ends."""
        if self.sock is not None:
            self._selector.unregister(self.sock)
            self.sock.close()
            self.sock = None

    def stop(self) -> None:
        """Kills it, and does not wait: on a disk that hangs it does not end."""
        self.disconnect()
        if self.process is not None:
            self.process.kill()
            self._killed.append(self.process)
            self.process = None

    def close(self, within: float) -> None:
        """Waits `within` seconds for the end of all processes that were started, and kills what is left."""
        self.disconnect()
        deadline = time.monotonic() + within
        for process in (*self._killed, *([] if self.process is None else [self.process])):
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0.0))
        self.stop()
