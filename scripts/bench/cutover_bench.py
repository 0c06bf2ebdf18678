"""`scripts/bench/cutover`: seconds of a cutover and a rollback, and the pause that clients see."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from scripts.bench.figures import Target, render_json, render_table, render_targets
from scripts.bench.load import BadRun, Missing
from scripts.bench.machine import describe_machine, render_machine
from scripts.bench.options import read_cutover_options
from scripts.bench.terminal import show_progress
from tests.parts import missing
from tests.parts.clients import Clients, longest_gap
from tests.parts.container import Ended, Engine
from tests.parts.platform import Platform, make_memory, remove_memory

CUTOVER, ROLLBACK = "cutover", "rollback"


def main() -> int:
    asked = read_cutover_options()
    machine = describe_machine()
    print(render_machine(machine))
    try:
        with ExitStack() as running:
            platform = start_platform(running)
            alone = [one for number in range(asked.rounds) for one in there_and_back(platform, number)]
            gaps, clients = watched(platform, asked)
    except (Missing, BadRun) as error:
        print(f"scripts/bench/cutover: error: {error}", file=sys.stderr)
        return 1
    times = {name: [seconds for kind, seconds in alone if kind == name] for name in (CUTOVER, ROLLBACK)}
    rows = [
        (name, min(times[name]), median(times[name]), max(times[name]), median(gaps[name]), max(gaps[name]))
        for name in (CUTOVER, ROLLBACK)
    ]
    head = ("seconds", "shortest", "median", "longest", f"pause for {asked.clients} clients, median", "longest pause")
    print(render_table(head, rows))
    usual = longest_gap(clients.seen, *clients.quiet)
    print(
        f"{len(clients.seen)} logins meanwhile, {len(clients.retried)} of them at the second try, {len(clients.lost)}"
        f" lost; longest time without a login while nothing was changed {usual:.2f} s"
    )
    targets = [
        Target("cutover", median(times[CUTOVER]), "at most", 30, " s"),
        Target("rollback", median(times[ROLLBACK]), "at most", 15, " s"),
        Target("longest gap for clients", max(gaps[CUTOVER] + gaps[ROLLBACK]), "at most", 3, " s"),
        Target("logins lost with one retry", float(len(clients.lost)), "at most", 0),
    ]
    print(render_targets(targets))
    if asked.json is not None:
        figures = {"seconds": times, "gaps": gaps, "logins": len(clients.seen), "retried": len(clients.retried)}
        asked.json.write_text(render_json(machine, figures, targets, rounds=asked.rounds, clients=asked.clients))
    return 0


def start_platform(running: ExitStack) -> Platform:
    """In mode vault; raises `Missing`."""
    if reason := missing.podman() or missing.podman_compose() or missing.bao() or missing.sshd():
        raise Missing(reason)
    folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="signer-bench-")))
    folder.chmod(0o755)
    engine = Engine(folder / "engine")
    show_progress("the image")
    if reason := engine.make_base():
        raise Missing(f"no base image: {reason}")
    running.callback(engine.forget)
    engine.build()
    memory = Path("/run") / folder.name
    running.callback(remove_memory, memory)
    make_memory(memory)
    show_progress("the platform")
    return running.enter_context(Platform(engine, folder / "platform", memory))


def timed(operation: Callable[[], Ended]) -> float:
    """Seconds of the whole command, from its start to its last word; raises `BadRun` if it failed."""
    clock = time.monotonic()
    done = operation()
    passed = time.monotonic() - clock
    if done.status != 0:
        raise BadRun(done.out + done.err)
    return passed


def there_and_back(platform: Platform, number: int) -> list[tuple[str, float]]:
    """One cutover and one rollback, nobody else there."""
    show_progress(f"round {number + 1}, alone")
    plan = platform.plan()
    return [
        (CUTOVER, timed(lambda: platform.apply(plan))),
        (ROLLBACK, timed(lambda: platform.rollback("a benchmark"))),
    ]


def watched(platform: Platform, asked: argparse.Namespace) -> tuple[dict[str, list[float]], Clients]:
    """The longest stretch without a login in each cutover and rollback, and the clients who saw it."""
    gaps: dict[str, list[float]] = {CUTOVER: [], ROLLBACK: []}
    with Clients(platform, asked.clients) as clients:
        clients.wait_for(asked.clients)
        clients.rest()
        for number in range(asked.rounds):
            show_progress(f"round {number + 1}, with {asked.clients} clients")
            plan = platform.plan()
            for name, operation in (
                (CUTOVER, lambda: platform.apply(plan)),  # noqa: B023 - called at once
                (ROLLBACK, lambda: platform.rollback("a benchmark")),
            ):
                began = time.monotonic()
                timed(operation)
                gaps[name].append(longest_gap(clients.seen, began, time.monotonic()))
                clients.wait_for(asked.clients)
        show_progress("")
    return gaps, clients


if __name__ == "__main__":
    sys.exit(main())
