"""Ledgers as older releases left them.

Version 1 had the views as tables beside the events, and each commit wrote them. Version 2 had an index on events for
each group of kinds that decides, until one index by kind took their place.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from signer.ledger.chain import GENESIS, chain
from signer.ledger.schema import FILE_NAME
from signer.ledger.store import LOCK_NAME
from signer.model import Entry, Event, Head

SCHEMA = """
PRAGMA application_id = 1399279218;
PRAGMA user_version = 1;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY, time INTEGER NOT NULL, kind TEXT NOT NULL, actor TEXT NOT NULL,
    body TEXT NOT NULL, prev TEXT NOT NULL, hash TEXT NOT NULL
) STRICT;
CREATE TRIGGER events_are_never_changed BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER events_are_never_removed BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER events_are_never_replaced BEFORE INSERT ON events WHEN NEW.seq <= (SELECT max(seq) FROM events)
    BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE INDEX events_of_freezes ON events (seq) WHERE kind IN ('freeze.set', 'freeze.lifted');
CREATE TABLE certificates (
    seq INTEGER PRIMARY KEY, serial TEXT NOT NULL, backend TEXT NOT NULL, identity TEXT NOT NULL, role TEXT NOT NULL,
    principals TEXT NOT NULL, fingerprint TEXT NOT NULL, key_id TEXT NOT NULL,
    valid_after INTEGER NOT NULL, valid_before INTEGER NOT NULL, withheld INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX certificates_by_serial ON certificates (serial, backend);
CREATE INDEX certificates_by_identity ON certificates (identity);
CREATE INDEX certificates_by_role ON certificates (role);
CREATE INDEX certificates_by_fingerprint ON certificates (fingerprint);
CREATE INDEX certificates_by_end ON certificates (valid_before);
CREATE TABLE principals (
    principal TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (principal, seq)
) STRICT, WITHOUT ROWID;
CREATE TABLE freezes (scope TEXT PRIMARY KEY, seq INTEGER NOT NULL, actor TEXT NOT NULL, reason TEXT NOT NULL) STRICT;
CREATE TABLE probe (id INTEGER PRIMARY KEY CHECK (id = 1), time INTEGER NOT NULL) STRICT;
"""
LATER_INDEXES = """
CREATE INDEX events_of_operations ON events (seq) WHERE kind = 'operation.recorded';
CREATE INDEX certificates_of_vault ON certificates (seq) WHERE backend = 'vault';
"""  # the first release of version 1 had none of them
TABLES = ("certificates", "principals", "freezes")
# The indexes on events of version 2 before `events_by_kind`, in that release's own words.
INDEXES_BY_GROUP = {
    "events_of_freezes": "CREATE INDEX events_of_freezes ON events (seq) WHERE kind IN ('freeze.set', 'freeze.lifted')",
    "events_of_hosts": "CREATE INDEX events_of_hosts ON events (seq) WHERE kind IN ('host.added', 'host.removed')",
    "events_of_operations": "CREATE INDEX events_of_operations ON events (seq) WHERE kind = 'operation.recorded'",
    "events_of_withheld": "CREATE INDEX events_of_withheld ON events (seq) WHERE kind = 'certificate.withheld'",
    "events_of_asked": "CREATE INDEX events_of_asked ON events (seq)"
    " WHERE ((kind < 'b' OR kind > 'incident') AND (kind < 'incident/' OR kind > 'waiver'))",
    "events_of_restored": "CREATE INDEX events_of_restored ON events (seq) WHERE kind = 'ledger.restored'",
    "events_of_archived": "CREATE INDEX events_of_archived ON events (seq) WHERE kind = 'ledger.archived'",
    "events_of_revocations": "CREATE INDEX events_of_revocations ON events (seq) WHERE kind IN"
    " ('ca.rotated', 'certificates.revoked', 'keeper.started', 'ledger.restored', 'list.published')",
    "events_of_service_keys": "CREATE INDEX events_of_service_keys ON events (seq)"
    " WHERE kind IN ('ledger.key', 'publishing.key')",
}


def write_version_1(
    folder: Path, events: Sequence[Event], time_ms: int = 1_800_000_000_000, *, with_later_indexes: bool = True
) -> None:
    """Writes `events`, one a millisecond, and the rows of the tables; takes the folder as a keeper did."""
    (folder / LOCK_NAME).write_bytes(b"a ledger was begun here\n")
    (folder / LOCK_NAME).chmod(0o600)
    head = Head(0, GENESIS, 0)
    with closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(f"BEGIN EXCLUSIVE;{SCHEMA}{LATER_INDEXES if with_later_indexes else ''}COMMIT;")
        for number, event in enumerate(events):
            (entry,) = chain([event], head, time_ms + number)
            head = Head(entry.seq, entry.hash, entry.time_ms)
            db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", _columns(entry))
            _add_rows(db, entry, json.loads(entry.body))


def add_group_indexes(file: Path) -> None:
    """Gives a ledger's file the indexes that an older release makes when it opens it; those of today stay."""
    with closing(sqlite3.connect(file)) as db, db:
        for statement in INDEXES_BY_GROUP.values():
            db.execute(statement)


def make_older(file: Path) -> None:
    """Makes a ledger's file one that only a release before `events_by_kind` wrote."""
    add_group_indexes(file)
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("DROP INDEX events_by_kind")


def event_indexes(file: Path) -> set[str]:
    """The names of the indexes on events."""
    with closing(sqlite3.connect(file)) as db:
        found = db.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND tbl_name = 'events'")
        return {name for (name,) in found}


def _columns(entry: Entry) -> tuple[object, ...]:
    return (entry.seq, entry.time_ms, entry.kind, entry.actor, entry.body, entry.prev, entry.hash)


def _add_rows(db: sqlite3.Connection, entry: Entry, body: dict[str, Any]) -> None:
    match entry.kind:
        case "certificate.issued":
            principals = json.dumps(body["principals"], separators=(",", ":"), ensure_ascii=False)
            first = (entry.seq, body["serial"], body["backend"], body["identity"], body["role"], principals)
            last = (body["fingerprint"], body["key_id"], body["valid_after"], body["valid_before"])
            db.execute("INSERT INTO certificates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0)", (*first, *last))
            for principal in body["principals"]:
                db.execute("INSERT INTO principals VALUES (?, ?)", (principal, entry.seq))
        case "certificate.withheld":
            change = "UPDATE certificates SET withheld = 1 WHERE serial = ? AND backend = 'local'"
            db.execute(change, (body["serial"],))
        case "freeze.set":
            row = (body["scope"], entry.seq, entry.actor, body["reason"])
            db.execute("INSERT OR REPLACE INTO freezes VALUES (?, ?, ?, ?)", row)
        case "freeze.lifted":
            db.execute("DELETE FROM freezes WHERE scope = ?", (body["scope"],))
