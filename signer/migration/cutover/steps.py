"""The steps from Vault to the local CA and back, and the plan that tells them.

`cutover_steps` and `rollback_steps` are the two lists; each step acts through `Hands`. Applied, these are `LiveHands`
(`live.py`); while a plan is made they are `Recording`, which writes down what would be run. Same steps, same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, Protocol

from signer.migration.config import CutoverFile
from signer.migration.plan import Observation, Plan, Step, WouldRun, describe_all

SAMPLES: Final = 20
READY_WITHIN: Final = 12.0  # seconds for the service to be ready after compose has started it
Backend = Literal["vault", "local"]


class Hands(Protocol):
    """What the steps need done. Each raises `SignerError` when it cannot, or when what it sees is not right."""

    def preflight(self) -> Observation: ...
    def parity(self) -> Observation: ...
    def trust(self) -> Observation: ...
    def vault_signs(self) -> Observation: ...
    def remember(self) -> Observation: ...
    def up(self, *, with_overlay: bool) -> Observation: ...
    def is_up(self, *, with_overlay: bool) -> bool: ...
    def ready(self, backend: Backend) -> Observation: ...
    def smoke(self, backend: Backend) -> Observation: ...
    def refuse(self) -> Observation: ...
    def seal(self, outcome: str) -> Observation: ...


def cutover_steps(file: CutoverFile, hands: Hands) -> tuple[Step, ...]:
    """From Vault to the local CA. From step 5 on a failure brings the base without overlay back by itself."""
    targets = ", ".join(target.name for target in file.smoke)
    trust = "does the host" if len(file.smoke) == 1 else f"do the {len(file.smoke)} hosts"

    def back() -> Observation:
        return _both(hands.up(with_overlay=False), hands.ready("vault"), hands.smoke("vault"))

    return (
        Step(
            "preflight",
            "preflight on this host",
            "reads",
            hands.preflight,
            reads=("key file", "compose files", "container", "sshd"),
        ),
        Step(
            "parity",
            f"compare roles and {SAMPLES} certificates",
            "reads, signs",
            hands.parity,
            reads=("Vault's roles", "policy.toml"),
        ),
        Step("trust", f"{trust} trust the new CA", "logs in", hands.trust, reads=("trusted_ca_file",)),
        Step("remember", "remember the present state", "writes evidence", hands.remember, reads=("container",)),
        Step(
            "up",
            "compose up with the overlay",
            "CHANGES",
            lambda: hands.up(with_overlay=True),
            is_done=lambda: hands.is_up(with_overlay=True),
            undo=back,
            undo_text="undone by compose up without it, then logins through Vault",
            reads=("base", "overlay"),
        ),
        Step("ready", "ready, mode local, pinned CA", "reads", lambda: hands.ready("local"), reads=("/readyz",)),
        Step(
            "smoke",
            f"log in to {targets}",
            "logs in",
            lambda: hands.smoke("local"),
            verify=hands.refuse,
            reads=("sshd", "ledger"),
        ),
        Step("seal", "seal the evidence", "writes evidence", lambda: hands.seal("applied"), reads=("evidence",)),
    )


def rollback_steps(file: CutoverFile, hands: Hands) -> tuple[Step, ...]:
    """From the local CA back to Vault, by hand. Nothing is changed unless Vault signs."""
    targets = ", ".join(target.name for target in file.smoke)
    return (
        Step("vault", "does Vault sign", "reads, signs", hands.vault_signs, reads=("Vault",)),
        Step("remember", "remember the present state", "writes evidence", hands.remember, reads=("container",)),
        Step(
            "up",
            "compose up without the overlay",
            "CHANGES",
            lambda: hands.up(with_overlay=False),
            is_done=lambda: hands.is_up(with_overlay=False),
            reads=("base",),
        ),
        Step("ready", "ready, mode vault", "reads", lambda: hands.ready("vault"), reads=("/readyz",)),
        Step("smoke", f"log in to {targets}", "logs in", lambda: hands.smoke("vault"), reads=("sshd", "ledger")),
        Step("seal", "seal the evidence", "writes evidence", lambda: hands.seal("applied"), reads=("evidence",)),
    )


def _both(*seen: Observation) -> Observation:
    facts = {name: value for one in seen for name, value in one.facts.items()}
    return Observation("; ".join(one.summary for one in seen if one.summary), facts)


class Recording(WouldRun):
    """Hands of a cutover that do nothing."""

    def preflight(self) -> Observation:
        return self._note("preflight")

    def parity(self) -> Observation:
        return self._note("parity")

    def trust(self) -> Observation:
        return self._note("trust")

    def vault_signs(self) -> Observation:
        return self._note("vault_signs")

    def remember(self) -> Observation:
        return self._note("remember")

    def up(self, *, with_overlay: bool) -> Observation:
        return self._note("up with overlay" if with_overlay else "up")

    def is_up(self, *, with_overlay: bool) -> bool:
        del with_overlay
        return False

    def ready(self, backend: Backend) -> Observation:
        return self._note(f"ready {backend}")

    def smoke(self, backend: Backend) -> Observation:
        return self._note(f"smoke {backend}")

    def refuse(self) -> Observation:
        return self._note("refuse")

    def seal(self, outcome: str) -> Observation:
        del outcome
        return self._note("seal")


def describe_steps(steps: tuple[Step, ...], recording: Recording) -> tuple[Mapping[str, Any], ...]:
    """Every step as the plan holds it, with what its undo would run."""
    described = describe_all(steps, recording)
    return tuple({**told, "would_undo": _undo_of(step, recording)} for told, step in zip(described, steps, strict=True))


def _undo_of(step: Step, recording: Recording) -> list[str]:
    recording.would = []
    if step.undo is not None:
        step.undo()
    return recording.would


def make_plan(
    file: CutoverFile, lines: Mapping[str, tuple[str, ...]], inputs: Mapping[str, Any], now: Mapping[str, Any]
) -> Plan:
    """The plan of a cutover. Pure: the world was read before."""
    recording = Recording(lines)
    return Plan(
        operation="cutover",
        title=f"Cutover of {file.compose.service} from Vault to the local CA",
        inputs=inputs,
        now=now,
        then={"mode": "local", "ca": inputs["policy"]["ca"]},
        steps=describe_steps(cutover_steps(file, recording), recording),
    )
