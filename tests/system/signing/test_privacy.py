"""What the service keeps to itself: users, modes, memory, and secrets in places where others look."""

from __future__ import annotations

import base64
import os
import pwd
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from signer.ledger.schema import FILE_NAME
from tests.parts import missing, ports
from tests.parts.keys import KeyRing
from tests.parts.processes import children, command_line, environment, family, is_alive
from tests.parts.service import Service, StartService


@pytest.fixture
def line(keyring: KeyRing) -> str:
    return keyring("ed25519").public_line


def eventually(what: Callable[[], bool], service: Service) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, service.log()[-2000:]
        time.sleep(0.02)


def keeper_of(service: Service) -> int:
    keeper = service.keeper_pid()
    assert keeper is not None
    return keeper


class public_folder:  # noqa: N801 - used as a context manager
    """A folder that other users can reach, unlike pytest's."""

    def __enter__(self) -> Path:
        self._folder = Path(tempfile.mkdtemp(prefix="signer-test-"))
        self._folder.chmod(0o755)
        return self._folder

    def __exit__(self, *exc_info: object) -> None:
        shutil.rmtree(self._folder)


def test_the_launchers_own_death_ends_keeper_and_api(tmp_path: Path, keyring: KeyRing) -> None:
    """They must not serve on without anybody who would start them again."""
    users = {"SIGNER_KEEPER_USER": "daemon", "SIGNER_API_USER": "nobody"} if os.geteuid() == 0 else {}
    with public_folder() as folder:
        service = Service(folder / "service", keyring("ed25519", "ca"), environ=users)
        service.folder.chmod(0o755)
        service.start()
        keeper = keeper_of(service)
        os.kill(service.pid, signal.SIGKILL)
        eventually(lambda: not is_alive(keeper), service)
        eventually(lambda: not ports.accepts(service.port), service)
        service.stop()


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


# Root's alone, for this process and all that it starts.
CLOSED_SHM = """
import ctypes, os, runpy, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x20000):  # CLONE_NEWNS
    raise OSError(ctypes.get_errno(), "unshare")
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "none", "/dev/shm"], check=True)
sys.argv = ["signer", "serve"]
runpy.run_module("signer", run_name="__main__")
"""


@missing.needs_root
def test_audit_7_a_folder_in_memory_that_the_api_may_not_write_stops_no_start(keyring: KeyRing, line: str) -> None:
    with public_folder() as folder:
        users = {"SIGNER_KEEPER_USER": "daemon", "SIGNER_API_USER": "nobody"}
        service = Service(folder / "service", keyring("ed25519", "ca"), environ=users)
        service.folder.chmod(0o755)
        service.program = ["-c", CLOSED_SHM]
        with service:
            assert service.sign(line).status == 201
            assert Path(f"/proc/{service.pid}/root/dev/shm").stat().st_mode & 0o7777 == 0o755
            assert "Traceback" not in service.log()


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
    keepers = family(keeper)
    assert len(keepers) == 3, "the keeper, its query reader and its view writer"
    api = [pid for pid in family(two_users.pid) if pid not in (two_users.pid, *keepers)]
    assert len(api) >= 2
    for pid, user in (*((pid, "daemon") for pid in keepers), *((pid, "nobody") for pid in api)):
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


def assert_closed(pid: int, user: str = "daemon") -> None:
    """The user whose process it is can neither look into it nor attach to it."""
    for name in ("environ", "mem", "maps", "fd"):
        done = as_user(user, "ls" if name == "fd" else "cat", f"/proc/{pid}/{name}")
        assert done.returncode != 0, name
        assert "Permission denied" in done.stderr
    assert as_user(user, "/usr/bin/python3", "-c", ATTACH, str(pid)).returncode == 1


def api_of(service_pid: int) -> list[int]:
    """The api's processes: gunicorn's arbiter and its workers, which hold the tokens of those who ask."""
    (arbiter,) = [pid for pid in children(service_pid) if b"\0api\0" in command_line(pid)]
    return family(arbiter)


@missing.needs_root
def test_audit_3d5_the_memory_of_a_keeper_and_an_api_that_never_were_root_is_closed_too(keyring: KeyRing) -> None:
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
            (keeper,) = [pid for pid in children(process.pid) if b"\0keeper" in command_line(pid)]
            assert_closed(keeper)
            assert len(api_of(process.pid)) >= 2
            for pid in api_of(process.pid):  # another process of the api's user is not to read callers' tokens there
                assert_closed(pid)
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


@missing.needs_root
def test_audit_3d5_the_memory_of_the_api_and_of_each_new_worker_is_closed_to_its_own_user(two_users: Service) -> None:
    arbiter, *workers = api_of(two_users.pid)
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    eventually(
        lambda: len(api_of(two_users.pid)) == 1 + len(workers) and workers[0] not in api_of(two_users.pid), two_users
    )
    for pid in api_of(two_users.pid):
        assert_closed(pid, "nobody")
    assert arbiter in api_of(two_users.pid)


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
    assert service.sign(line, principals=[service.tokens["ci"]]).status == 400
    os.kill(service.pid, signal.SIGHUP)
    key = service.key_file.read_text()
    body = "".join(key.splitlines()[1:-1])
    secrets = [text.encode() for text in (body[100:140], body[200:240], *service.tokens.values())]
    secrets += [base64.b64decode(body)[-80:-48]]
    places = {"the log": service.log_file.read_bytes()}
    for pid in family(service.pid):
        places[f"the arguments of {pid}"] = command_line(pid)
        places[f"the environment of {pid}"] = environment(pid)
    assert service.stop() == 0
    for path in service.data_dir.iterdir():
        places[path.name] = path.read_bytes()
    assert FILE_NAME in places
    for place, content in places.items():
        for secret in secrets:
            assert secret not in content, place
