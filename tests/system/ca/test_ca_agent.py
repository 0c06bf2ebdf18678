"""The service with its CA key in a real ssh-agent, also one whose key is in a SoftHSM token: no key file anywhere."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from signer.ledger.reader import LedgerReader
from signer.ssh.certificate import decode_certificate
from tests.parts import builders, missing
from tests.parts.agents import Agent, SoftHsm
from tests.parts.builders import rotations
from tests.parts.eventually import eventually
from tests.parts.fake_vault import TOKEN, FakeVault
from tests.parts.keys import Key, KeyRing
from tests.parts.rotation import API_USER, KEEPER_USER, ca_lines, why_not_two_users
from tests.parts.service import STANDARD_POLICY, Service
from tests.parts.sshd import StartSshd

pytestmark = missing.needs_ssh_keygen


def service_with(folder: Path, ca: Key, agent: Agent, policy: str = STANDARD_POLICY, **environ: str) -> Service:
    """A service that has no key file and an agent."""
    settings = {"SIGNER_CA_KEY_SOURCE": "agent", "SIGNER_CA_AGENT_SOCKET": str(agent.socket), **environ}
    service = Service(folder, ca, policy, environ=settings)
    service.key_file.unlink()
    return service


@pytest.fixture
def agent() -> Iterator[Agent]:
    with Agent() as real:
        yield real


@pytest.fixture
def user(keyring: KeyRing) -> Key:
    return keyring("ed25519", "user")


def events(service: Service, kind: str) -> list[dict[str, Any]]:
    reader = LedgerReader(service.data_dir)
    try:
        return [json.loads(body) for (body,) in reader.query("SELECT body FROM events WHERE kind = ?", (kind,))]
    finally:
        reader.close()


def code_of(service: Service, user: Key) -> str:
    answer = service.sign(user.public_line)
    return "signed" if answer.status == 201 else str(answer.json()["code"])


def readiness(service: Service) -> str:
    answer = service.ask("GET", "/readyz")
    return "ready" if answer.status == 200 else str(answer.json()["code"])


def login(service: Service, sshd_folder: Path, user: Key, start_sshd: StartSshd, ca_line: str) -> None:
    """A login that a real sshd accepts."""
    answer = service.sign(user.public_line)
    assert answer.status == 201, answer.body
    certificate = sshd_folder / "login-cert.pub"
    certificate.write_text(answer.json()["certificate"] + "\n")
    sshd = start_sshd(ca_line)
    assert sshd.login(identity=user.private, certificate=certificate).ok, sshd.log()
    assert "(serial 1)" in sshd.log()


ALGORITHMS = {"ed25519": b"ssh-ed25519", "ecdsa256": b"ecdsa-sha2-nistp256", "rsa3072": b"rsa-sha2-512"}


@pytest.mark.parametrize("kind", ALGORITHMS)
@missing.needs_sshd
def test_a_key_in_an_agent_issues_certificates_that_open_a_host(
    tmp_path: Path, keyring: KeyRing, agent: Agent, user: Key, start_sshd: StartSshd, kind: str
) -> None:
    ca = keyring(kind, "ca")
    agent.add(keyring("ed25519", "another"), ca)
    with service_with(tmp_path / "service", ca, agent) as service:
        assert service.ask("GET", "/readyz").json()["ca_fingerprint"] == ca.fingerprint
        login(service, tmp_path, user, start_sshd, ca.public_line)
        signature = decode_certificate(builders.certificate_of(service.sign(user.public_line).json()))[2]
        assert signature[4:].startswith(ALGORITHMS[kind])
        assert events(service, "keeper.started")[0]["key_source"] == "agent"
        assert service.command("ledger", "verify").returncode == 0
        rows = json.loads(service.command("certs", "list", "--json").stdout)["certificates"]
        assert {row["status"] for row in rows} == {"active"}


@missing.needs_softhsm
@missing.needs_sshd
def test_a_key_in_a_softhsm_token_issues_certificates_that_open_a_host(
    tmp_path: Path, agent: Agent, user: Key, start_sshd: StartSshd
) -> None:
    token = SoftHsm(tmp_path / "hsm")
    with Agent(environ=token.environ) as hardware:
        public = tmp_path / "ca.pub"
        public.write_text(token.load_into(hardware) + "\n")
        ca = Key("ecdsa256", tmp_path / "nowhere", public)
        (tmp_path / "nowhere").touch()
        with service_with(tmp_path / "service", ca, hardware) as service:
            login(service, tmp_path, user, start_sshd, ca.public_line)
            for _ in range(5):
                assert code_of(service, user) == "signed"


def test_an_agent_that_dies_is_unavailable_and_recovers_without_a_restart(
    tmp_path: Path, keyring: KeyRing, agent: Agent, user: Key
) -> None:
    ca = keyring("ed25519", "ca")
    agent.add(ca)
    with service_with(tmp_path / "service", ca, agent) as service:
        assert code_of(service, user) == "signed"
        agent.kill()
        assert code_of(service, user) == "ca_agent_down"
        assert readiness(service) == "ca_agent_down"
        assert events(service, "certificate.withheld") == [{"serial": "2", "error": "ca_agent_down"}]
        agent.start()
        assert code_of(service, user) == "ca_agent_refused", "it holds nothing"
        eventually(lambda: readiness(service) == "ca_agent_key_missing", "the look finds it")
        agent.add(ca)
        eventually(lambda: readiness(service) == "ready", "the look finds it")
        assert code_of(service, user) == "signed"
        reader = LedgerReader(service.data_dir)
        assert reader.last_serial() == 4
        reader.close()


def test_an_agent_that_hangs_stalls_nothing_and_a_freeze_meanwhile_withholds(
    tmp_path: Path, keyring: KeyRing, agent: Agent, user: Key
) -> None:
    ca = keyring("ed25519", "ca")
    agent.add(ca)
    with service_with(tmp_path / "service", ca, agent) as service:
        agent.hang()
        began = time.monotonic()
        assert code_of(service, user) == "ca_agent_slow"
        assert time.monotonic() - began > 2.5
        found: list[str] = []
        threads = [threading.Thread(target=lambda: found.append(code_of(service, user))) for _ in range(4)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(events(service, "certificate.issued")) == 5, "they are recorded and wait")
        frozen = service.ask("POST", "/api/freezes", {"scope": "all", "reason": "drill"}, identity="operator")
        assert frozen.status == 201, frozen.body
        assert service.ask("GET", "/healthz").status == 200
        assert service.ask("GET", "/api/certificates", identity="deploy-agent").status == 200
        assert len(found) == 0, "the loop was held up until the agent was given up"
        agent.go_on()
        for thread in threads:
            thread.join(20)
        assert found == ["frozen"] * 4
        assert [body["error"] for body in events(service, "certificate.withheld")] == ["ca_agent_slow", *["frozen"] * 4]
        assert code_of(service, user) == "frozen"


def test_a_stop_with_signatures_under_way_records_that_they_are_withheld(
    tmp_path: Path, keyring: KeyRing, agent: Agent, user: Key
) -> None:
    ca = keyring("ed25519", "ca")
    agent.add(ca)
    with service_with(tmp_path / "service", ca, agent) as service:
        agent.hang()
        thread = threading.Thread(target=lambda: code_of(service, user))
        thread.start()
        eventually(lambda: events(service, "certificate.issued"), "it is recorded and waits")
        keeper = service.keeper_pid()
        assert keeper is not None
        os.kill(keeper, signal.SIGTERM)
        eventually(lambda: events(service, "keeper.stopped"), "the keeper ends")
        thread.join(20)
        assert events(service, "certificate.withheld") == [{"serial": "1", "error": "keeper_stopping"}]
        agent.go_on()


def test_the_pin_chooses_the_key_and_rotates_it(tmp_path: Path, keyring: KeyRing, agent: Agent, user: Key) -> None:
    old, new = keyring("ed25519", "ca"), keyring("ecdsa256", "new-ca")

    def policy(*keys: Key | None) -> str:
        pinned, following, *retired = keys
        assert pinned is not None
        lines = ca_lines(pinned, following, *(key for key in retired if key is not None))
        return STANDARD_POLICY.replace('fingerprint = "{ca}"', lines)

    agent.add(new, old)
    with service_with(tmp_path / "service", old, agent, policy(old, new)) as service:

        def reload() -> None:
            seen = reloads()
            os.kill(service.pid, signal.SIGHUP)
            eventually(lambda: reloads() > seen, "it reads again")

        def reloads() -> int:
            return len(events(service, "policy.loaded")) + len(events(service, "policy.refused"))

        def in_use() -> str:
            return str(service.sign(user.public_line).json()["ca_fingerprint"])

        assert in_use() == old.fingerprint, "the next key is there and not taken"
        service.write_policy(policy(new, None, old))
        reload()
        assert in_use() == new.fingerprint
        assert rotations(events(service, "ca.rotated")) == [{"from": old.fingerprint, "to": new.fingerprint}]
        agent.remove(old)
        service.write_policy(policy(old, None, new))
        reload()
        assert in_use() == new.fingerprint, "a key that is not there is not taken"
        assert [body["code"] for body in events(service, "ca.refused")] == ["ca_agent_key_missing"]
        assert [body["code"] for body in events(service, "policy.refused")] == ["policy_pins_another_key"]


def test_in_shadow_mode_the_agents_key_is_compared_with_and_needed_at_the_start_alone(
    tmp_path: Path, keyring: KeyRing, agent: Agent, user: Key
) -> None:
    ca = keyring("ecdsa256", "ca")
    agent.add(ca)
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(TOKEN)
    with FakeVault() as vault:
        environ = {"SIGNER_MODE": "shadow", "SIGNER_VAULT_ADDR": vault.address, "SIGNER_VAULT_TOKEN_FILE": str(token)}
        with service_with(tmp_path / "service", ca, agent, **environ) as service:
            agent.kill()
            ready = service.ask("GET", "/readyz").json()
            assert (ready["mode"], ready["local_ca_fingerprint"]) == ("shadow", ca.fingerprint)
            answer = service.sign(user.public_line)
            assert answer.status == 201, answer.body
            assert decode_certificate(builders.certificate_of(answer.json()))[0].ca_key == vault.ca.blob
            assert [body["field"] for body in events(service, "shadow.difference")] == ["key_id"]


def test_without_the_pinned_key_there_is_no_start(tmp_path: Path, keyring: KeyRing, agent: Agent) -> None:
    agent.add(keyring("ed25519", "another"))
    service = service_with(tmp_path / "service", keyring("ed25519", "ca"), agent)
    service.run_dir.mkdir(mode=0o700)
    service.data_dir.mkdir(mode=0o700)
    done = service.command("serve")
    assert done.returncode == 1
    assert "the ssh-agent does not hold the CA key" in done.stderr
    assert not list(service.data_dir.iterdir()), "a start that fails leaves a ledger"


def test_the_verbs_know_that_there_is_no_file(tmp_path: Path, keyring: KeyRing, agent: Agent) -> None:
    ca = keyring("ed25519", "ca")
    service = service_with(tmp_path / "service", ca, agent)

    def checks() -> dict[str, str]:
        told = json.loads(service.command("check", "--json").stdout)["checks"]
        return {check["code"]: check["outcome"] for check in told if check["code"].startswith("ca_")}

    assert checks() == {"ca_agent": "ok", "ca_agent_key_missing": "fail"}
    agent.add(ca)
    assert checks() == {"ca_agent": "ok", "ca_agent_key": "ok"}
    assert service.command("ca", "bundle").stdout.split()[:2] == ca.public_line.split()[:2]
    rendered = service.command("ca", "render", "--to", str(service.key_file))
    assert (rendered.returncode, service.key_file.exists()) == (1, False)
    assert "there is nothing to render" in rendered.stderr
    agent.kill()
    assert checks() == {"ca_agent_down": "fail"}
    assert service.command("ca", "bundle").returncode == 1


@missing.needs_root
def test_as_two_users_the_agent_is_the_keepers_and_nobody_elses(
    keyring: KeyRing, user: Key, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if reason := why_not_two_users():
        pytest.skip(reason)
    ca = keyring("ed25519", "ca")
    for owner, works in ((KEEPER_USER, True), (API_USER, False)):
        with Agent(user=owner) as agent:
            agent.add(ca)
            users = {"SIGNER_KEEPER_USER": KEEPER_USER, "SIGNER_API_USER": API_USER}
            service = service_with(agent.folder / "service", ca, agent, **users)
            for path in (agent.folder, service.folder):
                path.chmod(0o755)
            service.policy_file.chmod(0o644)
            if not works:
                # ssh-agent itself turns away whoever is neither root nor its own user.
                named = f"the ssh-agent of the CA key ({agent.socket}, SIGNER_CA_AGENT_SOCKET)"
                assert f"{named} cannot be reached: permission denied" in service.command("serve").stderr
                agent.socket.chmod(0o666)
                assert f"{named} runs as user" in service.command("serve").stderr
                continue
            with service:
                assert code_of(service, user) == "signed"
                assert service.command("check").returncode == 0
