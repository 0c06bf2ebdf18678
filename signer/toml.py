"""On which line of a TOML text each key stands, which `tomllib` does not tell.

Only for texts that `tomllib` has accepted: this is a finder, not a second parser. Pure.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Final

_TOKEN: Final = re.compile(
    r"""(?P<string>\"{3}(?:\\.|[^\\])*?\"{3,5}|'{3}.*?'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*')"""
    r"""|(?P<comment>\#[^\n]*)|(?P<mark>[][{}=,.\n])|(?P<bare>[^][{}=,.\n\s"'\#]+)|(?P<blank>[^\S\n]+)""",
    re.DOTALL | re.VERBOSE,
)
Path = tuple[str | int, ...]


def find_places(text: str) -> dict[Path, int]:
    """Line numbers from 1 for every table, key and array item, by its path, such as `("roles", "llmops")`."""
    places: dict[Path, int] = {}
    tables: dict[Path, int] = {}
    table: Path = ()
    tokens = _Tokens(text)
    while (token := tokens.peek()) is not None:
        if token == "\n":
            tokens.next()
        elif token == "[":
            table = _read_header(tokens, places, tables)
        else:
            _read_pair(tokens, table, places)
    return places


class _Tokens:
    """The text's meaningful tokens, each with its line; comments and blanks are left out."""

    def __init__(self, text: str) -> None:
        self._rest = self._scan(text)
        self._ahead = next(self._rest, None)

    @staticmethod
    def _scan(text: str) -> Iterator[tuple[str, int]]:
        line = 1
        for match in _TOKEN.finditer(text):
            if match.lastgroup not in ("comment", "blank"):
                yield match.group(), line
            line += match.group().count("\n")

    def peek(self) -> str | None:
        return self._ahead[0] if self._ahead else None

    def line(self) -> int:
        return self._ahead[1] if self._ahead else 0

    def next(self) -> str:
        token = self._ahead[0] if self._ahead else ""
        self._ahead = next(self._rest, None)
        return token

    def skip_newlines(self) -> None:
        while self.peek() == "\n":
            self.next()


def _read_key(tokens: _Tokens) -> Path:
    parts = [_unquote(tokens.next())]
    while tokens.peek() == ".":
        tokens.next()
        parts.append(_unquote(tokens.next()))
    return tuple(parts)


def _unquote(token: str) -> str:
    if token[:1] == '"' and "\\" in token:
        return next(iter(tomllib.loads(f"{token} = 0")))
    return token[1:-1] if token[:1] in ("'", '"') else token


def _read_header(tokens: _Tokens, places: dict[Path, int], tables: dict[Path, int]) -> Path:
    """The table's path; `tables` counts the tables of each array of tables, and the path goes through the newest."""
    line = tokens.line()
    brackets = 0
    while tokens.peek() == "[":
        tokens.next()
        brackets += 1
    key = _read_key(tokens)
    while tokens.peek() == "]":
        tokens.next()
    path: Path = ()
    for depth, part in enumerate(key, start=1):
        path = (*path, part)
        places.setdefault(path, line)
        if depth == len(key) and brackets == 2:
            tables[path] = tables.get(path, -1) + 1
        if path in tables:
            path = (*path, tables[path])
            places.setdefault(path, line)
    return path


def _read_pair(tokens: _Tokens, table: Path, places: dict[Path, int]) -> None:
    line = tokens.line()
    path = table + _read_key(tokens)
    for depth in range(len(table) + 1, len(path) + 1):
        places.setdefault(path[:depth], line)
    tokens.next()  # the equals sign
    _read_value(tokens, path, places)


def _read_value(tokens: _Tokens, path: Path, places: dict[Path, int]) -> None:
    if tokens.peek() == "[":
        _read_array(tokens, path, places)
    elif tokens.peek() == "{":
        tokens.next()
        tokens.skip_newlines()
        while tokens.peek() not in ("}", None):
            _read_pair(tokens, path, places)
            while tokens.peek() in (",", "\n"):
                tokens.next()
        tokens.next()
    else:
        while tokens.peek() not in ("\n", ",", "]", "}", None):
            tokens.next()


def _read_array(tokens: _Tokens, path: Path, places: dict[Path, int]) -> None:
    tokens.next()
    index = 0
    tokens.skip_newlines()
    while tokens.peek() not in ("]", None):
        places[(*path, index)] = tokens.line()
        _read_value(tokens, (*path, index), places)
        index += 1
        while tokens.peek() in (",", "\n"):
            tokens.next()
    tokens.next()
