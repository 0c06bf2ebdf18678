"""Prometheus' text format, version 1.0.0: families of samples, and their text.

Not by prometheus-client, which imports an HTTP server and client with it: 4 MB of the keeper's memory. Tests hold the
text against it. Pure.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Literal

_INFINITE: Final = {math.inf: "+Inf", -math.inf: "-Inf"}
Labels = tuple[tuple[str, str], ...]  # names and values


@dataclass(frozen=True, slots=True)
class Sample:
    """One line: the whole name, its labels and its value."""

    name: str
    labels: Labels
    value: float


@dataclass(frozen=True, slots=True)
class Family:
    """A metric with its samples; the name of a counter ends with `_total`."""

    name: str
    text: str
    kind: Literal["counter", "gauge", "histogram"]
    samples: Sequence[Sample]


def gauge(name: str, text: str, value: float) -> Family:
    """A gauge without labels."""
    return Family(name, text, "gauge", [Sample(name, (), value)])


def gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> Family:
    """A gauge for each value of a label."""
    return Family(name, text, "gauge", [Sample(name, ((label, of),), value) for of, value in values.items()])


def counters(name: str, text: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]) -> Family:
    """A counter for each combination of values of the labels; `name` is without `_total`."""
    name = f"{name}_total"
    samples = [Sample(name, tuple(zip(labels, of, strict=True)), value) for of, value in values.items()]
    return Family(name, text, "counter", samples)


class Histogram:
    """Counts values by size: the bounds are upper ones, sorted, and a value on a bound is below it."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)  # of each bucket alone; the last one has no bound
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Counts a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self) -> Family:
        """The metric; each bucket also counts the smaller ones."""
        name, counts = self._name, list(accumulate(self._counts))
        bounds = [_number(bound) for bound in (*self._bounds, math.inf)]
        samples = [Sample(f"{name}_bucket", (("le", le),), n) for le, n in zip(bounds, counts, strict=True)]
        samples += [Sample(f"{name}_count", (), counts[-1]), Sample(f"{name}_sum", (), self._sum)]
        return Family(name, self._text, "histogram", samples)


def combine(family: Family, names: Sequence[str], of: Callable[[Iterable[float]], float]) -> Family:
    """The family without the labels `names`; `of` makes one value of those that differ only in them."""
    if not any(name in names for sample in family.samples for name, _ in sample.labels):
        return family  # most of the samples
    values: dict[tuple[str, Labels], list[float]] = {}
    for sample in family.samples:
        labels = tuple(label for label in sample.labels if label[0] not in names)
        values.setdefault((sample.name, labels), []).append(sample.value)
    samples = [Sample(name, labels, of(found)) for (name, labels), found in values.items()]
    return Family(family.name, family.text, family.kind, samples)


def render(families: Iterable[Family]) -> str:
    """The text that Prometheus reads."""
    lines: list[str] = []
    for family in families:
        text = family.text.replace("\\", r"\\").replace("\n", r"\n")
        lines += (f"# HELP {family.name} {text}\n", f"# TYPE {family.name} {family.kind}\n")
        lines += map(_line, family.samples)
    return "".join(lines)


def _line(sample: Sample) -> str:
    labels = ",".join([f'{name}="{_escape(value)}"' for name, value in sorted(sample.labels)])
    name = f"{sample.name}{{{labels}}}" if labels else sample.name
    return f"{name} {_number(sample.value)}\n"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    return _INFINITE.get(value) or repr(float(value))
