"""`signer waivers` and `signer incidents`: what approvals leave in force, and what break-glass leaves open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from signer.cli import output
from signer.cli.arguments import INCIDENT, REASON, REFERENCE, WAIVER, json_option
from signer.cli.connection import connection_options, open_api
from signer.cli.parser import verb
from signer.errors import NotFound
from signer.units import plain


@verb("waivers list", examples=["signer waivers list"])
@connection_options
@json_option
def waivers_list(*, address: str | None, token_file: Path | None, as_json: bool) -> int:
    """Shows the waivers in force that you may see: for whom, what they cover, until when and how often still."""
    with open_api(address, token_file) as service:
        found = service.waivers()
    if as_json:
        output.show_json({"waivers": found})
    elif found:
        titles = ("WAIVER", "IDENTITY", "ROLE", "PRINCIPALS", "COMMAND", "USED", "UNTIL", "BY")
        output.show_table(map(_waiver_columns, found), titles=titles)
    else:
        output.note("no waivers in force")
    return 0


def _waiver_columns(row: dict[str, Any]) -> tuple[str, ...]:
    names = (row.get("waiver"), row.get("identity"), row.get("role"))
    used = f"{row.get('used')} of {row.get('uses')}"
    lists = [",".join(map(str, row.get(name) or [])) for name in ("principals", "by")]
    return (*map(str, names), lists[0], str(row.get("force_command") or "any"), used, str(row.get("until")), lists[1])


@verb("waivers end", examples=['signer waivers end w-k3v9q2m7xa --reason "the deploy is done"'])
@click.argument("waiver", type=WAIVER, metavar="WAIVER", help="as `waivers list` shows it")
@click.option("--reason", type=REASON, metavar="TEXT", help="recorded")
@connection_options
@json_option
def waivers_end(*, waiver: str, reason: str | None, address: str | None, token_file: Path | None, as_json: bool) -> int:
    """Ends a waiver at once: the next ask of its identity waits for a human again. Certificates that were issued
    under it stay valid until they expire. Its identity may end it, whoever may approve its request, and the right
    `freeze`."""
    with open_api(address, token_file) as service:
        reply = service.end_waiver(waiver, reason or "")
    if as_json:
        output.show_json(reply)
    else:
        output.show(f"{plain(waiver)} is ended")
    return 0


@verb("incidents list", examples=["signer incidents list", "signer incidents list --all"])
@click.option("--all", "also_closed", is_flag=True, help="also those that were closed, the newest of them")
@connection_options
@json_option
def incidents_list(*, also_closed: bool, address: str | None, token_file: Path | None, as_json: bool) -> int:
    """Shows each use of break-glass, newest first. While one is open for too long, /readyz carries a warning,
    and the next one of the same person needs a second human."""
    with open_api(address, token_file) as service:
        found = service.incidents(also_closed=also_closed)
    if as_json:
        output.show_json({"incidents": found})
    elif found:
        titles = ("INCIDENT", "IDENTITY", "ROLE", "SERIAL", "OPENED", "STATE", "REASON")
        output.show_table(map(_incident_columns, found), titles=titles)
    else:
        output.note("no incidents" if also_closed else "no open incidents")
    return 0


def _incident_columns(row: dict[str, Any]) -> tuple[str, ...]:
    names = ("incident", "identity", "role", "serial", "opened")
    return (*(str(row.get(name)) for name in names), _incident_state(row), str(row.get("reason")))


def _incident_state(row: dict[str, Any]) -> str:
    if row.get("closed") is not None:
        return "closed"
    return "overdue" if row.get("overdue") else "open"


@verb("incidents show", examples=["signer incidents show i-k3v9q2m7xa"])
@click.argument("incident", type=INCIDENT, metavar="INCIDENT", help="as `incidents list` shows it")
@connection_options
@json_option
def incidents_show(*, incident: str, address: str | None, token_file: Path | None, as_json: bool) -> int:
    """Shows who broke the glass, why, with which certificate, and how it was closed."""
    with open_api(address, token_file) as service:
        found = next((row for row in service.incidents(also_closed=True) if row.get("incident") == incident), None)
    if found is None:
        raise NotFound(
            "unknown_incident", f"there is no incident {incident} that you may see", "see `signer incidents list --all`"
        )
    if as_json:
        output.show_json(found)
        return 0
    facts = [(name, str(found.get(name))) for name in ("incident", "identity", "role", "serial", "opened", "reason")]
    closed = found.get("closed")
    state = _incident_state(found)
    if isinstance(closed, dict):
        state = f"closed by {closed.get('by')} at {closed.get('at')} with {closed.get('reference')}"
    output.show_table([*facts, ("state", state), ("certificate", f"signer certs show {found.get('serial')}")])
    return 0


@verb("incidents close", examples=["signer incidents close i-k3v9q2m7xa --reference 4a1f09c"])
@click.argument("incident", type=INCIDENT, metavar="INCIDENT", help="as `incidents list` shows it")
@click.option(
    "--reference", type=REFERENCE, metavar="COMMIT", required=True,
    help="the commit that brings the change back into the repository, or a link to it",
)  # fmt: skip
@connection_options
@json_option
def incidents_close(
    *, incident: str, reference: str, address: str | None, token_file: Path | None, as_json: bool
) -> int:
    """Closes an incident. What was changed by hand must be in the repository first, or the next run of its
    configuration undoes it: the commit is recorded."""
    with open_api(address, token_file) as service:
        reply = service.close_incident(incident, reference)
    if as_json:
        output.show_json(reply)
    else:
        output.show(plain(f"{incident} is closed with {reference}"))
    return 0
