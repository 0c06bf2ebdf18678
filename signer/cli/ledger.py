"""`signer certs`, `ledger` and `events`: the ledger in SIGNER_DATA_DIR. `rebuild` writes views, `verify` a mark."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from signer.cli import output
from signer.cli.arguments import (
    DURATION,
    FILE,
    HEAD,
    MAX_SEQ,
    SERIAL,
    SINCE,
    WITNESS_KEY,
    OneOf,
    page_options,
    quoted,
    read_settings,
    segment_option,
    whole,
)
from signer.cli.parser import verb
from signer.cli.suggestions import similar
from signer.cli.usage import UsageError
from signer.errors import BadFile, LedgerBroken, NotFound, Unavailable
from signer.model import Entry, EventFilter, Filter, Head
from signer.units import cut, listed, plain, timestamp

if TYPE_CHECKING:
    from signer.authority.approval_audit import Audit
    from signer.ledger.archive import Joined
    from signer.ledger.checkpoint import VerifierKey
    from signer.ledger.pages import CertificateReader
    from signer.ledger.reader import LedgerReader
    from signer.policy.decide import Policy

_NOTHING_SAVED: Final = (
    "no saved head given: a ledger that was rewritten as a whole, or cut off, looks intact as well; "
    "pass --head with an earlier `signer ledger head`, or --checkpoint"
)
_SHOWN: Final = 8  # principals of a host in a note
MAX_MISSING: Final = 100_000  # events that a command folds in memory; some seconds
_TITLES = ("SERIAL", "SIGNED BY", "IDENTITY", "ROLE", "PRINCIPALS", "VALID UNTIL", "STATUS", "FINGERPRINT")
_COLUMNS = ("serial", "backend", "identity", "role", "principals", "valid_before", "status", "fingerprint")
_CSV_COLUMNS = (
    "serial", "backend", "identity", "role", "principals", "key_id", "fingerprint", "valid_after", "valid_before",
    "status",
)  # fmt: skip


def readable_data_dir() -> Path:
    """SIGNER_DATA_DIR, which root in a container reads as the keeper's user; raises `Unavailable`."""
    from signer.service.file_access import become_reader

    settings = read_settings()
    become_reader(settings)
    return settings.data_dir


@contextmanager
def reading(segment: Path | None = None, *, in_one_transaction: bool = True) -> Iterator[LedgerReader]:
    """The ledger, in one transaction so that all reads see the same state. `verify` opens its own, in threads.

    With `segment` that file instead, which needs no settings; raises `BadFile` if it cannot be read.
    """
    if segment is None:
        from signer.ledger.reader import LedgerReader

        reader = LedgerReader(readable_data_dir())
    else:
        from signer.ledger.archive import open_segment

        reader = open_segment(segment.absolute())
    with _closing(reader):
        if in_one_transaction:
            reader.query("BEGIN")
        yield reader


@contextmanager
def reading_certificates(segment: Path | None = None) -> Iterator[CertificateReader]:
    """The ledger with its views. Events that a keeper has not folded yet are folded in memory; of a segment, all."""
    from signer.ledger.pages import CertificateReader

    if segment is None:
        reader = CertificateReader(readable_data_dir(), MAX_MISSING)
    else:
        from signer.ledger.archive import open_as_segment

        path = segment.absolute()
        reader = open_as_segment(CertificateReader(path.parent, None, path.name))
    with _closing(reader):
        yield reader


def note_more(before: str | None, base: int) -> None:
    """Says that what was shown is not all: the next page begins at `before`, or `base` events were archived."""
    if before is not None:
        output.note(f"more results: add `--before {before}`")
    elif base:
        output.note(f"older ones are in segments ({output.count(base, 'event')}): add --segment FILE")


@contextmanager
def _closing(reader: LedgerReader) -> Iterator[None]:
    """Closes the reader at the end; a row that no signer wrote becomes an error."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise LedgerBroken(
            "ledger_broken",
            "the ledger holds a row that no signer wrote",
            "run `signer ledger verify`, which shows where",
        ) from None
    finally:
        reader.close()


csv_option: Final = click.option("--csv", "as_csv", is_flag=True, help="print comma-separated values with all columns")


def check_form(*, as_csv: bool, as_json: bool) -> None:
    """Raises `UsageError` if both forms are asked for."""
    if as_csv and as_json:
        raise UsageError("--csv and --json exclude each other", "give one of them")


# --- certs ------------------------------------------------------------------------------------------------------


@verb(
    "certs list",
    "signer certs list --active",
    "signer certs list --active --on edge1",
    "signer certs list --by deploy-agent --since 24h --csv >certs.csv",
    "signer certs list --identity deploy-agent --limit 200 --json",
)
@click.option("--by", "--identity", "identity", metavar="NAME", help="issued to this identity")
@click.option("--role", metavar="NAME", help="of this role")
@click.option("--principal", metavar="NAME", help="valid for this principal")
@click.option("--on", "host", metavar="HOST", help="valid for a principal that this host lets in, as recorded now")
@click.option("--fingerprint", metavar="SHA256:…", help="for this public key")
@click.option("--backend", type=OneOf(("local", "vault")), help="signed by the local CA key, or by Vault")
@click.option("--since", type=SINCE, metavar="TIME", help="issued since then: 24h, 2026-11-22, 2026-11-22T09:30:00Z")
@click.option("--active", is_flag=True, help="released, not yet expired and not revoked")
@page_options
@csv_option
@segment_option
def certs_list(
    *, active: bool, limit: int, host: str | None, as_csv: bool, segment: Path | None, as_json: bool, **filters: Any
) -> None:
    """Reads the ledger in SIGNER_DATA_DIR, also while the keeper runs. Times are UTC. A certificate names
    principals, not hosts: --on goes by what `signer hosts add NAME --principals` recorded last, in a segment by
    what it has."""
    check_form(as_csv=as_csv, as_json=as_json)
    from signer.ledger.lookups import certificate_row
    from signer.ledger.revoked import made_revocations, revoked_by

    now = int(time.time())
    wanted = Filter(active_at=now if active else None, limit=limit, **filters)
    about_host: dict[str, Any] = {}
    with reading_certificates(segment) as reader:
        base = reader.base
        if host is not None:
            from signer.authority.hosts import HostList, principals_of

            on = HostList.from_entries(reader.host_events()).find(host)
            wanted = replace(wanted, any_of=principals_of(on))
            about_host = {"host": {"name": on.name, "principals": wanted.any_of}}
            if not (as_json or as_csv):
                output.note(f"as recorded, {on.name} lets in {listed(principals_of(on), _SHOWN)}")
        found = reader.certificates(replace(wanted, limit=limit + 1))  # one more shows whether there are more
        made = made_revocations(reader.revocation_events())
        rows: list[dict[str, Any]] = [certificate_row(row, now, revoked_by(reader, made, row)) for row in found[:limit]]
        if active:
            rows = [row for row in rows if row["status"] != "revoked"]
        more = str(found[limit - 1].seq) if len(found) > limit else None
    if as_json:
        output.show_json({"certificates": rows, "before": more, **about_host})
        return
    if as_csv:
        output.show_csv(_CSV_COLUMNS, rows)
    elif rows:
        for row in rows:
            row["principals"] = cut(",".join(row["principals"]), 40)
        output.show_table([_TITLES, *([row[name] for name in _COLUMNS] for row in rows)])
    else:
        output.note("no matching certificates")
    note_more(more, base)


@verb("certs show", "signer certs show 4711")
@click.argument("serial", type=SERIAL, metavar="SERIAL", help="as `certs list` shows it")
@segment_option
def certs_show(serial: int, segment: Path | None, as_json: bool) -> None:
    """Reads the ledger in SIGNER_DATA_DIR, also while the keeper runs."""
    from signer.ledger.lookups import certificate_details
    from signer.ledger.revoked import made_revocations, revoked_by

    with reading_certificates(segment) as reader:
        found = reader.certificate(serial)
        if found is None:
            where = f"; {output.count(reader.base, 'event')} are in segments: add --segment FILE" if reader.base else ""
            raise NotFound(
                "unknown_serial", f"the ledger has no certificate {serial}", f"see `signer certs list`{where}"
            )
        revoked = revoked_by(reader, made_revocations(reader.revocation_events()), found[0])
        details = certificate_details(*found, int(time.time()), revoked)
    if as_json:
        output.show_json(details)
    else:
        output.show_fields(dict(_flat(details)))


def _flat(details: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in details.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{name}: ")
        else:
            yield above + name, value


# --- ledger -----------------------------------------------------------------------------------------------------


@verb(
    "ledger verify",
    "signer ledger verify",
    'signer ledger verify --head "$(cat head-of-last-week)"',
    "signer ledger verify --checkpoint checkpoint --witness witness.example.org+1a2b3c4d+BA… --max-age 1h",
    "signer ledger verify --approvals --policy policy-2026-11.toml --policy policy-2026-12.toml",
)
@click.option("--head", type=HEAD, metavar="SEQ:HASH", help="an earlier output of `signer ledger head`")
@click.option("--checkpoint", type=FILE, metavar="FILE", help="an earlier checkpoint of this ledger")
@click.option("--witness", "witnesses", metavar="VKEY", multiple=True, type=WITNESS_KEY,
              help="a witness that must have cosigned it; may be repeated")  # fmt: skip
@click.option("--quorum", type=whole(1, 64), metavar="N", help="so many of the witnesses suffice; default: all")
@click.option("--max-age", type=DURATION, metavar="DURATION", help="and not longer ago than this, such as 1h")
@click.option("--approvals", is_flag=True, help="also check the signature of every approval again")
@click.option("--policy", "policies", type=FILE, metavar="FILE", multiple=True,
              help="a revision of policy.toml that was in force; may be repeated")  # fmt: skip
@click.option("--segment", "segments", type=FILE, metavar="FILE", multiple=True,
              help="also a file of `signer ledger archive`, and that both are one chain; may be repeated")  # fmt: skip
def ledger_verify(
    *,
    head: tuple[int, str] | None,
    checkpoint: Path | None,
    witnesses: tuple[VerifierKey, ...],
    quorum: int | None,
    max_age: int | None,
    approvals: bool,
    policies: tuple[Path, ...],
    segments: tuple[Path, ...],
    as_json: bool,
) -> int:
    """Follows the hash chain from the first event to the last and compares the views with the events.
    Only a saved head or checkpoint shows that the ledger was not cut off or rewritten as a whole, because
    the hashes need no key; with --witness, it must be one that another machine has cosigned. With
    --approvals, every signature of an approver is verified again, and every certificate that names humans
    is compared with what they signed; with the policies in force, also whose keys they were and that
    nothing was issued without them. Archived events are compared by their hashes, and with --segment
    themselves; --approvals needs all segments. Exit status 1 if the ledger is broken."""
    from signer.cli.checkpoints import CheckpointOptions, checkpoint_facts, checkpoint_lines
    from signer.ledger import audit
    from signer.ledger.archive import find_segments, verify_segments
    from signer.ledger.marks import VERIFIED, Mark, write_mark

    if policies and not approvals:
        raise UsageError("--policy goes with --approvals", "see `signer ledger verify --help`")
    options = CheckpointOptions(checkpoint, witnesses, quorum, max_age)
    options.check()
    saved = Head(*head, 0) if head else None
    with reading(in_one_transaction=False) as reader, output.Progress("verify") as progress:
        signed = options.read(reader)
        parts = find_segments(reader, segments) if approvals and reader.base else []
        newest = audit.verify(reader, progress, saved, None if signed is None else signed.checkpoint)
        joined = verify_segments(reader, segments, progress)
        write_mark(reader.data_dir, VERIFIED, Mark(newest.seq, int(time.time())))
    if saved is None and signed is None:
        output.warn(_NOTHING_SAVED)
    found = _audit_approvals(policies, parts) if approvals else None
    compared = ", and goes on from the saved head" if saved else ""
    if as_json:
        output.show_json(
            {
                "intact": True,
                "events": newest.seq,
                "head": head_facts(newest),
                "compared_with_saved_head": saved is not None,
                **_joined_facts(joined),
                **({} if signed is None else {"checkpoint": checkpoint_facts(signed)}),
                **({} if found is None else {"approvals": _audit_facts(found)}),
            }
        )
    else:
        output.show(f"intact: {output.count(newest.seq, 'event')}, each with its hash and in its place{compared}")
        output.show(f"head    {head_line(newest)}")
        _show_joined(joined)
        for line in () if signed is None else checkpoint_lines(signed):
            output.show(plain(line))
        if found is not None:
            _show_audit(found)
    return 1 if found is not None and found.problems else 0


def _show_joined(joined: Joined) -> None:
    for one in joined.compared:
        output.show(plain(f"segment {one.file}: events {one.first:,} to {one.last:,}, the same chain"))
    for one in joined.missing:
        text = f"events {one.first:,} to {one.last:,} are in the segment {one.file}, which was not given"
        output.warn(f"{text}: only their hashes were verified")


def _joined_facts(joined: Joined) -> dict[str, object]:
    if not joined.compared and not joined.missing:
        return {}
    return {
        "segments": [
            {
                "first": one.first,
                "last": one.last,
                "name": one.file,
                "sha256": one.sha256,
                "verified": one in joined.compared,
            }
            for one in sorted((*joined.compared, *joined.missing), key=lambda one: one.first)
        ]
    }


def _audit_approvals(files: tuple[Path, ...], segments: Sequence[Path]) -> Audit:
    from signer.authority.approval_audit import ApprovalAuditor
    from signer.ledger import audit

    auditor = ApprovalAuditor(dict(_revisions(files)))
    with reading() as ledger, output.Progress("approvals") as progress:
        total = ledger.head().seq
        for segment in (*segments, None):
            with nullcontext(ledger) if segment is None else reading(segment) as reader:
                for entry in audit.export(reader, reader.base + 1):
                    auditor.take(entry)
                    if entry.seq % 1_000 == 0:
                        progress(entry.seq, total)
    return auditor.audit


def _revisions(files: tuple[Path, ...]) -> Iterator[tuple[str, Policy]]:
    """Digest and policy of each revision; warns of one that is not valid by today's rules."""
    from signer.files import read_bounded
    from signer.policy.file import parse_policy
    from signer.policy.reading import MAX_POLICY_BYTES

    for path in files:
        try:
            policy = parse_policy(read_bounded(path, MAX_POLICY_BYTES), path.name)
        except OSError as error:
            text = f"{path} cannot be read: {error.strerror}"
            raise BadFile("policy_unreadable", text, "name a revision of policy.toml") from None
        except BadFile as fault:
            output.warn(f"{fault.text}, and is not used: see `signer policy check {path}`")
            continue
        yield policy.digest, policy


def _audit_facts(found: Audit) -> dict[str, object]:
    return {
        "signatures": found.signatures,
        "by_software_keys": found.software,
        "certificates": found.certificates,
        "keys": [
            {"approver": approver, "key": key, "approvals": number, "confirmed": (approver, key) in found.owned}
            for (approver, key), number in sorted(found.keys.items())
        ],
        "policies_not_given": dict(sorted(found.unknown_policies.items())),
        "problems": [problem._asdict() for problem in found.problems],
    }


def _show_audit(found: Audit) -> None:
    software = f", {found.software} of them by software keys" if found.software else ""
    issued = output.count(found.certificates, "certificate")
    output.show(f"signed  {output.count(found.signatures, 'approval')} that verify{software}; {issued} issued by them")
    for (approver, key), number in sorted(found.keys.items()):
        confirmed = "confirmed by its policy" if (approver, key) in found.owned else "no given policy confirms it"
        output.show(plain(f"key     {key} of {approver}, {output.count(number, 'approval')}; {confirmed}"))
    for problem in found.problems:
        output.show(plain(f"WRONG   event {problem.seq}: {problem.text}"))
    for digest, number in sorted(found.unknown_policies.items()):
        output.warn(f"{output.count(number, 'certificate')} under policy {digest}: pass that revision with --policy")


@verb("ledger head", "signer ledger head > head-of-this-week")
def ledger_head(as_json: bool) -> None:
    """Keep the line where the keeper cannot write. `signer ledger verify --head` compares the ledger with it.
    The event is not verified."""
    with reading() as reader:
        head = reader.head()
    output.show_result(head_facts(head), head_line(head), as_json=as_json, exactly=True)


def head_facts(head: Head) -> dict[str, object]:
    return {"seq": head.seq, "hash": head.hash, "time": timestamp(head.time_ms // 1000) if head.seq else None}


def head_line(head: Head) -> str:
    at = timestamp(head.time_ms // 1000) if head.seq else "empty"
    return plain(f"{head.seq}:{head.hash} {at}")


@verb(
    "ledger export",
    "signer ledger export > ledger.jsonl",
    "signer ledger export --from 1000 | jq -r .kind | sort | uniq -c",
)
@click.option("--from", "first", type=whole(1, MAX_SEQ), metavar="SEQ", help="default: the first one that is there")
@segment_option
def ledger_export(first: int | None, segment: Path | None, as_json: bool) -> None:  # noqa: ARG001 - JSON either way
    """Writes {actor, body, hash, kind, prev, seq, time} for each event, unverified, with or without --json.

    The lines can be verified without this program: `hash` is the hex SHA-256 of the RFC 8785 canonical
    JSON (UTF-8) of {actor, body, kind, prev, seq, time}, that is of the line without its `hash`; `prev`
    is the `hash` of the line before, 64 zeros in line 1; `seq` counts from 1; `time` is milliseconds
    since 1970 UTC. After `ledger archive` the first lines are in the segments, one after the other."""
    from signer.ledger import audit

    on_terminal = sys.stdout is not None and sys.stdout.isatty()  # None when closed
    with reading(segment) as reader, output.Progress("export", hidden=on_terminal) as progress:
        total = reader.head().seq
        if first is None:
            note_more(None, reader.base)
        for entry in audit.export(reader, first or reader.base + 1):
            output.show_json(event_line(entry), on_one_line=True)
            if entry.seq % 1_000 == 0:
                progress(entry.seq, total)


def event_line(entry: Entry) -> dict[str, object]:
    """An event as it is exported; raises `LedgerBroken` for a body that is not JSON, instead of breaking the line."""
    try:
        body = json.loads(entry.body)
    except (ValueError, RecursionError):
        from signer.ledger.reader import broken_at

        raise broken_at(entry.seq, "its body is not JSON") from None
    return {
        "actor": entry.actor,
        "body": body,
        "hash": entry.hash,
        "kind": entry.kind,
        "prev": entry.prev,
        "seq": entry.seq,
        "time": entry.time_ms,
    }


@verb("ledger rebuild", "signer ledger rebuild")
def ledger_rebuild(as_json: bool) -> None:
    """Takes the write lock, checks the chain on the way, and folds all events into a new file of views that
    replaces the old one: after any failure that is as it was. Events are never changed. Refused while a keeper
    runs."""
    from signer.ledger import audit
    from signer.ledger.reader import LedgerReader
    from signer.ledger.schema import FILE_NAME
    from signer.ledger.store import Ledger

    data_dir = readable_data_dir()
    LedgerReader(data_dir).connection()  # raises if there is no ledger; opening it for writing would create one
    _act_as_owner(data_dir / FILE_NAME)
    try:
        ledger = Ledger(data_dir)
    except Unavailable as error:
        if error.code == "ledger_in_use":
            raise Unavailable(error.code, "a keeper writes this ledger", "stop it, then rebuild") from None
        raise
    try:
        with output.Progress("rebuild") as progress:
            events, made = audit.rebuild(ledger, progress)
    finally:
        ledger.close()
    listed = ", ".join(f"{name} {rows:,}" for name, rows in made.items())
    text = f"rebuilt from {output.count(events, 'event')}: {listed} rows"
    output.show_result({"events": events, "tables": made}, text, as_json=as_json)


def _act_as_owner(path: Path) -> None:
    """Root becomes the owner of the ledger, so that no file is created that the keeper cannot write."""
    from signer.ledger.reader import storage_errors

    with storage_errors():
        facts = path.stat()
        if os.geteuid() == 0 and facts.st_uid != 0:
            os.setgroups([])
            os.setgid(facts.st_gid)
            os.setuid(facts.st_uid)


# --- events ---------------------------------------------------------------------------------------------------------


# What a line shows of an event, besides its time, kind and actor; of other kinds, everything that is not a list.
_SHOWN_OF_EVENT: Final[dict[str, tuple[str, ...]]] = {
    "certificate.issued": ("serial", "role", "principals", "address"),
    "request.refused": ("code", "role", "text", "address"),
}
_LONGEST: Final = 160  # characters of what a line shows


@verb(
    "events list",
    "signer events list --kind request.refused --since 24h",
    "signer events list --identity ci --limit 200",
)
@click.option("--kind", metavar="KIND", help="such as request.refused; `freeze` means all that begin with freeze.")
@click.option("--identity", metavar="NAME", help="by this identity, or about it")
@click.option("--since", type=SINCE, metavar="TIME", default=0, help="such as 24h, or 2026-11-22T14:00:00Z")
@page_options
@segment_option
def events_list(
    *,
    kind: str | None,
    identity: str | None,
    since: int,
    limit: int,
    before: int | None,
    segment: Path | None,
    as_json: bool,
) -> None:
    """Reads the ledger in SIGNER_DATA_DIR, also while the keeper runs. Repeats of a refusal are one event with a
    count. Times are UTC."""
    with reading(segment) as reader:
        base = reader.base
        if kind is not None:
            _check_kind(kind, reader)
        found = reader.events(EventFilter(kind, identity, since * 1000, before, limit=limit + 1))
        rows = [{"at": timestamp(entry.time_ms // 1000), **event_line(entry)} for entry in found[:limit]]
    more = str(found[limit - 1].seq) if len(found) > limit else None
    titles = ("SEQ", "TIME", "KIND", "ACTOR", "FACTS")
    cells = map(_event_columns, found[:limit])
    output.show_rows({"events": rows, "before": more}, titles, cells, "no matching events", as_json=as_json)
    if not as_json:
        note_more(more, base)


def _check_kind(kind: str, reader: LedgerReader) -> None:
    """Raises `UsageError` unless this release records such a kind, or the ledger holds one, of another release."""
    from itertools import groupby

    from signer.ledger.schema import EVENT_KINDS

    wanted = EventFilter(kind, limit=1)
    if any(map(wanted.takes, EVENT_KINDS)) or reader.events(wanted):
        return
    groups = {group: [*names] for group, names in groupby(EVENT_KINDS, lambda name: name.partition(".")[0])}
    known = ", ".join(
        f"{group}.{'|'.join(name.partition('.')[2] for name in names)}" for group, names in groups.items()
    )
    near = similar(kind, [*EVENT_KINDS, *groups])
    raise UsageError(
        f"--kind: {quoted(kind, 60)} is not a kind of event",
        f"{near}; kinds: {known}" if near else f"use one of {known}",
    )


def _event_columns(entry: Entry) -> tuple[str, ...]:
    body: dict[str, Any] = json.loads(entry.body)
    names = _SHOWN_OF_EVENT.get(entry.kind) or tuple(
        name for name, value in body.items() if not isinstance(value, list | dict)
    )
    facts = ", ".join(f"{name} {_short(body[name])}" for name in names if body.get(name) not in (None, "", []))
    return (str(entry.seq), timestamp(entry.time_ms // 1000), entry.kind, entry.actor, cut(facts, _LONGEST))


def _short(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
