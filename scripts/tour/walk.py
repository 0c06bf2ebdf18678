"""Runs the steps of the tour in a folder, shows each command with what it prints, and stops at the first that differs.

`python -m scripts.tour.walk FOLDER`: FOLDER holds `web1/` with an sshd_config, and the settings of this run in
`tour.env`. Everything that a step leaves running is ended. Only the standard library.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Final

from scripts.tour.steps import STEPS, Step
from signer.safe_session.terminal import width_of, wrap, wrap_command

PATIENCE: Final = 60.0  # seconds for a command, and for what a background command must say
# The settings of `signer init`, then this run's: another port, another place for the ledger.
_SETTINGS: Final = "set -a; for f in etc/environment etc/client tour.env; do [ ! -e $f ] || . ./$f; done; set +a\n"


class Unexpected(Exception):
    """A step ended otherwise than it should."""


class Walk:
    """The folder, and what was started in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[subprocess.Popen[bytes]] = []

    def step(self, step: Step) -> str:
        """Runs one step; returns its output. Raises `Unexpected`."""
        if step.log:
            return self._start(step)
        done = subprocess.run(
            ["bash", "-c", _SETTINGS + step.command],
            cwd=self._folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=PATIENCE, check=False,
        )  # fmt: skip
        said = done.stdout.decode(errors="replace")
        if done.returncode != step.status:
            raise Unexpected(f"exit status {done.returncode}, not {step.status}\n{said}")
        if re.search(step.expects, said) is None:
            raise Unexpected(f"nothing of {step.expects!r} in\n{said}")
        return said

    def _start(self, step: Step) -> str:
        path = self._folder / step.log
        with path.open("wb") as log:
            process = subprocess.Popen(
                ["bash", "-c", f"{_SETTINGS}exec {step.command}"],
                cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._running.append(process)
        deadline = time.monotonic() + PATIENCE
        while True:
            said = path.read_text(errors="replace")
            if re.search(step.expects, said) is not None:
                return said
            if process.poll() is not None or time.monotonic() > deadline:
                raise Unexpected(f"it did not start: nothing of {step.expects!r} in\n{said}")
            time.sleep(0.05)

    def end(self) -> None:
        """Ends what still runs, the last one first."""
        for process in reversed(self._running):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            with suppress(ProcessLookupError):  # nothing of its group is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def why_no_host() -> str:
    """Why the steps on a throwaway host are left out; empty if one can be made."""
    program = Path(__file__).with_name("throwaway-host")
    done = subprocess.run([program, "check"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout.strip() or done.stderr.strip()


def left_out(step: Step, number: int, why: str) -> Iterable[str]:
    """The lines that show a step that is not run."""
    yield from shown(step, number, "")
    yield f"      (left out: {why})"


def shown(step: Step, number: int, said: str) -> Iterable[str]:
    """The lines that show a step."""
    yield f"\n{number:2}  {step.title}"
    yield f"    $ {step.command}{' &' if step.log else ''}"
    lines = said.splitlines()
    yield from (f"      {line}" for line in lines[: step.lines])
    if len(lines) > step.lines:
        yield f"      … {len(lines) - step.lines} more lines"
    if step.status:
        yield f"      (exit status {step.status})"


def show(lines: Iterable[str]) -> None:
    """Prints lines at the width of the terminal; a command goes on after a backslash."""
    width = width_of(1)
    for line in lines:
        breaks = wrap_command if line.startswith("    $ ") else wrap
        print("\n".join([line] if width is None else breaks(line, width)))
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    """Exit status 0, or 1 if a step differs."""
    walk = Walk(Path(arguments[0]))
    began = time.monotonic()

    def stop(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, stop)
    try:
        no_host = why_no_host()
        for number, step in enumerate(STEPS, 1):
            if step.on_host and no_host:
                show(left_out(step, number, no_host))
                continue
            try:
                said = walk.step(step)
            except (Unexpected, subprocess.TimeoutExpired) as error:
                print(f"\n{number:2}  {step.title}\n    $ {step.command}", flush=True)
                print(f"quickstart: error: step {number}: {error}", file=sys.stderr)
                return 1
            show(shown(step, number, said))
    finally:
        walk.end()
    missed = sum(step.on_host for step in STEPS) if no_host else 0
    counted = f"{len(STEPS) - missed} steps" + (f", {missed} left out" if missed else "")
    took = f"{counted}, {time.monotonic() - began:.0f} s"
    print(f"\n{took}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
