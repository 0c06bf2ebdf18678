"""Looks on while `signer cutover` or `signer decommission` works, and does something at a place in its journal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.parts.container import Ended
from tests.parts.platform import Platform


def journals(platform: Platform) -> list[Path]:
    """The journals of all runs, oldest first."""
    return sorted((platform.evidence_dir / "journal").glob("*-*.jsonl"))


def lines(platform: Platform) -> list[dict[str, Any]]:
    """What the newest journal says."""
    found = journals(platform)
    return [json.loads(line) for line in found[-1].read_text().splitlines()] if found else []


class Watched:
    """`signer WORDS`, which is started at once, and the journal lines that it writes from then on."""

    def __init__(self, platform: Platform, *words: str) -> None:
        self._platform = platform
        self._sizes = {path: path.stat().st_size for path in journals(platform)}
        self.process = platform.start(*words)

    def _new_lines(self) -> Iterator[dict[str, Any]]:
        for path in journals(self._platform):
            with path.open("rb") as file:
                file.seek(self._sizes.get(path, 0))
                for line in file:
                    if line.endswith(b"\n"):
                        yield json.loads(line)

    def reaches(self, event: str, step: str = "") -> bool:
        """True as soon as the line is there, False once the command has ended without it."""
        while True:
            ended = self.process.poll() is not None
            if any(line["event"] == event and line.get("step", "") == step for line in self._new_lines()):
                return True
            if ended:
                return False
            time.sleep(0.001)

    def at(self, event: str, step: str, act: Callable[[], object]) -> Ended:
        """Does it there, and waits for the command's end; fails if that place is not reached."""
        reached = self.reaches(event, step)
        if reached:
            act()
        ended = self.wait()
        assert reached, ended.out
        return ended

    def pause(self) -> None:
        """Holds it where it is until `go_on`."""
        self.process.send_signal(signal.SIGSTOP)

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
