"""README's lines for clients that sign, taken from its text and run as they stand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.documents import section
from tests.parts.keys import KeyRing, ssh_keygen
from tests.parts.service import Service, StartService

ROOT = Path(__file__).parents[3]
SECTION = section("Log in and sign", (ROOT / "README.md").read_text())


def snippet(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture
def folder(tmp_path: Path, keyring: KeyRing) -> Path:
    (tmp_path / "id_ed25519.pub").write_text(keyring("ed25519").public_line + "\n")
    return tmp_path


def run(service: Service, folder: Path, *command: str) -> str:
    environ = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "VAULT_ADDR": service.address,
        "VAULT_TOKEN": service.tokens["deploy-agent"],
    }
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_certificate(folder: Path) -> None:
    shown = ssh_keygen("-L", "-f", folder / "id_ed25519-cert.pub")
    assert 'Key ID: "deploy-agent:llmops"' in shown
    assert re.search(r"Principals:\s+llmops\n", shown)


def test_hvac_signs_as_readme_says(start_service: StartService, folder: Path) -> None:
    run(start_service(), folder, sys.executable, "-c", snippet("python"))
    check_certificate(folder)


@missing.needs_bao
def test_bao_signs_as_readme_says(start_service: StartService, folder: Path) -> None:
    run(start_service(), folder, "bash", "-euo", "pipefail", "-c", snippet("sh"))
    check_certificate(folder)


def test_curl_signs_as_readme_says(start_service: StartService, folder: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is missing")
    printed = run(start_service(), folder, "bash", "-euo", "pipefail", "-c", snippet("bash"))
    (folder / "id_ed25519-cert.pub").write_text(json.loads(printed)["certificate"])
    check_certificate(folder)


def test_it_is_ten_lines() -> None:
    assert len((snippet("python") + snippet("sh")).splitlines()) <= 10
