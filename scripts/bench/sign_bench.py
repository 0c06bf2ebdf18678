"""`scripts/bench/sign`: both servers run at the same time, one is under load at a time, and they take turns.

Beside ours a reader asks for a page of 200 certificates once a second, and views are folded.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from scripts.bench.figures import Target, medians, ratio, render_json, render_number, render_table, render_targets
from scripts.bench.load import BadRun, Missing, require_wrk, run_wrk, write_bodies
from scripts.bench.machine import (
    cpu_seconds,
    describe_machine,
    process_name,
    process_tree,
    pss_megabytes,
    render_machine,
)
from scripts.bench.options import read_sign_options
from scripts.bench.sides import check_side, new_service, prepare_bao, reading, require_bao, side_of
from scripts.bench.terminal import show_progress
from tests.parts.keys import make_key
from tests.parts.openbao import OpenBao

BODIES = 20_000
PAGE_EVERY = 1.0  # seconds: a reader's pause between two pages of our certificates, all the time
Figures = dict[str, float | None]


def main() -> int:
    asked = read_sign_options()
    machine = describe_machine()
    print(render_machine(machine))
    try:
        require_wrk()
        require_bao()
        samples, memory = measure(asked)
    except (Missing, BadRun) as error:
        print(f"scripts/bench/sign: error: {error}", file=sys.stderr)
        return 1
    middle = {at: {name: medians(runs) for name, runs in sides.items()} for at, sides in samples.items()}
    print(render_results(middle, memory))
    targets = read_targets(middle, memory_of_three(memory.get("signer", {})))
    print(render_targets(targets))
    if asked.json is not None:
        figures = {
            "medians": {str(at): sides for at, sides in middle.items()},
            "memory": memory,
            "samples": {str(at): sides for at, sides in samples.items()},
        }
        settings = {"seconds": asked.seconds, "rounds": asked.rounds, "connections": asked.connections}
        asked.json.write_text(render_json(machine, figures, targets, **settings))
    return 0


def measure(
    asked: argparse.Namespace,
) -> tuple[dict[int, dict[str, list[Figures]]], dict[str, dict[str, float | None]]]:
    """Samples by connections and side; memory by side and process, at the end of all load."""
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="signer-bench-", dir=asked.dir)))
        ca = make_key(folder, "ed25519", "bench-ca")
        bodies = folder / "bodies"
        write_bodies(bodies, BODIES)
        sides = []
        if asked.only != "signer":
            sides.append(prepare_bao(running.enter_context(OpenBao(folder / "bao", raft=True)), ca))
        pages: list[int] = []
        if asked.only != "OpenBao":
            service = running.enter_context(new_service(folder / "signer", ca))
            sides.append(side_of(service))
            pages = running.enter_context(reading(service, 1, PAGE_EVERY))
        for side in sides:
            check_side(side, ca)
            run_wrk(side.url, bodies, side.token, connections=8, seconds=1)  # warm
        samples: dict[int, dict[str, list[Figures]]] = {}
        for connections in asked.connections:
            samples[connections] = {side.name: [] for side in sides}
            for number in range(asked.rounds):
                for side in sides if number % 2 == 0 else reversed(sides):
                    show_progress(f"{connections} connections, round {number + 1} of {asked.rounds}: {side.name}")
                    tree = process_tree(side.pid)
                    cpu, clock = cpu_seconds(tree), time.monotonic()
                    run = run_wrk(side.url, bodies, side.token, connections=connections, seconds=asked.seconds)
                    used, passed = cpu_seconds(tree) - cpu, time.monotonic() - clock
                    samples[connections][side.name].append(
                        {
                            "rate": run.rate,
                            "p50_ms": run.p50,
                            "p99_ms": run.p99,
                            "cpu_us": used / run.answers * 1e6,
                            "cpus": used / passed,
                            "pss_mb": pss_megabytes(tree),
                        }
                    )
        show_progress("")
        for side in sides:
            check_side(side, ca)
        if not all(pages):
            raise BadRun("the reader beside the load got no page of certificates")
        return samples, {side.name: memory_of(side.pid) for side in sides}


def memory_of(root: int) -> dict[str, float | None]:
    """PSS of every process by its number and command (`0 serve`, `3 keeper`), and of all together."""
    tree = process_tree(root)
    each: dict[str, float | None] = {}
    for number, pid in enumerate(tree):
        name = process_name(pid)
        command = re.search(r" -m signer[ .](\S+)", name)
        each[f"{number} {command[1] if command else name[:60]}"] = pss_megabytes([pid])
    return {"together": pss_megabytes(tree), **each}


def memory_of_three(parts: dict[str, float | None]) -> float | None:
    """PSS of launcher, keeper and the largest api process, which is a worker; None if one is missing."""
    largest: dict[str, float] = {}
    for name, value in parts.items():
        command = name.partition(" ")[2]
        largest[command] = max(largest.get(command, 0.0), value or 0.0)
    three = [largest.get(command, 0.0) for command in ("serve", "keeper", "api")]
    return sum(three) if all(three) else None


def render_results(middle: dict[int, dict[str, Figures]], memory: dict[str, dict[str, float | None]]) -> str:
    head = ("connections, server", "signatures/s", "p50 ms", "p99 ms", "CPU µs each", "CPUs busy", "PSS MB")
    names = ("rate", "p50_ms", "p99_ms", "cpu_us", "cpus", "pss_mb")
    rows: list[list[str | float | None]] = []
    for at, sides in middle.items():
        rows += [[f"{at:>3} {name}", *(figures[key] for key in names)] for name, figures in sides.items()]
        if len(sides) == 2:
            bao, ours = sides["OpenBao"], sides["signer"]
            rows.append([f"{at:>3} signer / OpenBao", *(ratio(ours[key], bao[key]) for key in names)])
    lines = [render_table(head, rows)]
    for side, parts in memory.items():
        listed = "; ".join(f"{name}: {render_number(value)}" for name, value in parts.items())
        lines.append(f"{side} PSS MB: {listed}")
    if any(parts["together"] is None for parts in memory.values()):
        lines.append("memory of the keeper can be read as root only: it forbids dumps")
    return "\n".join(lines)


def read_targets(middle: dict[int, dict[str, Figures]], three: float | None) -> list[Target]:
    """What is wanted, of what was measured: by connections, the rate at least and p99 at most in OpenBao's."""
    targets = []
    for at, rate_bound, p99_bound in ((1, 0.7, None), (8, 1.1, 0.35), (32, 1.5, 0.35)):
        sides = middle.get(at, {})
        bao, ours = sides.get("OpenBao"), sides.get("signer")
        if bao is not None and ours is not None:
            rate, p99 = ratio(ours["rate"], bao["rate"]), ratio(ours["p99_ms"], bao["p99_ms"])
            targets.append(Target(f"signatures/s at {at}", rate, "at least", rate_bound, " x OpenBao's"))
            if p99_bound is not None:
                targets.append(Target(f"p99 at {at}", p99, "at most", p99_bound, " x OpenBao's"))
    targets.append(Target("keeper, launcher and one api worker", three, "at most", 120, " MB PSS"))
    return targets


if __name__ == "__main__":
    sys.exit(main())
