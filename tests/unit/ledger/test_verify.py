"""The past cannot be edited unseen: every single change to a row, a table or the file is found, and its place told."""

# ruff: noqa: S608 - tables and columns are named by the test itself

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from signer.errors import LedgerBroken, SignerError
from signer.ledger.audit import check_recent, export, verify
from signer.ledger.chain import GENESIS, chain, entry_hash
from signer.ledger.fold import delete_views
from signer.ledger.pages import CertificateReader
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME, VIEWS, VIEWS_NAME
from signer.ledger.store import Ledger
from signer.model import Event, Filter, Head
from tests.parts.events import issued, refused
from tests.parts.ledgers import STORY, Opened, change_views, fill, rows_of_views


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    fill(tmp_path)
    reader = Opened(tmp_path)
    yield reader
    reader.close()


def finds(reader: LedgerReader, sql: str, *values: object) -> LedgerBroken | None:
    """What verify says after a change that is then taken back; None if it sees nothing. Asserts that start agrees."""
    db = reader.connection()
    db.execute("BEGIN")
    try:
        done = db.execute(sql, values)
        assert done.rowcount != 0, f"the change changed nothing: {sql}"
        found: list[LedgerBroken | None] = []
        for check in (verify, check_recent):
            try:
                check(reader)
                found.append(None)
            except LedgerBroken as broken:
                found.append(broken)
        assert (found[0] is None) == (found[1] is None), f"verify says {found[0]}, the start says {found[1]}"
        return found[0]
    finally:
        db.execute("ROLLBACK")


def changed(value: Any, rng: random.Random) -> Iterator[Any]:
    """Values that differ from `value` in one byte; for a number, in one step or one bit."""
    if isinstance(value, int):
        yield from {value + 1, value - 1, value ^ (1 << rng.randrange(40))}
        return
    raw = value.encode()
    for at in range(len(raw)):
        other = bytearray(raw)
        other[at] = rng.choice([byte for byte in range(32, 127) if byte != raw[at]])
        yield other.decode(errors="replace")


def test_every_changed_byte_of_every_column_of_every_event_is_found(opened: Opened) -> None:
    rng = random.Random(1)
    tried = 0
    for row in opened.query("SELECT seq, time, kind, actor, body, prev, hash FROM events"):
        for column, value in zip(("seq", "time", "kind", "actor", "body", "prev", "hash"), row, strict=True):
            for other in changed(value, rng):
                if column == "seq" and 0 < other <= len(STORY):
                    continue  # another row has that number: the database itself refuses
                broken = finds(opened, f"UPDATE events SET {column} = ? WHERE seq = ?", other, row[0])
                assert broken is not None, f"event {row[0]}, {column}: {other!r} was not noticed"
                if column not in ("seq", "hash"):
                    assert broken.facts["seq"] == row[0]
                tried += 1
    assert tried > 3_000


def finds_in_views(folder: Path, sql: str, *values: object) -> LedgerBroken | None:
    """What verify says after a change to the views that is then taken back. Asserts that a start does not care."""
    views = folder / VIEWS_NAME
    before = views.read_bytes()
    assert change_views(folder, sql, *values) != 0, f"the change changed nothing: {sql}"
    reader = LedgerReader(folder)
    try:
        check_recent(reader)
        verify(reader)
    except LedgerBroken as broken:
        return broken
    finally:
        reader.close()
        delete_views(views)
        views.write_bytes(before)
    return None


def test_every_changed_byte_of_every_row_of_the_views_is_found(tmp_path: Path) -> None:
    fill(tmp_path)
    rng = random.Random(2)
    tried = 0
    for view in VIEWS:
        columns = [column.split()[0] for column in view.columns]
        where = " AND ".join(f"{column} IS ?" for column in columns)
        for row in rows_of_views(tmp_path)[view.name]:
            for column, value in zip(columns, row, strict=True):
                for other in rng.sample(list(changed(value, rng)), k=min(12, len(list(changed(value, rng))))):
                    try:
                        broken = finds_in_views(
                            tmp_path, f"UPDATE {view.name} SET {column} = ? WHERE {where}", other, *row
                        )
                    except sqlite3.IntegrityError:
                        continue  # another row has that key: the database itself refuses
                    assert broken is not None, f"{view.name}: {row}, {column}: {other!r} was not noticed"
                    assert broken.code == "ledger_tables_differ"
                    tried += 1
    assert tried > 200


def test_every_removed_event_is_found(opened: Opened) -> None:
    for seq in range(1, len(STORY)):  # a cut-off tail needs a saved head, below
        assert finds(opened, "DELETE FROM events WHERE seq = ?", seq) is not None, seq


def test_every_removed_row_of_the_views_is_found(tmp_path: Path) -> None:
    fill(tmp_path)
    for view in VIEWS:
        where = " AND ".join(f"{column.split()[0]} IS ?" for column in view.columns)
        for row in rows_of_views(tmp_path)[view.name]:
            assert finds_in_views(tmp_path, f"DELETE FROM {view.name} WHERE {where}", *row) is not None, row


@pytest.mark.parametrize(
    "table,row",
    [
        ("certificates", (3, "9", "local", "x", "r", '["p"]', "f", "k", 1, 2)),
        ("certificates", (99, "9", "local", "x", "r", '["p"]', "f", "k", 1, 2)),
        ("certificates", (99, "9", "vault", "x", "r", "[]", "f", "k", 1, 2)),
        ("principals", ("root", 2)),
        ("principals", ("root", 99)),
        ("withheld", (2, "1")),
        ("withheld", (99, "3")),
    ],
)
def test_an_added_row_of_the_views_is_found(tmp_path: Path, table: str, row: tuple[object, ...]) -> None:
    fill(tmp_path)
    marks = ", ".join("?" * len(row))
    assert finds_in_views(tmp_path, f"INSERT INTO {table} VALUES ({marks})", *row) is not None


def test_an_inserted_event_is_found_wherever_it_is_put(opened: Opened) -> None:
    rows = opened.query("SELECT seq, time, kind, actor, body, prev, hash FROM events")
    db = opened.connection()
    for at in range(1, len(rows) + 1):
        db.execute("BEGIN")
        db.execute("UPDATE events SET seq = -seq - 1 WHERE seq >= ?", (at,))
        db.execute("UPDATE events SET seq = -seq WHERE seq < 0")
        planted = rows[at - 1]
        db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", (at, *planted[1:]))
        with pytest.raises(LedgerBroken):
            verify(opened)
        db.execute("ROLLBACK")


@pytest.mark.parametrize("seq", [0, -5])
def test_an_event_before_the_first_one_is_found(opened: Opened, seq: int) -> None:
    """Its hash is right, and no event names it as the one before: only its number tells."""
    thawed = (seq, 1_800_000_000_000, "freeze.lifted", "operator", '{"scope":"all"}', GENESIS)
    opened.connection().execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", (*thawed, entry_hash(*thawed)))
    opened.put_back()
    for check in (verify, check_recent):
        with pytest.raises(LedgerBroken, match=f"broken at event {seq}: events are numbered from 1") as caught:
            check(opened)
        assert caught.value.facts["seq"] == seq


def test_two_swapped_events_are_found(opened: Opened) -> None:
    db = opened.connection()
    for one in range(1, len(STORY)):
        for other in range(one + 1, len(STORY) + 1):
            db.execute("BEGIN")
            for change in ((-1, one), (one, other), (other, -1)):
                db.execute("UPDATE events SET seq = ? WHERE seq = ?", change)
            with pytest.raises(LedgerBroken):
                verify(opened)
            db.execute("ROLLBACK")


def test_an_event_rewritten_with_a_good_hash_breaks_the_link_of_the_next(opened: Opened) -> None:
    entry = opened.entry(3)
    (forged,) = chain([Event("request.refused", "somebody", {})], Head(2, entry.prev, 0), entry.time_ms)
    broken = finds(
        opened, "UPDATE events SET actor = ?, body = ?, hash = ? WHERE seq = 3", forged.actor, forged.body, forged.hash
    )
    assert broken is not None
    assert broken.facts["seq"] == 4


def test_a_cut_off_tail_is_found_with_a_saved_head(tmp_path: Path) -> None:
    events = [*STORY, refused(), refused("another")]  # no table tells that these are gone
    saved = fill(tmp_path, events)
    reader = Opened(tmp_path)
    reader.connection().execute("DELETE FROM events WHERE seq = ?", (len(events),))
    reader.put_back()
    assert verify(reader).seq == len(events) - 1
    with pytest.raises(LedgerBroken, match=f"saved head has event {len(events)}") as caught:
        verify(reader, saved=saved)
    assert caught.value.facts["seq"] == len(events)
    reader.close()


def test_another_ledger_is_told_by_a_saved_head(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    saved = fill(tmp_path / "one", [refused(), refused()])
    fill(tmp_path / "two", [refused("other"), refused(), refused()])
    reader = LedgerReader(tmp_path / "two")
    with pytest.raises(LedgerBroken, match="it differs from the saved head"):
        verify(reader, saved=saved)
    assert verify(reader, saved=reader.head()).seq == 3
    assert verify(reader, saved=Head(0, "0" * 64, 0)).seq == 3
    reader.close()


@pytest.mark.parametrize("name", [FILE_NAME, VIEWS_NAME])
def test_flipped_bytes_of_a_file_are_found_or_change_nothing_that_is_read(tmp_path: Path, name: str) -> None:
    """Bytes of free space and of SQLite's own bookkeeping may change without a meaning; what is read may not."""
    fill(tmp_path)
    expected = what_is_read(tmp_path)
    files = {known: (tmp_path / known).read_bytes() for known in (FILE_NAME, VIEWS_NAME)}
    rng = random.Random(3)
    found = 0
    for number in range(300):
        other = bytearray(files[name])
        other[rng.randrange(len(other))] ^= 1 << rng.randrange(8)
        folder = tmp_path / str(number)
        folder.mkdir()
        for known, content in files.items():
            (folder / known).write_bytes(other if known == name else content)
        reader = LedgerReader(folder)
        try:
            verify(reader)
        except SignerError:
            found += 1
        else:
            assert what_is_read(folder) == expected
        finally:
            reader.close()
        shutil.rmtree(folder)
    assert found > 10


def what_is_read(folder: Path) -> list[object]:
    """Everything, by way of every index."""
    reader = CertificateReader(folder)
    found: list[object] = [list(export(reader)), reader.freezes(), reader.last_serial(), reader.recent(0)]
    pages = (
        Filter(),
        Filter(identity="deploy-agent"),
        Filter(role="llmops"),
        Filter(principal="llmops"),
        Filter(fingerprint="SHA256:" + "A" * 43),
        Filter(active_at=1_800_000_001),
        Filter(backend="vault"),
    )
    found += [reader.certificates(wanted) for wanted in pages]
    found += [reader.certificate(serial) for serial in range(5)]
    reader.close()
    return found


# --- at the start ---------------------------------------------------------------------------------------------------


def test_a_start_checks_the_newest_events_and_refuses_with_the_place(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.commit([issued(serial) for serial in range(1, 1_601)], 1_000)
    assert check_recent(ledger).seq == 1_600
    ledger.close()
    reader = Opened(tmp_path)
    for seq in (601, 1_000, 1_600):
        broken = finds_at_start(reader, seq)
        assert broken is not None
        assert broken.facts["seq"] == seq
        assert str(seq) in str(broken)
    older = finds_at_start(reader, 599)  # `verify` is for what is older; the triggers are away
    assert older is not None
    assert older.code == "ledger_structure_differs"
    reader.close()


def finds_at_start(reader: LedgerReader, seq: int) -> LedgerBroken | None:
    db = reader.connection()
    db.execute("BEGIN")
    try:
        db.execute("UPDATE events SET actor = 'somebody' WHERE seq = ?", (seq,))
        check_recent(reader)
    except LedgerBroken as broken:
        return broken
    finally:
        db.execute("ROLLBACK")
    return None


def test_an_empty_ledger_passes_every_check(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert check_recent(ledger).seq == 0
    assert verify(ledger).seq == 0
    ledger.close()


def test_a_view_with_rows_beside_an_empty_chain_is_found(tmp_path: Path) -> None:
    fill(tmp_path, [])
    assert finds_in_views(tmp_path, "INSERT INTO withheld VALUES (1, '1')") is not None
