"""A verified copy of another host's ledger, which only grows. No keeper writes it: `signer ledger promote` does first.

The copy is a ledger in a folder of its own below SIGNER_DATA_DIR, so `ledger verify` and all that reads one reads it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, NamedTuple

import msgspec

from signer.errors import BadFile, LedgerBroken, Unavailable, write_hint
from signer.files import sync_directory, write_new
from signer.ledger.audit import Progress, check_chain
from signer.ledger.backup import verify_backup
from signer.ledger.chain import canonical_json
from signer.ledger.marks import FOLLOWED, Mark, write_mark
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME
from signer.ledger.store import Ledger
from signer.model import Entry, Head

FOLDER: Final = "follow"
_BEGUN: Final = "ledger.begun"  # a backup that is being verified
_PIECE: Final = 1024 * 1024  # bytes
_HINT: Final = "keep both; find out which ledger was changed or restored, then follow again with an empty folder"


class Page(NamedTuple):
    """Some events in order, and whether there are more."""

    entries: Sequence[Entry]
    has_more: bool


class LedgerCopy(Ledger):
    """The write access to the copy in `data_dir`/follow, made if it is missing; takes its lock.

    Raises `Unavailable`: `ledger_in_use` while another process follows, `ledger_not_followed` for another ledger.
    """

    def __init__(self, data_dir: Path) -> None:
        folder = data_dir / FOLDER
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            text = f"the folder of the copy cannot be made: {error.strerror}"
            raise Unavailable("ledger_unavailable", text, write_hint(error, "SIGNER_DATA_DIR")) from None
        super().__init__(folder, is_copy=True)
        has_mark = os.path.lexists(folder / f"ledger.{FOLLOWED}")
        if not has_mark and os.path.lexists(folder / FILE_NAME):
            self.close()
            raise Unavailable(
                "ledger_not_followed", f"{folder} has a ledger that follows no other", "move it elsewhere"
            )
        if not has_mark:
            self.note(0)

    def begin_with(self, backup: BinaryIO, progress: Progress = lambda _done, _all: None) -> Head:
        """Makes the file of a backup, verified, the copy to go on from; returns its head.

        Raises `BadFile` if there is a copy or the backup has no events, and the errors of `verify`.
        """
        if os.path.lexists(self._path) and (newest := self.head().seq):
            text = f"{self.data_dir} has a copy with event {newest} as its newest one"
            raise BadFile("copy_exists", text, "leave --start-from out, or move the folder away")
        new = self.data_dir / _BEGUN
        try:
            new.unlink(missing_ok=True)
            write_new(new, iter(lambda: backup.read(_PIECE), b""), 0o600)
            with closing(LedgerReader(self.data_dir, _BEGUN)) as reader:
                head = verify_backup(reader, progress)
            self._reset()
            for end in ("-wal", "-shm"):  # of a copy without events
                Path(f"{self._path}{end}").unlink(missing_ok=True)
            new.rename(self._path)
            sync_directory(self.data_dir)
        except OSError as error:
            text = f"the copy cannot be written: {error.strerror}"
            raise Unavailable("ledger_unavailable", text, write_hint(error, "SIGNER_DATA_DIR")) from None
        finally:
            new.unlink(missing_ok=True)
        return head

    def note(self, now: int) -> None:
        """Records that the copy was up to date at `now` (seconds); raises `Unavailable`."""
        head = self.head() if os.path.lexists(self._path) else Head(0, "", 0)
        if not write_mark(self.data_dir, FOLLOWED, Mark(head.seq, now)):
            raise Unavailable("ledger_unavailable", "the copy's folder takes no file", "check owner, mode and disk")

    def append(self, entries: Sequence[Entry]) -> None:
        """Adds events in one fsynced transaction, or none; raises `LedgerBroken` unless they continue the chain."""
        rows = [(e.seq, e.time_ms, e.kind, e.actor, e.body, e.prev, e.hash) for e in entries]
        try:
            check_chain(iter(rows), self.head())
            self._write(list(entries))
        except sqlite3.IntegrityError:
            self._reset()
            raise _forked(f"event {entries[0].seq} or one after it has a serial of Vault's that the copy has") from None
        except LedgerBroken as broken:
            if broken.code != "ledger_broken" or "seq" not in broken.facts:
                raise
            raise _forked(broken.text.removeprefix("the ledger is broken at ")) from None
        except BaseException:
            self._reset()
            raise


def catch_up(copy: LedgerCopy, fetch: Callable[[int], Page], progress: Callable[[int], None]) -> int:
    """Adds all events that the other ledger has now; returns how many. `fetch` returns those after a number.

    The copy's newest event is fetched, too: so a ledger that was cut off or replaced is noticed though it has nothing
    new. Raises `LedgerBroken` (`ledger_forked`), what `fetch` raises, and `Unavailable`.
    """
    head = copy.head()
    page = fetch(max(head.seq - 1, 0))
    if head.seq:
        page = Page(_without_known(page.entries, head), page.has_more)
    while True:
        if page.entries:
            copy.append(page.entries)
            progress(page.entries[-1].seq)
        if not page.has_more:
            return copy.head().seq - head.seq
        page = fetch(copy.head().seq)
        if not page.entries:
            raise Unavailable("service_closed", "the service sends pages without events", "see its log")


def _without_known(entries: Sequence[Entry], head: Head) -> Sequence[Entry]:
    if not entries:
        raise _forked(f"it ends before event {head.seq}, which this copy has")
    if (entries[0].seq, entries[0].hash) != (head.seq, head.hash):
        raise _forked(f"event {head.seq} has another hash in this copy")
    return entries[1:]


def _forked(what: str) -> LedgerBroken:
    return LedgerBroken("ledger_forked", f"the service's ledger is not the one that this copy follows: {what}", _HINT)


class _Row(msgspec.Struct):
    seq: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    time: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    kind: str
    actor: str
    body: dict[str, object]
    prev: str
    hash: str


def read_entry(row: Mapping[str, Any]) -> Entry:
    """An event as `GET /api/ledger/entries` has it; raises `ValueError`."""
    try:
        found = msgspec.convert(row, _Row)
    except msgspec.ValidationError as error:
        raise ValueError(f"an event with other fields: {error}") from None
    return Entry(found.seq, found.time, found.kind, found.actor, canonical_json(found.body), found.prev, found.hash)
