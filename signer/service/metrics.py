"""The keeper's metrics, in Prometheus' text format.

Counters and histograms are prometheus-client objects; gauges and the counts of shadow mode are read at each scrape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from signer.authority.shadow import Shadow
from signer.error_catalogue import COUNTED_CODES
from signer.ledger.store import Ledger
from signer.model import Entry, Event

SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_NAMES: Final = ("role", "identity", "channel")  # labels whose values only a reader of the ledger may see
_COMMANDS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
disable_created_metrics()  # type: ignore[no-untyped-call]  # an unused extra series for each counter


def commit_histogram() -> Histogram:
    """The duration of ledger transactions; not registered yet."""
    text = "one ledger transaction, fsync included"
    return Histogram("signer_ledger_commit_seconds", text, buckets=SECONDS, registry=None)


class Metrics(Collector):
    """Everything the keeper counts. `gauges` returns the gauges, `roles` the current roles."""

    def __init__(
        self,
        gauges: Callable[[], Iterable[Metric]],
        roles: Callable[[], Iterable[str]],
        commit: Histogram,
        shadow: Shadow | None = None,
    ) -> None:
        self._gauges = gauges
        self._roles = roles
        self._shadow = shadow
        self._registry = registry = CollectorRegistry()
        self._signatures = Counter("signer_signatures", "certificates released", ["role"], registry=registry)
        self._signatures_of = cache(self._signatures.labels)  # a lookup there takes a lock
        self._refusals = Counter("signer_refusals", "commands refused", ["code"], registry=registry)
        for code in COUNTED_CODES:
            self._refusals.labels(code)  # a counter that starts at 0 shows its first increase
        text = "from a command's arrival at the keeper to its reply"
        self.latency = Histogram("signer_command_seconds", text, buckets=SECONDS, registry=registry)
        text = "commands decided together"
        self.batch = Histogram("signer_batch_commands", text, buckets=_COMMANDS, registry=registry)
        registry.register(commit)
        registry.register(self)

    def count_signature(self, role: str) -> None:
        """Counts a certificate that was released."""
        self._signatures_of(role).inc()

    def count_refusal(self, code: str) -> None:
        self._refusals.labels(code).inc()

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names of `collect` depend on what was counted."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The gauges and the counts of shadow mode."""
        if self._shadow is not None:
            yield from _shadow_families(self._shadow)
        yield from self._gauges()

    def render(self, *, by_role: bool) -> str:
        """The text exposition format; without `by_role`, totals that name no role and no identity."""
        for role in self._roles():
            self._signatures.labels(role)
        return generate_latest(self._registry if by_role else _Totals(self._registry)).decode()


class _Totals(CollectorRegistry):
    """The metrics of another registry, summed over their roles; of the ends of tokens, the earliest one."""

    def __init__(self, detailed: CollectorRegistry) -> None:
        super().__init__()
        self._detailed = detailed

    def collect(self) -> Iterator[Metric]:
        """The families, in the same order."""
        for family in self._detailed.collect():
            if not any(name in sample.labels for sample in family.samples for name in _NAMES):
                yield family  # most of the samples
                continue
            total = Metric(family.name, family.documentation, family.type)
            values: dict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = {}
            for sample in family.samples:
                labels = tuple((name, value) for name, value in sample.labels.items() if name not in _NAMES)
                values.setdefault((sample.name, labels), []).append(sample.value)
            combine = min if family.name.endswith("_timestamp_seconds") else sum
            for (name, labels), value in ((key, combine(found)) for key, found in values.items()):
                total.add_sample(name, dict(labels), value)
            yield total


def _shadow_families(shadow: Shadow) -> Iterator[Metric]:
    """The counts of shadow mode."""
    compared = CounterMetricFamily("signer_shadow_compared", "Vault's certificates compared", labels=["role"])
    for role, count in sorted(shadow.compared.items()):
        compared.add_metric([role], count)
    yield compared
    text = "fields in which Vault's certificate differs from the local one"
    differences = CounterMetricFamily("signer_shadow_differences", text, labels=["role", "field"])
    for (role, name), count in sorted(shadow.differences.items()):
        differences.add_metric([role, name], count)
    yield differences
    faults = CounterMetricFamily("signer_shadow_faults", "comparisons that failed", labels=["role"])
    for role, count in sorted(shadow.faults.items()):
        faults.add_metric([role], count)
    yield faults


class TimedLedger(Ledger):
    """A ledger that measures its commits. `before_write` is called before each write, which may take long."""

    def __init__(self, data_dir: Path, before_write: Callable[[], None] = lambda: None) -> None:
        super().__init__(data_dir)
        self.commit_seconds = commit_histogram()
        self._before_write = before_write

    def commit(self, events: Sequence[Event], now_ms: int) -> list[Entry]:
        """Commits and observes the duration, also of a failed commit."""
        self._before_write()
        began = time.perf_counter()
        try:
            return super().commit(events, now_ms)
        finally:
            self.commit_seconds.observe(time.perf_counter() - began)

    def probe(self, now_ms: int) -> None:
        self._before_write()
        super().probe(now_ms)
