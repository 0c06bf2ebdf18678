"""Figures and how they are shown: medians, targets, a text table, JSON. Pure; used by every benchmark here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal


@dataclass(frozen=True)
class Target:
    """What an issue wants of one figure: `at least` or `at most` a bound. `found` is None if it was not measured."""

    what: str
    found: float | None
    sense: Literal["at least", "at most"]
    bound: float
    unit: str = ""

    @property
    def reached(self) -> bool | None:
        """None if there is nothing to compare."""
        if self.found is None:
            return None
        return self.found >= self.bound if self.sense == "at least" else self.found <= self.bound


def medians(samples: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The median of every figure over all samples; of those that have it, None where none has."""
    names = dict.fromkeys(name for sample in samples for name in sample)
    values = {name: [value for sample in samples if (value := sample.get(name)) is not None] for name in names}
    return {name: median(found) if found else None for name, found in values.items()}


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """Ours in multiples of theirs; None if either was not measured or theirs is 0."""
    return None if ours is None or not theirs else ours / theirs


def render_number(value: float | None) -> str:
    """Three digits that matter, thousands grouped; `-` for what was not measured."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3f}"


def render_table(head: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    """A text table: first column to the left, the others to the right, numbers by `render_number`."""
    cells = [list(head), *([cell if isinstance(cell, str) else render_number(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = []
    for row in cells:
        first, *rest = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join((first, *rest)).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def render_targets(targets: Sequence[Target]) -> str:
    """One line: every target with what was found, and whether it is reached."""
    words = {True: "reached", False: "NOT reached", None: "not measured"}
    parts = [
        f"{target.what} {render_number(target.found)}{target.unit}"
        f" ({target.sense} {render_number(target.bound)}{target.unit}: {words[target.reached]})"
        for target in targets
    ]
    return "targets: " + "; ".join(parts)


def render_json(
    machine: Mapping[str, object], figures: Mapping[str, object], targets: Sequence[Target], **settings: object
) -> str:
    """The whole result for a program: machine, settings, figures, targets."""
    told = [
        {
            "what": target.what,
            "found": target.found,
            "sense": target.sense,
            "bound": target.bound,
            "unit": target.unit.strip(),
            "reached": target.reached,
        }
        for target in targets
    ]
    whole = {"machine": dict(machine), "settings": settings, "figures": dict(figures), "targets": told}
    return json.dumps(whole, indent=2, sort_keys=False) + "\n"
