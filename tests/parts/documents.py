"""The documents of this repository as text, and their headings, tables, blocks and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOP = ("README.md", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md")
REFERENCE = "runbooks/reference"


def read_documents() -> dict[str, str]:
    """Every document by its path in the repository."""
    paths = [*(ROOT / name for name in TOP), *sorted((ROOT / "runbooks").rglob("*.md"))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def document(name: str) -> str:
    return (ROOT / name).read_text()


def reference(name: str) -> str:
    return document(f"{REFERENCE}/{name}.md")


def section(title: str, text: str) -> str:
    """What stands under a heading, with the smaller headings below it."""
    match = re.search(rf"^(#+) {re.escape(title)}\n", text, re.MULTILINE)
    assert match is not None, f"there is no heading {title!r}"
    level = len(match[1])
    end = re.search(rf"^#{{1,{level}}} ", text[match.end() :], re.MULTILINE)
    return text[match.end() :][: end.start() if end is not None else None]


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the tables whose first header cell is `header`."""
    tables = [table for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE) if cells(table)[0][0] == header]
    assert tables, f"there is no table that begins with {header!r}"
    return [row for table in tables for row in cells(table)[2:]]


def cells(table: str) -> list[list[str]]:
    lines = table.strip().split("\n")
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]


def names(found: list[list[str]], column: int = 0) -> list[str]:
    """Every word in backquotes of a column."""
    return [name for row in found for name in re.findall(r"`([^`]+)`", row[column])]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def without_blocks(text: str) -> str:
    """The text without fenced blocks, in which nothing is a heading or a link."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """What GitHub makes of each heading."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> Iterator[tuple[str, str]]:
    """(file, anchor) of each link inside the repository; either may be empty."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(text)):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            yield file, anchor
