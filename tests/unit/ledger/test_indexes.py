"""What decides is found by the partial indexes on events: `verify` finds each entry that they lack or have too many."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from signer.errors import LedgerBroken
from signer.ledger import audit
from signer.ledger.audit import verify
from signer.ledger.chain import entry_hash
from signer.ledger.fold import fold_all
from signer.ledger.indexes import known_indexes
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME
from signer.ledger.store import Ledger
from signer.model import Event
from tests.parts.events import freeze, issued, refused, thaw, withheld
from tests.parts.old_ledgers import INDEXES_BY_GROUP, add_group_indexes, make_older

ONE: dict[str, object] = {"host": "db-1"}
EVENTS = [
    Event("keeper.started", "keeper", {"ca": "SHA256:x"}),
    issued(1),
    issued(77, backend="vault"),
    issued(7, backend="vault"),
    refused(),
    withheld(1),
    freeze("all", "drill"),
    thaw("all"),
    Event("host.added", "operator", ONE),
    Event("operation.recorded", "operator", {"operation": "cutover", "evidence": "e"}),
    Event("approval.requested", "deploy-agent", {"id": "1"}),
    Event("ledger.restored", "operator", {"first_serial": 8, "last_serial": 9, "lost_head": None}),
    Event("certificates.revoked", "operator", {"by": "serial"}),
    Event("ledger.key", "keeper", {"public_key": "k"}),
    issued(10),
]
# An entry that each index of an older release has, by its event.
OLD_ENTRIES = {
    "events_of_withheld": 6,
    "events_of_freezes": 7,
    "events_of_hosts": 9,
    "events_of_operations": 10,
    "events_of_asked": 11,
    "events_of_restored": 12,
    "events_of_revocations": 13,
    "events_of_service_keys": 14,
}
# Entries of the indexes, by their events.
ENTRIES = [
    ("events_of_vault", 3),
    ("events_of_vault", 4),
    ("events_by_kind", 1),
    ("events_by_kind", 5),  # a refusal, by which nothing is decided
    *(("events_by_kind", seq) for seq in OLD_ENTRIES.values()),
]
COUNT = 256  # events; two pieces, if each has 128


@pytest.fixture(params=["whole", "pieces"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a ledger with an entry in each index, verified as a whole or in processes of their own."""
    if request.param == "pieces":
        monkeypatch.setattr(audit, "_CHUNK", COUNT)
    with closing(Ledger(tmp_path)) as ledger:
        ledger.commit([*EVENTS, *(issued(serial) for serial in range(11, 300))], 1_800_000_000_000)
        fold_all(ledger)
    return tmp_path


def change_index(folder: Path, name: str, condition: str) -> None:
    """Makes an index again with other entries, and lets the schema say that it has those of its definition."""
    with closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as db:
        (sql,) = db.execute("SELECT sql FROM sqlite_master WHERE name = ?", (name,)).fetchone()
        db.execute(f"DROP INDEX {name}")
        db.execute(f"{sql.replace('UNIQUE ', '')} {condition}")
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (sql, name))


def fault(folder: Path) -> LedgerBroken | None:
    """What verify says."""
    with closing(LedgerReader(folder)) as reader:
        try:
            verify(reader)
        except LedgerBroken as broken:
            return broken
    return None


def test_nothing_is_wrong_with_the_indexes_that_a_ledger_is_made_with(folder: Path) -> None:
    assert fault(folder) is None


@pytest.mark.parametrize("name, seq", ENTRIES)
def test_an_entry_that_an_index_lacks_is_found(folder: Path, name: str, seq: int) -> None:
    change_index(folder, name, f"AND seq <> {seq}")
    broken = fault(folder)
    assert broken is not None
    assert broken.code == "ledger_broken"
    assert name in broken.text


@pytest.mark.parametrize("name, seq", [("events_of_vault", 2), ("events_of_vault", 5), ("events_by_kind", 2)])
def test_an_entry_that_no_event_stands_behind_is_found(folder: Path, name: str, seq: int) -> None:
    change_index(folder, name, f"OR seq = {seq}")  # a local certificate, or a refusal
    broken = fault(folder)
    assert broken is not None
    assert broken.code == "ledger_broken"
    assert name in broken.text


@pytest.mark.parametrize("has_new", [False, True], ids=["older", "both"])
def test_the_indexes_that_an_older_release_left_are_compared_as_quickly(folder: Path, *, has_new: bool) -> None:
    (add_group_indexes if has_new else make_older)(folder / FILE_NAME)
    with closing(LedgerReader(folder)) as reader:
        known = known_indexes(reader)
        assert known is not None, "`check_file` evaluates no condition for each event"
        names = {index.name for index in known}
    assert names == {*INDEXES_BY_GROUP, "events_of_vault", *(["events_by_kind"] if has_new else [])}
    assert fault(folder) is None


@pytest.mark.parametrize("name", OLD_ENTRIES)
def test_an_entry_that_an_older_index_lacks_is_found(folder: Path, name: str) -> None:
    add_group_indexes(folder / FILE_NAME)
    change_index(folder, name, f"AND seq <> {OLD_ENTRIES[name]}")
    broken = fault(folder)
    assert broken is not None
    assert broken.code == "ledger_broken"
    assert name in broken.text


@pytest.mark.parametrize("name", OLD_ENTRIES)
def test_an_entry_of_an_older_index_that_no_event_stands_behind_is_found(folder: Path, name: str) -> None:
    add_group_indexes(folder / FILE_NAME)
    change_index(folder, name, f"OR seq = {2 + len(name) % 2 * 3}")  # a local certificate, or a refusal
    broken = fault(folder)
    assert broken is not None
    assert broken.code == "ledger_broken"
    assert name in broken.text


@pytest.mark.parametrize(
    "name, key, other",
    [
        ("events_of_vault", "(body ->> 'serial')", "(replace(body ->> 'serial', '77', '78'))"),
        ("events_by_kind", "(kind)", "(replace(kind, 'freeze.set', 'freeze.lifted'))"),
        ("events_by_kind", "(kind)", "(replace(kind, 'freeze.set', 'freeze.made'))"),
    ],
)
def test_an_entry_with_another_key_is_found(folder: Path, name: str, key: str, other: str) -> None:
    with closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as db:
        (sql,) = db.execute("SELECT sql FROM sqlite_master WHERE name = ?", (name,)).fetchone()
        db.execute(f"DROP INDEX {name}")
        assert key in sql
        db.execute(sql.replace(key, other))
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (sql, name))
    broken = fault(folder)
    assert broken is not None
    assert name in broken.text


def test_an_index_that_another_program_added_is_compared_too(folder: Path) -> None:
    with closing(sqlite3.connect(folder / FILE_NAME)) as db:
        db.execute("CREATE INDEX other ON events (actor) WHERE kind = 'freeze.set'")
    assert fault(folder) is None
    change_index(folder, "other", "AND seq <> 7")
    broken = fault(folder)
    assert broken is not None
    assert broken.code == "ledger_broken"
    assert "other" in broken.text


def test_an_index_with_another_definition_is_compared_by_that(folder: Path) -> None:
    with closing(sqlite3.connect(folder / FILE_NAME)) as db:
        db.execute("DROP INDEX events_by_kind")
        db.execute("CREATE INDEX events_by_kind ON events (kind) WHERE kind = 'freeze.set'")
        db.execute("CREATE INDEX events_of_freezes ON events (seq) WHERE kind = 'freeze.set'")
    assert fault(folder) is None


def test_an_index_that_is_missing_is_no_fault(folder: Path) -> None:
    with closing(sqlite3.connect(folder / FILE_NAME)) as db:
        db.execute("DROP INDEX events_by_kind")
    assert fault(folder) is None


@pytest.mark.parametrize("is_folded", [True, False])
def test_a_body_that_is_not_json_is_found_though_its_hash_is_right(folder: Path, is_folded: bool) -> None:
    if not is_folded:
        (folder / "views.sqlite3").unlink()
    last = ("certificate.issued", "x", '{"backend":"local",')
    with closing(sqlite3.connect(folder / FILE_NAME)) as db, db:
        (sql,) = db.execute("SELECT sql FROM sqlite_master WHERE name = 'events_of_vault'").fetchone()
        db.execute("DROP INDEX events_of_vault")
        seq, time_ms, prev = db.execute("SELECT seq + 1, time, hash FROM events ORDER BY seq DESC LIMIT 1").fetchone()
        row = (seq, time_ms, *last, prev)
        db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", (*row, entry_hash(*row)))
        db.execute(sql.replace("WHERE ", f"WHERE seq < {seq} AND "))
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'events_of_vault'", (sql,))
    broken = fault(folder)
    assert broken is not None
    assert (broken.code, broken.facts) == ("ledger_broken", {"seq": seq})
    assert "its body is not JSON" in broken.text
