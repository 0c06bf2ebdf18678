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
    if code is None:
        _list_codes(as_json=as_json)
    else:
        _explain_code(code, as_json=as_json)


def _explain_code(code: str, *, as_json: bool) -> None:
    """Raises `UsageError` for a code that the catalogue does not have."""
    entry = find_entry(code)
    if entry is None:
        near = nearest_codes(code)
        hint = f"did you mean {', '.join(near)}" if near else "see `signer error`"
        raise UsageError(f"{quoted(code, 60)} is not an error code", hint)
    if as_json:
        output.show_json(entry._asdict())
        return
    status = "never sent over HTTP" if entry.status is None else f"HTTP {entry.status}"
    facts = {**entry._asdict(), "status": status}
    output.show_table([(name, value) for name, value in facts.items() if name != "counted"])


def _list_codes(*, as_json: bool) -> None:
    if as_json:
        output.show_json({"errors": [entry._asdict() for entry in CATALOGUE.values()]})
    else:
        output.show_table((entry.code, entry.status or "-", entry.meaning) for entry in CATALOGUE.values())
