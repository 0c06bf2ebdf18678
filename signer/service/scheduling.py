"""Which processors the parts of the service run on, and how long at a time.

The keeper's loop bounds the rate of signatures. While it waits for the disk, the api or the view writer may be given
its processor, and keep it for a millisecond although another one is idle by then. On a host with few processors the
keeper has one for itself; on a host with many, the scheduler finds a free one. All this affects speed alone, so a host
that forbids it is left as it is.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from struct import Struct
from typing import Final

FEW: Final = 4  # processors
SHORT_TURN: Final = 100_000  # nanoseconds, the shortest that Linux takes; its own is 1 to 3 ms
_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}  # the number of the system call, which Python lacks
_SCHED_ATTR: Final = Struct("=IIQiIQQQII")  # struct sched_attr in linux/sched/types.h, as of Linux 5.3
_KEEP_POLICY: Final = 0x08  # SCHED_FLAG_KEEP_POLICY; one that an operator chose stays
_libc: Final = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True)
class Shares:
    """Numbers of processors: those of the keeper's loop, and those of the api and of the keeper's helpers."""

    keeper: frozenset[int]
    others: frozenset[int]


def share_processors(allowed: Collection[int], workers: int) -> Shares:
    """What each may use of the processors `allowed`: all of them, unless there are few, and more than api workers."""
    every = frozenset(allowed)
    if not workers < len(every) <= FEW:
        return Shares(every, every)
    own = frozenset({max(every)})
    return Shares(own, every - own)


def own_shares(workers: int) -> Shares:
    """As `share_processors`, of those that this thread may use."""
    return share_processors(os.sched_getaffinity(0), workers)


def stay_on(processors: Collection[int], process: int = 0) -> None:
    """Keeps a process, by default this thread, and all that it starts from now on, on these processors."""
    with suppress(OSError):
        os.sched_setaffinity(process, processors)


def take_short_turns() -> None:
    """Lets this thread, and all that it starts from now on, have a processor sooner, for a shorter time; since Linux
    6.12 (sched(7))."""
    if (number := _SCHED_SETATTR.get(os.uname().machine)) is not None:
        nice = os.getpriority(os.PRIO_PROCESS, 0)  # it is set, too
        attributes = _SCHED_ATTR.pack(_SCHED_ATTR.size, 0, _KEEP_POLICY, nice, 0, SHORT_TURN, 0, 0, 0, 0)
        _libc.syscall(number, 0, attributes, 0)


def give_way(niceness: int) -> None:
    """Adds to this process's niceness."""
    with suppress(OSError):
        os.nice(niceness)
