"""A key file is the whole old or the whole new one, whatever happens to whom between any two system calls.

Only root may trace these processes: they forbid it to everybody else.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from signer.ca.key import load_ca_key
from signer.files import open_lock_of
from tests.parts import missing
from tests.parts.keys import Key, KeyRing
from tests.parts.memory import memory_folder
from tests.parts.paused import Call, Paused

pytestmark = [missing.needs_strace, missing.needs_root, pytest.mark.slow, pytest.mark.timeout(300)]

OLD = "-----BEGIN OPENSSH PRIVATE KEY-----\nthe old key, which is longer than the new one\n" + "A" * 4000
OWNER = f"{os.geteuid()}:{os.getegid()}"
# Calls of the writer that can fail for a reason of the machine.
CAN_FAIL = {"openat", "fchmod", "fchown", "write", "fsync", "linkat", "rename", "renameat", "renameat2"}


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as made:
        yield made


class Renders:
    """Starts paused renders of the same key over the same old file."""

    def __init__(self, key: Key, target: Path, place: Path) -> None:
        self.key, self.target, self._place = key, target, place
        self.new = key.private.read_text()
        self._started = 0
        secret = place / "client-secret"
        secret.write_text("unused")
        secret.chmod(0o400)
        self.environ = {
            "INFISICAL_CLIENT_ID": "unused",
            "INFISICAL_CLIENT_SECRET_FILE": str(secret),
            "INFISICAL_PROJECT_ID": "unused",
            "SIGNER_CA_FINGERPRINT": key.fingerprint,
            "PAUSED_SECRET": str(key.private),
        }

    def __call__(self, where: str, *more: str, fresh: bool = True) -> Paused:
        if fresh:
            self.target.unlink(missing_ok=True)
            self.target.write_text(OLD)
            self.target.chmod(0o400)
        self._started += 1
        words = ["ca", "render", "--to", str(self.target), *more]
        return Paused(where, words, self.environ, self._place / f"run-{self._started}")

    def run(self) -> tuple[int, str]:
        """Renders as it is, without a pause."""
        done = subprocess.run(
            [sys.executable, "-m", "tests.parts.paused", "nowhere", "ca", "render", "--to", str(self.target)],
            env={"PATH": os.environ["PATH"], **self.environ},
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        return done.returncode, done.stdout + done.stderr

    def calls(self, where: str) -> list[Call]:
        """What one undisturbed run does."""
        with self(where) as paused:
            paused.go_on()
            assert paused.wait() == 0, paused.log
            assert self.target.read_text() == self.new
            return paused.calls()

    def check_whole(self, what: object) -> str:
        """`old` or `new`; and nothing lies beside it."""
        text = self.target.read_text()
        assert text in (OLD, self.new), f"{what}: the file is neither the old nor the new one"
        assert [path.name for path in self.target.parent.iterdir()] == [self.target.name], f"{what}: a file is left"
        if text == self.new:
            load_ca_key(self.target, OWNER, self.key.fingerprint)
        return "old" if text == OLD else "new"


@pytest.fixture
def renders(keyring: KeyRing, folder: Path, tmp_path: Path) -> Renders:
    return Renders(keyring("ed25519", "ca"), folder / "ca", tmp_path)


def test_the_writer_may_be_killed_between_any_two_system_calls(renders: Renders) -> None:
    calls = renders.calls("writer")
    assert {"openat", "write", "fsync", "linkat", "exit_group"} <= {call.name for call in calls}
    ends = []
    for call in calls:
        with renders("writer") as paused:
            paused.go_on(call, "signal=SIGKILL")
            status = paused.wait()
            assert status == 1, f"{call}: {paused.log}"
            ends.append(renders.check_whole(call))
            hint = "the old file is unchanged" if ends[-1] == "old" else "the new file is in place"
            assert "the writer was killed" in paused.log
            assert hint in paused.log, f"{call}: {paused.log}"
            assert not [line for line in renders.new.splitlines()[1:-1] if line in paused.log]
    assert set(ends) == {"old", "new"}
    assert ends == sorted(ends, reverse=True), "once it is the new one it stays"


def test_the_renderer_may_be_killed_between_any_two_system_calls(renders: Renders) -> None:
    calls = renders.calls("renderer")
    assert {"flock", "wait4"} <= {call.name for call in calls}
    ends = set()
    for call in calls:
        with renders("renderer") as paused:
            paused.go_on(call, "signal=SIGKILL")
            assert paused.wait() == -signal.SIGKILL, f"{call}: {paused.log}"
            wait_for_the_writer(renders.target.parent)
            ends.add(renders.check_whole(call))
    assert ends == {"old", "new"}


def wait_for_the_writer(folder: Path) -> None:
    """It holds the directory's lock until it is done."""
    descriptor = open_lock_of(folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def test_what_a_power_cut_leaves_is_removed_by_the_next_run(renders: Renders) -> None:
    rename = next(call for call in renders.calls("writer") if call.name.startswith("rename"))
    with renders("writer") as paused:
        paused.process.kill()
        paused.process.wait()
        paused.go_on(rename, "signal=SIGKILL")
        paused.wait()
    wait_for_the_writer(renders.target.parent)
    assert sorted(path.name for path in renders.target.parent.iterdir()) == [".ca.new", "ca"]
    assert renders.target.read_text() == OLD
    status, said = renders.run()
    assert (status, ": written" in said) == (0, True), said
    assert renders.check_whole("after the power cut") == "new"


@pytest.mark.parametrize("error, sentence", [("ENOSPC", "No space left on device"), ("EIO", "Input/output error")])
def test_a_write_that_fails_anywhere_leaves_the_old_file_and_says_why(
    error: str, sentence: str, renders: Renders
) -> None:
    calls = [call for call in renders.calls("writer") if call.name in CAN_FAIL]
    assert len(calls) >= 7
    for call in calls:
        with renders("writer") as paused:
            paused.go_on(call, f"error={error}")
            assert paused.wait() == 1, f"{call}: {paused.log}"
            assert f"the key file could not be written: {sentence}" in paused.log, f"{call}: {paused.log}"
            end = renders.check_whole(call)
            assert ("the old file is unchanged" in paused.log) == (end == "old"), f"{call}: {paused.log}"
            assert end == "old" or call == calls[-1], "only the last fsync comes after the rename"


@pytest.mark.parametrize("error", ["EIO", "EMFILE"])
def test_a_renderer_that_gets_an_error_anywhere_says_so_and_leaves_a_whole_file(error: str, renders: Renders) -> None:
    names = {"openat", "flock", "clone", "clone3", "fork", "vfork", "unlinkat", "read"}
    calls = [call for call in renders.calls("renderer") if call.name in names]
    assert {"openat", "flock", "unlinkat"} <= {call.name for call in calls}
    for call in calls:
        with renders("renderer") as paused:
            paused.go_on(call, f"error={error}")
            assert paused.wait() == 1, f"{call}: {paused.log}"
            wait_for_the_writer(renders.target.parent)
            assert paused.log.startswith("signer: error: the "), f"{call}: {paused.log}"
            assert "signer: hint: " in paused.log, f"{call}: {paused.log}"
            assert (renders.check_whole(call) == "new") == ("the new file is in place" in paused.log), call


def test_a_signal_to_end_waits_for_the_write(renders: Renders) -> None:
    calls = renders.calls("renderer")
    fork = next(index for index, call in enumerate(calls) if call.name in ("clone", "clone3", "fork", "vfork"))
    with renders("renderer") as paused:
        paused.go_on(calls[fork], "signal=SIGTERM")
        assert paused.wait() == -signal.SIGTERM
        assert renders.check_whole("SIGTERM") == "new"
    with renders("writer") as paused:
        paused.go_on(next(call for call in calls if call.name == "openat"), "signal=SIGINT")
        assert paused.wait() == 0
        assert renders.check_whole("SIGINT") == "new"


@missing.needs_root
def test_a_full_file_system_leaves_the_old_file(renders: Renders) -> None:
    folder = renders.target.parent
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k,mode=700", "none", folder], check=True)
    try:
        renders.target.write_text(OLD)
        (folder / "filler").write_bytes(b"x" * 4096)
        status, said = renders.run()
        assert (status, "No space left on device" in said) == (1, True), said
        assert renders.target.read_text() == OLD
        assert sorted(path.name for path in folder.iterdir()) == ["ca", "filler"]
        (folder / "filler").unlink()
        assert renders.run()[0] == 0
        assert renders.check_whole("with space again") == "new"
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@missing.needs_root
def test_a_file_system_that_cannot_be_written_leaves_the_old_file(renders: Renders) -> None:
    folder = renders.target.parent
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=700", "none", folder], check=True)
    try:
        renders.target.write_text(OLD)
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        status, said = renders.run()
        assert (status, "Read-only file system" in said) == (1, True), said
        assert renders.check_whole("read only") == "old"
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_new_key_is_there_whole_or_not_at_all_wherever_its_maker_is_killed(folder: Path, tmp_path: Path) -> None:
    target = folder / "ca"

    def making(number: int) -> Paused:
        return Paused("maker", ["ca", "new", "--out", str(target)], {}, tmp_path / f"run-{number}")

    with making(0) as paused:
        paused.go_on()
        assert paused.wait() == 0, paused.log
        calls = paused.calls()
    ends = []
    for number, call in enumerate(calls, 1):
        target.unlink(missing_ok=True)
        with making(number) as paused:
            paused.go_on(call, "signal=SIGKILL")
            assert paused.wait() == -signal.SIGKILL, f"{call}: {paused.log}"
        left = [path.name for path in folder.iterdir()]
        assert left in ([], ["ca"]), f"{call}: {left}"
        if left:
            load_ca_key(target, OWNER, None)
        ends.append(bool(left))
    assert ends == sorted(ends)
    assert set(ends) == {False, True}


def test_rendering_signals_nobody(renders: Renders) -> None:
    names = {call.name for where in ("renderer", "writer") for call in renders.calls(where)}
    assert "write" in names
    assert names & {"kill", "tkill", "tgkill", "rt_sigqueueinfo", "pidfd_send_signal"} == set()


def test_a_render_waits_for_another_ones_writer(renders: Renders) -> None:
    with renders("writer") as first, renders("renderer", fresh=False) as second:
        os.kill(second.pid, signal.SIGCONT)
        time.sleep(1)  # time enough for it to overtake, if it could
        assert second.process.poll() is None
        assert renders.target.read_text() == OLD
        os.kill(first.pid, signal.SIGCONT)
        assert (first.wait(), second.wait()) == (0, 0)
        assert (": written" in first.log, ": unchanged" in second.log) == (True, True)
    assert renders.check_whole("both") == "new"
