"""The durable, hash-chained record: SQLite in WAL mode, one fsynced transaction a batch.

Table `events` is the truth; the other tables are found faster and can be rebuilt from it (`ledger/audit.py`). One
process writes, held to it by a lock; whoever may read the file reads it with `ledger_reader.py`, also while it grows.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from signer.errors import LedgerBroken, Unavailable
from signer.files import lock, open_or_create
from signer.ledger.chain import chain, derived_rows
from signer.ledger.reader import APPLICATION_ID, VERSION, LedgerReader, storage_errors
from signer.model import Entry, Event, Head

LOCK_NAME: Final = "ledger.lock"
CHECKED_AT_START: Final = 1_000  # events

_SCHEMA: Final = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
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
"""  # noqa: S608 - two numbers of ours
# Made at each opening where they are missing: ledgers of the first version did not have them, and need no other.
_LATER_INDEXES: Final = (
    "CREATE INDEX IF NOT EXISTS events_of_operations ON events (seq) WHERE kind = 'operation.recorded'",
    "CREATE INDEX IF NOT EXISTS certificates_of_vault ON certificates (seq) WHERE backend = 'vault'",
)
DERIVED: Final = ("certificates", "principals", "freezes")


class Ledger(LedgerReader):
    """The only write handle. Opening takes the lock and checks the newest events and the tables against them."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        self._lock = _take_lock(data_dir)
        self._head: Head | None = None
        self._known: Head | None = None  # as `_head`, but outlives a failure: a file without it is not our ledger
        self._place: tuple[int, ...] = ()

    def close(self) -> None:
        """Ends the connection and gives the lock back."""
        super().close()
        os.close(self._lock)

    def connection(self) -> sqlite3.Connection:
        """The open connection; makes the ledger if there never was one, and trusts no head it has not just read."""
        if self._db is None:
            new = not self._path.exists()
            if new and os.fstat(self._lock).st_size > 0:
                raise Unavailable(
                    "ledger_missing",
                    "the ledger is gone from SIGNER_DATA_DIR",
                    f"put it back; who wants a new one, whose serials begin again, removes {LOCK_NAME}, too",
                )
            db = self._connect(f"file:{self._path}?mode=rw{'c' if new else ''}")
            try:
                with storage_errors():
                    self._open(db)
            except Exception:
                db.close()
                raise
            self._db = db
            self._head = None
        return self._db

    def _open(self, db: sqlite3.Connection) -> None:
        """Makes the tables of a new ledger; raises `LedgerBroken` if an old one is not the one that was open before."""
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        if db.execute("PRAGMA user_version").fetchone()[0] == 0 and self._known is None:
            db.executescript("BEGIN EXCLUSIVE;" + _SCHEMA + "COMMIT;")
        for statement in _LATER_INDEXES:
            db.execute(statement)
        known, own = self._known, "SELECT 1 FROM events WHERE seq = ? AND hash = ?"
        if known is not None and db.execute(own, (known.seq, known.hash)).fetchone() is None:
            raise LedgerBroken(
                "ledger_replaced",
                f"the ledger in SIGNER_DATA_DIR lacks event {known.seq}, which this keeper wrote",
                "put the right one back; or stop the keeper, and `signer ledger verify` this one",
            )
        os.pwrite(self._lock, b"a ledger was begun here\n", 0)
        self._place = self._look()

    def _look(self) -> tuple[int, ...]:
        """Which files the ledger's names stand for now."""
        ledger, log = self._path.stat(), os.stat(f"{self._path}-wal")  # noqa: PTH116 - at each commit
        return ledger.st_dev, ledger.st_ino, log.st_dev, log.st_ino

    def _check_place(self) -> None:
        """After a write: raises `OSError` if it went into a file that nobody will find under the ledger's name."""
        if self._look() != self._place:
            raise OSError(errno.ESTALE, "its file was moved or replaced")

    def commit(self, events: Sequence[Event], now_ms: int) -> list[Entry]:
        """Appends all events in one fsynced transaction, or none; raises `Unavailable` or `LedgerBroken`.

        An event that no ledger can hold is a fault of the caller's and raises as Python does. An entry's time never
        runs backwards: it is the previous entry's if the clock was set back.
        """
        try:
            head = self._head or self.head()
            entries = list(chain(events, head, now_ms))
            self._write(entries, [event.body for event in events])
        except Exception:
            self._forget()
            raise
        if entries:
            self._head = self._known = Head(entries[-1].seq, entries[-1].hash, entries[-1].time_ms)
        return entries

    def _write(self, entries: list[Entry], bodies: list[dict[str, object]]) -> None:
        db = self.connection()
        with storage_errors():
            db.execute("BEGIN IMMEDIATE")
            db.executemany(
                "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(e.seq, e.time_ms, e.kind, e.actor, e.body, e.prev, e.hash) for e in entries],
            )
            for entry, body in zip(entries, bodies, strict=True):
                for sql, values in derived_rows(entry, body):
                    db.execute(sql, values)
            db.execute("COMMIT")
            self._check_place()

    def probe(self, now_ms: int) -> None:
        """Writes and fsyncs one row that means nothing; raises `Unavailable` if the disk would not take an event."""
        try:
            with storage_errors():
                self.connection().execute("INSERT OR REPLACE INTO probe VALUES (1, ?)", (now_ms,))
                self._check_place()
        except (Unavailable, LedgerBroken):
            self._forget()
            raise

    def _forget(self) -> None:
        """After a failure nothing in memory is trusted: whether the transaction reached the disk is read again."""
        LedgerReader.close(self)
        self._head = None


def _take_lock(data_dir: Path) -> int:
    """An exclusive lock for as long as the descriptor is open; raises `Unavailable` if another keeper has it."""
    with storage_errors():
        descriptor = open_or_create(data_dir / LOCK_NAME)
    if not lock(descriptor):
        os.close(descriptor)
        raise Unavailable(
            "ledger_in_use", "another keeper writes this ledger", "stop it, or give this one its own SIGNER_DATA_DIR"
        )
    return descriptor
