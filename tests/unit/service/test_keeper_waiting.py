"""The keeper looks for its next message for a moment before it sleeps."""

from __future__ import annotations

import selectors
import time
from typing import Any

import pytest

from signer.service.keeper import LOOKS_FOR, wait_for_events

READY = [("a connection", selectors.EVENT_READ)]


class Played:
    """A selector that is ready at one of its looks; each look takes 10 µs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ready_at: int) -> None:
        self.now = 5.0
        self.timeouts: list[float] = []
        self._ready_at = ready_at
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def select(self, timeout: float) -> list[Any]:
        self.timeouts.append(timeout)
        self.now += 0.00001
        return READY if len(self.timeouts) == self._ready_at else []


def wait(played: Played, timeout: float, looks_for: float) -> list[Any]:
    return wait_for_events(played, timeout, looks_for)  # type: ignore[arg-type]


def test_what_is_there_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(monkeypatch, 1)
    assert wait(played, 1.0, 0.00005) == READY
    assert played.timeouts == [0]


def test_what_comes_within_a_moment_is_not_slept_for(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(monkeypatch, 4)
    assert wait(played, 1.0, 0.00005) == READY
    assert played.timeouts == [0, 0, 0, 0]


def test_then_it_sleeps_until_something_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(monkeypatch, 0)
    assert wait(played, 0.25, 0.00005) == []
    assert played.timeouts[-1] == 0.25
    assert set(played.timeouts[:-1]) == {0}
    assert len(played.timeouts) <= 8, "it looks for a moment only"


@pytest.mark.parametrize("timeout, looks_for", [(0.0, 0.00005), (0.00001, 0.00005), (1.0, 0.0)])
def test_with_no_time_or_no_other_processor_it_looks_once(
    monkeypatch: pytest.MonkeyPatch, timeout: float, looks_for: float
) -> None:
    played = Played(monkeypatch, 0)
    assert wait(played, timeout, looks_for) == []
    assert len(played.timeouts) <= 2 + (looks_for == 0)
    assert played.timeouts[-1] == timeout


def test_a_moment_is_short() -> None:
    assert 0 <= LOOKS_FOR <= 0.0001
