"""The publisher: what it signs verifies and belongs together, whatever fails; it never claims what is not so."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
from collections.abc import Callable
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import pytest

from signer.ca.service_key import ServiceKey
from signer.errors import SignerError, Unavailable
from signer.protocol.log_limit import LogLimit
from signer.service import publisher as module
from signer.service.keeper import log
from signer.service.list_builder import Built, write_public
from signer.service.publisher import CANDIDATE_NAME, RENEWED_EVERY, Publisher, SignedFile
from signer.ssh.krl import RevocationList, decode_krl, encode_krl
from signer.ssh.publickey import parse_public_key
from signer.ssh.sshsig import verify
from signer.units import timestamp

NOW = 1_800_000_000


class FakeBuilder:
    """Builds `content`, by default the empty list of the version that is wanted, when the test says so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_busy = False
        self.started = 0
        self.closed = 0
        self.content: bytes = b""
        self.result: Built | SignerError | None = None

    def start(self) -> None:
        self.is_busy = True
        self.started += 1

    def finish(self, version: int, comment: str = "") -> None:
        self.content = encode_krl(RevocationList(version, NOW, comment))
        (self.folder / CANDIDATE_NAME).write_bytes(self.content)
        self.result = Built(version, sha256(self.content).hexdigest())

    def collect(self) -> Built | SignerError | None:
        result, self.result = self.result, None
        self.is_busy = self.is_busy and result is None
        return result

    def close(self) -> None:
        self.closed += 1


class Bench:
    """A publisher with a clock, a wanted version, and a build that ends at once unless the test holds it."""

    def __init__(self, run_dir: Path, others: tuple[SignedFile, ...] = ()) -> None:
        run_dir.mkdir(mode=0o750, exist_ok=True)
        self.folder = run_dir / "published"
        self.key = ServiceKey.open(run_dir / "publishing.key")
        self.wanted: int | None = 0
        self.renumbered = 0
        self.renumber_fails = False
        self.now = 0.0
        self.builder = FakeBuilder(self.folder)
        self.publisher = Publisher(
            self.folder,
            self.key,
            self.builder,
            lambda: self.wanted,
            LogLimit(log),
            others,
            last=run_dir / "publishing.last",
            renumber=self._renumber,
            clock=lambda: NOW + self.now,
            monotonic=lambda: self.now,
        )

    def _renumber(self) -> SignerError | None:
        self.renumbered += 1
        if self.renumber_fails:
            return Unavailable("ledger_unavailable", "the disk is full", "free space")
        self.wanted = (self.wanted or 0) + 10
        return None

    def publish(self, version: int) -> None:
        """Wants that version, and has it built and published."""
        self.wanted = version
        self.publisher.turn()
        assert self.builder.is_busy
        self.builder.finish(version)
        self.publisher.turn()

    def read(self, name: str, namespace: str) -> bytes:
        """A file whose signature verifies."""
        content = (self.folder / name).read_bytes()
        verify((self.folder / f"{name}.sig").read_text(), content, namespace, parse_public_key(self.key.line))
        return content

    def published(self) -> tuple[int, int]:
        """Version and age of what a host would accept."""
        content = self.read("krl", "krl.v1@signer")
        statement = json.loads(self.read("krl.statement", "krl-statement.v1@signer"))
        version = decode_krl(content).version
        assert statement["version"] == version
        assert statement["sha256"] == sha256(content).hexdigest()
        assert statement["as_of"] == timestamp(self.publisher.state().as_of)
        return version, int(NOW + self.now) - self.publisher.state().as_of


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "run")


def test_the_first_list_is_published_whole_with_its_key(bench: Bench) -> None:
    assert bench.publisher.state().version is None
    bench.publish(0)
    assert bench.published() == (0, 0)
    assert (bench.folder / "krl.publisher").read_text() == f"{bench.key.line}\n"
    assert bench.publisher.state().is_current
    assert {path.name for path in bench.folder.iterdir()} == {
        "krl", "krl.sig", "krl.statement", "krl.statement.sig", "krl.publisher",
    }  # fmt: skip


def test_ssh_keygen_verifies_the_signatures(bench: Bench) -> None:
    bench.publish(7)
    signers = bench.folder.parent / "publishers"
    signers.write_text(f"publisher {bench.key.line}\n")
    for name, namespace in (("krl", "krl.v1@signer"), ("krl.statement", "krl-statement.v1@signer")):
        done = subprocess.run(
            ["ssh-keygen", "-Y", "verify", "-f", signers, "-I", "publisher", "-n", namespace, "-s",
             bench.folder / f"{name}.sig"],
            input=(bench.folder / name).read_bytes(), capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_the_statement_is_renewed_each_minute_and_the_list_is_not(bench: Bench) -> None:
    bench.publish(3)
    before = (bench.folder / "krl").stat()
    bench.now = RENEWED_EVERY - 1
    bench.publisher.turn()
    assert bench.published() == (3, int(RENEWED_EVERY) - 1)
    bench.now = RENEWED_EVERY
    bench.publisher.turn()
    assert bench.published() == (3, 0)
    assert (bench.folder / "krl").stat().st_ino == before.st_ino
    assert bench.builder.started == 1


def test_while_another_list_is_wanted_no_statement_says_that_the_old_one_is_current(bench: Bench) -> None:
    bench.publish(3)
    bench.wanted = 4
    bench.now = 200
    bench.publisher.turn()
    assert bench.published() == (3, 200)
    assert not bench.publisher.state().is_current
    assert bench.publisher.state().warnings(NOW + 200) == [
        "the revocation list was last known to be current 200 s ago"
    ]  # fmt: skip
    bench.now = 210
    bench.builder.finish(4)
    bench.publisher.turn()
    assert bench.published() == (4, 10)  # as of when its build began: what came later may not be in it


def test_what_is_revoked_during_a_build_is_built_next(bench: Bench) -> None:
    bench.publish(3)
    bench.wanted = 4
    bench.publisher.turn()
    bench.wanted = 5
    bench.builder.finish(4)
    bench.publisher.turn()
    assert bench.published()[0] == 4
    assert bench.builder.started == 3
    bench.builder.finish(5)
    bench.publisher.turn()
    assert bench.published()[0] == 5


def test_while_the_ledger_cannot_be_read_nothing_is_renewed(bench: Bench) -> None:
    bench.publish(3)
    bench.wanted = None
    bench.now = 500
    bench.publisher.turn()
    assert bench.published() == (3, 500)
    assert bench.builder.started == 1
    bench.wanted = 3
    bench.publisher.turn()
    assert bench.published() == (3, 0)


def test_a_failed_build_keeps_the_last_good_list_warns_and_is_tried_again(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.publish(3)
    bench.wanted = 4
    bench.publisher.turn()
    bench.builder.result = Unavailable("ssh_keygen_missing", "no ssh-keygen", "install openssh-client")
    bench.publisher.turn()
    assert bench.published()[0] == 3
    assert "no ssh-keygen (ssh_keygen_missing); install openssh-client" in caplog.text
    assert bench.publisher.state().warnings(NOW) == ["the revocation list is not up to date: no ssh-keygen"]
    started = bench.builder.started
    bench.publisher.turn()
    assert bench.builder.started == started  # not at once
    bench.now += 2.0
    bench.publisher.turn()
    assert bench.builder.started == started + 1
    bench.builder.finish(4)
    bench.publisher.turn()
    assert bench.published()[0] == 4
    assert bench.publisher.state().warnings(NOW) == []


def test_pauses_between_tries_grow_to_a_minute(bench: Bench) -> None:
    bench.wanted, pauses = 1, list[float]()
    for _ in range(8):
        bench.publisher.turn()
        while not bench.builder.is_busy:
            bench.now += 0.5
            bench.publisher.turn()
        pauses.append(bench.now)
        bench.builder.result = Unavailable("list_not_built", "no", "no")
        bench.publisher.turn()
    assert [after - before for before, after in pairwise(pauses)] == [2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize(
    "spoil",
    {
        "other bytes": lambda folder: (folder / CANDIDATE_NAME).write_bytes(encode_krl(RevocationList(4, NOW + 1))),
        "gone": lambda folder: (folder / CANDIDATE_NAME).unlink(),
        "a link": lambda folder: ((folder / CANDIDATE_NAME).unlink(), (folder / CANDIDATE_NAME).symlink_to("krl")),
    }.values(),
    ids=["other bytes", "gone", "a link"],
)
def test_only_the_bytes_that_were_read_back_are_signed(bench: Bench, spoil: Callable[[Path], object]) -> None:
    bench.publish(3)
    bench.wanted = 4
    bench.publisher.turn()
    bench.builder.finish(4)
    spoil(bench.folder)
    bench.publisher.turn()
    assert bench.published()[0] == 3
    assert bench.publisher.state().failure is not None


def test_an_older_list_than_was_wanted_or_published_is_never_published(bench: Bench) -> None:
    bench.publish(5)
    bench.wanted = 6
    bench.publisher.turn()
    bench.builder.finish(4)
    bench.publisher.turn()
    failure = bench.publisher.state().failure
    assert failure is not None
    assert failure.code == "list_older"
    assert bench.published()[0] == 5


def test_a_list_that_somebody_removes_comes_back(bench: Bench) -> None:
    bench.publish(5)
    (bench.folder / "krl").unlink()
    bench.now = RENEWED_EVERY
    bench.publisher.turn()
    bench.publisher.turn()
    bench.builder.finish(5)
    bench.publisher.turn()
    assert bench.published() == (5, 0)


def test_a_folder_that_somebody_removes_comes_back(bench: Bench) -> None:
    bench.publish(5)
    for path in bench.folder.iterdir():
        path.unlink()
    bench.folder.rmdir()
    bench.now = RENEWED_EVERY
    bench.publisher.turn()
    bench.publisher.turn()
    bench.builder.finish(5)
    bench.publisher.turn()
    assert bench.published() == (5, 0)


@pytest.mark.parametrize("step", range(14))
def test_a_keeper_that_is_killed_at_any_step_publishes_a_whole_list_when_it_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Each step is a write or a rename; what is left after it is what the next keeper finds."""

    class Killed(BaseException):
        pass

    left = [step]

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(*arguments)

        return call

    first = Bench(tmp_path / "run")
    first.publish(3)
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_public", counted(write_public))
        patched.setattr(Path, "rename", counted(Path.rename))
        try:
            first.publish(4)
        except Killed:
            assert step < 10
        else:
            assert step >= 10
    again = Bench(tmp_path / "run")
    again.publish(4)
    assert again.published() == (4, 0)


@pytest.mark.parametrize("step", range(9))
def test_a_full_disk_at_any_step_leaves_files_that_heal(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    bench.publish(3)
    left = [step]

    def full(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_public", full(write_public))
        patched.setattr(Path, "rename", full(Path.rename))
        bench.publish(4)
    failure = bench.publisher.state().failure
    assert failure is not None
    assert failure.code == "list_not_written"
    assert "free disk space" in failure.hint
    assert [path.name for path in bench.folder.iterdir() if path.name.endswith(".new")] == []
    if step <= 4:
        assert bench.published()[0] == 3  # nothing was replaced yet
    bench.now += 2
    bench.publisher.turn()
    bench.builder.finish(4)
    bench.publisher.turn()
    assert bench.published()[0] == 4


def test_restarts_give_the_same_list(tmp_path: Path) -> None:
    first, second = Bench(tmp_path / "run"), Bench(tmp_path / "run")
    first.publish(9)
    before = (first.folder / "krl").read_bytes(), (first.folder / "krl.sig").read_bytes()
    second.publish(9)
    assert ((first.folder / "krl").read_bytes(), (first.folder / "krl.sig").read_bytes()) == before


def test_a_release_that_encodes_a_list_otherwise_gives_it_a_new_version(tmp_path: Path) -> None:
    """Hosts refuse other bytes of a version that they have."""
    Bench(tmp_path / "run").publish(9)
    upgraded = Bench(tmp_path / "run")
    upgraded.wanted, upgraded.renumber_fails = 9, True
    upgraded.publisher.turn()
    upgraded.builder.finish(9, "encoded otherwise")
    upgraded.publisher.turn()
    assert decode_krl((upgraded.folder / "krl").read_bytes()).comment == ""
    failure = upgraded.publisher.state().failure
    assert failure is not None
    assert failure.code == "ledger_unavailable"
    upgraded.renumber_fails = False
    upgraded.now += 2
    upgraded.publisher.turn()
    upgraded.builder.finish(9, "encoded otherwise")
    upgraded.publisher.turn()
    assert upgraded.wanted == 19
    upgraded.builder.finish(19, "encoded otherwise")
    upgraded.publisher.turn()
    assert upgraded.published() == (19, 0)
    assert upgraded.renumbered == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff", b"x" * 9000])
def test_a_note_of_the_last_list_that_is_damaged_holds_up_nothing(bench: Bench, content: bytes) -> None:
    bench.publish(3)
    (bench.folder.parent / "publishing.last").write_bytes(content)
    bench.publish(4)
    assert bench.published() == (4, 0)
    assert json.loads((bench.folder.parent / "publishing.last").read_bytes())["version"] == 4


def test_the_api_reads_through_the_group_and_no_other_user_may(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run_dir.chmod(0o2750)
    before = os.umask(0o077)
    try:
        made = Bench(run_dir)
        made.publish(1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o2750
    modes = {stat.S_IMODE(path.stat().st_mode) for path in made.folder.iterdir() if path.name != "krl"}
    assert modes == {0o640}


def test_a_folder_that_is_not_the_keepers_is_not_used(bench: Bench) -> None:
    bench.folder.mkdir(mode=0o700)
    bench.folder.chmod(0o777)
    bench.publisher.turn()
    failure = bench.publisher.state().failure
    assert failure is not None
    assert failure.code == "published_folder_unusable"
    assert bench.builder.started == 0


def test_another_file_is_signed_each_minute_and_when_it_changes(tmp_path: Path) -> None:
    version: list[int | None] = [None]
    other = SignedFile("known_hosts", "known-hosts.v1@signer", lambda: version[0], lambda at: b"# %d\n" % at)
    bench = Bench(tmp_path / "run", (other,))
    bench.publish(1)
    assert not (bench.folder / "known_hosts").exists()
    for bench.now, version[0] in ((1.0, 4), (2.0, 5), (2.0 + RENEWED_EVERY, 5)):
        bench.publisher.turn()
        assert bench.read("known_hosts", "known-hosts.v1@signer") == b"# %d\n" % (NOW + int(bench.now))


def test_another_file_that_fails_holds_up_neither_the_list_nor_its_statement(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = [True]

    def render(_as_of: int) -> bytes:
        if broken[0]:
            raise Unavailable("ledger_unavailable", "the disk is full", "free space")
        return b"hosts"

    other = SignedFile("known_hosts", "known-hosts.v1@signer", lambda: 1, render)
    bench = Bench(tmp_path / "run", (other,))
    bench.publish(1)
    assert "known_hosts is not renewed: the disk is full" in caplog.text
    bench.now = RENEWED_EVERY
    bench.publisher.turn()
    assert bench.published() == (1, 0)
    assert bench.publisher.state().failure is None
    broken[0] = False
    bench.now += 2
    bench.publisher.turn()
    assert bench.read("known_hosts", "known-hosts.v1@signer") == b"hosts"


def test_closing_ends_a_build(bench: Bench) -> None:
    bench.publisher.turn()
    bench.publisher.close()
    assert bench.builder.closed == 1
