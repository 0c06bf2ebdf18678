"""Stops `signer cutover` or `signer decommission` at a place in its journal, where a test does something."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from tests.parts.container import Ended
from tests.parts.platform import Platform

# Stops the process behind each line that it writes to a journal, until a file is there.
_STOPPING: Final = """
import os, signal, sys
from signer.migration.journal import Journal
write = Journal.write
def stopping(self, event, **facts):
    write(self, event, **facts)
    if not os.path.exists(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGSTOP)
Journal.write = stopping
from signer.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def journals(platform: Platform) -> list[Path]:
    """The journals of all runs, oldest first."""
    return sorted((platform.evidence_dir / "journal").glob("*-*.jsonl"))


def lines(platform: Platform) -> list[dict[str, Any]]:
    """What the newest journal says."""
    found = journals(platform)
    return [json.loads(line) for line in found[-1].read_text().splitlines()] if found else []


class Watched:
    """`signer WORDS`, which is started at once, and the journal lines that it writes from then on.

    It waits behind each of them until `reaches` has seen it, so that no test acts later than it means to.
    """

    def __init__(self, platform: Platform, *words: str) -> None:
        self._platform = platform
        self._sizes = {path: path.stat().st_size for path in journals(platform)}
        self._runs_on = platform.folder / "runs-on"
        self._runs_on.unlink(missing_ok=True)
        self.process = platform.start([sys.executable, "-P", "-c", _STOPPING, str(self._runs_on), *words])

    def _new_lines(self) -> Iterator[dict[str, Any]]:
        for path in journals(self._platform):
            with path.open("rb") as file:
                file.seek(self._sizes.get(path, 0))
                for line in file:
                    if line.endswith(b"\n"):
                        yield json.loads(line)

    def reaches(self, event: str, step: str = "") -> bool:
        """True if it has stopped behind that line, where it stays until `go_on`; False if it ends without it."""
        while True:
            state = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            assert state is not None
            is_there = any(line["event"] == event and line.get("step", "") == step for line in self._new_lines())
            if is_there:
                self._runs_on.touch()
            if is_there or state.si_code != os.CLD_STOPPED:
                return is_there
            self.go_on()

    def at(self, event: str, step: str, act: Callable[[], object]) -> Ended:
        """Does it there, and waits for the command's end; fails if that place is not reached."""
        reached = self.reaches(event, step)
        try:
            if reached:
                act()
        finally:
            self.go_on()
        ended = self.wait()
        assert reached, ended.out
        return ended

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9; what the command had started goes on without it."""
        self.process.send_signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> Ended:
        """How it ended; both streams are in `out`."""
        try:
            out, _ = self.process.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        return Ended(self.process.returncode, out, "")
