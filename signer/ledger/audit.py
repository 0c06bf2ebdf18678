"""Verification, export and rebuild of a ledger.

`check_recent` runs at every start, `verify` on request; both raise `LedgerBroken`, which names the first wrong event.
Only `rebuild` writes, and only the views.
"""

from __future__ import annotations

import os
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from signer.errors import LedgerBroken
from signer.files import open_or_create
from signer.ledger.archived import check_archived, newest_archive
from signer.ledger.chain import entry_hash
from signer.ledger.fold import (
    add_events,
    add_leaves,
    create_views,
    delete_views,
    folded_tree,
    folded_up_to,
    rows_of_views,
)
from signer.ledger.reader import EVENTS_BETWEEN, LedgerReader, broken_at, events_archived, storage_errors
from signer.ledger.schema import FILE_NAME, TREE_STEP, VIEW_INDEXES, VIEWS, VIEWS_NAME, View
from signer.ledger.store import CHECKED_AT_START, Ledger
from signer.ledger.structure import check_structure
from signer.ledger.subtrees import TILE, leaves
from signer.ledger.tree import CompactRange, complete_root
from signer.model import Entry, Head

_EVENTS: Final = "SELECT seq, time, kind, actor, body, prev, hash FROM events"
_CHUNK: Final = 100 * TILE  # events that one task follows and compares; whole subtrees
_PROGRESS_STEP: Final = 20_000  # events between two calls of `progress`
_NO_END: Final = 2**63 - 1
if TYPE_CHECKING:
    from concurrent.futures import Future

    from signer.ledger.checkpoint import Checkpoint

Progress = Callable[[int, int], None]


def check_recent(reader: LedgerReader, count: int = CHECKED_AT_START) -> Head:
    """Checks the chain of the newest `count` events and the structure of the file; returns the head."""
    _check_numbers(reader)
    newest = f"SELECT * FROM ({_EVENTS} WHERE seq > ? ORDER BY seq DESC LIMIT ?) ORDER BY seq"  # noqa: S608 - a constant
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
        folded = _folded(reader)
        bounds = [*range(base, total, _CHUNK), total]
        chunks = list(pairwise(bounds))
        if is_private or len(chunks) <= 1:
            _check_file(reader)
            check_archived(reader)
            found = [_check_chunk(reader, first, last, folded, progress, total) for first, last in chunks]
            _check_views(reader, folded, None)
            _check_views(reader, folded, _counts(found))
        else:
            _verify_in_processes(reader, chunks, folded, progress)
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


def _verify_in_processes(
    reader: LedgerReader, chunks: Sequence[tuple[int, int]], folded: int | None, progress: Progress
) -> None:
    """As many tasks at once as there are processors: Python's lock would let one thread decode at a time."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed  # 1 MB, which the keeper does not need

    path, total, done = (reader.data_dir, reader.file_name), chunks[-1][1], chunks[0][0]
    # Not "fork": SQLite's locks do not survive one.
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
    try:
        file = pool.submit(_check_file_apart, path)
        archived = pool.submit(_check_archived_apart, path)
        tasks: dict[Future[Counts], int] = {
            pool.submit(_check_chunk_apart, path, first, last, folded): last - first for first, last in chunks
        }
        structure = pool.submit(_check_views_apart, path, folded)
        try:
            for task in as_completed(tasks):
                task.result()
                done += tasks[task]
                progress(done, total)
        except LedgerBroken as broken:
            file.result()  # a damaged file explains all other errors
            raise _first_fault(tasks, broken) from None
        file.result()
        archived.result()
        structure.result()
        _check_views(reader, folded, _counts(task.result() for task in tasks))
    finally:
        pool.shutdown(cancel_futures=True)


def _first_fault(tasks: dict[Future[Counts], int], broken: LedgerBroken) -> LedgerBroken:
    """The fault of the first broken chunk; of one that differs from the views only if no event is broken."""
    faults = [fault for task in tasks if isinstance(fault := task.exception(), LedgerBroken)] or [broken]
    return next((fault for fault in faults if fault.code == "ledger_broken"), faults[0])


Counts = dict[str, int]
_Path = tuple[Path, str]  # of a ledger: the folder, and the file's name


def _check_file_apart(path: _Path) -> None:
    with closing(LedgerReader(*path)) as reader:
        _check_file(reader)


def _check_archived_apart(path: _Path) -> None:
    with closing(LedgerReader(*path)) as reader:
        check_archived(reader)


def _check_views_apart(path: _Path, folded: int | None) -> None:
    with closing(LedgerReader(*path)) as reader:
        _check_views(reader, folded, None)


def _check_chunk_apart(path: _Path, first: int, last: int, folded: int | None) -> Counts:
    with closing(LedgerReader(*path)) as reader:
        return _check_chunk(reader, first, last, folded)


def _check_file(reader: LedgerReader) -> None:
    # Not quick_check, which skips the indexes: what decides is found by them. The tables of version 1 do not matter.
    try:
        findings = reader.query("PRAGMA integrity_check(events)")
    except LedgerBroken:  # an index has no entry for a body that is not JSON
        for (bad,) in reader.query("SELECT seq FROM events WHERE NOT json_valid(body) ORDER BY seq LIMIT 1"):
            raise broken_at(bad, "its body is not JSON") from None
        raise
    for (finding,) in findings:
        if finding != "ok":
            raise LedgerBroken("ledger_broken", f"the ledger's file is damaged: {finding}", "restore a backup")


def _check_chunk(
    reader: LedgerReader, first: int, last: int, folded: int | None, progress: Progress | None = None, total: int = 0
) -> Counts:
    """Checks the events after `first` to `last`, and their rows in the views; returns how many each view has."""
    head = reader.start()
    if first > head.seq:
        entry = reader.entry(first)
        head = Head(first, entry.hash, entry.time_ms)
    rows = reader.query(EVENTS_BETWEEN, (first, last))
    reached = check_chain(iter(rows), head)
    if reached.seq != last:
        raise broken_at(reached.seq + 1, "the event is missing")
    if progress is not None:
        progress(last, total)
    if folded is None:
        return {}
    events = [row for row in rows if row[0] <= folded]
    bodies = ((seq, kind, actor, body) for seq, _, kind, actor, body, _, _ in events)
    hashes = [(seq, digest) for seq, *_, digest in events]
    return _compare_rows(reader.data_dir, bodies, hashes, first, min(last, folded))


def check_chain(rows: Iterator[tuple[Any, ...]], head: Head) -> Head:
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


@contextmanager
def _views(data_dir: Path) -> Iterator[sqlite3.Connection]:
    """The views for reading; raises `LedgerBroken` if the file is damaged."""
    try:
        db = sqlite3.connect(f"file:{data_dir / VIEWS_NAME}?mode=ro", uri=True, isolation_level=None, timeout=2)
        with closing(db):
            yield db
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise _views_differ(VIEWS_NAME, str(error)) from None


def _folded(reader: LedgerReader) -> int | None:
    """The last event that the views contain; None if they are missing, or of another version or ledger."""
    if reader.file_name != FILE_NAME or not (reader.data_dir / VIEWS_NAME).exists():
        return None
    with _views(reader.data_dir) as db:
        return folded_up_to(db, reader)


def _compare_rows(
    data_dir: Path,
    events: Iterable[tuple[int, str, str, str]],
    hashes: Sequence[tuple[int, str]],
    first: int,
    last: int,
) -> Counts:
    """Compares the rows of all views for the events after `first` to `last`; returns how many there are.

    `events` are these as (seq, kind, actor, body), `hashes` as (seq, hash).
    """
    wanted = rows_of_views(events)
    with _views(data_dir) as db:
        for view in VIEWS:
            _compare_view(db, view, wanted[view.name], first, last)
        _compare_subtrees(db, hashes, first)
    return {name: len(rows) for name, rows in wanted.items()}


def _compare_subtrees(db: sqlite3.Connection, hashes: Sequence[tuple[int, str]], first: int) -> None:
    """Compares the kept subtrees of the lowest level with the events after `first`, which ends one of them."""
    numbers = range(first // TILE, (first + len(hashes)) // TILE)
    wanted = CompactRange().extend(leaves(hashes[: len(numbers) * TILE]), TREE_STEP)
    found = _kept_subtrees(db, TREE_STEP, numbers.start, numbers.stop)
    for number, (_, _, digest) in zip(numbers, (one for one in wanted if one[0] == TREE_STEP), strict=True):
        if found.get(number) != digest:
            raise _views_differ("subtrees", f"events {number * TILE + 1} to {(number + 1) * TILE}")


def _kept_subtrees(db: sqlite3.Connection, level: int, first: int, last: int) -> dict[int, bytes]:
    rows = db.execute(
        "SELECT number, hash FROM subtrees WHERE level = ? AND number >= ? AND number < ?", (level, first, last)
    )
    return {number: bytes(digest) for number, digest in rows}


def _all_subtrees(db: sqlite3.Connection, reader: LedgerReader, level: int, count: int) -> dict[int, bytes]:
    """The first `count` kept subtrees of a level: the ledger has those of archived events, the views the others."""
    archived = reader.archived_subtrees(level, 0, count)
    return _kept_subtrees(db, level, len(archived), count) | dict(enumerate(archived))


def _check_upper_subtrees(db: sqlite3.Connection, reader: LedgerReader, folded: int) -> None:
    """Compares the kept subtrees of the higher levels with those below them, and how many there are of each level."""
    level, numbers = TREE_STEP, folded >> TREE_STEP
    below = _all_subtrees(db, reader, level, numbers)
    while below:
        level, numbers = level + TREE_STEP, numbers >> TREE_STEP
        found = _all_subtrees(db, reader, level, numbers)
        for number in range(numbers):
            parts = [below[one] for one in range(number * TILE, (number + 1) * TILE)]
            if found.get(number) != complete_root(parts):
                raise _views_differ("subtrees", f"number {number} of level {level}")
        below = found
    for known, most in db.execute("SELECT level, max(number) FROM subtrees GROUP BY level"):
        ends = (most + 1) << known
        is_known = known > 0 and known % TREE_STEP == 0
        if not is_known or ends > db.execute("SELECT seq FROM folded").fetchone()[0]:
            raise _views_differ("subtrees", f"number {most} of level {known}, which no events make")


def _compare_view(
    db: sqlite3.Connection, view: View, wanted: Sequence[tuple[object, ...]], first: int, last: int
) -> None:
    select = f"SELECT * FROM {view.name} WHERE {{}} AND seq > ? AND seq <= ? ORDER BY seq"  # noqa: S608
    at = 0 if view.group is None else 1
    groups: dict[object, list[tuple[object, ...]]] = defaultdict(list)
    for row in wanted:
        groups[None if view.group is None else row[0]].append(row)
    if view.group is None:
        groups.setdefault(None, [])
    for group, rows in groups.items():
        where, values = ("1", ()) if view.group is None else (f"{view.group} = ?", (group,))
        found = db.execute(select.format(where), (*values, first, last)).fetchall()
        if found != rows:
            different = {str(row) for row in found} ^ {str(row) for row in rows}
            seq = min(int(str(row[at])) for row in (*found, *rows) if str(row) in different)
            raise _views_differ(view.name, f"event {seq}")


def _check_views(reader: LedgerReader, folded: int | None, counts: Counts | None) -> None:
    """Checks the structure of the file; with `counts`, that it has no row without an event."""
    if folded is None:
        return
    with _views(reader.data_dir) as db:
        if counts is None:
            for (finding,) in db.execute("PRAGMA integrity_check(1)"):
                if finding != "ok":
                    raise _views_differ(VIEWS_NAME, finding)
            return
        db.execute("BEGIN")
        _check_tree(db, reader, folded)
        for view in VIEWS:
            # A keeper may have folded more since; then those rows are there, and no others.
            counted = "count(*) FILTER (WHERE seq <= ?), count(*) FILTER (WHERE seq > (SELECT seq FROM folded))"
            listed, later = db.execute(f"SELECT {counted} FROM {view.name}", (folded,)).fetchone()  # noqa: S608
            if (listed, later) != (counts.get(view.name, 0), 0):
                raise _views_differ(view.name, f"events {counts.get(view.name, 0)}, view {listed + later}")


def _check_tree(db: sqlite3.Connection, reader: LedgerReader, folded: int) -> None:
    """Checks the tree that a keeper goes on from, and the subtrees above those that chunks were compared with."""
    _check_upper_subtrees(db, reader, folded)
    now = int(db.execute("SELECT seq FROM folded").fetchone()[0])
    # A keeper may have folded events since that this reader's snapshot of the ledger lacks.
    with closing(LedgerReader(reader.data_dir)) as newest:
        if folded_tree(db, newest if now != folded else reader, now) is None:
            raise _views_differ("folded", f"the tree up to event {now} is not that of its subtrees")


def _counts(parts: Iterable[Counts]) -> Counts:
    sums: Counts = defaultdict(int)
    for part in parts:
        for name, count in part.items():
            sums[name] += count
    return sums


def _views_differ(view: str, where: str) -> LedgerBroken:
    return LedgerBroken(
        "ledger_tables_differ",
        f"view {view} differs from the events: {where}",
        "nothing is decided by it; stop the keeper and run `signer ledger rebuild`, which also checks the events",
    )


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
    for row in reader.rows(f"{_EVENTS} WHERE seq >= ? ORDER BY seq", (first,)):
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
