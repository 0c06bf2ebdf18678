"""`signer error`: the meaning of an error code and what to do about it, from the error catalogue."""

from __future__ import annotations

import click

from signer.cli import output
from signer.cli.arguments import quoted
from signer.cli.parser import verb
from signer.cli.usage import UsageError
from signer.error_catalogue import CATALOGUE, find_entry, nearest_codes


@verb("error", "signer error frozen", "signer error --json | jq -r '.errors[].code'")
@click.argument("code", metavar="CODE", required=False, help="an error code, such as frozen; default: all")
def error(code: str | None, as_json: bool) -> None:
    """Codes are in the JSON of errors, in the ledger and in metrics. Without CODE, lists all codes, one line
    each: code, HTTP status (- if it is never sent over HTTP), meaning."""
    rows: list[tuple[object, ...]]
    if code is None:
        facts = {"errors": [entry._asdict() for entry in CATALOGUE.values()]}
        rows = [(entry.code, entry.status or "-", entry.meaning) for entry in CATALOGUE.values()]
    else:
        entry = find_entry(code)
        if entry is None:
            near = nearest_codes(code)
            hint = f"did you mean {', '.join(near)}" if near else "see `signer error`"
            raise UsageError(f"{quoted(code, 60)} is not an error code", hint)
        facts = entry._asdict()
        status = "never sent over HTTP" if entry.status is None else f"HTTP {entry.status}"
        rows = [(name, value) for name, value in {**facts, "status": status}.items() if name != "counted"]
    if as_json:
        output.show_json(facts)
    else:
        output.show_table(rows)
