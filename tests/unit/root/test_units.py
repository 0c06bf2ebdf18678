"""Durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.units import parse_duration, plain, render_duration


@pytest.mark.parametrize(
    "text,seconds",
    [("90s", 90), ("15m", 900), ("1h30m", 5_400), ("90d", 7_776_000), ("1d1h1m1s", 90_061), ("0s", 0), ("007s", 7)],
)
def test_what_people_write_is_read(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "15",
        "m",
        "15 m",
        "-1m",
        "+1m",
        "1m1h",
        "1m1m",
        "1.5h",
        "1w",
        "1M",
        "1e3s",
        "٣m",
        "1m\n",
        "9999999999s",
        "1h30",
    ],
)
def test_anything_else_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration such as"):
        parse_duration(text)


@given(st.integers(0, 10**11))
def test_what_is_rendered_reads_back(seconds: int) -> None:
    assert parse_duration(render_duration(seconds)) == seconds


@given(st.text())
def test_no_text_raises_anything_but_value_error(text: str) -> None:
    try:
        seconds = parse_duration(text)
    except ValueError:
        return
    assert seconds >= 0
    assert text.isascii()


@pytest.mark.parametrize(
    "text, shown",
    [
        ("role llmops, ünïcode", "role llmops, ünïcode"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("one\r\ntwo\t", "one\\r\\ntwo\\t"),
        ("\u202e\ud800", "\\u202e\\ud800"),
        (17, "17"),
    ],
)
def test_what_could_control_a_terminal_is_an_escape(text: object, shown: str) -> None:
    assert plain(text) == shown


def test_some_characters_can_stay_and_the_others_become_what_the_caller_says() -> None:
    assert plain("a\tb\x1b\n", keep="\n\t") == "a\tb\\x1b\n"
    assert plain("a\tb\x1b\n", instead="?") == "a?b??"
    assert plain("a\tb\x1b\n", keep="\t", instead="") == "a\tb"
