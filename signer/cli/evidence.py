"""`signer evidence verify`: compares the evidence of a run with its seal and with the ledger. It only reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from signer.cli import output
from signer.cli.arguments import FILE, read_settings
from signer.cli.parser import verb
from signer.cli.places import Place, with_places
from signer.errors import LedgerBroken
from signer.units import plain

if TYPE_CHECKING:
    from signer.ledger.reader import LedgerReader
    from signer.migration.evidence.verify import FindInLedger, Verdict


@verb(
    "evidence verify",
    "signer evidence verify /var/lib/safe-session/evidence/2026-11-22T14-05-02Z-cutover",
    "signer evidence verify . --config cutover.toml --json",
)
@click.argument("directory", type=FILE, metavar="DIR", help="the directory of one run")
@click.option("--config", type=FILE, metavar="FILE", help="cutover.toml of the platform, to ask its service")
def evidence_verify(directory: Path, config: Path | None, as_json: bool) -> int:
    """Compares every file with SHA256SUMS, compares plan, approvals and outcome with each other, and looks up the
    digest in the ledger: in the running service that cutover.toml names, or without --config in the ledger
    file in SIGNER_DATA_DIR. Exit status 1 if a check failed; a warning is not a failure."""
    from signer.migration.evidence.verify import check_evidence

    with _ledger(config) as find:
        verdict = check_evidence(directory, find)
    if as_json:
        output.show_json(_as_json(verdict))
    else:
        _show(verdict, Place(str(directory), "DIR"))
    return 0 if verdict.is_good else 1


@contextmanager
def _ledger(config: Path | None) -> Iterator[FindInLedger]:
    """Looks up a digest in the ledger of the service that cutover.toml names, or in the file in SIGNER_DATA_DIR."""
    if config is not None:
        from signer.api_client import ApiClient
        from signer.migration.config import load_cutover_file

        service = load_cutover_file(config).signer
        with ApiClient(service.address, service.token_file) as client:
            yield lambda digest: next(iter(client.operations(digest)), None)
    else:
        from signer.ledger.reader import LedgerReader

        with closing(LedgerReader(read_settings().data_dir)) as reader:
            yield lambda digest: _recorded(reader, digest)


def _recorded(reader: LedgerReader, digest: str) -> Mapping[str, Any] | None:
    """The newest event with that digest, if its own hash is right; `signer ledger verify` follows the whole chain."""
    from signer.ledger.chain import entry_hash
    from signer.ledger.lookups import operation_row

    entry = next(iter(reader.operations(digest, None, 1)), None)
    if entry is None:
        return None
    if entry_hash(entry.seq, entry.time_ms, entry.kind, entry.actor, entry.body, entry.prev) == entry.hash:
        with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return operation_row(entry)
    raise LedgerBroken(
        "ledger_broken",
        f"the ledger is broken at event {entry.seq}: it is not as it was written",
        "run `signer ledger verify`, which shows where",
        {"seq": entry.seq},
    )


def _as_json(verdict: Verdict) -> dict[str, object]:
    problems = [
        {"outcome": "warn" if one.is_warning else "fail", "code": one.code, "text": one.text}
        for one in verdict.problems
    ]
    return {"good": verdict.is_good, **asdict(verdict), "problems": problems}


def _show(verdict: Verdict, place: Place) -> None:
    ordered = sorted(verdict.problems, key=lambda one: one.is_warning)
    output.show_table(
        [("warn" if one.is_warning else "FAIL", one.code, with_places(one.text, [place])) for one in ordered]
    )
    failed = sum(not one.is_warning for one in ordered)
    if failed:
        output.show(f"not good: {output.count(failed, 'problem')}")
        return
    word = f"{verdict.operation} {verdict.outcome.replace('_', ' ')}"
    output.show(f"intact and recorded: {plain(word)}, {output.count(verdict.files, 'file')}")
    rows = [("digest", verdict.digest)]
    if verdict.recorded is not None:
        event = verdict.recorded
        rows.append(("ledger", f"event {event.get('seq')}, {event.get('time')}, by {event.get('actor')}"))
    output.show_table(rows)
