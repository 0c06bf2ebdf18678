"""Writes a ledger: SQLite in WAL mode, one fsynced transaction for each batch, of events alone.

Views are folded from them afterwards (`fold.py`), by another process. A lock admits one writer; other processes read
with `reader.py` and `pages.py` at the same time.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from signer.errors import LedgerBroken, Unavailable
from signer.files import claim
from signer.ledger.chain import chain
from signer.ledger.file_id import FileId, file_id
from signer.ledger.marks import FOLLOWED, mark_name
from signer.ledger.reader import LedgerReader, storage_errors
from signer.ledger.schema import APPLICATION_ID, EVENT_INDEXES, EVENTS, OLDER_INDEXES, VERSION
from signer.model import Entry, Event, Head

LOCK_NAME: Final = "ledger.lock"
INTERRUPTED: Final = "ledger.restored"  # a folder: the file of a restore or archive that was interrupted when complete
CHECKPOINT_PAGES: Final = 300  # at once, 0.8 ms; 1,000, SQLite's own number, hold all up for 2.6 ms
CHECKED_AT_START: Final = 1_000  # events


class Ledger(LedgerReader):
    """The write access to a ledger. Opening it takes the lock; raises `Unavailable`.

    `is_copy` opens the copy of another host's ledger, which nothing else may write.
    """

    def __init__(self, data_dir: Path, *, is_copy: bool = False) -> None:
        super().__init__(data_dir)
        self._lock = take_lock(data_dir)
        if not is_copy and (data_dir / mark_name(FOLLOWED)).exists():
            os.close(self._lock)
            raise Unavailable(
                "ledger_followed",
                "this ledger is a copy of another host's, and a second keeper would give its serials again",
                "run `signer ledger promote` where the copy was followed",
            )
        self._name, self._log_name = os.fsencode(self._path), os.fsencode(f"{self._path}-wal")
        self._head: Head | None = None
        self._last_written: Head | None = None  # as `_head`, but kept after a failure, to detect a replaced file
        self._last_serial: int | None = None  # of the local key; read when it is needed, as `_head`
        self._file_ids: tuple[FileId, FileId] | None = None
        self._reader = LedgerReader(data_dir)  # for a disk that takes no writes

    def close(self) -> None:
        """Closes the file and releases the lock."""
        self._reader.close()
        super().close()
        os.close(self._lock)

    def connection(self) -> sqlite3.Connection:
        """The open connection; creates the ledger if there never was one. A new connection reads the head again."""
        if self._db is None:
            new = not self._path.exists()
            if new and (self.data_dir / INTERRUPTED).exists():
                raise Unavailable(
                    "ledger_missing",
                    "the ledger is missing from SIGNER_DATA_DIR: `ledger restore` or `ledger archive` was interrupted",
                    "run that command again to complete it",
                )
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
            self._head = self._last_serial = None
        return self._db

    def query(self, sql: str, values: Sequence[object] | Mapping[str, object] = ()) -> list[tuple[Any, ...]]:
        """As that of a reader; reading goes on where the file cannot be opened for writing any more."""
        try:
            return super().query(sql, values)
        except Unavailable as failure:
            if failure.code != "ledger_unavailable":
                raise
            return self._reader.query(sql, values)

    def _open(self, db: sqlite3.Connection) -> None:
        """Creates the tables of a new ledger, or migrates an older one.

        Raises `LedgerBroken` if the file is not the one open before. The migration keeps the tables of version 1, which
        nothing reads or writes any more. Indexes on events that the file lacks are added, and those of an older release
        that they replace are dropped; this changes no version.
        """
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        is_new = version == 0 and self._last_written is None
        if is_new or version == 1:
            steps = (EVENTS if is_new else "", *(f"{index.statement};" for index in EVENT_INDEXES))
            numbers = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION};"
            _run_script(db, "".join(steps) + numbers)
        last, own = self._last_written, "SELECT 1 FROM events WHERE seq = ? AND hash = ?"
        if last is not None and db.execute(own, (last.seq, last.hash)).fetchone() is None:
            raise LedgerBroken(
                "ledger_replaced",
                f"the ledger in SIGNER_DATA_DIR lacks event {last.seq}, which this keeper wrote",
                "restore the right file; or stop the keeper and run `signer ledger verify` on this one",
            )
        if changes := _index_changes(db):  # a release that does not know the new ones goes on writing them
            _run_script(db, "".join(f"{change};" for change in changes))
        note_begun(self._lock)
        self._file_ids = self._identify_files()

    def _identify_files(self) -> tuple[FileId, FileId]:
        """Of the ledger and its WAL."""
        return file_id(self._name), file_id(self._log_name)

    def _check_files(self) -> None:
        """After a write: raises `OSError` if the ledger's path names another file now."""
        if self._identify_files() != self._file_ids:
            raise OSError(errno.ESTALE, "its file was moved or replaced")

    def commit(self, events: Sequence[Event], now_ms: int) -> list[Entry]:
        """Appends all events in one fsynced transaction, or none; raises `Unavailable` or `LedgerBroken`.

        A malformed event raises `ValueError` or `KeyError`, as does a serial of the local key that does not rise; an
        event that a constraint of the file forbids raises `sqlite3.IntegrityError`. All three are internal errors.
        Times never decrease: if the clock was set back, an entry gets the time of the previous one.
        """
        try:
            head = self._head or self.head()
            last_serial = self._check_serials(events)
            entries = list(chain(events, head, now_ms))
            self._write(entries)
        except Exception:
            self._reset()
            raise
        if entries:
            self._head = self._last_written = Head(entries[-1].seq, entries[-1].hash, entries[-1].time_ms)
            self._last_serial = last_serial
        return entries

    def _check_serials(self, events: Sequence[Event]) -> int | None:
        """The last serial of the local key after `events`, None if it was not read; raises `ValueError`."""
        last = self._last_serial
        for event in events:
            if event.kind == "certificate.issued" and event.body["backend"] == "local":
                if last is None:
                    last = self.last_serial()
                serial = int(str(event.body["serial"]))
                if serial <= last:
                    raise ValueError(f"serial {serial} does not follow {last}")
                last = serial
            elif event.kind == "ledger.restored":
                last = int(str(event.body["last_serial"]))
        return last

    def _write(self, entries: list[Entry]) -> None:
        db = self.connection()
        with storage_errors():
            db.execute("BEGIN IMMEDIATE")
            db.executemany(
                "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(e.seq, e.time_ms, e.kind, e.actor, e.body, e.prev, e.hash) for e in entries],
            )
            db.execute("COMMIT")
            self._check_files()

    def newest(self) -> int:
        """The number of the last event, 0 without one; raises `Unavailable` or `LedgerBroken`."""
        return (self._head or self.head()).seq

    def size(self) -> int:
        """Bytes of the ledger's file and its write-ahead log; 0 for one that is not there."""
        found = 0
        for name in (self._name, self._log_name):
            with suppress(OSError):
                found += os.stat(name).st_size  # noqa: PTH116 - at each scrape
        return found

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
        self._head = self._last_serial = None


def note_begun(lock_descriptor: int) -> None:
    """Writes into the lock file that its folder had a ledger: from now on no keeper begins a new one there."""
    os.pwrite(lock_descriptor, b"a ledger was begun here\n", 0)


def _run_script(db: sqlite3.Connection, statements: str) -> None:
    """Runs all statements in one transaction, or none."""
    try:
        db.executescript(f"BEGIN EXCLUSIVE; {statements} COMMIT;")
    except sqlite3.Error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _index_changes(db: sqlite3.Connection) -> list[str]:
    """The statements that make the indexes on events that the file lacks, and drop those of older releases."""
    found = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
    return [
        *(index.statement for index in EVENT_INDEXES if index.name not in found),
        *(f"DROP INDEX {index.name}" for index in OLDER_INDEXES if index.name in found),
    ]


def take_lock(data_dir: Path) -> int:
    """Locks the ledger while the descriptor is open; raises `Unavailable` if another keeper has the lock."""
    text, hint = "another keeper writes this ledger", "stop it, or set another SIGNER_DATA_DIR"
    with storage_errors():
        return claim(data_dir / LOCK_NAME, Unavailable("ledger_in_use", text, hint))
