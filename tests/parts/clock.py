"""A clock that tests set."""

from __future__ import annotations


class Clock:
    """Seconds since whenever; moves only when a test says so."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
