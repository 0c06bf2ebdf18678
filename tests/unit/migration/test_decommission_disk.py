"""A disk that fills up as Vault is removed: before the SSH mount nothing is changed, after it the run goes on later."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from signer import files
from signer.migration.approval import Approval
from signer.migration.config import parse_cutover_file
from signer.migration.decommission.actions import RemovalActions
from signer.migration.decommission.steps import make_plan, removal_steps
from signer.migration.decommission.survey import state_of
from signer.migration.evidence import store
from signer.migration.evidence.verify import check_evidence
from signer.migration.journal import runs
from signer.migration.plan import Observation, Step
from signer.migration.run import Run, open_run, unfinished
from tests.parts.cutover_file import GOOD, REMOVAL
from tests.parts.removal import READY, removal_inputs
from tests.parts.runs import Ledger, SilentReporter

FILE = parse_cutover_file((GOOD + REMOVAL).encode())
STEPS = removal_steps(FILE, RemovalActions(FILE, Ledger()))  # type: ignore[arg-type]
PLAN = make_plan(FILE, STEPS, removal_inputs(FILE, Path("/c")), state_of(READY))
APPROVAL = Approval("decommission", PLAN.digest, "ops", "here", "2027-01-15T08:00:00Z", "--approve")


class Disk:
    """Takes nothing more for evidence once it is full."""

    def __init__(self, environ: pytest.MonkeyPatch) -> None:
        self.is_full = False
        whole = files.write_atomically

        def fill(path: Path, content: bytes, mode: int) -> None:
            if self.is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            whole(path, content, mode)

        environ.setattr(store, "write_atomically", fill)


ACTIONS: Final = {
    "inventory": ("inventory",), "snapshot": ("snapshot",), "smoke": ("smoke", "still_clear"), "disable": ("disable",),
    "prove": ("signs_no_more", "smoke"), "revoke": ("revoke",), "seal-vault": ("seal_vault",), "stop": ("stop",),
    "gone": ("gone",), "smoke-again": ("smoke",),
}  # fmt: skip


@dataclass
class Removal:
    """Steps that only note what they did, and fill the disk with the action of the name `fills`."""

    disk: Disk
    fills: str
    done: list[str]

    def steps(self, run: Run) -> list[Step]:
        """Those of PLAN."""
        actions = RemovalActions(FILE, Ledger())  # type: ignore[arg-type]
        actions._run = run
        actions._present = list  # type: ignore[method-assign]
        return [self._played(step) if step.name in ACTIONS else step for step in removal_steps(FILE, actions)]

    def _played(self, step: Step) -> Step:
        first, *others = (partial(self._act, name) for name in ACTIONS[step.name])
        is_disabled = (lambda: "disable" in self.done) if step.name == "disable" else lambda: False
        return replace(step, action=first, verify=next(iter(others), None), is_done=is_disabled)

    def _act(self, name: str) -> Observation:
        self.done.append(name)
        self.disk.is_full = self.disk.is_full or name == self.fills
        return Observation(f"did {name}")


def apply(folder: Path, ledger: Ledger, removal: Removal) -> str:
    with open_run(folder, "decommission", PLAN, APPROVAL, ledger) as run:
        return run.carry_out(removal.steps(run), SilentReporter()).outcome


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("fills", ["inventory", "snapshot", "still_clear"])
def test_before_the_ssh_mount_nothing_is_changed(tmp_path: Path, disk: Disk, fills: str) -> None:
    done: list[str] = []
    assert apply(tmp_path / "evidence", Ledger(), Removal(disk, fills, done)) == "failed"
    assert "disable" not in done
    assert [state.outcome for state in runs(tmp_path / "evidence")] == ["failed"]


@pytest.mark.parametrize("fills", ["disable", "signs_no_more", "revoke", "seal_vault", "stop", "gone"])
def test_after_it_the_same_run_goes_on_when_there_is_room(tmp_path: Path, disk: Disk, fills: str) -> None:
    folder, ledger, done = tmp_path / "evidence", Ledger(), list[str]()
    assert apply(folder, ledger, Removal(disk, fills, done)) == "stopped"
    assert done[-1] in (fills, "smoke")  # the proof that belongs to that step; nothing is done that is not kept
    (state,) = unfinished(folder)
    assert ledger.held == []
    disk.is_full = False
    assert apply(folder, ledger, Removal(disk, "", done)) == "applied"
    assert done.count("disable") == 1
    assert [(entry["outcome"], entry["plan"]) for entry in ledger.held] == [("applied", PLAN.digest)]
    verdict = check_evidence(folder / state.run, lambda digest: next(iter(ledger.operations(digest)), None))
    assert verdict.is_good, verdict.problems
