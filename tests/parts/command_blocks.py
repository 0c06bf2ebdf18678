"""The blocks of README and the runbooks that hold commands, and what each says of being run in the tests.

A block holds commands when it is indented code, or a fence of `sh`, `bash` or `console`, or a fence of `text` that
begins with a prompt, `$ `. Everything else that is shown (files, output, diagrams) is fenced in another language, or as
`text` without a prompt.

A comment on the line before a block is its mark:

    <!-- not run here: a security key -->                            what this machine lacks
    <!-- stand-in here: systemctl, for systemd as process 1 -->      run, with a stand-in for what this machine lacks
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from markdown_it.token import Token

from tests.parts.documents import parse_markdown, read_documents

_SHELLS: Final = {"sh", "bash", "console"}
_NOT_RUN: Final = re.compile(r"<!-- not run here: (.+?) -->")
_STAND_IN: Final = re.compile(r"<!-- stand-in here: ([\w-]+(?: and [\w-]+)*), for (.+?) -->")
_MARK: Final = re.compile(r"<!-- (?:not run|stand-in)\b")


@dataclass(frozen=True, slots=True)
class CommandBlock:
    """One block. `line` is its first line in the page, from 1.

    `lacks` is what this machine lacks, "" if nothing; `stand_in` names what is replaced, "" if the block is
    not run at all, or needs none. `is_generated`: scripts/docs writes it from a transcript.
    """

    page: str
    line: int
    language: str
    text: str
    lacks: str = ""
    stand_in: str = ""
    is_generated: bool = False

    @property
    def first(self) -> str:
        return self.text.splitlines()[0]

    @property
    def is_session(self) -> bool:
        """Whether it shows what its commands print."""
        return self.language == "text"

    @property
    def is_left_out(self) -> bool:
        return bool(self.lacks) and not self.stand_in

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.first}"


def read_command_blocks() -> list[CommandBlock]:
    """Those of README.md and of every page of runbooks/, in their order."""
    pages = {name: text for name, text in read_documents().items() if name == "README.md" or "/" in name}
    return [block for name, text in pages.items() for block in command_blocks(name, text)]


def command_blocks(page: str, text: str) -> Iterator[CommandBlock]:
    """Those of one page. Raises `ValueError` if a mark is malformed, or marks nothing."""
    tokens = parse_markdown(text)
    used = 0
    for before, token in pairwise([Token("start", "", 0), *tokens]):
        if token.type not in {"fence", "code_block"} or not _holds_commands(token):
            continue
        comment = before.content if before.type == "html_block" else ""
        lacks, stand_in = "", ""
        if (found := _NOT_RUN.search(comment)) is not None:
            lacks = found[1]
        elif (found := _STAND_IN.search(comment)) is not None:
            stand_in, lacks = found[1], found[2]
        used += bool(lacks)
        assert token.map is not None
        line = token.map[0] + (2 if token.type == "fence" else 1)
        generated = "<!-- generated: " in comment
        yield CommandBlock(page, line, token.info or "indented", token.content, lacks, stand_in, generated)
    inside = [part for token in tokens for part in [token, *(token.children or ())] if part.type.startswith("html_")]
    marks = sum(len(_MARK.findall(part.content)) for part in inside)
    if marks != used:
        raise ValueError(f"{page}: {marks} marks, and {used} blocks of commands with one right before them")


def _holds_commands(token: Token) -> bool:
    if token.type == "code_block" or token.info in _SHELLS:
        return True
    return token.info == "text" and token.content.startswith("$ ")


def count_marks(blocks: list[CommandBlock]) -> Mapping[tuple[str, bool], int]:
    """How many blocks have each mark: (what this machine lacks, whether a stand-in is there) and their number."""
    return Counter((block.lacks, bool(block.stand_in)) for block in blocks if block.lacks)
