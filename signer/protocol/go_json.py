"""Vault's limits on JSON text: encoding, number of strings, depth, and numbers that fit a float64.

Linear in the length of the text, which may come from an unauthenticated caller. Pure.
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
