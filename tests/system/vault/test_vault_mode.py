"""`SIGNER_MODE=vault`, whole: our service in front of a real OpenBao, and in front of one that hangs or lies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.parts import missing
from tests.parts.eventually import eventually
from tests.parts.fake_vault import TOKEN, FakeVault, ForeignCa
from tests.parts.keys import KeyRing, ssh_keygen
from tests.parts.lying_worker import LyingWorker, read_reply
from tests.parts.openbao import OpenBao
from tests.parts.service import Answer, Service
from tests.parts.sshd import StartSshd
from tests.parts.vault_mode import RIGHTS, no_secret_in, recorded, write_token

StartInFront = Callable[..., Service]


@pytest.fixture
def in_front(tmp_path: Path, keyring: KeyRing) -> Iterator[StartInFront]:
    """`in_front(address, token)`: our service in mode vault, without any CA key of its own."""
    with contextlib.ExitStack() as running:

        def start(address: str, token: str, *, mount: str = "ssh", **environ: str) -> Service:
            token_file = tmp_path / "vault-token"
            write_token(token_file, token)
            settings = {
                "SIGNER_MODE": "vault",
                "SIGNER_VAULT_ADDR": address,
                "SIGNER_VAULT_TOKEN_FILE": str(token_file),
                "SIGNER_VAULT_MOUNT": mount,
                **environ,
            }
            service = Service(tmp_path / "service", keyring("ed25519", "ca"), environ=settings)
            service.key_file.unlink()
            return running.enter_context(service)

        yield start


@pytest.fixture
def fake() -> Iterator[FakeVault]:
    with FakeVault() as server:
        yield server
        assert not server.violations


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[OpenBao]:
    """An OpenBao of the test's own, which it may stop and seal."""
    if reason := missing.bao():
        pytest.skip(reason)
    with OpenBao(tmp_path / "bao") as server:
        yield server


def prepare(bao: OpenBao, mount: str = "ssh", *, key_type: str = "", ttl: str = "1h") -> str:
    """A mount with a CA key and the role llmops; the token that may use it."""
    bao.enable_ssh(mount, key_type=key_type)
    bao.write_role(mount=mount)
    return bao.token_for(RIGHTS.format(mount=mount), name=mount, ttl=ttl)


def code_of(answer: Answer) -> str:
    assert answer.status >= 400, answer.body
    return str(answer.json()["code"])


def readiness(service: Service) -> str:
    """`ready`, or the code of what is wrong."""
    answer = service.ask("GET", "/readyz")
    return "ready" if answer.status == 200 else code_of(answer)


def becomes(service: Service, wanted: str) -> None:
    eventually(lambda: readiness(service) == wanted, f"/readyz says {wanted}, not {readiness(service)}")


# --- with a real OpenBao ---------------------------------------------------------------------------------------------


@missing.needs_bao
@missing.needs_sshd
def test_a_certificate_that_vault_signed_opens_a_real_sshd_and_is_in_the_ledger(
    bao: OpenBao, in_front: StartInFront, start_sshd: StartSshd, keyring: KeyRing
) -> None:
    token = prepare(bao, "mode-login")
    service = in_front(bao.address, token, mount="mode-login")
    assert not service.key_file.exists()
    user = keyring("ed25519", "user")
    answer = service.sign(user.public_line)
    assert answer.status == 201, answer.body
    certificate = service.folder / "user-cert.pub"
    certificate.write_text(answer.json()["certificate"] + "\n")
    ca = service.ask("GET", "/api/ca").body.decode()
    assert start_sshd(ca.strip()).login("true", identity=user.private, certificate=certificate).ok
    serial = answer.json()["serial"]
    row = recorded(service)[serial]
    assert (row["backend"], row["identity"], row["principals"]) == ("vault", "deploy-agent", ["llmops"])
    listed = service.command("certs", "list").stdout.splitlines()
    assert listed[0].split()[:3] == ["SERIAL", "SIGNED", "BY"]
    assert listed[1].split()[:2] == [serial, "vault"]
    assert service.command("ledger", "verify").returncode == 0
    no_secret_in(service, token, service.tokens["deploy-agent"])


@missing.needs_bao
@pytest.mark.parametrize("ca_kind", ["ed25519", "ecdsa-sha2-nistp256", "ssh-rsa"])
def test_every_ca_kind_signs_every_user_kind(
    bao: OpenBao, in_front: StartInFront, keyring: KeyRing, ca_kind: str, tmp_path: Path
) -> None:
    mount = f"kind-{ca_kind}"
    service = in_front(bao.address, prepare(bao, mount, key_type=ca_kind), mount=mount)
    for kind in ("ed25519", "ecdsa256", "rsa3072", "sk-ed25519"):
        answer = service.sign(keyring(kind).public_line)
        assert answer.status == 201, answer.body
        certificate = tmp_path / f"{kind}-cert.pub"
        certificate.write_text(answer.json()["certificate"] + "\n")
        assert f"Serial: {answer.json()['serial']}" in ssh_keygen("-L", "-f", certificate)


@missing.needs_bao
def test_both_shapes_tell_vaults_faults_with_status_and_retry_after(
    vault: OpenBao, in_front: StartInFront, keyring: KeyRing
) -> None:
    service = in_front(vault.address, prepare(vault))
    line = keyring("ed25519").public_line
    shaped = service.ask("POST", "/v1/ssh/sign/llmops", {"public_key": line}, identity="deploy-agent")
    assert shaped.status == 200, shaped.body
    assert shaped.json()["data"]["signed_key"].startswith("ssh-ed25519-cert-v01@openssh.com ")
    vault.must("DELETE", "ssh/roles/llmops")
    native = service.sign(line)
    assert (native.status, code_of(native), native.headers["retry-after"]) == (503, "vault_role_missing", "1")
    shaped = service.ask("POST", "/v1/ssh/sign/llmops", {"public_key": line}, identity="deploy-agent")
    assert (shaped.status, shaped.headers["retry-after"]) == (503, "1")
    assert [error.partition(";")[0] for error in shaped.json()["errors"]] == ["Vault has no role of that name"]
    vault.write_role(allowed_users="somebody-else")
    native = service.sign(line)
    assert (native.status, code_of(native)) == (500, "vault_refused")
    vault.write_role(not_before_duration="10m")
    native = service.sign(line)
    assert (native.status, code_of(native)) == (500, "vault_outside_grant")
    assert "retry-after" not in native.headers
    shaped = service.ask("POST", "/v1/ssh/sign/llmops", {"public_key": line}, identity="deploy-agent")
    assert shaped.status == 500
    assert isinstance(shaped.json()["errors"], list)
    vault.write_role()
    assert service.sign(line).status == 201


@missing.needs_bao
def test_the_service_recovers_by_itself_from_all_that_befalls_vault(
    vault: OpenBao, in_front: StartInFront, keyring: KeyRing, tmp_path: Path
) -> None:
    token = prepare(vault)
    service = in_front(vault.address, token)
    token_file, line = tmp_path / "vault-token", keyring("ed25519").public_line

    assert service.sign(line).status == 201
    # another CA key: taken at once
    vault.must("DELETE", "ssh/config/ca")
    assert code_of(service.sign(line)) == "vault_ca_unknown"
    becomes(service, "vault_ca_unknown")
    vault.must("POST", "ssh/config/ca", {"generate_signing_key": True, "key_type": "ed25519"})
    assert service.sign(line).status == 201
    published = str(vault.must("GET", "ssh/config/ca")["data"]["public_key"]).split()[1]
    assert service.ask("GET", "/api/ca").body.decode().split()[1] == published
    becomes(service, "ready")
    # a token that is revoked, and a new one in its file
    vault.must("POST", "auth/token/revoke", {"token": token})
    assert code_of(service.sign(line)) == "vault_forbidden"
    becomes(service, "vault_forbidden")
    fresh = vault.token_for(RIGHTS.format(mount="ssh"), name="ssh")
    write_token(token_file, fresh)
    assert service.sign(line).status == 201
    becomes(service, "ready")
    # a token without the right to sign
    weak = vault.token_for('path "ssh/config/ca" { capabilities = ["read"] }', name="weak")
    vault.must("POST", "auth/token/revoke", {"token": fresh})
    write_token(token_file, weak)
    assert code_of(service.sign(line)) == "vault_forbidden"
    write_token(token_file, vault.token_for(RIGHTS.format(mount="ssh"), name="ssh"))
    assert service.sign(line).status == 201
    # the mount is gone
    vault.must("DELETE", "sys/mounts/ssh")
    assert code_of(service.sign(line)) == "vault_mount_missing"
    becomes(service, "vault_mount_missing")
    write_token(token_file, prepare(vault))
    assert service.sign(line).status == 201
    becomes(service, "ready")
    no_secret_in(service, token, fresh, weak)


@missing.needs_bao
def test_a_sealed_a_stopped_and_a_restarted_vault(tmp_path: Path, in_front: StartInFront, keyring: KeyRing) -> None:
    line = keyring("ed25519").public_line
    with OpenBao(tmp_path / "bao", raft=True) as vault:
        made: dict[str, Any] = {}
        service = in_front(vault.address, prepare(vault))
        assert service.sign(line).status == 201
        vault.must("PUT", "sys/seal", made)
        assert code_of(service.sign(line)) == "vault_sealed"
        becomes(service, "vault_sealed")
        os.kill(vault.pid, signal.SIGSTOP)
        answer = service.sign(line)
        assert (answer.status, code_of(answer)) == (503, "vault_slow")
        becomes(service, "vault_slow")
        os.kill(vault.pid, signal.SIGCONT)
        becomes(service, "vault_sealed")
    becomes(service, "vault_down")
    assert code_of(service.sign(line)) == "vault_down"


@missing.needs_bao
def test_a_service_that_started_before_vault_serves_once_it_is_there(
    tmp_path: Path, in_front: StartInFront, keyring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = keyring("ed25519").public_line
    with OpenBao(tmp_path / "bao") as vault:
        address, port = vault.address, vault.port
    monkeypatch.setattr(Service, "is_ready", _answers)
    service = in_front(address, TOKEN)
    assert readiness(service) == "vault_down"
    assert code_of(service.ask("GET", "/api/ca")) == "vault_down"
    assert code_of(service.sign(line)) == "vault_down"
    monkeypatch.setattr("tests.parts.ports.free_port", lambda: port)
    with OpenBao(tmp_path / "bao") as vault:
        write_token(tmp_path / "vault-token", prepare(vault))
        becomes(service, "ready")
        assert service.sign(line).status == 201


def _answers(service: Service) -> bool:
    try:
        return bool(service.ask("GET", "/healthz").status == 200)
    except OSError:
        return False


@missing.needs_bao
def test_a_short_token_outlives_its_ttl_several_times(vault: OpenBao, in_front: StartInFront, keyring: KeyRing) -> None:
    token = prepare(vault, ttl="6s")
    service = in_front(vault.address, token)
    end = time.monotonic() + 14
    while time.monotonic() < end:
        answer = service.sign(keyring("ed25519").public_line)
        assert answer.status == 201, answer.body
        time.sleep(0.5)
    assert readiness(service) == "ready"


@missing.needs_bao
def test_check_looks_at_the_token_and_at_vault_and_needs_no_key(
    bao: OpenBao, in_front: StartInFront, tmp_path: Path
) -> None:
    service = in_front(bao.address, prepare(bao, "mode-check"), mount="mode-check")

    def check() -> dict[str, str]:
        done = service.command("check", "--json")
        assert TOKEN not in done.stdout + done.stderr
        return {row["code"]: row["outcome"] for row in json.loads(done.stdout)["checks"]}

    def before_and_after() -> list[tuple[str, int, int]]:
        return sorted((str(p), p.lstat().st_mode, p.lstat().st_mtime_ns) for p in tmp_path.glob("vault-*"))

    was = before_and_after()
    found = check()
    assert found["vault_token"] == found["vault_ca"] == "ok"
    assert not [code for code in found if code.startswith("ca_key")]
    assert before_and_after() == was
    write_token(tmp_path / "vault-token", TOKEN)
    assert check()["vault_forbidden"] == "warn"
    (tmp_path / "vault-token").chmod(0o644)
    assert check()["vault_token_not_private"] == "fail"
    (tmp_path / "vault-token").unlink()
    assert check()["vault_token_unreadable"] == "fail"


# --- with a Vault that hangs or lies ---------------------------------------------------------------------------------


@dataclass
class Signers:
    """Sign requests from threads of their own."""

    service: Service
    line: str
    answers: list[Answer] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, count: int) -> None:
        for _ in range(count):
            thread = threading.Thread(target=self._ask, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _ask(self) -> None:
        with contextlib.suppress(OSError):  # a service that ends may end the connection; the test looks at answers
            self.answers.append(self.service.sign(self.line))

    def join(self) -> list[str]:
        """The code of each answer, `signed` for a certificate."""
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a request hangs"
        return sorted("signed" if answer.status == 201 else code_of(answer) for answer in self.answers)


def test_mode_vault_after_a_cutover_signs_and_warns_until_the_way_back_is_recorded(
    fake: FakeVault, in_front: StartInFront, keyring: KeyRing
) -> None:
    service = in_front(fake.address, TOKEN)

    def record(operation: str) -> None:
        body = {"operation": operation, "outcome": "applied"}
        assert service.ask("POST", "/api/operations", body, identity="operator").status == 201

    def warns() -> list[bool]:
        status = service.command("status", "--json")
        warnings = service.ask("GET", "/readyz").json().get("warnings", [])
        told = [*warnings], json.loads(status.stdout)["notes"], service.log().splitlines()
        return [any("but the cutover of" in text for text in texts) for texts in told]

    assert warns() == [False, False, False]
    record("cutover")
    assert warns() == [True, True, False]
    service.stop()
    service.start()
    assert warns() == [True, True, True]
    assert service.sign(keyring("ed25519").public_line).status == 201
    assert readiness(service) == "ready"
    record("rollback")
    assert warns()[:2] == [False, False]


@pytest.mark.parametrize("fault", ["hang", "drip headers", "drip a body"])
def test_while_vault_hangs_everything_else_is_answered_and_afterwards_it_signs(
    fake: FakeVault, in_front: StartInFront, keyring: KeyRing, fault: str
) -> None:
    line = keyring("ed25519").public_line
    service = in_front(fake.address, TOKEN)
    assert service.sign(line).status == 201
    fake.fault = {"sign": fault}
    signers = Signers(service, line)
    signers.start(12)
    eventually(lambda: "sign" in fake.asked[1:], "requests are out")
    answered_meanwhile = 0
    while not signers.answers:
        for method, path, body in (
            ("GET", "/api/ledger/head", None),
            ("GET", "/api/certificates", None),
            ("POST", "/api/freezes", {"scope": "identity:stranger", "reason": "drill"}),
            ("GET", "/readyz", None),
            ("GET", "/healthz", None),
        ):
            answer = service.ask(method, path, body, identity="operator")
            assert answer.status < 300, answer.body
            answered_meanwhile += not signers.answers
    assert answered_meanwhile >= 5, "nothing else was answered while Vault hung"
    assert set(signers.join()) == {"vault_slow"}
    fake.fault = {}
    again = Signers(service, line)
    again.start(12)
    assert again.join() == ["signed"] * 12, "no thread is lost"
    assert len(recorded(service)) == 13


def test_many_who_wait_for_a_vault_that_hangs_leave_the_api_room(
    fake: FakeVault, in_front: StartInFront, keyring: KeyRing
) -> None:
    line = keyring("ed25519").public_line
    service = in_front(fake.address, TOKEN, SIGNER_THREADS="4")
    fake.fault = {"sign": "hang"}
    first = Signers(service, line)
    first.start(3)
    eventually(lambda: fake.asked.count("sign") == 3, "three are out")
    time.sleep(1.2)
    assert code_of(service.sign(line)) == "vault_busy"
    assert service.ask("GET", "/api/ledger/head", identity="operator").status == 200
    assert set(first.join()) == {"vault_slow"}


def sign_message(service: Service, line: str) -> bytes:
    """What the api sends to the keeper for a native sign request."""
    header = {"op": "sign", "role": "llmops", "token": service.tokens["deploy-agent"], "request_id": "r-1"}
    return json.dumps(header).encode() + b"\n" + json.dumps({"public_key": line}).encode()


def test_more_than_64_who_wait_are_told_so(fake: FakeVault, in_front: StartInFront, keyring: KeyRing) -> None:
    service = in_front(fake.address, TOKEN, SIGNER_THREADS="100")
    fake.fault = {"sign": "hang"}
    message = sign_message(service, keyring("ed25519").public_line)
    with LyingWorker(service.socket) as worker:
        asking = [worker.connect() for _ in range(90)]
        for connection in asking:
            connection.send(message)
        replies = [read_reply(connection) for connection in asking]
    assert Counter(reply["error"]["code"] for reply in replies) == {"vault_slow": 64, "vault_busy": 26}


SPOILED: dict[str, Callable[[Any], Any]] = {
    "principal": lambda fields: replace(fields, principals=("llmops", "root")),
    "no principal": lambda fields: replace(fields, principals=()),
    "host": lambda fields: replace(fields, cert_type=2),
    "for ever": lambda fields: replace(fields, valid_before=2**64 - 1),
    "early": lambda fields: replace(fields, valid_after=0),
    "extension": lambda fields: replace(fields, extensions=(("permit-agent-forwarding", ""),)),
    "option": lambda fields: replace(fields, critical_options=(("force-command", "/bin/sh"),)),
    "key": lambda fields: replace(fields, key=ForeignCa(name="mallory").blob),
    "ca": lambda fields: replace(fields, ca_key=ForeignCa(name="mallory").blob),
    "key id": lambda fields: replace(fields, key_id="a\nb"),
}


def test_a_vault_that_gives_more_than_was_granted_gives_nothing(
    fake: FakeVault, in_front: StartInFront, keyring: KeyRing
) -> None:
    service = in_front(fake.address, TOKEN)
    for what, spoil in SPOILED.items():
        fake.tamper = spoil
        answer = service.sign(keyring("ed25519").public_line)
        assert (answer.status, code_of(answer)) == (500, "vault_outside_grant"), what
        assert b"cert-v01" not in answer.body
    assert recorded(service) == {}
    events = [json.loads(line) for line in service.command("ledger", "export").stdout.splitlines()]
    assert "vault_outside_grant" in json.dumps(events)


def with_serial(serial: int) -> Callable[[Any], Any]:
    return lambda fields: replace(fields, serial=serial)


def test_serials_above_2_to_the_63_are_the_same_number_everywhere(
    fake: FakeVault, in_front: StartInFront, keyring: KeyRing
) -> None:
    service = in_front(fake.address, TOKEN)
    line = keyring("ed25519").public_line
    for serial in (2**63 - 1, 2**63, 2**64 - 1, 0):
        fake.tamper = with_serial(serial)
        assert service.sign(line).json()["serial"] == str(serial)
        found = service.ask("GET", f"/api/certificates/{serial}", identity="operator")
        assert (found.status, found.json()["serial"], found.json()["backend"]) == (200, str(serial), "vault")
        shown = service.command("certs", "show", str(serial), "--json")
        assert json.loads(shown.stdout)["serial"] == str(serial)
        assert str(serial) in recorded(service)
    fake.tamper = with_serial(2**63 + 77)
    shaped = service.ask("POST", "/v1/ssh/sign/llmops", {"public_key": line}, identity="deploy-agent")
    assert shaped.json()["data"]["serial_number"] == f"{2**63 + 77:x}"
    assert service.ask("GET", f"/api/certificates/{2**64}", identity="operator").status == 400
    assert service.command("ledger", "verify").returncode == 0


def test_a_serial_of_vaults_that_comes_twice_is_not_released_and_stops_nothing(
    fake: FakeVault, in_front: StartInFront, keyring: KeyRing
) -> None:
    service = in_front(fake.address, TOKEN)
    line = keyring("ed25519").public_line
    fake.tamper = with_serial(7)
    assert service.sign(line).status == 201
    assert code_of(service.sign(line)) == "vault_outside_grant"
    fake.tamper = lambda fields: fields
    assert service.sign(line).status == 201


def test_what_was_frozen_while_vault_signed_is_not_released(
    fake: FakeVault, in_front: StartInFront, keyring: KeyRing
) -> None:
    service = in_front(fake.address, TOKEN)
    go_on = threading.Event()

    def wait(fields: Any) -> Any:
        assert go_on.wait(20)
        return fields

    fake.tamper = wait
    signers = Signers(service, keyring("ed25519").public_line)
    signers.start(1)
    eventually(lambda: "sign" in fake.asked, "the request is out")
    frozen = service.ask("POST", "/api/freezes", {"scope": "all", "reason": "drill"}, identity="operator")
    assert frozen.status == 201
    go_on.set()
    assert signers.join() == ["frozen"]
    assert recorded(service) == {}


# --- the end of a process --------------------------------------------------------------------------------------------


def test_sigterm_with_requests_out_ends_the_service_in_time_and_loses_nothing(
    fake: FakeVault, in_front: StartInFront, keyring: KeyRing
) -> None:
    service = in_front(fake.address, TOKEN)
    fake.fault = {"sign": "hang"}
    signers = Signers(service, keyring("ed25519").public_line)
    signers.start(10)
    eventually(lambda: fake.asked.count("sign") >= 8, "requests are out")
    assert service.stop() == 0
    assert "was killed" not in service.log()
    signers.join()
    assert service.command("ledger", "verify").returncode == 0
    kinds = [json.loads(line)["kind"] for line in service.command("ledger", "export").stdout.splitlines()]
    assert kinds[-1] == "keeper.stopped"


def test_a_keeper_alone_answers_what_is_out_before_it_ends(
    fake: FakeVault, in_front: StartInFront, keyring: KeyRing
) -> None:
    service = in_front(fake.address, TOKEN)
    fake.fault = {"sign": "hang"}
    with LyingWorker(service.socket) as worker:
        connection = worker.connect()
        connection.send(sign_message(service, keyring("ed25519").public_line))
        eventually(lambda: "sign" in fake.asked, "the request is out")
        keeper = service.keeper_pid()
        assert keeper is not None
        os.kill(keeper, signal.SIGTERM)
        assert read_reply(connection)["error"]["code"] == "keeper_stopping"
    becomes(service, "ready")


def test_no_certificate_is_released_unrecorded_when_the_keeper_is_killed(
    fake: FakeVault, in_front: StartInFront, keyring: KeyRing
) -> None:
    service = in_front(fake.address, TOKEN)
    line = keyring("ed25519").public_line
    serials: list[str] = []
    for _ in range(8):
        signers = Signers(service, line)
        fake.asked.clear()
        signers.start(12)
        eventually(lambda: "sign" in fake.asked, "requests are out")
        keeper = service.keeper_pid()
        if keeper is not None:
            os.kill(keeper, signal.SIGKILL)
        signers.join()
        serials += [answer.json()["serial"] for answer in signers.answers if answer.status == 201]
        becomes(service, "ready")
    assert service.sign(line).status == 201
    assert set(serials) <= recorded(service).keys()
    assert len(set(serials)) == len(serials)
    assert service.command("ledger", "verify").returncode == 0


# --- what the other mode does not pay --------------------------------------------------------------------------------


def test_mode_local_loads_neither_hvac_nor_requests() -> None:
    program = (
        "import sys, signer.service.startup, signer.service.checks\n"
        "print({'hvac', 'requests', 'urllib3'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
