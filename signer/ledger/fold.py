"""Folds events into `views.sqlite3`. Only the keeper's view writer and `signer ledger rebuild` write that file.

Nothing is decided by it, so it is never synced, and it is deleted and folded again if it is damaged, has another
version, or was folded from another ledger.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from signer.errors import Unavailable, write_hint
from signer.files import open_or_create, sync_file
from signer.ledger import schema
from signer.ledger.chain import GENESIS
from signer.ledger.file_id import FileId, found_file
from signer.ledger.reader import LedgerReader, broken_at
from signer.ledger.subtrees import TreeReader, leaves
from signer.ledger.tree import CompactRange

SLICE_EVENTS: Final = 80
PART_EVENTS: Final = 20  # added between two pauses; some 0.3 ms
DISCARD_AFTER: Final = 60.0  # seconds between two deletions of a damaged file
_BOOT_TOLERANCE: Final = 2  # seconds
_CHECKPOINT_PAGES: Final = 200  # at once; 1,000, SQLite's own number, take the processor for 2 ms
# The disk does not take it; the file is as good as before.
_TEMPORARY: Final = frozenset({"SQLITE_FULL", "SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_CANTOPEN", "SQLITE_READONLY"})
_TO_FOLD: Final = "SELECT seq, kind, actor, body, prev, hash FROM events WHERE seq > ? ORDER BY seq LIMIT ?"
_MOVE: Final = "UPDATE folded SET seq = ?, hash = ?, tree = ?, boot = ?, is_synced = 0"


def rows_of_views(events: Iterable[tuple[int, str, str, str]]) -> dict[str, list[schema.Row]]:
    """The rows of events (seq, kind, actor, body), by view; raises `LedgerBroken` if a body is malformed."""
    others: list[schema.Row] = []
    bodies: dict[str, list[tuple[int, Any]]] = {kind: [] for kind in schema.BODIES}
    for seq, kind, actor, text in events:
        try:
            if (decode := _DECODE.get(kind)) is not None:
                bodies[kind].append((seq, decode(text)))
            if kind != schema.ISSUED:
                others.append(schema.other_row(seq, kind, actor, _OTHER.decode(text)))
        except (msgspec.DecodeError, RecursionError):
            raise broken_at(seq, f"it is not a valid {kind} event") from None
    return {view.name: others if view.name == schema.OTHERS else view.apply(bodies[view.kind]) for view in schema.VIEWS}


_DECODE: Final = {kind: msgspec.json.Decoder(body).decode for kind, body in schema.BODIES.items()}
_OTHER: Final = msgspec.json.Decoder(schema.OtherBody)


def add_events(db: sqlite3.Connection, events: Iterable[tuple[int, str, str, str]]) -> None:
    """Adds the rows of events (seq, kind, actor, body) to all views."""
    rows = rows_of_views(events)
    for view in schema.VIEWS:
        if rows[view.name]:
            db.executemany(view.insert, rows[view.name])


def add_leaves(db: sqlite3.Connection, tree: CompactRange, events: Sequence[tuple[int, str]]) -> None:
    """Lets `tree` grow by events (seq, hash), and keeps the subtrees that they complete; raises `LedgerBroken`."""
    if complete := tree.extend(leaves(events), schema.TREE_STEP):
        db.executemany(schema.ADD_SUBTREE, complete)


def create_views(db: sqlite3.Connection, ledger: LedgerReader, *, with_indexes: bool = True) -> CompactRange:
    """Creates all tables of an empty database, folded up to the ledger's first event; returns the tree up to there."""
    for statement in (*schema.VIEW_TABLES, *(schema.VIEW_INDEXES if with_indexes else ())):
        db.execute(statement)
    start, tree = ledger.start(), TreeReader(ledger, None, 0).compact(ledger.base)
    values = (start.seq, start.hash, tree.to_bytes(), boot_time(), start.seq)
    db.execute("INSERT INTO folded VALUES (1, ?, ?, ?, ?, 0, ?)", values)
    db.execute(f"PRAGMA application_id = {schema.VIEWS_APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {schema.VIEWS_VERSION}")
    return tree


def folded_up_to(db: sqlite3.Connection, ledger: LedgerReader) -> int | None:
    """The number of the last event that the views contain; None for views of another version or ledger.

    Raises `sqlite3.Error` if the file is damaged.
    """
    found = db.execute("PRAGMA application_id").fetchone()[0], db.execute("PRAGMA user_version").fetchone()[0]
    if found != (schema.VIEWS_APPLICATION_ID, schema.VIEWS_VERSION):
        return None
    row = db.execute("SELECT seq, hash, base FROM folded").fetchone()
    if row is None:
        return None
    seq, digest, base = row
    if base != ledger.base:  # folded before something was archived, or from a ledger that was not
        return None
    start = ledger.start()
    is_ours = (seq, digest) == (start.seq, start.hash) or bool(
        ledger.query("SELECT 1 FROM events WHERE seq = ? AND hash = ?", (seq, digest))
    )
    return seq if is_ours else None


def folded_tree(db: sqlite3.Connection, ledger: LedgerReader, seq: int) -> CompactRange | None:
    """The Merkle tree up to event `seq`, which the views contain; None if it differs from its own subtrees.

    A wrong tree would make the keeper sign a checkpoint that no later one is consistent with, so both ways to it must
    agree: what was kept of it, and what its subtrees and the newest events make. Raises `sqlite3.Error`.
    """
    kept = bytes(db.execute("SELECT tree FROM folded").fetchone()[0])
    found = TreeReader(ledger, db, seq).compact(seq)
    return found if found.to_bytes() == kept else None


def boot_time() -> int:
    """When the host started, in seconds since 1970 by its present clock."""
    return round(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME))


def _is_written_out(db: sqlite3.Connection) -> bool:
    """False if the host stopped since the file was written, unless it was synced before."""
    found = db.execute("SELECT boot, is_synced FROM folded").fetchone()
    return found is not None and bool(found[1] or abs(found[0] - boot_time()) <= _BOOT_TOLERANCE)


def delete_views(path: Path) -> None:
    """Deletes the file at `path` with its journals."""
    for name in (f"{path}-wal", f"{path}-shm", path):
        with suppress(FileNotFoundError):
            os.unlink(name)  # noqa: PTH108 - two of them are text


class FoldedHead(NamedTuple):
    """The last event that is folded, 0 for none, its hash, and the root of the Merkle tree (RFC 6962) up to it."""

    seq: int
    hash: str
    root: bytes


class Fold:
    """The write access to the views of `ledger`; opened by the first slice."""

    def __init__(self, data_dir: Path, ledger: LedgerReader) -> None:
        self._path = data_dir / schema.VIEWS_NAME
        self._ledger = ledger
        self._db: sqlite3.Connection | None = None
        self._file: FileId | None = None
        self._seq, self._hash = 0, GENESIS  # of the last event that is folded, or archived
        self._tree = CompactRange()  # over the events up to that one
        self._discarded = -DISCARD_AFTER

    def close(self) -> None:
        """Closes the file; syncs it, so that it is good after a restart of the host, too."""
        db, self._db = self._db, None
        if db is None:
            return
        try:
            with suppress(sqlite3.Error, OSError):  # then it is folded again after a restart of the host
                db.execute("UPDATE folded SET is_synced = 1")
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                sync_file(self._path)
        finally:
            db.close()

    def fold_slice(self, pause: float = 0.0) -> int:
        """Folds the next events, at most `SLICE_EVENTS`; returns the number of the last one folded.

        With fewer than so many it keeps pace, and sleeps `pause` seconds after each `PART_EVENTS`. Raises `Unavailable`
        or `LedgerBroken` if it cannot; the next call opens the file again.
        """
        with self._writing() as db:
            events = self._ledger.query(_TO_FOLD, (self._seq, SLICE_EVENTS))
            if events:
                first, *_, previous, _ = events[0]
                if previous != self._hash:
                    raise broken_at(first, "it does not follow the last event that was folded")
                db.execute("BEGIN IMMEDIATE")
                for start in range(0, len(events), PART_EVENTS):
                    add_events(db, [event[:4] for event in events[start : start + PART_EVENTS]])
                    if len(events) < SLICE_EVENTS:
                        time.sleep(pause)
                add_leaves(db, self._tree, [(seq, digest) for seq, *_, digest in events])
                last, *_, digest = events[-1]
                db.execute(_MOVE, (last, digest, self._tree.to_bytes(), boot_time()))
                db.execute("COMMIT")
                self._seq, self._hash = last, digest
        return self._seq

    def head(self) -> FoldedHead:
        """Of what is folded."""
        return FoldedHead(self._seq, self._hash, self._tree.root())

    def recheck(self, *, is_damaged: bool) -> None:
        """Opens the file again at the next slice, after a reader could not use it; deletes it if it is damaged."""
        self._drop()
        if is_damaged and self._may_discard():
            with suppress(OSError):  # then the next slice fails, and says why
                delete_views(self._path)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """The open file; gives it up after a failure, and raises `Unavailable` if it cannot be written."""
        try:
            yield self._open()
        except (sqlite3.Error, UnicodeDecodeError, OSError) as error:
            self._give_up(error)
            raise Unavailable(
                "views_not_folded",
                f"{schema.VIEWS_NAME} cannot be written: {error}",
                f"{write_hint(error, 'SIGNER_DATA_DIR')}; signing is not affected",
            ) from None
        except BaseException:
            self._drop()
            raise

    def _open(self) -> sqlite3.Connection:
        """The open file; a new one if it is not there, not ours or damaged."""
        if self._db is not None and found_file(self._path) == self._file:
            return self._db
        self._drop()
        db = self._connect()
        tree: CompactRange | None = None
        try:
            seq = folded_up_to(db, self._ledger) if _is_written_out(db) else None
            if seq is not None:
                tree = folded_tree(db, self._ledger, seq)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if _name(error) in _TEMPORARY:
                db.close()
                raise
            seq = None
        if seq is None or tree is None:
            db.close()
            delete_views(self._path)
            db = self._connect()
            db.execute("BEGIN EXCLUSIVE")
            tree = create_views(db, self._ledger)
            db.execute("COMMIT")
            seq = self._ledger.base
        self._db, self._seq, self._tree, self._file = db, seq, tree, found_file(self._path)
        self._hash = str(db.execute("SELECT hash FROM folded").fetchone()[0])
        return db

    def _connect(self) -> sqlite3.Connection:
        if found_file(self._path) is None:
            delete_views(self._path)  # the journal of a file that is gone would become part of the new one
        os.close(open_or_create(self._path))
        db = sqlite3.connect(f"file:{self._path}?mode=rw", uri=True, isolation_level=None, timeout=0)
        try:
            db.execute("PRAGMA synchronous = OFF")
            db.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.DatabaseError as error:
            db.close()
            if _name(error) in _TEMPORARY or not self._may_discard():
                raise
            delete_views(self._path)
            return self._connect()
        return db

    def _may_discard(self) -> bool:
        """True once in `DISCARD_AFTER`: a disk that damages each file must not be written without end."""
        now = time.monotonic()
        if now < self._discarded + DISCARD_AFTER:
            return False
        self._discarded = now
        return True

    def _give_up(self, error: Exception) -> None:
        """Closes the file after a failure, and deletes it unless the disk was full or busy."""
        self._drop()
        if not isinstance(error, OSError) and _name(error) not in _TEMPORARY and self._may_discard():
            with suppress(OSError):  # then the next slice fails again, and says why
                delete_views(self._path)

    def _drop(self) -> None:
        """Closes the file; what was not committed is folded again, because `_open` reads where it stands."""
        if self._db is not None:
            self._db.close()
            self._db = None


def fold_all(ledger: LedgerReader) -> FoldedHead:
    """Folds all events of a ledger that no keeper serves; raises `Unavailable` or `LedgerBroken`."""
    with closing(Fold(ledger.data_dir, ledger)) as fold:
        while fold.fold_slice() < ledger.head().seq:
            pass
        return fold.head()


def _name(error: Exception) -> str:
    """SQLite's name of the error, the primary one."""
    name = getattr(error, "sqlite_errorname", "")
    return "_".join(name.split("_")[:2])
