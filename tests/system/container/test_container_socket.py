"""Clients on the host of a container reach it over a unix socket in a folder of root's, by the overlay for that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import yaml

from signer.api_client import ApiClient
from signer.migration.compose import Compose
from signer.migration.config import ComposeFacts
from signer.migration.trial import trial
from tests.parts import missing
from tests.parts.container import API, Contained, Engine
from tests.parts.keys import KeyRing
from tests.parts.service import ROOT

pytestmark = [
    missing.needs_root, missing.needs_systemd_analyze, missing.needs_podman, missing.needs_podman_compose,
    pytest.mark.slow, pytest.mark.timeout(600),
]  # fmt: skip
SOCKET_FILE: Final = ROOT / "overlays" / "safe-session-socket.yaml"
GROUP: Final = 8765  # of the host, without a name in the container
CONNECT: Final = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """As it is made at boot by the line of the runbook."""
    made = Path("/run") / f"signer-api-{os.getpid()}"
    lines = tmp_path / "signer-api.conf"
    lines.write_text(f"d {made} 0755 root root\n")
    subprocess.run(["systemd-tmpfiles", "--create", lines], check=True)
    assert (made.stat().st_uid, made.stat().st_mode) == (0, 0o040755)
    yield made
    shutil.rmtree(made)


def test_audit_3d2_the_overlay_gives_the_hosts_clients_a_socket_and_a_trial_another_one(
    engine: Engine, keyring: KeyRing, tmp_path: Path, folder: Path
) -> None:
    contained = Contained(engine, tmp_path / "local", keyring("ed25519", "ca"), local=True)
    contained.files = (*contained.files, SOCKET_FILE)
    contained.variables |= {
        "PLATFORM_RUNTIME_SAFE_SESSION_SOCKET_DIR": str(folder),
        "PLATFORM_RUNTIME_SAFE_SESSION_SOCKET_GROUP": str(GROUP),
    }
    place = folder / "api.sock"
    with contained:
        facts = place.stat()
        assert (facts.st_uid, facts.st_gid, facts.st_mode & 0o7777) == (0, GROUP, 0o660)
        assert _connects(place, GROUP)
        assert not _connects(place, 65534)
        with ApiClient(f"unix:{place}", contained.token_file("deploy-agent")) as api:
            assert api.sign("llmops", {"public_key": keyring("ed25519").public_line})["serial"]
        base, overlay, more = contained.files
        command = Path(sys.executable).with_name("podman-compose")
        merged = tmp_path / "base.yaml"
        merged.write_text(_joined(base, more))
        whole = ComposeFacts((str(command),), "podman", contained.project, merged, overlay, API, contained.variables)
        with trial(whole, environ=engine.environ) as tried:
            assert tried.health.ca_fingerprint == contained.ca.fingerprint
            assert tried.address != f"unix:{place}"
        assert place.stat().st_ino == facts.st_ino
        assert Compose(whole, engine.environ).running() is not None


def _joined(base: Path, more: Path) -> str:
    """The lines of an overlay in the base file, as the runbook says for a platform with cutovers."""
    content, added = (yaml.safe_load(file.read_text()) for file in (base, more))
    service = content["services"][API]
    service["environment"] |= added["services"][API]["environment"]
    service["volumes"] += added["services"][API]["volumes"]
    return yaml.safe_dump(content)


def _connects(place: Path, group: int) -> bool:
    python = "/usr/bin/python3"
    argv = [python, "-c", CONNECT, str(place)]
    return subprocess.run(argv, user=65534, group=group, extra_groups=[], cwd="/", capture_output=True).returncode == 0
