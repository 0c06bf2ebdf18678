"""A ledger of version 1 becomes one of version 2 by its first keeper: no event is lost, changed or read wrongly."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from signer.errors import LedgerBroken, Unavailable
from signer.ledger import schema
from signer.ledger.audit import check_recent, export, verify
from signer.ledger.fold import fold_all
from signer.ledger.pages import CertificateReader
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME, VIEWS_NAME
from signer.ledger.store import Ledger
from signer.model import Event, Filter
from tests.parts.events import freeze, issued, refused, thaw, withheld
from tests.parts.full_disk import files_at_most
from tests.parts.ledgers import rows_of_views
from tests.parts.old_ledgers import TABLES, write_version_1

OPERATION: dict[str, object] = {"operation": "cutover", "outcome": "applied", "plan": "", "evidence": "", "reason": ""}
EVENTS = [
    Event("keeper.started", "keeper", {"version": "0.1.0"}),
    issued(1),
    refused(),
    issued(2, identity="operator", principals=["rootß\\"]),
    withheld(2),
    issued(2, backend="vault"),
    freeze("role:llmops"),
    thaw("role:llmops"),
    freeze("all", "drill"),
    Event("operation.recorded", "operator", OPERATION),
    issued(3),
]


@pytest.fixture(params=[True, False], ids=["newest", "first release"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Of a ledger of version 1."""
    write_version_1(tmp_path, EVENTS, with_later_indexes=request.param)
    return tmp_path


def old_tables(folder: Path) -> dict[str, list[tuple[object, ...]]]:
    with closing(sqlite3.connect(folder / FILE_NAME)) as db:
        return {name: db.execute(f"SELECT * FROM {name}").fetchall() for name in TABLES}  # noqa: S608


def version(folder: Path) -> int:
    with closing(sqlite3.connect(folder / FILE_NAME)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def test_a_migration_keeps_every_event_and_every_decision(folder: Path) -> None:
    with closing(LedgerReader(folder)) as reader:
        before, tables = list(export(reader)), old_tables(folder)
    with closing(Ledger(folder)) as ledger:
        assert check_recent(ledger).seq == len(EVENTS)
        assert list(export(ledger)) == before
        assert ledger.last_serial() == 3
        assert {scope: freeze.reason for scope, freeze in ledger.freezes().items()} == {"all": "drill"}
        assert [ledger.has_vault_serial(serial) for serial in (1, 2, 3)] == [False, True, False]
        assert [row.identity for row in ledger.recent(1_800_000_000)] == ["deploy-agent"] * 3
        assert len(ledger.operations(None, None, 9)) == 1
        (entry,) = ledger.commit([issued(4)], 1_800_000_001_000)
        assert (entry.seq, entry.prev) == (len(EVENTS) + 1, before[-1].hash)
        fold_all(ledger)
        assert verify(ledger).seq == len(EVENTS) + 1
    assert version(folder) == 2
    assert old_tables(folder) == tables, "the old tables stay as they were"
    with closing(CertificateReader(folder)) as pages:
        assert [(row.serial, row.backend, row.withheld) for row in pages.certificates(Filter())] == [
            (4, "local", False), (3, "local", False), (2, "vault", False), (2, "local", True), (1, "local", False),
        ]  # fmt: skip


def test_the_views_say_what_the_tables_of_version_1_said(folder: Path) -> None:
    tables = old_tables(folder)
    with closing(Ledger(folder)) as ledger:
        fold_all(ledger)
    views = rows_of_views(folder)
    assert views["certificates"] == [row[:-1] for row in tables["certificates"]]
    assert views["principals"] == tables["principals"]
    held = {serial for _, serial in views["withheld"]}
    assert held == {row[1] for row in tables["certificates"] if row[-1]}


def test_an_old_ledger_is_read_and_verified_before_any_keeper_has_opened_it(folder: Path) -> None:
    content = (folder / FILE_NAME).read_bytes()
    with closing(CertificateReader(folder)) as reader:
        assert verify(reader).seq == len(EVENTS)
        assert [row.serial for row in reader.certificates(Filter(backend="local"))] == [3, 2, 1]
        assert len(reader.operations(None, None, 9)) == 1
    assert (folder / FILE_NAME).read_bytes() == content
    assert not (folder / VIEWS_NAME).exists()


def test_an_older_program_says_that_a_newer_one_wrote_the_ledger(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger(folder).close()  # opens nothing yet
    assert version(folder) == 1
    with closing(Ledger(folder)) as ledger:
        ledger.head()
    monkeypatch.setattr(schema, "ARCHIVED_VERSION", 1)
    with pytest.raises(LedgerBroken) as caught:
        LedgerReader(folder).head()
    assert caught.value.code == "ledger_version_newer"
    assert "version 2" in caught.value.text
    assert "newer version" in caught.value.hint


def test_a_migration_for_which_there_is_no_room_changes_nothing_and_is_tried_again(folder: Path) -> None:
    with closing(Ledger(folder)) as ledger:
        with files_at_most(2_000), pytest.raises(Unavailable):
            ledger.head()
        assert version(folder) == 1
        assert ledger.head().seq == len(EVENTS)
        assert verify(ledger).seq == len(EVENTS)
    assert version(folder) == 2


def test_an_old_ledger_whose_event_was_changed_does_not_start(tmp_path: Path) -> None:
    write_version_1(tmp_path, EVENTS)
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as db, db:
        db.execute("DROP TRIGGER events_are_never_changed")
        db.execute("UPDATE events SET actor = 'mallory' WHERE seq = 9")
    with closing(Ledger(tmp_path)) as ledger, pytest.raises(LedgerBroken) as caught:
        check_recent(ledger)
    assert caught.value.facts["seq"] == 9
