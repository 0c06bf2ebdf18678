"""`signer evidence verify`: is what a run left behind as it was sealed, and does the ledger hold its digest?

It only reads.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from signer.api_client import ApiClient
from signer.cli import output
from signer.errors import LedgerBroken
from signer.ledger.chain import entry_hash
from signer.ledger.reader import LedgerReader
from signer.ledger.views import operation_row
from signer.migration.config import load_cutover_file
from signer.migration.evidence.verify import FindInLedger, Verdict, check_evidence
from signer.model import Entry
from signer.settings import Settings


def evidence_verify(arguments: Namespace, settings: Callable[[], Settings]) -> int:
    """One line for each problem; exit status 0 if the evidence is intact and recorded."""
    with _ledger(arguments.config, settings) as find:
        verdict = check_evidence(Path(arguments.directory), find)
    if arguments.json:
        output.show_json(_as_json(verdict))
    else:
        _show(verdict)
    return 0 if verdict.is_good else 1


@contextmanager
def _ledger(config: str | None, settings: Callable[[], Settings]) -> Iterator[FindInLedger]:
    """How to ask the ledger for a digest: the service that cutover.toml names, or the file of SIGNER_DATA_DIR."""
    if config is not None:
        told = load_cutover_file(Path(config)).signer
        with ApiClient(told.address, told.token_file) as client:
            yield lambda digest: next(iter(client.operations(digest)), None)
    else:
        with closing(LedgerReader(settings().data_dir)) as reader:
            yield lambda digest: _recorded(reader, digest)


def _recorded(reader: LedgerReader, digest: str) -> Mapping[str, Any] | None:
    """The newest event with that digest, if its own hash fits; `signer ledger verify` follows the whole chain."""
    for entry in reader.operations(digest, None, 1):
        if _hash(entry) != entry.hash:
            break
        try:
            return operation_row(entry)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            break
    else:
        return None
    raise LedgerBroken(
        "ledger_broken",
        f"the ledger is broken at event {entry.seq}: it is not as it was written",
        "run `signer ledger verify`, which says where",
        {"seq": entry.seq},
    )


def _hash(entry: Entry) -> str:
    return entry_hash(entry.seq, entry.time_ms, entry.kind, entry.actor, entry.body, entry.prev)


def _as_json(verdict: Verdict) -> dict[str, object]:
    problems = [
        {"outcome": "warn" if one.is_warning else "fail", "code": one.code, "text": one.text}
        for one in verdict.problems
    ]
    return {
        "good": verdict.is_good,
        "operation": verdict.operation,
        "outcome": verdict.outcome,
        "files": verdict.files,
        "digest": verdict.digest,
        "recorded": dict(verdict.recorded) if verdict.recorded is not None else None,
        "problems": problems,
    }


def _show(verdict: Verdict) -> None:
    """The problems, failures first, and then what it comes to."""
    ordered = sorted(verdict.problems, key=lambda one: one.is_warning)
    output.show_table([("warn" if one.is_warning else "FAIL", one.code, one.text) for one in ordered])
    failed = sum(not one.is_warning for one in ordered)
    if failed:
        output.show(f"not good: {output.count(failed, 'problem')}")
        return
    word = f"{verdict.operation} {verdict.outcome.replace('_', ' ')}"
    output.show(f"intact and recorded: {output.plain(word)}, {output.count(verdict.files, 'file')}")
    rows = [("digest", verdict.digest)]
    if verdict.recorded is not None:
        told = verdict.recorded
        rows.append(("ledger", f"event {told.get('seq')}, {told.get('time')}, by {told.get('actor')}"))
    output.show_table(rows)
