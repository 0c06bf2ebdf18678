"""`signer ledger archive`: the oldest events of the ledger to a segment, a file of its own."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from signer.cli import output
from signer.cli.arguments import FILE, Checked, quoted, read_settings
from signer.cli.ledger import head_facts, head_line
from signer.cli.parser import verb
from signer.files import user_name
from signer.units import parse_duration, plain, timestamp

if TYPE_CHECKING:
    from signer.ledger.archive import Archived, ArchivePlan
    from signer.ledger.reader import Archive
    from signer.model import Head

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
    from signer.service.access import become_writer

    file, settings, user = file.absolute(), read_settings(), user_name(os.geteuid())
    become_writer(settings)
    now_ms = int(time.time() * 1000)
    with Archiving(settings.data_dir) as archiving:
        if (earlier := archiving.finish_interrupted()) is not None:
            output.note(f"the interrupted operation is now complete: event {earlier.seq}, {earlier.kind}")
        if (done := archiving.is_done(file)) is not None:
            output.note(f"{file} is the segment of the newest archive: nothing is left to do")
            return _show(file, *done, None, as_json=as_json)
        plan = archiving.plan(file, keep, now_ms)
        _tell(plan, file)
        if not yes:
            output.require_yes("archive them? yes or no", "nothing was archived", "add --yes")
        with output.Progress("verify") as progress:
            made: Archived = archiving.run(file, plan, f"local:{user}", now_ms, progress)
    return _show(file, made.archive, made.head, made.aside, as_json=as_json)


def _tell(plan: ArchivePlan, file: Path) -> None:
    if plan.is_begun:
        output.note(f"{file} is the segment of an archive that was interrupted, and is used")
    output.note(f"events {plan.first:,} to {plan.last:,}, up to {timestamp(plan.until)}, go to {file}")
    older = f"{output.count(plan.carried, 'older event')} still in force"
    output.note(f"the ledger keeps the {output.count(plan.kept, 'event')} after them, and {older}")


def _show(file: Path, archive: Archive, head: Head, aside: Path | None, *, as_json: bool) -> int:
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
