"""`signer check` beside a real service, and where a start would fail: it says what the start would say."""

from __future__ import annotations

import json
import os
import pwd
import socket
from pathlib import Path

import pytest

from tests.parts import missing, ports, rotation
from tests.parts.keys import Key, KeyRing
from tests.parts.rotation import rotating_service, two_users_service
from tests.parts.selfsigned import write_certificate
from tests.parts.service import Service


@pytest.fixture
def ca(keyring: KeyRing) -> Key:
    return keyring("ed25519", "ca")


def found(service: Service) -> dict[str, tuple[str, str]]:
    """Outcome and detail of each check, by its code."""
    done = service.command("check", "--json")
    checks = json.loads(done.stdout)["checks"]
    assert done.returncode == int(any(check["outcome"] == "fail" for check in checks))
    return {check["code"]: (check["outcome"], check["detail"]) for check in checks}


def test_beside_a_healthy_service_all_is_well(ca: Key) -> None:
    with rotating_service(ca) as world:
        outcomes = found(world.service)
        assert "fail" not in {outcome for outcome, _ in outcomes.values()}, outcomes
        assert f"in use while `signer serve`, process {world.service.pid} runs" in outcomes["listen"][1]
        assert not list(world.service.data_dir.glob(".signer-check*"))


def test_a_port_of_another_process_is_named_by_check_and_ends_the_start(tmp_path: Path, ca: Key) -> None:
    service = Service(tmp_path / "s", ca)
    with socket.socket() as other:
        other.bind((ports.LOOPBACK, service.port))
        other.listen()
        assert found(service)["listen_in_use"][0] == "fail"
        done = service.command("serve")
        assert done.returncode == 1
        assert f"cannot listen on {ports.LOOPBACK}:{service.port}: Address already in use" in done.stderr
        assert "serving on" not in done.stderr
    assert "listen_in_use" not in found(service)
    assert not service.data_dir.exists()


def test_a_unix_socket_is_tried_in_its_directory(tmp_path: Path, ca: Key) -> None:
    path = tmp_path / "place" / "api.sock"
    service = Service(tmp_path / "s", ca, environ={"SIGNER_LISTEN": f"unix:{path}"})
    assert found(service)["listen_failed"][0] == "fail"
    path.parent.mkdir()
    assert found(service)["listen"][0] == "ok"
    assert list(path.parent.iterdir()) == []
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        assert found(service)["listen_in_use"][0] == "fail"


def test_half_a_tls_pair_is_found_before_the_start(tmp_path: Path, ca: Key) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    certificate, _ = write_certificate(tmp_path / "one")
    _, other_key = write_certificate(tmp_path / "two")
    environ = {"SIGNER_TLS_CERT_FILE": str(certificate), "SIGNER_TLS_KEY_FILE": str(other_key)}
    outcome, detail = found(Service(tmp_path / "s", ca, environ=environ))["tls_pair_refused"]
    assert (outcome, detail) == ("fail", "certificate and key do not belong together")


@missing.needs_root
def test_directories_are_tried_as_the_user_that_will_use_them(ca: Key, tmp_path: Path) -> None:
    with two_users_service(ca) as service:
        service.stop()
        assert found(service)["data_dir"][0] == "ok"
        service.folder.chmod(0o700)  # its owner is root: the keeper's user gets no further
        try:
            assert found(service)["data_dir_not_writable"] == (
                "fail",
                f"{service.data_dir} (SIGNER_DATA_DIR): {os.strerror(13)}",
            )
        finally:
            service.folder.chmod(0o755)
        service.start()


@missing.needs_root
def test_directories_that_do_not_exist_yet_must_be_within_reach_of_the_users_that_will_use_them(ca: Key) -> None:
    with two_users_service(ca) as service:
        service.stop()
        closed = service.folder / "closed"
        closed.mkdir(mode=0o700)
        for code in ("data_dir", "run_dir"):
            before = getattr(service, code)
            setattr(service, code, closed / code)
            outcome, detail = found(service)[f"{code}_unusable"]
            assert outcome == "fail"
            assert f"cannot pass {closed}: {os.strerror(13)}" in detail
            assert service.command("serve").returncode == 1  # as check says
            setattr(service, code, before)
        service.start()


@missing.needs_root
def test_the_policy_is_read_as_the_user_that_reloads_it(ca: Key) -> None:
    with two_users_service(ca) as service:
        assert "policy_unreadable" not in found(service)
        for mode in (0o600, 0o640):  # of root's group, in which the keeper's user is not
            service.policy_file.chmod(mode)
            outcome, detail = found(service)["policy_unreadable"]
            assert outcome == "warn"
            assert f"{service.policy_file} (SIGNER_POLICY_FILE) cannot be read: {os.strerror(13)}" in detail
            assert service.command("reload").returncode == 1  # as check says
        service.policy_file.chmod(0o644)
        assert "policy_unreadable" not in found(service)
        assert service.command("reload").returncode == 0


@missing.needs_root
def test_what_opens_vault_is_read_as_the_user_that_asks_it(ca: Key) -> None:
    with two_users_service(ca) as service:
        token, authority = service.folder / "vault-token", service.folder / "vault-ca"
        token.write_text("hvs.x")
        token.chmod(0o400)
        authority.write_text("x")
        authority.chmod(0o640)  # of root's group
        vault = {"SIGNER_MODE": "vault", "SIGNER_VAULT_ADDR": f"http://{ports.LOOPBACK}:9"}
        names = {"SIGNER_VAULT_TOKEN_FILE": str(token), "SIGNER_VAULT_CA_FILE": str(authority)}
        other = Service(service.folder / "other", ca, environ=service.environment() | vault | names)
        assert found(other)["vault_ca_file_unreadable"][0] == "fail"
        authority.chmod(0o644)
        outcome, detail = found(other)["vault_token_unreadable"]
        assert outcome == "fail"
        assert f"{token} (SIGNER_VAULT_TOKEN_FILE) cannot be opened: {os.strerror(13)}" in detail
        os.chown(token, pwd.getpwnam(rotation.KEEPER_USER).pw_uid, -1)
        assert found(other)["vault_token"][0] == "ok"


@pytest.mark.parametrize("name", ["SIGNER_CA_AGENT_SOCKET", "SIGNER_NOTICES_DIR", "SIGNER_POLICY_FILE"])
def test_a_path_that_cannot_be_used_is_named_with_its_setting(ca: Key, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x = = y\n")
    path = tmp_path / "file" if name == "SIGNER_POLICY_FILE" else tmp_path / "file" / "below"
    notices = tmp_path / "notices.toml"
    notices.write_text('[channels.chat]\nkind = "slack"\nurl = "https://chat.example/s3cr3t"\n')
    notices.chmod(0o400)
    environ = {"SIGNER_NOTICES_FILE": str(notices), "SIGNER_CA_KEY_SOURCE": "agent", name: str(path)}
    if os.geteuid() == 0:
        environ["SIGNER_NOTICES_USER"] = "root"
    done = Service(tmp_path / "s", ca, environ=environ).command("check")
    assert done.returncode == 1
    assert [line for line in done.stdout.splitlines() if str(path) in line and name in line]


def test_channels_are_read_as_the_user_that_sends_to_them(ca: Key, tmp_path: Path) -> None:
    file = tmp_path / "notices.toml"
    file.write_text('[channels.chat]\nkind = "slack"\nurl = "http://chat.example/s3cr3t"\n')
    file.chmod(0o400)
    environ = {"SIGNER_NOTICES_FILE": str(file), "SIGNER_NOTICES_DIR": str(tmp_path / "sender")}
    if os.geteuid() == 0:
        environ["SIGNER_NOTICES_USER"] = "root"
    service = Service(tmp_path / "s", ca, environ=environ)
    outcome, detail = found(service)["notices_file_refused"]
    assert (outcome, "plain http to another machine" in detail, "s3cr3t" in detail) == ("fail", True, False)
    file.chmod(0o644)
    assert found(service)["notices_file_not_private"][0] == "fail"
    file.write_text('[channels.chat]\nkind = "slack"\nurl = "https://chat.example/s3cr3t"\n')
    file.chmod(0o400)
    assert found(service)["notices"] == ("ok", "chat (slack); `signer notices test` sends one to each")
