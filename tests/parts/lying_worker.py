"""An api worker in an attacker's hands: says anything to the keeper's socket, or nothing, or too often.

`LyingWorker` speaks from the test's own process. Run as a program it is a process of its own, which the keeper can
tell from the test's: `python lying_worker.py SOCKET MODE COUNT`, where MODE is one of

- `flood`: COUNT connections one after the other, each sends garbage and is closed without reading;
- `silent`: COUNT connections that send nothing and stay until the process is killed;
- `deaf`: COUNT connections that ask for the metrics without end and never read one.

It prints `started` once it is at it, and ends by itself only in `flood`.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GARBAGE = (
    b"\0" * 100,
    b"{",
    b"[]",
    b'{"op": "sign"}',
    os.urandom(1000),
    b"GET / HTTP/1.1\r\n\r\n",
    b'{"op": "health"}',
)
MOST_READ = 4 * 1024 * 1024


class LyingWorker:
    """Connections to a keeper that are used against it. A context manager that closes them."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._open: list[socket.socket] = []

    def __enter__(self) -> LyingWorker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for connection in self._open:
            connection.close()

    def connect(self, timeout: float = 10) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._open.append(connection)
        connection.settimeout(timeout)
        connection.connect(self._path)
        return connection

    def can_connect(self) -> bool:
        """Connects, without waiting; False if the queue of those who want to is full."""
        try:
            self.connect(0)
        except BlockingIOError:
            return False
        return True

    def say(self, message: bytes) -> Any:
        """What the keeper answers to one message on a new connection; None if it hangs up instead."""
        connection = self.connect()
        connection.send(message)
        return read_reply(connection)

    def ask(self, body: bytes = b"", /, **header: object) -> Any:
        """As `say`, with a header of these fields, whatever they are, and a body."""
        return self.say(json.dumps({"request_id": "liar", **header}).encode() + b"\n" + body)


def read_reply(connection: socket.socket) -> Any:
    """`{"reply": …}` or `{"error": …}`; None if the keeper hangs up instead."""
    try:
        reply = connection.recv(MOST_READ)
    except ConnectionError:
        return None
    if not reply:
        return None
    shape, _, fields = reply.partition(b"\n")
    return {"error" if shape == b"Error" else "reply": json.loads(fields)}


class Noise:
    """One process of the kind described above; a context manager that kills it."""

    def __init__(self, path: Path, mode: str, count: int) -> None:
        self._command = [sys.executable, "-I", __file__, str(path), mode, str(count)]

    def __enter__(self) -> Noise:
        self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"started\n"
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def wait(self) -> None:
        """Until a flood has ebbed."""
        assert self.process.wait(100) == 0


def _flood(path: str, count: int) -> None:
    print("started", flush=True)
    messages = itertools.cycle(GARBAGE)
    done = 0
    while done < count:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.setblocking(False)
            try:
                connection.connect(path)
                connection.send(next(messages))
            except BlockingIOError:  # the queue of connections is full, which is the idea
                time.sleep(0.0005)
                continue
            except ConnectionError:  # thrown out already
                continue
            finally:
                done += 1


def _hold(path: str, count: int) -> list[socket.socket]:
    held = []
    for _ in range(count):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(path)
        connection.setblocking(False)
        held.append(connection)
    print("started", flush=True)
    return held


def _deaf(held: list[socket.socket]) -> None:
    while True:
        for connection in held:
            try:
                connection.send(b'{"op": "metrics"}')
            except OSError:  # the buffer is full, or the keeper hung up
                time.sleep(0.0001)


if __name__ == "__main__":
    where, how, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if how == "flood":
        _flood(where, number)
    elif how == "silent":
        _silent = _hold(where, number)
        time.sleep(1000)
    else:
        _deaf(_hold(where, number))
