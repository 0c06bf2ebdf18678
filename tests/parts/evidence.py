"""A run's evidence as a cutover would leave it, with made-up hosts, for tests of what is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from signer.migration.evidence.files import numbered
from signer.migration.evidence.redact import Guard
from signer.migration.evidence.store import Evidence
from signer.migration.plan import Observation, Plan, Step, describe

BEGAN: Final = 1_795_356_302  # 2026-11-22T14:05:02Z
VAULTS: Final = "SHA256:HquhVaultVaultVaultVaultVaultVaultVaultVaul"
OURS: Final = "SHA256:uT1kLocalLocalLocalLocalLocalLocalLocalLoca"
HOSTS: Final = ("rs2000", "rs1000", "edge1")


def _never() -> Observation:
    raise AssertionError("a described step is not run")


_STEPS: Final = (
    ("preflight", "Preflight on this host", "reads", "", 0.612, "16 ok, 1 warning"),
    ("parity", "Compare roles and 20 certificates", "reads, signs", "", 1.904, "1 role, 20 certificates, none wider"),
    ("trust", "Do the 3 hosts trust the new CA", "reads", "", 0.871, "3 of 3 trust it"),
    ("snapshot", "Record the current state", "writes evidence", "", 0.044, "mode vault, image 4f1d2c"),
    (
        "compose",
        "Compose up with the overlay",
        "CHANGES",
        "undone by compose up without the overlay",
        3.218,
        "1 container new",
    ),
    ("ready", "Ready, in mode local, with the pinned CA", "reads", "", 0.703, f"mode local, CA {OURS}"),
    ("smoke", "Log in to rs2000, rs1000, edge1", "logs in", "", 2.466, "3 of 3 logged in, 3 of 3 refused root"),
)
_SEAL: Final = ("seal", "Seal the evidence", "writes evidence", "", 0.0, "")
_FACTS: Final[dict[str, dict[str, Any]]] = {
    "trust": {"targets": {host: {"target": host, "trusted": True, "file": "/etc/ssh/ca.pub"} for host in HOSTS}},
    "snapshot": {"mode": "vault", "ca": VAULTS, "containers": ["safe-session-api"], "image": "sha256:" + "4f1d2c" * 10},
    "compose": {"ran": ["podman-compose -p safe-session -f base -f overlay up -d"], "pause_seconds": 1.31},
    "smoke": {
        "targets": {
            host: {
                "target": host, "login": f"llmops@{host}.example:22", "status": 0, "seconds": 0.8, "log": "a log",
                "serial": str(4711 + n), "ca": OURS, "principals": ["llmops"], "backend": "local",
                "recorded": {"seq": 30 + n, "hash": "ab" * 32},
            }
            for n, host in enumerate(HOSTS)
        }
    },
}  # fmt: skip


def plan(title: str = "Cutover of safe-session-api from Vault to the local CA") -> Plan:
    """The plan of that run."""
    would = {"compose": ("podman-compose -p safe-session -f base -f overlay up -d",)}
    steps = describe(
        [
            Step(name, told, effect, _never, would.get(name, ()), undo_text=undo)  # type: ignore[arg-type]
            for name, told, effect, undo, _, _ in (*_STEPS, _SEAL)
        ]
    )
    return Plan(
        operation="cutover",
        title=title,
        inputs={
            "cutover_file": "sha256:" + "1a" * 32,
            "overlay": "sha256:" + "2b" * 32,
            "policy": "sha256:" + "3c" * 32,
            "ca": OURS,
            "compose_project": "safe-session",
            "vault_role_llmops": {"allowed_users": "llmops", "default_user": "llmops", "ttl": 900},
        },
        now={"mode": "vault", "ca": VAULTS, "principals": ["llmops"], "address": "http://127.0.0.1:8222"},
        then={"mode": "local", "ca": OURS, "principals": ["llmops"]},
        steps=steps,
    )


def look(**changes: object) -> dict[str, Any]:
    """observed.json of that run, with these facts observed otherwise."""
    planned = {"ready": True, "mode": "local", "ca": OURS, "policy": "3c" * 32, "image": "4f1d2c" * 10 + "4f1d",
               "principals": ["llmops"]}  # fmt: skip
    observed = {**planned, "listens": ["127.0.0.1:8222"], "health": "starting", **changes}
    del observed["principals"]
    return {"at": "2026-11-22T14:05:13Z", "planned": planned, "observed": observed, "unread": {}}


def fill(evidence: Evidence, planned: Plan | None = None) -> None:
    """Everything that a cutover writes before it is sealed."""
    planned = planned or plan()
    approval = {
        "operation": "cutover", "plan": planned.digest, "who": "ada as root", "where": "rs2000.example",
        "at": "2026-11-22T14:05:01Z", "way": "terminal",
    }  # fmt: skip
    evidence.write_json("plan.json", planned.as_json())
    evidence.write_json("approvals.json", [approval])
    checks = [
        {"status": "ok", "code": "ca_key_present", "detail": "regular file, 1 link, 411 bytes"},
        {"status": "ok", "code": "ca_key_owner", "detail": "root:root"},
        {"status": "warn", "code": "ca_key_on_disk", "detail": "ext4; render it to a tmpfs"},
    ]
    evidence.write_json("preflight.json", {"ready": True, "ok": 16, "warnings": 1, "checks": checks})
    told = {"field": "allowed_user_key_lengths.rsa", "ours": "from 3072 bits", "vaults": "any size"}
    difference = {**told, "severity": "note", "why": "Vault takes any size, signer accepts no shorter keys"}
    samples: list[dict[str, object]] = [
        {
            "name": name,
            "key_type": "ssh-ed25519",
            "asked": {},
            "outcome": "granted",
            "serials": ["1"],
            "differences": [],
        }
        for name in ("plain", "longest ttl", "short ttl")
    ]
    role = {"role": "llmops", "parity": True, "principals": "llmops -> llmops, none added", "left_out": ""}
    roles = [{**role, "differences": [difference], "samples": samples}]
    summary = "llmops -> llmops, none added; 3 samples, 0 errors"
    evidence.write_json("parity.json", {"parity": True, "summary": summary, "errors": 0, "samples": 3, "roles": roles})
    for number, (name, title, _effect, _undo, seconds, summary) in enumerate(_STEPS, 1):
        found = {"step": name, "title": title, "what": "done", "summary": summary, "seconds": seconds}
        evidence.write_json(numbered("steps", number, name, "json"), {**found, "facts": _FACTS.get(name, {})})
    for number, host in enumerate(HOSTS, 1):
        log = f"$ safe-session ssh {host}.example id\nuid=1001(llmops) gid=1001(llmops)\nexit status 0, 0.8 s\n"
        evidence.write_text(numbered("smoke", number, host, "log"), log)
    evidence.write_json("timings.json", {"approval_to_verified_seconds": 9.8, "longest_pause_seconds": 1.31})
    evidence.write_json(
        "versions.json", {"signer": "0.1.0", "python": "3.11.2", "openssh": "9.2p1", "openbao": "2.7.2"}
    )
    evidence.write_json("observed.json", look())
    lines = [f'{{"at": {BEGAN}000, "event": "run.began"}}', f'{{"at": {BEGAN + 11}000, "event": "run.ended"}}']
    evidence.write_text("journal.jsonl", "\n".join(lines) + "\n")


def sealed_run(parent: Path, outcome: str = "applied", guard: Guard | None = None) -> Evidence:
    """A whole run, sealed, with no answer of a ledger yet."""
    evidence = Evidence.create(parent, "cutover", BEGAN, guard)
    fill(evidence)
    evidence.seal(outcome)
    return evidence
