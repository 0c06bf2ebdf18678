"""The real parts themselves work, so that a failure elsewhere is ours."""

from __future__ import annotations

import pytest

from tests.parts import keys, missing
from tests.parts.keys import KeyRing, sign_with_ssh_keygen
from tests.parts.openbao import OpenBao
from tests.parts.sshd import Sshd, StartSshd, run


def test_sshd_opens_for_a_certificate_of_its_ca_and_logs_it(keyring: KeyRing, start_sshd: StartSshd) -> None:
    ca, user = keyring("ed25519", "ca"), keyring("ed25519")
    certificate = sign_with_ssh_keygen(ca, user, serial=4711, key_id="who=me", name="opens")
    sshd = start_sshd(ca.public_line)

    login = sshd.login("echo in; exit 3", identity=user.private, certificate=certificate)

    assert (login.status, login.out) == (3, "in\n"), login.err + sshd.log()
    assert "ID who=me (serial 4711)" in sshd.log()


@pytest.mark.parametrize("why", ["another CA", "another principal", "expired", "no certificate"])
def test_sshd_stays_shut(keyring: KeyRing, start_sshd: StartSshd, why: str) -> None:
    ca, user = keyring("ed25519", "ca"), keyring("ed25519")
    certificate = sign_with_ssh_keygen(
        keyring("ed25519", "other-ca") if why == "another CA" else ca,
        user,
        principals=["root"] if why == "another principal" else ["llmops"],
        validity="-10m:-5m" if why == "expired" else "-1m:+5m",
        name=f"shut-{why.replace(' ', '-')}",
    )
    sshd = start_sshd(ca.public_line)

    login = sshd.login("echo in", identity=user.private, certificate=None if why == "no certificate" else certificate)

    assert (login.status, login.out) == (255, "")
    assert "Permission denied (publickey)" in login.err


def test_trust_changes_under_a_running_sshd(keyring: KeyRing, start_sshd: StartSshd) -> None:
    old, new, user = keyring("ed25519", "ca"), keyring("ecdsa256", "ca"), keyring("ed25519")
    certificate = sign_with_ssh_keygen(new, user, name="trust-changes")
    sshd = start_sshd(old.public_line)
    assert not sshd.login(identity=user.private, certificate=certificate).ok
    sshd.trust([old.public_line, new.public_line])
    assert sshd.login(identity=user.private, certificate=certificate).ok
    sshd.allow(["somebody"])
    assert not sshd.login(identity=user.private, certificate=certificate).ok


@pytest.mark.parametrize("kind", [*keys.KINDS, *keys.SK_KINDS])
def test_keys_of_every_kind_can_be_certified(keyring: KeyRing, kind: str) -> None:
    certificate = sign_with_ssh_keygen(keyring("ed25519", "ca"), keyring(kind), name=f"certified-{kind}")
    assert "llmops" in keys.ssh_keygen("-L", "-f", certificate)


@pytest.mark.parametrize("kind", keys.CA_KINDS)
def test_keys_of_every_ca_kind_certify(keyring: KeyRing, kind: str) -> None:
    ca = keyring(kind, "ca")
    certificate = sign_with_ssh_keygen(ca, keyring("ed25519"), name=f"certified-by-{kind}")
    assert ca.fingerprint in keys.ssh_keygen("-L", "-f", certificate)


@missing.needs_sshd
@pytest.mark.timeout(60)
@pytest.mark.parametrize("raft", [False, True], ids=["dev", "raft"])
def test_bao_signs(keyring: KeyRing, start_sshd: StartSshd, request: pytest.FixtureRequest, raft: bool) -> None:
    server: OpenBao = request.getfixturevalue("bao_raft" if raft else "bao")
    ca, user = keyring("ed25519", "ca"), keyring("ed25519")
    public_key = server.enable_ssh("parts", private_key=ca.private.read_text(), public_key=ca.public_line)
    server.write_role("llmops", "parts")
    token = server.token_for('path "parts/sign/llmops" { capabilities = ["update"] }', "parts")

    answer = server.sign(user.public_line, mount="parts", token=token)

    assert answer.status == 200, answer
    certificate = user.public.with_name(f"bao-{raft}-cert.pub")
    certificate.write_text(answer.body["data"]["signed_key"])
    assert start_sshd(public_key).login(identity=user.private, certificate=certificate).ok
    assert server.sign(user.public_line, mount="parts", token="wrong").status == 403
    assert server.audit_file.exists() == raft


def test_bao_makes_its_own_ca(bao: OpenBao, keyring: KeyRing) -> None:
    assert bao.enable_ssh("own-ca").startswith("ssh-ed25519 ")


def test_a_command_runs_without_standard_input() -> None:
    assert run(["cat"]).status == 0


def test_sshd_stops(keyring: KeyRing, start_sshd: StartSshd) -> None:
    sshd: Sshd = start_sshd(keyring("ed25519", "ca").public_line)
    sshd.stop()
    assert sshd.login().status == 255
