"""What a process does to itself before it holds anything worth stealing."""

from __future__ import annotations

import ctypes
import os
import pwd
import resource
import signal
from typing import Final

from signer.errors import BadSettings

_PR_SET_PDEATHSIG: Final = 1
_PR_GET_PDEATHSIG: Final = 2
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38


def forbid_dumps() -> None:
    """No core file, no ptrace by the same user, no /proc/PID/mem; and no way back by a set-uid program."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Has the kernel send us that signal when the process that started us ends, however it ends."""
    _prctl(_PR_SET_PDEATHSIG, number)


def take_descriptors() -> None:
    """As many file descriptors as we may have; the usual 1,024 are for programs that use select()."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def become(user: str) -> None:
    """Gives up root for `user` and its groups, for good.

    A change of user makes the kernel forget two things, which are set again: that there be no dumps
    (/proc/sys/fs/suid_dumpable decides then), and that we end with our parent.
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


def check_users(keeper_user: str | None, api_user: str | None) -> None:
    """Raises `BadSettings` unless both users are known and, as root, named."""
    users = (("SIGNER_KEEPER_USER", keeper_user), ("SIGNER_API_USER", api_user))
    if os.geteuid() != 0:
        named = [name for name, user in users if user is not None]
        if named:
            raise BadSettings(
                "users_need_root", f"{' and '.join(named)} can only be used by root", "leave them out, or start as root"
            )
        return
    missing = [name for name, user in users if user is None]
    if missing:
        raise BadSettings(
            "users_missing",
            f"started as root without {' and '.join(missing)}",
            "name two users without rights of their own, such as signer-keeper and signer-api",
        )
    for user in (keeper_user, api_user):
        if user is not None:
            look_up_user(user)


def look_up_user(user: str) -> pwd.struct_passwd:
    """The passwd entry of a name; raises `BadSettings`."""
    try:
        return pwd.getpwnam(user)
    except KeyError:
        raise BadSettings(
            "user_unknown", f"there is no user {user[:64]!a} on this host", "make it, or name another one"
        ) from None
