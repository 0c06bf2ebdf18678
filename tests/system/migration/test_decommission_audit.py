"""What a decommission must not take for understood, with real OpenBao: an audit log with a prefix, another cluster's
snapshot, other nodes, a supervisor, and secrets that come late. The sequence without faults is in
`test_decommission_parts.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from signer.migration.config import load_cutover_file
from signer.migration.decommission.actions import vault_state
from tests.parts.keys import KeyRing
from tests.parts.openbao import OpenBao, binary
from tests.parts.removable import Platform, removable_platform

pytestmark = [pytest.mark.timeout(300)]


@pytest.fixture
def platform(tmp_path: Path, keyring: KeyRing) -> Iterator[Platform]:
    with removable_platform(tmp_path, keyring) as found:
        yield found


def test_audit_5f1_a_prefix_of_the_audit_device_hides_no_signature(tmp_path: Path, keyring: KeyRing) -> None:
    with removable_platform(tmp_path, keyring, prefix="vault-audit: ") as platform:
        platform.cut_over()
        assert platform.plan().returncode == 0
        until(lambda: platform.bao.must("GET", "sys/health")["server_time_utc"] > platform.cut_over_at + 1)
        assert platform.bao.sign(keyring("ed25519").public_line).status == 200
        assert set(platform.blockers()) == {"vault_signed_since", "vault_certificate_valid"}
        log = platform.bao.audit_file
        log.write_text(log.read_text().replace("vault-audit: ", "of rsyslog: "))
        what = platform.blockers()["inventory_incomplete"]
        assert 'audit.log line 1, not an entry: of rsyslog: {"time"' in what
        platform.write_config(audit_log_prefix="of rsyslog: ")
        assert "inventory_incomplete" not in platform.blockers()


def snapshot_of(bao: OpenBao, path: Path) -> dict[str, object]:
    """Its settings."""
    request = urllib.request.Request(
        f"{bao.address}/v1/sys/storage/raft/snapshot", headers={"X-Vault-Token": bao.root_token}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        content: bytes = answer.read()
    path.write_bytes(content)
    return {"snapshot_file": str(path), "snapshot_sha256": sha256(content).hexdigest()}


def test_audit_5_a_whole_snapshot_of_another_empty_cluster_is_not_this_vaults(platform: Platform) -> None:
    platform.cut_over()
    with OpenBao(platform.folder / "other", raft=True) as other:
        until(lambda: other.must("GET", "sys/leader")["is_self"])
        platform.write_config(**snapshot_of(other, platform.folder / "other.snap"))
    what = platform.blockers()
    assert set(what) == {"no_snapshot"}
    assert "not of this Vault: its servers are one at 127.0.0.1:" in what["no_snapshot"]
    platform.write_config(**snapshot_of(platform.bao, platform.folder / "own.snap"))
    planned = platform.plan()
    assert planned.returncode == 0, planned.stdout
    platform.bao.must("PUT", "sys/policies/acl/later", {"policy": 'path "x" { capabilities = ["read"] }'})
    assert "too old: its index is" in platform.blockers()["no_snapshot"]
    assert platform.bao.call("GET", "ssh/config/ca").status == 200


def test_audit_5_other_nodes_block_until_they_are_named_and_then_are_sealed_and_gone(platform: Platform) -> None:
    platform.cut_over()
    bao, folder = platform.bao, platform.folder
    with (
        OpenBao(folder / "two", raft=True, node="two", leader=bao) as two,
        OpenBao(folder / "three", raft=True, node="three", leader=bao) as three,
    ):
        until(lambda: len(bao.must("GET", "sys/ha-status")["data"]["nodes"]) == 3)
        what = platform.blockers()["other_nodes"]
        assert f"two at {two.address}" in what
        assert f"three at {three.address}" in what
        until(lambda: len(voters(bao)) == 3)
        named = [two.address, three.address]
        platform.write_config(other_nodes=named, stop_command=["kill", *(str(one.pid) for one in (bao, two))])
        planned = platform.plan()
        assert planned.returncode == 0, planned.stdout
        half = platform.apply()
        assert half.returncode == 1
        assert f"{three.address} does not refuse connections" in half.stderr
        (run,) = platform.runs()
        states = json.loads(next(run.glob("steps/*-seal-vault.json")).read_text())["facts"]["nodes"]
        assert sorted(states.values())[:2] == [
            "sealed",
            "sealed",
        ]  # the third may have led for a moment, and is sealed then
        config = load_cutover_file(platform.config)
        assert vault_state(config) != "gone"
        three.stop()
        done = platform.apply()
        assert done.returncode == 0, done.stderr
        assert vault_state(config) == "gone"


def until(is_so: Callable[[], bool], within: float = 60) -> None:
    """Returns once it is so."""
    deadline = time.monotonic() + within
    while not is_so():
        assert time.monotonic() < deadline, "it never was"
        time.sleep(0.1)


def voters(bao: OpenBao) -> list[str]:
    servers = bao.must("GET", "sys/storage/raft/configuration")["data"]["config"]["servers"]
    return [server["node_id"] for server in servers if server["voter"]]


SUPERVISOR = """
import subprocess, sys, time
time.sleep(float(sys.argv[1]))
subprocess.run(sys.argv[2:], stdin=subprocess.DEVNULL)
"""


def test_audit_5_a_supervisor_that_starts_vault_again_after_five_seconds_is_told(platform: Platform) -> None:
    platform.cut_over()
    bao = platform.bao
    start = [str(binary()), "server", f"-config={bao.folder / 'server.hcl'}"]
    stop = platform.folder / "stop"
    stop.write_text(
        f"#!/bin/sh\nkill {bao.pid}\n"
        f"{sys.executable} -c '{SUPERVISOR}' 5 {' '.join(start)} >/dev/null 2>&1 & echo $! > {stop}.pid\n"
    )
    stop.chmod(0o755)
    platform.write_config(stop_command=["setsid", str(stop)])
    assert platform.plan().returncode == 0
    try:
        stopped = platform.apply()
        assert stopped.returncode == 1
        assert "accepts connections again after" in stopped.stderr
        assert "Vault is removed" not in stopped.stdout
        assert platform.data.exists()
    finally:
        children = subprocess.run(
            ["pgrep", "-f", f"config={bao.folder / 'server.hcl'}"], capture_output=True, text=True, check=False
        )
        for pid in children.stdout.split():
            os.kill(int(pid), signal.SIGKILL)


def test_audit_5_a_secret_that_comes_before_the_seal_stops_the_run_and_is_in_a_second_snapshot(
    platform: Platform,
) -> None:
    platform.cut_over()
    bao = platform.bao
    assert platform.plan().returncode == 0
    assert platform.apply(killed=("before", "step.done", "revoke")).returncode == -signal.SIGKILL
    bao.must("POST", "sys/mounts/late", {"type": "kv"})
    bao.must("POST", "late/deep/secret", {"password": "x"})
    stopped = platform.apply()
    assert stopped.returncode == 1
    assert "new in Vault since the snapshot: late/deep/secret, mount late/ (kv, " in stopped.stderr
    assert bao.call("GET", "sys/seal-status", token="").body["sealed"] is False
    done = platform.apply()
    assert done.returncode == 0, done.stderr
    first, second = sorted((platform.evidence_dir / "snapshots").iterdir(), key=lambda path: len(path.name))
    assert second.name.endswith("-decommission.2.snap")
    (run,) = platform.runs()
    assert json.loads((run / "snapshot.json").read_text())["path"] == str(first)
    told = json.loads((run / "snapshot-2.json").read_text())
    assert (told["path"], told["sha256"]) == (str(second), sha256(second.read_bytes()).hexdigest())


def test_audit_5_a_token_that_may_not_ask_for_a_signature_is_told_before_anything_is_destroyed(
    platform: Platform,
) -> None:
    platform.cut_over()
    may = 'path "*" { capabilities = ["read", "list", "update", "delete", "sudo"] }\n'
    platform.bao.must("PUT", "sys/policies/acl/most", {"policy": may + 'path "ssh/sign/*" { capabilities = ["deny"] }'})
    made = platform.bao.must("POST", "auth/token/create-orphan", {"policies": ["most"], "ttl": "1h"})
    platform.admin.write_text(made["auth"]["client_token"])
    assert "it may not use ssh/sign/llmops" in platform.blockers()["admin_token_unfit"]
