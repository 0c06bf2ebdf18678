"""A bounded pool of threads for signers that may be slow (Vault, an ssh-agent), so that the keeper's loop never waits.

The keeper submits a call and collects results when it is woken. The threads are daemons: those of an executor would
delay the end of the process while they hang.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from signer.errors import SignerError
from signer.ssh.signing import Obtained, SlowSigner

THREADS: Final = 8
MAX_OUTSTANDING: Final = 64
SLOW_AFTER: Final = 1.0  # seconds; with a result outstanding for so long, fewer calls may wait
_K = TypeVar("_K")


@dataclass(slots=True, eq=False)
class _Job(Generic[_K]):
    """One submitted call; `key` is the submitter's."""

    key: _K
    obtain: Callable[[], Obtained]
    due_at: float
    result: Obtained | SignerError | None = None


class SigningPool(Generic[_K]):
    """Runs calls of one slow signer; calls `wake`, from any thread, when a result can be collected.

    `max_when_slow` bounds the waiting calls while the signer is slow: each of them occupies a thread of the api.
    """

    def __init__(self, slow: SlowSigner, wake: Callable[[], object], max_when_slow: int = MAX_OUTSTANDING) -> None:
        self._slow = slow
        self._wake = wake
        self._max_when_slow = max_when_slow
        self._todo: queue.SimpleQueue[_Job[_K] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[_Job[_K]] = queue.SimpleQueue()
        self._outstanding: dict[_Job[_K], None] = {}  # oldest first
        for number in range(THREADS):
            threading.Thread(target=self._work, name=f"signing-{number}", daemon=True).start()

    def submit(self, key: _K, obtain: Callable[[], Obtained]) -> None:
        """Queues a call; raises `Unavailable` if too many are outstanding."""
        due_at, waiting = time.monotonic() + self._slow.deadline, len(self._outstanding)
        is_slow = waiting > 0 and due_at - next(iter(self._outstanding)).due_at >= SLOW_AFTER
        if waiting >= (min(self._max_when_slow, MAX_OUTSTANDING) if is_slow else MAX_OUTSTANDING):
            raise self._slow.busy(waiting)
        job = _Job(key, obtain, due_at)
        self._outstanding[job] = None
        self._todo.put(job)

    def _work(self) -> None:
        """The loop of a thread. Skips overdue jobs: their results would be discarded."""
        while (job := self._todo.get()) is not None:
            if time.monotonic() < job.due_at:
                job.result = self._run(job.obtain)
                self._done.put(job)
                self._wake()

    def _run(self, obtain: Callable[[], Obtained]) -> Obtained | SignerError:
        try:
            return obtain()
        except SignerError as error:
            return error
        except Exception as error:  # noqa: BLE001 - an exception in a thread must become a reply
            return self._slow.failed(error)

    def collect(self) -> list[tuple[_K, Obtained | SignerError]]:
        """The results since the last call, and errors for overdue jobs, whose late results are discarded."""
        results: list[tuple[_K, Obtained | SignerError]] = []
        while not self._done.empty():
            job = self._done.get()
            if job in self._outstanding and job.result is not None:
                del self._outstanding[job]
                results.append((job.key, job.result))
        now = time.monotonic()
        for job in [job for job in self._outstanding if now >= job.due_at]:
            del self._outstanding[job]
            results.append((job.key, self._slow.late()))
        return results

    def is_idle(self) -> bool:
        return not self._outstanding

    def close(self) -> list[tuple[_K, Obtained | SignerError]]:
        """Stops the threads and returns errors for outstanding jobs; does not wait for threads that hang."""
        for _ in range(THREADS):
            self._todo.put(None)
        results = self.collect()
        results += [(job.key, self._slow.stopping()) for job in self._outstanding]
        self._outstanding.clear()
        return results
