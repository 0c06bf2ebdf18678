"""A command that is run has an end, whatever it does, and gets nothing that it was not given."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from signer.subprocesses import NoSuchCommand, run
from tests.parts.eventually import eventually

ENVIRONMENT = {"PATH": "/usr/bin:/bin"}


def sh(script: str, *, within: float = 30, most: int = 1000) -> tuple[int | None, str, str, bool]:
    ended = run(["/bin/sh", "-c", script], environment=ENVIRONMENT, within=within, most=most)
    return ended.status, ended.out, ended.err, ended.is_whole


@pytest.mark.parametrize(
    "script, expected",
    [
        ("echo out; echo err >&2", (0, "out\n", "err\n", True)),
        ("exit 7", (7, "", "", True)),
        ("kill -9 $$", (137, "", "", True)),
        ("cat; echo end of nothing", (0, "end of nothing\n", "", True)),
        ("printf '\\377'", (0, "�", "", True)),
    ],
)
def test_status_and_both_outputs_are_told(script: str, expected: tuple[int, str, str, bool]) -> None:
    assert sh(script) == expected


def test_it_gets_the_environment_that_is_given_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "marker")
    out = sh("env")[1]
    assert "PATH=/usr/bin:/bin" in out
    assert "A_SECRET" not in out


def test_huge_output_is_read_to_its_end_and_cut() -> None:
    status, out, err, is_whole = sh("head -c 3000000 /dev/zero | tr '\\0' x; echo end >&2")
    assert (status, out, err, is_whole) == (0, "x" * 1000, "end\n", False)


def test_one_that_never_ends_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    status, out, _, _ = sh(f"echo begun; sleep 600 & echo $! > {tmp_path}/child; wait", within=2)
    assert (status, out) == (None, "begun\n")
    child = int((tmp_path / "child").read_text())
    eventually(lambda: has_ended(child), "its child has ended, too")


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    assert sh(f"trap '' TERM; echo $$ > {tmp_path}/self; while :; do sleep 0.1; done", within=2)[0] is None
    assert has_ended(int((tmp_path / "self").read_text()))


def test_one_that_ends_in_order_at_sigterm_may_say_so() -> None:
    assert sh("trap 'echo cleaned; exit 0' TERM; while :; do sleep 0.1; done", within=2)[:2] == (None, "cleaned\n")


def test_what_it_leaves_running_is_not_waited_for(tmp_path: Path) -> None:
    """As the monitor of a container: it goes its own way, and holds our pipes."""
    status, out, _, _ = sh(
        f"setsid sh -c 'echo $$ > {tmp_path}/other; exec sleep 600' & "
        f"until [ -s {tmp_path}/other ]; do sleep 0.05; done; echo done"
    )
    assert (status, out) == (0, "done\n")
    other = int((tmp_path / "other").read_text())
    assert not has_ended(other)
    os.kill(other, 9)


def test_no_descriptor_and_no_thread_stays() -> None:
    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    sh("exit 0")
    before = held()
    for _ in range(5):
        sh("echo x", within=5)
        sh("sleep 5", within=0.05)
    assert held() == before


@pytest.mark.parametrize(
    "argv, said",
    [
        (["/no/such/command"], "cannot run /no/such/command: no such file or directory"),
        (["/etc/passwd"], "cannot run /etc/passwd: permission denied"),
        (["/bin/sh", "a\0b"], "cannot run /bin/sh: its arguments are malformed"),
    ],
)
def test_one_that_cannot_be_started_is_told(argv: list[str], said: str) -> None:
    with pytest.raises(NoSuchCommand) as caught:
        run(argv, environment=ENVIRONMENT, within=5)
    assert (caught.value.code, caught.value.text) == ("command_not_started", said)


def has_ended(pid: int) -> bool:
    """Gone, or dead and waiting for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


def test_the_time_it_took_is_told() -> None:
    started = time.monotonic()
    ended = run(["/bin/sleep", "0.1"], environment=ENVIRONMENT, within=30)
    assert 0.1 <= ended.seconds <= time.monotonic() - started
