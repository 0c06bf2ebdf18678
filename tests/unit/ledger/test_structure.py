"""A ledger whose tables another program changed, and events that the file's own constraints forbid."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from signer.errors import LedgerBroken
from signer.ledger.audit import check_recent, verify
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME
from signer.ledger.store import Ledger
from signer.model import Event
from tests.parts.command import issued
from tests.parts.old_ledgers import write_version_1

NOW = 1_750_000_000_000
CHANGES = {
    "DROP TRIGGER events_are_never_removed": "trigger events_are_never_removed is missing",
    "ALTER TABLE events ADD COLUMN note TEXT": "column events.note is not one of signer's",
    "CREATE TRIGGER more AFTER INSERT ON events BEGIN SELECT 1; END": "trigger more is not one of signer's",
    "DROP TRIGGER events_are_never_changed; CREATE TRIGGER events_are_never_changed BEFORE UPDATE ON events"
    " BEGIN SELECT 1; END": "trigger events_are_never_changed is another one",
    "DROP TABLE probe": "column probe.id is missing, column probe.time is missing",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with closing(Ledger(tmp_path)) as ledger:
        ledger.commit([Event("note", "x", {})], NOW)
    return tmp_path


@pytest.mark.parametrize("statement", CHANGES)
def test_audit_another_structure_is_noticed_at_a_start_and_by_verify(folder: Path, statement: str) -> None:
    with closing(LedgerReader(folder)) as reader:
        check_recent(reader)
        verify(reader)
    with closing(sqlite3.connect(folder / FILE_NAME)) as db:
        db.executescript(statement)
    for look in (check_recent, verify):
        with closing(LedgerReader(folder)) as reader, pytest.raises(LedgerBroken) as caught:
            look(reader)
        assert caught.value.code == "ledger_structure_differs"
        assert CHANGES[statement] in caught.value.text


def test_a_ledger_of_version_1_has_the_same_structure_before_and_after_its_migration(tmp_path: Path) -> None:
    write_version_1(tmp_path, [Event("note", "x", {})])
    with closing(LedgerReader(tmp_path)) as reader:
        check_recent(reader)
    with closing(Ledger(tmp_path)) as ledger:
        check_recent(ledger)


def test_audit_a_column_that_was_added_meanwhile_is_no_shortage_of_space(folder: Path) -> None:
    with closing(Ledger(folder)) as ledger:
        ledger.head()
        with closing(sqlite3.connect(folder / FILE_NAME)) as db:
            db.execute("ALTER TABLE events ADD COLUMN note TEXT")
        with pytest.raises(LedgerBroken, match="events has 8 columns"):
            ledger.commit([Event("note", "x", {})], NOW)


def test_audit_an_event_that_a_constraint_forbids_is_not_a_damaged_disk(folder: Path) -> None:
    """Two certificates of Vault's with one serial: the index refuses the second, and the ledger goes on."""
    with closing(Ledger(folder)) as ledger:
        ledger.commit([issued(7, backend="vault")], NOW)
        with pytest.raises(sqlite3.IntegrityError):
            ledger.commit([issued(7, backend="vault")], NOW)
        assert ledger.commit([Event("note", "x", {})], NOW)[0].seq == 3


def test_audit_8_the_last_ca_key_is_found_behind_those_of_vault(folder: Path) -> None:
    def last(*events: Event) -> str | None:
        with closing(Ledger(folder)) as ledger:
            ledger.commit(list(events), NOW)
            return ledger.last_ca()

    assert last(Event("keeper.started", "keeper", {"ca": "vault", "mode": "vault"})) is None
    assert last(Event("keeper.started", "keeper", {"ca": "SHA256:a", "mode": "local"})) == "SHA256:a"
    assert last(issued(1, ca="SHA256:v", backend="vault")) == "SHA256:a"
    assert last(issued(1, ca="SHA256:b")) == "SHA256:b"
    assert last(Event("ca.rotated", "keeper", {"from": "SHA256:b", "to": "SHA256:c"})) == "SHA256:c"
    shadow: dict[str, object] = {"ca": "vault", "compared_with": "SHA256:d", "mode": "shadow"}
    assert last(Event("keeper.started", "keeper", shadow)) == "SHA256:d"
    assert last(Event("note", "x", {})) == "SHA256:d"
