"""What an operator does to the running service, and what its limits are."""

from __future__ import annotations

import http.client
import json
import os
import pwd
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from signer.authority.core import Core
from signer.ca.backends import FileBackend
from signer.ca.key import load_ca_key
from signer.errors import SignerError
from signer.ledger.audit import verify
from signer.ledger.pages import CertificateReader
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME
from signer.ledger.store import Ledger as RealLedger
from signer.model import Filter
from signer.policy.file import load_policy
from signer.protocol.commands import Sign, read_command, split_message
from signer.protocol.replies import Certificate
from tests.parts import missing, ports
from tests.parts.keys import KeyRing
from tests.parts.lying_worker import LyingWorker
from tests.parts.service import STANDARD_POLICY, Service, StartService


@pytest.fixture
def line(keyring: KeyRing) -> str:
    return keyring("ed25519").public_line


def eventually(what: Callable[[], bool], service: Service) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline, service.log()[-2000:]
        time.sleep(0.02)


def keeper_of(service: Service) -> int:
    keeper = service.keeper_pid()
    assert keeper is not None
    return keeper


def events(service: Service, kind: str) -> list[dict[str, Any]]:
    reader = LedgerReader(service.data_dir)
    try:
        return [json.loads(body) for (body,) in reader.query("SELECT body FROM events WHERE kind = ?", (kind,))]
    finally:
        reader.close()


# --- policy, reloaded -------------------------------------------------------------------------------------------------


def reload_policy(service: Service, policy: str) -> None:
    service.write_policy(policy)
    os.kill(service.pid, signal.SIGHUP)


def test_a_broken_policy_is_refused_whole_recorded_and_the_old_one_stays(
    start_service: StartService, line: str
) -> None:
    service = start_service()
    broken = STANDARD_POLICY.replace('max_ttl = "30m"', 'max_ttl = "5m"\nmystery = 1').replace(
        'kind = "workload"', 'kind = "robot"'
    )
    reload_policy(service, broken)
    eventually(lambda: events(service, "policy.refused") != [], service)
    (event,) = events(service, "policy.refused")
    started = events(service, "keeper.started")[0]
    assert event["kept"] == started["policy"]
    wrong = ("roles.llmops.default_ttl", "roles.llmops.mystery", "identities.ci.kind")
    for where in wrong:
        assert any(where in problem for problem in event["problems"]), where
        assert where in service.log()
    assert service.sign(line, identity="ci", ttl="20m").status == 201, "as the old one allows"


def test_a_good_policy_takes_effect_at_once_and_is_recorded(start_service: StartService, line: str) -> None:
    service = start_service()
    assert service.sign(line, ttl="20m").status == 201
    reload_policy(service, STANDARD_POLICY.replace('max_ttl = "30m"', 'max_ttl = "16m"'))
    eventually(lambda: events(service, "policy.loaded") != [], service)
    answer = service.sign(line, ttl="20m")
    assert (answer.status, answer.json()["code"]) == (403, "ttl_above_max")
    assert service.sign(line, ttl="16m").status == 201
    used = [event["policy"] for event in events(service, "certificate.issued")]
    assert used == [events(service, "keeper.started")[0]["policy"], events(service, "policy.loaded")[0]["policy"]]


def test_an_identity_that_the_new_policy_lacks_is_out(start_service: StartService, line: str) -> None:
    service = start_service()
    assert service.sign(line, identity="ci").status == 201
    start = STANDARD_POLICY.index("[identities.ci]")
    reload_policy(service, STANDARD_POLICY[:start] + STANDARD_POLICY[STANDARD_POLICY.index("[identities.operator]") :])
    eventually(lambda: events(service, "policy.loaded") != [], service)
    assert service.sign(line, identity="ci").status == 401
    assert service.sign(line, identity="deploy-agent").status == 201


def test_a_policy_that_pins_another_key_is_refused(start_service: StartService, keyring: KeyRing, line: str) -> None:
    service = start_service()
    reload_policy(service, STANDARD_POLICY.replace("{ca}", keyring("ed25519", "another-ca").fingerprint))
    eventually(lambda: events(service, "policy.refused") != [], service)
    assert events(service, "policy.refused")[0]["code"] == "policy_pins_another_key"
    assert service.sign(line).status == 201


def test_a_policy_file_that_is_gone_is_refused(start_service: StartService, line: str) -> None:
    service = start_service()
    service.policy_file.unlink()
    os.kill(service.pid, signal.SIGHUP)
    eventually(lambda: events(service, "policy.refused") != [], service)
    assert service.sign(line).status == 201


def test_a_hundred_reloads_under_load_cost_nobody_an_answer(start_service: StartService, line: str) -> None:
    service = start_service()
    stop, statuses = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            statuses.append(service.sign(line).status)

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(100):
        os.kill(service.pid, signal.SIGHUP)
        time.sleep(0.01)
    stop.set()
    asking.join()
    assert set(statuses) == {201}


# --- the key file -----------------------------------------------------------------------------------------------------


def _group_readable(path: Path) -> None:
    path.chmod(0o440)


def _a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _two_links(path: Path) -> None:
    os.link(path, path.with_name("second"))


def _empty(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(b"")


def _gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    "spoil,sentence",
    [
        (_group_readable, "ca_key_mode_must_be_0400_or_0600"),
        (_a_link, "ca_key_is_a_link"),
        (_two_links, "ca_key_has_links"),
        (_empty, "ca_key_empty"),
        (_gone, "ca_key_missing"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_a_key_file_that_is_not_as_it_must_be_stops_the_start(
    spoil: Callable[[Path], None], sentence: str, tmp_path: Path, keyring: KeyRing
) -> None:
    service = Service(tmp_path / "service", keyring("ed25519", "ca"))
    spoil(service.key_file)
    done = service.command("serve")
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not service.socket.exists()
    assert not (service.data_dir / FILE_NAME).exists(), "the key comes before everything else"


@missing.needs_root
def test_a_key_file_of_another_owner_stops_the_start(tmp_path: Path, keyring: KeyRing) -> None:
    service = Service(tmp_path / "service", keyring("ed25519", "ca"))
    os.chown(service.key_file, pwd.getpwnam("nobody").pw_uid, 0)
    done = service.command("serve")
    assert done.returncode == 1
    assert "ca_key_owner_must_be_" in done.stderr


# --- limits over HTTP -------------------------------------------------------------------------------------------------

LONG_NAMES = [f"host-{number:03}" for number in range(256)]
LIMITS = f"""
[ca]
fingerprint = "{{ca}}"

[roles.few]
principals = ["llmops"]
default_principals = ["llmops"]
key_types = ["ssh-ed25519"]
limits = {{ per_minute = 3 }}

[roles.live]
principals = ["llmops"]
default_principals = ["llmops"]
key_types = ["ssh-ed25519"]
limits = {{ live = 2 }}

[roles.wide]
principals = {json.dumps(LONG_NAMES)}
default_principals = ["host-000"]
key_types = ["ssh-ed25519"]
allow_key_id = true

[identities.deploy-agent]
kind = "agent"
roles = ["few", "live", "wide"]
tokens = [{{ sha256 = "{{token:deploy-agent}}", expires = 2099-01-01T00:00:00Z }}]

[identities.ci]
kind = "workload"
roles = ["few", "live", "wide"]
tokens = [{{ sha256 = "{{token:ci}}", expires = 2099-01-01T00:00:00Z }}]
"""


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory, keyring: KeyRing) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("limits"), keyring("ed25519", "ca"), LIMITS) as service:
        yield service


@pytest.mark.parametrize("role,allowed,code", [("few", 3, "rate_limited"), ("live", 2, "too_many_live")])
def test_a_limit_counts_each_identity_for_itself_and_over_a_restart_of_the_keeper(
    role: str, allowed: int, code: str, limited: Service, line: str
) -> None:
    for _ in range(allowed):
        assert limited.sign(line, role=role).status == 201
    answer = limited.sign(line, role=role)
    assert (answer.status, answer.json()["code"]) == (429, code)
    assert limited.sign(line, role=role, identity="ci").status == 201
    os.kill(keeper_of(limited), signal.SIGKILL)
    eventually(lambda: limited.sign(line, role=role, identity="nobody").status == 401, limited)
    assert limited.sign(line, role=role).status == 429, "the count is read back from the ledger"


def test_a_live_certificate_that_expires_makes_room(limited: Service, line: str) -> None:
    eventually(lambda: limited.sign(line, role="live", identity="ci", ttl=1).status == 429, limited)
    eventually(lambda: limited.sign(line, role="live", identity="ci", ttl=1).status == 201, limited)


def ssh_keygen_says(certificate: str, tmp_path: Path) -> str:
    path = tmp_path / "it-cert.pub"
    path.write_text(certificate + "\n")
    return subprocess.check_output(["ssh-keygen", "-L", "-f", path], text=True)


@pytest.mark.parametrize("count", [200, 256])
def test_hundreds_of_principals_fit_in_one_certificate(count: int, limited: Service, line: str, tmp_path: Path) -> None:
    answer = limited.sign(line, role="wide", principals=LONG_NAMES[:count])
    assert answer.status == 201
    said = ssh_keygen_says(answer.json()["certificate"], tmp_path)
    assert re.findall(r"^\s+(host-\d+)$", said, re.MULTILINE) == LONG_NAMES[:count]


def test_the_257th_principal_is_refused(limited: Service, line: str) -> None:
    answer = limited.sign(line, role="wide", principals=[*LONG_NAMES, "one-more"])
    assert (answer.status, answer.json()["code"]) == (403, "too_many_principals")


def test_a_key_id_has_256_bytes_at_most(limited: Service, line: str, tmp_path: Path) -> None:
    answer = limited.sign(line, role="wide", key_id="k" * 256)
    assert answer.status == 201
    assert f'Key ID: "{"k" * 256}"' in ssh_keygen_says(answer.json()["certificate"], tmp_path)
    answer = limited.sign(line, role="wide", key_id="k" * 257)
    assert (answer.status, answer.json()["code"]) == (403, "key_id_malformed")


@pytest.mark.parametrize("path", ["/api/sign/wide", "/v1/ssh/sign/wide"])
@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "in chunks"])
def test_a_body_has_64_kib_at_most_to_the_byte(path: str, chunked: bool, limited: Service, line: str) -> None:
    sent = json.dumps({"public_key": line}).encode()

    def status(size: int) -> int:
        body = sent + b" " * (size - len(sent))
        connection = http.client.HTTPConnection(ports.LOOPBACK, limited.port, timeout=30)
        headers = {"Authorization": f"Bearer {limited.tokens['deploy-agent']}"}
        pieces: Any = iter([body[:1000], body[1000:]]) if chunked else body
        connection.request("POST", path, pieces, headers, encode_chunked=chunked)
        try:
            return connection.getresponse().status
        finally:
            connection.close()

    assert status(64 * 1024) in (200, 201)
    assert status(64 * 1024 + 1) == 413


# --- a client that vanishes -------------------------------------------------------------------------------------------


def test_a_client_that_vanishes_before_its_reply_is_recorded_and_listed(start_service: StartService, line: str) -> None:
    service = start_service()
    keeper = keeper_of(service)
    connection = http.client.HTTPConnection(ports.LOOPBACK, service.port, timeout=30)
    os.kill(keeper, signal.SIGSTOP)
    headers = {"Authorization": f"Bearer {service.tokens['ci']}"}
    connection.request("POST", "/api/sign/llmops", json.dumps({"public_key": line}), headers)
    time.sleep(0.5)  # until the api has handed it on; whether it has is not what is asserted
    connection.close()
    os.kill(keeper, signal.SIGCONT)
    with LyingWorker(service.socket) as worker:

        def listed() -> list[Any]:
            reply = worker.ask(op="certificates", identity="ci", token=service.tokens["ci"])
            return list(reply["reply"]["certificates"])

        eventually(lambda: len(listed()) == 1, service)
        assert listed()[0]["status"] == "active"


# --- a clock that jumps -----------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_back_stops_signing_until_it_is_right(tmp_path: Path, keyring: KeyRing, line: str) -> None:
    service = Service(tmp_path / "service", keyring("ed25519", "ca"))
    now = [1_900_000_000.0]
    ledger = RealLedger(tmp_path)
    core = Core(
        policy=load_policy(service.policy_file),
        backend=FileBackend(load_ca_key(service.key_file, f"{os.geteuid()}:{os.getegid()}", service.ca.fingerprint)),
        ledger=ledger,
        clock=lambda: now[0],
        random=os.urandom,
        report=lambda error: None,
    )
    assert core.begin({}) is None

    def sign() -> str:
        header = {"op": "sign", "role": "llmops", "token": service.tokens["ci"], "request_id": "a", "address": None}
        message = json.dumps(header).encode() + b"\n" + json.dumps({"public_key": line}).encode()
        command = read_command(*split_message(message), lambda _caller: None)
        assert isinstance(command, Sign)
        ((_, reply),) = core.run([command])
        if isinstance(reply, SignerError):
            return reply.code
        assert isinstance(reply, Certificate)
        return reply.serial

    assert sign() == "1"
    now[0] -= 59
    assert sign() == "2", "a minute is tolerated"
    now[0] -= 3600
    assert sign() == "clock_behind"
    now[0] += 3600 + 86_400
    assert sign() == "3", "a jump ahead cannot be told from time that passed"
    now[0] -= 86_400
    assert sign() == "clock_behind"
    assert verify(ledger).seq >= 4
    ledger.close()


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_sigterm_under_load_loses_nothing_that_was_taken(start_service: StartService, line: str) -> None:
    service = start_service()
    serials: list[int] = []
    wrong: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                answer = service.sign(line)
            except (OSError, http.client.HTTPException):
                return
            if answer.status == 201:
                serials.append(int(answer.json()["serial"]))
            else:
                wrong.append(answer.status)

    asking = [threading.Thread(target=ask) for _ in range(8)]
    for thread in asking:
        thread.start()
    eventually(lambda: len(serials) > 250, service)  # more than one page, below
    assert service.stop() == 0
    stop.set()
    for thread in asking:
        thread.join()
    assert set(wrong) <= {503}
    assert "killed" not in service.log()
    reader = CertificateReader(service.data_dir)
    verify(reader)
    recorded = {row.serial for row in pages(reader)}
    reader.close()
    assert set(serials) <= recorded
    assert len(set(serials)) == len(serials)
    assert events(service, "keeper.stopped") == [{}]


def pages(reader: CertificateReader) -> Iterator[Any]:
    before = None
    while page := reader.certificates(Filter(before=before, limit=200)):
        yield from page
        before = page[-1].seq
