"""Figures of the keeper, in the form that Prometheus reads.

Counting happens on the signing path, so it is plain integers here; prometheus-client renders them when asked.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
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
    """Everything the keeper counts. `facts` gives the gauges that are read only when asked."""

    def __init__(self, facts: Callable[[], dict[str, tuple[str, float]]]) -> None:
        self._facts = facts
        self.signatures: Counter[str] = Counter()  # by role
        self.refusals: Counter[str] = Counter()  # by code
        self.latency = Histogram(_SECONDS)
        self.commit = Histogram(_SECONDS)
        self.batch = Histogram(_COMMANDS)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are only known once something was counted."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All families, for prometheus-client."""
        signatures = CounterMetricFamily("signer_signatures", "certificates released", labels=["role"])
        for role, count in sorted(self.signatures.items()):
            signatures.add_metric([role], count)
        yield signatures
        refusals = CounterMetricFamily("signer_refusals", "commands refused", labels=["code"])
        for code, count in sorted(self.refusals.items()):
            refusals.add_metric([code], count)
        yield refusals
        yield self.latency.family("signer_command_seconds", "from a command's arrival at the keeper to its reply")
        yield self.commit.family("signer_ledger_commit_seconds", "one ledger transaction, fsync included")
        yield self.batch.family("signer_batch_commands", "commands decided together")
        for name, (text, value) in self._facts().items():
            yield GaugeMetricFamily(name, text, value=value)

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
