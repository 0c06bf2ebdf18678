"""Loopback ports, and waiting for something to listen on them."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

LOOPBACK = "127.0.0.1"
LOOPBACK_HEX = "0100007F"  # as /proc/net/tcp writes it
_BLOCK = 500  # ports that one process of the tests has for itself


def free_port() -> int:
    """A loopback port that nobody listens on, and that no other test is given; the next one is free as well, since a
    development OpenBao takes it too.

    Whoever asks for it binds it later, and again after a restart. So it is not one of those that the kernel hands out
    for outgoing connections, and each process of the tests (xdist's workers) takes its ports from a block of its own.
    """
    return next(_ports)


def _free_ports() -> Iterator[int]:
    block = _own_block()
    while True:
        for port in block:
            if _is_free(port) and _is_free(port + 1):
                yield port


def _own_block() -> range:
    """Ports that no other process has, as long as this one lives: a name in the abstract namespace says so."""
    first = 10_000
    last = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if last < first + 20 * _BLOCK:  # the kernel hands out nearly all of them
        last = 65_536
    for start in range(first, last - _BLOCK, _BLOCK):
        name = socket.socket(socket.AF_UNIX)
        try:
            name.bind(f"\0signer-test-ports-{start}")
        except OSError:
            name.close()
        else:
            name.detach()  # stays open until this process ends
            return range(start, start + _BLOCK, 2)
    raise RuntimeError("no block of ports is left: is something else of these tests still running?")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


_ports = _free_ports()


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((LOOPBACK, port)) == 0


def takes(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> bool:
    """Whether a process listens on this unix socket; the file is there a moment earlier."""
    with socket.socket(socket.AF_UNIX, kind) as probe:
        return probe.connect_ex(str(path)) == 0


def wait_until(
    ready: Callable[[], bool],
    process: subprocess.Popen[bytes],
    log: Callable[[], str],
    *,
    seconds: float = 60,
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
