"""Puts a backup in the place of the ledger in SIGNER_DATA_DIR; `replacement.py` has the steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import BinaryIO, Final

from signer.errors import BadFile, LedgerBroken, Unavailable
from signer.files import undone_by, write_new
from signer.ledger.audit import Progress, verify
from signer.ledger.backup import copy_events
from signer.ledger.reader import LedgerReader
from signer.ledger.replacement import Replacement
from signer.ledger.schema import FILE_NAME
from signer.model import Head

_PIECE: Final = 1024 * 1024  # bytes


class Restoration(Replacement):
    """One restore. Call `finish_interrupted`, then `take`, then `commit`."""

    command = "restore"
    aside = "ledger.replaced-"

    def failed(self, text: str, hint: str) -> Unavailable:
        return Unavailable("restore_failed", text, hint)

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
        folder = self.fresh_folder()
        with self.write_errors():
            copy = folder / FILE_NAME
            if isinstance(source, LedgerReader):
                copy_events(source, copy)
            else:
                write_new(copy, iter(lambda: source.read(_PIECE), b""), 0o600)
        reader = LedgerReader(folder)
        with undone_by(reader.close):
            verify_backup(reader, progress)
        return reader


def verify_backup(reader: LedgerReader, progress: Progress) -> Head:
    """Verifies the file of a backup as a whole; returns its head.

    Raises `BadFile` (`backup_empty`) for one without events, and the errors of `verify`.
    """
    empty = BadFile("backup_empty", "the backup has no events", "restore another one")
    try:
        head = verify(reader, progress)
    except Unavailable as error:
        if error.code == "ledger_missing":  # an empty database
            raise empty from None
        raise
    except LedgerBroken as error:
        if error.code == "ledger_not_ours":
            text, hint = "the backup is not a ledger of signer", "name a file of `signer ledger backup`"
            raise LedgerBroken(error.code, text, hint) from None
        raise
    if head.seq == 0:
        raise empty
    return head
