"""`signer cutover`: plan, apply, status, rollback. The steps are in `migration/cutover/steps.py`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from signer.cli import output
from signer.cli.arguments import (
    REASON,
    approve_option,
    commands_option,
    config_option,
    out_option,
    plan_argument,
)
from signer.cli.parser import verb
from signer.errors import Drift, SignerError, Unavailable
from signer.model import RunOutcome
from signer.units import plain

if TYPE_CHECKING:
    from signer.migration.config import CutoverFile
    from signer.migration.cutover.preconditions import Preconditions

_APPLIED: Final[Mapping[RunOutcome, str]] = {
    RunOutcome.APPLIED: "cut over: the local CA signs",
    RunOutcome.ROLLED_BACK: "not cut over; the platform is as it was",
    RunOutcome.FAILED: "not cut over; nothing was changed",
    RunOutcome.ROLLBACK_FAILED: "not cut over, and rolling back failed; see runbooks/rollback.md",
}
_BACK: Final[Mapping[RunOutcome, str]] = {
    RunOutcome.APPLIED: "rolled back: Vault signs",
    RunOutcome.FAILED: "not rolled back; nothing was changed",
    RunOutcome.STOPPED: "not rolled back to the end; see runbooks/rollback.md",
}


@verb("cutover plan", "signer cutover plan --config cutover.toml --out plan.json")
@config_option
@out_option
@commands_option
def cutover_plan(config: Path, out: Path | None, commands: bool, as_json: bool) -> None:
    """Reads host, service, Vault and policy.toml, and prints each step with its effect and its undo; changes
    nothing. The plan file contains everything that the steps depend on, under one digest: `apply` applies
    exactly that or nothing."""
    from signer.api_client import ApiClient
    from signer.cli.plans import present_plan
    from signer.migration.config import load_cutover_file
    from signer.migration.cutover.actions import CutoverActions
    from signer.migration.cutover.preconditions import check_movable, check_roles, read_preconditions
    from signer.migration.cutover.steps import cutover_steps, make_plan

    path = config.absolute()
    file = load_cutover_file(path)
    found = read_preconditions(file, path)
    check_movable(found)
    principals = check_roles(file, found)
    with ApiClient(file.signer.address, file.signer.token_file) as api:
        plan = make_plan(file, cutover_steps(file, CutoverActions(file, api)), found)
    facts = _facts(file, found, principals)
    present_plan(plan, facts=facts, config=config, out=out, commands=commands, as_json=as_json)


def _facts(file: CutoverFile, found: Preconditions, principals: str) -> list[tuple[str, str]]:
    vault, policy = found.inputs.vault, found.inputs.policy
    roles = ", ".join(file.vault.roles)
    return [
        ("now", f"mode {found.now.mode}, CA {vault.ca} at {vault.address}, role {roles}"),
        ("then", f"mode local, CA {policy.ca} rendered from Infisical"),
        ("principals", principals),
        ("operator", found.inputs.operator),
        *(
            ("beside it", f"service {name}, {digest[:19]}…")
            for name, digest in found.inputs.compose.other_services.items()
        ),
    ]


@verb("cutover apply", "signer cutover apply plan.json --approve PHRASE")
@plan_argument
@approve_option
def cutover_apply(plan: Path, approve: str | None, as_json: bool) -> int:
    """Needs the approval phrase, on the command line or typed at a terminal. A plan is refused if the state has
    changed since (exit 4); a wrong phrase changes nothing (exit 3). If a step fails after the service was
    changed, the service is moved back to Vault. An interrupted run is resumed with the same plan."""
    from signer.api_client import ApiClient
    from signer.cli.plans import check_approval, load_plan
    from signer.cli.runs import StepReporter, show_end
    from signer.migration.config import load_cutover_file
    from signer.migration.cutover.actions import CutoverActions
    from signer.migration.cutover.steps import cutover_steps, make_plan
    from signer.migration.journal import platform_lock
    from signer.migration.plan import check_drift
    from signer.migration.run import catch_up, open_run, unfinished

    planned, path = load_plan(plan, "cutover")
    file = load_cutover_file(path)
    with ApiClient(file.signer.address, file.signer.token_file) as api:
        approval = check_approval(planned, approve, file, api)
        began = time.monotonic()
        with platform_lock(file.evidence_dir, file.compose.base):
            is_resumed = any(run.plan == planned.digest for run in unfinished(file.evidence_dir))
            actions = CutoverActions(file, api)
            steps = cutover_steps(file, actions)
            found = make_plan(file, steps, _read_again(file, path, may_be_down=is_resumed))
            check_drift(planned, found, with_state=not is_resumed)  # without drift the move is possible as it was then
            if not is_resumed:
                catch_up(file.evidence_dir, api)
            with open_run(file.evidence_dir, "cutover", planned, approval, api) as run:
                actions.begin(run)
                result = run.carry_out(steps, StepReporter())
                where, sealed = run.evidence.folder, run.journal.state.evidence
    return show_end(result, str(where), sealed, time.monotonic() - began, as_json, _APPLIED)


def _read_again(file: CutoverFile, path: Path, *, may_be_down: bool) -> Preconditions:
    """The present state, for a plan that was made earlier; raises `Drift` if it could not be made any more."""
    from signer.migration.cutover.preconditions import NotPossible, read_preconditions

    try:
        return read_preconditions(file, path, may_be_down=may_be_down)
    except NotPossible as error:
        text = f"state has changed since the plan: {error.text}"
        raise Drift("plan_drifted", text, error.hint, (f"{error.code}: {error.text}",)) from None


@verb("cutover rollback", 'signer cutover rollback --config cutover.toml --reason "edge1 lacks the new CA"')
@config_option
@click.option("--reason", type=REASON, metavar="TEXT", required=True, help="the reason, for the record")
def cutover_rollback(config: Path, reason: str, as_json: bool) -> int:
    """Starts the service without the overlay, and proves by logins that Vault signs. Refused, with nothing
    changed, if Vault does not sign. Also ends an interrupted cutover."""
    from signer.api_client import ApiClient
    from signer.cli.runs import StepReporter, show_end
    from signer.migration.config import load_cutover_file
    from signer.migration.cutover.actions import CutoverActions
    from signer.migration.cutover.steps import rollback_steps
    from signer.migration.journal import platform_lock, runs
    from signer.migration.run import catch_up, close_others, destroyed_by, open_run

    file = load_cutover_file(config.absolute())
    began = time.monotonic()
    with (
        ApiClient(file.signer.address, file.signer.token_file) as api,
        platform_lock(file.evidence_dir, file.compose.base),
    ):
        for state in runs(file.evidence_dir):
            if state.operation == "decommission" and (what := destroyed_by(file.evidence_dir, state)):
                text = f"Vault was decommissioned ({what}); a rollback is not possible"
                raise Unavailable("vault_is_gone", text, "see `signer cutover status`")
        with open_run(file.evidence_dir, "rollback", None, None, api, reason=reason) as run:
            actions = CutoverActions(file, api)
            actions.begin(run)
            result = run.carry_out(rollback_steps(file, actions), StepReporter())
            where, sealed = run.evidence.folder, run.journal.state.evidence
        if result.outcome is RunOutcome.APPLIED:
            catch_up(file.evidence_dir, api)
            for name in close_others(file.evidence_dir, api, RunOutcome.ROLLED_BACK, where.name):
                output.note(f"{name} is ended with it")
    return show_end(result, str(where), sealed, time.monotonic() - began, as_json, _BACK)


@verb("cutover status", "signer cutover status --config cutover.toml")
@config_option
def cutover_status(config: Path, as_json: bool) -> None:
    """Reads the service's state and the journals of all runs, and shows how to continue after a crash."""
    from signer.api_client import ApiClient
    from signer.cli.runs import run_as_json, show_runs
    from signer.migration.config import load_cutover_file
    from signer.migration.journal import runs

    file = load_cutover_file(config.absolute())
    known = runs(file.evidence_dir)
    try:
        with ApiClient(file.signer.address, file.signer.token_file) as api:
            ready = api.ready()
        now: dict[str, Any] = {"ready": ready.ready, "mode": ready.mode, "ca": ready.ca_fingerprint, "code": ready.code}
    except SignerError as error:
        now = {"ready": False, "mode": None, "ca": None, "code": error.code}
    open_runs = [run for run in known if not run.is_over]
    following = _next(now, open_runs, [run.operation for run in known if run.outcome is RunOutcome.APPLIED])
    if as_json:
        output.show_json({"now": now, "runs": [run_as_json(run) for run in known], "next": following})
        return
    if now["ready"]:
        output.show(f"now   mode {plain(now['mode'])}, ready, CA {plain(now['ca'])}")
    else:
        output.show(f"now   not ready: {now['code']}")
    output.show(f"next  {following}")
    if known:
        output.show()
        show_runs(known)


def _next(now: Mapping[str, Any], open_runs: list[Any], applied: list[str]) -> str:
    if open_runs:
        run = open_runs[0]
        if run.is_rolling_back:
            return f"{run.run} was interrupted during its rollback: signer cutover rollback --reason …"
        if run.operation == "decommission":
            return f"{run.run} was interrupted: see signer decommission status"
        if run.operation == "rollback":
            return f"{run.run} was interrupted: signer cutover rollback --reason … again"
        last = next(reversed(run.begun), "its first step")
        return f"{run.run} was interrupted at {last}: apply its plan again, or signer cutover rollback --reason …"
    if "decommission" in applied:
        return "nothing: Vault is removed; see signer decommission status"
    if not now["ready"]:
        return "the service is not ready: see its log and runbooks/rollback.md"
    if now["mode"] == "local":
        return "after the soak time: signer decommission plan; to go back: signer cutover rollback --reason …"
    return "signer cutover plan" + (", after the cause of the rollback is fixed" if "rollback" in applied else "")
