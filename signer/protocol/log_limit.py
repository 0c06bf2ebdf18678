"""A rate limit for log lines that callers can cause: one line a minute for each kind.

Kinds are constants: neither a kind nor a line contains a byte of a request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

WINDOW: Final = 60.0  # seconds from one line of a kind to the next


@dataclass(slots=True)
class LogLimit:
    """Writes the first line of a kind and counts its repeats for a minute. Safe to share between threads."""

    log: logging.Logger
    clock: Callable[[], float] = time.monotonic
    _kinds: dict[str, tuple[float, int]] = field(default_factory=dict)  # time of the last line, repeats since
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def warn(self, kind: str, text: str) -> None:
        """Logs a warning that callers can cause."""
        if self._is_due(kind):
            self.log.warning("%s", text)

    def fault(self, text: str, error: BaseException) -> None:
        """Logs an internal error with its stack; its kind is the place where it was raised."""
        if self._is_due(f"internal error, {_place_of(error)}"):
            self.log.error("%s", text, exc_info=error)

    def flush(self) -> None:
        """Writes the counts that are due; call it about once a second."""
        now = self.clock()
        with self._lock:
            over = [kind for kind, (since, _) in self._kinds.items() if now >= since + WINDOW]
            counts = [(kind, self._kinds.pop(kind)[1]) for kind in over]
        for kind, count in counts:
            if count:
                self.log.warning("%d more in a minute: %s", count, kind)

    def _is_due(self, kind: str) -> bool:
        """True if a line of this kind may be written; otherwise counts it."""
        self.flush()
        with self._lock:
            if (known := self._kinds.get(kind)) is not None:
                self._kinds[kind] = known[0], known[1] + 1
                return False
            self._kinds[kind] = self.clock(), 0
        return True


def _place_of(error: BaseException) -> str:
    """The error's type, and the file and line where it was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" in {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
    return type(error).__name__ + place
