"""What the launcher does for children that hang, that cannot be started, or that nobody reaches any more."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.parts import missing, ports, rotation
from tests.parts.eventually import eventually
from tests.parts.keys import Key, KeyRing
from tests.parts.processes import children
from tests.parts.service import Service

HANGS_AFTER = 10  # seconds, instead of 30; a start on a busy machine and two slow syncs in one round take less
SLOW_COMMIT = 4_000_000  # microseconds; younger than that when it ends
IMPATIENT = f"""
import os
from signer.service.logs import start_log
from signer.service.launcher import run_service
from signer.settings import load_settings
start_log()
run_service(load_settings(os.environ), hangs_after={HANGS_AFTER})
"""


@pytest.fixture(scope="module")
def service(keyring: KeyRing) -> Iterator[Service]:
    """As root with two users where that is possible. Not in pytest's own folder, which is private to root."""
    with tempfile.TemporaryDirectory(prefix="supervision-") as place:
        Path(place).chmod(0o755)
        users = {"SIGNER_KEEPER_USER": rotation.KEEPER_USER, "SIGNER_API_USER": rotation.API_USER}
        environ = dict(users) if rotation.why_not_two_users() is None else {}
        port, api_socket = ports.free_port(), Path(place) / "api.sock"
        environ |= {"SIGNER_LISTEN": f"{ports.LOOPBACK}:{port},unix:{api_socket}"}
        made = Service(Path(place) / "service", keyring("ed25519", "ca"), environ=environ)
        made.port = port
        made.folder.chmod(0o755)
        made.program = ["-c", IMPATIENT]
        with made:
            yield made


@pytest.fixture
def user(keyring: KeyRing) -> Key:
    return keyring("ed25519", "user")


def keeper_of(service: Service) -> int:
    """The keeper's process, once the service is ready."""
    eventually(service.is_ready, "the service is ready")
    found = service.keeper_pid()
    assert found is not None
    return found


def arbiter_of(service: Service) -> int:
    (found,) = [pid for pid in children(service.pid) if pid != service.keeper_pid()]
    return found


def is_another_keeper(service: Service, than: int) -> bool:
    return service.keeper_pid() not in (None, than) and service.is_ready()


@missing.needs_strace
def test_audit_a_slow_commit_is_waited_for_and_a_keeper_that_hangs_is_replaced(service: Service, user: Key) -> None:
    keeper, arbiter = keeper_of(service), arbiter_of(service)
    delay = ["-e", "trace=fdatasync,fsync", "-e", f"inject=fdatasync,fsync:delay_enter={SLOW_COMMIT}"]
    tracer = subprocess.Popen(["strace", "-f", "-qq", *delay, "-o", "/dev/null", "-p", str(keeper)])
    try:
        eventually(lambda: is_traced(keeper), "it is traced")
        # Longer together than a silence may last, and each of them younger.
        statuses = [service.sign(user.public_line).status for _ in range(3)]
    finally:
        tracer.terminate()
        tracer.wait()
    assert statuses == [201] * 3
    assert service.keeper_pid() == keeper
    assert "is killed" not in service.log()

    os.kill(keeper, signal.SIGSTOP)
    eventually(lambda: is_another_keeper(service, keeper), "another keeper serves", seconds=90)
    assert service.log().count(f"the keeper has not answered for {HANGS_AFTER} s and is killed") == 1
    assert service.sign(user.public_line).status == 201
    assert arbiter_of(service) == arbiter


def test_audit_an_arbiter_that_hangs_is_replaced(service: Service) -> None:
    keeper, arbiter = keeper_of(service), arbiter_of(service)
    os.kill(arbiter, signal.SIGSTOP)
    eventually(lambda: children(service.pid) and arbiter not in children(service.pid), "it is gone", seconds=90)
    eventually(service.is_ready, "another one serves")
    assert service.keeper_pid() == keeper


@contextmanager
def without_descriptors(pid: int) -> Iterator[None]:
    """That process can open nothing more for a while."""
    former = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, former[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, former)


def test_audit_a_shortage_of_descriptors_that_passes_stops_nobody(service: Service) -> None:
    keeper, arbiter = keeper_of(service), arbiter_of(service)
    with without_descriptors(service.pid):
        os.kill(keeper, signal.SIGKILL)
        eventually(
            lambda: re.search(r"the keeper could not be started: .*Too many open files", service.log()),
            "a start failed",
        )
        gone = service.ask("GET", "/readyz")
        assert (gone.status, gone.json()["code"]) == (503, "keeper_gone")
    eventually(lambda: is_another_keeper(service, keeper), "the keeper is back")
    assert arbiter_of(service) == arbiter


def test_audit_an_arbiter_without_descriptors_keeps_its_other_workers(service: Service) -> None:
    keeper, arbiter = keeper_of(service), arbiter_of(service)
    with without_descriptors(arbiter):
        for worker in children(arbiter):
            os.kill(worker, signal.SIGKILL)
        eventually(lambda: "a worker could not be started: Too many open files" in service.log(), "a start failed")
    eventually(service.is_ready, "a worker serves")
    assert (service.keeper_pid(), arbiter_of(service)) == (keeper, arbiter)


@missing.needs_strace
def test_audit_a_fork_that_fails_for_a_while_stops_nobody(service: Service) -> None:
    keeper, arbiter = keeper_of(service), arbiter_of(service)
    forks = "clone,clone3,fork,vfork"
    inject = ["-e", f"trace={forks}", "-e", f"inject={forks}:error=EAGAIN"]
    tracer = subprocess.Popen(["strace", "-qq", *inject, "-o", "/dev/null", "-p", str(service.pid)])
    try:
        eventually(lambda: is_traced(service.pid), "it is traced")
        os.kill(keeper, signal.SIGKILL)
        reason = os.strerror(11)
        eventually(lambda: f"the keeper could not be started: {reason}" in service.log(), "a start failed")
        assert service.ask("GET", "/healthz").status == 200
    finally:
        tracer.terminate()
        tracer.wait()
    eventually(lambda: is_another_keeper(service, keeper), "the keeper is back")
    assert arbiter_of(service) == arbiter


def is_traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


def test_audit_a_removed_socket_or_run_directory_is_made_again(service: Service, user: Key) -> None:
    keeper = keeper_of(service)
    service.socket.unlink()
    eventually(service.socket.exists, "the keeper listens again")
    eventually(lambda: service.sign(user.public_line).status == 201, "it signs")
    assert service.keeper_pid() == keeper

    (service.run_dir / "launcher.sock").unlink()
    control = service.run_dir / "launcher.sock"
    eventually(lambda: ports.takes(control, socket.SOCK_SEQPACKET), "the launcher listens again")
    assert service.command("reload").returncode == 0

    gone = service.run_dir.rename(service.run_dir.with_name("gone"))  # in one go: they may look while it is removed
    shutil.rmtree(gone)
    eventually(lambda: service.socket.exists() and is_another_keeper(service, keeper), "it is all back")
    assert service.sign(user.public_line).status == 201
    eventually(lambda: service.command("reload").returncode == 0, "`signer reload` works again")


def test_the_keepers_user_may_not_put_another_socket_in_place_of_the_launchers(service: Service) -> None:
    """It may, in a directory of its own; the launcher takes its name back, and follows no link."""
    keeper_of(service)
    path, elsewhere = service.run_dir / "launcher.sock", service.folder / "elsewhere"
    path.unlink()
    path.symlink_to(elsewhere)
    eventually(path.is_socket, "the launcher listens again")
    assert not path.is_symlink()
    assert not elsewhere.exists()


def test_audit_a_removed_socket_of_the_api_is_made_again(service: Service) -> None:
    keeper, path = keeper_of(service), service.folder.parent / "api.sock"

    def status() -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(path))
            client.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
            return client.recv(12)

    assert status() == b"HTTP/1.1 200"
    path.unlink()
    eventually(lambda: ports.takes(path), "the launcher listens again")
    assert status() == b"HTTP/1.1 200"
    eventually(service.is_ready, "the other address is served as before")
    assert service.keeper_pid() == keeper
