"""Waiting for something that another process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_Value = TypeVar("_Value")


def eventually(look: Callable[[], _Value], what: str, *, seconds: float = 60) -> _Value:
    """The first true value of `look()`; raises `TimeoutError` that says what was waited for."""
    deadline = time.monotonic() + seconds
    while not (value := look()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(0.02)
    return value
