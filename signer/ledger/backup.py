"""Copies a ledger as a whole, also while a keeper writes it.

A copy is one file, and is verified before it has its name.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from signer.errors import BadFile, Unavailable, write_hint
from signer.files import claim, held, open_or_create, sync_directory, sync_file
from signer.ledger.audit import Progress, verify
from signer.ledger.reader import LedgerReader, short_reason, storage_errors
from signer.ledger.schema import FILE_NAME
from signer.model import Head

_LOCK_NAME: Final = "backup.lock"


def back_up(source: LedgerReader, target: Path, progress: Progress = lambda _done, _all: None) -> Head:
    """Writes the ledger to the new file `target`, mode 0600; returns its head, verified.

    The copy is made and verified in the folder `.NAME.new` beside it, which is deleted at the end. Raises `BadFile` if
    `target` exists, `Unavailable` if it cannot be written, and the errors of `verify`: then there is no backup.
    """
    check_unused(target)
    folder = target.parent / f".{target.name}.new"
    with write_errors(target.parent), workspace(folder):
        copy = folder / FILE_NAME
        copy_events(source, copy)
        with closing(LedgerReader(folder)) as reader:
            head = verify(reader, progress)
        sync_file(copy)
        check_unused(target)
        copy.rename(target)
        sync_directory(target.parent)
    return head


def copy_events(source: LedgerReader, target: Path) -> None:
    """Writes what `source` has at one moment to the new file `target`, without a journal beside it; not synced.

    SQLite copies in one read transaction: a keeper goes on writing, and the copy ends with a whole transaction.
    """
    os.close(open_or_create(target))
    with closing(sqlite3.connect(f"file:{target}?mode=rw", uri=True, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = OFF")
        try:
            source.connection().backup(db)
            db.execute("PRAGMA journal_mode = DELETE")  # the copy is in WAL mode, as its source: two more files
        except sqlite3.OperationalError:  # of the copy's disk
            raise
        except sqlite3.DatabaseError:
            with storage_errors():
                raise


def check_unused(target: Path) -> None:
    """Raises `BadFile` if there is something of this name."""
    if os.path.lexists(target):
        raise BadFile("backup_exists", f"{target} exists, and is not overwritten", "give the backup another name")


@contextmanager
def workspace(folder: Path) -> Iterator[None]:
    """An empty folder of this process alone; deleted at the end. What a killed backup left in it is deleted before."""
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
        raise BadFile("backup_exists", f"{folder} is a link, or belongs to another user", "remove it")
    running = Unavailable("backup_running", "another backup to this file is running", "wait for it to end")
    with held(claim(folder / _LOCK_NAME, running)):
        try:
            for path in folder.iterdir():
                if path.name != _LOCK_NAME:
                    path.unlink()
            yield
        finally:
            shutil.rmtree(folder)


@contextmanager
def write_errors(place: Path, what: str = "backup") -> Iterator[None]:
    """Maps errors of writing in a folder to `Unavailable`, with the code `backup_failed` or `archive_failed`."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        raise Unavailable(
            "backup_failed" if what == "backup" else "archive_failed",
            f"the {what} cannot be written: {short_reason(error)}",
            write_hint(error, str(place)),
        ) from None
