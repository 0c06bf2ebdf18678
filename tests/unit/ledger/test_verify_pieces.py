"""`verify` on a ledger that is long enough to be compared in pieces, in processes of their own."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.bench.filling import fill_ledger
from signer.errors import LedgerBroken, Unavailable
from signer.ledger import audit
from signer.ledger.audit import verify
from signer.ledger.chain import entry_hash
from signer.ledger.fold import fold_all
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME, VIEWS_NAME
from signer.ledger.store import Ledger
from tests.parts.events import issued, refused
from tests.parts.ledgers import change_views

EVENTS = 2_560  # ten pieces of one kept subtree each


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a ledger that has ten pieces, all in its views."""
    monkeypatch.setattr(audit, "_CHUNK", EVENTS // 10)
    fill_ledger(tmp_path, EVENTS, 10, 2_000_000_000, lambda _done, _of: None)
    with closing(Ledger(tmp_path)) as ledger:
        fold_all(ledger)
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
    assert [done for done, _ in seen] == list(range(256, EVENTS + 1, 256))


@pytest.mark.parametrize("seq", [1, 255, 256, 257, 1_500, 2_304, EVENTS])
def test_a_changed_row_is_found_in_every_piece_and_at_its_edges(ledger: Path, seq: int) -> None:
    change_views(ledger, "UPDATE certificates SET role = 'other' WHERE seq = ?", seq)
    with pytest.raises(LedgerBroken, match=f"event {seq}$") as found:
        verify(LedgerReader(ledger))
    assert found.value.code == "ledger_tables_differ"


@pytest.mark.parametrize("seq", [1, 255, 256, 257, EVENTS])
def test_a_principal_that_is_gone_is_found_in_every_piece_and_at_its_edges(ledger: Path, seq: int) -> None:
    change_views(ledger, "DELETE FROM principals WHERE seq = ?", seq)
    with pytest.raises(LedgerBroken, match=f"view principals .*event {seq}$"):
        verify(LedgerReader(ledger))


def test_a_row_that_no_event_stands_behind_is_found(ledger: Path) -> None:
    change_views(ledger, "INSERT INTO principals VALUES ('root', 500)")
    with pytest.raises(LedgerBroken, match="view principals"):
        verify(LedgerReader(ledger))


def test_a_changed_event_is_told_before_the_tables_that_differ_from_it(ledger: Path) -> None:
    change(ledger, "UPDATE events SET body = replace(body, 'permit-pty', 'permit-pTy') WHERE seq = 700")
    with pytest.raises(LedgerBroken, match="broken at event 700") as found:
        verify(LedgerReader(ledger))
    assert found.value.facts["seq"] == 700


def test_a_damaged_file_is_told_before_anything_else(ledger: Path) -> None:
    change(ledger, "UPDATE events SET actor = 'other' WHERE seq = 3")
    change(ledger, "UPDATE events SET kind = 'freeze.lifted' WHERE seq = 500")  # so that the index has an entry
    damage(ledger / FILE_NAME, "events_by_kind")
    with pytest.raises(LedgerBroken, match="the ledger's file is damaged"):
        verify(LedgerReader(ledger))


def test_damaged_views_are_told(ledger: Path) -> None:
    damage(ledger / VIEWS_NAME, "certificates_by_role")
    with pytest.raises(LedgerBroken, match=r"views\.sqlite3") as found:
        verify(LedgerReader(ledger))
    assert found.value.code == "ledger_tables_differ"


def damage(path: Path, index: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        page_size = db.execute("PRAGMA page_size").fetchone()[0]
        root = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (index,)).fetchone()[0]
    with path.open("r+b") as file:
        file.seek((root - 1) * page_size)
        file.write(b"\xff" * 64)


def test_a_changed_event_is_told_before_a_difference_earlier_in_its_piece(ledger: Path) -> None:
    change_views(ledger, "UPDATE certificates SET role = 'other' WHERE seq = 520")
    change(ledger, "UPDATE events SET actor = 'other' WHERE seq = 700")
    with pytest.raises(LedgerBroken, match="broken at event 700"):
        verify(LedgerReader(ledger))


def test_an_event_that_no_view_can_be_made_from_is_found(ledger: Path) -> None:
    entry = LedgerReader(ledger).entry(EVENTS)
    body = entry.body.replace('"serial":"', '"serial2":"')
    digest = entry_hash(entry.seq, entry.time_ms, entry.kind, entry.actor, body, entry.prev)
    change(ledger, "UPDATE events SET body = ?, hash = ? WHERE seq = ?", body, digest, EVENTS)
    change_views(ledger, "UPDATE folded SET hash = ?", digest)
    with pytest.raises(LedgerBroken, match=r"not a valid certificate\.issued event") as found:
        verify(LedgerReader(ledger))
    assert found.value.facts["seq"] == EVENTS


def test_a_process_that_the_system_ends_is_no_crash(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "gc", SimpleNamespace(disable=os.abort))  # the first thing that a process does
    with pytest.raises(Unavailable, match="the system ended a process") as found:
        verify(LedgerReader(ledger))
    assert found.value.code == "ledger_unavailable"


def test_events_that_the_views_lack_are_no_difference(ledger: Path) -> None:
    with closing(Ledger(ledger)) as writer:
        writer.commit([refused(), issued(EVENTS + 1)], 2_000_000_000_000)
    assert verify(LedgerReader(ledger)).seq == EVENTS + 2
    change_views(ledger, "INSERT INTO principals VALUES ('llmops', ?)", EVENTS + 2)
    with pytest.raises(LedgerBroken, match="view principals"):
        verify(LedgerReader(ledger))
