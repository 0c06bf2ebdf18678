"""Lines and tables at the width of a terminal: nothing is lost, and what cannot be read is not printed."""

from __future__ import annotations

import os
import pty
import struct
import termios
from collections import Counter
from collections.abc import Iterator
from fcntl import ioctl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.cli.parser import load_all
from signer.cli.usage import render_group_help, render_help
from signer.safe_session.terminal import MAX_WIDTH, fit, lay_out, width_of, wrap, wrap_command
from signer.safe_session.usage import TEXT

WIDTHS = (60, 80, 120)
WORD = st.text("abcdefghij-.:/", min_size=1, max_size=24)
CELL = st.lists(WORD, max_size=8).map(" ".join)
TABLE = st.integers(1, 7).flatmap(
    lambda columns: st.lists(st.lists(CELL, min_size=columns, max_size=columns), min_size=1, max_size=5)
)
HELPS = {
    "signer": render_help(),
    "safe-session": TEXT,
    **{words: render_group_help((words,)) for words in ("certs", "ledger", "hosts", "policy", "cutover")},
    **{entry.words: found.render_help() for entry, found in load_all()},
}


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The descriptor of a terminal with 72 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)
    leader, follower = pty.openpty()
    ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 72, 0, 0))
    yield follower
    os.close(leader)
    os.close(follower)


def test_the_width_is_the_terminal_s(terminal: int) -> None:
    assert width_of(terminal) == 72


@pytest.mark.parametrize("columns, width", [("60", 60), ("100", 100), ("240", MAX_WIDTH), ("5", 30), ("0", 72), ("", 72), ("wide", 72)])  # fmt: skip # noqa: E501
def test_columns_of_the_environment_count_first(
    terminal: int, columns: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert width_of(terminal) == width


def test_a_pipe_has_no_width_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    reader, writer = os.pipe()
    assert width_of(writer) is None
    os.close(reader)
    os.close(writer)
    assert width_of(writer) is None  # closed


@pytest.mark.parametrize("name", HELPS)
def test_help_fits_and_keeps_its_words(name: str) -> None:
    natural = HELPS[name]
    for width in WIDTHS:
        lines = fit(natural, min(width, MAX_WIDTH)).split("\n")
        too_long = [line for line in lines if len(line) > width and len(line.split()) > 1]
        assert too_long == []
        assert _words(lines) == _words(natural.split("\n"))


def test_a_row_of_help_goes_on_below_its_text() -> None:
    assert fit("  --flag TIME  what the flag does, in words\n               and in more words", 30).split("\n") == [
        "  --flag TIME",
        "      what the flag does, in",
        "      words and in more words",
    ]
    assert fit("  --flag TIME  what the flag does, in words\n               and in more words", 40).split("\n") == [
        "  --flag TIME  what the flag does, in",
        "               words and in more words",
    ]


def test_text_that_fits_is_not_laid_out_again() -> None:
    text = "a paragraph\nof short lines\n\n  one  two\n       three\n  signer status"
    assert fit(text, 60) == text


def test_a_command_is_broken_so_that_a_shell_reads_it() -> None:
    line = "  signer freeze identity deploy-agent --reason 'its token was found' --until 2h --json"
    assert wrap_command(line, 50) == [
        "  signer freeze identity deploy-agent \\",
        "      --reason 'its token was found' --until 2h \\",
        "      --json",
    ]


def test_a_command_between_backticks_stays_whole_where_it_fits() -> None:
    assert wrap("signer: hint: see `signer certs list --help` for it", 40) == [
        "signer: hint: see",
        "  `signer certs list --help` for it",
    ]


@given(CELL, st.integers(30, 100))
def test_no_line_is_longer_than_the_width_but_one_word(line: str, width: int) -> None:
    lines = wrap(line, width)
    assert " ".join(part.strip() for part in lines).split() == line.split()
    assert all(len(part) <= width or len(part.split()) == 1 for part in lines)


@given(TABLE, st.integers(30, 100), st.booleans(), st.sampled_from(["", "  "]))
def test_a_table_loses_no_word_at_any_width(rows: list[list[str]], width: int, titled: bool, indent: str) -> None:
    lines = lay_out(rows, width, indent, titled=titled)
    assert Counter(word for line in lines for word in line.split()) == Counter(
        word for row in rows for cell in row for word in cell.split()
    )
    assert all(len(line) <= width or len(line.split()) == 1 for line in lines)


def test_a_table_without_a_limit_has_a_line_for_each_row() -> None:
    rows = [["a" * 80, "b b"], ["c", "d" * 80]]
    assert lay_out(rows, None) == [f"{'a' * 80}  b b", f"{'c'.ljust(80)}  {'d' * 80}"]


def _words(lines: list[str]) -> Counter[str]:
    return Counter(word for line in lines for word in line.split() if word != "\\")
