"""runbooks/ca-key.md says what its commands print: they are run, in order, with other paths and another Infisical."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.infisical import CLIENT_SECRET, Infisical
from tests.parts.keys import ssh_keygen
from tests.parts.memory import memory_folder

ROOT = Path(__file__).parents[3]
RUNBOOK = (ROOT / "runbooks" / "ca-key.md").read_text()
FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
PUBLIC_KEY = re.compile(r"AAAAC3NzaC1lZDI1NTE5\S+")


def shown() -> list[tuple[str, list[str]]]:
    """Each command of the runbook with the lines that stand below it."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```text\n(.*?)^```", RUNBOOK, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def steady(line: str) -> str:
    return PUBLIC_KEY.sub("<key>", FINGERPRINT.sub("<fingerprint>", line))


@missing.needs_root
def test_the_runbook_of_the_ca_key_shows_what_its_commands_print(tmp_path: Path) -> None:
    with memory_folder() as memory, Infisical(tmp_path / "infisical") as server:
        moved = {
            "/dev/shm/new-ca": str(memory / "new-ca"),
            "/run/signer-ca": str(memory / "signer-ca"),
            "/etc/signer": str(tmp_path),
            "https://infisical.example": server.url,
        }
        settings = next(lines for command, lines in shown() if command.startswith("cat "))
        before = "export PATH=" + f"{ROOT}/.venv/bin:{os.environ['PATH']}\n"
        for command, expected in shown():
            if command.startswith("cat "):
                text = FINGERPRINT.sub(fingerprint_of(memory / "new-ca"), "\n".join(settings))
                (tmp_path / "ca-render.env").write_text(move(text, moved) + "\n")
                server.holds((memory / "new-ca").read_text())
            done = subprocess.run(
                ["bash", "-c", before + move(command, moved)],
                input=f"{CLIENT_SECRET}\n",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
            )
            if command.startswith("set -a"):
                before += move(command, moved) + "\n"
            lines = done.stdout.splitlines() + ([f"status {done.returncode}"] if done.returncode else [])
            back = [move(line, {to: name for name, to in moved.items()}) for line in lines]
            assert [steady(line) for line in back] == [steady(line) for line in expected], command
        assert (tmp_path / "client-secret").stat().st_mode & 0o777 == 0o400
        assert server.violations == []
        assert sorted(path.name for path in memory.iterdir()) == ["signer-ca"]


def fingerprint_of(path: Path) -> str:
    return ssh_keygen("-l", "-f", path).split()[1]


def move(text: str, moved: dict[str, str]) -> str:
    for name, to in moved.items():
        text = text.replace(name, to)
    return text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze: systemd is not installed")
@pytest.mark.parametrize("name", ["signer-ca-render.service", "signer-ca-credential.service"])
def test_the_units_of_the_runbook_are_units_and_let_go_of_roots_powers(tmp_path: Path, name: str) -> None:
    assert f"cp /opt/signer/scripts/systemd/{name} /etc/systemd/system/" in RUNBOOK
    text = (ROOT / "scripts" / "systemd" / name).read_text()
    unit = tmp_path / name
    unit.write_text(text.replace("/opt/signer/.venv/bin/python", "/bin/true"))
    verified = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert unit.name not in verified.stderr, verified.stderr
    scored = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=40", unit], capture_output=True, text=True
    )
    assert scored.returncode == 0, scored.stdout
    assert "\nCapabilityBoundingSet=\n" in text
