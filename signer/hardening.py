"""Hardens a process before it holds secrets."""

from __future__ import annotations

import ctypes
import gc
import os
import pwd
import resource
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from signer.errors import BadSettings

_PR_SET_PDEATHSIG: Final = 1
_PR_GET_PDEATHSIG: Final = 2
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_COLLECT_AFTER: Final = (700, 10, 10)  # new objects, and looks of one generation before one at the next; Python's own
_UCRED: Final = struct.Struct("3i")  # struct ucred


def forbid_dumps() -> None:
    """Forbids core files, ptrace and /proc/PID/mem for the same user, and new privileges by set-uid programs."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Has the kernel send this process the signal when its parent ends for any reason."""
    _prctl(_PR_SET_PDEATHSIG, number)


def serve_parent_only() -> None:
    """For a helper of another process: it ends with that one, not by the signals that a terminal or systemd sends to
    both, shows nobody its memory, and writes files for its user alone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)
    forbid_dumps()
    os.umask(0o077)


def release_memory() -> None:
    """Ends the start of a process that runs for long: what it made is not looked through again for unused cycles, and
    memory that it no longer uses goes back to the kernel, where the C library can do that (malloc_trim(3)).

    From now on Python looks for cycles after few new objects, because each look stops the whole process: 22 ms with the
    50,000 objects that a start leaves it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def take_descriptors() -> None:
    """Raises the limit of file descriptors to the maximum; the default of 1,024 exists for select()."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def become(user: str) -> None:
    """Changes from root to `user` permanently, without supplementary groups.

    A change of user resets two flags in the kernel, which are set again: no dumps (otherwise
    /proc/sys/fs/suid_dumpable applies), and the signal at the parent's end.
    """
    entry = look_up_user(user)
    number = ctypes.c_int(0)
    _prctl(_PR_GET_PDEATHSIG, ctypes.byref(number))
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    forbid_dumps()
    die_with_parent(number.value)


def _prctl(option: int, value: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def check_users(**users: str | None) -> None:
    """Raises `BadSettings` unless all users exist and, for root, are set; each is named by its setting."""
    if os.geteuid() != 0:
        named = [name for name, user in users.items() if user is not None]
        if named:
            raise BadSettings(
                "users_need_root", f"{' and '.join(named)} can only be used by root", "unset them, or start as root"
            )
        return
    missing = [name for name, user in users.items() if user is None]
    if missing:
        raise BadSettings(
            "users_missing",
            f"started as root without {' and '.join(missing)}",
            "set them to unprivileged users, one for each: signer-keeper, signer-api, signer-notices",
        )
    for user in users.values():
        if user is not None:
            look_up_user(user)


@contextmanager
def acting_as(uid: int | None, *, with_groups: bool = False) -> Iterator[None]:
    """Acts as that user for a moment, if this process is root; the process must have one thread.

    `with_groups` also takes that user's groups, which is what the user may do and not a bit more.
    """
    if uid is None or os.geteuid() != 0:
        yield
        return
    before = os.getgroups(), os.getegid()
    try:
        if with_groups:
            _take_groups(uid)
        os.seteuid(uid)
        yield
    finally:
        os.seteuid(0)
        if with_groups:
            os.setegid(before[1])
            os.setgroups(before[0])


def _take_groups(uid: int) -> None:
    try:
        user = pwd.getpwuid(uid)
    except KeyError:  # a number without a name is in no group
        os.setgroups([])
        return
    os.setgroups(os.getgrouplist(user.pw_name, user.pw_gid))
    os.setegid(user.pw_gid)


class PeerProcess(NamedTuple):
    """The process at the other end of a unix socket, as it was when it connected or began to listen."""

    pid: int
    uid: int
    gid: int


def peer_process(connection: socket.socket) -> PeerProcess:
    """The kernel's word for who is at the other end (unix(7), SO_PEERCRED); raises `OSError`."""
    return PeerProcess(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def look_up_user(user: str) -> pwd.struct_passwd:
    """The passwd entry of a name; raises `BadSettings`."""
    try:
        return pwd.getpwnam(user)
    except KeyError:
        raise BadSettings(
            "user_unknown", f"there is no user {user[:64]!a} on this host", "create it, or set another one"
        ) from None
