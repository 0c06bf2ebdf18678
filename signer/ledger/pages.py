"""Finds certificates in the views, and in the events that the views lack; also while a keeper folds.

Opens both files for reading. Events that are not in `views.sqlite3` yet are folded in memory, so that nothing is
missing that was recorded before the call. What is shown here decides nothing.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from heapq import nlargest
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from signer.errors import LedgerBroken, NotFound, Unavailable
from signer.ledger.file_id import FileId, found_file
from signer.ledger.fold import add_events, create_views, folded_up_to
from signer.ledger.reader import REACH, LedgerReader
from signer.ledger.schema import FILE_NAME, ISSUED, VIEWS_NAME
from signer.ledger.subtrees import TreeReader
from signer.ledger.tree import consistency_proof
from signer.model import Activity, Entry, EventFilter, Filter, Issued

MAX_SCANNED: Final = 5_000  # rows that one page reads at most
MAX_MISSING: Final = 5_000  # events that a page folds in memory at most
_STEP: Final = 1_000
_NO_END: Final = 2**63 - 1
_TO_FOLD: Final = "SELECT seq, kind, actor, body FROM events WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?"
REFUSALS: Final = ("request.refused", "refusals.repeated")
# The kinds in `others`, by one look into its index for each: there are few, and many rows of one.
_KINDS: Final = (
    "WITH RECURSIVE known (kind) AS (SELECT min(kind) FROM others UNION ALL"
    " SELECT (SELECT min(kind) FROM others WHERE kind > known.kind) FROM known WHERE known.kind IS NOT NULL)"
    " SELECT kind FROM known WHERE kind IS NOT NULL"
)
_ISSUED: Final = (
    "c.seq, c.serial, c.backend, c.identity, c.role, c.principals, c.fingerprint, c.key_id, c.valid_after,"
    " c.valid_before, c.backend = 'local' AND EXISTS (SELECT 1 FROM withheld w WHERE w.serial = c.serial)"
)


class CertificateReader(LedgerReader):
    """Reads certificates; raises `Unavailable` (`views_behind`) if the views lack more than `max_missing` events."""

    def __init__(self, data_dir: Path, max_missing: int | None = MAX_MISSING, segment: str | None = None) -> None:
        """`segment` is the name of a file of `signer ledger archive` in the folder, which has no views."""
        super().__init__(data_dir, segment or FILE_NAME)
        self._views_path = None if segment else data_dir / VIEWS_NAME
        self._max_missing = _NO_END if max_missing is None else max_missing
        self._views: sqlite3.Connection | None = None
        self._views_file: FileId | None = None
        self._events_file: FileId | None = None
        self._memory: sqlite3.Connection | None = (
            None  # the views of the events after `_memory_first` to `_memory_last`
        )
        self._memory_first = self._memory_last = 0

    def close(self) -> None:
        """Closes all connections; the next read opens new ones."""
        super().close()
        self._close_views()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def release(self) -> None:
        """Closes the handle of the events until the next read, which a keeper needs to begin a new log of them where
        somebody has removed the old one; the views stay open."""
        super().close()

    def certificates(self, wanted: Filter) -> list[Issued]:
        """All matching certificates, newest first, without a bound on the search."""
        with self._snapshot() as (memory, file, folded):
            return self._find(memory, file, folded, wanted, self._first(wanted))

    def page(self, wanted: Filter) -> tuple[list[Issued], int | None]:
        """The matches among the newest `MAX_SCANNED` rows of the most selective filter, and `before` of the next page.

        `before` is None after the last row. The bound keeps a page fast if filters have no common match.
        """
        table, column, value = _driver(wanted)
        before = "" if wanted.before is None else f" AND seq < {wanted.before:d}"
        with self._snapshot() as (memory, file, folded):
            floor = 0
            if file is not None:
                rows = file.execute(
                    f"SELECT seq FROM {table} WHERE {column} = ?{before}"  # noqa: S608 - names from here
                    f" ORDER BY seq DESC LIMIT 1 OFFSET {MAX_SCANNED - 1}",
                    (value,),
                ).fetchall()
                floor = int(rows[0][0]) if rows else 0
            oldest = self._oldest(wanted)
            return self._find(memory, file, folded, wanted, max(floor, oldest)), floor if floor > oldest else None

    def certificate(self, serial: int) -> tuple[Issued, Entry] | None:
        """One certificate and its event; the local one if Vault used the same serial."""
        statement = f"SELECT {_ISSUED} FROM certificates c WHERE c.serial = ? AND c.seq > ?"  # noqa: S608
        with self._snapshot() as (memory, file, folded):
            rows = memory.execute(statement, (str(serial), folded)).fetchall()
            if file is not None:
                rows += file.execute(statement, (str(serial), 0)).fetchall()
            found = [self._issued(row, memory) for row in rows]
        if not found:
            return None
        issued = min(found, key=lambda row: row.backend)
        return issued, self.entry(issued.seq)

    def activity(self, bounds: Sequence[int]) -> list[Activity]:
        """What happened between each two of `bounds`, times in milliseconds since 1970 that rise.

        Certificates are not counted one by one: they are all events but the others.
        """
        first = [max(self.first_since(bound), self.base + 1) for bound in bounds]  # archived ones are not counted
        with self._snapshot() as (memory, file, folded):
            found = []
            for start, end in pairwise(first):
                issued, refused = end - start, 0
                for db, low, high in ((file, start, min(end, folded + 1)), (memory, max(start, folded + 1), end)):
                    if db is not None and low < high:
                        others, refusals, withheld = db.execute(
                            "SELECT count(*), coalesce(sum(iif(kind IN (?, ?), count, 0)), 0),"
                            " count(*) FILTER (WHERE kind = 'certificate.withheld')"
                            " FROM others WHERE seq >= ? AND seq < ?",
                            (*REFUSALS, low, high),
                        ).fetchone()
                        issued, refused = issued - others - withheld, refused + refusals
                found.append(Activity(max(issued, 0), refused))
            return found

    def matching_events(self, wanted: EventFilter) -> list[Entry]:
        """The newest events that match; the cost does not depend on how many there are."""
        floor = 1 if wanted.since is None else self.first_since(wanted.since)
        if wanted.kind is None and wanted.identity is None and not wanted.only_others:
            return self.entries(
                "WHERE seq >= ? AND seq < ? ORDER BY seq DESC LIMIT ?",
                (floor, _NO_END if wanted.before is None else wanted.before, wanted.limit),
            )
        with self._snapshot() as (memory, file, folded):
            numbers = set(_numbers(memory, wanted, max(floor, folded + 1), _NO_END))
            if file is not None:
                numbers.update(_numbers(file, wanted, floor, folded + 1))
        found = [self.entry(number) for number in nlargest(wanted.limit, numbers)]
        if self.base and len(found) < wanted.limit:  # views lack what was carried over; there are few of these
            end = self.base + 1 if wanted.before is None else min(self.base + 1, wanted.before)
            found += self.events(replace(wanted, before=end, limit=wanted.limit - len(found)))
        return found

    def consistency(self, old: int, new: int) -> list[bytes]:
        """The proof that the Merkle tree of `new` events begins with that of `old`.

        Raises `NotFound` for more events than there are.
        """
        if new > (newest := self.head().seq):
            raise NotFound(
                "tree_size_unknown", f"the ledger has {newest:,} events, not {new:,}", "take the size of a checkpoint"
            )
        with self._opened() as (file, folded):
            if new - folded > self._max_missing:
                raise views_behind(new - folded)
            return consistency_proof(old, new, TreeReader(self, file, folded).node)

    def _oldest(self, wanted: Filter) -> int:
        """The first event that can have a match: no certificate is active for longer than `REACH`."""
        reach = 0 if wanted.active_at is None else self.first_since((wanted.active_at - REACH) * 1000)
        return max(reach, self._first(wanted))

    def _first(self, wanted: Filter) -> int:
        """The first event of the wanted time: times never decrease, so all others are before it."""
        return 0 if wanted.since is None else self.first_since(wanted.since * 1000)

    def _find(
        self, memory: sqlite3.Connection, file: sqlite3.Connection | None, folded: int, wanted: Filter, floor: int
    ) -> list[Issued]:
        """The matches from event `floor` on, newest first."""
        found = [self._issued(row, memory) for row in _select(memory, wanted, max(floor, folded + 1), wanted.limit)]
        if file is not None and len(found) < wanted.limit:
            wanted = replace(wanted, before=min(wanted.before or folded + 1, folded + 1))
            # A certificate in the file may be withheld by an event that is not: then there must be one more.
            late = int(memory.execute("SELECT count(*) FROM withheld WHERE seq > ?", (folded,)).fetchone()[0])
            rows = _select(file, wanted, floor, wanted.limit - len(found) + late)
            older = [self._issued(row, memory) for row in rows]
            if wanted.active_at is not None:
                older = [row for row in older if not row.withheld]
            found += older[: wanted.limit - len(found)]
        return found

    @staticmethod
    def _issued(row: tuple[Any, ...], memory: sqlite3.Connection) -> Issued:
        issued = read_issued(row)
        if issued.withheld or issued.backend != "local":
            return issued
        late = memory.execute("SELECT 1 FROM withheld WHERE serial = ?", (str(issued.serial),)).fetchone()
        return issued if late is None else read_issued((*row[:-1], 1))

    # --- both files -------------------------------------------------------------------------------------------------

    @contextmanager
    def _snapshot(self) -> Iterator[tuple[sqlite3.Connection, sqlite3.Connection | None, int]]:
        """The views in memory, those of the file (None without a good one), and the last event that these contain.

        The position of the file is read before the newest event, so no event can be missing in between.
        """
        with self._opened() as (file, folded):
            yield self._fold_missing(folded), file, folded

    @contextmanager
    def _opened(self) -> Iterator[tuple[sqlite3.Connection | None, int]]:
        """The views of the file, None without a good one, and the last event that they contain."""
        try:
            yield self._begin()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            self._close_views()
            raise LedgerBroken(
                "ledger_tables_differ",
                f"{VIEWS_NAME} is damaged: {error}",
                "the keeper folds it again; if it does not, stop it and run `signer ledger rebuild`",
            ) from None
        finally:
            if self._views is not None and self._views.in_transaction:
                self._views.execute("ROLLBACK")

    def _begin(self) -> tuple[sqlite3.Connection | None, int]:
        events_file = found_file(self._path)
        views_file = None if self._views_path is None else found_file(self._views_path)
        if events_file != self._events_file:  # another ledger was put in its place
            self.close()
            self._events_file = events_file
        if views_file != self._views_file:
            self._close_views()
        if views_file is None:
            return None, self.base
        try:
            if self._views is None:
                uri = f"file:{self._views_path}?mode=ro"
                self._views = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=2)
                self._views_file = views_file
            self._views.execute("BEGIN")
            folded = folded_up_to(self._views, self)
        except (
            sqlite3.Error,
            UnicodeDecodeError,
        ):  # being created, or damaged: the keeper makes it again
            folded = None
        if folded is None:
            self._close_views()
            return None, self.base
        return self._views, folded

    def _close_views(self) -> None:
        if self._views is not None:
            self._views.close()
            self._views = None

    def _fold_missing(self, folded: int) -> sqlite3.Connection:
        """The views of all events after `folded`, in memory."""
        newest = self.head().seq
        if newest - folded > self._max_missing:
            raise views_behind(newest - folded)
        is_useful = self._memory_first <= folded <= self._memory_last
        if self._memory is None or not is_useful or newest - self._memory_first > 2 * self._max_missing:
            if self._memory is not None:
                self._memory.close()
            # An empty name is a file without one: the views of a whole segment need not fit into memory.
            self._memory = sqlite3.connect("" if self._views_path is None else ":memory:", isolation_level=None)
            create_views(self._memory, self)
            self._memory_first = self._memory_last = folded
        while self._memory_last < newest:
            events = self.query(_TO_FOLD, (self._memory_last, newest, _STEP))
            if not events:
                break
            self._memory.execute("BEGIN")
            add_events(self._memory, events)
            self._memory.execute("COMMIT")
            self._memory_last = int(events[-1][0])
        return self._memory


def views_behind(missing: int) -> Unavailable:
    """The error while too many events are missing from the views."""
    return Unavailable(
        "views_behind",
        f"{missing:,} events are not in {VIEWS_NAME} yet",
        "retry in a few seconds; the keeper is folding them. Without a keeper, run `signer ledger rebuild`",
        {"missing": missing},
    )


def _numbers(db: sqlite3.Connection, wanted: EventFilter, first: int, end: int) -> Iterator[int]:
    """Numbers of events from `first` on and before `end` that match, among them the newest `limit` of each kind."""
    between = "seq >= ? AND seq < ? ORDER BY seq DESC LIMIT ?"
    span = (first, end if wanted.before is None else min(end, wanted.before), wanted.limit)
    who = () if wanted.identity is None else (wanted.identity,)
    if wanted.takes(ISSUED):
        of = "INDEXED BY certificates_by_identity WHERE identity = ? AND" if who else "NOT INDEXED WHERE"
        for (number,) in db.execute(f"SELECT seq FROM certificates {of} {between}", (*who, *span)):  # noqa: S608
            yield int(number)
    columns = ("about", "actor") if who else ("kind",)
    for kind in [str(kind) for (kind,) in db.execute(_KINDS) if wanted.takes(kind)]:
        for column in columns:
            of = f"{column} = ? AND" if who else ""
            also = "about <> '' AND" if column == "about" else ""
            sql = f"SELECT seq FROM others INDEXED BY others_by_{column} WHERE {of} {also} kind = ? AND {between}"  # noqa: S608
            for (number,) in db.execute(sql, (*who, kind, *span)):
                yield int(number)


def _driver(wanted: Filter) -> tuple[str, str, object]:
    """Table with index, column and value of the filter that usually leaves the fewest rows.

    SQLite has no statistics here and would choose by the number of columns.
    """
    for column in ("fingerprint", "identity"):
        value = getattr(wanted, column)
        if value is not None:
            return f"certificates INDEXED BY certificates_by_{column}", column, value
    if wanted.backend == "vault":
        # A constant, so that SQLite recognizes the condition of this partial index.
        return "certificates INDEXED BY certificates_of_vault", "backend = 'vault' AND 1", 1
    if wanted.principal is not None:
        return "principals", "principal", wanted.principal
    if wanted.role is not None:
        return "certificates INDEXED BY certificates_by_role", "role", wanted.role
    return "certificates NOT INDEXED", "1", 1


def _select(db: sqlite3.Connection, wanted: Filter, floor: int, limit: int) -> Sequence[tuple[Any, ...]]:
    """Rows of `certificates` that match, from event `floor` on, newest first."""
    if wanted.any_of is None or _driver(wanted)[1] not in ("role", "1"):
        return _select_driven(db, wanted, floor, limit)
    # Each principal by its index: rare ones would have a scan look at every certificate.
    found: dict[int, tuple[Any, ...]] = {}
    for principal in wanted.any_of:
        one = replace(wanted, principal=principal, any_of=None)
        found |= {row[0]: row for row in _select_driven(db, one, floor, limit)}
    return [found[seq] for seq in nlargest(limit, found)]


def _select_driven(db: sqlite3.Connection, wanted: Filter, floor: int, limit: int) -> Sequence[tuple[Any, ...]]:
    """The rows by the index of `_driver`."""
    table, column, value = _driver(wanted)
    if column == "principal":
        source, order = "principals p CROSS JOIN certificates c ON c.seq = p.seq", "p.seq"
    else:
        source, order = f"certificates c {table.removeprefix('certificates')}", "c.seq"
    clauses: list[str] = [f"{column} = ?", f"{order} >= ?"]
    values: list[object] = [value, floor]
    holds = "EXISTS (SELECT 1 FROM principals q WHERE q.principal = ? AND q.seq = c.seq)"
    any_of = None if wanted.any_of is None else json.dumps(wanted.any_of)
    holds_one = "EXISTS (SELECT 1 FROM json_each(c.principals) n WHERE n.value IN (SELECT value FROM json_each(?)))"
    is_active = (
        "c.valid_before > ?"
        " AND NOT (c.backend = 'local' AND EXISTS (SELECT 1 FROM withheld v WHERE v.serial = c.serial))"
    )
    for clause, restriction in (
        (f"{order} < ?", wanted.before),
        ("c.identity = ?", wanted.identity),
        ("c.role = ?", wanted.role),
        ("c.fingerprint = ?", wanted.fingerprint),
        ("c.backend = ?", wanted.backend),
        (is_active, wanted.active_at),
        (holds, wanted.principal if column != "principal" else None),
        (holds_one, any_of),
    ):
        if restriction is not None:
            clauses.append(clause)
            values.append(restriction)
    return db.execute(
        f"SELECT {_ISSUED} FROM {source} WHERE {' AND '.join(clauses)} ORDER BY {order} DESC LIMIT ?",  # noqa: S608
        (*values, limit),
    ).fetchall()


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
        raise LedgerBroken(
            "ledger_tables_differ",
            f"{VIEWS_NAME} has an invalid row for event {seq}",
            "stop the keeper and run `signer ledger rebuild`",
        )
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
