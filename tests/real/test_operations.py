"""What an operator does to the running service, and what the service keeps to itself."""

from __future__ import annotations

import base64
import http.client
import json
import os
import pwd
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from signer.cakey import load_ca_key
from signer.commands import Sign, read_command, split_message
from signer.core import Core
from signer.errors import SignerError
from signer.ledger import FILE_NAME, Filter, LedgerReader
from signer.ledger import Ledger as RealLedger
from signer.ledgeraudit import verify
from signer.policyfile import load_policy
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
        key=load_ca_key(service.key_file, f"{os.geteuid()}:{os.getegid()}", service.ca.fingerprint),
        ledger=ledger,
        clock=lambda: now[0],
        random=os.urandom,
        report=lambda error: None,
    )
    assert core.begin({}) is None

    def sign() -> str:
        header = {"op": "sign", "role": "llmops", "token": service.tokens["ci"], "request_id": "a", "address": None}
        message = json.dumps(header).encode() + b"\n" + json.dumps({"public_key": line}).encode()
        command = read_command(*split_message(message))
        assert isinstance(command, Sign)
        ((_, reply),) = core.run([command])
        return reply.code if isinstance(reply, SignerError) else str(reply["serial"])

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
    eventually(lambda: len(serials) > 50, service)
    assert service.stop() == 0
    stop.set()
    for thread in asking:
        thread.join()
    assert set(wrong) <= {503}
    assert "killed" not in service.log()
    reader = LedgerReader(service.data_dir)
    verify(reader)
    recorded = {row.serial for row in pages(reader)}
    reader.close()
    assert set(serials) <= recorded
    assert len(set(serials)) == len(serials)
    assert events(service, "keeper.stopped") == [{}]


def pages(reader: LedgerReader) -> Iterator[Any]:
    before = None
    while page := reader.certificates(Filter(before=before, limit=200)):
        yield from page
        before = page[-1].serial


def test_the_launchers_own_death_ends_keeper_and_api(tmp_path: Path, keyring: KeyRing) -> None:
    """They must not serve on without anybody who would start them again."""
    users = {"SIGNER_KEEPER_USER": "daemon", "SIGNER_API_USER": "nobody"} if os.geteuid() == 0 else {}
    with public_folder() as folder:
        service = Service(folder / "service", keyring("ed25519", "ca"), environ=users)
        service.folder.chmod(0o755)
        service.start()
        keeper = keeper_of(service)
        os.kill(service.pid, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{keeper}").exists(), service)
        eventually(lambda: not ports.accepts(service.port), service)
        service.stop()


# --- what is kept from others -----------------------------------------------------------------------------------------


class public_folder:  # noqa: N801 - used as a context manager
    """A folder that other users can reach, unlike pytest's."""

    def __enter__(self) -> Path:
        self._folder = Path(tempfile.mkdtemp(prefix="signer-test-"))
        self._folder.chmod(0o755)
        return self._folder

    def __exit__(self, *exc_info: object) -> None:
        shutil.rmtree(self._folder)


@pytest.fixture
def two_users(keyring: KeyRing) -> Iterator[Service]:
    """Started by root, with a keeper and an api of different users."""
    with public_folder() as folder:
        service = Service(
            folder / "service",
            keyring("ed25519", "ca"),
            environ={"SIGNER_KEEPER_USER": "daemon", "SIGNER_API_USER": "nobody"},
        )
        service.folder.chmod(0o755)
        with service:
            yield service


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def family(pid: int) -> list[int]:
    return [pid, *(deeper for child in children(pid) for deeper in family(child))]


def as_user(name: str, *argv: str) -> subprocess.CompletedProcess[str]:
    entry = pwd.getpwnam(name)
    return subprocess.run(
        argv,
        user=entry.pw_uid,
        group=entry.pw_gid,
        extra_groups=[],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=60,
    )


def mode(path: Path) -> str:
    facts = path.stat()
    return f"{facts.st_mode & 0o7777:04o} {pwd.getpwuid(facts.st_uid).pw_name}"


@missing.needs_root
def test_keeper_and_api_are_different_users_without_rights(two_users: Service, line: str) -> None:
    assert two_users.sign(line).status == 201
    keeper = keeper_of(two_users)
    api = [pid for pid in family(two_users.pid) if pid not in (two_users.pid, keeper)]
    assert len(api) >= 2
    for pid, user in ((keeper, "daemon"), *((pid, "nobody") for pid in api)):
        status = dict(row.split(":", 1) for row in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in row)
        uid = str(pwd.getpwnam(user).pw_uid)
        assert status["Uid"].split() == [uid] * 4
        assert status["Groups"].split() in ([], [str(pwd.getpwnam(user).pw_gid)])
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0


@missing.needs_root
def test_the_api_reaches_the_socket_and_nothing_else(two_users: Service) -> None:
    assert mode(two_users.run_dir) == "2750 daemon"
    assert mode(two_users.socket) == "0660 daemon"
    assert mode(two_users.data_dir) == "0700 daemon"
    for path in two_users.data_dir.iterdir():
        assert mode(path) == "0600 daemon", path
        assert as_user("nobody", "cat", str(path)).returncode != 0
    assert as_user("nobody", "cat", str(two_users.key_file)).returncode != 0
    assert as_user("daemon", "cat", str(two_users.key_file)).returncode != 0, "not even the keeper's user, once it runs"
    speak = "import socket,sys; socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect(sys.argv[1])"
    assert as_user("nobody", sys.executable, "-c", speak, str(two_users.socket)).returncode == 0
    assert as_user("games", sys.executable, "-c", speak, str(two_users.socket)).returncode != 0


ATTACH = "import ctypes,sys; l=ctypes.CDLL(None,use_errno=True); r=l.ptrace(16,int(sys.argv[1]),0,0); sys.exit(r!=0)"


def assert_closed(keeper: int) -> None:
    """The user `daemon`, whose process it is, can neither look into it nor attach to it."""
    for name in ("environ", "mem", "maps", "fd"):
        done = as_user("daemon", "ls" if name == "fd" else "cat", f"/proc/{keeper}/{name}")
        assert done.returncode != 0, name
        assert "Permission denied" in done.stderr
    assert as_user("daemon", "/usr/bin/python3", "-c", ATTACH, str(keeper)).returncode == 1


@missing.needs_root
def test_the_memory_of_a_keeper_that_never_was_root_is_closed_too(keyring: KeyRing) -> None:
    entry = pwd.getpwnam("daemon")
    with public_folder() as folder:
        owner = f"{entry.pw_uid}:{entry.pw_gid}"
        service = Service(
            folder / "service", keyring("ed25519", "ca"), environ={"SIGNER_CA_KEY_OWNER": "daemon:daemon"}
        )
        subprocess.run(["chown", "-R", owner, str(folder)], check=True)
        environment = service.environment()
        del environment["SIGNER_KEEPER_USER"], environment["SIGNER_API_USER"]
        argv = [sys.executable, "-P", "-m", "signer", "serve"]
        with service.log_file.open("wb") as log:
            process = subprocess.Popen(
                argv, env=environment, stderr=log, user="daemon", group="daemon", extra_groups=[]
            )
        try:
            ports.wait_until(service.is_ready, process, service.log)
            (keeper,) = [
                pid for pid in children(process.pid) if b"\0keeper" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ]
            assert_closed(keeper)
        finally:
            ports.stop(process)


@missing.needs_root
def test_the_keepers_memory_is_closed_to_its_own_user(two_users: Service) -> None:
    assert_closed(keeper_of(two_users))
    sleeper = subprocess.Popen(["sleep", "60"], user="daemon", group="daemon", extra_groups=[])
    try:
        done = as_user("daemon", "/usr/bin/python3", "-c", ATTACH, str(sleeper.pid))
        assert done.returncode == 0, "for this test to mean something"
    finally:
        sleeper.kill()
        sleeper.wait()


def test_the_keeper_leaves_no_core_file(start_service: StartService) -> None:
    keeper = keeper_of(start_service())
    assert resource.prlimit(keeper, resource.RLIMIT_CORE) == (0, 0)
    assert Path(f"/proc/{keeper}/environ").stat().st_uid == 0, "what is not dumpable belongs to root"


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_files_are_private_whatever_the_umask(mask: int, start_service: StartService, line: str) -> None:
    before = os.umask(mask)
    try:
        service = start_service()
    finally:
        os.umask(before)
    assert service.sign(line).status == 201
    modes = {path.name: f"{path.stat().st_mode & 0o7777:04o}" for path in service.data_dir.iterdir()}
    assert set(modes.values()) == {"0600"}, modes
    assert f"{service.data_dir.stat().st_mode & 0o777:04o}" == "0700"
    assert f"{service.run_dir.stat().st_mode & 0o777:04o}" == "0700"
    assert f"{service.socket.stat().st_mode & 0o777:04o}" == "0600"


def test_no_secret_is_in_any_place_that_others_look_at(start_service: StartService, line: str) -> None:
    service = start_service()
    assert service.sign(line).status == 201
    assert service.sign(line, identity="stranger").status != 201
    assert service.ask("POST", "/api/sign/llmops", b"{broken", identity="ci").status == 400
    # Who puts the token where the role's name belongs must not find it in the ledger for ever.
    assert service.ask("POST", f"/api/sign/{service.tokens['ci']}", {"public_key": line}, identity="ci").status != 201
    assert service.sign(line, principals=[service.tokens["ci"]]).status == 403
    os.kill(service.pid, signal.SIGHUP)
    key = service.key_file.read_text()
    body = "".join(key.splitlines()[1:-1])
    secrets = [text.encode() for text in (body[100:140], body[200:240], *service.tokens.values())]
    secrets += [base64.b64decode(body)[-80:-48]]
    places = {"the log": service.log_file.read_bytes()}
    for pid in family(service.pid):
        places[f"the arguments of {pid}"] = Path(f"/proc/{pid}/cmdline").read_bytes()
        places[f"the environment of {pid}"] = Path(f"/proc/{pid}/environ").read_bytes()
    assert service.stop() == 0
    for path in service.data_dir.iterdir():
        places[path.name] = path.read_bytes()
    assert FILE_NAME in places
    for place, content in places.items():
        for secret in secrets:
            assert secret not in content, place
