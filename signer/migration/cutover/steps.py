"""The steps from Vault to the local CA and back, and the plan that shows them.

Each step has its action and the lines that it runs: a plan shows the same objects that a run carries out.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from signer.migration.compose import Compose
from signer.migration.config import CutoverFile
from signer.migration.cutover.actions import Backend, CutoverActions
from signer.migration.cutover.preconditions import CutoverGoal, Preconditions, preflight_line
from signer.migration.parity import SAMPLES
from signer.migration.plan import Observation, Plan, Step, describe, seal_step
from signer.migration.smoke import login_lines, login_step
from signer.migration.trial import trial_lines


def cutover_steps(file: CutoverFile, actions: CutoverActions) -> tuple[Step, ...]:
    """From Vault to the local CA. If step 5 or a later one fails, the run goes back to the base without the overlay."""
    seal = seal_step(file.evidence_dir, file.signer.address, actions.seal)
    return (*_checks(file, actions), *_move(file, actions), seal)


def _checks(file: CutoverFile, actions: CutoverActions) -> tuple[Step, ...]:
    trust = "does the host" if len(file.smoke) == 1 else f"do the {len(file.smoke)} hosts"
    vault = f"{file.vault.address}/v1/{file.vault.mount}"
    return (
        Step(
            "preflight",
            "preflight on this host",
            "reads",
            actions.preflight,
            lines=(shlex.join(preflight_line(file)),),
            reads=("key file", "compose files", "container", "sshd"),
        ),
        Step(
            "parity",
            f"compare roles and {SAMPLES} certificates",
            "reads, signs",
            actions.parity,
            lines=(
                *(f"GET {vault}/roles/{role}" for role in file.vault.roles),
                *(shlex.join(line) for line in trial_lines(file.compose)),
                f"up to {SAMPLES} x POST {vault}/sign/… and the same to the trial; nobody receives them",
            ),
            reads=("Vault's roles", "policy.toml"),
        ),
        Step(
            "trust",
            f"{trust} trust the new CA",
            "connects",
            actions.trust,
            lines=tuple(
                f"ssh -v -o IdentityFile=none -o CertificateFile=SAMPLE -p {target.port} {target.user}@{target.host}"
                " without a private key"
                for target in file.smoke
            ),
            reads=("sshd",),
        ),
        _record_state(file, actions),
    )


def _move(file: CutoverFile, actions: CutoverActions) -> tuple[Step, ...]:
    sign = f"POST {file.signer.address}/api/sign/{file.signer.role}"

    def back() -> Observation:
        return _joined(actions.up(with_overlay=False), actions.ready("vault"), actions.smoke("vault"))

    return (
        Step(
            "up",
            "compose up with the overlay",
            "CHANGES",
            lambda: actions.up(with_overlay=True),
            lines=(_up_line(file, with_overlay=True),),
            is_done=lambda: actions.is_up(with_overlay=True),
            undo=back,
            undo_lines=(_up_line(file, with_overlay=False), _ready_line(file, "vault"), *login_lines(file)),
            undo_text="undone by compose up without it, then logins through Vault",
            reads=("base", "overlay"),
        ),
        _ready(file, actions, "local", "ready, mode local, pinned CA"),
        login_step(
            "smoke",
            file,
            lambda: actions.smoke("local"),
            also=f"{sign} with a principal outside the policy: must be refused",
            verify=actions.refuse,
        ),
    )


def rollback_steps(file: CutoverFile, actions: CutoverActions) -> tuple[Step, ...]:
    """From the local CA back to Vault, on the operator's command. Nothing is changed unless Vault signs."""
    sign = f"POST {file.vault.address}/v1/{file.vault.mount}/sign/{file.signer.role}"
    return (
        Step(
            "vault",
            "check that Vault can sign",
            "reads, signs",
            actions.vault_signs,
            lines=(f"{sign} and the same to a trial; nobody receives them",),
            reads=("Vault",),
        ),
        _record_state(file, actions),
        Step(
            "up",
            "compose up without the overlay",
            "CHANGES",
            lambda: actions.up(with_overlay=False),
            lines=(_up_line(file, with_overlay=False),),
            is_done=lambda: actions.is_up(with_overlay=False),
            reads=("base",),
        ),
        _ready(file, actions, "vault", "ready, mode vault"),
        login_step("smoke", file, lambda: actions.smoke("vault")),
        seal_step(file.evidence_dir, file.signer.address, actions.seal),
    )


def _record_state(file: CutoverFile, actions: CutoverActions) -> Step:
    return Step(
        "remember",
        "record the current state",
        "writes evidence",
        actions.record_state,
        lines=(f"{file.compose.engine} inspect the container of {file.compose.service}",),
        reads=("container",),
    )


def _ready(file: CutoverFile, actions: CutoverActions, mode: Backend, title: str) -> Step:
    line = _ready_line(file, mode)
    return Step("ready", title, "reads", lambda: actions.ready(mode), lines=(line,), reads=("/readyz",))


def _up_line(file: CutoverFile, *, with_overlay: bool) -> str:
    return shlex.join(Compose(file.compose).up_line(with_overlay))


def _ready_line(file: CutoverFile, mode: str) -> str:
    return f"GET {file.signer.address}/readyz until it is ready in mode {mode}"


def _joined(*seen: Observation) -> Observation:
    facts = {name: value for one in seen for name, value in one.facts.items()}
    return Observation("; ".join(one.summary for one in seen if one.summary), facts)


def make_plan(file: CutoverFile, steps: Sequence[Step], found: Preconditions) -> Plan:
    """The plan of a cutover. Pure: the preconditions are arguments."""
    return Plan(
        operation="cutover",
        title=f"Cutover of {file.compose.service} from Vault to the local CA",
        inputs=found.inputs.as_json(),
        now=found.now.as_json(),
        then=CutoverGoal("local", found.inputs.policy.ca).as_json(),
        steps=describe(steps, with_undo=True),
    )
