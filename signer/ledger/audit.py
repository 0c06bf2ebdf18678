"""Verification, export and rebuild of a ledger.

`check_recent` runs at every start, `verify` on request; both raise `LedgerBroken`, which names the first wrong event.
Only `rebuild` writes, and only the views.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

from signer.errors import LedgerBroken, Unavailable
from signer.files import open_or_create
from signer.ledger.archived import check_archived, held_rows, newest_archive
from signer.ledger.chain import linked_hash, quote
from signer.ledger.comparison import Listed, check_counts, check_views_file, comparing, count_rows, last_folded
from signer.ledger.fold import add_events, add_leaves, create_views, delete_views
from signer.ledger.indexes import (
    IndexEntries,
    check_bodies,
    check_entries,
    check_file,
    check_json,
    check_structure,
    known_indexes,
)
from signer.ledger.reader import EVENTS_BETWEEN, ROWS, LedgerReader, broken_at, events_archived, storage_errors
from signer.ledger.schema import TREE_STEP, VIEW_INDEXES, VIEWS, VIEWS_NAME, EventIndex
from signer.ledger.store import CHECKED_AT_START, Ledger
from signer.ledger.subtrees import TILE, leaves
from signer.ledger.tree import CompactRange
from signer.model import Entry, Head

_CHUNK: Final = 100 * TILE  # events that one task follows and compares; whole subtrees
if TYPE_CHECKING:
    from signer.ledger.checkpoint import Checkpoint

Progress = Callable[[int, int], None]


def check_recent(reader: LedgerReader, count: int = CHECKED_AT_START) -> Head:
    """Checks the chain of the newest `count` events and the structure of the file; returns the head."""
    _check_numbers(reader)
    newest = f"SELECT * FROM ({ROWS} WHERE seq > ? ORDER BY seq DESC LIMIT ?) ORDER BY seq"  # noqa: S608 - a constant
    rows = reader.query(newest, (reader.base, count + 1))
    if reader.base:
        newest_archive(reader)
    if len(rows) <= count:  # the whole ledger: the chain must start at the genesis hash, or at what was archived
        head = check_chain(iter(rows), reader.start())
    else:
        first_seq, first_time, *_, _first_prev, first_hash = rows[0]
        head = check_chain(iter(rows[1:]), Head(first_seq, first_hash, first_time))
    _check_structure(reader)
    return head


def _check_numbers(reader: LedgerReader) -> None:
    """Raises `LedgerBroken` for an event before the first one, which no chain leads to and which would decide."""
    for (seq,) in reader.query("SELECT seq FROM events WHERE seq < 1 ORDER BY seq LIMIT 1"):
        raise broken_at(seq, "events are numbered from 1")


def _check_structure(reader: LedgerReader) -> None:
    with storage_errors():
        check_structure(reader.connection())


def verify(
    reader: LedgerReader,
    progress: Progress = lambda _done, _all: None,
    saved: Head | None = None,
    checkpoint: Checkpoint | None = None,
) -> Head:
    """Checks the chain of all events, all views against the events, and the structure of both files; returns the head.

    A `saved` head or a `checkpoint` of an earlier time detects a ledger that was truncated or rewritten as a whole; the
    caller has checked the checkpoint's signatures. Raises `LedgerBroken`. Views that are missing, or of
    another version or ledger, are left out: the keeper deletes them at its start.
    """
    is_private = reader.connection().in_transaction  # then other connections do not see the same data
    with _snapshot(reader):
        _check_numbers(reader)
        total, base = reader.head().seq, reader.base
        folded = last_folded(reader)
        indexes = known_indexes(reader) or ()
        bounds = [*range(base, total, _CHUNK), total]
        chunks = list(pairwise(bounds))
        if is_private or len(chunks) <= 1:
            check_file(reader)
            kept = _check_archived(reader, indexes)
            if folded is not None:
                check_views_file(reader.data_dir)
            found = [
                _check_chunk(reader, first, last, folded, indexes, progress=progress, total=total)
                for first, last in chunks
            ]
            listed = None if folded is None else count_rows(reader, folded)
        else:
            kept, found, listed = _check_in_processes(reader, chunks, folded, indexes, progress)
        counts = _sum([kept, *found])
        check_entries(reader, indexes, counts)
        if listed is not None:
            check_counts(listed, counts)
        head = reader.head()
        if saved is not None:
            _compare_head(reader, saved, head)
        if checkpoint is not None:
            _compare_checkpoint(reader, checkpoint, head)
        _check_restores(reader)
        _check_structure(reader)  # last: a fault of an event says more
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


def _check_in_processes(
    reader: LedgerReader,
    chunks: Sequence[tuple[int, int]],
    folded: int | None,
    indexes: Sequence[EventIndex],
    progress: Progress,
) -> tuple[Counts, list[Counts], Listed | None]:
    """As many tasks at once as there are processors: Python's lock would let one thread decode at a time."""
    path, total, done = (reader.data_dir, reader.file_name), chunks[-1][1], chunks[0][0]
    # Not "fork": SQLite's locks do not survive one. A chunk makes no garbage that only the collector finds.
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), initializer=gc.disable)
    try:
        # The longest task first.
        views = None if folded is None else pool.submit(check_views_file, reader.data_dir, is_mapped=True)
        file = pool.submit(_apart, check_file, path)
        archived = pool.submit(_apart, _check_archived, path, indexes)
        tasks = {
            pool.submit(_apart, _check_chunk, path, first, last, folded, indexes): last - first
            for first, last in chunks
        }
        listed = None if folded is None else pool.submit(_apart, count_rows, path, folded)
        try:
            for task in as_completed(tasks):
                task.result()
                done += tasks[task]
                progress(done, total)
        except LedgerBroken as broken:
            file.result()  # a damaged file explains all other errors
            raise _first_fault(tasks, broken) from None
        file.result()
        kept = archived.result()
        if views is not None:
            views.result()
        found = [task.result() for task in tasks]
        return kept, found, None if listed is None else listed.result()
    except BrokenProcessPool:
        raise Unavailable(
            "ledger_unavailable",
            "the ledger cannot be used: the system ended a process that verified it",
            "see the system's log: the disk may fail, or memory may be short",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _first_fault(tasks: dict[Future[Counts], int], broken: LedgerBroken) -> LedgerBroken:
    """The fault of the first broken chunk; of one that differs from the views only if no event is broken."""
    faults = [fault for task in tasks if isinstance(fault := task.exception(), LedgerBroken)] or [broken]
    return next((fault for fault in faults if fault.code == "ledger_broken"), faults[0])


Counts = dict[str, int]
_Path = tuple[Path, str]  # of a ledger: the folder, and the file's name
_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")


def _apart(
    check: Callable[Concatenate[LedgerReader, _Rest], _Result], path: _Path, *rest: _Rest.args, **named: _Rest.kwargs
) -> _Result:
    """Runs a check in another process, with its own reader and snapshot: a keeper may change the file's indexes."""
    with closing(LedgerReader(*path)) as reader, _snapshot(reader):
        return check(reader, *rest, **named)


def _check_archived(reader: LedgerReader, indexes: Sequence[EventIndex]) -> Counts:
    """Checks what is kept of archived events, and their entries in the indexes; returns how many, by index."""
    check_archived(reader)
    entries = IndexEntries(reader, indexes)
    if reader.base:
        entries.add(held_rows(reader, 0, reader.base))
    return entries.finish()


def _check_chunk(
    reader: LedgerReader,
    first: int,
    last: int,
    folded: int | None,
    indexes: Sequence[EventIndex],
    *,
    progress: Progress | None = None,
    total: int = 0,
) -> Counts:
    """Checks the events after `first` to `last`, their entries in the indexes, and their rows in the views.

    Returns how many entries and rows there are, by the name of the index or view. Reads a subtree's events at a time:
    what fits into the processor's cache takes two thirds of the time.
    """
    head = reader.start()
    if first > head.seq:
        entry = reader.entry(first)
        head = Head(first, entry.hash, entry.time_ms)
    entries = IndexEntries(reader, indexes)
    with comparing(reader, first, folded) as views:
        for start in range(first, last, TILE):
            end = min(start + TILE, last)
            rows = reader.query(EVENTS_BETWEEN, (start, end))
            head = check_chain(iter(rows), head)
            if head.seq != end:
                raise broken_at(head.seq + 1, "the event is missing")
            entries.add(rows)
            if views is not None:
                views.add(rows)
            if folded is None or folded < end:
                check_bodies(reader, rows)
        counts = entries.finish()
        if progress is not None:
            progress(last, total)
        if views is None:
            return counts
        try:
            return counts | views.finish()
        except LedgerBroken as broken:
            if broken.code == "ledger_broken":  # an event that no view can be made from
                check_json(reader)
            raise


def check_chain(rows: Iterator[tuple[Any, ...]], head: Head) -> Head:
    """Checks `rows` as the continuation of the chain after `head`; returns the new head. Raises `LedgerBroken`."""
    expected, prev, link, last_time = head.seq + 1, head.hash, quote(head.hash), head.time_ms
    for seq, time_ms, kind, actor, body, row_prev, row_hash in rows:
        if seq != expected:
            raise broken_at(expected, "the event is missing" if seq > expected else "an event is out of order")
        if row_prev != prev:
            raise broken_at(seq, "its prev is not the hash of the previous event")
        if row_hash != linked_hash(seq, time_ms, kind, actor, body, link):
            raise broken_at(seq, "its content does not match its hash")
        if time_ms < last_time:
            raise broken_at(seq, "its time is before the previous event's")
        expected, prev, link, last_time = seq + 1, row_hash, f'"{row_hash}"', time_ms
    return Head(expected - 1, prev, last_time)


def _sum(parts: Iterable[Counts]) -> Counts:
    sums: Counts = defaultdict(int)
    for part in parts:
        for name, count in part.items():
            sums[name] += count
    return sums


def _compare_head(reader: LedgerReader, saved: Head, head: Head) -> None:
    if saved.seq > head.seq:
        broken = broken_at(head.seq + 1, f"the ledger ends here, but the saved head has event {saved.seq}")
    elif saved.seq and reader.hash_at(saved.seq) != saved.hash:
        broken = broken_at(saved.seq, "it differs from the saved head")
    else:
        return
    raise _head_lost(reader, saved.seq, "saved head") or broken


def _head_lost(reader: LedgerReader, seq: int, what: str) -> LedgerBroken | None:
    """The error if a restore that is recorded has lost event `seq`, the newest one of what was saved."""
    for restored in reader.restores():
        if restored.seq <= seq:
            lost = "" if restored.lost_seq is None else f", which lost all to {restored.lost_seq}"
            return LedgerBroken(
                "ledger_head_lost",
                f"event {seq} of the {what} was lost when a backup was restored: event {restored.seq}{lost}",
                "the restore is recorded: if it was yours, compare with a newer one, or one from before the backup",
                {"seq": seq},
            )
    return None


def _check_restores(reader: LedgerReader) -> None:
    """Raises `LedgerBroken` if a serial that a restore skipped was given afterwards."""
    for restored in reader.restores():
        rows = reader.query(
            "SELECT seq, body ->> 'serial' FROM events WHERE seq > ? AND kind = 'certificate.issued'"
            " AND body ->> 'backend' = 'local' ORDER BY seq LIMIT 1",  # serials rise, so the others are higher
            (restored.seq,),
        )
        for seq, serial in rows:
            if int(serial) <= restored.last_serial:
                raise broken_at(seq, f"its serial {serial} is one that the restore of event {restored.seq} skipped")


def _compare_checkpoint(reader: LedgerReader, saved: Checkpoint, head: Head) -> None:
    """Compares the Merkle tree over the events themselves, whatever the views have."""
    if saved.size > head.seq:
        how = f"it ends at event {head.seq}, but the checkpoint has {saved.size} events"
        raise _head_lost(reader, saved.size, "saved checkpoint") or _differs(how)
    tree = CompactRange()
    for first in range(0, saved.size, _CHUNK):
        events = reader.hashes(first, min(first + _CHUNK, saved.size))
        tree.extend(leaves(events), TREE_STEP)
    if tree.size != saved.size or tree.root() != saved.root:
        how = f"events 1 to {saved.size} are not those of the checkpoint"
        raise _head_lost(reader, saved.size, "saved checkpoint") or _differs(how)


def _differs(how: str) -> LedgerBroken:
    return LedgerBroken(
        "ledger_differs_from_checkpoint",
        f"the ledger was rewritten or cut off: {how}",
        "keep ledger and checkpoint unchanged, and compare both with a backup: see runbooks/ledger.md",
    )


def export(reader: LedgerReader, first: int = 1) -> Iterator[Entry]:
    """Yields every entry from number `first` on, in order, unverified; raises `NotFound` for archived ones."""
    if first <= reader.base:
        raise events_archived(first, reader.base)
    for row in reader.rows(f"{ROWS} WHERE seq >= ? ORDER BY seq", (first,)):
        yield Entry(*row)


def rebuild(ledger: Ledger, progress: Progress = lambda _done, _all: None) -> tuple[int, Counts]:
    """Folds all events into new views that replace the old ones; returns the number of events, and of rows by view.

    Checks the chain as it reads: if an event was changed, raises `LedgerBroken` and keeps the views. `ledger` must
    not be folding.
    """
    _check_numbers(ledger)
    total = ledger.head().seq
    path, new = ledger.data_dir / VIEWS_NAME, ledger.data_dir / f"{VIEWS_NAME}.new"
    with storage_errors():
        delete_views(new)
        os.close(open_or_create(new))
        with closing(sqlite3.connect(new, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = OFF")
            db.execute("PRAGMA synchronous = OFF")
            db.execute("BEGIN EXCLUSIVE")
            tree, head = create_views(db, ledger, with_indexes=False), ledger.start()
            for first in range(head.seq, total, _CHUNK):
                rows = ledger.query(EVENTS_BETWEEN, (first, first + _CHUNK))
                head = check_chain(iter(rows), head)
                add_events(db, ((seq, kind, actor, body) for seq, _, kind, actor, body, _, _ in rows))
                add_leaves(db, tree, [(seq, digest) for seq, *_, digest in rows])
                progress(head.seq, total)
            for index in VIEW_INDEXES:
                db.execute(index)
            db.execute("UPDATE folded SET seq = ?, hash = ?, tree = ?", (head.seq, head.hash, tree.to_bytes()))
            db.execute("COMMIT")
            count = "SELECT count(*) FROM {}"
            counts = {view.name: int(db.execute(count.format(view.name)).fetchone()[0]) for view in VIEWS}
        delete_views(path)
        new.rename(path)
    return head.seq, counts
