"""What the actions that remove Vault check once more: a late blocker, and a Vault that only restarts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from signer.migration.config import CutoverFile, parse_cutover_file
from signer.migration.decommission import actions
from signer.migration.decommission.actions import RemovalActions, RemovalFailed
from signer.migration.decommission.blockers import Blocker
from signer.migration.decommission.steps import removal_steps
from signer.migration.decommission.survey import Blocked, RemovalReadiness
from signer.migration.evidence.store import Evidence
from signer.migration.journal import Journal, RunState
from signer.migration.run import Run, destroyed_by
from signer.subprocesses import CommandResult
from tests.parts.cutover_file import GOOD, REMOVAL
from tests.parts.removal import CLEAR, READY
from tests.parts.runs import Ledger

NO_SERVICE: Any = None  # nothing here asks the service
FULL = replace(READY, blockers=[Blocker("secrets_left", "secrets are left: 1 in late/", "move them")])


class Vault:
    """Answers nothing, and keeps what it was asked to do."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> Vault:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def call(self, method: str, path: str, *_: object, **__: object) -> dict[str, Any]:
        self.asked.append((method, path))
        return {"data": {}}


@pytest.fixture
def file(tmp_path: Path) -> CutoverFile:
    for name in ("token", "vault-token", "admin"):
        (tmp_path / name).write_text(f"{name}-that-nobody-knows\n")
        (tmp_path / name).chmod(0o600)
    text = (GOOD + REMOVAL).replace("/root/", f"{tmp_path}/") + 'remove_data_command = ["rm", "-rf", "/data"]\n'
    return parse_cutover_file(text.replace("/var/lib/safe-session/evidence", f"{tmp_path}/evidence").encode())


def acting_on(file: CutoverFile, *begun: str, removed_by: str = "") -> RemovalActions:
    """Of a run that was cut off after those steps began."""
    evidence = Evidence.create(file.evidence_dir, "decommission", 1_800_000_000)
    journal = Journal(file.evidence_dir, evidence.run)
    for step in begun:
        journal.write("step.began", step=step)
    acting = RemovalActions(file, NO_SERVICE, removed_by)
    acting.begin(Run(journal, evidence, "", Ledger()))
    return acting


@pytest.fixture(autouse=True)
def vault(monkeypatch: pytest.MonkeyPatch) -> type[Vault]:
    Vault.asked = []
    monkeypatch.setattr(actions, "VaultAdmin", Vault)
    return Vault


def test_what_came_in_the_way_during_the_snapshot_stops_it_before_anything_is_destroyed(
    file: CutoverFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "read_readiness", lambda *_: FULL)
    steps = removal_steps(file, acting_on(file))
    at = next(number for number, step in enumerate(steps) if step.effect == "DESTROYS")
    verify = steps[at - 1].verify
    assert verify is not None
    with pytest.raises(Blocked, match="secrets_left"):
        verify()


@pytest.mark.parametrize("found, is_blocked", [(FULL, True), (READY, False)])
def test_a_run_that_was_cut_off_before_it_destroyed_anything_looks_again(
    file: CutoverFile, monkeypatch: pytest.MonkeyPatch, vault: type[Vault], found: RemovalReadiness, is_blocked: bool
) -> None:
    monkeypatch.setattr(actions, "read_readiness", lambda *_: found)
    late = acting_on(file, "disable")
    if is_blocked:
        with pytest.raises(Blocked):
            late.disable()
    else:
        late.disable()
    assert (("DELETE", "sys/mounts/ssh") in vault.asked) != is_blocked


def test_a_vault_that_refuses_connections_is_stopped_all_the_same(
    file: CutoverFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be on its way up: what starts it again is what the stop command ends."""
    monkeypatch.setattr(RemovalActions, "is_gone", lambda _self: True)
    stop = {step.name: step for step in removal_steps(file, acting_on(file))}["stop"]
    assert not stop.is_done()
    stop = {step.name: step for step in removal_steps(file, acting_on(file, "stop"))}["stop"]
    assert stop.is_done()


def test_the_version_of_the_vault_that_was_removed_is_kept_whenever_the_run_ends(
    file: CutoverFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "read_readiness", lambda *_: READY)
    first = acting_on(file)
    first.inventory()
    run = first._run
    assert run.versions == {"vault": CLEAR.version}
    run.versions = {}
    RemovalActions(file, NO_SERVICE).begin(run)  # resumed, with Vault gone
    assert run.versions == {"vault": CLEAR.version}


def test_steps_that_destroy_are_known_by_their_names_where_the_plan_is_lost(file: CutoverFile) -> None:
    steps = removal_steps(file, acting_on(file))
    for step in steps:
        state = RunState("2027-01-15T08-00-00Z-decommission", "decommission", begun={step.name: None})
        assert (destroyed_by(file.evidence_dir, state) != "") == (step.effect == "DESTROYS"), step.name
    assert "remove-data" in [step.name for step in steps]
    of_a_cutover = RunState("2027-01-15T08-00-00Z-cutover", "cutover", begun={"disable": None})
    assert destroyed_by(file.evidence_dir, of_a_cutover) == ""


# --- data that was removed by hand ----------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [True, False])
def test_the_operators_word_stands_for_the_command_that_removes_the_data(
    file: CutoverFile, monkeypatch: pytest.MonkeyPatch, word: bool
) -> None:
    ran: list[object] = []

    def run(words: tuple[str, ...], **_: object) -> CommandResult:
        ran.append(words)
        return CommandResult(1, "", "", True, 0.1)

    monkeypatch.setattr(actions, "run", run)
    acting = acting_on(file, "remove-data", removed_by="ops" if word else "")
    if word:
        seen = acting.remove_data()
        assert ran == []
        assert seen.summary == "removed by hand, confirmed by the operator"
        assert seen.facts == {"by_hand": True, "by_the_word_of": "ops", "not_run": "rm -rf /data"}
    else:
        with pytest.raises(RemovalFailed) as refused:
            acting.remove_data()
        assert len(ran) == 1
        assert "signer decommission apply PLAN --data-is-removed" in refused.value.hint
