"""Every key that tomllib finds has its line, however the file is written."""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.toml import find_places

WEIRD = '''# [not.a.table] "quoted ] text"
title = "a # b ] c"   # a comment with [brackets] and "quotes"

[a]
plain = 1
"quoted key" = 2
'lite.ral' = 3
"esc\\u0061ped\\n" = 4
dot.ted.key = 5
dot . "spaced" = 6
text = """
[not.a.table]
key = "no"
""\\" still text
"""
literal = \'\'\'
]] [x]
it's\'\'\'
last = """ends with two quotes"""""
date = 1979-05-27 07:32:00Z
when = 1979-05-27T07:32:00.5-07:00
float = -1.5e+3
odd = [inf, nan, +0.0, 0x1F, 1_000]
inline = { one = 1, two = { three = [1, { four = 4 }] }, "five.six" = [], seven.eight = "}" }
list = [
  "one", # ] not the end
  [2,
   3],

  { x = "]", y = [ "}" ] },
  """
multi
""", 'z',
]
empty = {}
none = []

[[ tables ]]
name = "first"
[[tables.inner]]
n = 1
[[tables.inner]]
n = 2
[tables.other]
deep = true
[[tables]]
name = "second"
[[tables.inner]]
n = 3

[ "b.c" . d ]
e = 1
[a.later]
f = 2
'''


def paths(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*at, key))


def test_every_path_of_a_weird_file_has_a_line_and_nothing_else_has() -> None:
    assert set(find_places(WEIRD)) == set(paths(tomllib.loads(WEIRD)))


@pytest.mark.parametrize(
    "path,starts",
    [
        (("title",), "title"),
        (("a",), "[a]"),
        (("a", "quoted key"), '"quoted key"'),
        (("a", "lite.ral"), "'lite.ral'"),
        (("a", "escaped\n"), '"esc'),
        (("a", "dot", "ted", "key"), "dot.ted"),
        (("a", "dot", "spaced"), "dot ."),
        (("a", "last"), "last"),
        (("a", "odd", 3), "odd"),
        (("a", "inline", "two", "three", 1, "four"), "inline"),
        (("a", "list"), "list"),
        (("a", "list", 0), '  "one"'),
        (("a", "list", 1), "  [2"),
        (("a", "list", 1, 1), "   3]"),
        (("a", "list", 2, "y", 0), "  { x"),
        (("a", "list", 4), '""", '),
        (("tables", 0), "[[ tables"),
        (("tables", 0, "inner", 1, "n"), "n = 2"),
        (("tables", 1, "name"), 'name = "second"'),
        (("tables", 1, "inner", 0, "n"), "n = 3"),
        (("tables", 0, "other", "deep"), "deep"),
        (("b.c", "d", "e"), "e = 1"),
        (("a", "later", "f"), "f = 2"),
    ],
)
def test_the_line_is_that_of_the_key(path: tuple[str | int, ...], starts: str) -> None:
    line = WEIRD.splitlines()[find_places(WEIRD)[path] - 1]
    assert line.startswith(starts)


def test_lines_of_a_file_with_windows_line_ends_are_counted_alike() -> None:
    text = 'a = 1\r\nb = [\r\n"c",\r\n]\r\n[d]\r\ne = """x\r\ny"""\r\nf = 2\r\n'
    assert set(find_places(text)) == set(paths(tomllib.loads(text)))
    assert find_places(text)["d", "f"] == 8


def test_an_empty_file_has_no_places() -> None:
    assert find_places("") == find_places("\n# nothing\n") == {}


KEYS = st.text(st.sampled_from("ab.-_ \"'#[]{}=,\n\u00e9\\"), max_size=4)
SCALARS = st.integers() | st.booleans() | st.text(st.sampled_from("ab \"'#[]{}=,\n\\."), max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
DOCUMENTS = st.dictionaries(KEYS, VALUES, max_size=5)


class Writer:
    """Writes a document as TOML, in a style that is drawn anew for each key and value."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def key(self, name: str) -> str:
        if (
            name
            and all(char.isascii() and (char.isalnum() or char in "-_") for char in name)
            and self.rng.random() < 0.7
        ):
            return name
        if "'" not in name and "\n" not in name and self.rng.random() < 0.5:
            return f"'{name}'"
        return json.dumps(name)

    def blank(self) -> str:
        return self.rng.choice(("", "", " ", "\n", " # ] } \" ' [x]\n"))

    def value(self, value: Any) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int):
            return str(value)
        if isinstance(value, str):
            if "'" not in value and "\n" not in value and self.rng.random() < 0.4:
                return f"'{value}'"
            if "'" not in value and self.rng.random() < 0.4:
                return f"'''\n{value}'''"
            if self.rng.random() < 0.4:
                return '"""\n' + json.dumps(value)[1:-1].replace("\\n", "\n") + '"""'
            return json.dumps(value)
        if isinstance(value, list):
            items = [self.blank() + self.value(item) + self.blank() for item in value]
            return "[" + ",".join(items) + self.rng.choice(("", ",") if items else ("",)) + self.blank() + "]"
        return "{ " + ", ".join(f"{self.key(name)} = {self.value(item)}" for name, item in value.items()) + " }"

    def table(self, table: dict[str, Any], header: str = "") -> str:
        """Scalars and inline values first, then tables under headers of their own."""
        text, later = "", ""
        for name, item in table.items():
            whole = f"{header}.{self.key(name)}" if header else self.key(name)
            if isinstance(item, dict) and self.rng.random() < 0.6:
                later += f"[{whole}] # [no]\n" + self.table(item, whole)
            elif item and isinstance(item, list) and all(isinstance(one, dict) for one in item):
                later += "".join(f"[[ {whole} ]]\n" + self.table(one, whole) for one in item)
            elif isinstance(item, dict) and item and self.rng.random() < 0.5:
                text += "".join(f"{self.key(name)} . {self.key(k)} = {self.value(v)}\n" for k, v in item.items())
            else:
                text += f"{self.key(name)}={self.value(item)}\n"
        return text + later


@given(DOCUMENTS, st.integers(0, 2**32))
def test_every_path_of_any_file_has_a_line_within_it(document: dict[str, Any], seed: int) -> None:
    text = Writer(seed).table(document)
    read = tomllib.loads(text)
    assert read == document
    places = find_places(text)
    assert set(places) == set(paths(read))
    assert all(1 <= line <= text.count("\n") + 1 for line in places.values())
