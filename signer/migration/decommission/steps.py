"""The steps that remove Vault, and the plan that tells them. From "disable the SSH mount" on nothing leads back.

`removal_steps` is the list; each step acts through `Hands`. Applied, these are `LiveRemoval` (`removal.py`); while a
plan is made they are `Recording`, which writes down what would be run. Same steps, same order. A step that was done by
a run that was cut off says so itself (`is_done`), and once Vault is sealed or gone no step asks it for anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

from signer.migration.config import CutoverFile
from signer.migration.plan import Observation, Plan, Step, WouldRun, describe_all

NO_WAY_BACK: Final = "there is no undo"
BEYOND: Final = "no way back since the SSH mount was disabled"


class Hands(Protocol):
    """What the steps need done. Each raises `SignerError` when it cannot, or when what it sees is not right."""

    def inventory(self) -> Observation: ...
    def snapshot(self) -> Observation: ...
    def has_snapshot(self) -> bool: ...
    def smoke(self, when: str) -> Observation: ...
    def still_clear(self) -> Observation: ...
    def disable(self) -> Observation: ...
    def is_disabled(self) -> bool: ...
    def signs_no_more(self) -> Observation: ...
    def revoke(self) -> Observation: ...
    def is_revoked(self) -> bool: ...
    def seal_vault(self) -> Observation: ...
    def is_sealed(self) -> bool: ...
    def stop(self) -> Observation: ...
    def has_stopped(self) -> bool: ...
    def gone(self) -> Observation: ...
    def remove_data(self) -> Observation: ...
    def seal(self, outcome: str) -> Observation: ...


def removal_steps(file: CutoverFile, hands: Hands) -> tuple[Step, ...]:
    """All of it, in order. Removing the data is there only if the configuration has a command for it."""
    remove_data = (
        Step("remove-data", "remove Vault's data", "DESTROYS", hands.remove_data, undo_text=NO_WAY_BACK),
    )  # fmt: skip
    return (
        *_steps_with_a_way_back(file, hands),
        *_steps_beyond(file, hands),
        *(remove_data if file.decommission is not None and file.decommission.remove_data_command else ()),
        Step("seal", "seal the evidence", "writes evidence", lambda: hands.seal("applied"), reads=("evidence",)),
    )


def _steps_with_a_way_back(file: CutoverFile, hands: Hands) -> tuple[Step, ...]:
    targets = ", ".join(target.name for target in file.smoke)
    return (
        Step("inventory", "inventory again, nothing in the way", "reads", hands.inventory, reads=("Vault", "ledger")),
        Step(
            "snapshot",
            "snapshot, opened, every sum compared",
            "writes evidence",
            hands.snapshot,
            is_done=hands.has_snapshot,
            reads=("Vault's storage",),
        ),
        Step(
            "smoke",
            f"log in to {targets}",
            "logs in",
            lambda: hands.smoke("before"),
            verify=hands.still_clear,  # a snapshot may take its time
            reads=("sshd", "ledger", "Vault"),
        ),
    )


def _steps_beyond(file: CutoverFile, hands: Hands) -> tuple[Step, ...]:
    """From the first of these on nothing leads back."""
    targets = ", ".join(target.name for target in file.smoke)
    mount = file.vault.mount
    return (
        Step(
            "disable",
            f"disable the SSH mount {mount}",
            "DESTROYS",
            hands.disable,
            is_done=hands.is_disabled,
            undo_text=f"{NO_WAY_BACK} from here on: Vault's CA key is gone with its mount",
        ),
        Step(
            "prove",
            "Vault signs no more, logins work",
            "logs in",
            hands.signs_no_more,
            verify=lambda: hands.smoke("without-vault"),
            reads=("Vault", "sshd", "ledger"),
        ),
        Step(
            "revoke",
            "revoke every token but our own",
            "DESTROYS",
            hands.revoke,
            is_done=hands.is_revoked,
            undo_text=NO_WAY_BACK,
        ),
        Step("seal-vault", "seal Vault", "CHANGES", hands.seal_vault, is_done=hands.is_sealed, undo_text=BEYOND),
        Step("stop", "stop Vault", "CHANGES", hands.stop, is_done=hands.has_stopped, undo_text=BEYOND),
        Step("gone", "its address refuses connections", "reads", hands.gone, reads=("Vault's address",)),
        Step(
            "smoke-again",
            f"log in to {targets} again",
            "logs in",
            lambda: hands.smoke("after"),
            reads=("sshd", "ledger"),
        ),
    )


class Recording(WouldRun):
    """Hands of a removal that do nothing."""

    def inventory(self) -> Observation:
        return self._note("inventory")

    def snapshot(self) -> Observation:
        return self._note("snapshot")

    def has_snapshot(self) -> bool:
        return False

    def smoke(self, when: str) -> Observation:
        del when
        return self._note("smoke")

    def still_clear(self) -> Observation:
        return self._note("still_clear")

    def disable(self) -> Observation:
        return self._note("disable")

    def is_disabled(self) -> bool:
        return False

    def signs_no_more(self) -> Observation:
        return self._note("signs_no_more")

    def revoke(self) -> Observation:
        return self._note("revoke")

    def is_revoked(self) -> bool:
        return False

    def seal_vault(self) -> Observation:
        return self._note("seal_vault")

    def is_sealed(self) -> bool:
        return False

    def stop(self) -> Observation:
        return self._note("stop")

    def has_stopped(self) -> bool:
        return False

    def gone(self) -> Observation:
        return self._note("gone")

    def remove_data(self) -> Observation:
        return self._note("remove_data")

    def seal(self, outcome: str) -> Observation:
        del outcome
        return self._note("seal")


def make_plan(
    file: CutoverFile, lines: Mapping[str, tuple[str, ...]], inputs: Mapping[str, Any], now: Mapping[str, Any]
) -> Plan:
    """The plan of a decommission. Pure: the world was read before, and nothing stood in the way."""
    recording = Recording(lines)
    removed = file.decommission is not None and bool(file.decommission.remove_data_command)
    return Plan(
        operation="decommission",
        title=f"Removal of Vault at {file.vault.address}",
        inputs=inputs,
        now=now,
        then={"vault": "gone", "data": "removed" if removed else "kept, sealed"},
        steps=describe_all(removal_steps(file, recording), recording),
    )
