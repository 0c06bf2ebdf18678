"""TOML files that an operator writes: read into typed tables, with every problem and its line. Pure.

`parse_toml` reads whole files, `Table` is the base of their tables. `tomllib` does not report the line of a key;
`find_places` and `find_headers` do, for texts that `tomllib` has accepted.
"""

from __future__ import annotations

import codecs
import difflib
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Final, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from signer.errors import BadFile
from signer.units import parse_duration

_TOKEN: Final = re.compile(
    r"""(?P<string>\"{3}(?:\\.|[^\\])*?\"{3,5}|'{3}.*?'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*')"""
    r"""|(?P<comment>\#[^\n]*)|(?P<mark>[][{}=,.\n])|(?P<bare>[^][{}=,.\n\s"'\#]+)|(?P<blank>[^\S\n]+)""",
    re.DOTALL | re.VERBOSE,
)
Place = tuple[str | int, ...]  # a key's path, such as ("roles", "llmops")


def parse_toml(raw: bytes, limit: int, faults: Faults) -> dict[str, Any]:
    """The tables of a file of at most `limit` bytes; records their lines in `faults`. Raises `BadFile`."""
    name = faults.name
    if len(raw) > limit:
        raise faults.refused(Problem(0, name, f"is larger than {limit} bytes"))
    try:
        text = raw.decode("utf-8-sig")  # editors on Windows write a byte order mark
        data = tomllib.loads(text)
        faults.places = find_places(text)
    except UnicodeDecodeError:
        is_utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = "is UTF-16 text: save it as UTF-8" if is_utf16 else "is not UTF-8"
        raise faults.refused(Problem(0, name, text)) from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, and a bare ValueError for a very long number
        match = re.search(r"line (\d+)", str(error))
        line = int(match.group(1)) if match else 0
        raise faults.refused(Problem(line, name, "is not TOML: " + str(error).split(" (at", 1)[0])) from None
    return data


# --- tables and their problems ----------------------------------------------------------------------------------------


def _duration(raw: object) -> int:
    if not isinstance(raw, str):
        raise ValueError('a duration is text such as "15m"')  # noqa: TRY004 - pydantic collects ValueError
    return parse_duration(raw)


class Table(BaseModel):
    """A table as the file has it. Unknown keys are problems; see `Faults.require` for keys that must be there."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


Duration = Annotated[int, BeforeValidator(_duration)]
Names = Annotated[list[str], Field(min_length=1)]
_T = TypeVar("_T", bound=Table)
_Whole = TypeVar("_Whole")


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One fault of the file: its line (0 when it has none), the key's dotted path, a sentence."""

    line: int
    where: str
    text: str

    def __str__(self) -> str:
        return f"line {self.line:<4} {self.where:<36} {self.text}"


class Faults:
    """Collects the problems of the file `name`, each with its line; `code` and `hint` are those of the `BadFile`."""

    def __init__(self, code: str, name: str, hint: str) -> None:
        self.name = name
        self._code, self._hint = code, hint
        self.places: dict[Place, int] = {}
        self.found: list[Problem] = []

    def check(self) -> None:
        """Raises `BadFile` if there are problems."""
        if self.found:
            raise self.refused(*self.found)

    def refused(self, *problems: Problem) -> BadFile:
        """The error that lists `problems`, in the order of their lines."""
        text = f"{self.name}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
        return BadFile(self._code, text, self._hint, tuple(str(problem) for problem in sorted(problems)))

    def add(self, place: Place, text: str) -> None:
        known = next((place[:n] for n in range(len(place), 0, -1) if place[:n] in self.places), ())
        where = ".".join(str(part) for part in place)
        self.found.append(Problem(self.places.get(known, 0), where, text))

    def table(self, kind: type[_T], place: Place, data: object) -> _T:
        """The table as its type; records every fault and leaves the faulty keys unset."""
        if not isinstance(data, dict):
            self.add(place, "is not a table")
            return kind()
        try:
            return kind.model_validate(data)
        except ValidationError as error:
            keys = [info.alias or name for name, info in kind.model_fields.items()]
            bad = self._add_all(error, place, data, lambda _: keys)
        return kind.model_validate({key: value for key, value in data.items() if key not in bad})

    def whole(self, kind: type[_Whole], data: dict[str, Any]) -> _Whole:
        """The file as a dataclass whose fields are its tables and keys; raises `BadFile` with every fault."""
        try:
            read = TypeAdapter(kind).validate_python(data)
        except ValidationError as error:
            self._add_all(error, (), data, lambda loc: _keys_at(kind, loc))
            raise self.refused(*self.found) from None
        self.check()
        return read

    def _add_all(
        self, error: ValidationError, place: Place, data: object, keys: Callable[[Place], list[str]]
    ) -> set[int | str]:
        """Records every fault; `keys` are those of the table at a place. Returns the faulty keys of the top table."""
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        sentences: dict[Place, list[str]] = {}
        for fault in faults:  # a union type yields one fault per branch
            sentence = _sentence(keys, fault["type"], fault["loc"], fault["msg"])
            sentences.setdefault(_inside(fault["loc"], data), []).append(sentence)
        for at, texts in sentences.items():
            self.add(place + at, " or ".join(dict.fromkeys(texts)))
        return {fault["loc"][0] for fault in faults}

    def require(self, place: Place, data: object, *keys: str) -> None:
        """Records each of `keys` that the file lacks."""
        for key in keys:
            if isinstance(data, dict) and key not in data:
                self.add((*place, key), "is missing")


def _inside(loc: tuple[int | str, ...], data: object) -> Place:
    """pydantic's location without the parts that name a union's branch instead of a key."""
    place: list[str | int] = []
    for part in loc:
        if isinstance(data, dict) and part in data:
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif part is not loc[-1] or not isinstance(data, dict):
            continue
        place.append(part)
    return tuple(place)


def _keys_at(kind: Any, place: Place) -> list[str]:
    """The keys of the table at a place of a file that `kind` describes, as `Faults.whole` reads it."""
    for key in (part for part in place if isinstance(part, str)):
        hint = get_type_hints(kind)[key]
        kind = next(one for one in (hint, *get_args(hint)) if is_dataclass(one))
    return [one.name for one in fields(kind)]


def _sentence(keys: Callable[[Place], list[str]], fault: str, loc: Place, message: str) -> str:
    if fault in ("extra_forbidden", "unexpected_keyword_argument"):
        near = difflib.get_close_matches(str(loc[-1]), keys(loc[:-1]), 1)
        return "unknown key" + (f", did you mean {near[0]}" if near else "")
    if fault == "missing":
        return "is missing"
    if fault == "too_short":
        return "is empty, which would allow none: name at least one, or remove the key"
    message = message.removeprefix("Value error, ").replace("Input should be", "must be")
    return message.replace("valid tuple", "valid list").rstrip(".")


# --- lines of keys ---------------------------------------------------------------------------------------------------


def find_places(text: str) -> dict[Place, int]:
    """Line numbers from 1 for every table, key and array item, by its path, such as `("roles", "llmops")`."""
    return _read_lines(text)[0]


def find_headers(text: str) -> list[tuple[int, Place]]:
    """Line number from 1 and path of every table's header, in the order of the text."""
    return _read_lines(text)[1]


def _read_lines(text: str) -> tuple[dict[Place, int], list[tuple[int, Place]]]:
    places: dict[Place, int] = {}
    headers: list[tuple[int, Place]] = []
    tables: dict[Place, int] = {}
    table: Place = ()
    tokens = _Tokens(text)
    while (token := tokens.peek()) is not None:
        if token == "\n":
            tokens.next()
        elif token == "[":
            line, table = tokens.line(), _read_header(tokens, places, tables)
            headers.append((line, table))
        else:
            _read_pair(tokens, table, places)
    return places, headers


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


def _read_key(tokens: _Tokens) -> Place:
    parts = [_unquote(tokens.next())]
    while tokens.peek() == ".":
        tokens.next()
        parts.append(_unquote(tokens.next()))
    return tuple(parts)


def _unquote(token: str) -> str:
    if token[:1] == '"' and "\\" in token:
        return next(iter(tomllib.loads(f"{token} = 0")))
    return token[1:-1] if token[:1] in ("'", '"') else token


def _read_header(tokens: _Tokens, places: dict[Place, int], tables: dict[Place, int]) -> Place:
    """The table's path; `tables` counts the tables of each array of tables, and the path goes through the newest."""
    line = tokens.line()
    brackets = 0
    while tokens.peek() == "[":
        tokens.next()
        brackets += 1
    key = _read_key(tokens)
    while tokens.peek() == "]":
        tokens.next()
    path: Place = ()
    for depth, part in enumerate(key, start=1):
        path = (*path, part)
        places.setdefault(path, line)
        if depth == len(key) and brackets == 2:
            tables[path] = tables.get(path, -1) + 1
        if path in tables:
            path = (*path, tables[path])
            places.setdefault(path, line)
    return path


def _read_pair(tokens: _Tokens, table: Place, places: dict[Place, int]) -> None:
    line = tokens.line()
    path = table + _read_key(tokens)
    for depth in range(len(table) + 1, len(path) + 1):
        places.setdefault(path[:depth], line)
    tokens.next()  # the equals sign
    _read_value(tokens, path, places)


def _read_value(tokens: _Tokens, path: Place, places: dict[Place, int]) -> None:
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


def _read_array(tokens: _Tokens, path: Place, places: dict[Place, int]) -> None:
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
