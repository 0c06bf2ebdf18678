"""`verify` on a ledger that is long enough to be compared in pieces, in threads, on connections of their own."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from scripts.bench.filling import fill_ledger
from signer.errors import LedgerBroken
from signer.ledger import audit
from signer.ledger.audit import verify
from signer.ledger.reader import FILE_NAME, LedgerReader

EVENTS = 1_000


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a ledger that has ten pieces."""
    monkeypatch.setattr(audit, "_CHUNK", EVENTS // 10)
    fill_ledger(tmp_path, EVENTS, 10, 2_000_000_000, lambda _done, _of: None)
    return tmp_path


def change(folder: Path, sql: str, *values: object) -> None:
    db = sqlite3.connect(folder / FILE_NAME)
    for (trigger,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
        db.execute(f"DROP TRIGGER {trigger}")
    assert db.execute(sql, values).rowcount != 0
    db.commit()
    db.close()


def test_a_ledger_that_nobody_touched_verifies_in_pieces(ledger: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert verify(LedgerReader(ledger), lambda done, of: seen.append((done, of))).seq == EVENTS
    assert seen[-1] == (EVENTS, EVENTS)


@pytest.mark.parametrize("seq", [1, 99, 100, 101, 555, 900, EVENTS])
def test_a_changed_row_is_found_in_every_piece_and_at_its_edges(ledger: Path, seq: int) -> None:
    change(ledger, "UPDATE certificates SET role = 'other' WHERE seq = ?", seq)
    with pytest.raises(LedgerBroken, match=f"event {seq}$") as found:
        verify(LedgerReader(ledger))
    assert found.value.code == "ledger_tables_differ"


@pytest.mark.parametrize("seq", [1, 99, 100, 101, EVENTS])
def test_a_principal_that_is_gone_is_found_in_every_piece_and_at_its_edges(ledger: Path, seq: int) -> None:
    change(ledger, "DELETE FROM principals WHERE seq = ?", seq)
    with pytest.raises(LedgerBroken, match=f"table principals .*event {seq}$"):
        verify(LedgerReader(ledger))


def test_a_row_that_no_event_stands_behind_is_found(ledger: Path) -> None:
    change(ledger, "INSERT INTO principals VALUES ('root', 500)")
    with pytest.raises(LedgerBroken, match="table principals"):
        verify(LedgerReader(ledger))


def test_a_changed_event_is_told_before_the_tables_that_differ_from_it(ledger: Path) -> None:
    change(ledger, "UPDATE events SET body = replace(body, 'permit-pty', 'permit-pTy') WHERE seq = 700")
    with pytest.raises(LedgerBroken, match="broken at event 700") as found:
        verify(LedgerReader(ledger))
    assert found.value.facts["seq"] == 700


def test_a_damaged_file_is_told_before_anything_else(ledger: Path) -> None:
    change(ledger, "UPDATE events SET actor = 'other' WHERE seq = 3")
    change(ledger, "UPDATE certificates SET role = 'other' WHERE seq = 3")
    with sqlite3.connect(ledger / FILE_NAME) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        page_size = db.execute("PRAGMA page_size").fetchone()[0]
        root = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'certificates_by_role'").fetchone()[0]
    db.close()
    with (ledger / FILE_NAME).open("r+b") as file:
        file.seek((root - 1) * page_size)
        file.write(b"\xff" * 64)
    with pytest.raises(LedgerBroken, match="damaged"):
        verify(LedgerReader(ledger))
