"""`signer ledger backup`, `restore`, `follow`, `promote` and `archive`: copies of the ledger, and its oldest events in
their own file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import click

from signer.cli import output
from signer.cli.arguments import FILE, HEAD, PAUSE, Checked, quoted, read_settings
from signer.cli.connection import Service, service_options
from signer.cli.ledger import head_facts, head_line, reading
from signer.cli.parser import verb
from signer.cli.places import name_places
from signer.errors import BadFile, BadFormat, NotFound, SignerError, Unavailable
from signer.files import user_name
from signer.model import Head
from signer.units import parse_duration, plain, render_duration, timestamp

if TYPE_CHECKING:
    from signer.api_client import ApiClient
    from signer.authority.restored import RestorePlan
    from signer.ledger.archive import Archived, ArchivePlan
    from signer.ledger.follow import LedgerCopy, Page
    from signer.ledger.reader import Archive, LedgerReader
    from signer.model import CaKeys, Head
    from signer.settings import Settings

DEFAULT_PAUSE: Final = 10  # seconds between two looks of `follow`
SAY_AGAIN: Final = 60.0  # seconds between two lines about a service that does not answer


@verb("ledger backup", "signer ledger backup /backup/signer/ledger-2026-11-29")
@click.argument("file", type=FILE, metavar="FILE", help="a new file; it is never overwritten")
def ledger_backup(file: Path, as_json: bool) -> None:
    """Copies the ledger in SIGNER_DATA_DIR, also while the keeper signs, verifies every event of the copy, and only
    then gives it its name: mode 0600, one file, nothing else. It ends with the newest event of the moment when it
    began. `signer status` shows when the last backup was. Run it as root or as the keeper's user."""
    from signer.ledger.backup import back_up
    from signer.ledger.marks import BACKED_UP, Mark, write_mark

    file = file.absolute()  # root in a container becomes the keeper's user, who may not read the current directory
    with reading(in_one_transaction=False) as reader, output.Progress("verify") as progress:
        head = back_up(reader, file, progress)
        is_noted = write_mark(reader.data_dir, BACKED_UP, Mark(head.seq, int(time.time())))
    if not is_noted:
        output.warn("`signer status` cannot show this backup: this user may not write SIGNER_DATA_DIR")
    facts = {"file": str(file), "bytes": file.stat().st_size, "head": head_facts(head)}
    text = f"verified {output.count(head.seq, 'event')}, written to {file}"
    output.show_result(facts, text, f"head    {head_line(head)}", as_json=as_json)


# --- restore and promote ----------------------------------------------------------------------------------------


_lost_head = click.option(
    "--lost-head", type=HEAD, metavar="SEQ:HASH", help="the newest head that you saved of the lost ledger"
)
_other = click.option("--other", is_flag=True, help="also if it is the backup of another ledger, or of another CA")
_yes = click.option("--yes", is_flag=True, help="do not ask on the terminal")


@verb(
    "ledger restore",
    "signer ledger restore /backup/signer/ledger-2026-11-29",
    'signer ledger restore FILE --yes --lost-head "$(cat newest-saved-head)"',
)
@click.argument("file", type=FILE, metavar="FILE", help="of `signer ledger backup`")
@_lost_head
@_other
@_yes
def ledger_restore(file: Path, *, lost_head: tuple[int, str] | None, other: bool, yes: bool, as_json: bool) -> int:
    """Puts a backup in the place of the ledger in SIGNER_DATA_DIR, while the service is stopped. Verifies every
    event, shows what is lost, asks, and keeps the files that were there in the folder ledger.replaced-….
    Afterwards everything is frozen until you lift it (`signer unfreeze all`), which also ends all waivers; open
    requests are ended; and at least 1,000,000 serials are skipped and revoked, so that no lost certificate shares
    one with a new one. Killed at any moment, it can be run again. Exit status 3 if you do not approve."""
    file, settings, user = file.absolute(), read_settings(), user_name(os.geteuid())
    with _open_backup(file, settings) as source:
        return _restore(settings, source, user, lost_head, other=other, yes=yes, as_json=as_json)


@verb("ledger promote", "signer ledger promote", "signer ledger promote --yes --lost-head SEQ:HASH")
@_lost_head
@_other
@_yes
def ledger_promote(*, lost_head: tuple[int, str] | None, other: bool, yes: bool, as_json: bool) -> int:
    """Makes the copy that `signer ledger follow` keeps below SIGNER_DATA_DIR this host's ledger, as after a restore:
    what the copy lacks is lost, everything is frozen, serials are skipped and revoked. Make sure first that the
    other host's signer is stopped and does not start again: two of them would give the same serials."""
    from signer.ledger.follow import FOLDER, LedgerCopy
    from signer.ledger.schema import FILE_NAME
    from signer.service.file_access import become_writer

    settings, user = read_settings(), user_name(os.geteuid())
    become_writer(settings)
    if not (settings.data_dir / FOLDER / FILE_NAME).exists():
        text = "no copy of another ledger is in SIGNER_DATA_DIR"
        raise Unavailable("ledger_missing", text, "run `signer ledger follow` first; a backup needs `ledger restore`")
    try:
        copy = LedgerCopy(settings.data_dir)
    except Unavailable as error:
        if error.code == "ledger_in_use":
            raise Unavailable(error.code, "`signer ledger follow` still writes the copy", "stop it first") from None
        raise
    with closing(copy):
        return _restore(settings, copy, user, lost_head, other=other, yes=yes, as_json=as_json)


def _restore(
    settings: Settings,
    source: BinaryIO | LedgerReader,
    user: str,
    lost_head: tuple[int, str] | None,
    *,
    other: bool,
    yes: bool,
    as_json: bool,
) -> int:
    from signer.authority.restored import is_restored, plan_restore
    from signer.ledger.restore import Restoration

    saved = Head(*lost_head, 0) if lost_head else None
    with Restoration(settings.data_dir) as restoration:
        if (earlier := restoration.finish_interrupted()) is not None:
            output.note(f"the interrupted operation is now complete: event {earlier.seq}, {earlier.kind}")
        with output.Progress("verify") as progress:
            backup = restoration.take(source, progress)
        with closing(backup), restoration.replaced() as replaced:
            if replaced is not None and is_restored(backup, replaced):
                return _show_done(replaced.head(), None, None, as_json=as_json)
            plan = plan_restore(backup, replaced, saved, _ca_keys(settings), allow_other=other)
            present = None if replaced is None else replaced.head()
        _tell(plan, present)
        if not yes:
            output.require_yes("restore it? yes or no", "nothing was restored", "add --yes")
        head, aside = restoration.commit(plan.events(user), int(time.time() * 1000))
    return _show_done(head, plan, aside, as_json=as_json)


@contextmanager
def _open_backup(path: Path, settings: Settings) -> Iterator[BinaryIO]:
    """The file of a backup. Root opens it and then becomes the keeper's user, or the other way around in a container.

    Raises `BadFile`.
    """
    from signer.files import open_regular, os_errors
    from signer.service.file_access import become_writer

    try:
        file = open_regular(path, follow_links=True)
    except PermissionError:
        become_writer(settings)
        with os_errors(lambda error: _unreadable(path, error)):
            file = open_regular(path, follow_links=True)
    except OSError as error:
        raise _unreadable(path, error) from None
    with file:
        log = path.with_name(f"{path.name}-wal")
        if log.exists() and log.stat().st_size:
            raise BadFile(
                "backup_incomplete",
                f"{path} is an open ledger, not a backup: {log.name} has events that it lacks",
                "copy it with `SIGNER_DATA_DIR=ITS_FOLDER signer ledger backup FILE`, and restore that",
            )
        become_writer(settings)
        yield file


def _unreadable(path: Path, error: OSError) -> BadFile:
    return BadFile("backup_unreadable", f"{path} cannot be read: {error.strerror}", "name a file of `ledger backup`")


def _ca_keys(settings: Settings) -> CaKeys | None:
    """The CA keys of policy.toml; None, with a warning, if it cannot be used: a lost host may still lack it."""
    from signer.policy.file import load_policy

    try:
        return load_policy(settings.policy_file).ca
    except SignerError as error:
        name_places(error, (), os.environ)
        output.warn(f"whether the backup is of this platform's CA is not checked: {error.text}")
        return None


def _tell(plan: RestorePlan, present: Head | None) -> None:
    output.note(f"the backup ends with event {plan.head.seq} of {timestamp(plan.head.time_ms // 1000)}")
    if present is None:
        output.note("SIGNER_DATA_DIR has no ledger that can be read: what was recorded after the backup is not known")
    elif plan.is_newer:
        output.note(f"it is newer than the ledger in SIGNER_DATA_DIR, which ends with event {present.seq}")
    if plan.lost_head is not None:
        lost = plan.lost_head.seq - plan.head.seq
        output.warn(f"{output.count(lost, 'event')} after it, to event {plan.lost_head.seq}, will be lost")
    output.note(f"serials {plan.first_serial:,} to {plan.last_serial:,} are skipped and revoked; everything is frozen")


def _show_done(head: Head, plan: RestorePlan | None, aside: Path | None, *, as_json: bool) -> int:
    """The result; without a plan it was there already."""
    if as_json:
        facts: dict[str, Any] = {"restored": plan is not None, "head": head_facts(head)}
        if plan is not None:
            lost = plan.lost_head
            facts |= {
                "backup": head_facts(plan.head),
                "lost_head": None if lost is None else {"seq": lost.seq, "hash": lost.hash},
                "first_serial": str(plan.first_serial),
                "last_serial": str(plan.last_serial),
                "requests_ended": list(plan.requests),
                "replaced": None if aside is None else str(aside),
            }
        output.show_json(facts)
        return 0
    if plan is None:
        output.show("restored before: the ledger is this backup with the events of its restore, and nothing else")
    else:
        output.show(f"restored to event {plan.head.seq}; everything is frozen")
        if aside is not None:
            output.show(f"the files that were there are in {plain(str(aside))}")
    output.show(f"head    {head_line(head)}")
    output.note("next: save this head, start the service, set what was lost again, then `signer unfreeze all`")
    return 0


# --- follow -----------------------------------------------------------------------------------------------------


@verb("ledger follow", "signer ledger follow --address https://signer.example.org", "signer ledger follow --once")
@click.option("--once", is_flag=True, help="end when the copy is up to date, for a timer")
@click.option("--every", type=PAUSE, metavar="DURATION", default=DEFAULT_PAUSE,
              help=f"pause between two looks; default {DEFAULT_PAUSE}s")  # fmt: skip
@click.option("--start-from", type=FILE, metavar="FILE", help="a `ledger backup` to begin a new copy with")
@service_options
def ledger_follow(*, once: bool, every: int, start_from: Path | None, service: Service, as_json: bool) -> None:
    """Keeps a copy of another host's ledger in the folder `follow` below SIGNER_DATA_DIR, for `ledger promote`.
    Needs a token with the right `ledger.read`. Every event is verified against the chain and synced to disk.
    Ends with exit status 1 when the service's ledger is not the one that it followed before (cut off,
    restored, rewritten), or when the token is refused; a service that is away is waited for, unless --once.
    A ledger of which events were archived has only the later ones to fetch: --start-from takes the rest."""
    from signer.ledger.follow import LedgerCopy
    from signer.service.file_access import become_writer

    settings = read_settings()
    with ExitStack() as stack:
        backup = None
        if start_from is not None:
            backup = stack.enter_context(_open_backup(start_from.absolute(), settings))
        become_writer(settings)
        copy = stack.enter_context(closing(LedgerCopy(settings.data_dir)))
        api = stack.enter_context(service.open())
        if backup is not None:
            with output.Progress("verify") as progress:
                copy.begin_with(backup, progress)
        said = -SAY_AGAIN
        while True:
            try:
                _look(copy, api, as_json=as_json, also_nothing=once)
            except _ServiceAway as away:
                if once:
                    raise away.error from None
                if time.monotonic() - said >= SAY_AGAIN:
                    said = time.monotonic()
                    output.warn(f"{away.error.text}; trying again every {render_duration(every)}")
            else:
                said = -SAY_AGAIN
            if once:
                return
            time.sleep(every)


class _ServiceAway(Exception):
    """The other host does not answer, or a proxy answers for it: this host and the ledger are not at fault."""

    def __init__(self, error: SignerError) -> None:
        super().__init__(error.text)
        self.error = error


@contextmanager
def _away_errors() -> Iterator[None]:
    try:
        yield
    except (Unavailable, BadFormat) as error:
        raise _ServiceAway(error) from None


def _look(copy: LedgerCopy, api: ApiClient, *, as_json: bool, also_nothing: bool) -> None:
    """Brings the copy up to date and says how many events it took."""
    from signer.ledger.follow import catch_up

    with output.Progress("follow") as progress:
        with _away_errors():
            total = int(api.head()["seq"])
        added = catch_up(copy, lambda after: _fetch(api, after), lambda seq: progress(seq, max(seq, total)))
    now, head = int(time.time()), copy.head()
    copy.note(now)
    if not added and not also_nothing:
        return
    if as_json:
        output.show_json({"added": added, "head": head_facts(head)}, on_one_line=True)
    else:
        output.show(f"{timestamp(now)} {output.count(added, 'event')} added, head {head_line(head)}")
    output.flush()


def _fetch(api: ApiClient, after: int) -> Page:
    from signer.ledger.follow import Page, read_entry

    try:
        with _away_errors():
            rows, has_more = api.entries(after)
    except NotFound as error:
        if error.code != "events_archived":
            raise
        hint = "copy a `signer ledger backup` of that host here, and begin a new copy with --start-from FILE"
        raise NotFound(error.code, f"the service's {error.text}", hint) from None
    try:
        return Page([read_entry(row) for row in rows], has_more)
    except (ValueError, KeyError, RecursionError):
        raise BadFormat(
            "not_our_service", "the service sent an event that no signer wrote", "check --address"
        ) from None


# --- archive --------------------------------------------------------------------------------------------------------


DEFAULT_KEEP: Final = "90d"
LEAST_KEEP: Final = "7d"


def _read_keep(word: str) -> int:
    seconds = parse_duration(word)
    if seconds < parse_duration(LEAST_KEEP):
        raise ValueError(f"{quoted(word)} is less than {LEAST_KEEP}")
    return seconds


@verb(
    "ledger archive",
    "signer ledger archive /archive/signer/events-to-2026-08",
    "signer ledger archive /archive/signer/events-to-2026-08 --keep 180d --yes",
)
@click.argument("file", type=FILE, metavar="FILE", help="of the segment: a new file; it is never overwritten")
@click.option("--keep", type=Checked("duration", _read_keep), metavar="DURATION", default=DEFAULT_KEEP,
              help=f"events of this time stay; default {DEFAULT_KEEP}, at least {LEAST_KEEP}")  # fmt: skip
@click.option("--yes", is_flag=True, help="do not ask on the terminal")
def ledger_archive(file: Path, *, keep: int, yes: bool, as_json: bool) -> int:
    """Moves all events that are older than --keep to a segment, while the service is stopped, and shortens the
    ledger in SIGNER_DATA_DIR. Verifies the segment, mode 0400, and the shortened ledger against it before
    anything is moved, and keeps the old files in the folder ledger.archived-…. Hash chain, serials, freezes,
    revocations, host keys and everything else that decides go on as before; `--segment FILE` of other verbs
    reads what was archived. Killed at any moment, it can be run again with the same FILE. Exit status 3 if
    you do not approve."""
    from signer.ledger.archive import Archiving
    from signer.service.file_access import become_writer

    file, settings, user = file.absolute(), read_settings(), user_name(os.geteuid())
    become_writer(settings)
    now_ms = int(time.time() * 1000)
    with Archiving(settings.data_dir) as archiving:
        if (earlier := archiving.finish_interrupted()) is not None:
            output.note(f"the interrupted operation is now complete: event {earlier.seq}, {earlier.kind}")
        if (done := archiving.is_done(file)) is not None:
            output.note(f"{file} is the segment of the newest archive: nothing is left to do")
            return _show_archived(file, *done, None, as_json=as_json)
        plan = archiving.plan(file, keep, now_ms)
        _tell_archive(plan, file)
        if not yes:
            output.require_yes("archive them? yes or no", "nothing was archived", "add --yes")
        with output.Progress("verify") as progress:
            made: Archived = archiving.run(file, plan, f"local:{user}", now_ms, progress)
    return _show_archived(file, made.archive, made.head, made.aside, as_json=as_json)


def _tell_archive(plan: ArchivePlan, file: Path) -> None:
    if plan.is_begun:
        output.note(f"{file} is the segment of an archive that was interrupted, and is used")
    output.note(f"events {plan.first:,} to {plan.last:,}, up to {timestamp(plan.until)}, go to {file}")
    older = f"{output.count(plan.carried, 'older event')} still in force"
    output.note(f"the ledger keeps the {output.count(plan.kept, 'event')} after them, and {older}")


def _show_archived(file: Path, archive: Archive, head: Head, aside: Path | None, *, as_json: bool) -> int:
    if as_json:
        facts = {"file": str(file), "bytes": file.stat().st_size, "sha256": archive.sha256, "head": head_facts(head)}
        moved = {"first": archive.first, "last": archive.last, "carried": archive.carried}
        output.show_json({**facts, **moved, "replaced": None if aside is None else str(aside)})
        return 0
    output.show(f"archived events {archive.first:,} to {archive.last:,} in {plain(str(file))}")
    output.show(f"sha256  {archive.sha256}")
    if aside is not None:
        output.show(f"the files that were there are in {plain(str(aside))}")
    output.show(f"head    {head_line(head)}")
    output.note("next: save this head, start the service, copy the segment to another host, check the copy with")
    output.note("`signer ledger verify --segment COPY`, and only then delete the files that were there")
    return 0
