"""The durable, hash-chained record: SQLite in WAL mode, one fsynced transaction a batch.

Table `events` is the truth; the other tables are found faster and can be rebuilt from it (`ledgeraudit.py`). One
process writes, held to it by a lock. Anybody who may read the file can read it while it grows. `sqlite3` errors end
here: callers see `Unavailable` for what may pass, `LedgerBroken` for what may not.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from signer.chain import GENESIS, chain, derived_rows
from signer.errors import LedgerBroken, Unavailable
from signer.model import Entry, Event, Head, Issued

FILE_NAME: Final = "ledger.sqlite3"
LOCK_NAME: Final = "ledger.lock"
VERSION: Final = 1
APPLICATION_ID: Final = 0x5367_4E72  # "SgNr"; `file` and a human with a hex dump can tell
LOOKED_AT: Final = 5_000  # rows that a page costs at most
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
DERIVED: Final = ("certificates", "principals", "freezes")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which certificates a page holds; None does not restrict.

    `before` is the `seq` of the last row of the page before, `active_at` seconds since 1970.
    """

    identity: str | None = None
    role: str | None = None
    principal: str | None = None
    fingerprint: str | None = None
    active_at: int | None = None
    before: int | None = None
    limit: int = 50


@dataclass(frozen=True, slots=True)
class Recent:
    """One certificate that still counts: towards a rate (`issued`, seconds) or as live (`valid_before`, seconds)."""

    identity: str
    role: str
    issued: int
    valid_before: int


class LedgerReader:
    """Reads a ledger, also while a keeper writes it."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / FILE_NAME
        self._db: sqlite3.Connection | None = None

    def close(self) -> None:
        """Ends the connection; reading again opens it again."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def connection(self) -> sqlite3.Connection:
        """The open connection; raises `Unavailable` or `LedgerBroken`."""
        if self._db is None:
            if not self._path.exists():
                missing = "there is no ledger in SIGNER_DATA_DIR"
                raise Unavailable("ledger_missing", missing, "start the keeper once, or set it right")
            db = self._connect(f"file:{self._path}?mode=ro")
            if db.execute("PRAGMA user_version").fetchone()[0] == 0:
                db.close()
                raise Unavailable("ledger_missing", "the ledger is still being made", "ask again in a moment")
            self._db = db
        return self._db

    def _connect(self, uri: str) -> sqlite3.Connection:
        with storage_errors():
            db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=2, cached_statements=64)
            db.execute("PRAGMA busy_timeout = 2000")
            found = db.execute("PRAGMA user_version").fetchone()[0]
            ours = db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
            strange = not ours and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] > 0
        if strange:
            db.close()
            raise LedgerBroken(
                "ledger_not_ours",
                f"{FILE_NAME} in SIGNER_DATA_DIR is somebody else's database",
                "give the keeper a directory of its own",
            )
        if found > VERSION:
            db.close()
            raise LedgerBroken(
                "ledger_version_newer",
                f"the ledger has version {found}, this program knows {VERSION}",
                "start the newer signer that wrote it",
            )
        return db

    def query(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """All rows of a statement; raises `Unavailable` or `LedgerBroken`."""
        with storage_errors():
            return self.connection().execute(sql, values).fetchall()

    def named(self, sql: str, values: Mapping[str, object]) -> list[tuple[Any, ...]]:
        """As `query`, with parameters by name."""
        with storage_errors():
            return self.connection().execute(sql, values).fetchall()

    def rows(self, sql: str, values: Sequence[object] = ()) -> Iterator[tuple[Any, ...]]:
        """The rows of a statement one by one, for statements with very many."""
        with storage_errors():
            yield from self.connection().execute(sql, values)

    def head(self) -> Head:
        """The newest entry; seq 0 for a ledger without any."""
        for seq, digest, time_ms in self.query("SELECT seq, hash, time FROM events ORDER BY seq DESC LIMIT 1"):
            return Head(seq, digest, time_ms)
        return Head(0, GENESIS, 0)

    def certificates(self, wanted: Filter) -> list[Issued]:
        """All that fit, newest first, however long the search."""
        return self._certificates(wanted, 0)

    def page(self, wanted: Filter) -> tuple[list[Issued], int | None]:
        """What fits among the newest `LOOKED_AT` rows of the most telling filter, and where a longer search goes on.

        The second is a `before` for the next page, None when all was looked at: with filters that never meet, a
        search of everything would keep the keeper from signing.
        """
        table, column, value = _driver(wanted)
        before = "" if wanted.before is None else f" AND seq < {wanted.before:d}"
        rows = self.query(
            f"SELECT seq FROM {table} WHERE {column} = ?{before} ORDER BY seq DESC LIMIT 1 OFFSET {LOOKED_AT - 1}",  # noqa: S608
            (value,),
        )
        floor = int(rows[0][0]) if rows else None
        return self._certificates(wanted, floor or 0), floor

    def _certificates(self, wanted: Filter, floor: int) -> list[Issued]:
        table, column, value = _driver(wanted)
        if column == "principal":
            source, order = "principals p CROSS JOIN certificates c ON c.seq = p.seq", "p.seq"
        else:
            source, order = f"certificates c {table.removeprefix('certificates')}", "c.seq"
        clauses: list[str] = [f"{column} = ?", f"{order} >= ?"]
        values: list[object] = [value, floor]
        holds = "EXISTS (SELECT 1 FROM principals q WHERE q.principal = ? AND q.seq = c.seq)"
        for clause, restriction in (
            (f"{order} < ?", wanted.before),
            ("c.identity = ?", wanted.identity),
            ("c.role = ?", wanted.role),
            ("c.fingerprint = ?", wanted.fingerprint),
            ("c.valid_before > ? AND c.withheld = 0", wanted.active_at),
            (holds, wanted.principal if column != "principal" else None),
        ):
            if restriction is not None:
                clauses.append(clause)
                values.append(restriction)
        rows = self.query(
            f"SELECT {_ISSUED} FROM {source} WHERE {' AND '.join(clauses)} ORDER BY {order} DESC LIMIT ?",  # noqa: S608
            (*values, wanted.limit),
        )
        return [read_issued(row) for row in rows]

    def certificate(self, serial: int) -> tuple[Issued, Entry] | None:
        """One certificate with the event that records it: ours, if another CA used the same serial."""
        rows = self.query(
            f"SELECT {_ISSUED} FROM certificates c WHERE c.serial = ? ORDER BY c.backend LIMIT 1",  # noqa: S608
            (str(serial),),
        )
        if not rows:
            return None
        issued = read_issued(rows[0])
        return issued, self.entry(issued.seq)

    def entry(self, seq: int) -> Entry:
        """One event by its number; raises `LedgerBroken` if it is not there."""
        for row in self.query("SELECT seq, time, kind, actor, body, prev, hash FROM events WHERE seq = ?", (seq,)):
            return Entry(*row)
        raise broken_at(seq, "the event is missing")

    def recent(self, since: int) -> list[Recent]:
        """Certificates that expire after `since` (seconds) and were released."""
        rows = self.query(
            "SELECT c.identity, c.role, e.time / 1000, c.valid_before FROM certificates c"
            " JOIN events e ON e.seq = c.seq WHERE c.valid_before > ? AND c.withheld = 0",
            (since,),
        )
        return [Recent(*row) for row in rows]

    def last_serial(self) -> int:
        """The serial that was allotted last here, 0 without any; another CA's serials do not count."""
        newest = "SELECT serial FROM certificates WHERE backend = 'local' ORDER BY seq DESC LIMIT 1"
        return next((int(serial) for (serial,) in self.query(newest)), 0)

    def freezes(self) -> dict[str, str]:
        """Scope → reason of every freeze in force."""
        return dict(self.query("SELECT scope, reason FROM freezes"))


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


_ISSUED: Final = (
    "c.seq, c.serial, c.backend, c.identity, c.role, c.principals, c.fingerprint, c.key_id,"
    " c.valid_after, c.valid_before, c.withheld"
)


def _driver(wanted: Filter) -> tuple[str, str, object]:
    """The table with the index to follow, its column and value: the filter that leaves the fewest rows, as a rule.

    SQLite, which keeps no statistics of ours, would choose by the number of columns.
    """
    if wanted.principal is not None and wanted.fingerprint is None and wanted.identity is None:
        return "principals", "principal", wanted.principal
    for column in ("fingerprint", "identity", "role"):
        value = getattr(wanted, column)
        if value is not None:
            return f"certificates INDEXED BY certificates_by_{column}", column, value
    return "certificates NOT INDEXED", "1", 1


def read_issued(row: tuple[Any, ...]) -> Issued:
    """A row of `certificates` as its type."""
    seq, serial, backend, identity, role, principals, fingerprint, key_id, valid_after, valid_before, withheld = row
    return Issued(
        serial=int(serial),
        backend=backend,
        seq=seq,
        identity=identity,
        role=role,
        principals=tuple(json.loads(principals)),
        fingerprint=fingerprint,
        key_id=key_id,
        valid_after=valid_after,
        valid_before=valid_before,
        withheld=bool(withheld),
    )


def broken_at(seq: int, what: str) -> LedgerBroken:
    """The error that names the event where the ledger contradicts itself."""
    return LedgerBroken(
        "ledger_broken",
        f"the ledger is broken at event {seq}: {what}",
        "keep the file as it is, and compare it with a saved head and a backup (runbook: README, Ledger)",
        {"seq": seq},
    )


@contextmanager
def storage_errors() -> Iterator[None]:
    """`sqlite3` and file errors as ours: what may pass is `Unavailable`, a damaged file is `LedgerBroken`."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        if str(error).startswith(("no such table", "no such column")):
            raise LedgerBroken(
                "ledger_broken", f"the ledger's file is damaged: {error}", "keep it as it is, and restore a backup"
            ) from None
        raise Unavailable(
            "ledger_unavailable",
            f"the ledger cannot be used: {_short_reason(error)}",
            "free space or mend the data directory; the service recovers by itself",
        ) from None
    except sqlite3.DatabaseError as error:
        raise LedgerBroken(
            "ledger_broken",
            f"the ledger's file is damaged: {_short_reason(error)}",
            "keep the file as it is, and compare it with a backup (README, Ledger)",
        ) from None


def _short_reason(error: Exception) -> str:
    return (error.strerror or "input or output failed") if isinstance(error, OSError) else str(error)


def _take_lock(data_dir: Path) -> int:
    """An exclusive lock for as long as the descriptor is open; raises `Unavailable` if another keeper has it."""
    with storage_errors():
        descriptor = os.open(data_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Unavailable(
            "ledger_in_use", "another keeper writes this ledger", "stop it, or give this one its own SIGNER_DATA_DIR"
        ) from None
    return descriptor
