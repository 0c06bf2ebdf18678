"""Grants that somebody else signs: a small pool of threads with a bound and a deadline, so that the loop never waits.

The keeper submits a grant, goes on, and collects what came back when it is woken. Nothing is decided here.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from signer.errors import SignerError, Unavailable
from signer.model import Grant, Returned

THREADS: Final = 8
MAX_OUTSTANDING: Final = 64
DEADLINE: Final = 5.0  # seconds from submission to the caller's answer
_K = TypeVar("_K")


@dataclass(slots=True, eq=False)
class _Errand(Generic[_K]):
    """One grant on its way; `key` is the submitter's own."""

    key: _K
    due: float
    result: Returned | SignerError | None = None


class Forwarding(Generic[_K]):
    """Runs `sign` for grants; `wake` is called, from any thread, when something can be collected."""

    def __init__(self, sign: Callable[[Grant], Returned], wake: Callable[[], object]) -> None:
        self._sign = sign
        self._wake = wake
        self._pool = ThreadPoolExecutor(THREADS, "forward")
        self._done: queue.SimpleQueue[_Errand[_K]] = queue.SimpleQueue()
        self._out: set[_Errand[_K]] = set()

    def submit(self, key: _K, grant: Grant) -> None:
        """Sends a grant out; raises `Unavailable` if too many are out already."""
        if len(self._out) >= MAX_OUTSTANDING:
            raise Unavailable("vault_busy", f"{MAX_OUTSTANDING} requests wait for Vault already", "try again")
        errand = _Errand(key, time.monotonic() + DEADLINE)
        self._out.add(errand)
        self._pool.submit(self._run, errand, grant)

    def _run(self, errand: _Errand[_K], grant: Grant) -> None:
        try:
            errand.result = self._sign(grant)
        except SignerError as error:
            errand.result = error
        except Exception as error:  # noqa: BLE001 - a fault in a thread must come back as an answer
            errand.result = Unavailable("vault_failed", f"asking Vault failed: {type(error).__name__}", "see the log")
        self._done.put(errand)
        self._wake()

    def collect(self) -> list[tuple[_K, Returned | SignerError]]:
        """What came back since the last time, and what is overdue: its late result is thrown away."""
        results: list[tuple[_K, Returned | SignerError]] = []
        while not self._done.empty():
            errand = self._done.get()
            if errand in self._out and errand.result is not None:
                self._out.discard(errand)
                results.append((errand.key, errand.result))
        now = time.monotonic()
        for errand in [errand for errand in self._out if errand.due <= now]:
            self._out.discard(errand)
            late = Unavailable(
                "vault_slow", f"Vault did not sign within {DEADLINE:.0f} s", "look at Vault, then try again"
            )
            results.append((errand.key, late))
        return results

    def is_idle(self) -> bool:
        """True when nothing is out."""
        return not self._out

    def close(self) -> None:
        """Starts nothing more; threads that hang are left behind."""
        self._pool.shutdown(wait=False, cancel_futures=True)
