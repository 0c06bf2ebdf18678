"""`signer decommission`: plan, apply, status. What the steps are is in `migration/decommission/steps.py`."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from signer.api_client import ApiClient
from signer.cli import output
from signer.cli import runs as telling
from signer.cli.plans import approve, load_plan, write_plan
from signer.errors import SignerError
from signer.migration.config import CutoverFile, load_cutover_file
from signer.migration.cutover.preconditions import NotPossible
from signer.migration.decommission.actions import LiveRemoval, vault_state, would_run
from signer.migration.decommission.steps import make_plan, removal_steps
from signer.migration.decommission.survey import (
    Standing,
    blocked,
    decommission_of,
    read_inputs,
    read_ledger,
    read_standing,
    state_of,
)
from signer.migration.journal import Past, alone, runs
from signer.migration.plan import Plan, check_drift
from signer.migration.run import destroyed_by, open_run, unfinished
from signer.units import plain, render_duration, timestamp

if TYPE_CHECKING:
    from signer.settings import Settings

_ENDED: Final[Mapping[str, str]] = {
    "applied": "Vault is removed: the local CA signs, logins work",
    "failed": "Vault is not removed; nothing was changed",
    "stopped": "Vault is not removed to the end; apply the same plan again",
}
_STATES: Final[Mapping[str, str]] = {
    "active": "up and unsealed",
    "sealed": "up and sealed",
    "gone": "gone: its address refuses connections",
}


def decommission_plan(arguments: Namespace, _settings: Callable[[], Settings]) -> int:
    """Reads everything and prints what removing Vault would do, or what stands in its way; changes nothing."""
    path = Path(arguments.config).absolute()
    file = load_cutover_file(path)
    with ApiClient(file.signer.address, file.signer.token_file) as api:
        found = read_standing(file, api)
        if found.blockers:
            _refuse(found, arguments)
        plan = _plan(file, path, api, found)
    if arguments.out is not None:
        write_plan(Path(arguments.out), plan)
    if arguments.json:
        output.show_json(plan.as_json())
        return 0
    telling.show_plan(plan, facts=_facts(found), commands=arguments.commands)
    first = next(step for step in plan.steps if step["effect"] == "DESTROYS")
    output.show(f"From step {first['number']} on there is no undo and no rollback: Vault can never sign again.")
    output.show("Everything before it only reads, logs in, and writes the snapshot and the evidence.")
    output.show()
    output.show("Nothing has been changed. To apply exactly this:")
    out = plain(arguments.out or "plan.json")
    if arguments.out is None:
        output.show(f"  signer decommission plan --config {plain(arguments.config)} --out {out}")
    output.show(f"  signer decommission apply {out} --approve <phrase of the runbook, section 4>")
    return 0


def _plan(file: CutoverFile, path: Path, api: ApiClient, found: Standing | None, planned: Plan | None = None) -> Plan:
    """The plan for how things stand; `found` is None for a run that has destroyed something, when Vault may be gone.

    Such a run must come to its end: a policy that was changed since does not keep it from that.
    """
    inputs = read_inputs(file, path, api)
    if found is None and planned is not None:
        inputs["policy"]["digest"] = planned.inputs["policy"]["digest"]
    return make_plan(file, would_run(file), inputs, {} if found is None else state_of(found))


def _refuse(found: Standing, arguments: Namespace) -> None:
    """Shows what was found and each blocker; raises `Blocked`."""
    refused = blocked(found.blockers)
    if arguments.json:
        refused.facts["inventory"] = found.inventory.as_json()
        raise refused
    output.show_table(_facts(found), "  ")
    output.show()
    for blocker in found.blockers:
        output.show(f"  ✗ {blocker.code}: {plain(blocker.what)}")
        output.show(f"      {plain(blocker.do)}")
    output.show()
    output.flush()  # what is in the way stands above the error also where both go to one file
    raise refused


def _facts(found: Standing) -> list[tuple[str, str]]:
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


def decommission_apply(arguments: Namespace, _settings: Callable[[], Settings]) -> int:
    """Applies a plan file, once it is approved and nothing has come in the way; goes on with one that was cut off."""
    plan, planned_path = load_plan(Path(arguments.plan), "decommission")
    path = planned_path if arguments.config is None else Path(arguments.config).absolute()
    file = load_cutover_file(path)
    with ApiClient(file.signer.address, file.signer.token_file) as api:
        approval = approve(plan, arguments.approve, file, api)
        began = time.monotonic()
        with alone(file.evidence_dir, file.compose.base):
            past = next((past for past in unfinished(file.evidence_dir) if past.plan == plan.digest), None)
            removed_by = approval.who if arguments.data_is_removed else ""
            if removed_by and (past is None or past.failed != "remove-data"):
                raise NotPossible(
                    "data_removal_not_failed",
                    "no run of this plan failed at removing the data, so nobody's word is asked for it",
                    "apply the plan without --data-is-removed",
                )
            found = None
            if past is None or not destroyed_by(file.evidence_dir, past):
                found = read_standing(file, api)
                if found.blockers:
                    _refuse(found, arguments)
            # the plan's own path, as --config may say that the very same file lies elsewhere now
            check_drift(plan, _plan(file, planned_path, api, found, plan), with_state=found is not None)
            with open_run(file.evidence_dir, "decommission", plan, approval, api) as run:
                ended = run.carry_out(removal_steps(file, LiveRemoval(file, run, api, removed_by)), telling.Teller())
                where, sealed = run.evidence.folder, run.journal.past.evidence
    return telling.tell_end(ended, str(where), sealed, time.monotonic() - began, arguments.json, _ENDED)


def decommission_status(arguments: Namespace, _settings: Callable[[], Settings]) -> int:
    """Whether Vault is there, what was done, what comes next; reads only, and needs no Vault."""
    file = load_cutover_file(Path(arguments.config).absolute())
    wanted = decommission_of(file)
    known = [past for past in runs(file.evidence_dir) if past.operation == "decommission"]
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
    if arguments.json:
        told = [telling.run_as_json(past) for past in known]
        now = {"vault": state, "mode": mode or None, "code": code or None, "soak_left": soak}
        output.show_json({"now": now, "runs": told, "next": following})
        return 0
    output.show(f"vault    {_STATES.get(state, f'does not tell: {state}')}")
    output.show(f"service  {f'mode {plain(mode)}, ready' if mode else f'not ready {code}'.rstrip()}")
    output.show(f"soak     {_soak(soak)}")
    output.show(f"next     {following}")
    if known:
        output.show()
        telling.show_runs(known)
    return 0


def _soak(left: int | None) -> str:
    if left is None:
        return "not begun: no cutover in force"
    return f"{render_duration(left)} left" if left else "over"


def _next(file: CutoverFile, known: list[Past], state: str, soak: int | None, code: str) -> str:
    cut_off = next((past for past in known if not past.is_over), None)
    if cut_off is not None:
        last = next(reversed(cut_off.begun), "its first step")
        again = f"{cut_off.run} was cut off at {last}: apply its plan again"
        if cut_off.failed == "remove-data":
            again += ", with --data-is-removed if you have done that by hand"
        if destroyed_by(file.evidence_dir, cut_off):
            return f"{again}; there is no other way on"
        return f"{again}, or signer cutover rollback --config FILE --reason …"
    if any(past.outcome == "applied" for past in known):
        gone = "nothing: Vault is removed"
        return gone if state == "gone" else f"something listens at {plain(file.vault.address)} again: look there"
    if code:
        return "mend the service first: signer cutover status --config FILE"
    if soak is None:
        return "signer cutover plan --config FILE"
    plan = "signer decommission plan --config FILE"
    return plan if soak == 0 else f"wait {render_duration(soak)}, then {plan}"
