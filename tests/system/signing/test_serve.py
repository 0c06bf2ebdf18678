"""The launcher: two users, two children kept alive, signals, and an end that leaves nothing behind."""

from __future__ import annotations

import fcntl
import os
import pwd
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from signer.service.scheduling import share_processors
from tests.parts import missing, ports
from tests.parts.eventually import eventually
from tests.parts.keys import KeyRing
from tests.parts.processes import children, command_line, descendants, environment, is_alive
from tests.parts.service import ROOT, STANDARD_POLICY, Service, StartService

KEEPER_USER, API_USER = "daemon", "nobody"


def arbiter(service: Service) -> int:
    (found,) = [child for child in children(service.pid) if child != service.keeper_pid()]
    return found


def test_sigterm_ends_everything_and_says_0(start_service: StartService) -> None:
    service = start_service()
    everybody = descendants(service.pid)
    assert len(everybody) == 5  # keeper, its query reader and view writer, gunicorn, its worker
    assert service.stop() == 0
    assert not any(map(is_alive, everybody))


def test_the_keeper_has_a_processor_for_itself_where_there_are_few(start_service: StartService) -> None:
    service = start_service()
    keeper = service.keeper_pid()
    assert keeper is not None
    shares = share_processors(os.sched_getaffinity(0), 1)
    assert os.sched_getaffinity(keeper) == shares.keeper

    def writers() -> list[int]:
        return [child for child in children(keeper) if b"signer.service.view_writer" in command_line(child)]

    (writer,) = writers()
    others = [*children(keeper), arbiter(service), *children(arbiter(service))]
    assert [os.sched_getaffinity(other) for other in others] == [shares.others] * 4
    assert os.getpriority(os.PRIO_PROCESS, writer) > os.getpriority(os.PRIO_PROCESS, keeper)
    os.kill(writer, signal.SIGKILL)  # the next one is kept off it as well
    eventually(lambda: writers() not in ([], [writer]), "another view writer", seconds=30)
    (writer,) = writers()
    eventually(lambda: os.sched_getaffinity(writer) == shares.others, "it is on the others' processors", seconds=5)


def test_open_connections_do_not_hold_up_the_end(start_service: StartService) -> None:
    service = start_service()
    with (
        socket.create_connection((ports.LOOPBACK, service.port)) as idle,
        socket.create_connection((ports.LOOPBACK, service.port)) as half,
    ):
        idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(12) == b"HTTP/1.1 200"
        half.sendall(b"POST /api/sign/llmops HTTP/1.1\r\n")
        everybody = [service.pid, *descendants(service.pid)]
        os.kill(service.pid, signal.SIGTERM)
        # Both stop in the time that the launcher gives them; a child that had to be killed is named in the log.
        eventually(lambda: not any(map(is_alive, everybody)), "everybody has ended", seconds=60)
    assert "was killed" not in service.log()


def test_a_request_that_was_on_its_way_is_answered_while_the_service_stops(start_service: StartService) -> None:
    service = start_service()
    with socket.create_connection((ports.LOOPBACK, service.port), timeout=30) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        os.kill(arbiter(service), signal.SIGTERM)
        client.sendall(b"\r\n")
        assert client.recv(12) == b"HTTP/1.1 200"


def test_sighup_reloads_the_policy(start_service: StartService, keyring: KeyRing) -> None:
    service = start_service()
    line = keyring("ed25519", "user").public_line
    assert service.sign(line, ttl="20m").status == 201
    service.write_policy(STANDARD_POLICY.replace('max_ttl = "30m"', 'max_ttl = "16m"'))
    os.kill(service.pid, signal.SIGHUP)
    eventually(lambda: service.sign(line, ttl="20m").status == 403, "the new policy is in force")
    service.write_policy("nonsense")
    os.kill(service.pid, signal.SIGHUP)
    eventually(lambda: "the current policy stays in force" in service.log(), "the broken policy is refused")
    assert service.sign(line, ttl="16m").status == 201


def test_a_killed_keeper_is_answered_for_with_503_until_it_is_back(start_service: StartService) -> None:
    service = start_service()
    keeper = service.keeper_pid()
    assert keeper is not None
    os.kill(service.pid, signal.SIGSTOP)  # or the launcher would be faster than this test
    try:
        os.kill(keeper, signal.SIGKILL)
        eventually(lambda: not is_alive(keeper), "the keeper is dead")
        gone = service.ask("GET", "/readyz")
        assert (gone.status, gone.headers["retry-after"], gone.json()["code"]) == (503, "1", "keeper_gone")
        refused = service.sign("x")
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert service.ask("GET", "/healthz").status == 200
    finally:
        os.kill(service.pid, signal.SIGCONT)
    eventually(service.is_ready, "the keeper is back")
    assert service.keeper_pid() != keeper


def test_a_killed_gunicorn_is_started_again(start_service: StartService) -> None:
    service = start_service()
    killed = arbiter(service)
    workers = descendants(killed)
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, workers)), "the orphaned worker has ended")
    eventually(service.is_ready, "gunicorn is back")
    assert arbiter(service) != killed


def test_a_killed_worker_is_started_again(start_service: StartService) -> None:
    service = start_service()
    (worker,) = children(arbiter(service))
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: not is_alive(worker), "the worker is dead")
    eventually(service.is_ready, "a new worker answers")


def test_killing_the_launcher_leaves_nobody_behind(start_service: StartService) -> None:
    service = start_service()
    everybody = descendants(service.pid)
    os.kill(service.pid, signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, everybody)), "keeper, gunicorn and worker have ended")


def test_no_secret_is_in_an_environment_or_a_command_line(
    tmp_path: Path, keyring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ca = keyring("ed25519", "ca")
    secrets = {"INFISICAL_TOKEN": "st.hidden-in-environment", "VAULT_TOKEN": "hvs.hidden-in-environment"}
    service = Service(tmp_path / "service", ca, environ=secrets)
    with service:
        assert service.sign(keyring("ed25519", "user").public_line, identity="ci").status == 201
        key_line = ca.private.read_text().splitlines()[2]
        for pid in descendants(service.pid):
            said = (command_line(pid) + environment(pid)).decode()
            assert "hidden-in-environment" not in said
            assert "sgn_" not in said
            assert key_line not in said
        assert "sgn_" not in service.log()


def test_modules_and_configuration_of_the_folder_it_starts_in_are_not_used(
    tmp_path: Path, keyring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "gunicorn.conf.py").write_text("raise SystemExit('the folder decides')\n")
    (here / "flask.py").write_text("raise SystemExit('the folder decides')\n")
    monkeypatch.chdir(here)
    with Service(tmp_path / "service", keyring("ed25519", "ca")) as service:
        assert service.ask("GET", "/healthz").status == 200
        assert "the folder decides" not in service.log()


# --- sockets ---------------------------------------------------------------------------------------------------------


def test_every_address_is_served_and_no_unix_socket_stays(tmp_path: Path, keyring: KeyRing) -> None:
    other, path = ports.free_port(), tmp_path / "api.sock"
    port = ports.free_port()
    environ = {"SIGNER_LISTEN": f"{ports.LOOPBACK}:{port},127.0.0.2:{other},unix:{path}"}
    service = Service(tmp_path / "s", keyring("ed25519", "ca"), environ=environ)
    service.port = port
    with service:
        for family, address in ((socket.AF_INET, ("127.0.0.2", other)), (socket.AF_UNIX, str(path))):
            with socket.socket(family) as client:
                client.settimeout(30)
                client.connect(address)
                client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                assert client.recv(12) == b"HTTP/1.1 200"
    assert not path.exists()


@pytest.mark.parametrize("who", ["api", "keeper"])
def test_no_port_is_free_while_a_part_restarts(who: str, start_service: StartService) -> None:
    service = start_service()
    os.kill(service.pid, signal.SIGSTOP)  # or the launcher would be faster than this test
    victim = service.keeper_pid() if who == "keeper" else arbiter(service)
    assert victim is not None
    everybody = [victim, *descendants(victim)]
    try:
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: not any(map(is_alive, everybody)), "it is dead")
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="in use"):
                thief.bind((ports.LOOPBACK, service.port))
        client = socket.create_connection((ports.LOOPBACK, service.port), timeout=30)  # waits in the queue
    finally:
        os.kill(service.pid, signal.SIGCONT)
    with client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 200"


def test_a_taken_port_is_named_and_nothing_is_started(tmp_path: Path, keyring: KeyRing) -> None:
    service = Service(tmp_path / "s", keyring("ed25519", "ca"))
    with socket.socket() as other:
        other.bind((ports.LOOPBACK, service.port))
        other.listen()
        said = refusal(service)
    assert f"cannot listen on {ports.LOOPBACK}:{service.port}: Address already in use" in said
    assert not service.data_dir.exists()


def run_api(service: Service, *listeners: socket.socket, **environ: str) -> subprocess.Popen[bytes]:
    """`signer api` with those sockets, as systemd passes them."""
    numbers = range(3, 3 + len(listeners))
    script = f"LISTEN_PID=$$ LISTEN_FDS={len(listeners)} exec {sys.executable} -P -m signer api"

    def move() -> None:
        copies = [os.dup(listener.fileno()) for listener in listeners]
        high = [fcntl.fcntl(copy, fcntl.F_DUPFD, 100) for copy in copies]
        for number, copy in zip(numbers, high, strict=True):
            os.dup2(copy, number, inheritable=True)

    with service.log_file.open("ab") as log:
        return subprocess.Popen(
            ["sh", "-c", script],
            env={**service.environment(), **environ},
            stdout=log,
            stderr=log,
            close_fds=False,
            preexec_fn=move,  # noqa: PLW1509 - the test has one thread
        )


def test_sockets_of_systemd_are_served_and_stay_its_own(tmp_path: Path, keyring: KeyRing) -> None:
    service = Service(tmp_path / "s", keyring("ed25519", "ca"), environ={"SIGNER_LISTEN": "127.0.0.1:1"})
    service.folder.mkdir(exist_ok=True)
    path = tmp_path / "api.sock"
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind((ports.LOOPBACK, service.port))
        unix.bind(str(path))
        for listener in (tcp, unix):
            listener.listen()
        process = run_api(service, tcp, unix)
        try:
            assert service.ask("GET", "/healthz", timeout=30).status == 200
            assert service.ask("GET", "/readyz").json()["code"] == "keeper_gone"
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(30)
                client.connect(str(path))
                client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                assert client.recv(12) == b"HTTP/1.1 200"
        finally:
            ports.stop(process)
        assert process.returncode == 0
        assert path.exists()


def test_audit_c3_a_socket_beyond_loopback_is_refused_whatever_the_setting_says(
    tmp_path: Path, keyring: KeyRing
) -> None:
    service = Service(tmp_path / "s", keyring("ed25519", "ca"), environ={"SIGNER_LISTEN": "127.0.0.1:1"})
    with socket.socket() as exposed:
        exposed.bind(("0.0.0.0", 0))
        exposed.listen()
        number = exposed.getsockname()[1]
        for proxies in ("", "0.0.0.0/0"):
            assert run_api(service, exposed, SIGNER_TRUSTED_PROXIES=proxies).wait(30) == 1
    assert service.log().count(f"the socket at 0.0.0.0:{number} is beyond loopback") == 2


def test_what_is_no_listening_socket_is_refused(tmp_path: Path, keyring: KeyRing) -> None:
    service = Service(tmp_path / "s", keyring("ed25519", "ca"))
    with socket.socket() as idle:
        assert run_api(service, idle).wait(30) == 1
    assert "descriptor 3 is not a listening socket" in service.log()


# --- started as root ---------------------------------------------------------------------------------------------


@pytest.fixture
def two_users(keyring: KeyRing) -> Iterator[Service]:
    """The service as root starts it, each child under a user of its own; skipped where these cannot run Python."""
    probe = subprocess.run(
        [sys.executable, "-c", "import flask, signer"],
        user=API_USER,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    if probe.returncode != 0:
        pytest.skip(f"{API_USER} cannot read this interpreter")
    environ = {"SIGNER_KEEPER_USER": KEEPER_USER, "SIGNER_API_USER": API_USER}
    # Not in pytest's own folder: each pytest that starts makes that one private to root again.
    with tempfile.TemporaryDirectory(prefix="two-users-") as place:
        Path(place).chmod(0o755)
        service = Service(Path(place) / "service", keyring("ed25519", "ca"), environ=environ)
        service.folder.chmod(0o755)
        service.policy_file.chmod(0o644)
        with service:
            yield service


def status(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}


@missing.needs_root
def test_each_child_is_its_own_user_without_rights(two_users: Service, keyring: KeyRing) -> None:
    assert two_users.sign(keyring("ed25519", "user").public_line).status == 201
    keeper = two_users.keeper_pid()
    assert keeper is not None
    gunicorn = arbiter(two_users)
    for pid, user in [(keeper, KEEPER_USER), (gunicorn, API_USER), *((w, API_USER) for w in children(gunicorn))]:
        facts, entry = status(pid), pwd.getpwnam(user)
        assert set(facts["Uid"]) == {str(entry.pw_uid)}
        assert set(facts["Gid"]) == {str(entry.pw_gid)}
        assert facts["Groups"] == []
        assert facts["CapEff"] == ["0000000000000000"]


@missing.needs_root
@pytest.mark.parametrize("name", ["ca", "data/ledger.sqlite3", "data/publishing.key", "data"])
def test_the_api_user_can_read_neither_key_nor_ledger(two_users: Service, name: str) -> None:
    path = two_users.folder / name
    assert path.exists()
    read = "import os, sys; p = sys.argv[1]; os.listdir(p) if os.path.isdir(p) else open(p, 'rb').read(1)"
    done = subprocess.run(
        [sys.executable, "-c", read, str(path)],
        user=API_USER,
        group=pwd.getpwnam(API_USER).pw_gid,
        extra_groups=[],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "PermissionError" in done.stderr


@missing.needs_root
def test_the_keepers_socket_is_for_the_two_users_only(two_users: Service) -> None:
    keeper, api = pwd.getpwnam(KEEPER_USER), pwd.getpwnam(API_USER)
    folder, sock = two_users.run_dir.stat(), two_users.socket.stat()
    assert (folder.st_uid, folder.st_gid, stat.S_IMODE(folder.st_mode)) == (keeper.pw_uid, api.pw_gid, 0o2750)
    assert (sock.st_uid, sock.st_gid, stat.S_IMODE(sock.st_mode)) == (keeper.pw_uid, api.pw_gid, 0o660)


@missing.needs_root
def test_the_api_reads_what_the_keeper_publishes_and_cannot_write_it(two_users: Service) -> None:
    eventually(lambda: two_users.ask("GET", "/api/krl").status == 200, "the api shows the list")
    keeper, api = pwd.getpwnam(KEEPER_USER), pwd.getpwnam(API_USER)
    folder = two_users.run_dir / "published"
    facts = folder.stat()
    assert (facts.st_uid, facts.st_gid, stat.S_IMODE(facts.st_mode)) == (keeper.pw_uid, api.pw_gid, 0o2750)
    for path in folder.iterdir():
        facts = path.stat()
        assert (facts.st_uid, facts.st_gid, stat.S_IMODE(facts.st_mode)) == (keeper.pw_uid, api.pw_gid, 0o640)
    script = (
        "import os, sys\n"
        "os.chdir(sys.argv[1])\n"
        "for act in (lambda: open('krl', 'ab'), lambda: open('new', 'xb'), lambda: os.unlink('krl')):\n"
        "    try:\n        act()\n    except PermissionError:\n        print('no')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], user=API_USER, group=api.pw_gid, extra_groups=[],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "no\n" * 3, done.stderr


@missing.needs_root
def test_a_keeper_that_has_given_up_root_comes_back(two_users: Service, keyring: KeyRing) -> None:
    line = keyring("ed25519", "user").public_line
    assert two_users.sign(line).json()["serial"] == "1"
    keeper = two_users.keeper_pid()
    assert keeper is not None
    os.kill(keeper, signal.SIGKILL)
    eventually(lambda: two_users.is_ready() and two_users.keeper_pid() != keeper, "the keeper is back")
    assert two_users.sign(line).json()["serial"] == "2"


# --- refusals to start -----------------------------------------------------------------------------------------------


def refusal(service: Service) -> str:
    done = service.command("serve")
    assert done.returncode == 1
    return done.stderr


def test_it_refuses_to_listen_beyond_loopback_in_the_clear(tmp_path: Path, keyring: KeyRing) -> None:
    service = Service(tmp_path / "s", keyring("ed25519", "ca"), environ={"SIGNER_LISTEN": "0.0.0.0:8222"})
    said = refusal(service)
    assert (
        "SIGNER_LISTEN: 0.0.0.0:8222 is beyond loopback, which would send tokens in the clear;"
        " set SIGNER_TLS_CERT_FILE and SIGNER_TLS_KEY_FILE, or SIGNER_TRUSTED_PROXIES"
    ) in said
    assert not service.data_dir.exists()


def test_an_unknown_setting_is_warned_about_and_serving_goes_on(start_service: StartService) -> None:
    service = start_service(environ={"SIGNER_THREAD": "4"})
    assert "SIGNER_THREAD is not a setting, did you mean SIGNER_THREADS" in service.log()


@missing.needs_root
def test_root_must_name_two_users(tmp_path: Path, keyring: KeyRing) -> None:
    users = {"SIGNER_KEEPER_USER": "", "SIGNER_API_USER": ""}
    said = refusal(Service(tmp_path / "s", keyring("ed25519", "ca"), environ=users))
    assert "without SIGNER_KEEPER_USER and SIGNER_API_USER" in said


@missing.needs_root
def test_an_unknown_user_is_refused_by_name(tmp_path: Path, keyring: KeyRing) -> None:
    users = {"SIGNER_KEEPER_USER": "nosuchuser", "SIGNER_API_USER": API_USER}
    assert "there is no user 'nosuchuser' on this host" in refusal(
        Service(tmp_path / "s", keyring("ed25519", "ca"), environ=users)
    )
