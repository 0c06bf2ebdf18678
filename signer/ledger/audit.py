"""Verification, export and rebuild of a ledger.

`check_recent` runs at every start, `verify` on request; both raise `LedgerBroken`, which names the first wrong event.
Only `rebuild` writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

from signer.errors import LedgerBroken
from signer.ledger.chain import GENESIS, derived_rows, entry_hash
from signer.ledger.reader import LedgerReader, broken_at, storage_errors
from signer.ledger.store import CHECKED_AT_START, DERIVED, Ledger
from signer.model import Entry, Head

_EVENTS: Final = "SELECT seq, time, kind, actor, body, prev, hash FROM events"
_PROGRESS_STEP: Final = 20_000  # events between two calls of `progress`
_CHUNK: Final = 25_000  # events whose rows are compared by one statement
_NO_END: Final = 2**63 - 1
Progress = Callable[[int, int], None]


def check_recent(reader: LedgerReader, count: int = CHECKED_AT_START) -> Head:
    """Checks the chain of the newest `count` events, and compares the tables with them; returns the head."""
    newest = f"SELECT * FROM ({_EVENTS} ORDER BY seq DESC LIMIT ?) ORDER BY seq"  # noqa: S608 - a constant
    rows = reader.query(newest, (count + 1,))
    if not rows:
        _compare_tables(reader, 0)
        return Head(0, GENESIS, 0)
    first_seq, first_time, *_, _first_prev, first_hash = rows[0]
    if len(rows) <= count:  # the whole ledger: the chain must start at the genesis hash
        head = _follow_chain(iter(rows), Head(0, GENESIS, 0))
        since = 0
    else:
        head = _follow_chain(iter(rows[1:]), Head(first_seq, first_hash, first_time))
        since = first_seq + 1
    _compare_tables(reader, since)
    return head


def verify(reader: LedgerReader, progress: Progress = lambda _done, _all: None, saved: Head | None = None) -> Head:
    """Checks the chain of all events, all tables against the events, and the structure of the file; returns the head.

    A `saved` head of an earlier time detects a truncated ledger. Raises `LedgerBroken`.
    """
    is_private = reader.connection().in_transaction  # then other connections do not see the same data
    with _snapshot(reader):
        total = reader.head().seq
        if is_private or total <= _CHUNK:
            _check_file(reader)
            head = _follow_all(reader, progress, total)
            _compare_tables(reader, 0)
        else:
            head = _verify_in_threads(reader, progress, total)
        if saved is not None:
            _compare_head(reader, saved, head)
        return head


@contextmanager
def _snapshot(reader: LedgerReader) -> Iterator[None]:
    """Gives all reads one snapshot of the ledger, while a keeper may write."""
    db = reader.connection()
    if db.in_transaction:
        yield
        return
    with storage_errors():
        db.execute("BEGIN")
    try:
        yield
    finally:
        with storage_errors():
            db.execute("ROLLBACK")


def _verify_in_threads(reader: LedgerReader, progress: Progress, total: int) -> Head:
    """Checks the chain in this thread, and file and tables in others: SQLite runs in C, without Python's lock."""
    path = Path(reader.query("PRAGMA database_list")[0][2])
    bounds = [*range(_CHUNK, total, _CHUNK), _NO_END]
    chunks = zip([0, *bounds], bounds, strict=False)
    checks = [partial(_compare_rows, since=since, end=end) for since, end in chunks]
    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="verify")
    try:
        file = pool.submit(_on_own_connection, path, _check_file)
        tables = [
            pool.submit(_on_own_connection, path, check) for check in (*checks, partial(_compare_counts, since=0))
        ]
        try:
            head = _follow_all(reader, progress, total)
        except LedgerBroken:
            file.result()  # a damaged file explains all other errors
            raise
        for done in (file, *tables):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return head


def _on_own_connection(path: Path, check: Callable[[LedgerReader], None]) -> None:
    """Runs a check on its own connection and snapshot, which contains everything that the check compares."""
    reader = LedgerReader(path.parent)
    try:
        with _snapshot(reader):
            check(reader)
    finally:
        reader.close()


def _check_file(reader: LedgerReader) -> None:
    # Not quick_check, which skips the indexes: a page of certificates may be read from an index alone.
    for (finding,) in reader.rows("PRAGMA integrity_check(1)"):
        if finding != "ok":
            raise LedgerBroken("ledger_broken", f"the ledger's file is damaged: {finding}", "restore a backup")


def _follow_all(reader: LedgerReader, progress: Progress, total: int) -> Head:
    head = Head(0, GENESIS, 0)
    rows = reader.rows(f"{_EVENTS} ORDER BY seq")
    while chunk := list(islice(rows, _PROGRESS_STEP)):
        head = _follow_chain(iter(chunk), head)
        progress(head.seq, total)
    return head


def _follow_chain(rows: Iterator[tuple[Any, ...]], head: Head) -> Head:
    """Checks `rows` as the continuation of the chain after `head`; returns the new head. Raises `LedgerBroken`."""
    expected, prev, last_time = head.seq + 1, head.hash, head.time_ms
    for seq, time_ms, kind, actor, body, row_prev, row_hash in rows:
        if seq != expected:
            raise broken_at(expected, "the event is missing" if seq > expected else "an event is out of order")
        if row_prev != prev:
            raise broken_at(seq, "its prev is not the hash of the previous event")
        if row_hash != entry_hash(seq, time_ms, kind, actor, body, row_prev):
            raise broken_at(seq, "its content does not match its hash")
        if time_ms < last_time:
            raise broken_at(seq, "its time is before the previous event's")
        expected, prev, last_time = seq + 1, row_hash, time_ms
    return Head(expected - 1, prev, last_time)


# Each statement finds the first event that differs from a derived table. SQLite parses the JSON ten times as fast as
# Python. Parameters: the first event of the range, and the first one after it.
_WRONG_ROW: Final = """
    SELECT e.seq FROM events e LEFT JOIN certificates c ON c.seq = e.seq
    WHERE e.seq >= :seq AND e.seq < :end AND e.kind = 'certificate.issued' AND (
        c.serial IS NOT e.body ->> 'serial' OR c.backend IS NOT e.body ->> 'backend'
        OR c.identity IS NOT e.body ->> 'identity' OR c.role IS NOT e.body ->> 'role'
        OR c.principals IS NOT e.body -> 'principals' OR c.fingerprint IS NOT e.body ->> 'fingerprint'
        OR c.key_id IS NOT e.body ->> 'key_id' OR c.valid_after IS NOT e.body ->> 'valid_after'
        OR c.valid_before IS NOT e.body ->> 'valid_before')
    ORDER BY e.seq LIMIT 1"""
_WRONG_WITHHELD: Final = """
    SELECT e.seq FROM events e LEFT JOIN certificates c ON c.serial = e.body ->> 'serial' AND c.backend = 'local'
    WHERE e.seq >= :seq AND e.seq < :end AND e.kind = 'certificate.withheld' AND c.withheld IS NOT 1
    ORDER BY e.seq LIMIT 1"""
_WRONG_PRINCIPAL: Final = """
    SELECT c.seq FROM certificates c, json_each(c.principals) wanted WHERE c.seq >= :seq AND c.seq < :end
        AND NOT EXISTS (SELECT 1 FROM principals p WHERE p.principal = wanted.value AND p.seq = c.seq) LIMIT 1"""
# Rows without an event show in the counts: pairs of (by events, in the table).
_COUNTS: Final = """
    SELECT (SELECT count(*) FROM events WHERE seq >= :seq AND kind = 'certificate.issued'),
           (SELECT count(*) FROM certificates WHERE seq >= :seq),
           (SELECT count(*) FROM events e JOIN certificates c
                ON c.serial = e.body ->> 'serial' AND c.backend = 'local'
                WHERE e.seq >= :seq AND e.kind = 'certificate.withheld' AND c.seq >= :seq),
           (SELECT count(*) FROM certificates WHERE seq >= :seq AND withheld <> 0)"""
_PRINCIPAL_COUNTS: Final = (
    "SELECT (SELECT sum(json_array_length(principals)) FROM certificates), (SELECT count(*) FROM principals)"
)


def _compare_tables(reader: LedgerReader, since: int) -> None:
    """Raises `LedgerBroken` if a derived table differs from the events from `since` on."""
    _compare_rows(reader, since, _NO_END)
    _compare_counts(reader, since)


def _compare_rows(reader: LedgerReader, since: int, end: int) -> None:
    """Finds events from `since` to before `end` that are missing from the tables or differ there."""
    for what, statement in (
        ("certificates", _WRONG_ROW),
        ("certificates", _WRONG_WITHHELD),
        ("principals", _WRONG_PRINCIPAL),
    ):
        for (seq,) in reader.named(statement, {"seq": since, "end": end}):
            raise _table_differs(what, f"event {seq}")


def _compare_counts(reader: LedgerReader, since: int) -> None:
    """Finds rows without an event, by the counts of the events from `since` on."""
    issued, rows, withheld, withheld_rows = reader.named(_COUNTS, {"seq": since})[0]
    if (issued, withheld) != (rows, withheld_rows):
        raise _table_differs(
            "certificates", f"events {issued} issued and {withheld} withheld, table {rows} and {withheld_rows}"
        )
    if since == 0:
        named, listed = reader.query(_PRINCIPAL_COUNTS)[0]
        if (named or 0) != listed:
            raise _table_differs("principals", f"events {named}, table {listed}")
    _compare_freezes(reader)


def _compare_freezes(reader: LedgerReader) -> None:
    """Compares all freezes, at a start too: a missing one would let a frozen caller in, and they are few."""
    wanted: dict[str, tuple[int, str, str]] = {}
    for seq, kind, actor, scope, reason in reader.query(
        "SELECT seq, kind, actor, body ->> 'scope', body ->> 'reason' FROM events"
        " WHERE kind IN ('freeze.set', 'freeze.lifted') ORDER BY seq"
    ):
        if kind == "freeze.set":
            wanted[scope] = (seq, actor, reason)
        else:
            wanted.pop(scope, None)
    rows = {scope: facts for scope, *facts in reader.query("SELECT scope, seq, actor, reason FROM freezes")}
    for scope in sorted(wanted.keys() | rows.keys()):
        if list(wanted.get(scope, ())) != rows.get(scope, []):
            raise _table_differs("freezes", scope)


def _table_differs(table: str, where: str) -> LedgerBroken:
    return LedgerBroken(
        "ledger_tables_differ",
        f"table {table} differs from the events: {where}",
        "stop the keeper and run `signer ledger rebuild`, which also checks the events",
    )


def _compare_head(reader: LedgerReader, saved: Head, head: Head) -> None:
    if saved.seq > head.seq:
        raise broken_at(head.seq + 1, f"the ledger ends here, but the saved head has event {saved.seq}")
    if saved.seq and reader.entry(saved.seq).hash != saved.hash:
        raise broken_at(saved.seq, "it differs from the saved head")


def export(reader: LedgerReader, first: int = 1) -> Iterator[Entry]:
    """Yields every entry from number `first` on, in order, without verification."""
    for row in reader.rows(f"{_EVENTS} WHERE seq >= ? ORDER BY seq", (first,)):
        yield Entry(*row)


def rebuild(ledger: Ledger, progress: Progress = lambda _done, _all: None) -> int:
    """Rebuilds the derived tables from the events in one transaction; returns the number of events.

    Checks the chain as it reads: if an event was changed, raises `LedgerBroken` and keeps the tables.
    """
    total = ledger.head().seq
    db = ledger.connection()
    head = Head(0, GENESIS, 0)
    with storage_errors():
        db.execute("BEGIN IMMEDIATE")
        try:
            for table in DERIVED:
                db.execute(f"DELETE FROM {table}")  # noqa: S608 - names from a constant tuple
            for row in ledger.rows(f"{_EVENTS} ORDER BY seq"):
                head = _follow_chain(iter((row,)), head)
                for sql, values in _rows_of(Entry(*row)):
                    db.execute(sql, values)
                if head.seq % _PROGRESS_STEP == 0:
                    progress(head.seq, total)
        except LedgerBroken:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")
    return head.seq


def _rows_of(entry: Entry) -> list[tuple[str, tuple[object, ...]]]:
    """The rows of an event; raises `LedgerBroken` if its body is malformed despite a correct hash."""
    try:
        return list(derived_rows(entry, json.loads(entry.body)))
    except (ValueError, KeyError, TypeError):
        raise broken_at(entry.seq, f"it is not a valid {entry.kind} event") from None
