"""The CA key from Infisical to a root-owned file: whole or not at all, and unchanged if it is the same.

`render` is the one function that tells its steps. The key's bytes stay inside `KeyMaterial`; nothing here sees them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from signer.cakey import KeyMaterial
from signer.errors import SignerError

_MEMORY: Final = ("tmpfs", "ramfs")
Result = Literal["written", "unchanged", "agrees", "differs", "missing"]


class RefusedTarget(SignerError):
    """The file may not be rendered there; `code` says why."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """How it ended, and the public facts of the key that Infisical holds."""

    result: Result
    fingerprint: str
    kind: str


def render(
    fetch: Callable[[], KeyMaterial], target: Path, *, check: bool = False, allow_disk: bool = False
) -> Rendered:
    """Brings `target` to what Infisical holds, or with `check` says whether it is; raises `SignerError`.

    1  refuse a target where no key belongs
    2  fetch, repair and check the key against its pin
    3  compare with what is there; the same is left alone
    4  write beside it, exclusively, 0400 and root's, and bring it to the disk
    5  put it in place of the old one in one step, and bring the directory to the disk
    """
    # 1
    check_target(target, allow_disk=allow_disk)
    # 2
    key = fetch()
    # 3
    same = _holds(target, key)
    if check:
        return Rendered("missing" if same is None else "agrees" if same else "differs", key.fingerprint, key.kind)
    if same:
        return Rendered("unchanged", key.fingerprint, key.kind)
    # 4 and 5
    try:
        _replace(target, key)
    except OSError as error:
        raise SignerError(
            "render_failed",
            f"the key file could not be written: {error.strerror}",
            "the old file is as it was; free space, or choose another directory",
        ) from None
    return Rendered("written", key.fingerprint, key.kind)


def create(target: Path, key: KeyMaterial) -> None:
    """Writes a new key to a file that must not exist; raises `SignerError`."""
    check_target(target, allow_disk=True)
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o400)
    except FileExistsError:
        raise RefusedTarget("target_exists", "the file exists already", "name one that does not") from None
    except OSError as error:
        raise RefusedTarget("target_unusable", f"the file cannot be made: {error.strerror}", "name another") from None
    try:
        key.write(descriptor)
    except OSError as error:
        target.unlink()
        raise SignerError("render_failed", f"the key could not be written: {error.strerror}", "free space") from None
    finally:
        os.close(descriptor)


def check_target(target: Path, *, allow_disk: bool) -> None:
    """Raises `RefusedTarget` where a key file may not be."""
    if not target.is_absolute():
        raise RefusedTarget("target_not_absolute", "the target is not an absolute path", "name it from / on")
    folder = target.parent
    try:
        facts = folder.stat(follow_symlinks=True)
    except OSError as error:
        raise RefusedTarget(
            "target_directory_unusable", f"the target's directory cannot be used: {error.strerror}", "make it, 0700"
        ) from None
    if target.is_symlink() or folder.resolve() != folder:
        raise RefusedTarget(
            "target_is_a_link", "the target, or a directory above it, is a symbolic link", "name the real one"
        )
    if target.exists() and not target.is_file():
        raise RefusedTarget("target_not_a_regular_file", "the target is no regular file", "name another one")
    if not stat.S_ISDIR(facts.st_mode) or facts.st_mode & 0o022 or facts.st_uid not in (0, os.geteuid()):
        raise RefusedTarget(
            "target_directory_not_private",
            f"the target's directory has mode {stat.S_IMODE(facts.st_mode):04o} and owner {facts.st_uid}",
            "it must be root's, and nobody else's to write",
        )
    for above in folder.parents:
        mode = above.stat().st_mode
        if mode & 0o022 and not mode & stat.S_ISVTX:
            raise RefusedTarget(
                "target_directory_not_private", "a directory above the target is for others to write", "choose another"
            )
    if any((above / ".git").exists() for above in (folder, *folder.parents)):
        raise RefusedTarget("target_in_git_work_tree", "the target lies in a git work tree", "choose another directory")
    kind = file_system_of(folder)
    if kind not in _MEMORY and not allow_disk:
        raise RefusedTarget(
            "target_on_disk",
            f"the target's directory is on {kind}, which outlives a reboot",
            "render to a tmpfs such as /run, or add --allow-disk",
        )


def file_system_of(folder: Path) -> str:
    """The type of the file system that holds `folder`, from /proc/self/mountinfo (proc(5)); `?` if it is not there."""
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split(" ")[2] == wanted:
            return after.split(" ")[0]
    return "?"


def _holds(target: Path, key: KeyMaterial) -> bool | None:
    """Whether the file is this key, owner and mode included; None if there is no file."""
    try:
        descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RefusedTarget(
            "target_unusable", f"the target cannot be read: {error.strerror}", "start as root"
        ) from None
    try:
        facts = os.fstat(descriptor)
        kept = stat.S_IMODE(facts.st_mode) in (0o400, 0o600) and facts.st_uid == os.geteuid()
        return kept and facts.st_nlink == 1 and key.is_content_of(descriptor)
    finally:
        os.close(descriptor)


def _replace(target: Path, key: KeyMaterial) -> None:
    """Writes in a child and cleans up behind it, so that killing either leaves no second file with the key.

    The file has no name until it is complete (O_TMPFILE), and its temporary name for one system call only.
    """
    temporary = target.with_name(f".{target.name}.new")
    _unlink(temporary)  # what a machine that lost power may have left
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _write(target, temporary, key)
            status = 0
        except OSError as error:
            status = error.errno or 1
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    _unlink(temporary)
    status = os.waitstatus_to_exitcode(ended)
    if status != 0:
        raise OSError(status, os.strerror(status) if status > 0 else "the writer was killed")


def _write(target: Path, temporary: Path, key: KeyMaterial) -> None:
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    unnamed = os.open(target.parent, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o400)
    os.fchmod(unnamed, 0o400)
    if os.geteuid() == 0:
        os.fchown(unnamed, 0, 0)
    key.write(unnamed)
    # With a directory descriptor Python calls linkat(2), which follows; without one link(2), which does not.
    os.link(f"/proc/self/fd/{unnamed}", temporary, src_dir_fd=folder, follow_symlinks=True)
    os.rename(temporary, target)  # noqa: PTH104 - beside the other system calls
    os.fsync(folder)


def _unlink(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.unlink()
