"""What readiness, status and notices say of cosignatures, from the marks of `signer ledger witness`."""

from __future__ import annotations

from pathlib import Path

import pytest

from signer.ledger.marks import COSIGNED, DIFFERS, Mark, cosigning_warnings, write_mark

NOW = 1_800_000_000


def test_where_no_witness_was_ever_asked_nothing_is_said(tmp_path: Path) -> None:
    assert cosigning_warnings(tmp_path, NOW) == {}


@pytest.mark.parametrize("age, is_late", [(0, False), (3_600, False), (3_601, True), (86_400, True)])
def test_a_cosignature_is_late_after_an_hour(tmp_path: Path, age: int, is_late: bool) -> None:
    assert write_mark(tmp_path, COSIGNED, Mark(7, NOW - age))
    found = cosigning_warnings(tmp_path, NOW)
    assert list(found) == (["witness_late"] if is_late else [])
    assert all("run `signer ledger witness`" in text for text in found.values())


def test_another_history_is_said_until_somebody_has_looked(tmp_path: Path) -> None:
    write_mark(tmp_path, COSIGNED, Mark(7, NOW))
    write_mark(tmp_path, DIFFERS, Mark(7, NOW - 90 * 86_400))
    (text,) = cosigning_warnings(tmp_path, NOW).values()
    assert text.startswith("a witness held another history of the ledger at ")
    (tmp_path / "ledger.differs").unlink()
    assert cosigning_warnings(tmp_path, NOW) == {}
