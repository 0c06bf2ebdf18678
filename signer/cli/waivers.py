"""`signer waivers` and `signer incidents`: what approvals leave in force, and what break-glass leaves open."""

from __future__ import annotations

from typing import Any

import click

from signer.cli import output
from signer.cli.arguments import INCIDENT, REASON, REFERENCE, WAIVER
from signer.cli.connection import Service, service_options
from signer.cli.parser import verb
from signer.errors import NotFound


@verb("waivers list", "signer waivers list")
@service_options
def waivers_list(*, service: Service, as_json: bool) -> None:
    """Shows the waivers in force that you may see: for whom, what they cover, until when and how often still."""
    with service.open() as api:
        found = api.listed("waivers")
    titles = ("WAIVER", "IDENTITY", "ROLE", "PRINCIPALS", "COMMAND", "USED", "UNTIL", "BY")
    rows = map(_waiver_columns, found)
    output.show_rows({"waivers": found}, titles, rows, "no waivers in force", as_json=as_json)


def _waiver_columns(row: dict[str, Any]) -> tuple[str, ...]:
    names = (row.get("waiver"), row.get("identity"), row.get("role"))
    used = f"{row.get('used')} of {row.get('uses')}"
    lists = [",".join(map(str, row.get(name) or [])) for name in ("principals", "by")]
    return (*map(str, names), lists[0], str(row.get("force_command") or "any"), used, str(row.get("until")), lists[1])


@verb("waivers end", 'signer waivers end w-k3v9q2m7xa --reason "the deploy is done"')
@click.argument("waiver", type=WAIVER, metavar="WAIVER", help="as `waivers list` shows it")
@click.option("--reason", type=REASON, metavar="TEXT", help="recorded")
@service_options
def waivers_end(*, waiver: str, reason: str | None, service: Service, as_json: bool) -> None:
    """Ends a waiver at once: the next ask of its identity waits for a human again. Certificates that were issued
    under it stay valid until they expire. Its identity may end it, whoever may approve its request, and the right
    `freeze`."""
    with service.open() as api:
        reply = api.post("waivers", waiver, "end", body={"reason": reason or ""})
    output.show_result(reply, f"{waiver} is ended", as_json=as_json)


@verb("incidents list", "signer incidents list", "signer incidents list --all")
@click.option("--all", "also_closed", is_flag=True, help="also those that were closed, the newest of them")
@service_options
def incidents_list(*, also_closed: bool, service: Service, as_json: bool) -> None:
    """Shows each use of break-glass, newest first. While one is open for too long, /readyz carries a warning,
    and the next one of the same person needs a second human."""
    with service.open() as api:
        found = api.listed("incidents", **({"state": "all"} if also_closed else {}))
    titles = ("INCIDENT", "IDENTITY", "ROLE", "SERIAL", "OPENED", "STATE", "REASON")
    nothing = "no incidents" if also_closed else "no open incidents"
    output.show_rows({"incidents": found}, titles, map(_incident_columns, found), nothing, as_json=as_json)


def _incident_columns(row: dict[str, Any]) -> tuple[str, ...]:
    names = ("incident", "identity", "role", "serial", "opened")
    return (*(str(row.get(name)) for name in names), _incident_state(row), str(row.get("reason")))


def _incident_state(row: dict[str, Any]) -> str:
    if row.get("closed") is not None:
        return "closed"
    return "overdue" if row.get("overdue") else "open"


@verb("incidents show", "signer incidents show i-k3v9q2m7xa")
@click.argument("incident", type=INCIDENT, metavar="INCIDENT", help="as `incidents list` shows it")
@service_options
def incidents_show(*, incident: str, service: Service, as_json: bool) -> None:
    """Shows who broke the glass, why, with which certificate, and how it was closed."""
    with service.open() as api:
        found = next((row for row in api.listed("incidents", state="all") if row.get("incident") == incident), None)
    if found is None:
        raise NotFound(
            "unknown_incident", f"there is no incident {incident} that you may see", "see `signer incidents list --all`"
        )
    if as_json:
        output.show_json(found)
        return
    facts = [(name, str(found.get(name))) for name in ("incident", "identity", "role", "serial", "opened", "reason")]
    closed = found.get("closed")
    state = _incident_state(found)
    if isinstance(closed, dict):
        state = f"closed by {closed.get('by')} at {closed.get('at')} with {closed.get('reference')}"
    output.show_table([*facts, ("state", state), ("certificate", f"signer certs show {found.get('serial')}")])


@verb("incidents close", "signer incidents close i-k3v9q2m7xa --reference 4a1f09c")
@click.argument("incident", type=INCIDENT, metavar="INCIDENT", help="as `incidents list` shows it")
@click.option(
    "--reference", type=REFERENCE, metavar="COMMIT", required=True,
    help="the commit that brings the change back into the repository, or a link to it",
)  # fmt: skip
@service_options
def incidents_close(*, incident: str, reference: str, service: Service, as_json: bool) -> None:
    """Closes an incident. What was changed by hand must be in the repository first, or the next run of its
    configuration undoes it: the commit is recorded."""
    with service.open() as api:
        reply = api.post("incidents", incident, "close", body={"reference": reference})
    output.show_result(reply, f"{incident} is closed with {reference}", as_json=as_json)
