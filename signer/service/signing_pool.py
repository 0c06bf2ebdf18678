"""A bounded pool of threads that have grants signed by Vault, so that the keeper's loop never waits.

The keeper submits a grant and collects results when it is woken. The threads are daemons: those of an executor would
delay the end of the process while they hang.
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
DEADLINE: Final = 5.0  # seconds from submission to the caller's reply
SLOW_AFTER: Final = 1.0  # seconds; with a result outstanding for so long, fewer grants may wait
_K = TypeVar("_K")


@dataclass(slots=True, eq=False)
class _Job(Generic[_K]):
    """One submitted grant; `key` is the submitter's."""

    key: _K
    grant: Grant
    submitted_at: float
    result: Returned | SignerError | None = None

    def is_overdue(self, now: float) -> bool:
        return now >= self.submitted_at + DEADLINE


class SigningPool(Generic[_K]):
    """Runs `sign` for grants; calls `wake`, from any thread, when a result can be collected.

    `max_when_slow` bounds the waiting grants while Vault is slow: each of them occupies a thread of the api.
    """

    def __init__(
        self, sign: Callable[[Grant], Returned], wake: Callable[[], object], max_when_slow: int = MAX_OUTSTANDING
    ) -> None:
        self._sign = sign
        self._wake = wake
        self._max_when_slow = max_when_slow
        self._todo: queue.SimpleQueue[_Job[_K] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[_Job[_K]] = queue.SimpleQueue()
        self._outstanding: dict[_Job[_K], None] = {}  # oldest first
        for number in range(THREADS):
            threading.Thread(target=self._work, name=f"forward-{number}", daemon=True).start()

    def submit(self, key: _K, grant: Grant) -> None:
        """Queues a grant; raises `Unavailable` if too many are outstanding."""
        now, waiting = time.monotonic(), len(self._outstanding)
        is_slow = waiting > 0 and now - next(iter(self._outstanding)).submitted_at >= SLOW_AFTER
        if waiting >= (min(self._max_when_slow, MAX_OUTSTANDING) if is_slow else MAX_OUTSTANDING):
            raise Unavailable(
                "vault_busy", f"{waiting} requests are already waiting for Vault", "retry in a few seconds"
            )
        job = _Job(key, grant, now)
        self._outstanding[job] = None
        self._todo.put(job)

    def _work(self) -> None:
        """The loop of a thread. Skips overdue jobs: their results would be discarded."""
        while (job := self._todo.get()) is not None:
            if not job.is_overdue(time.monotonic()):
                job.result = self._run(job.grant)
                self._done.put(job)
                self._wake()

    def _run(self, grant: Grant) -> Returned | SignerError:
        try:
            return self._sign(grant)
        except SignerError as error:
            return error
        except Exception as error:  # noqa: BLE001 - an exception in a thread must become a reply
            return Unavailable(
                "vault_failed", f"the request to Vault failed: {type(error).__name__}", "see the service's log"
            )

    def collect(self) -> list[tuple[_K, Returned | SignerError]]:
        """The results since the last call, and errors for overdue jobs, whose late results are discarded."""
        results: list[tuple[_K, Returned | SignerError]] = []
        while not self._done.empty():
            job = self._done.get()
            if job in self._outstanding and job.result is not None:
                del self._outstanding[job]
                results.append((job.key, job.result))
        now = time.monotonic()
        for job in [job for job in self._outstanding if job.is_overdue(now)]:
            del self._outstanding[job]
            late = Unavailable("vault_slow", f"Vault did not sign within {DEADLINE:.0f} s", "check Vault, then retry")
            results.append((job.key, late))
        return results

    def is_idle(self) -> bool:
        """True if no job is outstanding."""
        return not self._outstanding

    def close(self) -> list[tuple[_K, Returned | SignerError]]:
        """Stops the threads and returns errors for outstanding jobs; does not wait for threads that hang."""
        for _ in range(THREADS):
            self._todo.put(None)
        results = self.collect()
        given_up = Unavailable("keeper_stopping", "the service is stopping before Vault signed", "retry")
        results += [(job.key, given_up) for job in self._outstanding]
        self._outstanding.clear()
        return results
