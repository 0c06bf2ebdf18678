"""Writes the CA key from Infisical to a root-owned file atomically; leaves an identical file unchanged.

`render` lists the steps. The key's bytes stay inside `KeyMaterial`. After a kill at any moment the target is the
complete old or the complete new file. If only the renderer or only its writer is killed, no second file with the key
remains; if both are killed, or the machine stops, one may remain, and the next run removes it first.
"""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

from signer.ca.key import KeyMaterial
from signer.errors import SignerError, Unavailable, write_hint
from signer.files import (
    create_unnamed,
    held,
    lock,
    name_unnamed,
    open_directory,
    open_lock_of,
    open_unread,
    os_errors,
    sync_directory,
    undone_by,
)
from signer.units import plain

WAIT_FOR_ANOTHER: Final = 15.0  # seconds
IN_MEMORY: Final = ("tmpfs", "ramfs")
UNKNOWN: Final = "?"
_ENDING: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
_NO_ERRNO: Final = 255
Result = Literal["written", "unchanged", "agrees", "differs", "missing"]


class RefusedTarget(SignerError):
    """The target is not allowed; `code` has the reason."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """The result, with the public properties of the key in Infisical.

    `differs_in` names the properties of the file that differ: `content`, `owner`, `mode`, `links`.
    """

    result: Result
    fingerprint: str
    kind: str
    differs_in: tuple[str, ...] = ()


def render(
    fetch: Callable[[], KeyMaterial], target: Path, *, check: bool = False, allow_disk: bool = False
) -> Rendered:
    """Writes the key to `target`, or with `check` only compares; raises `SignerError`.

    1  refuse an unsafe target, and remove the temporary file of an interrupted run
    2  fetch and repair the key, and check it against its pin
    3  compare with the target; leave an identical one unchanged
    4  write and sync an unnamed file with mode 0400, owned by root
    5  replace the target atomically and sync the directory
    """
    # 1
    check_target(target, allow_disk=allow_disk)
    if not check:
        _remove_leftover(target)
    # 2
    key = fetch()
    # 3
    if check:
        return _compared(target, key, "agrees")
    with _locked_directory(target.parent) as folder:
        found = _compared(target, key, "unchanged")
        if found.result == "unchanged":
            return found
        # 4 and 5
        try:
            _replace(folder, target, key)
        except OSError as error:
            in_place = _compared(target, key, "unchanged").result == "unchanged"
            raise SignerError(
                "render_failed",
                f"the key file could not be written: {error.strerror}",
                "the new file is in place but may be lost in a power failure; render again"
                if in_place
                else f"the old file is unchanged; {write_hint(error, str(target.parent))}",
            ) from None
    return Rendered("written", key.fingerprint, key.kind)


def create(target: Path, make: Callable[[], KeyMaterial]) -> KeyMaterial:
    """Creates a key in a new file atomically; checks the target first. Raises `SignerError`."""
    check_target(target, allow_disk=True, sticky_too=True)
    exists = RefusedTarget("target_exists", "the target already exists", "choose another file name")
    if os.path.lexists(target):
        raise exists
    key = make()
    folder = open_directory(target.parent)
    try:
        name_unnamed(folder, _write(folder, key), target.name)
        with undone_by(partial(os.unlink, target.name, dir_fd=folder)):
            sync_directory(folder)
    except FileExistsError:
        raise exists from None
    except OSError as error:
        raise SignerError(
            "render_failed",
            f"the key file could not be written: {error.strerror}",
            write_hint(error, str(target.parent)),
        ) from None
    finally:
        os.close(folder)
    return key


def check_target(target: Path, *, allow_disk: bool, sticky_too: bool = False) -> None:
    """Raises `RefusedTarget` unless `target` is a safe place for a key file.

    `sticky_too` also allows a directory such as /tmp, whose sticky bit protects the file.
    """
    if not target.is_absolute() or ".." in target.parts:
        raise RefusedTarget(
            "target_not_absolute", "the target has .. in it or is not an absolute path", "give an absolute path"
        )
    with os_errors(_no_directory):
        _check_path(target, sticky_too=sticky_too)
        kind = file_system_of(target.parent)
    if kind not in IN_MEMORY and not allow_disk:
        raise RefusedTarget(
            "target_on_disk",
            f"the directory of the target is on {kind}, which survives a reboot",
            "render to a tmpfs such as /run, or add --allow-disk",
        )


def _check_path(target: Path, *, sticky_too: bool) -> None:
    folder = target.parent
    facts = folder.stat()
    if target.is_symlink() or folder.resolve() != folder:
        raise RefusedTarget(
            "target_is_a_link", "the target, or a directory above it, is a symbolic link", "give the real path"
        )
    if not stat.S_ISDIR(facts.st_mode):
        raise NotADirectoryError(20, "it is not a directory")
    if os.path.lexists(target) and not target.is_file():
        raise RefusedTarget("target_not_a_regular_file", "the target is not a regular file", "choose another path")
    for above in (folder, *folder.parents):
        _check_private(above, sticky_too=sticky_too or above != folder)
        if os.path.lexists(above / ".git"):
            raise RefusedTarget(
                "target_in_git_work_tree", "the target lies in a git work tree", "choose another directory"
            )


def _check_private(directory: Path, *, sticky_too: bool) -> None:
    """Raises `RefusedTarget` if others may write. An access control list shows in the group bits, acl(5)."""
    facts = directory.stat()
    writable = facts.st_mode & 0o022 and not (sticky_too and facts.st_mode & stat.S_ISVTX)
    if writable or facts.st_uid not in (0, os.geteuid()):
        raise RefusedTarget(
            "target_directory_not_private",
            f"{plain(directory)}, which is in the path of the target, has mode {stat.S_IMODE(facts.st_mode):04o} and "
            f"owner {facts.st_uid}",
            "each directory must be owned by root and writable only by root",
        )


def file_system_of(folder: Path) -> str:
    """The type of the file system that holds `folder`, from /proc/self/mountinfo (proc(5)); `?` if unknown."""
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        if before.split(" ")[2] == wanted:
            return after.split(" ")[0]
    return UNKNOWN


def _compared(target: Path, key: KeyMaterial, same: Literal["agrees", "unchanged"]) -> Rendered:
    """Compares the target with the key: `same`, `missing`, or `differs` with the differences."""
    public = (key.fingerprint, key.kind)
    try:
        with held(open_unread(target)) as descriptor:
            facts, has_content = os.fstat(descriptor), key.is_content_of(descriptor)
    except FileNotFoundError:
        return Rendered("missing", *public)
    except OSError as error:
        text = f"the target cannot be read: {error.strerror}"
        raise RefusedTarget("target_unusable", text, "start as root") from None
    found = {
        "content": has_content,
        "owner": facts.st_uid == os.geteuid() and (facts.st_gid == 0 or os.geteuid() != 0),
        "mode": stat.S_IMODE(facts.st_mode) in (0o400, 0o600),
        "links": facts.st_nlink == 1,
    }
    differs_in = tuple(name for name, right in found.items() if not right)
    return Rendered("differs" if differs_in else same, *public, differs_in)


@contextmanager
def _locked_directory(path: Path) -> Iterator[int]:
    """A descriptor of the directory, locked against other renderers; raises `SignerError`.

    Others may open the directory, so the lock is on a file of this user's that is named after it. The writer inherits
    the lock, so that after the death of a renderer others wait for its writer.
    """
    with os_errors(_no_directory):
        folder = open_directory(path)
    with held(folder):
        with os_errors(_no_lock):
            lock_file = open_lock_of(path)
        with held(lock_file):
            with os_errors(_no_lock):
                _wait_for_lock(lock_file)
            yield folder


def _wait_for_lock(lock_file: int) -> None:
    deadline = time.monotonic() + WAIT_FOR_ANOTHER
    while not lock(lock_file):
        if time.monotonic() > deadline:
            raise Unavailable(
                "target_busy",
                "another `signer ca render` works on the directory of the target",
                f"wait until it has ended; find it with `fuser {Path(f'/proc/self/fd/{lock_file}').readlink()}`",
            )
        time.sleep(0.05)


def _no_lock(error: OSError) -> SignerError:
    return SignerError(
        "render_lock_unusable",
        f"the lock file of this user cannot be used: {error.strerror}",
        write_hint(error, "the directory of this user's lock files"),
    )


def _no_directory(error: OSError) -> RefusedTarget:
    return RefusedTarget(
        "target_directory_unusable",
        f"the directory of the target cannot be used: {error.strerror}",
        "create it with mode 0700",
    )


def _temporary(target: Path) -> str:
    return f".{target.name}.new"


def _remove_leftover(target: Path) -> None:
    leftover = target.with_name(_temporary(target))
    if os.path.lexists(leftover):
        with _locked_directory(target.parent):
            try:
                leftover.unlink(missing_ok=True)
            except OSError as error:
                raise SignerError(
                    "leftover_stays",
                    f"the temporary file of an interrupted run cannot be removed: {error.strerror}",
                    f"remove {leftover.name} beside the target by hand",
                ) from None


def _replace(folder: int, target: Path, key: KeyMaterial) -> None:
    """Writes the file in a child process and removes its temporary file; raises `OSError`.

    The file has no name until it is complete (O_TMPFILE), and a temporary name only between two system calls. Both
    processes block Ctrl-C and SIGTERM for these few milliseconds.
    """
    temporary = _temporary(target)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        child = os.fork()
        if child == 0:
            _run_writer(folder, temporary, target.name, key)
        _, ended = os.waitpid(child, 0)
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    status = os.waitstatus_to_exitcode(ended)
    if status != 0:
        raise OSError(status, os.strerror(status) if 0 < status < _NO_ERRNO else "the writer was killed")


def _run_writer(folder: int, temporary: str, name: str, key: KeyMaterial) -> None:
    """Never returns; the exit status is the error's number."""
    status = _NO_ERRNO
    try:
        unnamed = _write(folder, key)
        name_unnamed(folder, unnamed, temporary)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        sync_directory(folder)
        status = 0
    except OSError as error:
        status = error.errno or _NO_ERRNO
    finally:
        os._exit(status)


def _write(folder: int, key: KeyMaterial) -> int:
    """A descriptor of a complete unnamed file with mode 0400, for root owned by root."""
    unnamed = create_unnamed(folder, 0o400)
    key.write(unnamed)
    return unnamed
