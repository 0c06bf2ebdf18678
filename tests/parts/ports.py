"""Loopback ports, and waiting for something to listen on them."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    """A loopback port that nobody listened on a moment ago; the caller must bear losing the race for it."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((LOOPBACK, port)) == 0


def wait_until(
    ready: Callable[[], bool],
    process: subprocess.Popen[bytes],
    log: Callable[[], str],
    *,
    seconds: float = 30,
) -> None:
    """Returns once `ready()`; raises with the process's own log if it ends or the time is up."""
    deadline = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}:\n{log()}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{process.args!r} is not ready after {seconds} s:\n{log()}")
        time.sleep(0.01)


def stop(process: subprocess.Popen[bytes], *, seconds: float = 10) -> None:
    """Asks the process to end, then makes it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
