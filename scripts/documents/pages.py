"""`scripts/docs`: the pages of runbooks/ and their generated blocks. What a block says is in `facts.py`.

A block stands between `<!-- generated: NAME -->` and `<!-- end -->`. Every fact has exactly one block. Cells that the
code does not know, such as what a metric means to a reader, are written by hand in the block and kept.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from scripts.documents.facts import FACTS, Fact, Table

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "runbooks"
BLOCK = re.compile(r"^<!-- generated: ([\w -]+?) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)


def render(text: str, facts: Mapping[str, Fact] = FACTS) -> str:
    """A page with each of its blocks as the code has it now; raises `KeyError` for a block that has no fact."""

    def block(match: re.Match[str]) -> str:
        content = facts[match[1]]()
        if isinstance(content, Table):
            content = content.render(written_by_hand(match[2]))
        return f"<!-- generated: {match[1]} -->\n{content.strip()}\n<!-- end -->"

    return BLOCK.sub(block, text)


def written_by_hand(block: str) -> dict[str, list[str]]:
    """Cells of the table in a block, by the first cell of their row."""
    rows = [split_row(line) for line in block.splitlines() if line.startswith("|")]
    return {row[0]: row for row in rows[2:]}


def split_row(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))]


def differences(pages: Mapping[str, str], facts: Mapping[str, Fact] = FACTS) -> Iterator[str]:
    """One sentence for each page that is not what the code says, with its first line that differs; then for each empty
    cell, for each block that is unknown, missing, or listed twice."""
    placed: dict[str, list[str]] = {name: [] for name in facts}
    for name, text in pages.items():
        blocks = [match[1] for match in BLOCK.finditer(text)]
        if len(blocks) != text.count("<!-- generated: "):
            yield f"{name}: a generated block has no <!-- end -->"
        unknown = [block for block in blocks if block not in facts]
        yield from (f"{name}: no fact is called {block!r}" for block in unknown)
        for block in blocks:
            placed.setdefault(block, []).append(name)
        if not unknown and (new := render(text, facts)) != text:
            yield f"{name}:{first_difference(text, new)}"
        for match in BLOCK.finditer(text):
            yield from (f"{name}: the row of {row[0]} has an empty cell" for row in unfinished(match, facts))
    for fact, names in placed.items():
        if fact in facts and len(names) != 1:
            yield f"the block {fact!r} is on {' and '.join(names) or 'no page'}"


def unfinished(match: re.Match[str], facts: Mapping[str, Fact]) -> Iterator[list[str]]:
    """Rows with an empty last cell, in a block whose last column is written by hand."""
    content = facts[match[1]]() if match[1] in facts else ""
    if isinstance(content, Table) and content.by_hand:
        yield from (row for row in written_by_hand(match[2]).values() if not row[-1])


def first_difference(old: str, new: str) -> str:
    """`12: the page has …, the code says …`"""
    before, after = old.splitlines(), new.splitlines()
    at = next((n for n, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        at = min(len(before), len(after))
    has, says = (repr(lines[at]) if at < len(lines) else "nothing" for lines in (before, after))
    return f"{at + 1}: the page has {has}, the code says {says}"


def read_pages() -> dict[str, str]:
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted(PAGES.rglob("*.md"))}


def main(words: Sequence[str]) -> int:
    if words not in ([], ["--check"]):
        print("usage: scripts/docs [--check]", file=sys.stderr)
        return 2
    pages = read_pages()
    if not words:
        for name, text in pages.items():
            new = render(text)
            if new != text:
                (ROOT / name).write_text(new)
                print(f"{name}: written")
        pages = read_pages()
    wrong = list(differences(pages))
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    if wrong:
        print("scripts/docs: hint: run scripts/docs, and fill in empty cells by hand", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
