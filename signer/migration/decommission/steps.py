"""The steps that remove Vault, and the plan that shows them. From "disable the SSH mount" on there is no way back.

Each step carries its action and the lines that it would run. `is_done` detects a step that an interrupted run
has done; once Vault is sealed or gone no step depends on it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Final

from signer.migration.config import CutoverFile, decommission_of
from signer.migration.decommission.actions import WATCHED, RemovalActions
from signer.migration.decommission.snapshot import FOLDER
from signer.migration.decommission.survey import RemovalGoal, RemovalInputs, RemovalState
from signer.migration.plan import Plan, Step, describe, seal_step
from signer.migration.smoke import login_lines, login_step
from signer.vault.inventory import SNAPSHOT

NO_WAY_BACK: Final = "there is no undo"
BEYOND: Final = "no way back since the SSH mount was disabled"


def removal_steps(file: CutoverFile, actions: RemovalActions) -> tuple[Step, ...]:
    """All steps, in order. The data is removed only if the configuration has a command for it."""
    command = decommission_of(file).remove_data_command
    remove_data = Step(
        "remove-data",
        "remove Vault's data",
        "DESTROYS",
        actions.remove_data,
        lines=(shlex.join(command),),
        undo_text=NO_WAY_BACK,
    )
    return (
        *_steps_with_a_way_back(file, actions),
        *_end_of_signing(file, actions),
        *_end_of_vault(file, actions),
        *([remove_data] if command else []),
        seal_step(file.evidence_dir, file.signer.address, actions.seal),
    )


def _steps_with_a_way_back(file: CutoverFile, actions: RemovalActions) -> tuple[Step, ...]:
    wanted, vault = decommission_of(file), f"{file.vault.address}/v1"
    taken = (
        f"GET {vault}/{SNAPSHOT}"
        if wanted.snapshot_file is None
        else f"copy {wanted.snapshot_file}, its checksum compared"
    )
    return (
        Step(
            "inventory",
            "inventory again, nothing in the way",
            "reads",
            actions.inventory,
            lines=(f"GET and LIST below {vault}, of KV entries names only", "every blocker looked for again"),
            reads=("Vault", "ledger"),
        ),
        Step(
            "snapshot",
            "snapshot, opened, every sum compared",
            "writes evidence",
            actions.snapshot,
            lines=(taken, f"to {file.evidence_dir / FOLDER}, 0600; every sum in it compared"),
            is_done=actions.has_snapshot,
            reads=("Vault's storage",),
        ),
        login_step(
            "smoke",
            file,
            lambda: actions.smoke("before"),
            also="every blocker looked for once more",
            verify=actions.still_clear,  # a snapshot may take long
            reads=("sshd", "ledger", "Vault"),
        ),
    )


def _end_of_signing(file: CutoverFile, actions: RemovalActions) -> tuple[Step, ...]:
    """The first of these is the point of no return."""
    vault, mount = f"{file.vault.address}/v1", file.vault.mount
    return (
        Step(
            "disable",
            f"disable the SSH mount {mount}",
            "DESTROYS",
            actions.disable,
            lines=(f"DELETE {vault}/sys/mounts/{mount}",),
            is_done=actions.is_disabled,
            undo_text=f"{NO_WAY_BACK} from here on: Vault's CA key is gone with its mount",
        ),
        Step(
            "prove",
            "Vault signs no more, logins work",
            "logs in",
            actions.signs_no_more,
            lines=(
                *(f"POST {vault}/{mount}/sign/{role}: must fail" for role in file.vault.roles),
                *login_lines(file),
            ),
            verify=lambda: actions.smoke("without-vault"),
            reads=("Vault", "sshd", "ledger"),
        ),
        Step(
            "revoke",
            "revoke every token but our own",
            "DESTROYS",
            actions.revoke,
            lines=(f"POST {vault}/auth/token/revoke-accessor for every accessor but our own",),
            is_done=actions.is_revoked,
            undo_text=NO_WAY_BACK,
        ),
    )


def _end_of_vault(file: CutoverFile, actions: RemovalActions) -> tuple[Step, ...]:
    return (
        Step(
            "seal-vault",
            "seal Vault",
            "CHANGES",
            actions.seal_vault,
            lines=(
                "what is new since the snapshot looked for, by name; anything stops the run here",
                *(f"PUT {address}/v1/sys/seal, if it is active" for address in actions.addresses),
            ),
            is_done=actions.is_sealed,
            undo_text=BEYOND,
        ),
        Step(
            "stop",
            "stop Vault",
            "CHANGES",
            actions.stop,
            lines=(shlex.join(decommission_of(file).stop_command),),
            is_done=actions.has_stopped,
            undo_text=BEYOND,
        ),
        Step(
            "gone",
            "its addresses refuse connections",
            "reads",
            actions.gone,
            lines=tuple(
                f"connect to {address}: must be refused for {WATCHED} s, and again before the evidence is sealed"
                for address in actions.addresses
            ),
            reads=("Vault's address",),
        ),
        login_step("smoke-again", file, lambda: actions.smoke("after"), again=" again"),
    )


def make_plan(file: CutoverFile, steps: Sequence[Step], inputs: RemovalInputs, now: RemovalState | None) -> Plan:
    """The plan of a decommission. Pure: its arguments contain everything, without blockers.

    `now` is None for a run that is resumed after it has destroyed something.
    """
    removed = bool(decommission_of(file).remove_data_command)
    return Plan(
        operation="decommission",
        title=f"Removal of Vault at {file.vault.address}",
        inputs=inputs.as_json(),
        now={} if now is None else now.as_json(),
        then=RemovalGoal("gone", "removed" if removed else "kept, sealed").as_json(),
        steps=describe(steps),
    )
