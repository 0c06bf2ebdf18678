"""`scripts/bench/strangers`: honest callers with a token under load, alone and beside each attack, by turns.

Each attack has its own quiet turn right before it, so that what else the machine does in those seconds counts for both.

wrk counts a stall as all the requests that would have begun in it, so p99 shows stalls that take 1 % of the time: in
5 s one commit that the disk holds up for 50 ms is enough. That is why the ratios are medians of several rounds, and why
the CPU that an attack costs stands beside them: it depends on nobody else.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.bench.attack import ATTACKS
from scripts.bench.figures import Target, medians, ratio, render_number, render_table, render_targets
from scripts.bench.load import BadRun, Missing, require_wrk, run_wrk, write_bodies
from scripts.bench.machine import cpu_seconds, describe_machine, process_tree, render_machine
from scripts.bench.options import read_strangers_options
from scripts.bench.sides import check_side, new_service, side_of
from scripts.bench.terminal import show_progress
from tests.parts.keys import Key, make_key
from tests.parts.service import Service

BODIES = 20_000
CONNECTIONS = 8
QUIET = "quiet"
Figures = dict[str, float | None]


@dataclass(slots=True)
class _Sent:
    """How many requests of strangers were sent; known once the attack has ended."""

    count: int = 0


@contextmanager
def attacked(port: int, kind: str, rate: float) -> Iterator[_Sent]:
    """The service is attacked meanwhile."""
    command = [sys.executable, "-P", "-m", "scripts.bench.attack", str(port), kind, str(rate)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    sent = _Sent()
    try:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        if process.stdout.readline() != "started\n":
            raise BadRun(f"the attack {kind} did not start")
        yield sent
        if process.poll() is not None:
            raise BadRun(f"the attack {kind} ended by itself with {process.returncode}")
        process.terminate()
        last = process.communicate(timeout=10)[0].split()
        if last[:1] != ["sent"]:
            raise BadRun(f"the attack {kind} does not say what it sent")
        sent.count = int(last[1])
    finally:
        process.kill()
        process.wait()


class Bench:
    """One service under load."""

    def __init__(self, service: Service, bodies: Path, ca: Key, seconds: int) -> None:
        self.service, self._bodies, self._seconds = service, bodies, seconds
        self._side = side_of(service)
        check_side(self._side, ca)

    def _cpu(self) -> tuple[float, float]:
        """Seconds of CPU that the keeper has used, and the whole service."""
        keeper = self.service.keeper_pid()
        if keeper is None:
            raise BadRun("the keeper is gone")
        return cpu_seconds([keeper]), cpu_seconds(process_tree(self._side.pid))

    def measure(self) -> Figures:
        """One run of honest callers."""
        keeper, whole = self._cpu()
        run = run_wrk(self._side.url, self._bodies, self._side.token, connections=CONNECTIONS, seconds=self._seconds)
        keeper, whole = (after - before for after, before in zip(self._cpu(), (keeper, whole), strict=True))
        return {
            "rate": run.rate,
            "p50": run.p50,
            "p99": run.p99,
            "busy": whole / run.seconds,
            "answers": run.answers,
            "keeper": keeper,
            "whole": whole,
        }

    def measure_pair(self, kind: str, rate: float) -> tuple[Figures, Figures]:
        """A quiet run, and one beside the attack with what both say of it."""
        quiet = self.measure()
        with attacked(self.service.port, kind, rate) as sent:
            loud = self.measure()
        return quiet, loud | compare(quiet, loud, sent.count)


def compare(quiet: Figures, loud: Figures, sent: int) -> Figures:
    """What the attack changes: rate and p99 as ratios, and µs of CPU of the keeper and of the service a request sent.

    That CPU is what the attacked run used beyond what its certificates cost in the quiet run.
    """
    found = {"slower": ratio(loud["rate"], quiet["rate"]), "tail": ratio(loud["p99"], quiet["p99"])}
    for name in ("keeper", "whole"):
        share = ratio(loud["answers"], quiet["answers"])
        extra = None if share is None else (loud[name] or 0) - (quiet[name] or 0) * share
        found[f"{name}_us"] = None if extra is None or not sent else extra / sent * 1e6
    return found


def main() -> int:
    asked = read_strangers_options()
    print(render_machine(describe_machine()))
    kinds = [asked.only] if asked.only else list(ATTACKS)
    samples: dict[str, list[Figures]] = {kind: [] for kind in (QUIET, *kinds)}
    try:
        require_wrk()
        with tempfile.TemporaryDirectory(prefix="strangers-") as place:
            bodies = Path(place) / "bodies"
            write_bodies(bodies, BODIES)
            ca = make_key(Path(place), "ed25519", "ca")
            with new_service(Path(place) / "service", ca) as service:
                bench = Bench(service, bodies, ca, asked.seconds)
                bench.measure()  # warm
                for number in range(asked.rounds):
                    for kind in kinds:
                        show_progress(f"round {number + 1} of {asked.rounds}: {kind}")
                        quiet, loud = bench.measure_pair(kind, asked.rate)
                        samples[QUIET].append(quiet)
                        samples[kind].append(loud)
                log = len(service.log().encode())
    except (Missing, BadRun) as error:
        print(f"scripts/bench/strangers: error: {error}", file=sys.stderr)
        return 1
    print(render_figures(samples, asked.rate))
    print(f"log: {log} bytes")
    return 0


def render_figures(samples: dict[str, list[Figures]], rate: float) -> str:
    """The table and the targets: medians of all rounds, also of the ratios of each attack to its quiet turn."""
    rows, targets = [], []
    for kind, figures in ((kind, medians(found)) for kind, found in samples.items()):
        name = QUIET if kind == QUIET else ATTACKS[kind].what
        names = ("rate", "p50", "p99", "busy", "slower", "tail", "keeper_us", "whole_us")
        rows.append([name, *(render_number(figures.get(one)) for one in names)])
        if kind != QUIET:
            targets.append(Target(f"{kind}: rate of quiet", figures["slower"], "at least", 0.7))
            targets.append(Target(f"{kind}: p99 of quiet", figures["tail"], "at most", 2))
    head = [
        f"{rate:.0f} attacks a second",
        "signatures/s",
        "p50 ms",
        "p99 ms",
        "CPUs busy",
        "rate of quiet",
        "p99 of quiet",
        "keeper µs an attack",
        "service µs an attack",
    ]
    return "\n".join((render_table(head, rows), render_targets(targets)))


if __name__ == "__main__":
    sys.exit(main())
