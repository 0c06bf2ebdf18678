"""Views are made again from events exactly, never from events that were changed; an export holds them all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from signer.errors import LedgerBroken, Unavailable
from signer.ledger.audit import export, rebuild, verify
from signer.ledger.fold import fold_all
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import VIEWS_NAME
from signer.ledger.store import Ledger
from tests.parts.events import issued
from tests.parts.full_disk import files_at_most
from tests.parts.ledgers import STORY, Opened, change_views, fill, rows_of_views


def test_rebuilding_makes_the_views_again_exactly(tmp_path: Path) -> None:
    fill(tmp_path)
    ledger = Ledger(tmp_path)
    before, head = rows_of_views(tmp_path), ledger.head()
    for sql in (
        "UPDATE certificates SET identity = 'x'",
        "DELETE FROM principals",
        "INSERT INTO withheld VALUES (99, '1')",
    ):
        change_views(tmp_path, sql)
    seen: list[int] = []
    made = {name: len(rows) for name, rows in before.items()}
    assert rebuild(ledger, lambda done, _: seen.append(done)) == (len(STORY), made)
    assert rows_of_views(tmp_path) == before
    assert verify(ledger) == head
    ledger.commit([issued(4)], 1_900_000_000_000)
    fold_all(ledger)
    assert len(rows_of_views(tmp_path)["certificates"]) == made["certificates"] + 1
    assert verify(ledger).seq == len(STORY) + 1
    ledger.close()


@pytest.mark.parametrize(
    "sql, seq",
    [
        ("UPDATE events SET actor = 'x' WHERE seq = 4", 4),
        ("INSERT INTO events SELECT 0, time, kind, actor, body, prev, hash FROM events WHERE seq = 1", 0),
    ],
)
def test_views_are_never_rebuilt_from_events_that_were_changed(tmp_path: Path, sql: str, seq: int) -> None:
    fill(tmp_path)
    reader = Opened(tmp_path)
    reader.connection().execute(sql)
    change_views(tmp_path, "DELETE FROM principals")
    reader.close()
    ledger = Ledger(tmp_path)
    before = rows_of_views(tmp_path)
    with pytest.raises(LedgerBroken) as caught:
        rebuild(ledger)
    assert caught.value.facts["seq"] == seq
    assert rows_of_views(tmp_path) == before
    ledger.close()


def test_a_rebuild_for_which_there_is_no_room_leaves_the_views_as_they_were(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.commit([issued(serial) for serial in range(1, 400)], 1_000)
    fold_all(ledger)
    before = rows_of_views(tmp_path)
    with files_at_most(20_000), pytest.raises(Unavailable):
        rebuild(ledger)
    assert rows_of_views(tmp_path) == before
    rebuild(ledger)
    assert rows_of_views(tmp_path) == before
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith(VIEWS_NAME)) == [VIEWS_NAME]  # noqa: PTH208
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
