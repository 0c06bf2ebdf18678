"""A platform whose Vault can be removed: a real service, sshd and OpenBao on raft storage, and the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from signer.api_client import ApiClient
from tests.parts import missing
from tests.parts.evidence import sealed_run
from tests.parts.keys import KeyRing
from tests.parts.openbao import OpenBao
from tests.parts.service import ROOT, Service
from tests.parts.sshd import Sshd

PHRASE: Final = "m04-vault-destructive-cleanup-approved"
# Ends the process before or after it writes an event to the journal, as a power cut would.
KILLED: Final = """
import os, sys
from signer.migration.journal import Journal
when, what, step = sys.argv[1:4]
write = Journal.write
def killing(self, event, **facts):
    is_it = (event, facts.get("step")) == (what, step)
    if not (is_it and when == "before"):
        write(self, event, **facts)
    if is_it:
        os.kill(os.getpid(), 9)
Journal.write = killing
from signer.cli.main import main
sys.exit(main(sys.argv[4:]))
"""


class Platform:
    """A service in mode local that has been cut over, one host, and the Vault that is left."""

    def __init__(self, folder: Path, bao: OpenBao, service: Service, sshd: Sshd, host_line: str) -> None:
        self.folder, self.bao, self.service, self.sshd = folder, bao, service, sshd
        self.evidence_dir = folder / "evidence"
        self.data = folder / "vault-data"
        sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {host_line}\n")
        self.admin = folder / "admin-token"
        self.cutover_token = folder / "cutover-token"
        for path in (self.admin, self.cutover_token):
            path.touch(0o600)
            path.write_text(bao.root_token)
        self.config = folder / "cutover.toml"
        self.write_config()

    def write_config(self, **changes: object) -> Path:
        """`changes` are of [decommission]."""
        bao, service, sshd = self.bao, self.service, self.sshd
        removal: dict[str, object] = {
            "soak": "0s",
            "admin_token_file": str(self.admin),
            "audit_log": str(bao.audit_file),
            "stop_command": ["kill", str(bao.pid)],
            "remove_data_command": ["rm", "-rf", str(self.data)],
            **changes,
        }
        self.config.write_text(
            f"""
evidence_dir = "{self.evidence_dir}"
[compose]
command = ["podman-compose"]
engine = "podman"
project = "safe-session"
base = "{self.folder}/base.yaml"
overlay = "/overlay"
environment = {{ PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_FILE = "/ca" }}
[preflight]
script = "/preflight"
[signer]
address = "{service.address}"
token_file = "{service.token_file("operator")}"
policy_file = "{service.policy_file}"
role = "llmops"
[vault]
address = "{bao.address}"
token_file = "{self.cutover_token}"
roles = ["llmops"]
[[smoke]]
name = "edge1"
host = "127.0.0.1"
port = {sshd.port}
user = "{sshd.user}"
known_hosts = "{sshd.known_hosts}"
[decommission]
"""
            + "".join(f"{name} = {json.dumps(value)}\n" for name, value in removal.items())
        )
        return self.config

    def api(self) -> ApiClient:
        return ApiClient(self.service.address, self.service.token_file("operator"))

    def cut_over(self) -> None:
        """Evidence of a cutover, and the ledger's record of it."""
        evidence = sealed_run(self.evidence_dir)
        with self.api() as api:
            answer = api.record("cutover", "applied", evidence.read_json("plan.json")["digest"], evidence.digest)
        evidence.keep_ledger_answer(answer)
        self.cut_over_at = int(time.time())

    def signer(self, *words: str, killed: tuple[str, str, str] | None = None) -> subprocess.CompletedProcess[str]:
        start = ["-m", "signer"] if killed is None else ["-c", KILLED, *killed]
        return subprocess.run(
            [sys.executable, "-P", *start, *words],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(self.folder)},
            cwd=self.folder, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def plan(self) -> subprocess.CompletedProcess[str]:
        return self.signer("decommission", "plan", "--config", str(self.config), "--out", "plan.json")

    def apply(self, killed: tuple[str, str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return self.signer("decommission", "apply", "plan.json", "--approve", PHRASE, killed=killed)

    def blockers(self) -> dict[str, str]:
        """Code and what of each."""
        told = self.signer("decommission", "plan", "--config", str(self.config), "--json")
        assert told.returncode == 1
        return {one["code"]: one["what"] for one in json.loads(told.stdout)["error"]["blockers"]}

    def runs(self) -> list[Path]:
        return sorted(self.evidence_dir.glob("*-decommission"))


@contextmanager
def removable_platform(folder: Path, keyring: KeyRing, **options: Any) -> Iterator[Platform]:
    """The platform, running; `options` are those of its OpenBao. Skips the test where a part is missing."""
    for reason in (missing.bao(), missing.sshd()):
        if reason:
            pytest.skip(reason)
    ca, host = keyring("ed25519", "ca"), keyring("ed25519", "host")
    with (
        OpenBao(folder / "bao", raft=True, **options) as bao,
        Service(folder / "service", ca) as service,
        Sshd(folder / "sshd", ca.public_line, host_key=host.private) as sshd,
    ):
        bao.enable_ssh()
        bao.write_role()
        found = Platform(folder, bao, service, sshd, " ".join(host.public_line.split()[:2]))
        found.data.mkdir()
        yield found
