"""`signer ca …` that stops itself (SIGSTOP) where a test wants to begin watching it with strace, and the watching.

Run as a program: `python -m tests.parts.paused WHERE WORDS…`. WHERE is `writer` (the child that writes, as soon as it
is there), `renderer` (who made that child, with the key fetched) or `maker` (`ca new`, with the key made). The secret
comes from the file that PAUSED_SECRET names: no Infisical is needed to see how a file is written.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.parts.eventually import eventually

ROOT = Path(__file__).parents[2]
_CALL = re.compile(r"^(\w+)\(", re.MULTILINE)


@dataclass(frozen=True)
class Call:
    """The `number`th `name` that a process makes, after it stopped itself."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name}-{self.number}"


class Paused:
    """`signer WORDS`, stopped at `where`; a context manager. What is left of it is killed in the end."""

    def __init__(self, where: str, words: list[str], environ: Mapping[str, str], folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._log, self._trace, self._strace_log = folder / "log", folder / "trace", folder / "strace-log"
        self._strace: subprocess.Popen[bytes] | None = None
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.parts.paused", where, *words],
                env={"PATH": os.environ["PATH"], **environ},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.pid = eventually(self._stopped, "it stops itself")

    def _stopped(self) -> int:
        assert self.process.poll() is None, self.log
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in (str(self.process.pid), *children):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                return int(pid)
        return 0

    @property
    def log(self) -> str:
        return self._log.read_text()

    def go_on(self, call: Call | None = None, what: str = "") -> None:
        """Lets it run under strace; `what` befalls it at that call, in strace's words (`signal=SIGKILL`)."""
        inject = ["-e", f"inject={call.name}:{what}:when={call.number}"] if call else []
        with self._strace_log.open("wb") as log:
            self._strace = subprocess.Popen(
                ["strace", "-p", str(self.pid), "-o", self._trace, *inject], stdin=subprocess.DEVNULL, stderr=log
            )
        eventually(lambda: "attached" in self._strace_log.read_text(), "strace is there")
        os.kill(self.pid, signal.SIGCONT)

    def wait(self) -> int:
        """The exit status of the whole command, once strace has written what it saw."""
        status = self.process.wait(60)
        if self._strace is not None:
            self._strace.wait(60)
        return status

    def calls(self) -> list[Call]:
        """Every system call that it has made since it stopped, `wait` over."""
        seen: Counter[str] = Counter()
        found = []
        for name in _CALL.findall(self._trace.read_text()):
            seen[name] += 1
            found.append(Call(name, seen[name]))
        return found

    def __enter__(self) -> Paused:
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self.process, self._strace):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()


def _stop_in(where: str) -> None:
    from signer.ca import infisical
    from signer.ca.infisical import Secret, Source
    from signer.ca.key import KeyMaterial

    fork, generate = os.fork, KeyMaterial.generate

    def stopping_fork() -> int:
        child = fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        return child

    def fetch(_source: Source) -> Secret:
        secret = Secret(Path(os.environ["PAUSED_SECRET"]).read_text())
        if where == "renderer":
            os.kill(os.getpid(), signal.SIGSTOP)
        return secret

    def stopping_generate(kind: str) -> KeyMaterial:
        key = generate(kind)
        os.kill(os.getpid(), signal.SIGSTOP)
        return key

    vars(infisical)["fetch_secret"] = fetch
    if where == "writer":
        os.fork = stopping_fork
    if where == "maker":
        KeyMaterial.generate = stopping_generate  # type: ignore[method-assign]


if __name__ == "__main__":
    from signer.cli import main

    _stop_in(sys.argv[1])
    sys.exit(main.main(sys.argv[2:]))
