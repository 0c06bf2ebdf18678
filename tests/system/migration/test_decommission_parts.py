"""`signer decommission` with a real OpenBao on raft storage, a real service, a real sshd: blocked, applied, resumed.

The cutover before it is told by evidence and ledger alone; `test_cutover_rehearsal.py` goes the whole way.
"""

from __future__ import annotations

import json
import signal
import socket
import stat
import urllib.request
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final

import pytest

from signer.migration.config import load_cutover_file
from signer.migration.decommission.actions import _is_refused, _places, vault_state
from signer.migration.decommission.snapshot import check_snapshot
from signer.migration.evidence.verify import check_evidence
from tests.parts.keys import KeyRing
from tests.parts.openbao import OpenBao
from tests.parts.ports import free_port
from tests.parts.removable import Platform, removable_platform

pytestmark = [pytest.mark.timeout(300)]
MARKER: Final = "marker-of-a-secret-value-5d1c"
STEPS: Final = (
    "inventory", "snapshot", "smoke", "disable", "prove", "revoke", "seal-vault", "stop", "gone", "smoke-again",
    "remove-data",
)  # fmt: skip
KILLS: Final = (("after", "step.began"), ("before", "step.done"))


@pytest.fixture
def platform(tmp_path: Path, keyring: KeyRing) -> Iterator[Platform]:
    with removable_platform(tmp_path, keyring) as found:
        yield found


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_secrets_three_folders_deep_in_two_kinds_of_kv_block_and_their_values_are_nowhere(platform: Platform) -> None:
    bao = platform.bao
    platform.cut_over()
    bao.must("POST", "sys/mounts/archive", {"type": "kv"})
    bao.must("POST", "archive/old/deep/er/secret-one", {"password": MARKER})
    bao.must("POST", "sys/mounts/team/vault", {"type": "kv", "options": {"version": "2"}})
    while bao.call("POST", "team/vault/data/a/b/c/secret-two", {"data": {"password": MARKER}}).status != 200:
        pass  # a KV mount of version 2 takes a moment
    read_before = bao.audit_file.read_text().count('"operation":"read"')
    text = platform.plan()
    assert text.returncode == 1
    assert (
        "secrets are left: 1 in archive/ (old/deep/er/secret-one); 1 in team/vault/ (a/b/c/secret-two)" in text.stdout
    )
    assert not (platform.folder / "plan.json").exists()
    found = platform.blockers()
    assert set(found) == {"secrets_left", "mounts_left"}
    assert "archive/ (kv)" in found["mounts_left"]
    assert not platform.runs()
    told = platform.signer("decommission", "plan", "--config", str(platform.config), "--json")
    assert MARKER not in text.stdout + text.stderr + told.stdout + told.stderr
    assert MARKER.encode() not in everything_in(platform.evidence_dir)
    reads = [json.loads(line) for line in bao.audit_file.read_text().splitlines() if '"operation":"read"' in line]
    assert len(reads) > read_before
    kv = [entry["request"]["path"] for entry in reads if entry["request"].get("mount_type") == "kv"]
    assert kv == []  # the audit log knows of no request for a value


def test_what_may_not_be_listed_blocks(platform: Platform) -> None:
    platform.cut_over()
    platform.bao.must("POST", "sys/mounts/archive", {"type": "kv"})
    may = 'path "sys/*" { capabilities = ["read", "list", "update", "delete", "sudo"] }'
    platform.admin.write_text(platform.bao.token_for(may, "half"))
    found = platform.blockers()
    assert "archive/ (vault_forbidden)" in found["inventory_incomplete"]
    assert "auth/token/accessors (vault_forbidden)" in found["inventory_incomplete"]


def test_a_signature_and_a_login_since_the_cutover_block(platform: Platform, keyring: KeyRing) -> None:
    bao = platform.bao
    bao.must("POST", "sys/auth/userpass", {"type": "userpass"})
    bao.must("POST", "auth/userpass/users/dave", {"password": "secret-word"})
    platform.cut_over()
    assert platform.plan().returncode == 0
    waited_for_next_second(bao)
    assert bao.sign(keyring("ed25519").public_line).status == 200
    assert bao.call("POST", "auth/userpass/login/dave", {"password": "secret-word"}, token="").status == 200
    with urllib.request.urlopen(f"{bao.address}/v1/ssh/public_key", timeout=10) as line:  # as a host that fetches it
        assert line.read().startswith(b"ssh-ed25519 ")
    renewing = bao.token_for('path "auth/token/renew-self" { capabilities = ["update"] }')
    assert bao.call("POST", "auth/token/renew-self", token=renewing).status == 200
    found = platform.blockers()
    assert set(found) == {"vault_signed_since", "vault_certificate_valid", "other_clients"}
    assert "role llmops of ssh/" in found["vault_signed_since"]
    assert "userpass-dave: login at auth/userpass/" in found["other_clients"]
    assert "public_key of ssh/" in found["other_clients"]
    assert "renewal of a token or a lease" in found["other_clients"]


def waited_for_next_second(bao: OpenBao) -> None:
    """The ledger tells seconds, and what happened in the second of the cutover was before it."""
    before = bao.must("GET", "sys/health")["server_time_utc"]
    while bao.must("GET", "sys/health")["server_time_utc"] <= before + 1:
        pass


def test_vault_is_removed_whole_and_the_evidence_verifies(platform: Platform) -> None:
    platform.cut_over()
    secrets = [platform.bao.root_token, platform.bao.token_for('path "x" { capabilities = ["read"] }')]
    planned = platform.plan()
    assert planned.returncode == 0, planned.stderr
    assert "there is no undo" in planned.stdout
    wrong = platform.signer("decommission", "apply", "plan.json", "--approve", "m04-vault-runtime-cutover-approved")
    assert wrong.returncode == 3
    assert platform.bao.call("GET", "ssh/config/ca").status == 200
    done = platform.apply()
    assert done.returncode == 0, done.stderr
    config = load_cutover_file(platform.config)
    assert vault_state(config) == "gone"
    assert not platform.data.exists()
    (run,) = platform.runs()
    with platform.api() as api:
        verdict = check_evidence(run, lambda digest: next(iter(api.operations(evidence=digest)), None))
    assert verdict.is_good, verdict.problems
    assert (
        json.loads((run / "versions.json").read_text())["vault"]
        == json.loads((run / "inventory.json").read_text())["version"]
    )
    (snapshot,) = (platform.evidence_dir / "snapshots").iterdir()
    assert stat.S_IMODE(snapshot.stat().st_mode) == 0o600
    assert json.loads((run / "snapshot.json").read_text())["sha256"] == sha256(snapshot.read_bytes()).hexdigest()
    assert check_snapshot(snapshot).index
    said = everything_in(run) + (planned.stdout + done.stdout + done.stderr).encode()
    assert [secret for secret in secrets if secret.encode() in said] == []
    status = platform.signer("decommission", "status", "--config", str(platform.config), "--json")
    told = json.loads(status.stdout)
    assert (told["now"]["vault"], told["next"]) == ("gone", "nothing: Vault is removed")


@pytest.mark.slow
def test_a_run_that_is_killed_around_every_step_comes_to_its_end_with_the_same_plan(platform: Platform) -> None:
    platform.cut_over()
    assert platform.plan().returncode == 0
    for step in STEPS:
        for kill in KILLS:
            ended = platform.apply(killed=(*kill, step))  # takes up where the one before was killed
            assert ended.returncode == -signal.SIGKILL, f"{kill} {step}: {ended.stderr}"
        if step in ("snapshot", "disable", "seal-vault", "gone"):
            status = platform.signer("decommission", "status", "--config", str(platform.config), "--json")
            assert f"was interrupted at {step}" in json.loads(status.stdout)["next"]
    done = platform.apply()
    assert done.returncode == 0, done.stderr
    assert vault_state(load_cutover_file(platform.config)) == "gone"
    (run,) = platform.runs()
    assert json.loads((run / "outcome.json").read_text())["outcome"] == "applied"
    for step in ("snapshot", "disable", "revoke", "seal-vault", "stop"):
        (told,) = (json.loads(path.read_text()) for path in run.glob(f"steps/*-{step}.json"))
        assert told["summary"].startswith("already done"), step  # by the run that was killed before it could say so


def test_a_mount_that_somebody_brings_back_is_found_before_anything_else_is_done(platform: Platform) -> None:
    platform.cut_over()
    assert platform.plan().returncode == 0
    assert platform.apply(killed=("after", "step.began", "prove")).returncode == -signal.SIGKILL
    platform.bao.enable_ssh()
    platform.bao.write_role()
    stopped = platform.apply()
    assert stopped.returncode == 1
    assert "Vault has signed for role llmops" in stopped.stderr
    assert vault_state(load_cutover_file(platform.config)) == "active"


def test_vault_is_gone_only_where_a_connection_is_refused() -> None:
    """Something else on its port is not nothing. The name has an address that listens nowhere, of each family."""
    port = free_port()
    for name in ("127.0.0.1", "localhost"):
        assert _is_refused(_places(f"http://{name}:{port}"))
    with socket.create_server(("127.0.0.1", port)):
        for name in ("127.0.0.1", "localhost"):
            assert not _is_refused(_places(f"http://{name}:{port}"))
    assert _is_refused(_places(f"http://localhost:{port}"))


def test_a_stop_command_that_fails_leaves_a_run_that_goes_on(platform: Platform) -> None:
    platform.cut_over()
    platform.write_config(stop_command=["false"])
    assert platform.plan().returncode == 0
    stopped = platform.apply()
    assert stopped.returncode == 1
    assert "stop_command ended with status 1" in stopped.stderr
    assert vault_state(load_cutover_file(platform.config)) == "sealed"
    platform.bao.stop()
    done = platform.apply()
    assert done.returncode == 0, done.stderr


def test_a_snapshot_needs_room_and_leaves_no_half_file(platform: Platform) -> None:
    platform.cut_over()
    assert platform.plan().returncode == 0
    snapshots = platform.evidence_dir / "snapshots"
    snapshots.write_text("in the way")
    failed = platform.apply()
    assert failed.returncode == 1
    assert "nothing was changed" in failed.stderr
    assert platform.bao.call("GET", "ssh/config/ca").status == 200
    snapshots.unlink()
    assert platform.apply().returncode == 0


def test_without_vault_there_is_an_error_and_no_plan(platform: Platform) -> None:
    platform.cut_over()
    platform.bao.must("PUT", "sys/seal")
    assert "Vault is sealed" in platform.plan().stderr
    platform.bao.stop()
    assert "Vault cannot be reached" in platform.plan().stderr
