"""What is read before Vault is removed: the ledger's cutovers, their evidence; and the plan that comes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from signer.api_client import Readiness
from signer.errors import SignerError
from signer.migration.config import CutoverFile, decommission_of, parse_cutover_file
from signer.migration.decommission.actions import RemovalActions
from signer.migration.decommission.blockers import Blocker, RecordedCutover
from signer.migration.decommission.steps import make_plan, removal_steps
from signer.migration.decommission.survey import (
    RemovalReadiness,
    _evidence_faults,
    _local_since,
    blocked,
    read_ledger,
    state_of,
)
from signer.migration.evidence.store import Evidence
from tests.parts.cutover_file import GOOD, REMOVAL
from tests.parts.evidence import sealed_run
from tests.parts.removal import CHECKS, CLEAR, LEDGER, READY, removal_inputs

FILE = parse_cutover_file((GOOD + REMOVAL).encode())
ROW = {"plan": "", "evidence": "sha256:e", "reason": "", "hash": "h", "actor": "operator"}


def row(seq: int, operation: str, outcome: str) -> dict[str, Any]:
    return {**ROW, "seq": seq, "operation": operation, "outcome": outcome, "time": f"2026-11-22T14:{seq:02}:00Z"}


class Api:
    """Answers as `ApiClient` would; operations are newest first."""

    def __init__(self, *operations: dict[str, Any], vault: tuple[dict[str, Any], ...] = ()) -> None:
        self._operations = operations
        self._vault = vault
        self.mode = "local"

    def ready(self) -> Readiness:
        return Readiness(bool(self.mode), self.mode)

    def operations(self, evidence: str | None = None) -> list[dict[str, Any]]:
        return [one for one in self._operations if evidence in (None, one["evidence"])]

    def certificates(self, **filters: object) -> Iterator[dict[str, Any]]:
        assert filters["backend"] == "vault"
        return iter([one for one in self._vault if "active" not in filters or one["status"] == "active"])

    def certificate(self, serial: str) -> dict[str, Any]:
        return {"recorded": {"seq": int(serial), "time": "2026-11-22T14:00:00Z"}}


def told(*operations: dict[str, Any], **options: Any) -> Any:
    return read_ledger(Api(*operations, **options))  # type: ignore[arg-type]


def test_the_newest_successful_cutover_counts() -> None:
    found = told(row(9, "cutover", "applied"), row(7, "rollback", "applied"), row(5, "cutover", "applied"))
    assert found.cutover == RecordedCutover(9, 1_795_356_540, "sha256:e")
    assert (found.rolled_back, found.mode) == (0, "local")


@pytest.mark.parametrize(
    "operation, outcome, takes_back",
    [
        ("rollback", "applied", True),
        ("rollback", "stopped", True),
        ("rollback", "failed", False),
        ("cutover", "rolled_back", True),
        ("cutover", "rollback_failed", True),
        ("cutover", "failed", False),
        ("cutover", "approval_refused", False),
        ("decommission", "failed", False),
        ("decommission", "approval_refused", False),
    ],
)
def test_what_came_after_it_may_have_taken_it_back(operation: str, outcome: str, takes_back: bool) -> None:
    found = told(row(9, operation, outcome), row(5, "cutover", "applied"))
    assert found.cutover is not None
    assert found.rolled_back == (9 if takes_back else 0)


def test_a_cutover_that_never_was_is_none() -> None:
    assert told(row(9, "cutover", "failed"), row(3, "cutover", "approval_refused")).cutover is None


def test_vaults_certificates_are_told_by_the_newest_and_the_longest() -> None:
    expired = {"serial": "8", "status": "expired", "valid_before": "2026-11-22T14:10:00Z"}
    longer = {"serial": "6", "status": "active", "valid_before": "2026-11-22T15:00:01Z"}
    shorter = {"serial": "4", "status": "active", "valid_before": "2026-11-22T15:00:00Z"}
    found = told(row(5, "cutover", "applied"), vault=(expired, longer, shorter))
    assert found.vault_signed == (8, 1_795_356_000)
    assert found.vault_valid_until == 1_795_359_601
    assert told(row(5, "cutover", "applied")).vault_signed is None


@pytest.mark.parametrize(
    "wrong", [{"seq": "x"}, {"seq": None}, {"time": "yesterday"}, {"time": 5}, {"evidence": None}, {"outcome": []}]
)
def test_a_ledger_of_another_form_is_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(SignerError) as refused:
        told({**row(5, "cutover", "applied"), **wrong})
    assert refused.value.code == "not_our_service"


# --- evidence ------------------------------------------------------------------------------------------------------


def faults(folder: Path, change: str = "") -> tuple[str, ...]:
    evidence = sealed_run(folder)
    digest = evidence.digest
    plan = evidence.read_json("plan.json")["digest"]
    entry = {**row(5, "cutover", "applied"), "evidence": digest, "plan": plan}
    evidence.keep_ledger_answer(entry)
    if change == "edited":
        path = evidence.folder / "parity.json"
        path.chmod(0o600)
        path.write_text("{}")
        path.chmod(0o400)
    elif change == "sums edited":
        path = evidence.folder / "SHA256SUMS"
        path.chmod(0o600)
        path.write_text(path.read_text() + "\n")
    elif change == "moved":
        evidence.folder.rename(folder.parent / "elsewhere")
    file = replace(FILE, evidence_dir=folder)
    return _evidence_faults(file, Api(entry), RecordedCutover(5, 0, digest))  # type: ignore[arg-type]


def test_intact_evidence_has_no_fault(tmp_path: Path) -> None:
    assert faults(tmp_path / "evidence") == ()


def test_edited_evidence_is_told(tmp_path: Path) -> None:
    assert [fault.split(":")[0] for fault in faults(tmp_path / "evidence", "edited")] == ["evidence_file_changed"]


@pytest.mark.parametrize("how", ["sums edited", "moved"])
def test_evidence_that_is_not_the_recorded_one_is_told(tmp_path: Path, how: str) -> None:
    assert faults(tmp_path / "evidence", how) == ("no directory in it has the digest that the ledger holds",)


def test_the_second_in_which_the_service_began_to_sign_by_itself_is_read_from_the_evidence(tmp_path: Path) -> None:
    evidence = Evidence.create(tmp_path, "cutover", 1_795_356_302)
    steps = (("parity", 1), ("ready", 4_700), ("ready", 6_900), ("smoke", 9_000))  # taken up again before it was done
    events = [{"at": 1_795_356_302_000 + at, "event": "step.done", "step": step} for step, at in steps]
    events.append({"at": 1_795_356_399_000, "event": "step.began", "step": "ready"})
    evidence.write_text("journal.jsonl", "".join(json.dumps(event) + "\n" for event in events))
    evidence.seal("applied")
    file, cutover = replace(FILE, evidence_dir=tmp_path), RecordedCutover(5, 0, evidence.digest)
    assert _local_since(file, cutover) == 1_795_356_308
    assert _local_since(file, replace(cutover, evidence="sha256:another")) == 0


@pytest.mark.parametrize("text", ["", "{}\n", "[]\n", '{"event": "step.done", "step": "ready"}\n', "{\n"])
def test_a_journal_that_does_not_tell_that_second_is_none(tmp_path: Path, text: str) -> None:
    evidence = Evidence.create(tmp_path, "cutover", 1_795_356_302)
    evidence.write_text("journal.jsonl", text)
    evidence.seal("applied")
    assert _local_since(replace(FILE, evidence_dir=tmp_path), RecordedCutover(5, 0, evidence.digest)) == 0


# --- the plan ------------------------------------------------------------------------------------------------------


def planned(file: CutoverFile = FILE) -> Any:
    steps = removal_steps(file, RemovalActions(file, Api()))  # type: ignore[arg-type]
    return make_plan(file, steps, removal_inputs(file, Path("/c")), state_of(READY))


def test_everything_before_the_ssh_mount_leads_back_and_nothing_after_it() -> None:
    steps = planned().steps
    names = [step["name"] for step in steps]
    at = names.index("disable")
    assert {step["effect"] for step in steps[:at]} == {"reads", "writes evidence", "logs in"}
    changes = [step for step in steps[at:] if step["effect"] in ("CHANGES", "DESTROYS")]
    assert [step["name"] for step in changes] == ["disable", "revoke", "seal-vault", "stop"]
    assert all("no undo" in step["undo"] or "no way back" in step["undo"] for step in changes)
    assert "there is no undo from here on" in steps[at]["undo"]


def test_data_are_removed_last_and_only_if_the_configuration_says_how() -> None:
    assert "remove-data" not in [step["name"] for step in planned().steps]
    removal = replace(decommission_of(FILE), remove_data_command=("rm", "-rf", "/srv/vault data"))
    plan = planned(replace(FILE, decommission=removal))
    assert [step["name"] for step in plan.steps][-2:] == ["remove-data", "seal"]
    assert plan.steps[-2]["would"] == ["rm -rf '/srv/vault data'"]
    assert (plan.then["data"], planned().then["data"]) == ("removed", "kept, sealed")


def test_tokens_and_leases_that_come_and_go_are_no_drift() -> None:
    busy = replace(CLEAR, tokens=9, leases=99, at=CLEAR.at + 5)
    assert state_of(RemovalReadiness(busy, LEDGER, CHECKS, [])) == state_of(READY)
    more = replace(CLEAR, policies=("default", "new", "root"))
    assert state_of(RemovalReadiness(more, LEDGER, CHECKS, [])) != state_of(READY)


def test_without_its_table_nothing_is_removed() -> None:
    with pytest.raises(SignerError) as refused:
        decommission_of(replace(FILE, decommission=None))
    assert refused.value.code == "decommission_not_configured"


def test_one_blocker_is_told_as_one() -> None:
    assert blocked([Blocker("a", "w", "d")]).text == "1 blocker for the removal of Vault: a"
    assert blocked([Blocker("a", "w", "d"), Blocker("b", "w", "d")]).facts["blockers"] == [
        {"code": "a", "what": "w", "do": "d"},
        {"code": "b", "what": "w", "do": "d"},
    ]
