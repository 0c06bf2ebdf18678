"""Every block of commands in README and the runbooks is run by a test, or carries a mark that says what lacks here."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.parts.command_blocks import CommandBlock, command_blocks, count_marks, read_command_blocks
from tests.parts.document_walk import ELSEWHERE, PAGES, STOPS, TRANSCRIPTS, run_by
from tests.parts.documents import ROOT

BLOCKS = read_command_blocks()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_is_run_or_says_what_is_missing(block: CommandBlock) -> None:
    test = run_by(block)
    if block.is_left_out:
        assert not test, f"{test} runs it, and its mark says that nothing does"
    else:
        assert test, "add it to tests/parts/document_walk.py, or mark it"
        assert (ROOT / test).is_file()


def test_each_entry_fits_one_block() -> None:
    """Else an entry stays that runs nothing, or a second block hides behind it."""
    found = [[str(block) for block in BLOCKS if stop.is_of(block)] for stop in STOPS]
    for page, begins in ELSEWHERE:
        found.append([str(block) for block in BLOCKS if block.page == page and block.text.startswith(begins)])
    assert [blocks for blocks in found if len(blocks) != 1] == []
    assert [block for block, times in Counter(block for block, *_ in found).items() if times != 1] == []
    assert set(PAGES) <= {block.page for block in BLOCKS if block.is_session}


def test_most_blocks_are_run() -> None:
    """Else the tests above look at nothing, or a mark has become the easy way out."""
    left_out = [block for block in BLOCKS if block.is_left_out]
    assert len(BLOCKS) > 200
    assert len(left_out) <= 12
    assert sum(run_by(block) == TRANSCRIPTS for block in BLOCKS) >= 4
    assert sum(count_marks(BLOCKS).values()) == sum(bool(block.lacks) for block in BLOCKS)


@pytest.mark.parametrize(
    "text, lacks, stand_in",
    [
        ("    signer check\n", "", ""),
        ("<!-- not run here: a security key -->\n\n    signer check\n", "a security key", ""),
        ("<!-- not run here: a security key -->\n```sh\nsigner check\n```\n", "a security key", ""),
        ("<!-- stand-in here: x, for systemd as process 1 -->\n\n    x stop\n", "systemd as process 1", "x"),
        ("1. First:\n\n   <!-- stand-in here: a and b, for c and d -->\n\n       a && b\n", "c and d", "a and b"),
        ("```text\n$ signer check\nready\n```\n", "", ""),
    ],
)  # fmt: skip
def test_a_mark_is_read(text: str, lacks: str, stand_in: str) -> None:
    (block,) = command_blocks("page.md", text)
    assert (block.lacks, block.stand_in, block.is_left_out) == (lacks, stand_in, bool(lacks) and not stand_in)


@pytest.mark.parametrize(
    "text", ["```text\nready\n```\n", "```toml\n[ca]\n```\n", "`signer check`\n", "- one\n    - two\n"]
)
def test_output_and_files_are_no_commands(text: str) -> None:
    assert list(command_blocks("page.md", text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "<!-- not run here: a security key -->\n\nText.\n\n    signer check\n",
        "<!-- not run: a security key -->\n\n    signer check\n",
        "<!-- not run here: a security key -->\n\n```toml\n[ca]\n```\n",
    ],
)
def test_a_mark_that_marks_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="1 marks, and 0 blocks"):
        list(command_blocks("page.md", text))
