"""`signer cutover`: plan, apply, status, rollback. What the steps are is in `migration/cutover/steps.py`."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from signer.api_client import ApiClient
from signer.cli import output
from signer.cli import runs as telling
from signer.cli.plans import approve, load_plan, write_plan
from signer.errors import Drift, SignerError, Unavailable
from signer.migration.config import CutoverFile, load_cutover_file
from signer.migration.cutover.actions import LiveHands
from signer.migration.cutover.preconditions import NotPossible, World, check_movable, check_roles, read_world, would_run
from signer.migration.cutover.steps import cutover_steps, make_plan, rollback_steps
from signer.migration.journal import alone, runs
from signer.migration.plan import check_drift
from signer.migration.run import catch_up, close_others, destroyed_by, open_run, unfinished
from signer.units import plain

if TYPE_CHECKING:
    from signer.settings import Settings

_APPLIED: Final[Mapping[str, str]] = {
    "applied": "cut over: the local CA signs",
    "rolled_back": "not cut over; the platform is as it was",
    "failed": "not cut over; nothing was changed",
    "rollback_failed": "not cut over, and rolling back failed; see runbooks/rollback.md",
}
_BACK: Final[Mapping[str, str]] = {
    "applied": "rolled back: Vault signs",
    "failed": "not rolled back; nothing was changed",
    "stopped": "not rolled back to the end; see runbooks/rollback.md",
}


def cutover_plan(arguments: Namespace, _settings: Callable[[], Settings]) -> int:
    """Reads the world and prints what a cutover would do; changes nothing."""
    path = Path(arguments.config).absolute()
    file = load_cutover_file(path)
    world = read_world(file, path)
    check_movable(world)
    principals = check_roles(file, world)
    plan = make_plan(file, would_run(file), world.inputs, world.now)
    if arguments.out is not None:
        write_plan(Path(arguments.out), plan)
    if arguments.json:
        output.show_json(plan.as_json())
        return 0
    telling.show_plan(plan, facts=_facts(file, world, principals), commands=arguments.commands)
    output.show("Nothing has been changed. To apply exactly this:")
    out = plain(arguments.out or "plan.json")
    if arguments.out is None:
        output.show(f"  signer cutover plan --config {plain(arguments.config)} --out {out}")
    output.show(f"  signer cutover apply {out} --approve <phrase of the runbook, section 4>")
    return 0


def _facts(file: CutoverFile, world: World, principals: str) -> list[tuple[str, str]]:
    vault, policy = world.inputs["vault"], world.inputs["policy"]
    roles = ", ".join(file.vault.roles)
    return [
        ("now", f"mode {world.now['mode']}, CA {vault['ca']} at {vault['address']}, role {roles}"),
        ("then", f"mode local, CA {policy['ca']} rendered from Infisical"),
        ("principals", principals),
        ("operator", world.inputs["operator"]),
    ]


def cutover_apply(arguments: Namespace, _settings: Callable[[], Settings]) -> int:
    """Applies a plan file, once it is approved and the world is still the one it was made of."""
    plan, path = load_plan(Path(arguments.plan), "cutover")
    file = load_cutover_file(path)
    with ApiClient(file.signer.address, file.signer.token_file) as api:
        approval = approve(plan, arguments.approve, file, api)
        began = time.monotonic()
        with alone(file.evidence_dir, file.compose.base):
            taken_up = any(past.plan == plan.digest for past in unfinished(file.evidence_dir))
            world = _read_again(file, path, may_be_down=taken_up)
            found = make_plan(file, would_run(file), world.inputs, world.now)
            check_drift(plan, found, with_state=not taken_up)  # no drift: one can move now as one could then
            if not taken_up:
                catch_up(file.evidence_dir, api)
            with open_run(file.evidence_dir, "cutover", plan, approval, api) as run:
                ended = run.carry_out(cutover_steps(file, LiveHands(file, run, api)), telling.Teller())
                where, sealed = run.evidence.folder, run.journal.past.evidence
    return telling.tell_end(ended, str(where), sealed, time.monotonic() - began, arguments.json, _APPLIED)


def _read_again(file: CutoverFile, path: Path, *, may_be_down: bool) -> World:
    """The world of a plan that was made; raises `Drift` where one could not be made any more."""
    try:
        return read_world(file, path, may_be_down=may_be_down)
    except NotPossible as error:
        text = f"the world is not the one that was planned for: {error.text}"
        raise Drift("plan_drifted", text, error.hint, (f"{error.code}: {error.text}",)) from None


def cutover_rollback(arguments: Namespace, _settings: Callable[[], Settings]) -> int:
    """Back to Vault: the base without overlay, proved by logins; ends whatever was cut off before."""
    file = load_cutover_file(Path(arguments.config).absolute())
    began = time.monotonic()
    with (
        ApiClient(file.signer.address, file.signer.token_file) as api,
        alone(file.evidence_dir, file.compose.base),
    ):
        for past in runs(file.evidence_dir):
            if past.operation == "decommission" and (what := destroyed_by(file.evidence_dir, past)):
                text = f"Vault was decommissioned ({what}), and nothing leads back"
                raise Unavailable("vault_is_gone", text, "see `signer cutover status`")
        with open_run(file.evidence_dir, "rollback", None, None, api, reason=arguments.reason) as run:
            ended = run.carry_out(rollback_steps(file, LiveHands(file, run, api)), telling.Teller())
            where, sealed = run.evidence.folder, run.journal.past.evidence
        if ended.outcome == "applied":
            catch_up(file.evidence_dir, api)
            for name in close_others(file.evidence_dir, api, "rolled_back", where.name):
                output.say(f"{name} is ended with it")
    return telling.tell_end(ended, str(where), sealed, time.monotonic() - began, arguments.json, _BACK)


def cutover_status(arguments: Namespace, _settings: Callable[[], Settings]) -> int:
    """What runs now, what was done so far, and what comes next; reads only."""
    file = load_cutover_file(Path(arguments.config).absolute())
    known = runs(file.evidence_dir)
    try:
        with ApiClient(file.signer.address, file.signer.token_file) as api:
            ready = api.ready()
        now: dict[str, Any] = {"ready": ready.ready, "mode": ready.mode, "ca": ready.ca_fingerprint, "code": ready.code}
    except SignerError as error:
        now = {"ready": False, "mode": None, "ca": None, "code": error.code}
    open_runs = [past for past in known if not past.is_over]
    following = _next(now, open_runs, [past.operation for past in known if past.outcome == "applied"])
    if arguments.json:
        output.show_json({"now": now, "runs": [telling.run_as_json(past) for past in known], "next": following})
        return 0
    if now["ready"]:
        output.show(f"now   mode {plain(now['mode'])}, ready, CA {plain(now['ca'])}")
    else:
        output.show(f"now   not ready: {now['code']}")
    output.show(f"next  {following}")
    if known:
        output.show()
        telling.show_runs(known)
    return 0


def _next(now: Mapping[str, Any], open_runs: list[Any], applied: list[str]) -> str:
    if open_runs:
        past = open_runs[0]
        if past.is_rolling_back:
            return f"{past.run} was cut off while it rolled back: signer cutover rollback --reason …"
        if past.operation == "decommission":
            return f"{past.run} was cut off: signer decommission status tells how to go on"
        if past.operation == "rollback":
            return f"{past.run} was cut off: signer cutover rollback --reason … again"
        last = next(reversed(past.begun), "its first step")
        return f"{past.run} was cut off at {last}: apply its plan again, or signer cutover rollback --reason …"
    if "decommission" in applied:
        return "nothing: Vault is removed; see signer decommission status"
    if not now["ready"]:
        return "the service is not ready: see its log and runbooks/rollback.md"
    if now["mode"] == "local":
        return "after the soak time: signer decommission plan; to go back: signer cutover rollback --reason …"
    return "signer cutover plan" + (", after the cause of the rollback is mended" if "rollback" in applied else "")
