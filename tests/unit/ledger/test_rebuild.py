"""Tables are made again from events exactly, never from events that were changed; an export holds them all."""

# ruff: noqa: S608 - tables and columns are named by the test itself

from __future__ import annotations

from pathlib import Path

import pytest

from signer.errors import LedgerBroken, Unavailable
from signer.ledger.audit import export, rebuild, verify
from signer.ledger.reader import LedgerReader
from signer.ledger.store import DERIVED, Ledger
from tests.parts.events import issued
from tests.parts.ledgers import STORY, Opened, fill


def tables_of(reader: LedgerReader) -> dict[str, list[tuple[object, ...]]]:
    return {table: sorted(reader.query(f"SELECT * FROM {table}")) for table in DERIVED}


def test_rebuilding_makes_the_tables_again_exactly(tmp_path: Path) -> None:
    fill(tmp_path)
    ledger = Ledger(tmp_path)
    before, head = tables_of(ledger), ledger.head()
    for sql in (
        "UPDATE certificates SET identity = 'x', withheld = 1",
        "DELETE FROM principals",
        "INSERT INTO freezes VALUES ('identity:x', 99, 'x', 'y')",
    ):
        ledger.connection().execute(sql)
    seen: list[int] = []
    assert rebuild(ledger, lambda done, _: seen.append(done)) == len(STORY)
    assert tables_of(ledger) == before
    assert verify(ledger) == head
    ledger.commit([issued(4)], 1_900_000_000_000)
    assert verify(ledger).seq == len(STORY) + 1
    ledger.close()


def test_tables_are_never_rebuilt_from_events_that_were_changed(tmp_path: Path) -> None:
    fill(tmp_path)
    reader = Opened(tmp_path)
    reader.connection().execute("UPDATE events SET actor = 'x' WHERE seq = 4")
    reader.connection().execute("DELETE FROM principals")
    reader.close()
    ledger = Ledger(tmp_path)
    before = tables_of(ledger)
    with pytest.raises(LedgerBroken) as caught:
        rebuild(ledger)
    assert caught.value.facts["seq"] == 4
    assert tables_of(ledger) == before
    assert not ledger.connection().in_transaction
    ledger.close()


def test_a_rebuild_for_which_there_is_no_room_leaves_the_tables_as_they_were(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.commit([issued(serial) for serial in range(1, 400)], 1_000)
    for table in DERIVED:
        ledger.connection().execute(f"DELETE FROM {table}")
    ledger.connection().execute("VACUUM")
    before = tables_of(ledger)
    pages = ledger.connection().execute("PRAGMA page_count").fetchone()[0]
    ledger.connection().execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(Unavailable):
        rebuild(ledger)
    assert not ledger.connection().in_transaction
    assert tables_of(ledger) == before
    ledger.close()


def test_an_export_holds_every_entry_in_order(tmp_path: Path) -> None:
    fill(tmp_path)
    reader = LedgerReader(tmp_path)
    entries = list(export(reader))
    assert [entry.seq for entry in entries] == list(range(1, len(STORY) + 1))
    assert [entry.kind for entry in entries] == [event.kind for event in STORY]
    reader.close()


def test_verifying_tells_how_far_it_is(tmp_path: Path) -> None:
    fill(tmp_path)
    reader = LedgerReader(tmp_path)
    seen: list[tuple[int, int]] = []
    verify(reader, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(STORY), len(STORY))
    reader.close()
