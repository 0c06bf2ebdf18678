"""Compose files as this repository writes them → places and values; strict, so that nothing is read otherwise.

Not YAML: block maps and lists, plain scalars or ones in double quotes, `[A, B]`, comments. Whatever else stands there
is refused. There is no YAML reader among the runtime's packages, and for two files of our own none is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

Place = tuple[str, ...]
_KEY: Final = re.compile(r"([A-Za-z_][\w-]*):(?: +(.+))?")
_QUOTED: Final = re.compile(r'"([^"\\]*)"')
_FLOW: Final = re.compile(r"\[([^\[\]{}]*)\]")
_PLAIN: Final = re.compile(r"(?!- |-$|~$)(?:\$\{(?:(?!: )[^{}\"'])*\}|[\w./~$=,-]|:(?=\S)| (?=\S))+", re.ASCII)


def parse_compose(text: str) -> dict[Place, str]:
    """Every scalar with its place: names of keys, numbers of list items. Raises `ValueError` with the line."""
    found: dict[Place, str] = {}
    known: set[Place] = set()
    around: list[tuple[int, Place]] = []  # indent and place of each map key or list item that is open
    for number, line in enumerate(text.splitlines(), 1):
        content = _without_comment(line)
        if not content.strip():
            continue
        try:
            _read_line(content, around, known, found)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return found


def _read_line(content: str, around: list[tuple[int, Place]], known: set[Place], found: dict[Place, str]) -> None:
    indent = len(content) - len(content.lstrip(" "))
    if content[indent] == "\t":
        raise ValueError("a tab before the first word")
    content = content.strip()
    while around and around[-1][0] >= indent:
        around.pop()
    place = around[-1][1] if around else ()
    if place in found:
        raise ValueError("stands below something that has a value")
    if content == "-" or content.startswith("- "):
        item = sum(1 for other in known if len(other) == len(place) + 1 and other[:-1] == place)
        if item and (*place, str(item - 1)) not in known:
            raise ValueError("a list item among keys")
        place = (*place, str(item))
        known.add(place)
        around.append((indent, place))
        inner = content[1:].lstrip(" ")
        indent, content = indent + len(content) - len(inner), inner
        if not content:
            return
    key = _KEY.fullmatch(content)
    if key is not None:
        place = (*place, key[1])
        if place in known:
            raise ValueError(f"{key[1]} stands there twice")
        if (*place[:-1], "0") in known:
            raise ValueError("a key among list items")
        known.add(place)
        around.append((indent, place))
        content = key[2] or ""
    elif not place or not place[-1].isdecimal():
        raise ValueError("neither a key nor a list item")
    found.update(_values(content, place))


def _values(text: str, place: Place) -> Iterator[tuple[Place, str]]:
    flow = _FLOW.fullmatch(text)
    if flow is not None:
        for item, part in enumerate(flow[1].split(",")):
            yield (*place, str(item)), _scalar(part.strip())
    elif text:
        yield place, _scalar(text)


def _scalar(text: str) -> str:
    quoted = _QUOTED.fullmatch(text)
    if quoted is not None:
        return quoted[1]
    if _PLAIN.fullmatch(text) is None:
        raise ValueError("a value in a form that is not read here")
    return text


def _without_comment(line: str) -> str:
    return re.sub(r"(?:^|(?<= ))#.*", "", line).rstrip()
