"""runbooks/ca-rotation.md says what its commands print: they are run, in order, against a real service and two hosts.

Its `toml` blocks are put into policy.toml where they stand. Paths, Infisical and hosts are the test's own, and the
page's old and new key stand for those of the run. `WRITE_RUNBOOK=1 pytest …` writes what was printed into the page, for
a person to read before committing it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.parts import missing
from tests.parts.eventually import eventually
from tests.parts.infisical import NAME, Infisical
from tests.parts.keys import KeyRing
from tests.parts.memory import memory_folder
from tests.parts.rotation import Rotating, line_of, rotating_service
from tests.parts.service import ROOT, STANDARD_POLICY
from tests.parts.sshd import Sshd, StartSshd

RUNBOOK = ROOT / "runbooks" / "ca-rotation.md"
SHORT = "20s"  # for default and maximum: `safe-session ssh` asks for 2 minutes where the role allows them
POLICY = STANDARD_POLICY.replace('default_ttl = "15m"', f'default_ttl = "{SHORT}"').replace('"30m"', f'"{SHORT}"')
NAMES = ("OLD-FINGERPRINT", "OLD-LINE", "NEW-FINGERPRINT", "NEW-LINE")


@dataclass
class Page:
    """The runbook as lines; `shown` are the values that its author's run had for the old and the new key."""

    lines: list[str] = field(default_factory=lambda: RUNBOOK.read_text().splitlines())

    def shown(self) -> dict[str, str]:
        """What stands in the page for each of `NAMES`: itself in a page that was never filled."""
        first, second = (self._after(start) for start in ("fingerprint = ", "public_key = "))
        following = re.search(r'next = \{ fingerprint = "([^"]*)", public_key = "([^"]*)"', "\n".join(self.lines))
        assert following is not None
        return dict(zip(NAMES, (first, second, following[1], following[2]), strict=True))

    def _after(self, start: str) -> str:
        return next(line for line in self.lines if line.startswith(start)).removeprefix(start).strip('"')

    def steps(self) -> Iterator[tuple[str, int, int]]:
        """(kind, first line, line after the last) of each command with its output, and of each toml block."""
        inside, start = "", 0
        for number, line in enumerate(self.lines):
            if line.startswith("```"):
                if inside:
                    yield inside, start, number
                inside, start = ("" if inside else line[3:]), number + 1
            elif inside == "text" and line.startswith("$ ") and number > start:
                yield inside, start, number
                start = number


@dataclass
class Shell:
    """Where the commands run: a new bash for each, with what earlier ones have named."""

    environment: dict[str, str]
    named: list[str] = field(default_factory=list)

    def run(self, command: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-c", "\n".join(["set -o pipefail", *self.named, command])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
            timeout=120,
        )
        if re.match(r"[A-Z]+=|\w+\(\)|export ", command):
            self.named.append(command)
        return done.stdout.splitlines() + ([f"status {done.returncode}"] if done.returncode else [])


def programs(folder: Path, hosts: dict[str, Sshd]) -> Path:
    """A folder for PATH: our two commands, and an `ssh` that finds the hosts at their ports."""
    folder.mkdir()
    for name, module in (("signer", "signer"), ("safe-session", "signer.safe_session")):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -P -m {module} "$@"\n')
    configuration = folder / "ssh_config"
    text = "".join(
        f"Host {name}\n  HostName 127.0.0.1\n  Port {sshd.port}\n  User {sshd.user}\n" for name, sshd in hosts.items()
    )
    text += f"Host *\n  UserKnownHostsFile {folder / 'known'}\n  StrictHostKeyChecking no\n  LogLevel ERROR\n"
    configuration.write_text(text + "  BatchMode yes\n  PreferredAuthentications publickey\n")
    (folder / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {configuration} "$@"\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    return folder


@missing.needs_root
@missing.needs_sshd
@missing.needs_curl_and_jq
def test_the_runbook_of_a_rotation_shows_what_its_commands_print(
    keyring: KeyRing, start_sshd: StartSshd, tmp_path: Path
) -> None:
    old = keyring("ed25519", "ca")
    with ExitStack() as stack:
        memory = stack.enter_context(memory_folder())
        infisical = stack.enter_context(Infisical(tmp_path / "infisical"))
        world = stack.enter_context(rotating_service(old, policy=POLICY))
        # The page has one path for all hosts; here each has its own, which only its sshd knows.
        hosts = {
            name: start_sshd(world.bundle(), extra=[f"SetEnv HOST_AT={tmp_path / f'sshd-{number}'}"])
            for number, name in enumerate(("rs2000", "rs1000"), start=1)
        }
        path = f"{programs(tmp_path / 'bin', hosts)}:{os.environ['PATH']}"
        shell = Shell(
            {
                **world.service.environment(),
                **world.service.client_environment("operator"),
                **infisical.environ(old.fingerprint),
                "PATH": path,
                "HOME": str(tmp_path),
            }
        )
        page = Page()
        replay(page, shell, world, infisical, memory / "next-ca")
    if os.environ.get("WRITE_RUNBOOK"):
        RUNBOOK.write_text("\n".join(page.lines) + "\n")
    assert page.lines == RUNBOOK.read_text().splitlines()


def replay(page: Page, shell: Shell, world: Rotating, infisical: Infisical, fresh: Path) -> None:
    """Runs the page and puts into it what was printed; `fresh` is where the new key is made."""
    shown, old = page.shown(), world.service.ca
    moved = {
        "/dev/shm/next-ca": str(fresh),
        "/run/signer-ca/ca": str(world.service.key_file),
        "/etc/ssh/signer-ca": "'$HOST_AT/trusted_ca'",
        "http://127.0.0.1:8222": world.service.address,
        "INFISICAL_SECRET_NAME=SAFE_SESSION_CA_KEY_NEXT": f"INFISICAL_SECRET_NAME={NAME}",
        "signer ca render": "signer ca render --allow-disk",
        shown["OLD-FINGERPRINT"]: old.fingerprint,
        shown["OLD-LINE"]: line_of(old),
    }
    told: list[tuple[int, int, list[str]]] = []
    for kind, start, end in page.steps():
        if kind == "toml":
            table = move("\n".join(page.lines[start:end]), moved)
            world.service.write_policy(re.sub(r"(?s)\[ca\].*?\n(?=\n\[)", table + "\n", POLICY))
            continue
        command = move(page.lines[start].removeprefix("$ "), moved)
        printed = watch(world, shell, command)
        if fresh.exists() and shown["NEW-LINE"] not in moved:
            public = shell.run(f"ssh-keygen -y -P '' -f {fresh}")[0]
            listed = shell.run(f"ssh-keygen -l -f {fresh}")[0]
            moved |= {shown["NEW-LINE"]: public, shown["NEW-FINGERPRINT"]: listed.split()[1]}
            infisical.holds(fresh.read_text())
        told.append((start + 1, end, printed))
    names = {shown[name]: moved[shown[name]] for name in NAMES}
    back = {to: name for name, to in {**moved, **names}.items()}
    if shown["NEW-LINE"] == "NEW-LINE":  # a page that is filled for the first time keeps what this run had
        back = {to: name for to, name in back.items() if name not in NAMES}
        page.lines = [move(line, names) for line in page.lines]
    for start, end, printed in reversed(told):
        page.lines[start:end] = [move(line, back) for line in printed]


def watch(world: Rotating, shell: Shell, command: str) -> list[str]:
    """Runs one command; a reload is over when it is recorded, and what must come to 0 is waited for."""
    if command == "reload":
        before = reloads(world)
        printed = shell.run(command)
        eventually(lambda: reloads(world) > before, "the files were read again")
        return printed
    if command.endswith("length'"):
        return eventually(lambda: found if (found := shell.run(command)) == ["0"] else None, "none is left") or []
    return shell.run(command)


def reloads(world: Rotating) -> int:
    return len(world.events("policy.loaded")) + len(world.events("policy.refused"))


def move(text: str, moved: dict[str, str]) -> str:
    for name, to in moved.items():
        text = text.replace(name, to)
    return text


def test_every_step_of_the_rotation_says_the_way_back() -> None:
    steps = re.split(r"^## ", RUNBOOK.read_text(), flags=re.MULTILINE)
    numbered = [step for step in steps if re.match(r"\d", step)]
    assert [step[0] for step in numbered] == ["1", "2", "3", "4"]
    for step in numbered:
        assert "**Back:**" in step, step.splitlines()[0]
        assert "\n$ " in step, step.splitlines()[0]
