"""Safe opening, reading, locking and writing of files, for every module but `safe-session`.

Links are followed only on request, pipes and devices never block, and checks apply to the open file, not to the path.
Functions raise `OSError`, which each caller maps to its own code, or a `SignerError` where their docstring names it.
Only `ca/key_text.py` writes the bytes of a key, to descriptors from here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import sha256
from io import BufferedReader
from pathlib import Path
from typing import Final

from signer.errors import BadFile, BadSettings, SignerError
from signer.units import plain

MAX_TOKEN: Final = 4096  # bytes


@contextmanager
def os_errors(make: Callable[[OSError], SignerError]) -> Iterator[None]:
    """Raises what `make` makes of an `OSError` in the block."""
    try:
        yield
    except OSError as error:
        raise make(error) from None


@contextmanager
def held(descriptor: int) -> Iterator[int]:
    """Closes the descriptor at the end of the block."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def undone_by(undo: Callable[[], object]) -> Iterator[None]:
    """Calls `undo` if the block ends with an error."""
    try:
        yield
    except BaseException:
        undo()
        raise


# --- reading ----------------------------------------------------------------------------------------------------------


def open_unread(path: Path, *, follow_links: bool = False) -> int:
    """A descriptor for reading, not checked yet; does not block on a pipe."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW))


def check_regular(facts: os.stat_result) -> None:
    """Raises `OSError` for a directory, a pipe, a device or a socket."""
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def open_regular(
    path: Path, *, check: Callable[[os.stat_result], None] = check_regular, follow_links: bool = False
) -> BufferedReader:
    """Opens the file for reading and passes its status to `check`, whose errors are raised."""
    descriptor = open_unread(path, follow_links=follow_links)
    with undone_by(partial(os.close, descriptor)):
        check(os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")


def read_bounded(
    path: Path, limit: int, *, check: Callable[[os.stat_result], None] = check_regular, follow_links: bool = False
) -> bytes:
    """At most `limit` + 1 bytes of the content, so that the caller can detect a file that is too large."""
    with open_regular(path, check=check, follow_links=follow_links) as file:
        return file.read(limit + 1)


def read_owned(path: Path, limit: int, name: str) -> bytes:
    """As `read_bounded`, following links, for a file that names commands to run; also raises `BadFile`.

    The file must belong to this user or root and be writable by no other user, except members of this user's group.
    """

    def check(facts: os.stat_result) -> None:
        check_regular(facts)
        groups = (0, os.getegid())  # with one group per user, group write is harmless
        is_others = facts.st_mode & 0o002 or (facts.st_mode & 0o020 and facts.st_gid not in groups)
        if facts.st_uid not in (0, os.geteuid()) or is_others:
            raise BadFile(
                "file_not_private",
                f"{name} belongs to another user, or other users may write it",
                "check its content, then chown it and chmod 0600",
            )

    return read_bounded(path, limit, check=check, follow_links=True)


def read_secret_word(path: Path, setting: str, *, is_vaults: bool = False, reader: str = "you") -> str:
    """The one word in a regular file that only its owner may use, named by `setting`; raises `BadSettings`.

    Errors name the path and the setting, argument or key of a file that gave it.

    Codes begin with `vault_token` if `is_vaults`, else `signer_token`; no error contains any of the content. `reader`
    names the user who must be able to read the file.
    """

    def check(facts: os.stat_result) -> None:
        if not stat.S_ISREG(facts.st_mode) or facts.st_mode & 0o077:
            raise BadSettings(
                "vault_token_not_private" if is_vaults else "signer_token_not_private",
                f"{plain(path)} ({setting}) has mode {stat.S_IMODE(facts.st_mode):04o}",
                "chmod 0400 it",
            )

    try:
        token = read_bounded(path, MAX_TOKEN, check=check).decode("utf-8-sig", "replace").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its path is malformed"
        raise BadSettings(
            "vault_token_unreadable" if is_vaults else "signer_token_unreadable",
            f"{plain(path)} ({setting}) cannot be opened: {reason}",
            f"name a regular file that {reader} may read",
        ) from None
    if not token or len(token) > MAX_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise BadSettings(
            "vault_token_malformed" if is_vaults else "signer_token_malformed",
            f"{plain(path)} ({setting}) is not one token",
            "put the token into it",
        )
    return token


def belongs_to(path: Path) -> str:
    """Whose file or directory refused the access to `path`: `/var/lib/signer belongs to user signer, mode 0700`."""
    refuser = path
    for part in (*reversed(path.absolute().parents), path.absolute()):
        try:
            part.stat()
        except OSError:  # the directory before it may not be searched, or it is not there
            break
        refuser = part
    try:
        facts = refuser.stat()
    except OSError as error:
        return f"{refuser} cannot be looked at: {error.strerror}"
    return f"{refuser} belongs to user {user_name(facts.st_uid)}, mode {stat.S_IMODE(facts.st_mode):04o}"


def user_name(uid: int) -> str:
    """The name of a user, or the number if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


# --- writing ----------------------------------------------------------------------------------------------------------


def identity_of(path: Path) -> tuple[int, int] | None:
    """Device and inode of what a name stands for, links not followed; None if there is nothing."""
    try:
        facts = path.lstat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def open_or_create(path: Path, *, append: bool = False) -> int:
    """A descriptor of a file that stays open, such as a journal; a new file has mode 0600."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(path, flags | (os.O_APPEND if append else 0), 0o600)


def write_new(
    path: Path,
    content: bytes | Iterator[bytes],
    mode: int,
    *,
    like: os.stat_result | None = None,
    is_synced: bool = True,
) -> None:
    """Writes a file that must not exist, whole or not at all, and syncs it; the caller syncs the directory.

    The umask applies unless `mode` grants rights only to the owner, or the file gets owner and group of `like`.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with undone_by(partial(path.unlink, missing_ok=True)), os.fdopen(descriptor, "wb", buffering=0) as file:
        if like is not None and _owner(os.fstat(descriptor)) != _owner(like):  # a unit may forbid the call
            os.fchown(descriptor, like.st_uid, like.st_gid)  # by descriptor: others may rename in the directory
        if like is not None or not mode & 0o077:
            os.fchmod(descriptor, mode)
        for piece in (content,) if isinstance(content, bytes) else content:
            view = memoryview(piece)
            while view:
                view = view[file.write(view) :]
        if is_synced:
            os.fsync(descriptor)


def _owner(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_uid, facts.st_gid


def append_line(descriptor: int, line: bytes, *, is_synced: bool = True) -> None:
    """Appends a line to a file that nobody else writes meanwhile, whole or not at all; raises `OSError`."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    try:
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if is_synced:
            os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, end)
        raise


def write_atomically(
    path: Path,
    content: bytes,
    mode: int,
    *,
    is_shared: bool = False,
    like: os.stat_result | None = None,
    is_synced: bool = True,
) -> None:
    """Replaces the file as a whole or keeps the old one; file and name are synced when this returns, if `is_synced`.

    `.NAME.new` beside it is written first. One left by a crash is replaced, so two processes must not write the file
    at once, unless it `is_shared`: then it is `.NAME.PID.new`. The new file has owner and group of `like`, and `mode`
    whatever the umask.
    """
    first = path.with_name(f".{path.name}.{os.getpid()}.new" if is_shared else f".{path.name}.new")
    if is_shared:
        remove_leftovers(path.parent, path.name)
    first.unlink(missing_ok=True)
    with undone_by(partial(first.unlink, missing_ok=True)):
        write_new(first, content, mode, like=like, is_synced=is_synced)
        first.rename(path)
        if is_synced:
            sync_directory(path.parent)


def remove_leftovers(directory: Path, prefix: str) -> None:
    """Removes what processes that have ended left when they wrote shared files whose names begin with `prefix`.

    What cannot be removed stays, and does no harm. A process in another PID namespace counts as ended; if it was
    writing, its write fails.
    """
    form = re.compile(rf"\.{re.escape(prefix)}.*\.([1-9][0-9]{{0,9}})\.new", re.DOTALL)
    with suppress(OSError):
        for path in list(directory.iterdir()):
            match = form.fullmatch(path.name)
            if match is not None and not _is_running(int(match[1])):
                path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


# --- directories and locks --------------------------------------------------------------------------------------------


def open_directory(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def sync_directory(directory: Path | int) -> None:
    """Syncs the names in a directory, given by path or by descriptor."""
    if isinstance(directory, int):
        os.fsync(directory)
        return
    with held(open_directory(directory)) as descriptor:
        os.fsync(descriptor)


def sync_file(path: Path) -> None:
    """Syncs the content of a file that others write."""
    with held(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)) as descriptor:
        os.fsync(descriptor)


def own_lock_folder() -> Path:
    """A directory for this user's locks, which no other user may open; raises `OSError`."""
    folder = Path("/run/signer-locks") if os.geteuid() == 0 else Path.home() / ".signer-locks"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
        raise OSError(errno.EPERM, f"{folder} is a link, or belongs to another user")
    if stat.S_IMODE(facts.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


def open_lock(path: Path) -> int:
    """A descriptor of a lock file that no other user may open; raises `OSError`.

    Whoever may open a file may lock it, so a lock belongs on a file 0600 in a directory of this user's, never on a
    directory or on a file that others may read. An own file with another mode is closed to others.
    """
    descriptor = open_or_create(path)
    with undone_by(partial(os.close, descriptor)):
        facts = os.fstat(descriptor)
        check_regular(facts)
        if facts.st_uid != os.geteuid():
            raise OSError(errno.EPERM, f"the lock file {path.name} belongs to user {facts.st_uid}")
        if stat.S_IMODE(facts.st_mode) != 0o600:
            os.fchmod(descriptor, 0o600)
    return descriptor


def claim(path: Path, in_use: SignerError) -> int:
    """`open_lock`, locked while the descriptor is open.

    Raises `OSError`, or `in_use` if another process has the lock.
    """
    descriptor = open_lock(path)
    with undone_by(partial(os.close, descriptor)):
        if not lock(descriptor):
            raise in_use
    return descriptor


def open_lock_of(path: Path) -> int:
    """`open_lock` for a path that others may open: a file in `own_lock_folder` named after it; raises `OSError`."""
    return open_lock(own_lock_folder() / f"{sha256(os.path.realpath(path).encode()).hexdigest()}.lock")


def lock(descriptor: int, *, waits: bool = False) -> bool:
    """Locks a file exclusively; False if another process has it, unless this `waits` for that.

    The lock lasts until every copy of the descriptor is closed.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_name(path: Path) -> int:
    """A descriptor that only names what `path` itself is, also if it may not be read; raises `OSError`."""
    return os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)


def open_again(descriptor: int) -> int:
    """The pipe or terminal of a descriptor, opened for non-blocking writes; raises `OSError`.

    The flag applies to the new descriptor only, not to processes that share the old one.
    """
    return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)


def create_unnamed(directory: int, mode: int) -> int:
    """A descriptor of a new file without a name, deleted when closed; owned by root if created by root."""
    descriptor = os.open(".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, mode, dir_fd=directory)
    with undone_by(partial(os.close, descriptor)):
        os.fchmod(descriptor, mode)
        if os.geteuid() == 0:
            os.fchown(descriptor, 0, 0)
    return descriptor


def name_unnamed(directory: int, descriptor: int, name: str) -> None:
    """Gives a file from `create_unnamed` a name in `directory` that must not exist."""
    # With a directory's descriptor Python calls linkat(2), which follows; without one link(2), which does not.
    os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=directory, follow_symlinks=True)
