"""`signer cutover`: plan, apply, status, rollback. They are carried out in `moves.py`."""

from __future__ import annotations

from pathlib import Path

import click

from signer.cli.arguments import (
    REASON,
    approve_option,
    commands_option,
    config_option,
    out_option,
    plan_argument,
)
from signer.cli.parser import verb


@verb("cutover plan", "signer cutover plan --config cutover.toml --out plan.json")
@config_option
@out_option
@commands_option
def cutover_plan(config: Path, out: Path | None, commands: bool, as_json: bool) -> None:
    """Reads host, service, Vault and policy.toml, and prints each step with its effect and its undo; changes
    nothing. The plan file contains everything that the steps depend on, under one digest: `apply` applies
    exactly that or nothing."""
    from signer.cli.moves import plan_cutover

    plan_cutover(config, out, commands=commands, as_json=as_json)


@verb("cutover apply", "signer cutover apply plan.json --approve PHRASE")
@plan_argument
@approve_option
def cutover_apply(plan: Path, approve: str | None, as_json: bool) -> int:
    """Needs the approval phrase, on the command line or typed at a terminal. A plan is refused if the state has
    changed since (exit 4); a wrong phrase changes nothing (exit 3). If a step fails after the service was
    changed, the service is moved back to Vault. An interrupted run is resumed with the same plan."""
    from signer.cli.moves import apply_cutover

    return apply_cutover(plan, approve, as_json=as_json)


@verb("cutover rollback", 'signer cutover rollback --config cutover.toml --reason "edge1 lacks the new CA"')
@config_option
@click.option("--reason", type=REASON, metavar="TEXT", required=True, help="the reason, for the record")
def cutover_rollback(config: Path, reason: str, as_json: bool) -> int:
    """Starts the service without the overlay, and proves by logins that Vault signs. Refused, with nothing
    changed, if Vault does not sign. Also ends an interrupted cutover."""
    from signer.cli.moves import roll_back

    return roll_back(config, reason, as_json=as_json)


@verb("cutover status", "signer cutover status --config cutover.toml")
@config_option
def cutover_status(config: Path, as_json: bool) -> None:
    """Reads the service's state and the journals of all runs, and shows how to continue after a crash."""
    from signer.cli.moves import show_cutover_status

    show_cutover_status(config, as_json=as_json)
