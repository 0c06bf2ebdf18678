"""Files are opened through no link and without waiting, checked once they are open, and written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from signer import files
from signer.errors import BadFile

ACTS: dict[str, Callable[[Path], Any]] = {
    "open_unread": files.open_unread,
    "open_regular": files.open_regular,
    "read_bounded": lambda path: files.read_bounded(path, 10),
    "open_or_create": files.open_or_create,
    "write_new": lambda path: files.write_new(path, b"x", 0o600),
}


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names of descriptors, no paths


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """No function leaves a descriptor behind, also where it fails."""
    before = open_descriptors()
    yield
    assert open_descriptors() <= before


@pytest.mark.parametrize("name", ACTS)
def test_no_link_is_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / "real").write_text("mine")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OSError, match=r"Too many levels|File exists"):
        ACTS[name](tmp_path / "link")
    assert (tmp_path / "real").read_text() == "mine"


def test_a_link_is_followed_where_the_caller_says_so(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("mine")
    (tmp_path / "link").symlink_to("real")
    assert files.read_bounded(tmp_path / "link", 10, follow_links=True) == b"mine"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "directory"])
def test_only_regular_files_are_read_and_no_pipe_is_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(OSError, match="it is not a regular file") as caught:
        files.read_bounded(path, 10)
    assert caught.value.errno == errno.EINVAL


def test_at_most_one_byte_over_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    assert files.read_bounded(tmp_path / "file", 10) == b"x" * 11
    assert files.read_bounded(tmp_path / "file", 100) == b"x" * 100


def test_what_is_checked_is_the_open_file(tmp_path: Path) -> None:
    """A file that takes its place after the check is not the one that is read."""
    path = tmp_path / "file"
    path.write_text("checked")

    def replaced(facts: os.stat_result) -> None:
        assert facts.st_size == len("checked")
        path.unlink()
        path.write_text("another")

    assert files.read_bounded(path, 10, check=replaced) == b"checked"


@pytest.mark.parametrize("mode, is_good", [(0o600, True), (0o644, True), (0o664, True), (0o602, False), (0o666, False)])
def test_a_file_of_commands_is_not_for_others_to_write(tmp_path: Path, mode: int, *, is_good: bool) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{}")
    path.chmod(mode)
    if is_good:
        assert files.read_owned(path, 10, "the plan") == b"{}"
    else:
        with pytest.raises(BadFile) as caught:
            files.read_owned(path, 10, "the plan")
        assert caught.value.code == "file_not_private"


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("mode, found", [(0o600, 0o600), (0o400, 0o400), (0o644, 0o640)])
def test_a_new_file_has_its_mode_and_the_umask_applies_to_the_rights_of_others(
    tmp_path: Path, mode: int, found: int
) -> None:
    files.write_new(tmp_path / "new", iter([b"in ", b"", b"pieces"]), mode)
    assert (tmp_path / "new").read_bytes() == b"in pieces"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == found


def test_a_file_that_is_kept_open_is_private_from_the_start_and_keeps_its_content(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for line in (b"one\n", b"two\n"):
        descriptor = files.open_or_create(path, append=True)
        os.write(descriptor, line)
        os.close(descriptor)
    assert path.read_bytes() == b"one\ntwo\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_new_file_replaces_none(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    with pytest.raises(FileExistsError):
        files.write_new(tmp_path / "old", b"new", 0o600)
    assert (tmp_path / "old").read_text() == "old"


def too_much() -> Iterator[bytes]:
    yield b"half"
    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def test_a_file_that_cannot_be_written_whole_is_removed(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large"):
        files.write_new(tmp_path / "new", too_much(), 0o600)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os if call == "fsync" else Path, call, full)
        with pytest.raises(OSError, match="No space left"):
            files.write_atomically(path, b"new", 0o600)
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
    files.write_atomically(path, b"new", 0o600)
    assert path.read_text() == "new"


def test_what_killed_writers_of_a_shared_file_left_is_removed(tmp_path: Path) -> None:
    ended = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    others = (f".file.{os.getppid()}.new", ".file.new", ".file.1x.new", f".another.{ended}.new", f"file.{ended}.new")
    for name in (f".file.{ended}.new", f".file.other-7.{ended}.new", f".file.{os.getpid()}.new", *others):
        (tmp_path / name).write_text("half")
    files.write_atomically(tmp_path / "file", b"new", 0o600, is_shared=True)
    assert {path.name for path in tmp_path.iterdir()} == {"file", *others}
    assert (tmp_path / "file").read_bytes() == b"new"


def test_leftovers_that_cannot_be_removed_are_no_fault(tmp_path: Path) -> None:
    (tmp_path / ".file.99999999999.new").mkdir()
    (tmp_path / ".file.9999999999.new").mkdir()
    files.write_atomically(tmp_path / "file", b"new", 0o600, is_shared=True)
    files.remove_leftovers(tmp_path / "none", "file")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_content_is_synced_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, rename = os.fsync, Path.rename

    def note_sync(descriptor: int) -> None:
        calls.append("sync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        calls.append(f"rename {path.name} {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    (tmp_path / ".file.new").write_text("left over from a crash")
    files.write_atomically(tmp_path / "file", b"new", 0o600)
    assert calls == ["sync .file.new", "rename .file.new file", f"sync {tmp_path.name}"]


def test_an_unnamed_file_gets_its_name_once_it_is_whole(tmp_path: Path) -> None:
    directory = files.open_directory(tmp_path)
    unnamed = files.create_unnamed(directory, 0o400)
    os.write(unnamed, b"key")
    assert list(tmp_path.iterdir()) == []
    files.name_unnamed(directory, unnamed, "ca")
    files.sync_directory(directory)
    os.close(unnamed)
    os.close(directory)
    assert (tmp_path / "ca").read_bytes() == b"key"
    assert stat.S_IMODE((tmp_path / "ca").stat().st_mode) == 0o400


# --- locks ------------------------------------------------------------------------------------------------------------


def test_a_lock_is_held_until_the_last_copy_of_its_descriptor_is_closed(tmp_path: Path) -> None:
    first, second = (files.open_or_create(tmp_path / "lock") for _ in range(2))
    assert files.lock(first)
    assert files.lock(first)
    copy = os.dup(first)
    os.close(first)
    assert not files.lock(second)
    os.close(copy)
    assert files.lock(second)
    os.close(second)


def test_a_file_that_has_its_owner_already_is_given_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit of `signer ledger witness` forbids the system call, and kills who makes it."""
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fchown", lambda _descriptor, uid, gid: given.append((uid, gid)))
    files.write_atomically(tmp_path / "mark", b"x", 0o600, like=tmp_path.stat())
    assert given == []
    another = os.stat_result((0o40700, 0, 0, 1, os.getuid() + 1, os.getgid(), 0, 0, 0, 0))
    files.write_atomically(tmp_path / "mark", b"x", 0o600, like=another)
    assert given == [(os.getuid() + 1, os.getgid())]
