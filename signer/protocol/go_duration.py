"""Durations as Vault's clients write them: whole seconds, `1h30m`, `1.5h`, `1d`; faults in Go's words.

Follows go-secure-stdlib's parseutil.ParseDurationSecond and Go's time.ParseDuration, overflow and all. Pure.
"""

from __future__ import annotations

import re
from typing import Final

from signer.protocol.go_json import go_quote

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
_MOST: Final = 2**63
MAX_QUOTED: Final = 200  # characters of a text that a fault tells
_INTEGER: Final = re.compile(r"[+-]?[0-9]+")
_LEADING: Final = re.compile(r"[+-]?([0-9]*)")
_PART: Final = re.compile(r"([0-9]*)(?:\.([0-9]*))?")
_UNIT: Final = re.compile(r"[^0-9.]*")


class BadDuration(ValueError):
    """The text is no duration; its message is Go's."""


def parse_go_duration(text: str) -> int:
    """Seconds, cut off towards zero; "" is 0. Raises `BadDuration`, also for what is negative."""
    nanoseconds = go_nanoseconds(text)
    seconds = abs(nanoseconds) // _SECOND
    if nanoseconds < 0 and seconds:
        raise BadDuration(f"cannot provide negative value '-{seconds}'")
    return seconds


def go_nanoseconds(text: str) -> int:
    """The duration, of either sign; "" is 0. Raises `BadDuration`."""
    if not text:
        return 0
    if _fits(text):
        return _scaled(int(text), _SECOND)
    if text.endswith("d"):
        number = text[:-1]
        if _fits(number):
            return _scaled(int(number), _DAY)
        # ParseInt stops where the number is too large, whatever follows.
        match = _LEADING.match(number)
        leading = _whole(match[1]) if match else 0
        why = "value out of range" if _INTEGER.fullmatch(number) or leading >= 2 * _MOST else "invalid syntax"
        raise BadDuration(f"strconv.ParseInt: parsing {go_quote(number[:MAX_QUOTED])}: {why}")
    return _with_units(text)


def _fits(text: str) -> bool:
    """Whether strconv.ParseInt reads it; an overlong one is never converted, which would cost its square."""
    return _INTEGER.fullmatch(text) is not None and len(text) < 4096 and -_MOST <= int(text) < _MOST


def _scaled(number: int, unit: int) -> int:
    if not -_MOST <= number * unit < _MOST:
        raise BadDuration("multiplication of durations resulted in overflow, one operand may be too large")
    return number * unit


def _with_units(text: str) -> int:
    """time.ParseDuration: `[-+]?([0-9]*(\\.[0-9]*)?[a-z]+)+`."""
    negative, rest = text[:1] == "-", text[1:] if text[:1] in ("-", "+") else text
    if rest == "0":
        return 0
    total, at = 0, 0
    invalid = BadDuration(f"time: invalid duration {_quote(text)}")
    if not rest:
        raise invalid
    while at < len(rest):
        part = _PART.match(rest, at)
        if part is None or not (part[1] or part[2]) or _whole(part[1]) > _MOST:
            raise invalid
        unit_text = _UNIT.match(rest, part.end())
        name = unit_text[0] if unit_text else ""
        if not name:
            raise BadDuration(f"time: missing unit in duration {_quote(text)}")
        unit = _NANOSECONDS.get(name)
        if unit is None:
            raise BadDuration(f"time: unknown unit {_quote(name)} in duration {_quote(text)}")
        fraction = (part[2] or "")[:18]
        total += _whole(part[1]) * unit + (int(fraction) * unit // 10 ** len(fraction) if fraction else 0)
        if total > _MOST:
            raise invalid
        at = part.end() + len(name)
    if not negative and total == _MOST:
        raise invalid
    return -total if negative else total


def _whole(digits: str) -> int:
    """The number, or one that is too large for one with too many digits to be worth the reading."""
    digits = digits.lstrip("0")
    return int(digits[:20] or 0)


def _quote(text: str) -> str:
    """Go's time.quote: bytes outside printable ASCII as `\\xNN`, but for DEL."""
    return '"' + "".join(_quoted(byte) for byte in text[:MAX_QUOTED].encode("utf-8", "replace")) + '"'


def _quoted(byte: int) -> str:
    char = chr(byte)
    if byte >= 0x80 or byte < 0x20:
        return f"\\x{byte:02x}"
    return "\\" + char if char in '"\\' else char
