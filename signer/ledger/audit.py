"""Does the ledger hold what was put into it? Checking, exporting and rebuilding, for a person who does not trust it.

`check_recent` runs at every start, `verify` on request; both raise `LedgerBroken` naming the first event that is
wrong. Reads only, but for `rebuild`.
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
_STEP: Final = 20_000  # events between two calls of `progress`
_PIECE: Final = 25_000  # events whose rows are compared in one go
_NO_END: Final = 2**63 - 1
Progress = Callable[[int, int], None]


def check_recent(reader: LedgerReader, count: int = CHECKED_AT_START) -> Head:
    """Checks the chain over the newest `count` events, and the tables against them."""
    newest = f"SELECT * FROM ({_EVENTS} ORDER BY seq DESC LIMIT ?) ORDER BY seq"  # noqa: S608 - a constant
    rows = reader.query(newest, (count + 1,))
    if not rows:
        _compare_tables(reader, 0)
        return Head(0, GENESIS, 0)
    first_seq, first_time, *_, _first_prev, first_hash = rows[0]
    if len(rows) <= count:  # the whole ledger: the chain must begin at its beginning
        head = _walk(iter(rows), Head(0, GENESIS, 0))
        since = 0
    else:
        head = _walk(iter(rows[1:]), Head(first_seq, first_hash, first_time))
        since = first_seq + 1
    _compare_tables(reader, since)
    return head


def verify(reader: LedgerReader, progress: Progress = lambda _done, _all: None, saved: Head | None = None) -> Head:
    """Checks every event's hash and place, every table against the events, and the file's own structure.

    `saved` is a head written down earlier: it finds a tail that was cut off. Raises `LedgerBroken`.
    """
    is_private = reader.connection().in_transaction  # then no other connection sees what this one does
    with _snapshot(reader):
        total = reader.head().seq
        if is_private or total <= _PIECE:
            _check_file(reader)
            head = _walk_all(reader, progress, total)
            _compare_tables(reader, 0)
        else:
            head = _verify_in_threads(reader, progress, total)
        if saved is not None:
            _compare_head(reader, saved, head)
        return head


@contextmanager
def _snapshot(reader: LedgerReader) -> Iterator[None]:
    """All reads within see the ledger as it is now, while a keeper goes on writing."""
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
    """Here the chain, in Python; aside, in threads of their own, what SQLite does in C without holding up Python."""
    path = Path(reader.query("PRAGMA database_list")[0][2])
    bounds = [*range(_PIECE, total, _PIECE), _NO_END]
    pieces = zip([0, *bounds], bounds, strict=False)
    checks = [partial(_compare_rows, since=since, end=end) for since, end in pieces]
    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="verify")
    try:
        file = pool.submit(_aside, path, _check_file)
        tables = [pool.submit(_aside, path, check) for check in (*checks, partial(_compare_sums, since=0))]
        try:
            head = _walk_all(reader, progress, total)
        except LedgerBroken:
            file.result()  # a damaged file explains whatever else is wrong
            raise
        for done in (file, *tables):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return head


def _aside(path: Path, check: Callable[[LedgerReader], None]) -> None:
    """A check on a connection of its own, with a snapshot of its own: what it compares is all in there."""
    reader = LedgerReader(path.parent)
    try:
        with _snapshot(reader):
            check(reader)
    finally:
        reader.close()


def _check_file(reader: LedgerReader) -> None:
    # Not quick_check: that one leaves out the indexes, and a page of certificates may be read from an index alone.
    for (finding,) in reader.rows("PRAGMA integrity_check(1)"):
        if finding != "ok":
            raise LedgerBroken("ledger_broken", f"the ledger's file is damaged: {finding}", "restore a backup")


def _walk_all(reader: LedgerReader, progress: Progress, total: int) -> Head:
    head = Head(0, GENESIS, 0)
    rows = reader.rows(f"{_EVENTS} ORDER BY seq")
    while piece := list(islice(rows, _STEP)):
        head = _walk(iter(piece), head)
        progress(head.seq, total)
    return head


def _walk(rows: Iterator[tuple[Any, ...]], head: Head) -> Head:
    """Follows the chain from `head` through `rows`; the one loop that decides whether events are what they were."""
    expected, prev, last_time = head.seq + 1, head.hash, head.time_ms
    for seq, time_ms, kind, actor, body, row_prev, row_hash in rows:
        if seq != expected:
            raise broken_at(expected, "the event is missing" if seq > expected else "an event is out of order")
        if row_prev != prev:
            raise broken_at(seq, "it does not follow the event before it")
        if row_hash != entry_hash(seq, time_ms, kind, actor, body, row_prev):
            raise broken_at(seq, "its content does not match its hash")
        if time_ms < last_time:
            raise broken_at(seq, "its time is before the event's before it")
        expected, prev, last_time = seq + 1, row_hash, time_ms
    return Head(expected - 1, prev, last_time)


# Each statement finds the first event that a derived table does not repeat. SQLite reads the JSON, in C: ten times
# as fast as reading it here. Parameters: the first event of the part that is compared, and the first after it.
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
# Rows that no event stands behind show in the counts: (events say, tables say).
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
    """Raises `LedgerBroken` if a derived table says anything else than the events from `since` on."""
    _compare_rows(reader, since, _NO_END)
    _compare_sums(reader, since)


def _compare_rows(reader: LedgerReader, since: int, end: int) -> None:
    """What the events from `since` to before `end` say, against the tables."""
    for what, statement in (
        ("certificates", _WRONG_ROW),
        ("certificates", _WRONG_WITHHELD),
        ("principals", _WRONG_PRINCIPAL),
    ):
        for (seq,) in reader.named(statement, {"seq": since, "end": end}):
            raise _table_differs(what, f"event {seq}")


def _compare_sums(reader: LedgerReader, since: int) -> None:
    """What the tables say against the events from `since` on: nothing may be there that no event put there."""
    issued, rows, withheld, withheld_rows = reader.named(_COUNTS, {"seq": since})[0]
    if (issued, withheld) != (rows, withheld_rows):
        raise _table_differs(
            "certificates", f"{issued} issued and {withheld} withheld there, {rows} and {withheld_rows} here"
        )
    if since == 0:
        named, listed = reader.query(_PRINCIPAL_COUNTS)[0]
        if (named or 0) != listed:
            raise _table_differs("principals", f"{named} there, {listed} here")
    _compare_freezes(reader)


def _compare_freezes(reader: LedgerReader) -> None:
    """All of them, also at a start: there are few, an index finds them, and one that is missing lets somebody in."""
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
        f"table {table} does not say what the events say: {where}",
        "stop the keeper and run `signer ledger rebuild`; if events are wrong too, `signer ledger verify` says where",
    )


def _compare_head(reader: LedgerReader, saved: Head, head: Head) -> None:
    if saved.seq > head.seq:
        raise broken_at(head.seq + 1, f"the ledger ends here, but it once had {saved.seq} events")
    if saved.seq and reader.entry(saved.seq).hash != saved.hash:
        raise broken_at(saved.seq, "it is not the event of the saved head")


def export(reader: LedgerReader, first: int = 1) -> Iterator[Entry]:
    """Every entry from number `first` on, in order, unverified."""
    for row in reader.rows(f"{_EVENTS} WHERE seq >= ? ORDER BY seq", (first,)):
        yield Entry(*row)


def rebuild(ledger: Ledger, progress: Progress = lambda _done, _all: None) -> int:
    """Makes the derived tables anew from the events, in one transaction; returns how many events were read.

    The chain is checked on the way: tables are never made from events that were changed.
    """
    total = ledger.head().seq
    db = ledger.connection()
    head = Head(0, GENESIS, 0)
    with storage_errors():
        db.execute("BEGIN IMMEDIATE")
        try:
            for table in DERIVED:
                db.execute(f"DELETE FROM {table}")  # noqa: S608 - names from our own tuple
            for row in ledger.rows(f"{_EVENTS} ORDER BY seq"):
                head = _walk(iter((row,)), head)
                for sql, values in _rows_of(Entry(*row)):
                    db.execute(sql, values)
                if head.seq % _STEP == 0:
                    progress(head.seq, total)
        except LedgerBroken:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")
    return head.seq


def _rows_of(entry: Entry) -> list[tuple[str, tuple[object, ...]]]:
    """What an event means for the tables; whoever wrote it with a right hash may still have written nonsense."""
    try:
        return list(derived_rows(entry, json.loads(entry.body)))
    except (ValueError, KeyError, TypeError):
        raise broken_at(entry.seq, f"it is no {entry.kind} event that this program would write") from None
