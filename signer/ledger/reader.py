"""Reads a ledger: pages, single records and the state for a keeper's start; also while a keeper writes.

Maps `sqlite3` errors: `Unavailable` for temporary ones, `LedgerBroken` for permanent ones.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from signer.errors import LedgerBroken, Unavailable
from signer.ledger.chain import GENESIS
from signer.model import BACKDATE, Entry, Filter, Head, Issued

FILE_NAME: Final = "ledger.sqlite3"
VERSION: Final = 1
APPLICATION_ID: Final = 0x5367_4E72  # "SgNr"; shown by `file`
MAX_SCANNED: Final = 5_000  # rows that one page reads at most


@dataclass(frozen=True, slots=True)
class Recent:
    """One certificate that may count towards a limit; times are in seconds."""

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
        """Closes the connection; the next read opens a new one."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def connection(self) -> sqlite3.Connection:
        """The open connection; raises `Unavailable` or `LedgerBroken`."""
        if self._db is None:
            if not self._path.exists():
                missing = "there is no ledger in SIGNER_DATA_DIR"
                raise Unavailable("ledger_missing", missing, "start the keeper once, or correct SIGNER_DATA_DIR")
            db = self._connect(f"file:{self._path}?mode=ro")
            if db.execute("PRAGMA user_version").fetchone()[0] == 0:
                db.close()
                raise Unavailable("ledger_missing", "the ledger is being created", "retry in a moment")
            self._db = db
        return self._db

    def _connect(self, uri: str) -> sqlite3.Connection:
        with storage_errors():
            db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=2, cached_statements=64)
            db.execute("PRAGMA busy_timeout = 2000")
            found = db.execute("PRAGMA user_version").fetchone()[0]
            is_ledger = db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
            is_foreign = not is_ledger and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] > 0
        if is_foreign:
            db.close()
            raise LedgerBroken(
                "ledger_not_ours",
                f"{FILE_NAME} in SIGNER_DATA_DIR is not a ledger of signer",
                "give the keeper its own SIGNER_DATA_DIR",
            )
        if found > VERSION:
            db.close()
            raise LedgerBroken(
                "ledger_version_newer",
                f"the ledger has version {found}; this signer supports version {VERSION}",
                "start the newer version that wrote it",
            )
        return db

    def query(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """All rows of a statement; raises `Unavailable` or `LedgerBroken`."""
        with storage_errors():
            return self.connection().execute(sql, values).fetchall()

    def named(self, sql: str, values: Mapping[str, object]) -> list[tuple[Any, ...]]:
        """As `query`, with named parameters."""
        with storage_errors():
            return self.connection().execute(sql, values).fetchall()

    def rows(self, sql: str, values: Sequence[object] = ()) -> Iterator[tuple[Any, ...]]:
        """Yields the rows of a statement one by one."""
        with storage_errors():
            yield from self.connection().execute(sql, values)

    def head(self) -> Head:
        """The newest entry; seq 0 if the ledger is empty."""
        for seq, digest, time_ms in self.query("SELECT seq, hash, time FROM events ORDER BY seq DESC LIMIT 1"):
            return Head(seq, digest, time_ms)
        return Head(0, GENESIS, 0)

    def certificates(self, wanted: Filter) -> list[Issued]:
        """All matching certificates, newest first, without a bound on the search."""
        return self._certificates(wanted, 0)

    def page(self, wanted: Filter) -> tuple[list[Issued], int | None]:
        """The matches among the newest `MAX_SCANNED` rows of the most selective filter, and `before` of the next page.

        `before` is None after the last row. The bound keeps the keeper responsive if filters have no common match.
        """
        table, column, value = self._driver(wanted)
        before = "" if wanted.before is None else f" AND seq < {wanted.before:d}"
        rows = self.query(
            f"SELECT seq FROM {table} WHERE {column} = ?{before} ORDER BY seq DESC LIMIT 1 OFFSET {MAX_SCANNED - 1}",  # noqa: S608
            (value,),
        )
        floor = int(rows[0][0]) if rows else None
        return self._certificates(wanted, floor or 0), floor

    def _certificates(self, wanted: Filter, floor: int) -> list[Issued]:
        table, column, value = self._driver(wanted)
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
            ("c.backend = ?", wanted.backend),
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

    def _driver(self, wanted: Filter) -> tuple[str, str, object]:
        """Table with index, column and value of the filter that usually leaves the fewest rows.

        SQLite has no statistics here and would choose by the number of columns.
        """
        for column in ("fingerprint", "identity"):
            value = getattr(wanted, column)
            if value is not None:
                return f"certificates INDEXED BY certificates_by_{column}", column, value
        if wanted.backend == "vault" and self._has_index("certificates_of_vault"):
            # A constant, so that SQLite recognizes the condition of this partial index.
            return "certificates INDEXED BY certificates_of_vault", "backend = 'vault' AND 1", 1
        if wanted.principal is not None:
            return "principals", "principal", wanted.principal
        if wanted.role is not None:
            return "certificates INDEXED BY certificates_by_role", "role", wanted.role
        return "certificates NOT INDEXED", "1", 1

    def _has_index(self, name: str) -> bool:
        """False if no keeper of this version has opened the ledger yet: readers create no index."""
        return bool(self.query("SELECT 1 FROM sqlite_master WHERE type = 'index' AND name = ?", (name,)))

    def certificate(self, serial: int) -> tuple[Issued, Entry] | None:
        """One certificate and its event; the local one if Vault used the same serial."""
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

    def operations(self, evidence: str | None, before: int | None, limit: int) -> list[Entry]:
        """Recorded operations, newest first: with that evidence, if given, and before event `before`."""
        rows = self.query(
            "SELECT seq, time, kind, actor, body, prev, hash FROM events WHERE kind = 'operation.recorded'"
            " AND (? IS NULL OR body ->> 'evidence' = ?) AND seq < ? ORDER BY seq DESC LIMIT ?",
            (evidence, evidence, _NO_END if before is None else before, limit),
        )
        return [Entry(*row) for row in rows]

    def recent(self, since: int) -> list[Recent]:
        """Released certificates that expire after `since` (seconds).

        One of Vault's is granted before it is recorded; if the clock is set back in between, only its validity says so.
        """
        rows = self.query(
            "SELECT c.identity, c.role, max(e.time / 1000, c.valid_after + ?), c.valid_before FROM certificates c"
            " JOIN events e ON e.seq = c.seq WHERE c.valid_before > ? AND c.withheld = 0",
            (BACKDATE, since),
        )
        return [Recent(*row) for row in rows]

    def last_serial(self) -> int:
        """The last serial of the local key, 0 if there is none."""
        newest = "SELECT serial FROM certificates WHERE backend = 'local' ORDER BY seq DESC LIMIT 1"
        return next((int(serial) for (serial,) in self.query(newest)), 0)

    def freezes(self) -> dict[str, str]:
        """The reason of every freeze in force, by scope."""
        return dict(self.query("SELECT scope, reason FROM freezes"))


_NO_END: Final = 2**63 - 1
_ISSUED: Final = (
    "c.seq, c.serial, c.backend, c.identity, c.role, c.principals, c.fingerprint, c.key_id,"
    " c.valid_after, c.valid_before, c.withheld"
)


def read_issued(row: tuple[Any, ...]) -> Issued:
    """Decodes a row of `certificates`; raises `LedgerBroken` if it is invalid."""
    seq, serial, backend, identity, role, principals, fingerprint, key_id, valid_after, valid_before, withheld = row
    try:
        number, names = int(serial), json.loads(principals)
    except (ValueError, RecursionError):
        number, names = -1, None
    texts = [backend, identity, role, fingerprint, key_id, *(names if isinstance(names, list) else [None])]
    times = (valid_after, valid_before)
    in_range = all(isinstance(seconds, int) and 0 <= seconds < 1 << 40 for seconds in times)
    if number < 0 or not in_range or not all(isinstance(text, str) for text in texts):
        raise broken_at(seq, "table certificates has an invalid row")
    return Issued(
        serial=number,
        backend=backend,
        seq=seq,
        identity=identity,
        role=role,
        principals=tuple(names),
        fingerprint=fingerprint,
        key_id=key_id,
        valid_after=valid_after,
        valid_before=valid_before,
        withheld=bool(withheld),
    )


def broken_at(seq: int, what: str) -> LedgerBroken:
    """The error for a ledger whose event `seq` is wrong."""
    return LedgerBroken(
        "ledger_broken",
        f"the ledger is broken at event {seq}: {what}",
        "keep the file unchanged and compare it with a saved head and a backup: see runbooks/ledger.md",
        {"seq": seq},
    )


@contextmanager
def storage_errors() -> Iterator[None]:
    """Maps `sqlite3` and file errors: a damaged file to `LedgerBroken`, all others to `Unavailable`."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        if str(error).startswith(("no such table", "no such column")):
            raise LedgerBroken(
                "ledger_broken",
                f"the ledger's file is damaged: {error}",
                "keep the file unchanged and restore a backup",
            ) from None
        raise Unavailable(
            "ledger_unavailable",
            f"the ledger cannot be used: {_short_reason(error)}",
            "free disk space or fix SIGNER_DATA_DIR; the service recovers by itself",
        ) from None
    except sqlite3.DatabaseError as error:
        raise LedgerBroken(
            "ledger_broken",
            f"the ledger's file is damaged: {_short_reason(error)}",
            "keep the file unchanged and compare it with a backup: see runbooks/ledger.md",
        ) from None


def _short_reason(error: Exception) -> str:
    return (error.strerror or "I/O error") if isinstance(error, OSError) else str(error)
