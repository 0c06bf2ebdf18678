"""One run from its first line to the ledger: which run is taken up, which comes first, and how one ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import get_args

import pytest

from signer.errors import LedgerBroken, SignerError, Unavailable
from signer.migration import run as run_module
from signer.migration.approval import Approval
from signer.migration.compose import ComposeFailed
from signer.migration.journal import runs
from signer.migration.observe import Observed
from signer.migration.plan import Effect, Observation, Plan, Step, describe
from signer.migration.run import Run, Unfinished, catch_up, close_others, destroyed_by, open_run, unfinished
from signer.migration.runner import RunResult
from signer.model import RunOutcome
from signer.protocol.operations import OutcomeName
from tests.parts.runs import Ledger, SilentReporter

NOW = 1_800_000_000.0
APPROVAL = Approval("cutover", "sha256:x", "ops", "here", "2027-01-15T08:00:00Z", "--approve")


class Killed(BaseException):
    """As by kill -9."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "evidence"


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def a_plan(title: str = "a title", steps: tuple[tuple[str, Effect], ...] = (("up", "CHANGES"),)) -> Plan:
    told = describe([Step(name, name, effect, lambda: Observation("")) for name, effect in steps])
    return Plan("cutover", title, {"config": {"path": "/c"}}, {"mode": "vault"}, {"mode": "local"}, told)


def carry_out(
    run: Run, up: Callable[[], Observation] = lambda: Observation("up"), effect: Effect = "CHANGES"
) -> RunResult:
    undo = (lambda: Observation("down")) if effect == "CHANGES" else None
    steps = (
        Step("up", "up", effect, up, undo=undo),
        Step("seal", "seal", "writes evidence", lambda: run.conclude(RunOutcome.APPLIED)),
    )
    return run.carry_out(steps, SilentReporter())


def cut_off(folder: Path, ledger: Ledger, plan: Plan, effect: Effect = "CHANGES") -> str:
    """A run that was killed in its first step; its name."""

    def die() -> Observation:
        raise Killed

    with pytest.raises(Killed), open_run(folder, "cutover", plan, APPROVAL, ledger, clock=lambda: NOW) as run:
        carry_out(run, die, effect)
    return unfinished(folder)[-1].run


def fail() -> Observation:
    raise SignerError("compose_failed", "it did not start", "mend it")


def test_a_run_leaves_sealed_evidence_whose_digest_the_ledger_holds(folder: Path, ledger: Ledger) -> None:
    plan = a_plan()
    with open_run(folder, "cutover", plan, APPROVAL, ledger, clock=lambda: NOW) as run:
        assert carry_out(run) == RunResult(RunOutcome.APPLIED)
    (entry,) = ledger.held
    assert (entry["operation"], entry["outcome"], entry["plan"]) == ("cutover", "applied", plan.digest)
    (state,) = runs(folder)
    assert (state.outcome, state.evidence) == ("applied", entry["evidence"])
    kept = folder / state.run
    assert json.loads((kept / "ledger.json").read_text())["evidence"] == entry["evidence"]
    assert json.loads((kept / "approvals.json").read_text())[0]["who"] == "ops"
    assert json.loads((kept / "plan.json").read_text())["digest"] == plan.digest


def test_a_failure_is_sealed_and_recorded_too(folder: Path, ledger: Ledger) -> None:
    with open_run(folder, "cutover", a_plan(), APPROVAL, ledger, clock=lambda: NOW) as run:
        assert carry_out(run, fail).outcome == "rolled_back"
    assert ledger.held[0]["outcome"] == "rolled_back"
    said = json.loads((folder / run.evidence.run / "outcome.json").read_text())
    assert said["error"] == {
        "code": "compose_failed", "text": "it did not start", "hint": "mend it", "step": "up",
    }  # fmt: skip


def test_what_a_failed_step_saw_is_in_the_evidence(folder: Path, ledger: Ledger) -> None:
    """Else nobody could read why compose failed: its hint says no more than that it says why."""

    def fail_loudly() -> Observation:
        raise ComposeFailed("compose_failed", "compose ended with status 1", "it says why", "no such image: signer:2")

    with open_run(folder, "cutover", a_plan(), APPROVAL, ledger, clock=lambda: NOW) as run:
        assert carry_out(run, fail_loudly).outcome == "rolled_back"
    assert run.evidence.read_json("outcome.json")["error"]["facts"] == {"said": "no such image: signer:2"}
    assert "no such image: signer:2" in (run.evidence.folder / "evidence.html").read_text()


def test_a_run_that_was_cut_off_is_taken_up_by_its_own_plan(folder: Path, ledger: Ledger) -> None:
    plan = a_plan()
    name = cut_off(folder, ledger, plan)
    with open_run(folder, "cutover", plan, APPROVAL, ledger, clock=lambda: NOW + 60) as run:
        assert run.evidence.run == name
        assert carry_out(run).outcome == "applied"
    assert unfinished(folder) == []
    assert len(json.loads((folder / name / "approvals.json").read_text())) == 2


def test_another_plan_waits_for_it(folder: Path, ledger: Ledger) -> None:
    cut_off(folder, ledger, a_plan())
    with (
        pytest.raises(Unfinished) as refused,
        open_run(folder, "cutover", a_plan("another"), APPROVAL, ledger, clock=lambda: NOW),
    ):
        pass
    assert refused.value.code == "run_unfinished"
    assert len(runs(folder)) == 1


def test_a_run_that_ended_is_not_taken_up_again(folder: Path, ledger: Ledger) -> None:
    plan = a_plan()
    for clock in (lambda: NOW, lambda: NOW + 60):
        with open_run(folder, "cutover", plan, APPROVAL, ledger, clock=clock) as run:
            assert carry_out(run).outcome == "applied"
    assert len({state.run for state in runs(folder)}) == 2


def test_a_rollback_that_was_cut_off_comes_first(folder: Path, ledger: Ledger) -> None:
    plan = a_plan()
    cut_off(folder, ledger, plan)
    with open_run(folder, "cutover", plan, APPROVAL, ledger, clock=lambda: NOW) as run:
        run.journal.write("rollback.began")
    with (
        pytest.raises(Unfinished) as refused,
        open_run(folder, "cutover", plan, APPROVAL, ledger, clock=lambda: NOW),
    ):
        pass
    assert refused.value.code == "rollback_unfinished"


def test_a_rollback_by_hand_ends_what_was_cut_off(folder: Path, ledger: Ledger) -> None:
    name = cut_off(folder, ledger, a_plan())
    with open_run(folder, "rollback", None, None, ledger, reason="no time", clock=lambda: NOW + 60) as run:
        assert carry_out(run).outcome == "applied"
        by = run.evidence.run
    assert close_others(folder, ledger, RunOutcome.ROLLED_BACK, by) == [name]
    assert unfinished(folder) == []
    assert [entry["outcome"] for entry in ledger.held] == ["applied", "rolled_back"]
    assert ledger.held[0]["reason"] == "no time"


def test_nothing_leads_back_from_what_was_destroyed(folder: Path, ledger: Ledger) -> None:
    name = cut_off(folder, ledger, a_plan(steps=(("up", "DESTROYS"),)), "DESTROYS")
    (state,) = unfinished(folder)
    assert (state.run, destroyed_by(folder, state)) == (name, "up")
    with (
        pytest.raises(Unfinished) as refused,
        open_run(folder, "rollback", None, None, ledger, reason="no", clock=lambda: NOW),
    ):
        pass
    assert refused.value.code == "run_unfinished"


def test_an_answer_that_was_lost_is_looked_for_and_nothing_is_recorded_twice(folder: Path, ledger: Ledger) -> None:
    with open_run(folder, "cutover", a_plan(), APPROVAL, ledger, clock=lambda: NOW) as run:
        ledger.loses_answers = True
        assert carry_out(run) == RunResult(RunOutcome.APPLIED)  # it is on record, so nothing is rolled back
    assert [entry["outcome"] for entry in ledger.held] == ["applied"]
    assert runs(folder)[0].evidence == ledger.held[0]["evidence"]


@pytest.mark.parametrize("begun", [(), ("look",)])
def test_a_run_that_was_cut_off_before_it_changed_anything_makes_way(
    folder: Path, ledger: Ledger, begun: tuple[str, ...]
) -> None:
    """Else nothing but a rollback, and a new soak time, could follow a removal that was only looked into."""
    plan = a_plan(steps=(("look", "reads"), ("up", "CHANGES")))
    with open_run(folder, "cutover", plan, APPROVAL, ledger, clock=lambda: NOW) as run:
        for step in begun:
            run.journal.write("step.began", step=step)
    with open_run(folder, "cutover", a_plan("another"), APPROVAL, ledger, clock=lambda: NOW + 60) as run:
        assert carry_out(run).outcome == "applied"
    assert [state.outcome for state in runs(folder)] == ["failed", "applied"]
    assert [entry["outcome"] for entry in ledger.held] == ["failed", "applied"]


def test_a_run_whose_evidence_is_gone_is_not_taken_for_one_that_changed_nothing(folder: Path, ledger: Ledger) -> None:
    name = cut_off(folder, ledger, a_plan())
    (folder / name).rename(folder / "elsewhere")
    with (
        pytest.raises(Unfinished) as refused,
        open_run(folder, "cutover", a_plan("another"), APPROVAL, ledger, clock=lambda: NOW),
    ):
        pass
    assert refused.value.code == "run_unfinished"


@pytest.mark.parametrize("begun, is_refused", [("vault", False), ("up", True)])
def test_a_rollback_by_hand_that_was_cut_off_is_finished_as_one(
    folder: Path, ledger: Ledger, begun: str, is_refused: bool
) -> None:
    with open_run(folder, "rollback", None, None, ledger, reason="why", clock=lambda: NOW) as run:
        run.journal.write("step.began", step=begun)
    with suppress(Unfinished), open_run(folder, "cutover", a_plan(), APPROVAL, ledger, clock=lambda: NOW + 60) as run:
        assert not is_refused
        carry_out(run)
    if is_refused:
        with (
            pytest.raises(Unfinished) as refused,
            open_run(folder, "cutover", a_plan(), APPROVAL, ledger, clock=lambda: NOW + 60),
        ):
            pass
        assert refused.value.hint == "signer cutover rollback --config FILE --reason …"
    assert runs(folder)[0].is_over != is_refused


def test_a_ledger_that_is_down_at_the_end_rolls_back_and_says_that_nothing_is_on_record(
    folder: Path, ledger: Ledger
) -> None:
    ledger.is_down = True
    with open_run(folder, "cutover", a_plan(), APPROVAL, ledger, reason="why not", clock=lambda: NOW) as run:
        ended = carry_out(run)
    assert (ended.outcome, ended.also and ended.also.code) == ("rolled_back", "service_down")
    assert ledger.held == []
    assert runs(folder)[0].outcome == "rolled_back"
    ledger.is_down = False
    assert catch_up(folder, ledger) == [run.evidence.run]
    assert (ledger.held[0]["outcome"], ledger.held[0]["evidence"]) == ("rolled_back", run.evidence.digest)
    assert ledger.held[0]["reason"] == "why not"
    assert catch_up(folder, ledger) == []


def test_a_run_that_was_cut_off_before_its_plan_was_kept_is_ended_by_a_rollback(folder: Path, ledger: Ledger) -> None:
    with open_run(folder, "cutover", a_plan(), APPROVAL, ledger, clock=lambda: NOW) as run:
        (run.evidence.folder / "plan.json").unlink()
    assert destroyed_by(folder, unfinished(folder)[0]) == ""
    assert close_others(folder, ledger, RunOutcome.ROLLED_BACK, "another") == [run.evidence.run]


# --- logs of logins --------------------------------------------------------------------------------------------------

LOGINS: dict[str, object] = {
    "targets": {"edge1": {"status": 0, "log": "a line of edge1"}, "edge2": {"status": 255, "log": "no line"}}
}


def fail_to_log_in() -> Observation:
    raise SignerError("smoke_login_failed", "edge2: no login", "try it by hand", LOGINS)


@pytest.mark.parametrize("works", [True, False])
def test_the_log_of_each_login_is_kept_whether_it_works_or_not(folder: Path, ledger: Ledger, works: bool) -> None:
    with open_run(folder, "decommission", None, None, ledger, clock=lambda: NOW) as run:
        if works:
            assert run.keep_logs("after", lambda: Observation("2 of 2", LOGINS)) == Observation("2 of 2", LOGINS)
        else:
            with pytest.raises(SignerError, match="no login"):
                run.keep_logs("after", fail_to_log_in)
    kept = run.evidence.folder / "smoke"
    assert sorted(path.name for path in kept.iterdir()) == ["01-edge1-after.log", "02-edge2-after.log"]
    assert (kept / "02-edge2-after.log").read_text() == "status: 255\n\nno line\n"


@pytest.mark.parametrize("operation", ["cutover", "rollback", "decommission"])
def test_a_full_disk_does_not_keep_an_operation_from_the_proof_of_its_logins(
    folder: Path, ledger: Ledger, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_name: str, _text: str) -> None:
        raise Unavailable("evidence_unwritable", "no space left on device", "free some")

    with open_run(folder, operation, None, None, ledger, clock=lambda: NOW) as run:
        monkeypatch.setattr(run.evidence, "write_text", full)
        seen = run.keep_logs("after", lambda: Observation("2 of 2", LOGINS), required=False)
        assert seen == Observation("2 of 2", {**LOGINS, "logs_not_kept": "evidence_unwritable"})
        with pytest.raises(Unavailable, match="no space left"):  # nothing may be destroyed without its proof
            run.keep_logs("after", lambda: Observation("2 of 2", LOGINS))
        with pytest.raises(SignerError) as failed:
            run.keep_logs("after", fail_to_log_in)
        assert failed.value.code == "smoke_login_failed"


# --- words -----------------------------------------------------------------------------------------------------------


def test_every_outcome_of_a_run_is_one_that_the_ledger_takes() -> None:
    assert {*get_args(OutcomeName)} == {*RunOutcome, "approval_refused"}


def test_a_journal_with_an_unknown_outcome_is_broken(folder: Path, ledger: Ledger) -> None:
    with open_run(folder, "cutover", a_plan(), APPROVAL, ledger, clock=lambda: NOW) as run:
        pass
    journal = run.journal.path
    journal.write_text(journal.read_text() + '{"at": 1, "event": "run.ended", "outcome": "somehow"}\n')
    with pytest.raises(LedgerBroken, match="line 2 of the journal"):
        runs(folder)


# --- what is in force at the end -------------------------------------------------------------------------------------


def looked(run: Run, planned: dict[str, object], seen: Observed) -> None:
    run.look = lambda: (planned, seen)


def test_what_is_in_force_at_the_end_is_kept_beside_what_was_planned(folder: Path, ledger: Ledger) -> None:
    with open_run(folder, "cutover", a_plan(), APPROVAL, ledger, clock=lambda: NOW) as run:
        looked(run, {"mode": "local"}, Observed({"mode": "local"}, {"image": "no engine"}))
        assert carry_out(run).outcome == "applied"
    kept = run.evidence.read_json("observed.json")
    del kept["at"]
    assert kept == {"planned": {"mode": "local"}, "observed": {"mode": "local"}, "unread": {"image": "no engine"}}
    assert "  observed.json\n" in (run.evidence.folder / "SHA256SUMS").read_text()
    assert "as planned" in (run.evidence.folder / "evidence.html").read_text()


def test_a_difference_from_the_plan_is_in_the_line_of_the_last_step(folder: Path, ledger: Ledger) -> None:
    with open_run(folder, "cutover", a_plan(), APPROVAL, ledger, clock=lambda: NOW) as run:
        looked(run, {"mode": "local", "ca": "a"}, Observed({"mode": "shadow", "ca": "a"}))
        assert run.conclude(RunOutcome.APPLIED).summary.startswith("differs from the plan: mode; sha256:")


def test_a_look_that_fails_does_not_decide_how_the_run_ends(folder: Path, ledger: Ledger) -> None:
    def fall_over() -> tuple[dict[str, object], Observed]:
        raise KeyError("a form that nobody expected")

    with open_run(folder, "cutover", a_plan(), APPROVAL, ledger, clock=lambda: NOW) as run:
        run.look = fall_over
        assert carry_out(run) == RunResult(RunOutcome.APPLIED)
    assert run.evidence.read_json("observed.json")["unread"] == {"all": "the look ended with KeyError"}
    assert "the look ended with KeyError" in (run.evidence.folder / "evidence.html").read_text()


def test_the_ledger_that_fails_after_the_seal_has_the_end_looked_at_again(folder: Path, ledger: Ledger) -> None:
    """The run goes back; what was seen before that is not what is in force."""
    ledger.is_down = True
    with open_run(folder, "cutover", a_plan(), APPROVAL, ledger, clock=lambda: NOW) as run:
        looks = iter([Observed({"mode": "local"}), Observed({"mode": "vault"})])
        run.look = lambda: ({"mode": "local"}, next(looks))
        steps = (
            Step("up", "up", "CHANGES", lambda: Observation("up"), undo=fail),
            Step("seal", "seal", "writes evidence", lambda: run.conclude(RunOutcome.APPLIED)),
        )
        assert run.carry_out(steps, SilentReporter()).outcome == "rollback_failed"
    assert run.evidence.read_json("observed.json")["observed"] == {"mode": "vault"}
    assert "rollback.began" in (run.evidence.folder / "journal.jsonl").read_text()


def test_who_ran_it_is_in_the_journal(folder: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "current_operator", lambda: "ada as root")
    with open_run(folder, "rollback", None, None, ledger, reason="r", clock=lambda: NOW) as run:
        carry_out(run)
    first = json.loads((run.evidence.folder / "journal.jsonl").read_text().splitlines()[0])
    assert (first["event"], first["who"]) == ("run.began", "ada as root")
