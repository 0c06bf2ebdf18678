"""Times, durations and lists as text: RFC 3339; `90s`, `15m`, `1h30m`, `90d` as in policy.toml and on the command line.

Vault's own, wider grammar is read in `protocol/sign_request.py`. Pure.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

_PATTERN: Final = re.compile(r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", re.ASCII)
_SECONDS: Final = (86_400, 3_600, 60, 1)


def parse_duration(text: str) -> int:
    """Seconds. Raises `ValueError` for anything but days, hours, minutes, seconds in that order."""
    match = _PATTERN.fullmatch(text)
    if not text or match is None:
        raise ValueError(f"{text[:40]!a} is not a duration such as 90s, 15m, 1h30m or 90d")
    return sum(int(number) * unit for number, unit in zip(match.groups("0"), _SECONDS, strict=True))


@lru_cache(maxsize=64)  # certificates of the same second share their times
def timestamp(seconds: int) -> str:
    """RFC 3339 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def parse_timestamp(text: str) -> int:
    """Seconds since 1970 of a time in RFC 3339; raises `ValueError`, or `OverflowError` for one that no clock has."""
    from datetime import datetime  # 1.6 ms, which few commands need

    return int(datetime.fromisoformat(text).timestamp())


@lru_cache(maxsize=64)
def render_duration(seconds: int) -> str:
    """The shortest text that `parse_duration` reads back as `seconds`."""
    parts = []
    for unit, letter in zip(_SECONDS, "dhms", strict=True):
        number, seconds = divmod(seconds, unit)
        if number:
            parts.append(f"{number}{letter}")
    return "".join(parts) or "0s"


def render_span(seconds: int) -> str:
    """A span for people: days, or hours and minutes, or minutes, or seconds."""
    if seconds >= 2 * _SECONDS[0]:
        return f"{seconds // _SECONDS[0]} days"
    return render_duration(seconds - seconds % 60 if seconds >= 60 else seconds)


def plain(text: object, *, keep: str = "", instead: str | None = None) -> str:
    """`text` as printable text on one line: control characters and line ends become escapes, or `instead` if given.

    Characters in `keep` stay.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() if instead is None else instead
        for c in shown
    )


def cut(text: str, width: int) -> str:
    """The text in at most `width` characters, of which the last is an ellipsis if it was longer."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def listed(names: Sequence[str], most: int, nothing: str = "none") -> str:
    """The first `most` names, and how many more there are; `nothing` if there are none."""
    more = len(names) - most
    return (", ".join(names[:most]) or nothing) + (f" and {more:,} more" if more > 0 else "")
