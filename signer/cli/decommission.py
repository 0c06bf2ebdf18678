"""`signer decommission`: plan, apply, status. They are carried out in `moves.py`."""

from __future__ import annotations

from pathlib import Path

import click

from signer.cli.arguments import (
    FILE,
    approve_option,
    commands_option,
    config_option,
    out_option,
    plan_argument,
)
from signer.cli.parser import verb


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
