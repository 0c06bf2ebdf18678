"""Figures of the keeper, in the form that Prometheus reads.

Counting happens on the signing path, so it is plain integers here; prometheus-client renders them when asked.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from signer.error_catalogue import COUNTED_CODES
from signer.ledger.store import Ledger
from signer.model import Entry, Event

SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_COMMANDS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """Counts of values at or below each bound, and their sum."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Iterable[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        """The histogram as Prometheus wants it, cumulative."""
        total, buckets = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self._sum)


class Metrics(Collector):
    """Everything the keeper counts. `facts` gives the gauges, `roles` the roles, that are read only when asked."""

    def __init__(
        self,
        facts: Callable[[], dict[str, tuple[str, float]]],
        roles: Callable[[], Iterable[str]],
        commit: Histogram,
    ) -> None:
        self._facts = facts
        self._roles = roles
        self.signatures: Counter[str] = Counter()  # by role
        self.refusals: Counter[str] = Counter(dict.fromkeys(COUNTED_CODES, 0))  # by code; 0 shows a first rise
        self.shadow_compared: Counter[str] = Counter()  # by role; these three are the shadow's own, where there is one
        self.shadow_differences: Counter[tuple[str, str]] = Counter()  # by role and field
        self.shadow_faults: Counter[str] = Counter()  # by role
        self.latency = Histogram(SECONDS)
        self.commit = commit
        self.batch = Histogram(_COMMANDS)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are only known once something was counted."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All families, for prometheus-client."""
        signatures = CounterMetricFamily("signer_signatures", "certificates released", labels=["role"])
        for role in sorted({*self.signatures, *self._roles()}):
            signatures.add_metric([role], self.signatures[role])
        yield signatures
        refusals = CounterMetricFamily("signer_refusals", "commands refused", labels=["code"])
        for code, count in sorted(self.refusals.items()):
            refusals.add_metric([code], count)
        yield refusals
        yield from self._shadow()
        yield self.latency.family("signer_command_seconds", "from a command's arrival at the keeper to its reply")
        yield self.commit.family("signer_ledger_commit_seconds", "one ledger transaction, fsync included")
        yield self.batch.family("signer_batch_commands", "commands decided together")
        for name, (text, value) in self._facts().items():
            yield GaugeMetricFamily(name, text, value=value)

    def _shadow(self) -> Iterator[Metric]:
        """Without a sample in the other modes."""
        compared = CounterMetricFamily("signer_shadow_compared", "certificates of Vault's compared", labels=["role"])
        for role, count in sorted(self.shadow_compared.items()):
            compared.add_metric([role], count)
        yield compared
        text = "fields in which Vault's certificate is not what ours would be"
        differences = CounterMetricFamily("signer_shadow_differences", text, labels=["role", "field"])
        for (role, name), count in sorted(self.shadow_differences.items()):
            differences.add_metric([role, name], count)
        yield differences
        faults = CounterMetricFamily("signer_shadow_faults", "comparisons that failed", labels=["role"])
        for role, count in sorted(self.shadow_faults.items()):
            faults.add_metric([role], count)
        yield faults

    def render(self) -> str:
        """The text exposition format."""
        return generate_latest(self._registry).decode()


class Stopwatch:
    """Seconds since it was made."""

    __slots__ = ("_start",)

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """How long it has run."""
        return time.perf_counter() - self._start


class TimedLedger(Ledger):
    """A ledger that keeps the time of its commits."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        self.commit_seconds = Histogram(SECONDS)

    def commit(self, events: Sequence[Event], now_ms: int) -> list[Entry]:
        """As the ledger's; one that fails counts, too."""
        watch = Stopwatch()
        try:
            return super().commit(events, now_ms)
        finally:
            self.commit_seconds.observe(watch.seconds())
