"""`signer events list`: what the ledger says happened. It only reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import click

from signer.cli import output
from signer.cli.arguments import MAX_SEQ, SINCE, json_option, segment_option, whole
from signer.cli.ledger import event_line, note_archived, reading
from signer.cli.parser import verb
from signer.model import Entry
from signer.units import timestamp

MAX_PAGE: Final = 1_000
# What a line shows of an event, besides its time, kind and actor; of other kinds, everything that is not a list.
_SHOWN: Final[dict[str, tuple[str, ...]]] = {
    "certificate.issued": ("serial", "role", "principals", "address"),
    "request.refused": ("code", "role", "text", "address"),
}
_LONGEST: Final = 160  # characters of what a line shows


@verb(
    "events list",
    examples=["signer events list --kind request.refused --since 24h", "signer events list --identity ci --limit 200"],
)
@click.option("--kind", metavar="KIND", help="such as request.refused; `freeze` means all that begin with freeze.")
@click.option("--identity", metavar="NAME", help="by this identity, or about it")
@click.option("--since", type=SINCE, metavar="TIME", default=0, help="such as 24h, or 2026-11-22T14:00:00Z")
@click.option("--limit", type=whole(1, MAX_PAGE), metavar="N", default=50, help=f"at most {MAX_PAGE}; default 50")
@click.option("--before", type=whole(1, MAX_SEQ), metavar="SEQ", help="the next page; a full page shows the number")
@segment_option
@json_option
def events_list(
    *,
    kind: str | None,
    identity: str | None,
    since: int,
    limit: int,
    before: int | None,
    segment: Path | None,
    as_json: bool,
) -> int:
    """Reads the ledger in SIGNER_DATA_DIR, also while the keeper runs. Repeats of a refusal are one event with a
    count. Times are UTC."""
    with reading(segment) as reader:
        base = reader.base
        found = reader.events(kind, identity, since * 1000, before, limit + 1)
        rows = [{"at": timestamp(entry.time_ms // 1000), **event_line(entry)} for entry in found[:limit]]
    more = str(found[limit - 1].seq) if len(found) > limit else None
    if as_json:
        output.show_json({"events": rows, "before": more})
        return 0
    if rows:
        output.show_table(map(_columns, found[:limit]), titles=("SEQ", "TIME", "KIND", "ACTOR", "FACTS"))
    else:
        output.note("no matching events")
    if more is not None:
        output.note(f"more results: add `--before {more}`")
    else:
        note_archived(base)
    return 0


def _columns(entry: Entry) -> tuple[str, ...]:
    body: dict[str, Any] = json.loads(entry.body)
    names = _SHOWN.get(entry.kind) or tuple(name for name, value in body.items() if not isinstance(value, list | dict))
    facts = ", ".join(f"{name} {_short(body[name])}" for name in names if body.get(name) not in (None, "", []))
    shown = facts if len(facts) <= _LONGEST else f"{facts[: _LONGEST - 1]}…"
    return (str(entry.seq), timestamp(entry.time_ms // 1000), entry.kind, entry.actor, shown)


def _short(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
