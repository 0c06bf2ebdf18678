"""`scripts/bench/soak`: a steady load for a long time, and what grows meanwhile."""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from scripts.bench.figures import render_json, render_table
from scripts.bench.load import BadRun, new_public_line
from scripts.bench.machine import describe_machine, process_tree, pss_megabytes, render_machine
from scripts.bench.options import read_soak_options
from scripts.bench.sides import PATH, check_side, new_service, side_of
from scripts.bench.terminal import show_progress
from tests.parts.keys import make_key
from tests.parts.service import Service

CLIENTS = 8  # connections that are kept open
PAGE = "/api/certificates?limit=50"  # asked for once a second, by an identity that may read the ledger
FILES = ("ledger.sqlite3-wal", "views.sqlite3-wal")


@dataclass
class Load:
    """Requests that are due at fixed times, whether or not the service keeps up; latencies count from these times."""

    side_url: str
    token: str
    rate: float
    seconds: list[float] = field(default_factory=list)  # latencies of the current window
    faults: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> Callable[[], None]:
        """Starts the clients; returns what stops them and waits for them."""
        numbers, began = itertools.count(), time.monotonic()
        threads = [threading.Thread(target=self._run, args=(numbers, began)) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()

        def stop() -> None:
            self._ended.set()
            for thread in threads:
                thread.join()

        return stop

    def take_window(self) -> list[float]:
        """The latencies since the last call, in seconds; raises `BadRun` if a request failed."""
        with self._lock:
            seconds, self.seconds = self.seconds, []
            if self.faults:
                raise BadRun(f"{len(self.faults)} requests failed, first: {self.faults[0]}")
            return seconds

    def _run(self, numbers: itertools.count[int], began: float) -> None:
        address = urlsplit(self.side_url)
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)
        head = {"X-Vault-Token": self.token, "Content-Type": "application/json"}
        while not self._ended.is_set():
            due = began + next(numbers) / self.rate
            if self._ended.wait(max(0.0, due - time.monotonic())):
                break
            body = json.dumps({"public_key": new_public_line(), "valid_principals": "llmops"})
            try:
                connection.request("POST", address.path, body, head)
                reply = connection.getresponse()
                text = reply.read()
                fault = None if reply.status == 200 else f"{reply.status} {text[:200]!r}"
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                fault = repr(error)
            with self._lock:
                self.seconds.append(time.monotonic() - due)
                self.faults += [fault] if fault else []
        connection.close()


Sample = dict[str, float]


def take_sample(service: Service, latencies: list[float], seconds: float) -> Sample:
    """What one window showed; sizes in MB (10^6 bytes), latencies in milliseconds."""
    tree = process_tree(service.pid)
    memory = pss_megabytes(tree)
    if memory is None:
        raise BadRun("memory of the keeper can be read as root only: it forbids dumps")
    cuts = statistics.quantiles(latencies, n=100)
    return {
        "signatures/s": len(latencies) / seconds,
        "p50 ms": cuts[49] * 1e3,
        "p99 ms": cuts[98] * 1e3,
        "PSS MB": memory,
        "descriptors": float(sum(1 for pid in tree for _ in Path(f"/proc/{pid}/fd").iterdir())),
        **{f"{name} MB": (service.data_dir / name).stat().st_size / 1e6 for name in FILES},
    }


def measure(asked: argparse.Namespace) -> tuple[list[Sample], float]:
    """One sample for each window; then the seconds from SIGTERM to the end of the idle service."""
    with tempfile.TemporaryDirectory(prefix="signer-bench-", dir=asked.dir) as name:
        folder = Path(name)
        ca = make_key(folder, "ed25519", "bench-ca")
        with new_service(folder / "signer", ca) as service:
            side = side_of(service)
            check_side(side, ca)
            load = Load(service.address + PATH, side.token, asked.rate)
            stop = load.start()
            try:
                samples = [_watch(service, load, asked, number) for number in range(asked.samples)]
            finally:
                stop()
            show_progress("")
            check_side(side, ca)
            began = time.monotonic()
            service.stop()
            return samples, time.monotonic() - began


def _watch(service: Service, load: Load, asked: argparse.Namespace, number: int) -> Sample:
    show_progress(f"window {number + 1} of {asked.samples}")
    began, window = time.monotonic(), asked.minutes * 60 / asked.samples
    while (left := began + window - time.monotonic()) > 0:
        time.sleep(min(1.0, left))
        answer = service.ask("GET", PAGE, identity="operator")
        if answer.status != 200:
            raise BadRun(f"a reader's page: {answer.status} {answer.body[:200]!r}")
    return take_sample(service, load.take_window(), time.monotonic() - began)


def slope_per_hour(values: Sequence[float], window_minutes: float) -> float:
    """The slope of a straight line through the values (least squares), an hour."""
    return statistics.linear_regression(range(len(values)), values).slope * 60 / window_minutes


def summarize(samples: Sequence[Sample], window_minutes: float) -> dict[str, dict[str, float]]:
    """For each figure: the second window (the first warms up), the last one, and the slope an hour between them."""
    steady = samples[1:]
    return {
        name: {
            "start": steady[0][name],
            "end": steady[-1][name],
            "slope": slope_per_hour([sample[name] for sample in steady], window_minutes),
        }
        for name in steady[0]
    }


def main() -> int:
    asked = read_soak_options()
    machine = describe_machine()
    print(render_machine(machine))
    try:
        samples, stopped = measure(asked)
    except BadRun as error:
        print(f"scripts/bench/soak: error: {error}", file=sys.stderr)
        return 1
    summary = summarize(samples, asked.minutes / asked.samples)
    rows: list[list[str | float | None]] = [
        [name, found["start"], found["end"], found["slope"]] for name, found in summary.items()
    ]
    print(render_table(("over the whole service", "start", "end", "slope/h"), rows))
    print(
        f"{asked.minutes:g} minutes at {asked.rate:g} a second on {CLIENTS} connections, a reader's page each second;"
        " latency counts from the time at which a request was due"
    )
    print(f"after the load, idle: ended {stopped:.2f} s after SIGTERM")
    if asked.json is not None:
        settings = {"minutes": asked.minutes, "rate": asked.rate, "samples": asked.samples}
        figures = {"summary": summary, "samples": samples, "stopped_s": stopped}
        asked.json.write_text(render_json(machine, figures, [], **settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
