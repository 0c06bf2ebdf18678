"""The documents of this repository, and their headings, tables, blocks and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
TOP = ("README.md", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md")
REFERENCE = "runbooks/reference"
_MARKDOWN = MarkdownIt("commonmark").enable("table")


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
    found = [table for table in tables(text) if table[0][0] == header]
    assert found, f"there is no table that begins with {header!r}"
    return [row for table in found for row in table[1:]]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each row of each table, the header first, with their marks."""
    found: list[list[list[str]]] = []
    for opening, token in pairwise(parse_markdown(text)):
        if opening.type == "table_open":
            found.append([])
        elif opening.type == "tr_open":
            found[-1].append([])
        elif opening.type in {"th_open", "td_open"}:
            found[-1][-1].append(token.content)
    return found


def names(found: list[list[str]], column: int = 0) -> list[str]:
    """Every word in backquotes of a column."""
    return [name for row in found for name in re.findall(r"`([^`]+)`", row[column])]


def parse_markdown(text: str) -> list[Token]:
    """The tokens of a document, as GitHub reads it."""
    return _MARKDOWN.parse(text)


def blocks(text: str, language: str) -> list[str]:
    """The content of each fenced block of a language."""
    return [token.content for token in parse_markdown(text) if token.type == "fence" and token.info == language]


def anchors(text: str) -> set[str]:
    """What GitHub makes of each heading."""
    tokens = parse_markdown(text)
    headings = [inline.content for token, inline in pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> Iterator[tuple[str, str]]:
    """(file, anchor) of each link and image inside the repository; either may be empty."""
    for token in parse_markdown(text):
        for part in token.children or ():
            target = part.attrs.get("href", part.attrs.get("src"))
            if isinstance(target, str) and not re.match(r"[a-z]+:", target):
                file, _, anchor = target.partition("#")
                yield file, anchor
