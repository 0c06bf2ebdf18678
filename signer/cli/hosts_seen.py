"""`signer hosts seen`: which hosts have the newest revocation list, and waiting until they do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from signer.cli import output
from signer.cli.arguments import DURATION, json_option
from signer.cli.connection import connection_options, open_api
from signer.cli.parser import verb
from signer.units import plain, timestamp

LATELY: Final = 900  # seconds; a host that is up fetches each minute, and raises an alarm after so long
_PAUSE: Final = 1.0  # seconds between two questions


@verb("hosts seen", examples=["signer hosts seen", "signer hosts seen --wait 2m"])
@click.option("--wait", type=DURATION, metavar="DURATION", help="until each host seen lately has it, at most so long")
@connection_options
@json_option
def hosts_seen(*, wait: int | None, address: str | None, token_file: Path | None, as_json: bool) -> int:
    """Shows the hosts that fetched the revocation list in the last day, and which version each has. Their names
    are what they say of themselves. Exit status 1 with --wait if the time is over and a host that was seen in
    the last 15 minutes does not have the newest version. Needs the right `hosts` or `ledger.read`."""
    deadline = time.monotonic() + (wait or 0)
    with open_api(address, token_file) as api:
        found = api.hosts()
        while wait is not None and not is_everywhere(found, int(time.time())) and time.monotonic() < deadline:
            time.sleep(_PAUSE)
            found = api.hosts()
    done = is_everywhere(found, int(time.time()))
    if as_json:
        output.show_json({**found, "everywhere": done})
    else:
        rows = sorted(found["hosts"], key=lambda row: (row["current"], row["name"]))
        if rows:
            output.show_table(map(_columns, rows), titles=("HOST", "VERSION", "NEWEST", "SEEN"))
        output.show(summary(found, int(time.time())))
    return 0 if done or wait is None else 1


def _columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    return plain(str(row["name"])), str(row["version"]), "yes" if row["current"] else "no", str(row["seen"])


def _lately(found: Mapping[str, Any], now: int) -> list[Mapping[str, Any]]:
    return [row for row in found["hosts"] if row["seen"] and row["seen"] >= timestamp(now - LATELY)]


def is_everywhere(found: Mapping[str, Any], now: int) -> bool:
    """Whether the newest list is published, and each host that was seen lately has it; `found` is of `/api/hosts`."""
    return found["version"] == found["wanted"] and all(row["current"] for row in _lately(found, now))


def summary(found: Mapping[str, Any], now: int) -> str:
    """One line: how many of the hosts that were seen lately have the newest list."""
    lately = _lately(found, now)
    current = sum(bool(row["current"]) for row in lately)
    wanted = found["version"] if found["wanted"] is None else found["wanted"]
    return f"{current} of {output.count(len(lately), 'host')} seen in the last 15 minutes have version {wanted}"


def count_with(found: Mapping[str, Any], version: int, now: int) -> tuple[int, int]:
    """How many hosts were seen lately, and how many of them have list `version` or a newer one.

    It goes by the version that each host fetched, not by `current`: just after a revocation, the newest list that
    `/api/hosts` knows can still be the one before.
    """
    lately = _lately(found, now)
    return len(lately), sum((row["version"] or 0) >= version for row in lately)
