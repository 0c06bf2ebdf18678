"""Vault's removal with all its parts played: what was found there, and steps that do nothing, for transcripts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from signer.migration.config import KEY_VARIABLE, CutoverFile, parse_cutover_file
from signer.migration.decommission.actions import RemovalActions
from signer.migration.decommission.blockers import Checks, LedgerFacts, RecordedCutover, blockers
from signer.migration.decommission.steps import removal_steps
from signer.migration.decommission.survey import RemovalInputs, RemovalReadiness
from signer.migration.plan import Observation, Step
from signer.migration.run import Run
from signer.vault.audit_log import AuditFacts, Signature
from signer.vault.inventory import AuditDevice, Inventory, KvEntries, Mount, OwnToken, SshEngine, SshRole, Unread

CUT_OVER: Final = 1_795_000_000  # 2026-11-18T11:06:40Z
HOUR: Final = 3600
NOW: Final = CUT_OVER + 100 * HOUR
OWN: Final = OwnToken("accessor-of-ours", ttl=0, uses=0, is_orphan=True, lacks=(), hashes=("hmac-sha256:ours",))
CLEAR: Final = Inventory(
    at=NOW,
    version="2.7.2",
    cluster="c",
    storage="raft",
    seal="shamir",
    namespaces=(),
    mounts=tuple(
        Mount(f"{name}/", kind)
        for name, kind in (("cubbyhole", "cubbyhole"), ("identity", "identity"), ("ssh", "ssh"), ("sys", "system"))
    ),
    kv=(),
    ssh=(SshEngine("ssh/", (SshRole("llmops", 1800), SshRole("open", 0)), ("SHA256:x",), 32 * 24 * HOUR),),
    auth_methods=(Mount("token/", "token"), Mount("userpass/", "userpass")),
    policies=("default", "root"),
    entities=3,
    leases=2,
    tokens=4,
    audit_devices=(AuditDevice("file/", "file"),),
    own_token=OWN,
    unread=(),
)
LEDGER: Final = LedgerFacts(RecordedCutover(50, CUT_OVER, "sha256:e"), 0, (40, CUT_OVER - 60), 0, "local")
AUDIT: Final = AuditFacts(
    CUT_OVER - HOUR, NOW - 10, 900, 0, (Signature("ssh/", "llmops", CUT_OVER - 60),), ()
)  # fmt: skip
CHECKS: Final = Checks((), AUDIT, None, None, None)
READY: Final = RemovalReadiness(CLEAR, LEDGER, CHECKS, [])

CONFIG: Final = f"""\
evidence_dir = "<dir>/evidence"
[compose]
command = ["podman-compose"]
engine = "podman"
project = "safe-session"
base = "/opt/signer/overlays/safe-session.yaml"
overlay = "/opt/signer/overlays/safe-session-local-ca.yaml"
environment = {{ {KEY_VARIABLE} = "/run/signer-ca/ca" }}
[preflight]
script = "/opt/signer/scripts/cutover/safe-session-local-ca-preflight.sh"
[signer]
address = "http://127.0.0.1:8222"
token_file = "/root/.safe-session-token"
policy_file = "/etc/safe-session/policy/policy.toml"
role = "llmops"
[vault]
address = "http://127.0.0.1:8200"
token_file = "/root/.vault-token-cutover"
roles = ["llmops"]
[[smoke]]
name = "edge1"
host = "edge1.example"
user = "llmops"
known_hosts = "/root/.ssh/known_hosts"
[decommission]
admin_token_file = "/root/.vault-token-admin"
stop_command = ["systemctl", "disable", "--now", "vault"]
"""
FILE: Final = parse_cutover_file(CONFIG.replace("<dir>", "/srv").encode())


def removal_inputs(file: CutoverFile, path: Path) -> RemovalInputs:
    """What the plan of a removal depends on."""
    return RemovalInputs(
        config={"path": str(path), "digest": file.digest},
        cutover={"event": 50, "evidence": "sha256:e"},
        operator="operator",
        policy={"digest": "b" * 64, "ca": "SHA256:local"},
        snapshot={"from": "raft API"},
        soak=72 * HOUR,
        targets={target.name: f"{target.user}@{target.host}:{target.port}" for target in file.smoke},
        vault={"address": file.vault.address, "mount": file.vault.mount, "audit_log": ""},
        commands={"stop": ("systemctl", "stop", "vault"), "remove_data": ()},
    )


def play_removal(environ: pytest.MonkeyPatch, folder: Path, case: str) -> None:
    """Writes cutover.toml, and has `signer decommission` find a Vault that is `clear` or `full`, or `gone`;
    with `data` one whose data is to be removed by a command that cannot end well, and that is gone by then."""
    text = CONFIG + ('remove_data_command = ["rmdir", "/nowhere/vault"]\n' if case == "data" else "")
    (folder / "cutover.toml").write_text(text.replace("<dir>", str(folder)))
    inventory, ledger = CLEAR, LEDGER
    if case == "full":
        kv = KvEntries("archive/", 2, ("old/deep/er/secret",))
        mounts = (Mount("archive/", "kv", 2), *CLEAR.mounts)
        inventory = replace(CLEAR, mounts=mounts, kv=(kv,), unread=(Unread("team/", "vault_forbidden"),))
    found = RemovalReadiness(inventory, ledger, CHECKS, blockers(inventory, ledger, CHECKS, FILE, NOW))

    for name, value in {
        "ApiClient": PlayedApi,
        "read_readiness": lambda _file, _api: found,
        "read_inputs": lambda file, path, _api: removal_inputs(file, path),
        "read_ledger": lambda _api: replace(ledger, cutover=RecordedCutover(50, int(time.time()) - 100 * HOUR, "")),
        "vault_state": lambda _file: "gone" if case in ("gone", "data") else "active",
        "RemovalActions": PlayedRemoval,
        "removal_steps": played_steps,
    }.items():
        environ.setattr(f"signer.cli.moves.{name}", value)


class PlayedApi:
    """A ledger that holds what it is told."""

    def __init__(self, _address: str, _token_file: Path) -> None:
        self.recorded: list[dict[str, Any]] = []

    def __enter__(self) -> PlayedApi:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.recorded.clear()

    def record(
        self, operation: str, outcome: str, plan: str = "", evidence: str = "", reason: str = ""
    ) -> dict[str, Any]:
        told = {"operation": operation, "outcome": outcome, "plan": plan, "evidence": evidence, "reason": reason}
        self.recorded.append({**told, "seq": 61, "hash": "c" * 64})
        return self.recorded[-1]

    def operations(self, evidence: str | None = None) -> Iterator[dict[str, Any]]:
        return iter([one for one in self.recorded if one["evidence"] == evidence])


class PlayedRemoval(RemovalActions):
    """Actions of a run whose tokens nobody looks for."""

    def begin(self, run: Run) -> None:
        self._run = run

    def _present(self) -> list[str]:
        return []


def played_steps(file: CutoverFile, actions: RemovalActions) -> tuple[Step, ...]:
    """The steps of a removal that do nothing but report their own lines; a command that removes data is run."""
    return tuple(
        step if step.name in ("remove-data", "seal") else report_lines(step) for step in removal_steps(file, actions)
    )


def report_lines(step: Step) -> Step:
    """The step with an action, and a proof if it has one, that only report the first and the last of its lines."""
    first, last = Observation(step.lines[0]), Observation(step.lines[-1])
    verify = None if step.verify is None else lambda: last
    return replace(step, action=lambda: first, verify=verify, is_done=lambda: False)
