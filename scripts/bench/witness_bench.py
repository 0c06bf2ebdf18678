"""`scripts/bench/witness`: what the ledger's Merkle tree, its proofs and a witness cost, in CPU of this process."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from contextlib import closing, nullcontext
from pathlib import Path
from statistics import median, quantiles
from unittest import mock

from scripts.bench.figures import Target, medians, render_json, render_table, render_targets
from scripts.bench.filling import fill_ledger
from scripts.bench.load import BadRun
from scripts.bench.machine import describe_machine, render_machine
from scripts.bench.options import read_witness_options
from scripts.bench.terminal import show_progress
from signer.ledger.audit import rebuild
from signer.ledger.fold import SLICE_EVENTS, Fold, add_leaves
from signer.ledger.pages import CertificateReader
from signer.ledger.schema import VIEW_TABLES
from signer.ledger.store import Ledger
from signer.ledger.tree import CompactRange
from signer.model import Event
from tests.parts.events import issued
from tests.parts.small_log import SmallLog
from tests.parts.witness_process import NAME, WitnessProcess

FOLDED = 100_000  # events of a round of `measure_fold`
COMMITS, TOGETHER = 1_000, 4  # of a round of `measure_recording`; certificates in one commit, as at 8 connections
PROOFS = 1_000
Figures = dict[str, float | None]


def main() -> int:
    asked = read_witness_options()
    machine = describe_machine()
    print(render_machine(machine))
    try:
        with tempfile.TemporaryDirectory(prefix="signer-bench-", dir=asked.dir) as name:
            folder = Path(name)
            figures = medians([measure_fold() for _ in range(asked.rounds)])
            figures |= measure_recording(folder, asked.rounds)
            figures |= measure_memory(folder)
            figures |= measure_proofs(folder / "ledger", asked.events)
    except BadRun as error:
        print(f"scripts/bench/witness: error: {error}", file=sys.stderr)
        return 1
    show_progress("")
    print(render_table(("what", "figure"), [[name, value] for name, value in figures.items()]))
    targets = [
        Target("the tree of an event", figures["fold_us"], "at most", 1.5, " µs of CPU"),
        Target(f"a proof of {asked.events:,} events", figures["proof_cpu_p99_ms"], "at most", 5, " ms of CPU, p99"),
        Target("recording with the tree", figures["recording_ratio"], "at least", 0.97, " x the rate without"),
        Target("the witness", figures["witness_rss_mb"], "at most", 30, " MB"),
    ]
    print(render_targets(targets))
    if asked.json is not None:
        asked.json.write_text(render_json(machine, figures, targets, events=asked.events, rounds=asked.rounds))
    return 0


def measure_fold() -> Figures:
    """CPU of the tree alone, µs an event, in slices as the keeper folds, subtrees written."""
    events = [(number, os.urandom(32).hex()) for number in range(1, FOLDED + 1)]
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        for statement in VIEW_TABLES:
            db.execute(statement)
        tree = CompactRange()
        clock = time.process_time()
        for first in range(0, FOLDED, SLICE_EVENTS):
            add_leaves(db, tree, events[first : first + SLICE_EVENTS])
        return {"fold_us": (time.process_time() - clock) / FOLDED * 1e6}


def measure_recording(folder: Path, rounds: int) -> Figures:
    """Certificates recorded and folded a second of CPU, by one keeper's ledger with the tree and by one without.

    By turns; the ratio is the median of neighbouring turns.
    """
    samples: list[Figures] = []
    sides = ("with", "without")
    serial = 0
    ledgers = {name: Ledger(_made(folder / name)) for name in sides}
    folds = {name: Fold(ledger.data_dir, ledger) for name, ledger in ledgers.items()}
    for number in range(rounds * 2):
        sample: Figures = {}
        for name in sides if number % 2 == 0 else reversed(sides):
            show_progress(f"recording {name} the tree, turn {number + 1} of {rounds * 2}")
            serial += COMMITS * TOGETHER
            with mock.patch("signer.ledger.fold.add_leaves") if name == "without" else nullcontext():
                sample[name] = _record(ledgers[name], folds[name], serial)
        sample["recording_ratio"] = (sample["with"] or 0) / (sample["without"] or 1)
        samples.append(sample)
    for name, ledger in ledgers.items():
        folds[name].close()
        ledger.close()
    found = medians(samples)
    names = {"with": "recorded_with_per_s", "without": "recorded_without_per_s", "recording_ratio": "recording_ratio"}
    return {names[name]: value for name, value in found.items()}


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    return folder


def _record(ledger: Ledger, fold: Fold, first: int) -> float:
    """Certificates a second of CPU."""
    events: list[list[Event]] = [
        [issued(first + commit * TOGETHER + one) for one in range(TOGETHER)] for commit in range(COMMITS)
    ]
    now = int(time.time() * 1000)
    clock = time.process_time()
    for part in events:
        ledger.commit(part, now)
    while fold.fold_slice() < ledger.newest():
        pass
    return COMMITS * TOGETHER / (time.process_time() - clock)


def measure_memory(folder: Path) -> Figures:
    """Memory of a witness that has cosigned, with a key that an earlier start made, in 10^6 bytes."""
    show_progress("a witness")
    log = SmallLog()
    witness = WitnessProcess(folder / "witness", str(log.vkey))
    witness.run("key", "--name", NAME)
    try:
        witness.start()
        status, body = witness.ask("POST", "/add-checkpoint", log.request(0, 64))
        if status != 200:
            raise BadRun(f"the witness answered {status} {body[:200]!r}")
        lines = Path(f"/proc/{witness.pid}/smaps_rollup").read_text().splitlines()
    finally:
        witness.end(signal.SIGKILL)
    kept = {
        line.split(":")[0]: int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(("Rss:", "Pss:"))
    }
    return {"witness_rss_mb": kept["Rss"], "witness_pss_mb": kept["Pss"]}


def measure_proofs(data_dir: Path, events: int) -> Figures:
    """Milliseconds of a consistency proof between random sizes, as the keeper's reader makes them."""
    _made(data_dir)
    fill_ledger(data_dir, events, 1, int(time.time()), lambda done, of: show_progress(f"filling: {done:,} of {of:,}"))
    with closing(Ledger(data_dir)) as ledger:
        show_progress("folding")
        rebuild(ledger)
    source = random.Random(1)  # noqa: S311 - the same sizes in every run
    wall, cpu = [], []
    with closing(CertificateReader(data_dir)) as reader:
        newest = reader.head().seq
        for number in range(PROOFS):
            show_progress(f"proof {number + 1} of {PROOFS}")
            old = source.randrange(1, newest)
            new = source.randrange(old + 1, newest + 1)
            clocks = time.perf_counter(), time.process_time()
            reader.consistency(old, new)
            wall.append((time.perf_counter() - clocks[0]) * 1000)
            cpu.append((time.process_time() - clocks[1]) * 1000)
    return {
        "proof_cpu_p50_ms": median(cpu), "proof_cpu_p99_ms": quantiles(cpu, n=100)[98],
        "proof_p50_ms": median(wall), "proof_p99_ms": quantiles(wall, n=100)[98],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
