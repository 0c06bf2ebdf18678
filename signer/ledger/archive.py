"""Moves a ledger's oldest events to a segment, a file of its own, while no keeper runs; and compares segments again.

    1  the segment: all events up to one that is older than all that counts, verified, mode 0400
    2  the new ledger: the later events as they are, of the archived ones all hashes and what still decides something
       (`archived.py`), and the event `ledger.archived`, which names the segment and commits to the rest; verified, and
       compared with the segment
    3  it gets the ledger's place, and the old files are kept in a folder beside it (`replacement.py`)

Hash chain, tree, numbers of events and serials go on. A segment is a ledger that ends early, and is read as one.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from signer.errors import BadFile, LedgerBroken, Refused, Unavailable
from signer.files import open_or_create, open_regular, sync_directory, sync_file
from signer.ledger import archived
from signer.ledger.audit import Progress, verify
from signer.ledger.backup import workspace, write_errors
from signer.ledger.reader import EVENTS_BETWEEN, Archive, LedgerReader
from signer.ledger.replacement import Replacement
from signer.ledger.schema import APPLICATION_ID, ARCHIVED_VERSION, EVENT_INDEXES, EVENTS, FILE_NAME, VERSION
from signer.ledger.subtrees import TILE, TreeReader
from signer.model import Event, Head
from signer.units import render_duration

KEEP_AT_LEAST: Final = 7 * 86_400  # seconds; a certificate, a request, an approval or a waiver counts less long
_STEP: Final = 100 * TILE  # events of two files that are in memory at once
_MODE: Final = 0o400
_INSERT: Final = "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)"
_NO_END: Final = 2**63 - 1
AnyReader = TypeVar("AnyReader", bound=LedgerReader)


class ArchivePlan(NamedTuple):
    """What an archive does: events `first` to `last`, recorded up to a time in seconds, go to the segment, `kept` stay
    and `carried` ones stay beside them. `is_begun` if an interrupted run left the segment."""

    first: int
    last: int
    until: int
    kept: int
    carried: int
    is_begun: bool


class Archived(NamedTuple):
    """What was done: the event, the head of the ledger with it, and where the old files are."""

    archive: Archive
    head: Head
    aside: Path | None


class Archiving(Replacement):
    """One archive, while it holds the ledger's lock. Call `finish_interrupted`, then `plan`, then `run`."""

    command = "archive"
    aside = "ledger.archived-"

    def failed(self, text: str, hint: str) -> Unavailable:
        return Unavailable("archive_failed", text, hint)

    def plan(self, target: Path, keep: int, now_ms: int) -> ArchivePlan:
        """Which events are older than `keep` seconds, or are in the segment that an interrupted run left at `target`.

        Raises `Refused` if fewer than 256 events are that old, `BadFile` if `target` is another file, and the ledger's
        errors.
        """
        if keep < KEEP_AT_LEAST:
            raise ValueError(f"{keep} seconds are fewer than {KEEP_AT_LEAST}")
        with closing(LedgerReader(self._data_dir)) as source:
            is_begun = os.path.lexists(target)
            last = _last_of(source, target, now_ms) if is_begun else last_to_archive(source, now_ms, keep)
            kept, carried = source.head().seq - last, len(archived.carried_rows(source, last, archived.CARRY_RULE))
            return ArchivePlan(source.base + 1, last, source.entry(last).time_ms // 1000, kept, carried, is_begun)

    def is_done(self, target: Path) -> tuple[Archive, Head] | None:
        """The newest archive and the head of the ledger if `target` is that archive's segment; None if it is not."""
        with closing(LedgerReader(self._data_dir)) as ledger:
            digest = file_digest(target) if os.path.lexists(target) else ""
            found = ledger.archives()
            return (found[-1], ledger.head()) if found and found[-1].sha256 == digest else None

    def run(
        self,
        target: Path,
        plan: ArchivePlan,
        actor: str,
        now_ms: int,
        progress: Progress = lambda _done, _all: None,
    ) -> Archived:
        """Does what `plan` of the same `target` says; raises the errors of `verify`, and `Unavailable`."""
        with closing(LedgerReader(self._data_dir)) as source:
            if plan.is_begun:
                with closing(open_segment(target)) as segment:
                    _verify_segment(segment, source, plan.last, progress)
            else:
                write_segment(source, target, plan.last, progress)
            carried = archived.carried_rows(source, plan.last, archived.CARRY_RULE)
            with closing(open_segment(target)) as segment:
                event = _event(source, segment, target, plan.last, carried, actor)
            with self.write_errors():
                self._write_rest(source, plan.last, carried)
        made: list[Archive] = []

        def check(folder: Path) -> None:
            """The new file as a whole, and with the segment; nothing was moved yet."""
            with closing(LedgerReader(folder)) as reader, closing(open_segment(target)) as segment:
                verify(reader, progress)
                made.append(reader.archives()[-1])
                _compare(segment, made[0], reader)

        head, aside = self.commit([event], now_ms, check)
        return Archived(made[0], head, aside)

    def _write_rest(self, source: LedgerReader, last: int, carried: Sequence[archived.Row]) -> None:
        with _new_ledger(self.fresh_folder() / FILE_NAME, version=ARCHIVED_VERSION) as db:
            db.executemany(_INSERT, carried)
            db.executemany(_INSERT, source.rows(EVENTS_BETWEEN, (last, _NO_END)))
            archived.add_archived(db, source, last)


def last_to_archive(source: LedgerReader, now_ms: int, keep: int) -> int:
    """The last event that is older than `keep` seconds and ends 256; raises `Refused` if there is none to archive.

    A clock that is ahead archives nothing too early: no event is older than by the time of the newest one.
    """
    last = source.first_since(min(now_ms, source.head().time_ms) - keep * 1000) - 1
    last -= last % TILE
    if last <= source.base:
        after = f" after event {source.base:,}" if source.base else ""
        raise Refused(
            "nothing_to_archive",
            f"fewer than {TILE} events{after} are older than {render_duration(keep)}",
            f"archive later, or keep less with --keep (at least {render_duration(KEEP_AT_LEAST)})",
        )
    if source.base and last < (
        before := archived.newest_archive(source).seq
    ):  # a segment says itself what is before it
        raise Refused(
            "nothing_to_archive",
            f"the next segment must contain event {before:,}, which records the last archive; that event is newer than"
            f" {render_duration(keep)}, or not yet in a full block of {TILE}",
            "archive later",
        )
    return last


# --- segments ---------------------------------------------------------------------------------------------------


def write_segment(source: LedgerReader, target: Path, last: int, progress: Progress) -> None:
    """Writes the events up to `last` to the new file `target`, verified, synced and with mode 0400."""
    folder = target.parent / f".{target.name}.new"
    with write_errors(target.parent, "archive"), workspace(folder):
        copy = folder / FILE_NAME
        with _new_ledger(copy, version=ARCHIVED_VERSION if source.base else VERSION) as db:
            db.executemany(_INSERT, source.rows(EVENTS_BETWEEN, (0, last)))
            if source.base:
                archived.add_archived(db, source, source.base)
        with closing(LedgerReader(folder)) as reader:
            _verify_segment(reader, source, last, progress)
        copy.chmod(_MODE)
        sync_file(copy)
        if os.path.lexists(target):
            raise _segment_exists(target)
        copy.rename(target)
        sync_directory(target.parent)


@contextmanager
def _new_ledger(path: Path, *, version: int) -> Iterator[sqlite3.Connection]:
    """A new file of a ledger to be filled in one transaction; complete at the end, and not synced."""
    os.close(open_or_create(path))
    with closing(sqlite3.connect(f"file:{path}?mode=rw", uri=True, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = OFF")  # nobody uses a file that is not complete
        db.execute("PRAGMA synchronous = OFF")
        db.executescript(EVENTS)
        db.execute("BEGIN EXCLUSIVE")
        yield db
        for index in EVENT_INDEXES:
            db.execute(index.definition)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {version}")
        db.execute("COMMIT")


def open_segment(path: Path) -> LedgerReader:
    """A reader of a segment; raises as `open_as_segment`."""
    return open_as_segment(LedgerReader(path.parent, path.name))


def open_as_segment(reader: AnyReader) -> AnyReader:
    """Opens the file of a new reader; raises `BadFile` for one that is not a readable ledger, and a ledger's errors."""
    path = reader.data_dir / reader.file_name
    try:
        open_regular(path, follow_links=True).close()
    except OSError as error:
        raise _unreadable(f"{path} cannot be read: {error.strerror}") from None
    try:
        reader.connection()
    except (LedgerBroken, Unavailable) as error:
        if error.code in ("ledger_missing", "ledger_not_ours", "ledger_broken"):  # empty, foreign, no database
            raise _unreadable(f"{path} is not a segment of a ledger") from None
        raise
    return reader


def _unreadable(text: str) -> BadFile:
    return BadFile("segment_unreadable", text, "name a file of `signer ledger archive`")


def _last_of(source: LedgerReader, target: Path, now_ms: int) -> int:
    """The last event of a segment that an interrupted run left; raises `BadFile` if it is another file."""
    try:
        with closing(open_segment(target)) as segment:
            head, base = segment.head(), segment.base
    except (BadFile, LedgerBroken, Unavailable):
        raise _segment_exists(target) from None
    is_ours = base == source.base < head.seq and source.hash_at(head.seq) == head.hash
    newest = last_to_archive(source, now_ms, KEEP_AT_LEAST)
    if not is_ours or head.seq > newest or target.stat().st_mode & 0o222:
        raise _segment_exists(target)
    return head.seq


def _segment_exists(target: Path) -> BadFile:
    return BadFile(
        "segment_exists",
        f"{target} exists, and is not a segment that an interrupted archive of this ledger left",
        "give the segment another name",
    )


def _verify_segment(segment: LedgerReader, ledger: LedgerReader, last: int, progress: Progress) -> None:
    head = verify(segment, progress)
    if head.seq != last:
        raise _differs(segment, f"the segment ends with event {head.seq}, expected {last}")
    if head.hash != ledger.hash_at(last):
        raise _differs(segment, f"event {last} has another hash in the ledger")


def _event(
    source: LedgerReader, segment: LedgerReader, target: Path, last: int, carried: Sequence[archived.Row], actor: str
) -> Event:
    body: dict[str, object] = {
        "first": source.base + 1,
        "last": last,
        "head": str(segment.hash_at(last)),
        "root": TreeReader(segment, None, 0).compact(last).root().hex(),
        "segment": {
            "name": target.name.encode("ascii", "replace").decode(),
            "sha256": file_digest(target),
            "bytes": target.stat().st_size,
        },
        "carried": {"rule": archived.CARRY_RULE, "events": len(carried), "sha256": archived.carried_digest(carried)},
    }
    return Event("ledger.archived", actor, body)


def file_digest(path: Path) -> str:
    """The hex SHA-256 of a file; raises `BadFile`."""
    try:
        with open_regular(path, follow_links=True) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(f"{path} cannot be read: {error.strerror}") from None


# --- verifying again --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Joined:
    """The archives of a ledger, oldest first, whose segments were compared, and those whose segments were not given."""

    compared: tuple[Archive, ...]
    missing: tuple[Archive, ...]


def verify_segments(ledger: LedgerReader, files: Sequence[Path], progress: Progress = lambda _d, _a: None) -> Joined:
    """Verifies segments as a whole, and that ledger and segments are one chain; `ledger` itself is not verified here.

    Each is found by its digest. Whatever the ledger carried over is what the segment has, and nothing is left out that
    should have been. Raises `LedgerBroken` (`segment_differs`; `ledger_version_newer` for an archive by a rule that
    this release does not know), and `BadFile` (`segment_unknown`) for a file that no archive of it made.
    """
    wanted = archived.history(ledger)
    with ExitStack() as stack:
        opened: dict[int, LedgerReader] = {}
        for archive, path in _found(ledger, files):
            reader = stack.enter_context(closing(open_segment(path)))
            _verify_segment(reader, ledger, archive.last, progress)
            opened[archive.last] = reader
            if reader.base != archive.first - 1:
                raise _differs(reader, f"its own events begin with {reader.base + 1}")
            _compare_held(reader, archive, ledger)
        for archive in wanted:
            if archive.last in opened:
                after = [ledger, *(reader for last, reader in opened.items() if last > archive.last)]
                for next_one in (one for one in after if one.base == archive.last):
                    _compare(opened[archive.last], archive, next_one)
    return Joined(
        tuple(one for one in wanted if one.last in opened), tuple(one for one in wanted if one.last not in opened)
    )


def find_segments(ledger: LedgerReader, files: Sequence[Path]) -> list[Path]:
    """The files in the order of their events; raises `Refused` unless they have all archived events, and `BadFile`."""
    found: Mapping[int, Path] = {archive.last: path for archive, path in _found(ledger, files)}
    wanted = archived.history(ledger)
    if missing := [one for one in wanted if one.last not in found]:
        first = missing[0]
        raise Refused(
            "segments_missing",
            f"events {first.first:,} to {first.last:,} are in the segment {first.file}, which is not given",
            "pass each segment with --segment FILE",
        )
    return [found[one.last] for one in wanted]


def _found(ledger: LedgerReader, files: Sequence[Path]) -> Iterator[tuple[Archive, Path]]:
    archives = {archive.sha256: archive for archive in ledger.archives()}
    for path in files:
        digest = file_digest(path)
        if digest not in archives:
            raise BadFile(
                "segment_unknown",
                f"no archive of this ledger made {path}: its SHA-256 is {digest}",
                "take the file as `signer ledger archive` wrote it; compare copies by their SHA-256",
            )
        yield archives[digest], path


def _compare(segment: LedgerReader, archive: Archive, after: LedgerReader) -> None:
    """Compares what the file that begins after a segment has of it with what it should have carried over."""
    if archive.rule not in archived.CARRIED:
        raise LedgerBroken(
            "ledger_version_newer",
            f"a newer signer made {archive.file}: it carried events over by rule {archive.rule},"
            f" not {archived.CARRY_RULE}",
            "verify it with the newer version",
        )
    if archived.carried_rows(segment, archive.last, archive.rule) != archived.held_rows(after, 0, archive.last):
        raise _differs(
            segment, f"the events that were carried over at event {archive.seq} are not those of the segment"
        )


def _compare_held(segment: LedgerReader, archive: Archive, ledger: LedgerReader) -> None:
    """Compares each event of a segment that the ledger has."""
    for first in range(archive.first, archive.last + 1, _STEP):
        held = archived.held_rows(ledger, first, min(first + _STEP - 1, archive.last))
        known = {row[0]: row for row in archived.held_rows(segment, held[0][0], held[-1][0])} if held else {}
        for row in held:
            if known.get(row[0]) != row:
                raise _differs(segment, f"event {row[0]} of the ledger is another one")


def _differs(segment: LedgerReader, how: str) -> LedgerBroken:
    return LedgerBroken(
        "segment_differs",
        f"the segment {segment.file_name} and the ledger do not form one chain: {how}",
        "keep both unchanged, and compare them with a backup and a saved head: see runbooks/ledger.md",
    )
