"""The runbooks of approvals and break-glass say what their commands print: they are run, in order, as the person named.

`<!-- as NAME -->` stands before each block. Ids, times, digests and keys of the page stand for those of the run.
`WRITE_RUNBOOK=1 pytest …` writes what was printed into the pages, for a person to read before committing it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.deciders import Deciders, deciders
from tests.parts.keys import KeyRing
from tests.parts.memory import memory_folder
from tests.parts.service import ROOT

PAGES = [ROOT / "runbooks" / "operate" / name for name in ("approvals.md", "break-glass.md")]
PERSON = re.compile(r"<!-- as ([a-z-]+) -->")
ID = re.compile(r"\b[rwi]-([a-z2-7]{10})\b")
# What differs from run to run, in the order in which it is looked for.
VARIES = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"), "<time>"),
    (re.compile(r"\b(?:\d+[dhm])*\d+[dhms] left\b"), "<left>"),
    (re.compile(r"\b(?:sha256:)?[0-9a-f]{64}\b"), "<digest>"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "<nonce>"),
    (re.compile(r"\b\d+:<digest>"), "<head>"),
    (re.compile(r"\b\d+ events\b"), "<events>"),
    (re.compile(r"\bpid \d+\b"), "<pid>"),
    (re.compile(r'"retry_after_s":\d+'), '"retry_after_s":<s>'),
    (re.compile(r"serial \d+"), "serial <n>"),
)


class Page:
    """A runbook as lines. `ids` are the ids in it, in their order; those of the run take their places."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = path.read_text().splitlines()
        self.ids = list(dict.fromkeys(ID.findall("\n".join(self.lines))))

    def blocks(self) -> Iterator[tuple[str, int, int]]:
        """(person, first line, line after the last) of each block of commands."""
        person, start = "", 0
        for number, line in enumerate(self.lines):
            if (found := PERSON.fullmatch(line)) is not None:
                person = found[1]
            elif line == "```text" and person:
                start = number + 1
            elif line == "```" and start:
                yield person, start, number
                person, start = "", 0


class Run:
    """The commands of a page on a running service."""

    def __init__(self, page: Page, people: Deciders, memory: Path, programs: Path) -> None:
        self.page, self.people, self.memory, self.programs = page, people, memory, programs
        self.ids: list[str] = []

    def command(self, person: str, line: str) -> list[str]:
        """What a command prints, with its exit status if it is not 0; in `line` the page's ids become the run's."""
        known = dict(zip(self.page.ids, self.ids, strict=False))
        line = ID.sub(lambda found: f"{found[0][:2]}{known.get(found[1], found[1])}", line)
        environment = {
            **self.people.environment(person),
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "HOME": str(self.memory),
            "XDG_RUNTIME_DIR": str(self.memory),
        }
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail\n{line}"],
            cwd=self.people.service.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        printed = done.stdout.splitlines() + ([f"status {done.returncode}"] if done.returncode else [])
        for found in ID.findall(f"{line}\n{done.stdout}"):
            if found not in self.ids:
                self.ids.append(found)
        return [f"$ {line}", *printed]


def steady(lines: list[str], ids: list[str]) -> list[str]:
    """The lines with names for what differs from run to run."""
    text = "\n".join(lines)
    for number, found in enumerate(ids):
        text = text.replace(found, f"<id{number}>")
    for pattern, name in VARIES:
        text = pattern.sub(name, text)
    return [re.sub(r"  +", "  ", line) for line in text.splitlines()]  # columns are as wide as their values


@pytest.fixture
def people(tmp_path: Path, keyring: KeyRing) -> Iterator[Deciders]:
    with deciders(tmp_path / "deciders", keyring) as found:
        yield found


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder for PATH with our two commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, module in (("signer", "signer"), ("safe-session", "signer.safe_session")):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -P -m {module} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


@missing.needs_ssh_keygen
@missing.needs_curl_and_jq
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_runbook_shows_what_its_commands_print(people: Deciders, programs: Path, path: Path) -> None:
    page = Page(path)
    assert list(page.blocks())
    written = list(page.lines)
    with memory_folder() as memory:
        memory.chmod(0o700)
        run = Run(page, people, memory, programs)
        for person, start, end in reversed(list(_printed(run, page))):
            written[start:end] = person
    if os.environ.get("WRITE_RUNBOOK"):
        path.write_text("\n".join(written) + "\n")
        return
    assert steady(written, run.ids) == steady(page.lines, page.ids)


def _printed(run: Run, page: Page) -> Iterator[tuple[list[str], int, int]]:
    for person, start, end in page.blocks():
        commands = [line.removeprefix("$ ") for line in page.lines[start:end] if line.startswith("$ ")]
        yield [line for command in commands for line in run.command(person, command)], start, end
