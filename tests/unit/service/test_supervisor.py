"""What a child tells its supervisor, and what the launcher does with it."""

from __future__ import annotations

import logging
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from signer.service.child import Child
from signer.service.supervisor import ALIVE_EVERY, MAX_LISTED, MAX_MESSAGE, Supervisor, read_messages

pytestmark = pytest.mark.unix_socket


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The launcher's end and the child's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


# --- messages --------------------------------------------------------------------------------------------------------


def test_systemd_is_told_in_its_own_words(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    environ = {"NOTIFY_SOCKET": str(path)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(path))
        systemd.setblocking(False)
        supervisor = Supervisor(None, environ)
        supervisor.ready()
        supervisor.alive()
        supervisor.alive()  # no more than one in `ALIVE_EVERY`
        supervisor.reloaded(1.0, {})  # not systemd's business
        assert [systemd.recv(100) for _ in range(2)] == [b"READY=1", b"WATCHDOG=1"]
        with pytest.raises(BlockingIOError):
            systemd.recv(100)
        supervisor.leave()
        supervisor.alive()
    assert environ == {}  # for no child of this process


@pytest.mark.parametrize("address", ["/nowhere/notify", "@signer-nobody-listens"])
def test_a_supervisor_that_is_away_disturbs_nobody(address: str) -> None:
    supervisor = Supervisor(None, {"NOTIFY_SOCKET": address})
    supervisor.ready()
    supervisor.leave()


def test_a_queue_that_nobody_reads_disturbs_nobody(ends: tuple[socket.socket, socket.socket]) -> None:
    supervisor = Supervisor(ends[1], {})
    for _ in range(5_000):
        supervisor.ready()
    assert len(list(read_messages(ends[0]))) < 5_000


def test_a_report_fits_one_message_however_long_its_lists(ends: tuple[socket.socket, socket.socket]) -> None:
    names = ["\N{SNOWMAN}" * 1_000 for _ in range(10_000)]
    part: dict[str, object] = {"added": names, "removed": names, "error": {"problems": names, "text": names[0]}}
    Supervisor(ends[1], {}).reloaded(2.5, {"policy": part})
    (message,) = read_messages(ends[0])
    assert message["began"] == 2.5
    listed = message["report"]["policy"]["added"]
    assert len(listed) == MAX_LISTED + 1
    assert listed[-1] == f"and {10_000 - MAX_LISTED} more"


def test_a_malformed_message_is_left_out(ends: tuple[socket.socket, socket.socket]) -> None:
    for data in (b"nonsense", b"[]", b'{"kind": "ready"}', b"[" * 50_000, b"\xff"):
        ends[1].send(data)
    assert list(read_messages(ends[0])) == [{"kind": "ready"}]
    assert MAX_MESSAGE > 50_000


# --- the launcher's side ---------------------------------------------------------------------------------------------


class Stubborn:
    """A process that no signal ends, as one that waits for its disk."""

    def __init__(self) -> None:
        self.pid, self.signals = 4711, list[int]()

    def poll(self) -> None:
        return None

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def terminate(self) -> None:
        self.send_signal(15)

    def kill(self) -> None:
        self.send_signal(9)

    def wait(self, seconds: float) -> int:
        raise subprocess.TimeoutExpired("keeper", seconds)


class Watch:
    """A child that no signal ends, and the time as its launcher sees it."""

    def __init__(self, ours: socket.socket) -> None:
        self.now = 1_000.0
        self.process = Stubborn()
        self.child = Child("keeper", lambda: (), None, 30.0, clock=lambda: self.now)
        self.child.process, self.child.channel = cast(Any, self.process), ours
        self.child.look()

    def wait(self, seconds: float) -> None:
        """Looks at the child every half second."""
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            self.child.look()


@pytest.fixture
def watch(ends: tuple[socket.socket, socket.socket]) -> Watch:
    return Watch(ends[0])


def test_audit_a_process_that_cannot_be_killed_is_said_once(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        watch.wait(120)
        watch.child.stop(0.0)
    assert watch.process.signals == [9, 15, 9]
    assert [message.partition(",")[0] for message in caplog.messages] == [
        "the keeper has not answered for 30 s and is killed",
        "the keeper (process 4711) cannot be killed",
        "keeper did not stop within 0 s and was killed",
        "keeper (process 4711) cannot be killed",
    ]


def test_audit_a_sign_of_life_in_time_is_enough(watch: Watch, ends: tuple[socket.socket, socket.socket]) -> None:
    for _ in range(4):
        watch.wait(25)
        Supervisor(ends[1], {}).alive()
        watch.child.look()
    assert watch.process.signals == []


def test_a_launcher_that_was_stopped_itself_kills_nobody(watch: Watch) -> None:
    for _ in range(5):
        watch.now += 3600
        watch.child.look()
    assert watch.process.signals == []


def test_signs_of_life_come_before_the_limit_of_the_units() -> None:
    assert ALIVE_EVERY < 30 / 10
