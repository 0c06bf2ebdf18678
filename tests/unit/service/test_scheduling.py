"""Processors: how they are shared, and that a host which forbids it changes nothing."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from struct import pack

import pytest

from signer.ledger.store import Ledger
from signer.service.scheduling import SHORT_TURN, Shares, own_shares, share_processors, stay_on, take_short_turns

ALL = os.sched_getaffinity(0)
FORBIDDEN = {"x86_64": (141, 203, 314), "aarch64": (140, 122, 274)}  # setpriority, sched_setaffinity, sched_setattr


@pytest.mark.parametrize(
    "allowed,workers,keeper,others",
    [
        ({0, 1}, 1, {1}, {0}),
        ({0, 1, 2, 3}, 1, {3}, {0, 1, 2}),
        ({0, 1, 2, 3}, 3, {3}, {0, 1, 2}),
        ({2, 5, 7}, 2, {7}, {2, 5}),
        ({0}, 1, {0}, {0}),  # nothing to share
        ({0, 1}, 2, {0, 1}, {0, 1}),  # each api worker needs one
        ({0, 1, 2, 3, 4}, 1, {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}),  # the scheduler finds a free one
    ],
)
def test_the_keeper_has_a_processor_where_there_are_few_and_enough(
    allowed: set[int], workers: int, keeper: set[int], others: set[int]
) -> None:
    assert share_processors(allowed, workers) == Shares(frozenset(keeper), frozenset(others))


def test_own_shares_are_of_what_this_process_may_use() -> None:
    assert own_shares(1) == share_processors(ALL, 1)


def test_another_process_is_kept_on_processors() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        stay_on({min(ALL)}, process.pid)
        assert os.sched_getaffinity(process.pid) == {min(ALL)}
        stay_on({max(ALL) + 1000}, process.pid)  # which no host has: it stays where it is
        assert os.sched_getaffinity(process.pid) == {min(ALL)}
        process.communicate(b"\n")
    stay_on({min(ALL)}, process.pid)  # it has ended


def test_what_is_started_stays_on_the_same_processors() -> None:
    program = (
        "import os, subprocess, sys; from signer.service.scheduling import stay_on;"
        f"stay_on({{{min(ALL)}}}); subprocess.run([sys.executable, '-c', 'import os; print(os.sched_getaffinity(0))'])"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told == f"{{{min(ALL)}}}\n"


def test_short_turns_keep_the_niceness() -> None:
    """Of a process of its own: a thread's turns stay short."""
    program = (
        "import os; from signer.service.scheduling import take_short_turns; os.nice(3); take_short_turns();"
        "print(os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)); input()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"3 {os.SCHED_OTHER}\n"
        turn = turn_of(process.pid)
        process.communicate("\n")
    if turn is not None and tuple(int(part) for part in platform.release().split(".")[:2]) >= (6, 12):
        assert turn == SHORT_TURN


def turn_of(pid: int) -> int | None:
    """The nanoseconds that the kernel reports (sched_getattr); None on a machine whose number is not known here."""
    number = {"x86_64": 315, "aarch64": 275}.get(platform.machine())
    if number is None:
        return None
    found = ctypes.create_string_buffer(56)
    assert ctypes.CDLL(None).syscall(number, pid, found, len(found), 0) == 0
    return int.from_bytes(found.raw[24:32], sys.byteorder)


def test_a_machine_without_the_call_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signer.service.scheduling._SCHED_SETATTR", {})
    before = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0), turn_of(0)
    take_short_turns()
    assert (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0), turn_of(0)) == before


def test_short_turns_keep_the_policy_of_scheduling_that_an_operator_chose() -> None:
    program = (
        "import os; from signer.service.scheduling import take_short_turns;"
        "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0)); take_short_turns();"
        "print(os.sched_getscheduler(0))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told == f"{os.SCHED_BATCH}\n"


@pytest.mark.skipif(platform.machine() not in FORBIDDEN, reason="the numbers of its system calls are not known here")
def test_a_host_that_forbids_the_calls_is_left_as_it_is() -> None:
    program = (
        "import os; from signer.service.scheduling import give_way, stay_on, take_short_turns;"
        f"stay_on({{{min(ALL)}}}); take_short_turns(); give_way(3);"
        "print(sorted(os.sched_getaffinity(0)), os.getpriority(os.PRIO_PROCESS, 0))"
    )
    before = f"{sorted(ALL)} {os.getpriority(os.PRIO_PROCESS, 0)}\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        preexec_fn=forbid_calls,
    )
    assert (done.stdout, done.stderr) == (before, "")


@pytest.mark.unix_socket
@pytest.mark.skipif(platform.machine() not in FORBIDDEN, reason="the numbers of its system calls are not known here")
def test_the_view_writer_serves_on_a_host_that_forbids_the_calls(tmp_path: Path) -> None:
    Ledger(tmp_path).close()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "signer.service.view_writer", str(theirs.fileno()), str(tmp_path)]
    with (
        ours,
        subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            preexec_fn=forbid_calls,  # noqa: PLW1509
        ) as process,
    ):
        theirs.close()
        ours.shutdown(socket.SHUT_WR)
        assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == 0


def forbid_calls() -> None:
    """A filter, as those of containers, by which these calls fail with EPERM (seccomp(2), PR_SET_SECCOMP)."""
    numbers = FORBIDDEN[platform.machine()]
    steps = [(0x20, 0, 0, 0)]  # load the call's number
    steps += [(0x15, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]  # jump to the last if equal
    steps += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050000 | errno.EPERM)]  # allow; fail
    code = ctypes.create_string_buffer(b"".join(pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(pack("@HP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, program, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
