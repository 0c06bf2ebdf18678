"""Durations in the syntax of Vault's clients: whole seconds, `1h30m`, `1.5h`, `1d`.

Accepts exactly what go-secure-stdlib's parseutil.ParseDurationSecond and Go's time.ParseDuration accept, including
their overflow. Linear in the length of the text. Pure.
"""

from __future__ import annotations

import re
from typing import Final

_NANOSECONDS: Final = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,  # U+00B5, the micro sign
    "μs": 1_000,  # U+03BC, the Greek letter
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_SECOND: Final = _NANOSECONDS["s"]
_DAY: Final = 24 * _NANOSECONDS["h"]
_LIMIT: Final = 2**63
_INTEGER: Final = re.compile(r"[+-]?[0-9]+")
_NUMBERS: Final = re.compile("[0-9.]+")


class BadDuration(ValueError):
    """The text is not a duration that Vault accepts."""


def parse_go_duration(text: str) -> int:
    """Seconds, rounded towards zero; "" is 0. Raises `BadDuration`, also for a negative duration."""
    nanoseconds = go_nanoseconds(text)
    seconds = abs(nanoseconds) // _SECOND
    if nanoseconds < 0 and seconds:
        raise BadDuration("a duration must not be negative")
    return seconds


def go_nanoseconds(text: str) -> int:
    """Nanoseconds, positive or negative; "" is 0. Raises `BadDuration`."""
    if not text:
        return 0
    if (number := _int64(text)) is not None:
        return _scaled(number, _SECOND)
    if text.endswith("d"):
        if (number := _int64(text[:-1])) is None:
            raise _bad_duration()
        return _scaled(number, _DAY)
    return _with_units(text)


def _int64(text: str) -> int | None:
    """The number that strconv.ParseInt returns, or None."""
    if _INTEGER.fullmatch(text) is None:
        return None
    number = _whole(text.lstrip("+-"))
    if text[0] == "-":
        number = -number
    return number if -_LIMIT <= number < _LIMIT else None


def _scaled(number: int, unit: int) -> int:
    if not -_LIMIT <= number * unit < _LIMIT:
        raise _bad_duration()
    return number * unit


def _with_units(text: str) -> int:
    """time.ParseDuration: `[-+]?([0-9]*(\\.[0-9]*)?[a-z]+)+`."""
    negative, rest = text[0] == "-", text[1:] if text[0] in "+-" else text
    if rest == "0":
        return 0
    total, at = 0, 0
    while at < len(rest):
        number = _NUMBERS.match(rest, at)
        if number is None:
            raise _bad_duration()
        following = _NUMBERS.search(rest, number.end())
        at = following.start() if following else len(rest)
        unit = _NANOSECONDS.get(rest[number.end() : at])
        whole, _, fraction = number[0].partition(".")
        if unit is None or not (whole or fraction) or "." in fraction or _whole(whole) > _LIMIT:
            raise _bad_duration()
        fraction = fraction[:18]
        total += _whole(whole) * unit + (int(fraction) * unit // 10 ** len(fraction) if fraction else 0)
        if total > _LIMIT:
            raise _bad_duration()
    if not rest or (total == _LIMIT and not negative):
        raise _bad_duration()
    return -total if negative else total


def _whole(digits: str) -> int:
    """The number; one of more than 20 digits is cut to 20, which still overflows."""
    return int(digits.lstrip("0")[:20] or 0)


def _bad_duration() -> BadDuration:
    return BadDuration("not a duration such as 90, 15m or 1h30m")
