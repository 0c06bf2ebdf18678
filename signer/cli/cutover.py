"""`signer cutover` and `signer decommission`: plan, apply, status, rollback. They are carried out in `moves.py`."""

from __future__ import annotations

from pathlib import Path

import click

from signer.cli.arguments import (
    FILE,
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


@verb("decommission plan", "signer decommission plan --config cutover.toml --out plan.json")
@config_option
@out_option
@commands_option
def decommission_plan(config: Path, out: Path | None, commands: bool, as_json: bool) -> None:
    """Reads names and counts of everything in Vault, never a secret's value, and the ledger, evidence, audit log
    and logins; changes nothing. Anything that prevents removal is reported as a blocker with what to do about
    it, and then there is no plan (exit 1)."""
    from signer.cli.moves import plan_removal

    plan_removal(config, out, commands=commands, as_json=as_json)


@verb(
    "decommission apply",
    "signer decommission apply plan.json --approve PHRASE",
    "signer decommission apply plan.json --approve PHRASE --data-is-removed",
)
@plan_argument
@approve_option
@click.option("--config", type=FILE, metavar="FILE", help="cutover.toml, if it has moved since the plan")
@click.option(
    "--data-is-removed",
    is_flag=True,
    help="you confirm that Vault's data was removed by hand, after the command for it failed",
)
def decommission_apply(
    plan: Path, approve: str | None, config: Path | None, data_is_removed: bool, as_json: bool
) -> int:
    """Needs its own approval phrase. Takes a snapshot, disables the SSH mount, revokes the tokens, seals and
    stops Vault, and proves that it is gone and that logins work. From the SSH mount on there is no undo.
    An interrupted run is resumed with the same plan, with or without Vault."""
    from signer.cli.moves import apply_removal

    return apply_removal(plan, approve, config, data_is_removed=data_is_removed, as_json=as_json)


@verb("decommission status", "signer decommission status --config cutover.toml")
@config_option
def decommission_status(config: Path, as_json: bool) -> None:
    """Reads the service's ledger, the journals of all runs and Vault's seal state; works without Vault."""
    from signer.cli.moves import show_removal_status

    show_removal_status(config, as_json=as_json)
