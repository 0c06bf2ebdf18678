"""`signer events list`: what the ledger says happened. It only reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import click

from signer.cli import output
from signer.cli.arguments import SINCE, page_options, segment_option
from signer.cli.ledger import event_line, note_more, reading
from signer.cli.parser import verb
from signer.model import Entry
from signer.units import timestamp

# What a line shows of an event, besides its time, kind and actor; of other kinds, everything that is not a list.
_SHOWN: Final[dict[str, tuple[str, ...]]] = {
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
        found = reader.events(kind, identity, since * 1000, before, limit + 1)
        rows = [{"at": timestamp(entry.time_ms // 1000), **event_line(entry)} for entry in found[:limit]]
    more = str(found[limit - 1].seq) if len(found) > limit else None
    titles = ("SEQ", "TIME", "KIND", "ACTOR", "FACTS")
    cells = map(_columns, found[:limit])
    output.show_rows({"events": rows, "before": more}, titles, cells, "no matching events", as_json=as_json)
    if not as_json:
        note_more(more, base)


def _columns(entry: Entry) -> tuple[str, ...]:
    body: dict[str, Any] = json.loads(entry.body)
    names = _SHOWN.get(entry.kind) or tuple(name for name, value in body.items() if not isinstance(value, list | dict))
    facts = ", ".join(f"{name} {_short(body[name])}" for name in names if body.get(name) not in (None, "", []))
    shown = facts if len(facts) <= _LONGEST else f"{facts[: _LONGEST - 1]}…"
    return (str(entry.seq), timestamp(entry.time_ms // 1000), entry.kind, entry.actor, shown)


def _short(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
