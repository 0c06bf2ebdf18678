"""What `signer init` writes starts a real service, which signs for the token beside it."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.parts import ports
from tests.parts.keys import KeyRing
from tests.parts.service import ROOT


def settings_of(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if not line.startswith("#"))


def test_a_new_installation_issues_its_first_certificate(tmp_path: Path, keyring: KeyRing) -> None:
    folder, port = tmp_path / "signer", ports.free_port()
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "signer"]
    subprocess.run([*command, "init", str(folder), "--yes"], env=environ, check=True, capture_output=True, timeout=30)
    written = settings_of(folder / "environment")
    # What this machine lacks: the two users, /var/lib and /run for itself, and a port that nothing else has.
    written |= {"SIGNER_DATA_DIR": str(folder / "data"), "SIGNER_RUN_DIR": str(folder / "run")}
    written |= {name: "root" for name in ("SIGNER_KEEPER_USER", "SIGNER_API_USER") if name in written}
    written["SIGNER_LISTEN"] = f"{ports.LOOPBACK}:{port}"
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        service = subprocess.Popen([*command, "serve"], env=environ | written, stderr=stderr)

    def ask(method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(ports.LOOPBACK, port, timeout=10)
        token = (folder / "operator.token").read_text().strip()
        connection.request(method, path, body, {"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def is_ready() -> bool:
        try:
            return ask("GET", "/readyz")[0] == 200
        except OSError:
            return False

    try:
        ports.wait_until(is_ready, service, log.read_text)
        role = settings_of(folder / "client")["SAFE_SESSION_ROLE"]
        status, body = ask("POST", f"/api/sign/{role}", json.dumps({"public_key": keyring("ed25519").public_line}))
        assert status == 201, body
        assert json.loads(body)["serial"] == "1"
        assert ask("GET", "/api/ledger/head")[0] == 200
    finally:
        ports.stop(service)
