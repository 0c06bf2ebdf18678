"""The main job: a credential in, a certificate out, recorded, and a real sshd lets it in."""

from __future__ import annotations

import pytest

from tests.parts import missing
from tests.parts.keys import KeyRing
from tests.parts.service import STANDARD_POLICY, StartService
from tests.parts.sshd import StartSshd


@missing.needs_sshd
def test_a_certificate_opens_a_real_sshd(start_service: StartService, start_sshd: StartSshd, keyring: KeyRing) -> None:
    service = start_service()
    user = keyring("ed25519", "user")
    answer = service.sign(user.public_line)
    assert answer.status == 201, answer.body
    certificate = service.folder / "user-cert.pub"
    certificate.write_text(answer.json()["certificate"] + "\n")
    sshd = start_sshd(service.ca.public_line)
    assert sshd.login("true", identity=user.private, certificate=certificate).ok
    assert "ID deploy-agent:llmops (serial 1)" in sshd.log()


def test_the_service_stops_within_five_seconds_and_says_so_in_its_exit_status(start_service: StartService) -> None:
    service = start_service()
    assert service.stop() == 0


def test_audit_8_a_ledger_of_another_platform_is_told(start_service: StartService, keyring: KeyRing) -> None:
    service = start_service()
    assert service.sign(keyring("ed25519", "user").public_line).status == 201
    service.stop()
    former, service.ca = service.ca.fingerprint, keyring("ed25519", "another-platforms")
    service.key_file.unlink()
    service.key_file.write_bytes(service.ca.private.read_bytes())
    service.key_file.chmod(0o400)
    service.write_policy(STANDARD_POLICY)
    service.start()
    assert f"policy.toml does not name {former}: if the ledger is another platform's, stop and restore" in service.log()


@pytest.mark.parametrize("kind", ["ecdsa256", "rsa3072"])
def test_any_allowed_ca_key_kind_signs(kind: str, start_service: StartService, keyring: KeyRing) -> None:
    service = start_service(ca_kind=kind)
    assert service.sign(keyring("ed25519", "user").public_line).status == 201
