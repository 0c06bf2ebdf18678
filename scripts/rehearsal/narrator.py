"""How a rehearsal tells what it does: sections, sentences, and real commands with what they really print."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import textwrap
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from signer.safe_session.terminal import MAX_WIDTH, width_of


class Unexpected(Exception):
    """A command ended otherwise than it should; the rehearsal is over."""


class Narrator:
    """Prints at once and in order; commands run in `folder` with `environment` and print for themselves."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self.seconds: dict[str, float] = {}
        self._sections = 0
        self._child: subprocess.Popen[bytes] | None = None

    def section(self, title: str) -> None:
        self._sections += 1
        print(f"\n== {self._sections}. {title}", flush=True)

    def say(self, text: str) -> None:
        """A paragraph."""
        print("\n" + textwrap.fill(" ".join(text.split()), width_of(1) or MAX_WIDTH), flush=True)

    def run(self, *words: str, ends: int = 0, what: str = "", quiet: bool = False) -> None:
        """Shows a command, runs it, shows how it ended if not with 0; raises `Unexpected` unless with `ends`.

        `what` is the name under which its time is kept; `quiet` drops what it prints on stdout.
        """
        print(f"\n$ {shlex.join(words)}{' >/dev/null' if quiet else ''}", flush=True)
        began = time.monotonic()
        # A session of its own: Ctrl-C ends it at once here, rather than have it back out of what is thrown away.
        self._child = subprocess.Popen(
            words, cwd=self.folder, env=dict(self.environment), stdin=subprocess.DEVNULL, start_new_session=True,
            stdout=subprocess.DEVNULL if quiet else None,
        )  # fmt: skip
        status = self._child.wait()
        self._child = None
        if what:
            self.seconds[what] = time.monotonic() - began
        if status != 0 or ends != 0:
            print(f"$ echo $?\n{status}", flush=True)
        if status != ends:
            raise Unexpected(f"{shlex.join(words[:3])} … ended with {status}, not with {ends}")

    def end_child(self) -> None:
        """Ends what still runs, with all that it started in its own group."""
        if self._child is not None:
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
