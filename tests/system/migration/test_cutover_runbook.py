"""The three runbooks of the move say what their commands print: each is run, in order, on a whole real platform.

Paths, addresses and hosts are the test's own. Before some sections something happens to the platform (`happens`), as it
would to an operator. `WRITE_RUNBOOK=1 pytest …` writes what was printed into the pages, for a person to read before
committing it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from signer.api_client import ApiClient
from signer.migration.config import load_cutover_file
from signer.migration.journal import platform_lock
from signer.migration.plan import read_plan
from signer.migration.run import open_run
from tests.parts import missing
from tests.parts.container import Engine
from tests.parts.platform import Platform, make_memory, remove_memory
from tests.parts.service import ROOT

pytestmark = [missing.needs_podman, missing.needs_podman_compose, missing.needs_curl_and_jq, pytest.mark.timeout(600)]
TTL: Final = 24  # seconds; Vault may not go while a certificate of its own is good
BEFORE_UP: Final = ("preflight", "parity", "trust", "remember")
STOP: Final = "/usr/local/sbin/end-secrets-server"  # what the page names as stop_command
_HOSTS_FILE: Final = "/etc/ssh/safe-session-ca.pub"


@pytest.fixture(scope="module")
def platform(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A platform whose certificates end soon."""
    if reason := missing.bao() or missing.sshd():
        pytest.skip(reason)
    memory = Path(f"/run/signer-runbook-{os.getpid()}")
    make_memory(memory)
    try:
        folder = tmp_path_factory.mktemp("platform")
        with Platform(engine, folder, memory, ttl=f"{TTL}s", max_ttl=f"{TTL}s") as running:
            yield running
    finally:
        remove_memory(memory)


# --- the page and the shell ------------------------------------------------------------------------------------------


@dataclass
class Page:
    """A runbook as lines."""

    path: Path
    lines: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.lines = self.path.read_text().splitlines()

    def commands(self) -> Iterator[tuple[str, int, int]]:
        """(number of the section, line of a command, line after its output) of what stands in `text` blocks."""
        section, inside, start = "", "", -1
        for number, line in enumerate(self.lines):
            if (heading := re.match(r"## (\d+)\.", line)) and not inside:
                section = heading[1]
            if line.startswith("```"):
                if inside and start >= 0:
                    yield section, start, number
                inside, start = ("" if inside else line[3:]), -1
            elif inside == "text" and line.startswith("$ "):
                if start >= 0:
                    yield section, start, number
                start = number


@dataclass
class Shell:
    """Where the commands run: a new bash for each, with what earlier ones have named."""

    platform: Platform
    named: list[str] = field(default_factory=list)

    def run(self, command: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-c", "\n".join(["set -o pipefail", *self.named, command])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.platform.folder,
            env=self.platform.environment() | self.platform.service.variables,
            timeout=150,
        )
        if re.match(r"[A-Z_]+=|export ", command):
            self.named.append(command)
        return done.stdout.splitlines() + ([f"status {done.returncode}"] if done.returncode else [])


def here(platform: Platform) -> dict[str, str]:
    """What the operator's names on the page are called on this platform."""
    folder, service = platform.folder, platform.service
    return {
        'safe-session ssh "$host"': f'safe-session ssh -F {folder}/ssh_config "$host"',
        _HOSTS_FILE: f"{folder}/$host/trusted_ca",
        "/etc/safe-session/cutover.toml": str(platform.config),
        "/var/lib/safe-session/evidence": str(platform.evidence_dir),
        "/opt/signer/overlays/safe-session.yaml": str(platform.base),
        "-p safe-session ": f"-p {service.project} ",
        "/root/.safe-session-token": str(service.token_file("operator")),
        "/root/.vault-token-cutover": str(platform.tokens["cutover"]),
        "/root/plan.json": f"{folder}/plan.json",
        "/root/removal.json": f"{folder}/removal.json",
        "/root/policy.toml": f"{folder}/imported.toml",
        "/run/signer-ca/ca": str(platform.key_file),
        "http://127.0.0.1:8222": service.address,
        "http://127.0.0.1:8200": platform.bao.address,
    }


def there(platform: Platform) -> dict[str, str]:
    """The other way round, for what was printed."""
    names = {to: name for name, to in here(platform).items() if "$host" not in name + to}
    names |= {str(sshd.folder / "trusted_ca"): _HOSTS_FILE for sshd in platform.targets.values()}
    for name, sshd in platform.targets.items():
        names[f"{sshd.user}@127.0.0.1:{sshd.port}"] = f"llmops@{name}.example:22"
    return names | {shlex.join(platform.bao.stop_command): STOP}


def move(text: str, moved: dict[str, str]) -> str:
    for name, to in moved.items():
        text = text.replace(name, to)
    return text


_VARIES: Final = (
    (r"rs2000: /.*?…", "<which file has it>"),
    (r"SHA256:[A-Za-z0-9+/]{43}|SHA256:[A-Za-z0-9+/]*…", "<fingerprint>"),
    (r"(sha256:)?[0-9a-f]{12,64}…?", "<digest>"),
    (r"\d{4}-\d\d-\d\dT\d\d[:-]\d\d[:-]\d\dZ", "<time>"),
    (r"(?<=outside-)[0-9a-f]+…", "<name>"),
    (r"\d+\.\d s\b", "<seconds>"),
    (r"\b(?:\d+d)?(?:\d+h)?(?:\d+m)?\d+s of 3d left", "<time> left"),
    (r"\bevent \d+", "event <n>"),
    (r"\bready: .*\d+ ok(, \d+ skipped)?( \(.*?[)…])?", "ready: <checks>"),
    (r"\d+ token accessors?, \d+ leases?", "<tokens>"),
    (r"[\d,]+ bytes\b|\b\d+ files\b", "<size>"),
    (r"\bserial: \d+|\(serial \d+, until \d\d:\d\d\)|'seq': \d+", "<serial>"),
    (r"(?<=^seconds: )\d+\.\d+$|(?<=llmops for )\d+ \w+|(?<=_ttl = )\"\d+\w\"", "<seconds>"),
    (r" {2,}|-{3,}", " "),
)


def steady(line: str) -> str:
    """A line without what differs from run to run, and without the width of its columns."""
    for pattern, stands in _VARIES:
        line = re.sub(pattern, stands, line)
    return line.rstrip()


def replay(platform: Platform, name: str, happens: dict[str, Callable[[Platform], None]]) -> None:
    """Runs the commands of a page and holds what they print against what it shows."""
    page, shell = Page(ROOT / "runbooks" / name), Shell(platform)
    told: list[tuple[int, int, list[str]]] = []
    reached = set()
    for section, start, end in page.commands():
        if section not in reached:
            reached.add(section)
            if section in happens:
                happens[section](platform)
        command = page.lines[start].removeprefix("$ ")
        printed = [move(line, there(platform)) for line in shell.run(move(command, here(platform)))]
        told.append((start + 1, end, printed))
        if not os.environ.get("WRITE_RUNBOOK"):
            assert [steady(line) for line in printed] == [steady(line) for line in page.lines[start + 1 : end]], command
    assert set(happens) <= reached, "something happens before sections that show no command"
    if os.environ.get("WRITE_RUNBOOK"):
        for start, end, printed in reversed(told):
            if [steady(line) for line in printed] != [steady(line) for line in page.lines[start:end]]:
                page.lines[start:end] = [line.rstrip() for line in printed]
        page.path.write_text("\n".join(page.lines) + "\n")


# --- what happens to the platform ------------------------------------------------------------------------------------


def was_cut_over(platform: Platform) -> None:
    """The local CA signs; how it came to that is told elsewhere."""
    if platform.mode() != "local":
        done = platform.compose("up", "-d", with_overlay=True)
        assert done.status == 0, done.err
        platform.wait_for_mode("local")


def was_sealed(platform: Platform) -> None:
    platform.bao.seal()


def was_killed(platform: Platform) -> None:
    """Vault is unsealed again, and the next cutover was killed while compose replaced the container."""
    platform.bao.unseal()
    platform.wait_for_mode("vault")
    file = load_cutover_file(platform.config)
    plan = read_plan((platform.folder / platform.plan()).read_text(), "cutover")
    with (
        ApiClient(file.signer.address, file.signer.token_file) as recorder,
        platform_lock(file.evidence_dir, file.compose.base),
        open_run(file.evidence_dir, "cutover", plan, None, recorder) as run,
    ):
        for step in BEFORE_UP:
            run.journal.write("step.began", step=step)
            run.journal.write("step.done", step=step, seconds=0.1, summary="")
        run.journal.write("step.began", step="up")
    platform.service.stop()


def trusts_vault_alone(platform: Platform) -> None:
    for name in platform.targets:
        platform.untrust(name)


def vaults_certificates_ended(platform: Platform) -> None:
    """The last that Vault signed were the samples."""
    signed = max(path.stat().st_mtime for path in platform.evidence_dir.glob("*-cutover/parity.json"))
    time.sleep(max(0.0, signed + TTL + 1 - time.time()))


def soak_is_over(platform: Platform) -> None:
    platform.write_config(decommission__soak="1s")


# --- the pages -------------------------------------------------------------------------------------------------------


def test_the_runbook_of_the_way_back_shows_what_its_commands_print(platform: Platform) -> None:
    replay(platform, "rollback.md", {"2": was_cut_over, "3": was_sealed, "4": was_killed})
    assert platform.mode() == "vault"
    assert platform.can_log_in()


def test_the_runbook_of_the_cutover_shows_what_its_commands_print(platform: Platform) -> None:
    platform.reset()
    replay(platform, "safe-session-local-ca-cutover.md", {"2": trusts_vault_alone})
    assert platform.mode() == "local"
    assert platform.bao.is_running()


def test_the_runbook_of_the_removal_shows_what_its_commands_print(platform: Platform) -> None:
    if platform.mode() != "local" or not platform.evidence_dir.exists():  # run by itself
        platform.reset()
        done = platform.apply(platform.plan())
        assert done.status == 0, done.err
    replay(platform, "vault-decommission.md", {"2": vaults_certificates_ended, "3": soak_is_over})
    assert not platform.bao.is_running()
    assert platform.can_log_in()
