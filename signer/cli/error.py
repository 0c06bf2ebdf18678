"""`signer error`: what an error code means and what to do about it, from the error catalogue. It reads nothing else."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

from signer.cli import output
from signer.cli.parser import Usage
from signer.error_catalogue import CATALOGUE, ErrorEntry, find_entry, nearest_codes

if TYPE_CHECKING:
    from signer.settings import Settings


def error(arguments: Namespace, _settings: Callable[[], Settings]) -> int:
    """One code, or a line for each code if none is given."""
    if arguments.code is None:
        _list_codes(as_json=arguments.json)
    else:
        _explain_code(arguments.code, as_json=arguments.json)
    return 0


def _explain_code(code: str, *, as_json: bool) -> None:
    """Raises `Usage` for a code that the catalogue does not have."""
    entry = find_entry(code)
    if entry is None:
        near = nearest_codes(code)
        hint = f"did you mean {', '.join(near)}" if near else "see `signer error`"
        raise Usage(f'"{code[:60]}" is not an error code', hint)
    if as_json:
        output.show_json(_as_json(entry))
        return
    output.show_table(
        [
            ("code", entry.code),
            ("subject", entry.subject),
            ("meaning", entry.meaning),
            ("action", entry.action),
            ("status", "never sent over HTTP" if entry.status is None else f"HTTP {entry.status}"),
        ]
    )


def _list_codes(*, as_json: bool) -> None:
    if as_json:
        output.show_json({"errors": [_as_json(entry) for entry in CATALOGUE.values()]})
    else:
        output.show_table((entry.code, entry.status or "-", entry.meaning) for entry in CATALOGUE.values())


def _as_json(entry: ErrorEntry) -> dict[str, object]:
    return {
        "code": entry.code,
        "subject": entry.subject,
        "meaning": entry.meaning,
        "action": entry.action,
        "status": entry.status,
        "counted": entry.counted,
    }
