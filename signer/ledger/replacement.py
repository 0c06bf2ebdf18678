"""Puts another file in the place of the ledger in SIGNER_DATA_DIR, in steps of which each may be the last one.

    1  `ledger.restoring/`: the new file, verified as a whole; then the events that say why, in one transaction
    2  renamed to `ledger.restored/`: from here on the new file is complete
    3  the old ledger's files go to a folder beside it, the file with the events first: without it no keeper starts
    4  the new file gets the ledger's name, and `ledger.restored/` is deleted

After a kill before 3 the old ledger is as it was, and the command begins again; after one in 3 or 4 no keeper starts,
and the next restore or archive first ends this one.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import ClassVar, Final, Self

from signer.errors import Unavailable, write_hint
from signer.files import sync_directory, sync_file, write_new
from signer.ledger.marks import BACKED_UP, COSIGNED, DIFFERS, VERIFIED, mark_name
from signer.ledger.reader import LedgerReader, short_reason, storage_errors
from signer.ledger.schema import FILE_NAME, VIEWS_NAME
from signer.ledger.store import INTERRUPTED, LOCK_NAME, Ledger, note_begun, take_lock
from signer.model import Entry, Event, Head
from signer.units import timestamp

_MAKING: Final = "ledger.restoring"
_READY: Final = INTERRUPTED
# In the order in which they are moved: what is left of a ledger whose first file is gone is never opened.
_OLD_FILES: Final = tuple(f"{name}{end}" for name in (FILE_NAME, VIEWS_NAME) for end in ("", "-wal", "-shm"))
_OLD_MARKS: Final = tuple(mark_name(mark) for mark in (VERIFIED, BACKED_UP, COSIGNED, DIFFERS))
_ASIDE: Final = "old-files"  # in `ledger.restored/`: the name of the folder that the old files go to
_ARCHIVED: Final = "ledger.archived-"  # how that of an archive begins, whose marks are those of the new file, too


class Replacement(ABC):
    """One replacement of the ledger in `data_dir`, whose lock it holds; a context manager.

    Call `finish_interrupted`, then fill `fresh_folder`, then `commit`. Raises `Unavailable` (`ledger_in_use`) while a
    keeper runs.
    """

    command: ClassVar[str]  # what it is part of, for messages
    aside: ClassVar[str]  # how the name of the folder for the old files begins

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._making, self._ready = data_dir / _MAKING, data_dir / _READY
        try:
            self._lock = take_lock(data_dir)
        except Unavailable as error:
            if error.code == "ledger_in_use":
                text = "a keeper writes the ledger in SIGNER_DATA_DIR"
                raise Unavailable(error.code, text, f"stop the service, then {self.command}") from None
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @abstractmethod
    def failed(self, text: str, hint: str) -> Unavailable:
        """The error for files that cannot be written."""

    def close(self) -> None:
        """Releases the lock; deletes a file that was not committed."""
        try:
            remove_folder(self._making)
        finally:
            os.close(self._lock)

    def finish_interrupted(self) -> Entry | None:
        """Ends a restore or archive that was interrupted once its file was complete; returns its event, or None.

        One whose old ledger is still in its place is undone: a keeper may have written that since.
        """
        with self.write_errors():
            remove_folder(self._making)
            new = self._ready / FILE_NAME
            if not self._ready.exists() or ((self._data_dir / FILE_NAME).exists() and new.exists()):
                remove_folder(self._ready)
                return None
            self._place()
        with closing(LedgerReader(self._data_dir)) as reader:
            known = [*(one.seq for one in reader.restores()), *(one.seq for one in reader.archives())]
            return reader.entry(max(known)) if known else None

    def fresh_folder(self) -> Path:
        with self.write_errors():
            remove_folder(self._making)
            self._making.mkdir(mode=0o700)
        return self._making

    def commit(
        self, events: Sequence[Event], now_ms: int, check: Callable[[Path], None] = lambda _folder: None
    ) -> tuple[Head, Path | None]:
        """Records `events` in the new file and puts it in the place; returns its head, and where the old files are.

        None if there were none. `check` looks at the folder of the complete file before anything else is changed, and
        may raise. Readers of the new and the old file must be closed.
        """
        with closing(Ledger(self._making)) as ledger:
            last = ledger.commit(events, now_ms)[-1]
            with storage_errors():  # one file again
                ledger.connection().execute("PRAGMA wal_checkpoint(TRUNCATE)")
                ledger.connection().execute("PRAGMA journal_mode = DELETE")
        check(self._making)
        with self.write_errors():
            sync_file(self._making / FILE_NAME)
            write_new(self._making / _ASIDE, self._unused_name(now_ms).encode(), 0o600)
            sync_directory(self._making)
            note_begun(self._lock)
            sync_file(self._data_dir / LOCK_NAME)
            remove_folder(self._ready)
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
        remove_folder(self._ready)
        return aside

    def _move_old_files(self) -> Path | None:
        aside = self._data_dir / (self._ready / _ASIDE).read_text()
        names = _OLD_FILES if aside.name.startswith(_ARCHIVED) else (*_OLD_FILES, *_OLD_MARKS)
        old = [name for name in names if os.path.lexists(self._data_dir / name)]
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
        name = f"{self.aside}{timestamp(now_ms // 1000).replace(':', '')}"
        names = (f"{name}-{number}" if number else name for number in count())
        return next(one for one in names if not os.path.lexists(self._data_dir / one))

    @contextmanager
    def write_errors(self) -> Iterator[None]:
        """Maps file errors, and those of SQLite that a full disk gives, to `Unavailable`."""
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:
            text = f"the ledger cannot be {self.command}d: {short_reason(error)}"
            raise self.failed(text, write_hint(error, "SIGNER_DATA_DIR")) from None


def remove_folder(folder: Path) -> None:
    """Deletes a folder with its content, if it is there."""
    if os.path.lexists(folder):
        shutil.rmtree(folder)
