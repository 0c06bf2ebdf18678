"""A disk that fills up as Vault is removed: before the SSH mount nothing is changed, after it the run goes on later."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from signer import files
from signer.migration.approval import Approval
from signer.migration.config import parse_cutover_file
from signer.migration.decommission.actions import would_run
from signer.migration.decommission.steps import Recording, make_plan, removal_steps
from signer.migration.evidence import store
from signer.migration.evidence.verify import check_evidence
from signer.migration.journal import runs
from signer.migration.plan import Observation
from signer.migration.run import Run, open_run, unfinished
from tests.unit.migration.test_config import GOOD, REMOVAL
from tests.unit.migration.test_run import Ledger, Silent

FILE = parse_cutover_file((GOOD + REMOVAL).encode())
PLAN = make_plan(FILE, would_run(FILE), {"config": {"path": "/c"}}, {"mode": "local"})
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


class Hands(Recording):
    """Note what they did, and fill the disk with the act of that name."""

    def __init__(self, disk: Disk, fills: str, done: list[str]) -> None:
        super().__init__(would_run(FILE))
        self._disk, self._fills, self._done = disk, fills, done
        self.kept: Run | None = None

    def _note(self, name: str) -> Observation:
        self._done.append(name)
        self._disk.is_full = self._disk.is_full or name == self._fills
        return Observation(f"did {name}")

    def is_disabled(self) -> bool:
        return "disable" in self._done

    def seal(self, outcome: str) -> Observation:
        assert self.kept is not None
        return self.kept.conclude(outcome)


def apply(folder: Path, ledger: Ledger, hands: Hands) -> str:
    with open_run(folder, "decommission", PLAN, APPROVAL, ledger) as run:
        hands.kept = run
        return run.carry_out(removal_steps(FILE, hands), Silent()).outcome


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("fills", ["inventory", "snapshot", "still_clear"])
def test_before_the_ssh_mount_nothing_is_changed(tmp_path: Path, disk: Disk, fills: str) -> None:
    done: list[str] = []
    assert apply(tmp_path / "evidence", Ledger(), Hands(disk, fills, done)) == "failed"
    assert "disable" not in done
    assert [past.outcome for past in runs(tmp_path / "evidence")] == ["failed"]


@pytest.mark.parametrize("fills", ["disable", "signs_no_more", "revoke", "seal_vault", "stop", "gone"])
def test_after_it_the_same_run_goes_on_when_there_is_room(tmp_path: Path, disk: Disk, fills: str) -> None:
    folder, ledger, done = tmp_path / "evidence", Ledger(), list[str]()
    assert apply(folder, ledger, Hands(disk, fills, done)) == "stopped"
    assert done[-1] in (fills, "smoke")  # the proof that belongs to that step; nothing is done that is not kept
    (past,) = unfinished(folder)
    assert ledger.held == []
    disk.is_full = False
    assert apply(folder, ledger, Hands(disk, "", done)) == "applied"
    assert done.count("disable") == 1
    assert [(entry["outcome"], entry["plan"]) for entry in ledger.held] == [("applied", PLAN.digest)]
    verdict = check_evidence(folder / past.run, lambda digest: next(iter(ledger.operations(digest)), None))
    assert verdict.is_good, verdict.problems
