"""The keeper's metrics, in Prometheus' text format.

Counters and histograms are kept here; gauges and the counts of shadow mode are read at each scrape.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from signer.authority.shadow import Shadow
from signer.error_catalogue import COUNTED_CODES
from signer.ledger.store import Ledger
from signer.model import Entry, Event
from signer.service.exposition import Family, Histogram, combine, counters, render

SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_NAMES: Final = ("role", "identity", "channel")  # labels whose values only a reader of the ledger may see
_COMMANDS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def commit_histogram() -> Histogram:
    """The duration of ledger transactions; not registered yet."""
    return Histogram("signer_ledger_commit_seconds", "one ledger transaction, fsync included", SECONDS)


class Metrics:
    """Everything the keeper counts. `gauges` returns the gauges, `roles` the current roles."""

    def __init__(
        self,
        gauges: Callable[[], Iterable[Family]],
        roles: Callable[[], Iterable[str]],
        commit: Histogram,
        shadow: Shadow | None = None,
    ) -> None:
        self._gauges = gauges
        self._roles = roles
        self._commit = commit
        self._shadow = shadow
        self._signatures: Counter[tuple[str, ...]] = Counter()  # by role
        # A counter that starts at 0 shows its first increase.
        self._refusals: Counter[tuple[str, ...]] = Counter({(code,): 0 for code in COUNTED_CODES})
        self.latency = Histogram(
            "signer_command_seconds", "from a command's arrival at the keeper to its reply", SECONDS
        )
        self.batch = Histogram("signer_batch_commands", "commands decided together", _COMMANDS)

    def count_signature(self, role: str) -> None:
        """Counts a certificate that was released."""
        self._signatures[role,] += 1

    def count_refusal(self, code: str) -> None:
        """Counts a command that was refused, by its error code."""
        self._refusals[code,] += 1

    def _families(self) -> Iterator[Family]:
        for role in self._roles():
            self._signatures.setdefault((role,), 0)
        yield counters("signer_signatures", "certificates released", ["role"], self._signatures)
        yield counters("signer_refusals", "commands refused", ["code"], self._refusals)
        for histogram in (self.latency, self.batch, self._commit):
            yield histogram.family()
        if self._shadow is not None:
            yield from _shadow_families(self._shadow)
        yield from self._gauges()

    def render(self, *, by_role: bool) -> str:
        """The text exposition format; without `by_role`, totals that name no role and no identity."""
        return render(self._families() if by_role else map(_total, self._families()))


def _total(family: Family) -> Family:
    """The sums over roles, identities and channels; of the ends of tokens, the earliest one."""
    return combine(family, _NAMES, min if family.name.endswith("_timestamp_seconds") else sum)


def _shadow_families(shadow: Shadow) -> Iterator[Family]:
    """The counts of shadow mode."""
    compared: dict[tuple[str, ...], float] = {(role,): count for role, count in sorted(shadow.compared.items())}
    yield counters("signer_shadow_compared", "Vault's certificates compared", ["role"], compared)
    text = "fields in which Vault's certificate differs from the local one"
    yield counters("signer_shadow_differences", text, ["role", "field"], dict(sorted(shadow.differences.items())))
    faults: dict[tuple[str, ...], float] = {(role,): count for role, count in sorted(shadow.faults.items())}
    yield counters("signer_shadow_faults", "comparisons that failed", ["role"], faults)


class Stopwatch:
    """Measures elapsed time."""

    __slots__ = ("_start",)

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since it was created."""
        return time.perf_counter() - self._start


class TimedLedger(Ledger):
    """A ledger that measures its commits. `before_write` is called before each write, which may take long."""

    def __init__(self, data_dir: Path, before_write: Callable[[], None] = lambda: None) -> None:
        super().__init__(data_dir)
        self.commit_seconds = commit_histogram()
        self._before_write = before_write

    def commit(self, events: Sequence[Event], now_ms: int) -> list[Entry]:
        """Commits and observes the duration, also of a failed commit."""
        self._before_write()
        watch = Stopwatch()
        try:
            return super().commit(events, now_ms)
        finally:
            self.commit_seconds.observe(watch.seconds())

    def fold(self) -> float | None:
        """As `Ledger.fold`."""
        self._before_write()
        return super().fold()

    def probe(self, now_ms: int) -> None:
        """As `Ledger.probe`."""
        self._before_write()
        super().probe(now_ms)
