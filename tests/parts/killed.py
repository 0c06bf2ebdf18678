"""A child that is killed at one of its calls which change or sync files."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

_CALLS = ("rename", "mkdir", "unlink", "rmdir", "fsync", "pwrite", "open", "close")


def dies_at(number: int, act: Callable[[], object]) -> bool:
    """Whether a child that does `act` was killed before its call `number` of those that change or sync files."""
    child = os.fork()
    if child == 0:
        left = number

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def dying(*values: Any, **named: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), 9)
                return call(*values, **named)

            return dying

        for name in _CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            act()
        except BaseException:  # noqa: BLE001 - the child must not run the rest of the tests
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -9), f"call {number}: the child failed"
    return status == -9
