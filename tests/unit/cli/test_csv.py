"""Comma-separated values: every cell survives a reader of CSV, and no spreadsheet computes what a caller wrote."""

from __future__ import annotations

import csv
import io

import pytest

from signer.cli.output import show_csv


def shown(value: object, capsys: pytest.CaptureFixture[str]) -> str:
    show_csv(("serial", "reason"), [{"serial": "1", "reason": value, "other": "is no column"}])
    titles, (serial, cell) = csv.reader(io.StringIO(capsys.readouterr().out))
    assert (titles, serial) == (["serial", "reason"], "1")
    return cell


@pytest.mark.parametrize(
    "value, cell",
    [
        ("ticket 812", "ticket 812"),
        ('one, "two"', 'one, "two"'),
        (["ci", "llmops"], "ci,llmops"),
        (4711, "4711"),
        (None, ""),
        ("a\nb\x1b[31m", r"a\nb\x1b[31m"),
    ],
)
def test_a_cell_is_the_value_as_text(value: object, cell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(value, capsys) == cell


@pytest.mark.parametrize("value", ["=1+1", "+1", "-1", "@sum(a1)", ["=1", "2"]])
def test_no_cell_is_a_formula(value: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(value, capsys).startswith("'")


def test_without_rows_there_are_titles(capsys: pytest.CaptureFixture[str]) -> None:
    show_csv(("serial", "reason"), [])
    assert capsys.readouterr().out == "serial,reason\n"
