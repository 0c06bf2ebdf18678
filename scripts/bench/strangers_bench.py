"""`scripts/bench/strangers`: honest callers with a token under load, alone and beside each attack, in turns."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.bench.attack import ATTACKS
from scripts.bench.figures import Target, medians, ratio, render_number, render_table, render_targets
from scripts.bench.load import BadRun, Missing, require_wrk, run_wrk, write_bodies
from scripts.bench.machine import cpu_seconds, describe_machine, process_tree, render_machine
from scripts.bench.options import read_strangers_options
from scripts.bench.sides import check_side, new_service, side_of
from scripts.bench.terminal import show_progress
from tests.parts.keys import make_key

BODIES = 20_000
CONNECTIONS = 8
QUIET = "quiet"
Figures = dict[str, float | None]


@contextmanager
def attacked(port: int, kind: str, rate: float) -> Iterator[None]:
    """The service is attacked meanwhile."""
    command = [sys.executable, "-P", "-m", "scripts.bench.attack", str(port), kind, str(rate)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        if process.stdout.readline() != b"started\n":
            raise BadRun(f"the attack {kind} did not start")
        yield
        if process.poll() is not None:
            raise BadRun(f"the attack {kind} ended by itself with {process.returncode}")
    finally:
        process.kill()
        process.wait()


def main() -> int:
    asked = read_strangers_options()
    print(render_machine(describe_machine()))
    kinds = [QUIET, *([asked.only] if asked.only else ATTACKS)]
    samples: dict[str, list[Figures]] = {kind: [] for kind in kinds}
    try:
        require_wrk()
        with tempfile.TemporaryDirectory(prefix="strangers-") as place:
            bodies = Path(place) / "bodies"
            write_bodies(bodies, BODIES)
            ca = make_key(Path(place), "ed25519", "ca")
            with new_service(Path(place) / "service", ca) as service:
                side = side_of(service)
                check_side(side, ca)

                def measure() -> Figures:
                    before = cpu_seconds(process_tree(side.pid))
                    run = run_wrk(side.url, bodies, side.token, connections=CONNECTIONS, seconds=asked.seconds)
                    spent = cpu_seconds(process_tree(side.pid)) - before
                    return {"rate": run.rate, "p50": run.p50, "p99": run.p99, "busy": spent / run.seconds}

                for number in range(asked.rounds):
                    for kind in kinds:
                        show_progress(f"round {number + 1} of {asked.rounds}: {kind}")
                        if kind == QUIET:
                            samples[kind].append(measure())
                        else:
                            with attacked(service.port, kind, asked.rate):
                                samples[kind].append(measure())
                log = len(service.log().encode())
    except (Missing, BadRun) as error:
        print(f"scripts/bench/strangers: error: {error}", file=sys.stderr)
        return 1
    print(render_figures(samples, asked.rate))
    print(f"log: {log} bytes")
    return 0


def render_figures(samples: dict[str, list[Figures]], rate: float) -> str:
    """The table and the targets."""
    found = {kind: medians(figures) for kind, figures in samples.items()}
    quiet = found[QUIET]
    rows, targets = [], []
    for kind, figures in found.items():
        name = QUIET if kind == QUIET else ATTACKS[kind].what
        slower, slower_p99 = ratio(figures["rate"], quiet["rate"]), ratio(figures["p99"], quiet["p99"])
        numbers = (figures["rate"], figures["p50"], figures["p99"], figures["busy"], slower, slower_p99)
        rows.append([name, *map(render_number, numbers)])
        if kind != QUIET:
            targets.append(Target(f"{kind}: rate of quiet", slower, "at least", 0.7))
            targets.append(Target(f"{kind}: p99 of quiet", slower_p99, "at most", 2))
    head = [
        f"{rate:.0f} attacks a second",
        "signatures/s",
        "p50 ms",
        "p99 ms",
        "CPUs busy",
        "rate of quiet",
        "p99 of quiet",
    ]
    return "\n".join((render_table(head, rows), render_targets(targets)))


if __name__ == "__main__":
    sys.exit(main())
