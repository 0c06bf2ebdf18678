"""scripts/rehearse-cutover, run as an operator would: the whole way on a real platform, and nothing of it stays.

It is also the test of the whole way: every command in it must end as it should, or the rehearsal fails.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.container import Engine
from tests.parts.service import ROOT

pytestmark = [missing.needs_podman, missing.needs_podman_compose, missing.needs_bao, missing.needs_sshd,
              pytest.mark.slow, pytest.mark.timeout(600)]  # fmt: skip

REHEARSE = str(ROOT / "scripts" / "rehearse-cutover")


def environment() -> dict[str, str]:
    """A caller's environment; what it says of a service must not reach the throwaway one."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": os.environ["HOME"],
        "REHEARSAL_NO_SETUP": "1",  # this very process runs in .venv
        "SAFE_SESSION_ADDR": "http://192.0.2.1",
        "PLATFORM_RUNTIME_SAFE_SESSION_LISTEN": "127.0.0.1:1",
    }


def check_gone(said: str, engine: Engine) -> None:
    """Folders, containers, volumes and mounts are gone."""
    (name,) = set(re.findall(r"signer-rehearsal-\w+", said))
    (vault,) = re.findall(r"OpenBao .*: http://127\.0\.0\.1:(\d+),", said)
    (service,) = re.findall(r"the service .*: http://127\.0\.0\.1:(\d+)", said)
    assert not Path("/tmp", name).exists()
    assert not Path("/run", name).exists()
    assert name not in Path("/proc/mounts").read_text()
    left = engine.podman("ps", "--all", "--format", "{{.Names}}") + engine.podman(
        "volume", "ls", "--format", "{{.Name}}"
    )
    assert [line for line in left.splitlines() if vault in line or service in line] == []


@pytest.mark.long
def test_the_whole_way_there_back_and_to_the_end_of_vault(engine: Engine, tmp_path: Path) -> None:
    kept = tmp_path / "evidence"
    done = subprocess.run(
        [REHEARSE, "--evidence", str(kept)], env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=550,
    )  # fmt: skip
    said = done.stdout
    assert done.returncode == 0, said
    at = 0
    for expected in (
        "== 1. The platform as it is today: Vault signs", "this is rs2000", "Nothing has been changed.",
        "that phrase does not approve a cutover", "$ echo $?\n3", "no approval was given", "$ echo $?\n3",
        "inputs.targets.edge1.trusted_ca_file: planned", "$ echo $?\n4",
        "7 ✗ log in to rs2000, edge1", "rolling back", "the platform is as it was", "$ echo $?\n1", "this is edge1",
        "cut over: the local CA signs", "(serial ", "this is rs2000", "now   mode local, ready",
        "rolled back: Vault signs", "this is rs2000", "cut over: the local CA signs",
        "✗ soak_not_over", "Removal of Vault at", "there is no undo from here on",
        "that phrase does not approve a decommission", "$ echo $?\n3",
        "Vault is removed: the local CA signs, logins work",
        "this is edge1", "Vault was decommissioned", "$ echo $?\n1", "signer evidence verify", "are gone again",
    ):  # fmt: skip
        found = said.find(expected, at)
        assert found >= 0, f"{expected!r} does not come after:\n{said[:at][-500:]}\n\nIn all:\n{said}"
        at = found + len(expected)
    assert said.count("signer evidence verify") == 5
    runs = sorted(path.name.rpartition("-")[2] for path in kept.glob("*Z-*"))
    assert runs == ["cutover", "cutover", "cutover", "decommission", "rollback"]
    assert all((path / "evidence.html").is_file() for path in kept.glob("*Z-*"))
    print(re.findall(r"Cutover .* until here\.", said)[0])
    check_gone(said, engine)


def test_ctrl_c_under_way_leaves_nothing(engine: Engine) -> None:
    process = subprocess.Popen(
        [REHEARSE], env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("$ signer cutover plan"):  # it runs now
            break
    os.killpg(process.pid, signal.SIGINT)
    said += process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "everything it started and wrote is gone again" in said
    check_gone(said, engine)


def test_wrong_use_changes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [REHEARSE, "--evidence", str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "exists" in done.stderr
    assert done.stdout == ""
