"""`scripts/bench/ledger`: a full ledger against an empty one, through the same keeper and API, by turns."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from scripts.bench.figures import Target, medians, ratio, render_json, render_number, render_table, render_targets
from scripts.bench.filling import IDENTITIES, RARE, ROLES, fill_ledger
from scripts.bench.load import BadRun, Missing, require_wrk, run_wrk, write_bodies
from scripts.bench.machine import describe_machine, pss_megabytes, render_machine
from scripts.bench.options import read_ledger_options
from scripts.bench.sides import check_side, new_service, reading, side_of
from scripts.bench.terminal import show_progress
from signer.ledger.audit import rebuild
from signer.ledger.store import Ledger
from tests.parts import ports
from tests.parts.keys import Key, make_key
from tests.parts.service import Service

BODIES = 20_000
READERS = 4
STATUS_ROUNDS = 9  # at least; each takes a quarter of a second
PAUSE = 3.0  # seconds
Figures = dict[str, float | None]


def main() -> int:
    asked = read_ledger_options()
    machine = describe_machine()
    print(render_machine(machine))
    try:
        require_wrk()
        figures, pages = measure(asked)
    except (Missing, BadRun) as error:
        print(f"scripts/bench/ledger: error: {error}", file=sys.stderr)
        return 1
    print(render_results(asked, figures, pages))
    worst = max(page["p50_ms"] or 0 for page in pages.values())
    targets = [
        Target("verify", figures["verify_rate"], "at least", 200_000, " events/s"),
        Target("keeper's start", figures["start_full_s"], "at most", 0.3, " s"),
        Target("signer status", figures["status_full_ms"], "at most", 300, " ms"),
        Target("signer status, CPU", figures["status_cpu_full_ms"], "at most", 150, " ms"),
        Target("signatures/s", figures["rate_ratio"], "at least", 0.97, " x an empty ledger's"),
        Target(f"beside {READERS} readers", figures["readers_ratio"], "at least", 0.8, " x the signatures/s"),
        Target("slowest page", worst, "at most", 10, " ms"),
    ]
    print(render_targets(targets))
    if asked.json is not None:
        settings = {name: value for name, value in vars(asked).items() if isinstance(value, int)}
        asked.json.write_text(render_json(machine, {**figures, "pages": pages}, targets, **settings))
    return 0


def measure(asked: argparse.Namespace) -> tuple[Figures, dict[str, Figures]]:
    """The figures, and those of each kind of page."""
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="signer-bench-", dir=asked.dir)))
        ca = make_key(folder, "ed25519", "bench-ca")
        full, empty = new_service(folder / "full", ca), new_service(folder / "empty", ca)
        for service in (full, empty):
            service.data_dir.mkdir(mode=0o700)
            service.run_dir.mkdir(mode=0o700)
        clock = time.monotonic()
        fingerprint, events = fill_ledger(
            full.data_dir,
            asked.certificates,
            asked.active,
            int(time.time()),
            lambda done, of: show_progress(f"filling: {done:,} of {of:,}"),
        )
        figures: Figures = {"events": events, "fill_s": time.monotonic() - clock}
        clock = time.monotonic()
        ledger = Ledger(full.data_dir)
        rebuild(ledger)
        ledger.close()
        figures["rebuild_s"] = time.monotonic() - clock
        figures["bytes_each"] = sum(path.stat().st_size for path in full.data_dir.iterdir()) / events
        figures["verify_rate"] = measure_verify(full, asked.rounds)
        figures |= measure_starts(full, empty, asked.rounds)
        for service in (full, empty):
            running.enter_context(service)
        figures |= measure_status(full, empty, asked.rounds)
        figures |= measure_signing(full, empty, ca, folder / "bodies", asked)
        figures |= measure_readers(full, folder / "bodies", asked)
        show_progress("pages")
        time.sleep(PAUSE)
        pages = measure_pages(full, fingerprint, asked.certificates)
        pid = full.keeper_pid()
        figures["keeper_pss_mb"] = None if pid is None else pss_megabytes([pid])
        show_progress("")
        return figures, pages


def measure_verify(service: Service, rounds: int) -> float:
    """Events per second of the whole of `signer ledger verify`, Python's own start included."""
    rates = []
    for number in range(rounds):
        show_progress(f"verifying, round {number + 1} of {rounds}")
        clock = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-P", "-m", "signer", "ledger", "verify", "--json"],
            env=service.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - clock
        if done.returncode != 0:
            raise BadRun(f"signer ledger verify: {done.stderr}")
        rates.append(int(json.loads(done.stdout)["events"]) / seconds)
    return median(rates)


def measure_starts(full: Service, empty: Service, rounds: int) -> Figures:
    """Seconds from the keeper's start to the first connection that it takes, Python's own start included."""
    seconds: dict[str, list[float]] = {"start_full_s": [], "start_empty_s": []}
    for number in range(rounds):
        show_progress(f"starting, round {number + 1} of {rounds}")
        for name, service in (("start_full_s", full), ("start_empty_s", empty)):
            seconds[name].append(time_start(service))
    return {name: median(found) for name, found in seconds.items()}


def time_start(service: Service) -> float:
    """One start of a keeper alone; it is stopped again."""
    service.socket.unlink(missing_ok=True)
    clock = time.monotonic()
    with service.log_file.open("ab") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-P", "-m", "signer", "keeper"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=service.environment(),
        )
    try:
        ports.wait_until(service.socket.exists, keeper, service.log)
        return time.monotonic() - clock
    finally:
        ports.stop(keeper)


def measure_status(full: Service, empty: Service, rounds: int) -> Figures:
    """Milliseconds of `signer status`, from the shell's view: the time that passes, and of CPU."""
    samples: list[Figures] = []
    for number in range(max(rounds, STATUS_ROUNDS)):
        show_progress(f"signer status, round {number + 1}")
        sample: Figures = {}
        sides = (("full", full), ("empty", empty))
        for name, service in sides if number % 2 == 0 else reversed(sides):
            before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            done = service.command("status")
            sample[f"status_{name}_ms"] = (time.monotonic() - clock) * 1000
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            sample[f"status_cpu_{name}_ms"] = seconds * 1000
            if done.returncode != 0:
                raise BadRun(f"signer status: {done.stdout}{done.stderr}")
        samples.append(sample)
    return medians(samples)


def measure_signing(full: Service, empty: Service, ca: Key, bodies: Path, asked: argparse.Namespace) -> Figures:
    """Signatures per second of both, and the median of the ratios of neighbouring runs."""
    write_bodies(bodies, BODIES)
    sides = (side_of(full, "full"), side_of(empty, "empty"))
    for side in sides:
        check_side(side, ca)
        run_wrk(side.url, bodies, side.token, connections=asked.connections, seconds=1)
    samples: list[Figures] = []
    for number in range(asked.rounds):
        sample: Figures = {}
        for side in sides if number % 2 == 0 else reversed(sides):
            show_progress(f"signing, round {number + 1} of {asked.rounds}: {side.name} ledger")
            run = run_wrk(side.url, bodies, side.token, connections=asked.connections, seconds=asked.seconds)
            sample[f"rate_{side.name}"], sample[f"p99_{side.name}_ms"] = run.rate, run.p99
        sample["rate_ratio"] = ratio(sample["rate_full"], sample["rate_empty"])
        samples.append(sample)
    return medians(samples)


def measure_readers(service: Service, bodies: Path, asked: argparse.Namespace) -> Figures:
    """Signatures per second while `READERS` clients of one identity ask for pages without pause, and without them."""
    side = side_of(service)
    samples: list[Figures] = []
    for number in range(asked.rounds):
        sample: Figures = {}
        turns = (("alone", 0), ("read", READERS))
        for name, readers in turns if number % 2 == 0 else reversed(turns):
            show_progress(f"signing beside {readers} readers, round {number + 1} of {asked.rounds}")
            with reading(service, readers) as pages:
                time.sleep(PAUSE if readers else 0)  # what an identity may use at once is gone then
                before = sum(pages)
                run = run_wrk(side.url, bodies, side.token, connections=asked.connections, seconds=asked.seconds)
                sample[f"rate_{name}"] = run.rate
                sample[f"pages_{name}"] = (sum(pages) - before) / run.seconds
        sample["readers_ratio"] = ratio(sample["rate_read"], sample["rate_alone"])
        samples.append(sample)
    return medians(samples)


def page_queries(fingerprint: str, certificates: int) -> dict[str, str]:
    """What is asked of GET /api/certificates: each filter where it is easy and where it is hard."""
    deep = certificates // 1000
    return {
        "unfiltered": "limit=200",
        "unfiltered, deep": f"limit=200&before={deep}",
        "identity": f"limit=200&identity={IDENTITIES[7]}",
        "identity, deep": f"limit=200&identity={IDENTITIES[7]}&before={deep}",
        "identity, rare": f"identity={RARE}",
        "role": f"limit=200&role={ROLES[2]}",
        "role, rare": f"role={RARE}",
        "principal": f"limit=200&principal={ROLES[2]}",
        "principal, rare": f"principal={RARE}",
        "fingerprint": f"fingerprint={fingerprint.replace('+', '%2B').replace('/', '%2F')}",
        "active": "limit=200&active=true",
        "active, of one identity": f"limit=200&active=true&identity={IDENTITIES[7]}",
        "active, of none": f"active=true&identity={RARE}",
        "active, deep": f"limit=200&active=true&before={deep}",
        "role and principal that never meet": f"role={ROLES[1]}&principal={ROLES[2]}",
        "identity and role that never meet": f"identity={RARE}&role={ROLES[2]}",
    }


def measure_pages(service: Service, fingerprint: str, certificates: int, repeats: int = 9) -> dict[str, Figures]:
    """Milliseconds of each kind of page: the median, and the first one."""
    found: dict[str, Figures] = {}
    for name, query in page_queries(fingerprint, certificates).items():
        times, rows = [], 0
        for _ in range(repeats):
            clock = time.monotonic()
            answer = service.ask("GET", f"/api/certificates?{query}", identity="operator", timeout=60)
            times.append((time.monotonic() - clock) * 1000)
            if answer.status != 200:
                raise BadRun(f"GET /api/certificates?{query}: {answer.status} {answer.body[:200]!r}")
            rows = len(answer.json()["certificates"])
        found[name] = {"p50_ms": median(times), "first_ms": times[0], "rows": float(rows)}
    return found


def render_results(asked: argparse.Namespace, figures: Figures, pages: dict[str, Figures]) -> str:
    rows: list[list[str | float | None]] = [
        ["verify, events/s", figures["verify_rate"], None],
        ["keeper's start, s", figures["start_full_s"], figures["start_empty_s"]],
        ["signer status, ms", figures["status_full_ms"], figures["status_empty_ms"]],
        ["signer status, CPU ms", figures["status_cpu_full_ms"], figures["status_cpu_empty_ms"]],
        [f"signatures/s at {asked.connections}", figures["rate_full"], figures["rate_empty"]],
        ["p99 ms", figures["p99_full_ms"], figures["p99_empty_ms"]],
        [f"signatures/s beside {READERS} readers", figures["rate_read"], None],
        ["pages/s of the readers", figures["pages_read"], None],
        ["views folded anew, s", figures["rebuild_s"], None],
        ["files, bytes an event", figures["bytes_each"], None],
        ["keeper's memory, PSS MB", figures["keeper_pss_mb"], None],
    ]
    listed = [[name, page["p50_ms"], page["first_ms"], page["rows"]] for name, page in pages.items()]
    return "\n".join(
        (
            render_table(("ledger", f"{asked.certificates:,} certificates", "empty"), rows),
            f"full against empty: {render_number(figures['rate_ratio'])} x the signatures/s",
            f"filled in {render_number(figures['fill_s'])} s\n",
            render_table(("page of certificates", "median ms", "first ms", "rows"), listed),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
