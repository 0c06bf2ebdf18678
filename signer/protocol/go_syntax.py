"""What Vault takes that is written in Go: limits on JSON text, and the syntax of durations. Pure.

JSON text: encoding, number of strings, depth, and numbers that fit a float64. Durations: whole seconds, `1h30m`,
`1.5h`, `1d`, exactly as go-secure-stdlib's parseutil.ParseDurationSecond and Go's time.ParseDuration take them,
including their overflow. Linear in the length of the text, which may come from an unauthenticated caller.
"""

from __future__ import annotations

import math
import re
from itertools import accumulate
from typing import Final

MAX_STRINGS: Final = 1000
MAX_DEPTH: Final = 900  # levels of lists and objects; Vault accepts 10,000, Python's decoder almost 1,000
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_BRACKETS: Final = b"[{]}"
_STEPS: Final = bytes.maketrans(_BRACKETS, b"\2\2\0\0")  # one level deeper or higher, plus 1
_REST: Final = bytes(set(range(256)) - set(_BRACKETS))
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


# --- JSON -------------------------------------------------------------------------------------------------------------


def has_too_many_strings(text: str) -> bool:
    """Whether a JSON text has more strings, including names, than Vault accepts."""
    if text.count('"') <= 2 * MAX_STRINGS:
        return False
    return _without_escapes(text).count('"') > 2 * MAX_STRINGS


def is_too_deep(text: str) -> bool:
    """Whether a JSON text nests deeper than `MAX_DEPTH`."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    outside = "".join(_without_escapes(text).split('"')[::2]).encode("ascii", "replace")
    steps = outside.translate(_STEPS, _REST)
    return max(accumulate(step - 1 for step in steps), default=0) > MAX_DEPTH


def _without_escapes(text: str) -> str:
    """The text without escaped backslashes and quotes: each remaining quote begins or ends a string."""
    return text.replace("\\\\", "").replace('\\"', "")


def is_float64(number: str) -> bool:
    """Whether a JSON number is finite as a float64."""
    return (len(number) < 300 and "e" not in number and "E" not in number) or math.isfinite(float(number))


def unverified_text(raw: bytes) -> str:
    """A body as text; a byte that is not UTF-8 becomes a lone surrogate."""
    return raw.decode("utf-8", "surrogateescape")


def well_formed(text: str) -> str:
    """Text as Go decodes it: each lone surrogate, from an escape or an invalid byte, is U+FFFD."""
    if text.isascii():
        return text
    return _SURROGATE.sub("\ufffd", text)


# --- durations --------------------------------------------------------------------------------------------------------


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
