"""The view writer: a process that folds events into `views.sqlite3`, and the keeper's end of it.

The keeper's loop bounds the rate of signatures, and a sixth of it went into views. The process reads events with a
read-only handle; it is the only one that writes views while a keeper runs.

`python -m signer.service.view_writer DESCRIPTOR DATA_DIR` is the process.
"""

from __future__ import annotations

import selectors
import socket
import sys
import time
from collections.abc import Collection
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

import msgspec

from signer.errors import SignerError, Unavailable
from signer.hardening import serve_parent_only
from signer.ledger.file_id import FileId, found_file
from signer.ledger.fold import Fold, FoldedHead
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME
from signer.service.helper_process import BUFFER, HelperProcess
from signer.service.scheduling import give_way

DUE_EVENTS: Final = 50  # that wait for the next slice, which takes more if more came meanwhile
FOLD_AFTER: Final = 0.05  # seconds that an event may wait for so many
RETRY_AFTER: Final = 1.0  # seconds after a failure
LOOK_AFTER: Final = 1.0  # seconds without an event, after which it looks whether the file is still there
HANGS_AFTER: Final = 30.0  # seconds for one slice
PAUSE: Final = 0.0005  # seconds; else keeper and api wait up to 2 ms for the processor that a slice takes
NICENESS: Final = 10  # leaves it a tenth of a busy processor; the api does not wait for the rest of a slice
CLOSES_WITHIN: Final = 0.5  # seconds; it syncs the file


class _Slice(msgspec.Struct, frozen=True):
    """Asks for the next slice, into a file that is opened anew, and deleted before that if it is damaged."""

    is_new: bool = False
    is_damaged: bool = False


class _Folded(msgspec.Struct, frozen=True, tag="folded"):
    head: FoldedHead


class _Failed(msgspec.Struct, frozen=True, tag="failed"):
    code: str
    text: str
    hint: str


class ViewWriter:
    """Has slices folded, one at a time, soon after events were recorded. Never blocks."""

    def __init__(self, data_dir: Path, selector: selectors.BaseSelector, processors: Collection[int] = ()) -> None:
        self._helper = HelperProcess("signer.service.view_writer", data_dir, selector, self, processors)
        self._next = _Slice()
        self._asked_at: float | None = None  # monotonic seconds; None while no slice is being folded
        self._looked_at = -LOOK_AFTER
        self._waits_since: float | None = None  # since when events wait that readers do not see
        self._not_before = 0.0
        self.head: FoldedHead | None = None  # before the first reply

    @property
    def is_idle(self) -> bool:
        """True if it knows of nothing to fold."""
        return self._asked_at is None and self._waits_since is None

    def start(self) -> None:
        """Starts the process; `turn` starts it again when it has ended, also if it cannot be now."""
        self._helper.start()

    def turn(self, newest: int, *, has_reply: bool) -> float:
        """Takes the reply, and asks for the next slice if it is due; `newest` is the number of the last event.

        Returns the seconds until it has something to do without a reply. Raises `Unavailable` if a slice could not be
        folded: it is tried again after `RETRY_AFTER`, and nothing but readers is affected.
        """
        now = time.monotonic()
        if self._asked_at is not None:
            if not has_reply and now < self._asked_at + HANGS_AFTER:
                return self._asked_at + HANGS_AFTER - now
            self._take_reply(now, newest)
        missing = newest - (-1 if self.head is None else self.head.seq)
        if missing <= 0:
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = now
        wait = self._wait(now, missing)
        if wait > 0:
            return wait
        if self._helper.ensure():
            message, self._next = msgspec.json.encode(self._next), _Slice()
            self._asked_at = self._looked_at = now
            self._helper.send(message)
            return HANGS_AFTER
        return RETRY_AFTER

    def recheck(self, *, is_damaged: bool) -> None:
        """Has the file opened again by the next slice, after a reader could not use it; deleted if it is damaged."""
        self._next = _Slice(is_new=True, is_damaged=is_damaged)
        self._looked_at = -LOOK_AFTER

    def disconnect(self) -> None:
        """Lets the process sync the file and end."""
        self._helper.disconnect()

    def close(self) -> None:
        """Waits for its end, but not for long."""
        self._helper.close(CLOSES_WITHIN)

    def _wait(self, now: float, missing: int) -> float:
        """Seconds until the next slice is due; 0 or less: it is."""
        if missing >= DUE_EVENTS or self.head is None:
            wait = 0.0
        elif self._waits_since is not None:
            wait = self._waits_since + FOLD_AFTER - now
        else:
            wait = self._looked_at + LOOK_AFTER - now
        return max(wait, self._not_before - now)

    def _take_reply(self, now: float, newest: int) -> None:
        """Raises `Unavailable` if there is none, or if it tells of a failure."""
        reply = self._helper.receive()
        self._asked_at = self._waits_since = None
        if reply:
            found = msgspec.json.decode(reply, type=_Folded | _Failed)
        else:
            self._helper.stop()
            text = "the process that folds events into the views did not answer"
            found = _Failed("views_not_folded", text, "it is started again; signing is not affected")
        if isinstance(found, _Failed):
            self._not_before = now + RETRY_AFTER
            raise Unavailable(found.code, found.text, found.hint)
        if self.head is not None and found.head.seq == self.head.seq < newest:  # it does not see yet what is there
            self._not_before = now + FOLD_AFTER
        self.head = found.head


# --- the process ------------------------------------------------------------------------------------------------------


class Slices:
    """Answers requests for slices."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / FILE_NAME
        self._reader = LedgerReader(data_dir)
        self._fold = Fold(data_dir, self._reader)
        self._file: FileId | None = None

    def answer(self, message: bytes) -> bytes:
        """Folds a slice; the reply, also if that fails."""
        asked = msgspec.json.decode(message, type=_Slice)
        try:
            file = found_file(self._path)
            if asked.is_new or file != self._file:  # another ledger may have been put in its place
                self._fold.recheck(is_damaged=asked.is_damaged)
                self._file = file
            self._fold.fold_slice(PAUSE)
        except SignerError as error:
            return msgspec.json.encode(_Failed(error.code, error.text, error.hint))
        finally:
            # A handle that stays open would keep the keeper from a new log, where somebody has removed the old one.
            self._reader.close()
        return msgspec.json.encode(_Folded(self._fold.head()))

    def close(self) -> None:
        """Syncs and closes the views."""
        self._fold.close()


def main(descriptor: int, data_dir: Path) -> None:
    """The process. It ends with the keeper, not by the signals that a terminal or systemd sends to both."""
    serve_parent_only()
    give_way(NICENESS)
    with socket.socket(fileno=descriptor) as connection, closing(Slices(data_dir)) as slices:
        connection.setblocking(True)
        while message := connection.recv(BUFFER):
            reply = slices.answer(message)
            with suppress(BrokenPipeError):  # the keeper is ending
                connection.send(reply)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
