"""Compares the views with the events that they were folded from. Only reads.

`Comparison` compares the rows of some events, `check_views_file` the file's structure; `count_rows` and `check_counts`
find what only the whole shows: rows without an event, and the upper levels of the Merkle tree.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

from signer.errors import LedgerBroken
from signer.ledger.fold import folded_tree, folded_up_to, rows_of_views
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME, TREE_STEP, VIEWS, VIEWS_NAME, Row, View
from signer.ledger.subtrees import TILE, leaves
from signer.ledger.tree import CompactRange, Subtree, complete_root

_MAPPED_BYTES: Final = 1 << 40  # SQLite maps as much of it as it was built for
Listed = dict[str, tuple[int, int]]
"""How many rows each view has for the events that were compared, and for events that it has not folded."""


@contextmanager
def open_views(data_dir: Path) -> Iterator[sqlite3.Connection]:
    """The views for reading; raises `LedgerBroken` if the file is damaged."""
    try:
        db = sqlite3.connect(f"file:{data_dir / VIEWS_NAME}?mode=ro", uri=True, isolation_level=None, timeout=2)
        with closing(db):
            yield db
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise _views_differ(VIEWS_NAME, str(error)) from None


def last_folded(reader: LedgerReader) -> int | None:
    """The last event that the views contain; None if they are missing, or of another version or ledger."""
    if reader.file_name != FILE_NAME or not (reader.data_dir / VIEWS_NAME).exists():
        return None
    with open_views(reader.data_dir) as db:
        return folded_up_to(db, reader)


@contextmanager
def comparing(reader: LedgerReader, first: int, folded: int | None) -> Iterator[Comparison | None]:
    """The comparison of the events after `first`, which ends a kept subtree; None if the views contain none of them."""
    if folded is None or folded <= first:
        yield None
        return
    with open_views(reader.data_dir) as db:
        yield Comparison(db, first, folded)


class Comparison:
    """Compares the rows of all views for the events after `first` to `folded`."""

    def __init__(self, db: sqlite3.Connection, first: int, folded: int) -> None:
        self._db = db
        self._first, self._last, self._folded = first, first, folded
        self._fault: LedgerBroken | None = None
        self._counts: dict[str, int] = dict.fromkeys((view.name for view in VIEWS), 0)
        self._grouped: dict[str, dict[object, list[Row]]] = {}
        self._tree, self._subtrees = CompactRange(), list[Subtree]()

    def add(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Compares the rows of the next events, one kept subtree or less; `finish` raises the first fault."""
        if rows and rows[-1][0] > self._folded:
            rows = [row for row in rows if row[0] <= self._folded]
        if rows and self._fault is None:
            with self._faults():
                self._add(rows)

    def finish(self) -> dict[str, int]:
        """Compares what is left; returns how many rows the events have in each view.

        Raises `LedgerBroken`: an event that no view can be made from, or the first difference.
        """
        if self._fault is None:
            with self._faults():
                for view in VIEWS:
                    for group, wanted in self._grouped.get(view.name, {}).items():
                        self._compare(view, f"{view.group} = ?", (group,), wanted, self._first, self._last)
                self._compare_subtrees()
        if self._fault is not None:
            raise self._fault
        return self._counts

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Keeps the fault for `finish`: one of the chain, which is followed meanwhile, says more."""
        try:
            yield
        except LedgerBroken as broken:
            self._fault = broken
        except (sqlite3.Error, UnicodeDecodeError) as error:
            self._fault = _views_differ(VIEWS_NAME, str(error))

    def _add(self, rows: Sequence[tuple[Any, ...]]) -> None:
        last = rows[-1][0]
        made = rows_of_views((seq, kind, actor, body) for seq, _, kind, actor, body, _, _ in rows)
        for view in VIEWS:
            wanted = made[view.name]
            self._counts[view.name] += len(wanted)
            if view.group is None:
                self._compare(view, "1", (), wanted, self._last, last)
            else:  # all at once, in `finish`: each group takes a search of its own
                groups = self._grouped.setdefault(view.name, defaultdict(list))
                for row in wanted:
                    groups[row[0]].append(row)
        self._subtrees += self._tree.extend(leaves([(seq, digest) for seq, *_, digest in rows]), TREE_STEP)
        self._last = last

    def _compare(
        self, view: View, where: str, values: tuple[object, ...], wanted: Sequence[Row], first: int, last: int
    ) -> None:
        select = f"SELECT * FROM {view.name} WHERE {where} AND seq > ? AND seq <= ? ORDER BY seq"  # noqa: S608
        found = self._db.execute(select, (*values, first, last)).fetchall()
        if found != wanted:
            at = 0 if view.group is None else 1
            different = {str(row) for row in found} ^ {str(row) for row in wanted}
            seq = min(int(str(row[at])) for row in (*found, *wanted) if str(row) in different)
            raise _views_differ(view.name, f"event {seq}")

    def _compare_subtrees(self) -> None:
        """Compares the kept subtrees of the lowest level."""
        numbers = range(self._first // TILE, self._last // TILE)
        wanted = (digest for level, _, digest in self._subtrees if level == TREE_STEP)
        found = _kept_subtrees(self._db, TREE_STEP, numbers.start, numbers.stop)
        for number, digest in zip(numbers, wanted, strict=True):
            if found.get(number) != digest:
                raise _views_differ("subtrees", f"events {number * TILE + 1} to {(number + 1) * TILE}")


def check_views_file(data_dir: Path, *, is_mapped: bool = False) -> None:
    """Checks the structure of the file, its indexes included; raises `LedgerBroken`.

    `is_mapped` takes a sixth less time, but a disk that fails ends the process: for one that does nothing else.
    """
    with open_views(data_dir) as db:
        if is_mapped:
            db.execute(f"PRAGMA mmap_size = {_MAPPED_BYTES}")
        for (finding,) in db.execute("PRAGMA integrity_check(1)"):
            if finding != "ok":
                raise _views_differ(VIEWS_NAME, finding)


def count_rows(reader: LedgerReader, folded: int) -> Listed:
    """Checks the tree that a keeper goes on from; returns how many rows each view has. Raises `LedgerBroken`."""
    listed = {}
    with open_views(reader.data_dir) as db:
        db.execute("BEGIN")
        _check_tree(db, reader, folded)
        for view in VIEWS:
            # A keeper may have folded more since; then those rows are there, and no others.
            counted = "count(*) FILTER (WHERE seq <= ?), count(*) FILTER (WHERE seq > (SELECT seq FROM folded))"
            ((now, later),) = db.execute(f"SELECT {counted} FROM {view.name}", (folded,))  # noqa: S608
            listed[view.name] = (int(now), int(later))
    return listed


def check_counts(listed: Listed, counts: Mapping[str, int]) -> None:
    """Raises `LedgerBroken` if a view has rows without an event; `counts` are those that `Comparison` returned."""
    for view, (now, later) in listed.items():
        if (now, later) != (counts.get(view, 0), 0):
            raise _views_differ(view, f"events {counts.get(view, 0)}, view {now + later}")


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


def _check_tree(db: sqlite3.Connection, reader: LedgerReader, folded: int) -> None:
    """Checks the tree that a keeper goes on from, and the subtrees above those that events were compared with."""
    _check_upper_subtrees(db, reader, folded)
    now = int(db.execute("SELECT seq FROM folded").fetchone()[0])
    # A keeper may have folded events since that this reader's snapshot of the ledger lacks.
    with closing(LedgerReader(reader.data_dir)) as newest:
        if folded_tree(db, newest if now != folded else reader, now) is None:
            raise _views_differ("folded", f"the tree up to event {now} is not that of its subtrees")


def _views_differ(view: str, where: str) -> LedgerBroken:
    return LedgerBroken(
        "ledger_tables_differ",
        f"view {view} differs from the events: {where}",
        "nothing is decided by it; stop the keeper and run `signer ledger rebuild`, which also checks the events",
    )
