"""Strangers that attack a service on loopback, one kind a process: `python -m scripts.bench.attack PORT KIND RATE`.

RATE is the number of requests, or of new connections, a second. It prints `started` once it has all its connections,
and at SIGTERM `sent N`, the number since then. No attacker has a token that the service knows.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final, NamedTuple

_MANY: Final = 64 * 1024
MAX_ARREARS: Final = 0.02  # seconds; more are not made up for, or a late attacker's burst would be measured
_SIGN: Final = b"POST /api/sign/llmops HTTP/1.1\r\nHost: x\r\n"
_VAULT: Final = b"POST /v1/ssh/sign/x HTTP/1.1\r\nHost: x\r\n"
_LARGE: Final = b"GET /api/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
_STRANGER: Final = b"X-Vault-Token: sgn_" + b"a" * 49 + b"\r\n"


class Attack(NamedTuple):
    """`sent(n)` is the n-th request; `held` the number of connections, which are never read if `is_deaf`."""

    what: str
    sent: Callable[[int], bytes]
    held: int = 32
    is_deaf: bool = False


def _with_body(head: bytes, body: bytes) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


_ESCAPES: Final = (b'{} "' + b'\\"' * (32 * 1024))[:_MANY]
ATTACKS: Final = {
    "body": Attack("A1: bodies of 64 KB, quadratic to a careless reader", lambda _: _with_body(_SIGN, _ESCAPES)),
    "type": Attack(
        "A2: a Content-Type of 8,000 blanks",
        lambda _: _with_body(_VAULT + b"Content-Type: a" + b" " * 8000 + b"x\r\n", b"a=b"),
    ),
    "line": Attack("B1: malformed request lines", lambda _: b"POST /api/sign/x 2\r\n\r\n"),
    "names": Attack(
        "B2: role names without end",
        lambda n: _with_body(b"POST /api/sign/r%d HTTP/1.1\r\nHost: x\r\n" % n + _STRANGER, b"{}"),
    ),
    "tokens": Attack(
        "B3: tokens without end",
        lambda n: _with_body(_SIGN + b"X-Vault-Token: sgn_%049d\r\n" % n, b'{"public_key": "x"}'),
    ),
    "deaf": Attack("B4: 1,002 sockets that never read", lambda _: _LARGE * 20, 1002, True),
    "silent": Attack("1,002 sockets that say nothing", lambda _: b"", 1002, True),
    "health": Attack("health checks without end", lambda _: b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"),
    "metrics": Attack("metrics without end", lambda _: b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"),
    "paths": Attack("paths that do not exist", lambda n: b"GET /p%d HTTP/1.1\r\nHost: x\r\n\r\n" % n),
}


def paced(
    rate: float, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> Iterator[int]:
    """0, 1, 2 … evenly, `rate` a second; fewer if what the caller does with them takes longer."""
    started = clock()
    for number in itertools.count():
        ahead = started + number / rate - clock()
        if ahead > 0:
            sleep(ahead)
        elif ahead < -MAX_ARREARS:
            started -= ahead + MAX_ARREARS
        yield number


def attack(port: int, kind: Attack, rate: float) -> None:
    """Returns at SIGTERM."""
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: ended.append(number))
    held: list[socket.socket | None] = [None] * kind.held
    number = 0
    for number in paced(rate):
        if number == kind.held:
            print("started", flush=True)
        if ended:
            break
        place = number % kind.held
        client = held[place]
        if client is not None and not kind.is_deaf and not _drained(client):
            client.close()
            client = None
        try:
            if client is None:
                client = _connect(port)
            with suppress(BlockingIOError):
                client.send(kind.sent(number))
            held[place] = client
        except OSError:
            if client is not None:
                client.close()
            held[place] = None
    print(f"sent {max(number - kind.held, 0)}", flush=True)


def _connect(port: int) -> socket.socket:
    client = socket.socket()
    client.settimeout(1)
    client.connect(("127.0.0.1", port))
    client.setblocking(False)
    return client


def _drained(client: socket.socket) -> bool:
    """Reads what has come; False if the service has closed."""
    try:
        while data := client.recv(_MANY):
            del data
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


if __name__ == "__main__":
    os.nice(5)
    attack(int(sys.argv[1]), ATTACKS[sys.argv[2]], float(sys.argv[3]))
