"""Grants that somebody else signs: a few threads with a bound and a deadline, so that the loop never waits.

The keeper submits a grant, goes on, and collects what came back when it is woken. Nothing is decided here. The threads
are daemons of our own making: an executor's would be waited for when the process ends, however long they hang.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from signer.errors import SignerError, Unavailable
from signer.model import Grant, Returned

THREADS: Final = 8
MAX_OUTSTANDING: Final = 64
DEADLINE: Final = 5.0  # seconds from submission to the caller's answer
SLOW_AFTER: Final = 1.0  # seconds; with an answer due for so long, fewer may wait
_K = TypeVar("_K")


@dataclass(slots=True, eq=False)
class _Job(Generic[_K]):
    """One grant on its way; `key` is the submitter's own."""

    key: _K
    grant: Grant
    sent: float
    result: Returned | SignerError | None = None

    def is_overdue(self, now: float) -> bool:
        return now >= self.sent + DEADLINE


class SigningPool(Generic[_K]):
    """Runs `sign` for grants; `wake` is called, from any thread, when something can be collected.

    `most_when_slow` bounds what may wait while answers are slow: each holds a thread of the api, which has other work.
    """

    def __init__(
        self, sign: Callable[[Grant], Returned], wake: Callable[[], object], most_when_slow: int = MAX_OUTSTANDING
    ) -> None:
        self._sign = sign
        self._wake = wake
        self._most_when_slow = most_when_slow
        self._todo: queue.SimpleQueue[_Job[_K] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[_Job[_K]] = queue.SimpleQueue()
        self._out: dict[_Job[_K], None] = {}  # oldest first
        for number in range(THREADS):
            threading.Thread(target=self._work, name=f"forward-{number}", daemon=True).start()

    def submit(self, key: _K, grant: Grant) -> None:
        """Sends a grant out; raises `Unavailable` if too many are out already."""
        now, waiting = time.monotonic(), len(self._out)
        is_slow = waiting > 0 and now - next(iter(self._out)).sent >= SLOW_AFTER
        if waiting >= (min(self._most_when_slow, MAX_OUTSTANDING) if is_slow else MAX_OUTSTANDING):
            raise Unavailable("vault_busy", f"{waiting} requests wait for Vault already", "try again")
        errand = _Job(key, grant, now)
        self._out[errand] = None
        self._todo.put(errand)

    def _work(self) -> None:
        """A thread's life. What nobody waits for any more is not asked for: it would be signed and thrown away."""
        while (errand := self._todo.get()) is not None:
            if not errand.is_overdue(time.monotonic()):
                errand.result = self._ask(errand.grant)
                self._done.put(errand)
                self._wake()

    def _ask(self, grant: Grant) -> Returned | SignerError:
        try:
            return self._sign(grant)
        except SignerError as error:
            return error
        except Exception as error:  # noqa: BLE001 - a fault in a thread must come back as an answer
            return Unavailable("vault_failed", f"asking Vault failed: {type(error).__name__}", "see the log")

    def collect(self) -> list[tuple[_K, Returned | SignerError]]:
        """What came back since the last time, and what is overdue: its late result is thrown away."""
        results: list[tuple[_K, Returned | SignerError]] = []
        while not self._done.empty():
            errand = self._done.get()
            if errand in self._out and errand.result is not None:
                del self._out[errand]
                results.append((errand.key, errand.result))
        now = time.monotonic()
        for errand in [errand for errand in self._out if errand.is_overdue(now)]:
            del self._out[errand]
            late = Unavailable(
                "vault_slow", f"Vault did not sign within {DEADLINE:.0f} s", "look at Vault, then try again"
            )
            results.append((errand.key, late))
        return results

    def is_idle(self) -> bool:
        """True when nothing is out."""
        return not self._out

    def close(self) -> list[tuple[_K, Returned | SignerError]]:
        """Starts nothing more, and gives up what is out; threads that hang are left behind."""
        for _ in range(THREADS):
            self._todo.put(None)
        results = self.collect()
        given_up = Unavailable("keeper_stopping", "the service is stopping, and Vault has not signed", "try again")
        results += [(errand.key, given_up) for errand in self._out]
        self._out.clear()
        return results
