"""What Go's JSON decoder says about a text: the fault that a Vault client is told, word for word.

Follows encoding/json over jsontext (Go 1.25 with jsonv2), as OpenBao 2.7 is built: every value of the input is looked
at token by token, before the first one is decoded. Run only for input that Python's decoder refuses, and only so far:
a stranger's body must not keep the keeper busy. Text was decoded with `surrogateescape`, so a byte that is no UTF-8 is
a lone surrogate. Pure; one pass, no recursion.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Final

MAX_STRINGS: Final = 1000
MAX_TOKENS: Final = 512  # about 3 ms; a fault further in is told without its place
TOO_COMPLEX: Final = "refused JSON input due to high complexity: exceeded maximum number of strings"
_EOF: Final = "unexpected EOF"
_PREFIX: Final = "failed to decode JSON input: "
NO_JSON: Final = _PREFIX + "it is no JSON"
CUT_OFF: Final = _PREFIX + _EOF
TOO_DEEP: Final = _PREFIX + "exceeded max depth"
_BLANKS: Final = re.compile(r"[ \t\r\n]*")
_GOOD: Final = re.compile(r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9A-Fa-f]{4})*')
_STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_AT_START: Final = "looking for beginning of value"
_LITERALS: Final = {"n": "null", "t": "true", "f": "false"}
_DIGITS: Final = re.compile("[0-9]+")
_HEX: Final = re.compile(r"[0-9A-Fa-f]*")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_C_ESCAPES: Final = {7: "a", 8: "b", 9: "t", 10: "n", 11: "v", 12: "f", 13: "r", 92: "\\"}


class _Fault(Exception):
    """Carries Go's sentence out of the scanner."""


@dataclass(slots=True)
class _Open:
    """An object or an array that is not closed yet, or the top level; names count like values, as in jsontext."""

    kind: str  # "{", "[" or ""
    length: int = 0

    def wants_value(self) -> bool:
        return self.kind == "{" and self.length % 2 == 1


@dataclass(slots=True)
class _Scanner:
    text: str
    at: int = 0
    stack: list[_Open] = field(default_factory=lambda: [_Open("")])

    def run(self) -> bool:
        """True at the end of the text, which need not be the end of a value; False when it gives up.

        Raises `_Fault` for the first fault; a text that ends within a token has one.
        """
        for _ in range(MAX_TOKENS):
            start = self._skip_blank(self.at)
            if start == len(self.text):
                return True
            self.at = self._skip_delimiter(start)
            if self.at == len(self.text):
                return True
            self._token(self.text[self.at])
        return False

    def _skip_blank(self, at: int) -> int:
        match = _BLANKS.match(self.text, at)
        return match.end() if match else at

    def _skip_delimiter(self, start: int) -> int:
        """Where the next token begins, after the colon or comma that has to be there."""
        found, at = "", start
        if self.text[start] in ":,":
            found, at = self.text[start], self._skip_blank(start + 1)
        last = self.stack[-1]
        wanted = ""
        if last.wants_value():
            wanted = ":"
        elif last.kind and last.length and self.text[at : at + 1] not in ("}", "]"):
            wanted = ","
        if found != wanted:
            where = {":": "after object key", ",": _after(last)}.get(wanted, _AT_START)
            raise self._invalid(start, where)
        return at

    def _token(self, first: str) -> None:
        last, start = self.stack[-1], self.at
        if first in "}]":
            self._close(first)
            return
        is_name = last.kind == "{" and not last.wants_value()
        if first == '"':
            self._string()
        elif first in _LITERALS:
            self._literal(_LITERALS[first])
        elif first in "-0123456789":
            self._number()
        elif first not in "{[":
            raise self._invalid(self.at, _AT_START)
        if is_name and first != '"':
            raise _Fault("object member name must be a string")
        if first in "-0123456789" and not is_float64(number := self.text[start : self.at]):
            raise _Fault(f"json: cannot unmarshal number {number} into Go value of type float64")
        last.length += 1
        if first in "{[":
            self.stack.append(_Open(first))
            self.at += 1

    def _close(self, first: str) -> None:
        last = self.stack[-1]
        if last.kind != {"}": "{", "]": "["}[first]:
            raise self._invalid(self.at, _after(last) if last.length and last.kind else _AT_START)
        if last.wants_value():
            raise _Fault("missing value after object key")
        self.stack.pop()
        self.at += 1

    def _literal(self, word: str) -> None:
        for expected in word:
            if self.at == len(self.text):
                raise _Fault(_EOF)
            if self.text[self.at] != expected:
                raise self._invalid(self.at, f"in literal {word} (expecting {go_quote_char(expected)})")
            self.at += 1

    def _number(self) -> None:
        at = self.at + (self.text[self.at] == "-")
        at = at + 1 if self.text[at : at + 1] == "0" else self._digits(at)
        if self.text[at : at + 1] == ".":
            at = self._digits(at + 1)
        if self.text[at : at + 1] in ("e", "E"):
            at = self._digits(at + 2 if self.text[at + 1 : at + 2] in ("+", "-") else at + 1)
        self.at = at

    def _digits(self, at: int) -> int:
        match = _DIGITS.match(self.text, at)
        if match is None:
            raise _Fault(_EOF) if at >= len(self.text) else self._invalid(at, "in numeric literal")
        return match.end()

    def _string(self) -> None:
        at = self.at + 1
        match = _GOOD.match(self.text, at)
        at = match.end() if match else at
        if at == len(self.text):
            raise _Fault(_EOF)
        if self.text[at] == "\\":
            raise self._bad_escape(at)
        if self.text[at] != '"':
            raise self._invalid(at, "in string")
        self.at = at + 1

    def _bad_escape(self, at: int) -> _Fault:
        length = 2
        if self.text[at + 1 : at + 2] == "u":
            length = 6
            match = _HEX.match(self.text, at + 2)
            if match is not None and match.end() == len(self.text):
                return _Fault(_EOF)
        if at + 1 == len(self.text):
            return _Fault(_EOF)
        return _Fault(f"invalid escape sequence {_go_quote_bytes(_first_bytes(self.text[at:], length))} in string")

    def _invalid(self, at: int, where: str) -> _Fault:
        return _Fault(f"invalid character {go_quote_char(self.text[at])} {where}")


def find_fault(text: str) -> str | None:
    """Vault's sentence about the first fault of `text`; None for JSON, and for a beginning of JSON."""
    try:
        looked_at_all = _Scanner(text).run()
    except _Fault as fault:
        return _PREFIX + str(fault)
    if looked_at_all:
        return None
    return TOO_COMPLEX if has_too_many_strings(text) else NO_JSON


def has_too_many_strings(text: str) -> bool:
    """Whether a JSON text holds more strings, names among them, than Vault reads."""
    if text.count('"') <= 2 * MAX_STRINGS:
        return False
    return sum(1 for _ in _STRING.finditer(text)) > MAX_STRINGS


def not_an_object(value: object) -> str:
    """The sentence about a body that is some other value."""
    kind = {list: "array", bool: "bool", str: "string"}.get(type(value), "number")
    return f"{_PREFIX}json: cannot unmarshal {kind} into Go value of type map[string]interface {{}}"


def is_float64(number: str) -> bool:
    """Whether a JSON number is one that a float64 can hold, if only about."""
    return (len(number) < 300 and "e" not in number and "E" not in number) or math.isfinite(float(number))


def _after(last: _Open) -> str:
    return "after object key:value pair" if last.kind == "{" else "after array element"


def go_quote_char(char: str) -> str:
    """Go's strconv.QuoteRune, and its way with a byte that is no UTF-8."""
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return f"'\\x{code - 0xDC00:x}'"
    return "'\\''" if char == "'" else f"'{_go_escape(char)}'"


def _go_escape(char: str) -> str:
    code = ord(char)
    if code in _C_ESCAPES:
        return "\\" + _C_ESCAPES[code]
    if char.isprintable():
        return char
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _first_bytes(text: str, count: int) -> bytes:
    return text[:count].encode("utf-8", "surrogateescape")[:count]


def _go_quote_bytes(raw: bytes) -> str:
    """As jsontext quotes an escape: between backquotes if that can be read."""
    text = unverified_text(raw)
    if text.isprintable() and not set(text) & set("` \ufffd"):
        return f"`{text}`"
    return go_quote(text)


def go_quote(text: str) -> str:
    """Go's strconv.Quote."""
    quoted = "".join(
        f"\\x{ord(char) - 0xDC00:02x}" if 0xDC80 <= ord(char) <= 0xDCFF else _go_escape(char).replace('"', '\\"')
        for char in text
    )
    return f'"{quoted}"'


def unverified_text(raw: bytes) -> str:
    """A body's bytes as text; whatever they are."""
    return raw.decode("utf-8", "surrogateescape")


def well_formed(text: str) -> str:
    """Text as Go holds it: each lone surrogate, from an escape or from a bad byte, is U+FFFD."""
    if text.isascii():
        return text
    return _SURROGATE.sub("\ufffd", text)
