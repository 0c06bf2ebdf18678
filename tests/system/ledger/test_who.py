"""`signer certs who` reads what a real sshd logged, and tells a foreign certificate with one of our serials apart."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from tests.parts import missing
from tests.parts.keys import KeyRing, make_key, sign_with_ssh_keygen
from tests.parts.service import StartService
from tests.parts.sshd import StartSshd

pytestmark = missing.needs_sshd


def test_each_login_leads_to_who_and_why(
    start_service: StartService, start_sshd: StartSshd, keyring: KeyRing, tmp_path: Path
) -> None:
    service, other_ca = start_service(), make_key(tmp_path, "ed25519", "other-ca")
    sshd = start_sshd([service.ca.public_line, other_ca.public_line])
    user = make_key(tmp_path, "ed25519", "user")
    issued = service.sign(user.public_line, reason="=cmd ticket 812").json()
    certificate = tmp_path / "ours-cert.pub"
    certificate.write_text(issued["certificate"] + "\n")
    assert sshd.login(identity=user.private, certificate=certificate).status == 0
    foreign = sign_with_ssh_keygen(other_ca, user, serial=int(issued["serial"]), key_id=issued["key_id"])
    assert sshd.login(identity=user.private, certificate=foreign).status == 0

    told = service.command("certs", "who", "--json", stdin=sshd.log())
    rows = json.loads(told.stdout)["certificates"]
    assert {row["identity"] for row in rows} == {"deploy-agent"}
    assert {row["reason"] for row in rows} == {"=cmd ticket 812"}
    assert len(rows) == 2, "each login once, though sshd writes several lines"
    assert sshd.log().count("(serial ") > 2
    assert rows[0]["problem"] == ""
    assert rows[-1]["problem"] == "not ours: the log has another ca"
    assert told.returncode == 1

    ours = "".join(f"{line}\n" for line in sshd.log().splitlines() if service.ca.fingerprint in line)
    table = service.command("certs", "who", "--csv", stdin=ours)
    cells = list(csv.DictReader(io.StringIO(table.stdout)))
    assert table.returncode == 0
    assert {cell["reason"] for cell in cells} == {"'=cmd ticket 812"}
    assert service.command("certs", "who", stdin="no login here\n").returncode == 1
