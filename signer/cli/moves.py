"""What the verbs of `signer cutover` and `signer decommission` do. They import it when they run, not for their help."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from signer.api_client import ApiClient
from signer.cli import output
from signer.cli.plans import StepReporter, check_approval, load_plan, present_plan, run_as_json, show_end, show_runs
from signer.errors import Drift, SignerError, Unavailable
from signer.migration.approval import Approval
from signer.migration.config import CutoverFile, decommission_of, load_cutover_file
from signer.migration.cutover.actions import CutoverActions
from signer.migration.cutover.preconditions import (
    NotPossible,
    Preconditions,
    check_movable,
    check_roles,
    read_preconditions,
)
from signer.migration.cutover.steps import cutover_steps, rollback_steps
from signer.migration.cutover.steps import make_plan as make_cutover_plan
from signer.migration.decommission.actions import RemovalActions, vault_state
from signer.migration.decommission.steps import make_plan as make_removal_plan
from signer.migration.decommission.steps import removal_steps
from signer.migration.decommission.survey import (
    RemovalReadiness,
    blocked,
    read_inputs,
    read_ledger,
    read_readiness,
    state_of,
)
from signer.migration.journal import RunState, platform_lock, runs
from signer.migration.plan import Plan, Step, check_drift
from signer.migration.run import catch_up, close_others, destroyed_by, open_run, unfinished
from signer.model import RunOutcome
from signer.units import listed, plain, render_duration, timestamp

_CUT_OVER: Final[Mapping[RunOutcome, str]] = {
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
_REMOVED: Final[Mapping[RunOutcome, str]] = {
    RunOutcome.APPLIED: "Vault is removed: the local CA signs, logins work",
    RunOutcome.FAILED: "Vault is not removed; nothing was changed",
    RunOutcome.STOPPED: "Vault is not removed to the end; apply the same plan again",
}
_STATES: Final[Mapping[str, str]] = {
    "active": "up and unsealed",
    "sealed": "up and sealed",
    "gone": "gone: its address refuses connections",
}
_NAMED: Final = 12  # names in one line
_UNSEEN: Final = "nodes that cutover.toml does not name, what may start Vault later, and copies of its storage"


# --- what both share --------------------------------------------------------------------------------------------


def _service(file: CutoverFile) -> ApiClient:
    return ApiClient(file.signer.address, file.signer.token_file)


@contextmanager
def _approved(plan: Plan, phrase: str | None, file: CutoverFile) -> Iterator[tuple[ApiClient, Approval]]:
    """The service and the approval of the plan, while no other process may change the platform."""
    with _service(file) as api:
        approval = check_approval(plan, phrase, file, api)
        with platform_lock(file.evidence_dir, file.compose.base):
            yield api, approval


def _show_status(
    now: Mapping[str, Any], lines: Sequence[str], known: Sequence[RunState], following: str, *, as_json: bool
) -> None:
    facts = {"now": now, "runs": [run_as_json(run) for run in known], "next": following}
    output.show_result(facts, *lines, as_json=as_json)
    if known and not as_json:
        output.show()
        show_runs(known)


# --- cutover ----------------------------------------------------------------------------------------------------


def plan_cutover(config: Path, out: Path | None, *, commands: bool, as_json: bool) -> None:
    path = config.absolute()
    file = load_cutover_file(path)
    found = read_preconditions(file, path)
    check_movable(found)
    principals = check_roles(file, found)
    with _service(file) as api:
        plan = make_cutover_plan(file, cutover_steps(file, CutoverActions(file, api)), found)
    vault = found.inputs.vault
    facts = [
        ("now", f"mode {found.now.mode}, CA {vault.ca} at {vault.address}, role {', '.join(file.vault.roles)}"),
        ("then", f"mode local, CA {found.inputs.policy.ca} rendered from Infisical"),
        ("principals", principals),
        ("operator", found.inputs.operator),
    ]
    others = found.inputs.compose.other_services
    facts += [("beside it", f"service {name}, {digest[:19]}…") for name, digest in others.items()]
    present_plan(plan, facts=facts, config=config, out=out, commands=commands, as_json=as_json)


def apply_cutover(plan: Path, phrase: str | None, *, as_json: bool) -> int:
    """Applies a plan file, or resumes the run that was interrupted; returns the exit status."""
    planned, path = load_plan(plan, "cutover")
    file = load_cutover_file(path)
    with _approved(planned, phrase, file) as (api, approval):
        started = time.monotonic()
        is_resumed = any(run.plan == planned.digest for run in unfinished(file.evidence_dir))
        actions = CutoverActions(file, api)
        steps = cutover_steps(file, actions)
        found = make_cutover_plan(file, steps, _read_again(file, path, may_be_down=is_resumed))
        check_drift(planned, found, with_state=not is_resumed)  # without drift the move is possible as it was then
        if not is_resumed:
            catch_up(file.evidence_dir, api)
        with open_run(file.evidence_dir, "cutover", planned, approval, api) as run:
            actions.begin(run)
            result = run.carry_out(steps, StepReporter())
    return show_end(result, run, time.monotonic() - started, _CUT_OVER, as_json=as_json)


def _read_again(file: CutoverFile, path: Path, *, may_be_down: bool) -> Preconditions:
    """The present state, for a plan that was made earlier; raises `Drift` if it could not be made any more."""
    try:
        return read_preconditions(file, path, may_be_down=may_be_down)
    except NotPossible as error:
        text = f"state has changed since the plan: {error.text}"
        raise Drift("plan_drifted", text, error.hint, (f"{error.code}: {error.text}",)) from None


def roll_back(config: Path, reason: str, *, as_json: bool) -> int:
    file = load_cutover_file(config.absolute())
    started = time.monotonic()
    with _service(file) as api, platform_lock(file.evidence_dir, file.compose.base):
        for state in runs(file.evidence_dir):
            if state.operation == "decommission" and (what := destroyed_by(file.evidence_dir, state)):
                text = f"Vault was decommissioned ({what}); a rollback is not possible"
                raise Unavailable("vault_is_gone", text, "see `signer cutover status`")
        with open_run(file.evidence_dir, "rollback", None, None, api, reason=reason) as run:
            actions = CutoverActions(file, api)
            actions.begin(run)
            result = run.carry_out(rollback_steps(file, actions), StepReporter())
        if result.outcome is RunOutcome.APPLIED:
            catch_up(file.evidence_dir, api)
            for name in close_others(file.evidence_dir, api, RunOutcome.ROLLED_BACK, run.evidence.run):
                output.note(f"{name} is ended with it")
    return show_end(result, run, time.monotonic() - started, _BACK, as_json=as_json)


def show_cutover_status(config: Path, *, as_json: bool) -> None:
    file = load_cutover_file(config.absolute())
    known = runs(file.evidence_dir)
    try:
        with _service(file) as api:
            ready = api.ready()
        now: dict[str, Any] = {"ready": ready.ready, "mode": ready.mode, "ca": ready.ca_fingerprint, "code": ready.code}
    except SignerError as error:
        now = {"ready": False, "mode": None, "ca": None, "code": error.code}
    following = _after_cutover(now, known)
    seen = f"mode {now['mode']}, ready, CA {now['ca']}" if now["ready"] else f"not ready: {now['code']}"
    _show_status(now, (f"now   {seen}", f"next  {following}"), known, following, as_json=as_json)


def _after_cutover(now: Mapping[str, Any], known: Sequence[RunState]) -> str:
    applied = [run.operation for run in known if run.outcome is RunOutcome.APPLIED]
    if (run := next((run for run in known if not run.is_over), None)) is not None:
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


# --- decommission -----------------------------------------------------------------------------------------------


def plan_removal(config: Path, out: Path | None, *, commands: bool, as_json: bool) -> None:
    """Shows the plan of Vault's removal, and writes it to `out`; raises `Blocked`."""
    path = config.absolute()
    file = load_cutover_file(path)
    with _service(file) as api:
        found = _unblocked(file, api, as_json=as_json)
        plan = _removal_plan(file, path, api, removal_steps(file, RemovalActions(file, api)), found)
    first = next(step for step in plan.steps if step["effect"] == "DESTROYS")
    warning = (
        f"From step {first['number']} on there is no undo and no rollback: Vault can never sign again.",
        "Everything before it only reads, logs in, and writes the snapshot and the evidence.",
        "",
    )
    present_plan(plan, facts=_facts(found), config=config, out=out, commands=commands, as_json=as_json, remarks=warning)


def _removal_plan(
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
    inputs = read_inputs(file, path, api)
    if found is None and planned is not None:
        inputs = replace(inputs, policy={**inputs.policy, "digest": planned.inputs["policy"]["digest"]})
    return make_removal_plan(file, steps, inputs, None if found is None else state_of(found))


def _unblocked(file: CutoverFile, api: ApiClient, *, as_json: bool) -> RemovalReadiness:
    """What was found, if nothing blocks the removal; otherwise shows it and each blocker, and raises `Blocked`."""
    found = read_readiness(file, api)
    if not found.blockers:
        return found
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
        ("mounts", listed([f"{mount.path} ({mount.type})" for mount in inventory.mounts], _NAMED)),
        ("kv entries", f"{secrets:,} in {output.count(len(inventory.kv), 'mount')}"),
        ("ssh", f"roles {listed(roles, _NAMED)}; {output.count(sum(len(e.issuers) for e in inventory.ssh), 'CA key')}"),
        ("auth methods", listed([method.path for method in inventory.auth_methods], _NAMED)),
        ("policies", listed(inventory.policies, _NAMED)),
        ("entities", f"{inventory.entities:,}"),
        ("tokens, leases", f"{inventory.tokens:,} token accessors, {inventory.leases:,} leases"),
        ("audit devices", listed([device.path for device in inventory.audit_devices], _NAMED)),
        ("cutover", "none" if cutover is None else f"{timestamp(cutover.at)}, event {cutover.seq} of the ledger"),
        ("last signature", ("never" if signed is None else f"{timestamp(signed[1])}, by the ledger") + by_log),
    ]


def apply_removal(plan: Path, phrase: str | None, config: Path | None, *, data_is_removed: bool, as_json: bool) -> int:
    """Applies a plan file, or resumes the run that was interrupted; returns the exit status."""
    planned, planned_path = load_plan(plan, "decommission")
    file = load_cutover_file(planned_path if config is None else config.absolute())
    with _approved(planned, phrase, file) as (api, approval):
        started = time.monotonic()
        state = next((run for run in unfinished(file.evidence_dir) if run.plan == planned.digest), None)
        removed_by = approval.who if data_is_removed else ""
        if removed_by and (state is None or state.failed != "remove-data"):
            raise NotPossible(
                "data_removal_not_failed",
                "no run of this plan failed at removing the data, so there is nothing to confirm",
                "apply the plan without --data-is-removed",
            )
        is_destroyed = state is not None and bool(destroyed_by(file.evidence_dir, state))
        found = None if is_destroyed else _unblocked(file, api, as_json=as_json)
        actions = RemovalActions(file, api, removed_by)
        steps = removal_steps(file, actions)
        # the plan's own path, as --config may name a new place of the same file
        present = _removal_plan(file, planned_path, api, steps, found, planned)
        check_drift(planned, present, with_state=found is not None)
        with open_run(file.evidence_dir, "decommission", planned, approval, api) as run:
            actions.begin(run)
            result = run.carry_out(steps, StepReporter())
    return show_end(result, run, time.monotonic() - started, _REMOVED, as_json=as_json)


def show_removal_status(config: Path, *, as_json: bool) -> None:
    file = load_cutover_file(config.absolute())
    wanted = decommission_of(file)
    known = [run for run in runs(file.evidence_dir) if run.operation == "decommission"]
    state = vault_state(file)
    soak: int | None = None
    mode, code = "", ""
    try:
        with _service(file) as api:
            ledger = read_ledger(api)
        mode = ledger.mode
        if ledger.cutover is not None and ledger.rolled_back <= ledger.cutover.seq:
            soak = max(0, ledger.cutover.at + wanted.soak - int(time.time()))
    except SignerError as error:
        code = error.code
    following = _after_removal(file, known, state, soak, code)
    now = {"vault": state, "unseen": _UNSEEN, "mode": mode or None, "code": code or None, "soak_left": soak}
    lines = (
        f"vault    {_STATES.get(state, f'state unknown: {state}')}",
        f"service  {f'mode {mode}, ready' if mode else f'not ready {code}'.rstrip()}",
        f"unseen   {_UNSEEN}",
        f"soak     {_soak(soak)}",
        f"next     {following}",
    )
    _show_status(now, lines, known, following, as_json=as_json)


def _soak(left: int | None) -> str:
    if left is None:
        return "not begun: no cutover in force"
    return f"{render_duration(left)} left" if left else "over"


def _after_removal(file: CutoverFile, known: list[RunState], state: str, soak: int | None, code: str) -> str:
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
