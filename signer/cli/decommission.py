"""`signer decommission`: plan, apply, status. The steps are in `migration/decommission/steps.py`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from signer.cli import output
from signer.cli.arguments import (
    FILE,
    approve_option,
    commands_option,
    config_option,
    out_option,
    plan_argument,
)
from signer.cli.parser import verb
from signer.errors import SignerError
from signer.model import RunOutcome
from signer.units import plain, render_duration, timestamp

if TYPE_CHECKING:
    from signer.api_client import ApiClient
    from signer.migration.config import CutoverFile
    from signer.migration.decommission.survey import RemovalReadiness
    from signer.migration.journal import RunState
    from signer.migration.plan import Plan, Step

_ENDED: Final[Mapping[RunOutcome, str]] = {
    RunOutcome.APPLIED: "Vault is removed: the local CA signs, logins work",
    RunOutcome.FAILED: "Vault is not removed; nothing was changed",
    RunOutcome.STOPPED: "Vault is not removed to the end; apply the same plan again",
}
_STATES: Final[Mapping[str, str]] = {
    "active": "up and unsealed",
    "sealed": "up and sealed",
    "gone": "gone: its address refuses connections",
}

_UNSEEN: Final = "nodes that cutover.toml does not name, what may start Vault later, and copies of its storage"


@verb("decommission plan", "signer decommission plan --config cutover.toml --out plan.json")
@config_option
@out_option
@commands_option
def decommission_plan(config: Path, out: Path | None, commands: bool, as_json: bool) -> None:
    """Reads names and counts of everything in Vault, never a secret's value, and the ledger, evidence, audit log
    and logins; changes nothing. Anything that prevents removal is reported as a blocker with what to do about
    it, and then there is no plan (exit 1)."""
    from signer.api_client import ApiClient
    from signer.cli.plans import present_plan
    from signer.migration.config import load_cutover_file
    from signer.migration.decommission.actions import RemovalActions
    from signer.migration.decommission.steps import removal_steps
    from signer.migration.decommission.survey import read_readiness

    path = config.absolute()
    file = load_cutover_file(path)
    with ApiClient(file.signer.address, file.signer.token_file) as api:
        found = read_readiness(file, api)
        if found.blockers:
            _refuse(found, as_json=as_json)
        plan = _plan(file, path, api, removal_steps(file, RemovalActions(file, api)), found)
    first = next(step for step in plan.steps if step["effect"] == "DESTROYS")
    warning = (
        f"From step {first['number']} on there is no undo and no rollback: Vault can never sign again.",
        "Everything before it only reads, logs in, and writes the snapshot and the evidence.",
        "",
    )
    present_plan(plan, facts=_facts(found), config=config, out=out, commands=commands, as_json=as_json, remarks=warning)


def _plan(
    file: CutoverFile,
    path: Path,
    api: ApiClient,
    steps: Sequence[Step],
    found: RemovalReadiness | None,
    planned: Plan | None = None,
) -> Plan:
    """The plan for the present state; `found` is None for a run that has destroyed something, when Vault may be gone.

    Such a run must be finished: a policy that has changed since does not prevent that.
    """
    from signer.migration.decommission.steps import make_plan
    from signer.migration.decommission.survey import read_inputs, state_of

    inputs = read_inputs(file, path, api)
    if found is None and planned is not None:
        policy = {**inputs.policy, "digest": planned.inputs["policy"]["digest"]}
        inputs = replace(inputs, policy=policy)
    return make_plan(file, steps, inputs, None if found is None else state_of(found))


def _refuse(found: RemovalReadiness, *, as_json: bool) -> None:
    """Shows what was found and each blocker; raises `Blocked`."""
    from signer.migration.decommission.survey import blocked

    refused = blocked(found.blockers)
    if as_json:
        refused.facts["inventory"] = found.inventory.as_json()
        raise refused
    output.show_table(_facts(found), "  ")
    output.show()
    for blocker in found.blockers:
        output.show(f"  ✗ {blocker.code}: {plain(blocker.what)}")
        output.show(f"      {plain(blocker.do)}")
    output.show()
    output.flush()  # the blockers come before the error also if both go to one file
    raise refused


def _facts(found: RemovalReadiness) -> list[tuple[str, str]]:
    inventory, ledger = found.inventory, found.ledger
    roles = [f"{role.name} of {engine.mount}" for engine in inventory.ssh for role in engine.roles]
    cutover, signed = ledger.cutover, ledger.vault_signed
    secrets = sum(len(entries.names) for entries in inventory.kv)
    log = found.checks.audit.last_signature() if found.checks.audit is not None else None
    by_log = f"; by its audit log {timestamp(log.at)}, role {log.role}" if log is not None else ""
    return [
        ("vault", f"{inventory.version}, storage {inventory.storage}, seal {inventory.seal}"),
        ("mounts", _named([f"{mount.path} ({mount.type})" for mount in inventory.mounts])),
        ("kv entries", f"{secrets:,} in {output.count(len(inventory.kv), 'mount')}"),
        ("ssh", f"roles {_named(roles)}; {output.count(sum(len(e.issuers) for e in inventory.ssh), 'CA key')}"),
        ("auth methods", _named([method.path for method in inventory.auth_methods])),
        ("policies", _named(list(inventory.policies))),
        ("entities", f"{inventory.entities:,}"),
        ("tokens, leases", f"{inventory.tokens:,} token accessors, {inventory.leases:,} leases"),
        ("audit devices", _named([device.path for device in inventory.audit_devices])),
        ("cutover", "none" if cutover is None else f"{timestamp(cutover.at)}, event {cutover.seq} of the ledger"),
        ("last signature", ("never" if signed is None else f"{timestamp(signed[1])}, by the ledger") + by_log),
    ]


def _named(names: list[str]) -> str:
    shown = ", ".join(names[:12]) or "none"
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown


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
    from signer.api_client import ApiClient
    from signer.cli.plans import check_approval, load_plan
    from signer.cli.runs import StepReporter, show_end
    from signer.migration.config import load_cutover_file
    from signer.migration.cutover.preconditions import NotPossible
    from signer.migration.decommission.actions import RemovalActions
    from signer.migration.decommission.steps import removal_steps
    from signer.migration.decommission.survey import read_readiness
    from signer.migration.journal import platform_lock
    from signer.migration.plan import check_drift
    from signer.migration.run import destroyed_by, open_run, unfinished

    planned, planned_path = load_plan(plan, "decommission")
    path = planned_path if config is None else config.absolute()
    file = load_cutover_file(path)
    with ApiClient(file.signer.address, file.signer.token_file) as api:
        approval = check_approval(planned, approve, file, api)
        began = time.monotonic()
        with platform_lock(file.evidence_dir, file.compose.base):
            state = next((run for run in unfinished(file.evidence_dir) if run.plan == planned.digest), None)
            removed_by = approval.who if data_is_removed else ""
            if removed_by and (state is None or state.failed != "remove-data"):
                raise NotPossible(
                    "data_removal_not_failed",
                    "no run of this plan failed at removing the data, so there is nothing to confirm",
                    "apply the plan without --data-is-removed",
                )
            found = None
            if state is None or not destroyed_by(file.evidence_dir, state):
                found = read_readiness(file, api)
                if found.blockers:
                    _refuse(found, as_json=as_json)
            # the plan's own path, as --config may name a new place of the same file
            actions = RemovalActions(file, api, removed_by)
            steps = removal_steps(file, actions)
            check_drift(planned, _plan(file, planned_path, api, steps, found, planned), with_state=found is not None)
            with open_run(file.evidence_dir, "decommission", planned, approval, api) as run:
                actions.begin(run)
                result = run.carry_out(steps, StepReporter())
                where, sealed = run.evidence.folder, run.journal.state.evidence
    return show_end(result, str(where), sealed, time.monotonic() - began, as_json, _ENDED)


@verb("decommission status", "signer decommission status --config cutover.toml")
@config_option
def decommission_status(config: Path, as_json: bool) -> None:
    """Reads the service's ledger, the journals of all runs and Vault's seal state; works without Vault."""
    from signer.api_client import ApiClient
    from signer.cli.runs import run_as_json, show_runs
    from signer.migration.config import load_cutover_file
    from signer.migration.decommission.actions import vault_state
    from signer.migration.decommission.survey import decommission_of, read_ledger
    from signer.migration.journal import runs

    file = load_cutover_file(config.absolute())
    wanted = decommission_of(file)
    known = [run for run in runs(file.evidence_dir) if run.operation == "decommission"]
    state = vault_state(file)
    soak: int | None = None
    mode, code = "", ""
    try:
        with ApiClient(file.signer.address, file.signer.token_file) as api:
            ledger = read_ledger(api)
        mode = ledger.mode
        if ledger.cutover is not None and ledger.rolled_back <= ledger.cutover.seq:
            soak = max(0, ledger.cutover.at + wanted.soak - int(time.time()))
    except SignerError as error:
        code = error.code
    following = _next(file, known, state, soak, code)
    if as_json:
        now = {"vault": state, "unseen": _UNSEEN, "mode": mode or None, "code": code or None, "soak_left": soak}
        output.show_json({"now": now, "runs": [run_as_json(run) for run in known], "next": following})
        return
    output.show(f"vault    {_STATES.get(state, f'state unknown: {state}')}")
    output.show(f"service  {f'mode {plain(mode)}, ready' if mode else f'not ready {code}'.rstrip()}")
    output.show(f"unseen   {_UNSEEN}")
    output.show(f"soak     {_soak(soak)}")
    output.show(f"next     {following}")
    if known:
        output.show()
        show_runs(known)


def _soak(left: int | None) -> str:
    if left is None:
        return "not begun: no cutover in force"
    return f"{render_duration(left)} left" if left else "over"


def _next(file: CutoverFile, known: list[RunState], state: str, soak: int | None, code: str) -> str:
    from signer.migration.run import destroyed_by

    interrupted = next((run for run in known if not run.is_over), None)
    if interrupted is not None:
        last = next(reversed(interrupted.begun), "its first step")
        again = f"{interrupted.run} was interrupted at {last}: apply its plan again"
        if interrupted.failed == "remove-data":
            again += ", with --data-is-removed if you have removed the data by hand"
        if destroyed_by(file.evidence_dir, interrupted):
            return f"{again}; there is no other way to finish"
        return f"{again}, or signer cutover rollback --config FILE --reason …"
    if any(run.outcome is RunOutcome.APPLIED for run in known):
        gone = "nothing: Vault is removed"
        return gone if state == "gone" else f"something listens at {plain(file.vault.address)} again: check what"
    if code:
        return "fix the service first: signer cutover status --config FILE"
    if soak is None:
        return "signer cutover plan --config FILE"
    plan = "signer decommission plan --config FILE"
    return plan if soak == 0 else f"wait {render_duration(soak)}, then {plan}"
