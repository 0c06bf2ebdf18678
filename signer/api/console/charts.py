"""The console's charts: numbers in, SVG out. Pure.

A chart has a title and a description with the same facts for those who do not see it. Colours come from CSS classes
(`bar`, `series-1`, `series-2`, `baseline`, `label`, `value`): the Content-Security-Policy allows no inline style.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from signer.units import cut

WIDTH: Final = 480  # units of the view box, which fill the width of the card
_TOP: Final = 20  # above the bars of a panel: its name and its largest value
_PANEL: Final = 64  # of the bars
_GAP: Final = 14
_AXIS: Final = 20
_ROW: Final = 22  # of a horizontal bar
_NAME: Final = 170  # of the names beside them
_NUMBER: Final = 56
_LONGEST: Final = 18  # characters of a name
_LABEL_EVERY: Final = 6  # spans


@dataclass(frozen=True, slots=True)
class Span:
    """What happened in one span of time; `label` names it at the axis, `title` in the description of its bars."""

    label: str
    title: str
    signatures: int
    refusals: int


def activity_chart(spans: Sequence[Span], covers: str) -> Markup:
    """Signatures and refusals over time, one panel each, as their numbers differ by orders of magnitude.

    `covers` is what the spans are together, such as "the last 24 hours".
    """
    panels = (
        ("Signatures", "series-1", [span.signatures for span in spans]),
        ("Refusals", "series-2", [span.refusals for span in spans]),
    )
    height = len(panels) * (_TOP + _PANEL + _GAP) - _GAP + _AXIS
    parts = []
    for number, (name, series, values) in enumerate(panels):
        top = number * (_TOP + _PANEL + _GAP)
        parts.append(_text(0, top + 13, "label", name))
        parts.append(_text(WIDTH, top + 13, "value", f"most: {max(values, default=0):,}", anchor="end"))
        parts.append(_bars(spans, values, top + _TOP, name.lower(), series))
    step = WIDTH / max(len(spans), 1)
    for number, span in enumerate(spans):
        if number % _LABEL_EVERY == 0:
            parts.append(_text(number * step, height - 5, "label", span.label))
    about = " ".join(_summary(name, spans, values) for name, _, values in panels)
    return _chart("activity", f"Signatures and refusals, {covers}", about, height, parts)


def _bars(spans: Sequence[Span], values: Sequence[int], top: float, unit: str, series: str) -> Markup:
    """The bars of one panel, and the line that they stand on."""
    most, step = max(values, default=0), WIDTH / max(len(spans), 1)
    parts = [
        Markup('<rect class="bar {}" x="{}" y="{}" width="{}" height="{}"><title>{}: {} {}</title></rect>').format(
            series, _number(number * step + step / 10), _number(top + _PANEL - tall), _number(step * 0.8),
            _number(tall), span.title, f"{value:,}", unit,
        )
        for number, (span, value) in enumerate(zip(spans, values, strict=True))
        if value and (tall := max(value * _PANEL / most, 1.5))
    ]  # fmt: skip
    line = Markup('<line class="baseline" x1="0" y1="{0}" x2="{1}" y2="{0}"/>').format(_number(top + _PANEL), WIDTH)
    return Markup("").join([*parts, line])


def _summary(name: str, spans: Sequence[Span], values: Sequence[int]) -> str:
    total = sum(values)
    if not total:
        return f"{name}: none."
    peak = max(range(len(values)), key=lambda number: values[number])
    return f"{name}: {total:,}, most of them {spans[peak].title}: {values[peak]:,}."


def holders_chart(holders: Sequence[tuple[str, int]], others: tuple[int, int]) -> Markup:
    """Live certificates by identity, the most first; `others` is how many identities are left out, and what they hold.

    Names come from policy.toml and are escaped.
    """
    rows = list(holders)
    if others[0]:
        rows.append((f"{others[0]:,} others", others[1]))
    most = max((count for _, count in rows), default=0)
    room = WIDTH - _NAME - _NUMBER
    parts = []
    for number, (name, count) in enumerate(rows):
        top, wide = number * _ROW, max(count * room / most, 1.5) if count else 0
        parts.append(_text(0, top + 15, "label", cut(name, _LONGEST)))
        parts.append(
            Markup(
                '<rect class="bar series-1" x="{}" y="{}" width="{}" height="{}"><title>{}: {}</title></rect>'
            ).format(_NAME, _number(top + 4), _number(wide), _ROW - 8, name, f"{count:,}")
        )
        parts.append(_text(_NAME + wide + 6, top + 15, "value", f"{count:,}"))
    about = ", ".join(f"{name} {count:,}" for name, count in rows) or "No certificate is valid now"
    return _chart("holders", "Certificates that are valid now, by identity", f"{about}.", len(rows) * _ROW, parts)


def _chart(name: str, title: str, about: str, height: float, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {1} {2}" role="img" aria-labelledby="{0}-title {0}-desc">'
        '<title id="{0}-title">{3}</title><desc id="{0}-desc">{4}</desc>{5}</svg>'
    ).format(name, WIDTH, _number(max(height, 1)), title, about, Markup("").join(parts))


def _text(x: float, y: float, kind: str, text: str, anchor: str = "start") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        kind, _number(x), _number(y), anchor, text
    )


def _number(value: float) -> str:
    """A coordinate with at most one digit after the point."""
    return f"{value:.1f}".removesuffix(".0")
