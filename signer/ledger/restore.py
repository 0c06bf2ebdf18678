"""Puts another ledger in the place of the one in SIGNER_DATA_DIR, in steps of which each may be the last one.

    1  `ledger.restoring/`: the copy, verified as a whole; then the events of the restore, in one transaction
    2  renamed to `ledger.restored/`: from here on the copy is complete
    3  the old ledger's files go to `ledger.replaced-…/`, the file with the events first: without it no keeper starts
    4  the copy gets the ledger's name, and `ledger.restored/` is deleted

After a kill before 3 the old ledger is as it was, and a restore begins again; after one in 3 or 4 no keeper starts, and
the next restore first ends this one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import BinaryIO, Final

from signer.errors import BadFile, LedgerBroken, Unavailable, write_hint
from signer.files import sync_directory, sync_file, write_new
from signer.ledger.audit import Progress, verify
from signer.ledger.backup import copy_events
from signer.ledger.marks import BACKED_UP, COSIGNED, DIFFERS, VERIFIED
from signer.ledger.reader import LedgerReader, storage_errors
from signer.ledger.schema import FILE_NAME, VIEWS_NAME
from signer.ledger.store import LOCK_NAME, Ledger, note_begun, take_lock
from signer.model import Entry, Event, Head
from signer.units import timestamp

_MAKING: Final = "ledger.restoring"
_READY: Final = "ledger.restored"
# In the order in which they are moved: what is left of a ledger whose first file is gone is never opened.
_OLD_FILES: Final = (
    *(f"{name}{end}" for name in (FILE_NAME, VIEWS_NAME) for end in ("", "-wal", "-shm")),
    *(f"ledger.{mark}" for mark in (VERIFIED, BACKED_UP, COSIGNED, DIFFERS)),
)
_ASIDE: Final = "old-files"  # in `ledger.restored/`: the name of the folder that the old files go to
_PIECE: Final = 1024 * 1024  # bytes


class Restoration:
    """One restore into `data_dir`, whose lock it holds; a context manager.

    Call `finish_interrupted`, then `take`, then `commit`. Raises `Unavailable` (`ledger_in_use`) while a keeper runs.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._making, self._ready = data_dir / _MAKING, data_dir / _READY
        try:
            self._lock = take_lock(data_dir)
        except Unavailable as error:
            if error.code == "ledger_in_use":
                text = "a keeper writes the ledger in SIGNER_DATA_DIR"
                raise Unavailable(error.code, text, "stop the service, then restore") from None
            raise

    def __enter__(self) -> Restoration:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the lock; deletes a copy that was not committed."""
        try:
            _remove(self._making)
        finally:
            os.close(self._lock)

    def finish_interrupted(self) -> Entry | None:
        """Ends a restore that was interrupted once its copy was complete; returns its event. None if there is none.

        One whose old ledger is still in its place is undone: a keeper may have written that since.
        """
        with _write_errors():
            _remove(self._making)
            new = self._ready / FILE_NAME
            if not self._ready.exists() or ((self._data_dir / FILE_NAME).exists() and new.exists()):
                _remove(self._ready)
                return None
            self._place()
        with closing(LedgerReader(self._data_dir)) as reader:
            restores = reader.restores()
            return reader.entry(restores[-1].seq) if restores else None

    @contextmanager
    def replaced(self) -> Iterator[LedgerReader | None]:
        """The ledger that is in the place now; None without one, or if it cannot be read."""
        with closing(LedgerReader(self._data_dir)) as reader:
            try:
                is_readable = reader.head().seq > 0
            except (Unavailable, LedgerBroken):
                is_readable = False
            yield reader if is_readable else None

    def take(self, source: BinaryIO | LedgerReader, progress: Progress = lambda _done, _all: None) -> LedgerReader:
        """Copies a ledger, or the file of a backup, and verifies the copy as a whole; returns a reader of it.

        The caller closes the reader. Raises the errors of `verify`.
        """
        with _write_errors():
            _remove(self._making)
            self._making.mkdir(mode=0o700)
            copy = self._making / FILE_NAME
            if isinstance(source, LedgerReader):
                copy_events(source, copy)
            else:
                write_new(copy, iter(lambda: source.read(_PIECE), b""), 0o600)
        reader = LedgerReader(self._making)
        try:
            if _verified(reader, progress).seq == 0:
                raise _no_events()
        except BaseException:
            reader.close()
            raise
        return reader

    def commit(self, events: Sequence[Event], now_ms: int) -> tuple[Head, Path | None]:
        """Records `events` in the copy and puts it in the place; returns its head, and where the old files are.

        None if there were none. The copy's reader must be closed.
        """
        with closing(Ledger(self._making)) as ledger:
            last = ledger.commit(events, now_ms)[-1]
            with storage_errors():  # one file again
                ledger.connection().execute("PRAGMA wal_checkpoint(TRUNCATE)")
                ledger.connection().execute("PRAGMA journal_mode = DELETE")
        with _write_errors():
            sync_file(self._making / FILE_NAME)
            write_new(self._making / _ASIDE, self._unused_name(now_ms).encode(), 0o600)
            sync_directory(self._making)
            note_begun(self._lock)
            sync_file(self._data_dir / LOCK_NAME)
            _remove(self._ready)
            self._making.rename(self._ready)
            sync_directory(self._data_dir)
            return Head(last.seq, last.hash, last.time_ms), self._place()

    def _place(self) -> Path | None:
        """Steps 3 and 4; also after a kill within them."""
        new, aside = self._ready / FILE_NAME, None
        if new.exists():
            aside = self._move_old_files()
            new.rename(self._data_dir / FILE_NAME)
            sync_directory(self._data_dir)
        _remove(self._ready)
        return aside

    def _move_old_files(self) -> Path | None:
        aside = self._data_dir / (self._ready / _ASIDE).read_text()
        old = [name for name in _OLD_FILES if os.path.lexists(self._data_dir / name)]
        if not old:
            return aside if aside.exists() else None
        aside.mkdir(mode=0o700, exist_ok=True)
        sync_directory(self._data_dir)
        for name in old:
            (self._data_dir / name).rename(aside / name)
            sync_directory(self._data_dir)
        sync_directory(aside)
        return aside

    def _unused_name(self, now_ms: int) -> str:
        """Of the folder for the old files: with the time, and a number if there is one of that time."""
        name = f"ledger.replaced-{timestamp(now_ms // 1000).replace(':', '')}"
        names = (f"{name}-{number}" if number else name for number in count())
        return next(one for one in names if not os.path.lexists(self._data_dir / one))


def _verified(reader: LedgerReader, progress: Progress) -> Head:
    try:
        return verify(reader, progress)
    except Unavailable as error:
        if error.code == "ledger_missing":  # an empty database
            raise _no_events() from None
        raise


def _no_events() -> BadFile:
    return BadFile("backup_empty", "the backup has no events", "restore another one")


def _remove(folder: Path) -> None:
    if os.path.lexists(folder):
        shutil.rmtree(folder)


@contextmanager
def _write_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = f"the ledger cannot be restored: {error.strerror or 'I/O error'}"
        raise Unavailable("restore_failed", text, write_hint(error, "SIGNER_DATA_DIR")) from None
