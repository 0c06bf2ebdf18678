"""Writes a ledger: SQLite in WAL mode, one fsynced transaction for each batch.

Table `events` is authoritative; the other tables serve lookups and can be rebuilt from it (`audit.py`). A lock admits
one writer; other processes read with `reader.py` at the same time.
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
"""  # noqa: S608 - two constants
# Created at each opening if they are missing: the first version had none of them.
_LATER_INDEXES: Final = (
    "CREATE INDEX IF NOT EXISTS events_of_operations ON events (seq) WHERE kind = 'operation.recorded'",
    "CREATE INDEX IF NOT EXISTS certificates_of_vault ON certificates (seq) WHERE backend = 'vault'",
)
DERIVED: Final = ("certificates", "principals", "freezes")


class Ledger(LedgerReader):
    """The write access to a ledger. Opening it takes the lock."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        self._lock = _take_lock(data_dir)
        self._head: Head | None = None
        self._last_written: Head | None = None  # as `_head`, but kept after a failure, to detect a replaced file
        self._file_ids: tuple[int, ...] = ()

    def close(self) -> None:
        """Closes the connection and releases the lock."""
        super().close()
        os.close(self._lock)

    def connection(self) -> sqlite3.Connection:
        """The open connection; creates the ledger if there never was one. A new connection reads the head again."""
        if self._db is None:
            new = not self._path.exists()
            if new and os.fstat(self._lock).st_size > 0:
                raise Unavailable(
                    "ledger_missing",
                    "the ledger is missing from SIGNER_DATA_DIR",
                    f"restore it; to start a new ledger (serials restart at 1), also delete {LOCK_NAME}",
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
        """Creates the tables of a new ledger; raises `LedgerBroken` if the file is not the one open before."""
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        if db.execute("PRAGMA user_version").fetchone()[0] == 0 and self._last_written is None:
            db.executescript("BEGIN EXCLUSIVE;" + _SCHEMA + "COMMIT;")
        for statement in _LATER_INDEXES:
            db.execute(statement)
        last, own = self._last_written, "SELECT 1 FROM events WHERE seq = ? AND hash = ?"
        if last is not None and db.execute(own, (last.seq, last.hash)).fetchone() is None:
            raise LedgerBroken(
                "ledger_replaced",
                f"the ledger in SIGNER_DATA_DIR lacks event {last.seq}, which this keeper wrote",
                "restore the right file; or stop the keeper and run `signer ledger verify` on this one",
            )
        os.pwrite(self._lock, b"a ledger was begun here\n", 0)
        self._file_ids = self._identify_files()

    def _identify_files(self) -> tuple[int, ...]:
        """Device and inode of the ledger and its WAL."""
        ledger, log = self._path.stat(), os.stat(f"{self._path}-wal")  # noqa: PTH116 - at each commit
        return ledger.st_dev, ledger.st_ino, log.st_dev, log.st_ino

    def _check_files(self) -> None:
        """After a write: raises `OSError` if the ledger's path names another file now."""
        if self._identify_files() != self._file_ids:
            raise OSError(errno.ESTALE, "its file was moved or replaced")

    def commit(self, events: Sequence[Event], now_ms: int) -> list[Entry]:
        """Appends all events in one fsynced transaction, or none; raises `Unavailable` or `LedgerBroken`.

        A malformed event raises `ValueError` or `KeyError`. Times never decrease: if the clock was set back, an entry
        gets the time of the previous one.
        """
        try:
            head = self._head or self.head()
            entries = list(chain(events, head, now_ms))
            self._write(entries, [event.body for event in events])
        except Exception:
            self._reset()
            raise
        if entries:
            self._head = self._last_written = Head(entries[-1].seq, entries[-1].hash, entries[-1].time_ms)
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
            self._check_files()

    def probe(self, now_ms: int) -> None:
        """Writes and fsyncs one unused row; raises `Unavailable` if the disk cannot take an event."""
        try:
            with storage_errors():
                self.connection().execute("INSERT OR REPLACE INTO probe VALUES (1, ?)", (now_ms,))
                self._check_files()
        except (Unavailable, LedgerBroken):
            self._reset()
            raise

    def _reset(self) -> None:
        """Closes the connection and drops the head after a failure: whether the transaction was written is unknown."""
        LedgerReader.close(self)
        self._head = None


def _take_lock(data_dir: Path) -> int:
    """Locks the ledger while the descriptor is open; raises `Unavailable` if another keeper has the lock."""
    with storage_errors():
        descriptor = open_or_create(data_dir / LOCK_NAME)
    if not lock(descriptor):
        os.close(descriptor)
        raise Unavailable(
            "ledger_in_use", "another keeper writes this ledger", "stop it, or set another SIGNER_DATA_DIR"
        )
    return descriptor
