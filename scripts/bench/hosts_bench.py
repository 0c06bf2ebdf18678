"""`scripts/bench/hosts`: what hosts that poll the revocation list cost, beside a service that nobody asks."""

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Final

from scripts.bench.figures import Target, render_number, render_table, render_targets
from scripts.bench.load import BadRun
from scripts.bench.machine import cpu_seconds, describe_machine, process_tree, render_machine
from scripts.bench.options import read_hosts_options
from scripts.bench.terminal import show_progress
from tests.parts import ports
from tests.parts.eventually import eventually
from tests.parts.keys import make_key
from tests.parts.service import STANDARD_POLICY, Service

FILES: Final = ("krl.statement", "krl.statement.sig", "krl", "krl.sig")  # in the order of the host kit
MOST: Final = 0.02  # of a core
REVOCATIONS: Final = 10
PUBLISHED_WITHIN: Final = 2.0  # seconds; a host that polls refuses after its interval and that
_LENGTH: Final = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


async def poll(port: int, number: int, etag: str) -> int:
    """One host's poll as its curl does it, on a connection of its own from an address of its own; the list's status."""
    source = f"127.{1 + number // 250 // 250}.{number // 250 % 250}.{1 + number % 250}"
    reader, writer = await asyncio.open_connection(ports.LOOPBACK, port, local_addr=(source, 0))
    status = 0
    try:
        for name in FILES:
            condition = f"If-None-Match: {etag}\r\n" if name == "krl" else ""
            writer.write(
                f"GET /api/{name} HTTP/1.1\r\nHost: signer\r\nSigner-Host: host-{number}\r\n{condition}\r\n".encode()
            )
            head = await reader.readuntil(b"\r\n\r\n")
            if (length := _LENGTH.search(head)) is not None:
                await reader.readexactly(int(length[1]))
            found = int(head[9:12])
            if found not in (200, 304):
                raise BadRun(f"{name} answers {found}")
            status = found if name == "krl" else status
    finally:
        writer.close()
    return status


async def poll_all(port: int, hosts: int, seconds: int, etag: str) -> tuple[int, int]:
    """Hosts poll evenly for so long; how many polls there were, and how many of them needed no list."""
    pause, started = 60 / hosts, time.monotonic()
    running: set[asyncio.Task[int]] = set()
    count = int(seconds / pause)
    for number in range(count):
        await asyncio.sleep(max(0.0, started + number * pause - time.monotonic()))
        running.add(asyncio.create_task(poll(port, number % hosts, etag)))
    statuses = await asyncio.gather(*running)
    return count, statuses.count(304)


def main() -> int:
    asked = read_hosts_options()
    print(render_machine(describe_machine()))
    try:
        with tempfile.TemporaryDirectory(prefix="hosts-") as place:
            ca = make_key(Path(place), "ed25519", "ca")
            policy = STANDARD_POLICY.replace('may = ["approve", ', 'may = ["approve", "revoke", ')
            with Service(Path(place) / "service", ca, policy) as service:
                eventually(lambda: service.ask("GET", "/api/krl").status == 200, "a list is published")
                etag = service.ask("GET", "/api/krl").headers["etag"]
                show_progress("nobody asks")
                idle = spent(service.pid, lambda: time.sleep(asked.seconds / 4)) * 4
                show_progress(f"{asked.hosts} hosts ask each minute")
                found: list[tuple[int, int]] = []
                busy = spent(
                    service.pid,
                    lambda: found.append(asyncio.run(poll_all(service.port, asked.hosts, asked.seconds, etag))),
                )
                ((polls, unchanged),) = found
                show_progress("revocations")
                delays = [seconds_to_publish(service, serial) for serial in range(1, REVOCATIONS + 1)]
                seen = len(service.ask("GET", "/api/hosts", identity="operator").json()["hosts"])
    except BadRun as error:
        print(f"scripts/bench/hosts: error: {error}", file=sys.stderr)
        return 1
    share = max(busy - idle, 0.0) / asked.seconds
    row = [str(asked.hosts), str(polls), str(unchanged), str(seen), render_number((busy - idle) / polls * 1e6)]
    head = ["hosts", "polls", "of them 304", "hosts seen", "CPU µs per poll", "% of a core, idle", "% of a core, polls"]
    print(render_table(head, [[*row, render_number(idle / asked.seconds * 100), render_number(share * 100)]]))
    targets = [
        Target(f"share of a core for {asked.hosts} hosts", share, "at most", MOST),
        Target("seconds from revoke until hosts can fetch it, the slowest", max(delays), "at most", PUBLISHED_WITHIN),
    ]
    print(f"from revoke until hosts can fetch it: median {median(delays):.2f} s of {len(delays)}")
    print(render_targets(targets))
    return 0


def seconds_to_publish(service: Service, serial: int) -> float:
    """Revokes a serial; how long it takes until the list with it is there."""
    before = service.ask("GET", "/api/krl").headers["etag"]
    body = {"by": "serial", "value": str(serial), "reason": "benchmark"}
    started = time.monotonic()
    answer = service.ask("POST", "/api/revocations", body, identity="operator")
    if answer.status != 201:
        raise BadRun(f"the revocation answers {answer.status}")
    eventually(lambda: service.ask("GET", "/api/krl").headers["etag"] != before, "the next list is published")
    return time.monotonic() - started


def spent(pid: int, what: Callable[[], object]) -> float:
    """CPU seconds of the service while something happens."""
    before = cpu_seconds(process_tree(pid))
    what()
    return cpu_seconds(process_tree(pid)) - before


if __name__ == "__main__":
    sys.exit(main())
