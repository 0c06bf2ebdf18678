"""Carrying out steps: what is written down when, what a crash leaves, what is taken back and what cannot be."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from signer.errors import LedgerBroken, SignerError, Unavailable
from signer.files import own_lock_folder
from signer.migration import journal as journals
from signer.migration.journal import ATTEMPTS, FOLDER, Journal, note_attempt, platform_lock, read_journal, runs
from signer.migration.plan import Effect, Observation, Step
from signer.migration.runner import RunResult, carry_out
from signer.model import RunOutcome
from tests.parts.full_disk import files_at_most

RUN = "2026-11-22T14-05-02Z-cutover"


class Killed(BaseException):
    """kill -9, as far as one process can tell of itself: nothing after it runs."""


@dataclass
class World:
    """A platform of a few switches, and everything that was done to it."""

    folder: Path
    done: list[str] = field(default_factory=list)
    on: set[str] = field(default_factory=set)
    fails: set[str] = field(default_factory=set)
    dies: str = ""

    def act(self, name: str) -> Observation:
        self._meet(f"before {name}")
        if name in self.fails:
            raise SignerError("step_failed", f"{name} failed", "mend it")
        self.done.append(name)
        self.on.add(name)
        self._meet(f"after {name}")
        return Observation(f"{name} is on", {"name": name})

    def undo(self, name: str) -> Observation:
        if f"undo {name}" in self.fails:
            raise SignerError("undo_failed", f"{name} stays", "by hand")
        self.done.append(f"undo {name}")
        self.on.discard(name)
        return Observation(f"{name} is off")

    def _meet(self, moment: str) -> None:
        if moment == self.dies:
            raise Killed

    def step(self, name: str, effect: Effect = "reads") -> Step:
        changes = effect in ("CHANGES", "DESTROYS")
        return Step(
            name,
            name,
            effect,
            lambda: self.act(name),
            is_done=(lambda: name in self.on) if changes else lambda: False,
            undo=(lambda: self.undo(name)) if effect == "CHANGES" else None,
        )

    def steps(self, destroys: bool = False) -> list[Step]:
        last: Effect = "DESTROYS" if destroys else "CHANGES"
        seal = Step("seal", "seal", "writes evidence", lambda: Observation("sealed", {"evidence": "sha256:ab"}))
        return [self.step("look"), self.step("first", "CHANGES"), self.step("second", last), self.step("prove"), seal]


@dataclass
class Kept:
    """What was reported and kept as evidence."""

    said: list[str] = field(default_factory=list)
    concluded: list[str] = field(default_factory=list)
    is_full: bool = False

    def began(self, number: int, step: Step) -> None:
        self.said.append(f"{number} {step.name}")

    def passed(self, number: int, step: Step, seen: Observation, seconds: float) -> None:
        self.said.append(f"{number} ok {step.name}")

    def skipped(self, number: int, step: Step) -> None:
        self.said.append(f"{number} skipped {step.name}")

    def failed(self, number: int, step: Step, error: SignerError, seconds: float) -> None:
        self.said.append(f"{number} failed {step.name}")

    def backing_out(self) -> None:
        self.said.append("rolling back")

    def undone(self, number: int, step: Step, seen: Observation, seconds: float) -> None:
        self.said.append(f"{number} undone {step.name}")

    def step(self, number: int, step: Step, what: str, seen: Observation, seconds: float) -> None:
        if self.is_full:
            raise Unavailable("evidence_unwritable", "no space left", "free some")

    def conclude(self, outcome: str, error: SignerError | None) -> Observation:
        self.step(0, replace(_ANY), "", Observation(""), 0)
        self.concluded.append(outcome)
        return Observation("sealed", {"evidence": f"sha256:{outcome}"})


_ANY = Step("any", "any", "reads", lambda: Observation(""))


def after(act: Callable[[], object], then: Callable[[], Observation] = lambda: Observation("seen")) -> Observation:
    """An observation that something comes before."""
    act()
    return then()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def kept() -> Kept:
    return Kept()


def apply(world: World, kept: Kept, steps: list[Step] | None = None) -> RunResult:
    journal = Journal(world.folder, RUN)
    journal.write("run.resumed" if journal.state.began_ms else "run.began", plan="sha256:00")
    try:
        return carry_out(steps or world.steps(), journal, kept, kept)
    finally:
        journal.close()


def state(world: World) -> journals.RunState:
    return read_journal(world.folder / "journal" / f"{RUN}.jsonl")


# --- the way through -------------------------------------------------------------------------------------------------


def test_all_steps_are_done_in_order_and_the_run_is_over(world: World, kept: Kept) -> None:
    assert apply(world, kept) == RunResult(RunOutcome.APPLIED)
    assert world.done == ["look", "first", "second", "prove"]
    assert (state(world).outcome, state(world).evidence) == (RunOutcome.APPLIED, "sha256:ab")


def test_a_line_is_on_the_disk_before_a_step_acts(world: World, kept: Kept) -> None:
    seen: list[set[str]] = []
    steps = world.steps()
    steps[1] = replace(steps[1], action=lambda: after(lambda: seen.append(set(state(world).begun))))
    apply(world, kept, steps)
    assert "first" in seen[0]


def test_a_step_whose_proof_fails_has_failed(world: World, kept: Kept) -> None:
    steps = world.steps()

    def prove() -> Observation:
        raise SignerError("not_proved", "it did not", "look")

    steps[1] = replace(steps[1], verify=prove)
    assert apply(world, kept, steps).outcome == RunOutcome.ROLLED_BACK
    assert "undo first" in world.done


def test_what_is_done_already_is_not_done_again_but_proved(world: World, kept: Kept) -> None:
    world.on.add("first")
    proved: list[str] = []
    steps = world.steps()
    steps[1] = replace(steps[1], verify=lambda: after(lambda: proved.append("first")))
    assert apply(world, kept, steps).outcome == RunOutcome.APPLIED
    assert "first" not in world.done
    assert proved == ["first"]


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_failure_before_anything_changed_ends_the_run_and_undoes_nothing(world: World, kept: Kept) -> None:
    world.fails = {"look"}
    ended = apply(world, kept)
    assert (ended.outcome, ended.error and ended.error.code) == (RunOutcome.FAILED, "step_failed")
    assert world.done == []
    assert kept.concluded == [RunOutcome.FAILED]


def test_a_failure_after_a_change_undoes_what_has_begun_last_first(world: World, kept: Kept) -> None:
    world.fails = {"prove"}
    assert apply(world, kept).outcome == RunOutcome.ROLLED_BACK
    assert world.done == ["look", "first", "second", "undo second", "undo first"]
    assert (kept.concluded, state(world).outcome) == ([RunOutcome.ROLLED_BACK], RunOutcome.ROLLED_BACK)


def test_a_change_that_failed_half_way_is_undone_too(world: World, kept: Kept) -> None:
    world.fails = {"first"}
    assert apply(world, kept).outcome == RunOutcome.ROLLED_BACK
    assert world.done == ["look", "undo first"]


def test_one_undo_that_fails_does_not_keep_the_others_from_it(world: World, kept: Kept) -> None:
    world.fails = {"prove", "undo second"}
    ended = apply(world, kept)
    assert (ended.outcome, ended.also and ended.also.code) == (RunOutcome.ROLLBACK_FAILED, "undo_failed")
    assert "undo first" in world.done


def test_after_a_step_that_nothing_takes_back_the_run_stays_open_and_goes_on_later(world: World, kept: Kept) -> None:
    world.fails = {"prove"}
    assert apply(world, kept, world.steps(destroys=True)).outcome == RunOutcome.STOPPED
    assert not state(world).is_over
    assert "undo first" not in world.done
    world.fails = set()
    assert apply(world, kept, world.steps(destroys=True)).outcome == RunOutcome.APPLIED
    assert world.done.count("second") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_and_a_lost_terminal_roll_back(world: World, kept: Kept, number: signal.Signals) -> None:
    steps = world.steps()
    steps[3] = replace(steps[3], action=lambda: after(lambda: os.kill(os.getpid(), number)))
    before = signal.getsignal(number)
    ended = apply(world, kept, steps)
    assert (ended.outcome, ended.error and ended.error.code) == (RunOutcome.ROLLED_BACK, "interrupted")
    assert signal.getsignal(number) is before


def test_a_step_that_waits_does_not_take_ctrl_c_for_a_service_that_is_not_yet_there(world: World, kept: Kept) -> None:
    """`wait_ready` takes each `Unavailable` for "not yet" and asks again."""
    steps = world.steps()

    def waits() -> Observation:
        with contextlib.suppress(SignerError):
            os.kill(os.getpid(), signal.SIGINT)
        return Observation("went on")

    steps[3] = replace(steps[3], action=waits)
    ended = apply(world, kept, steps)
    assert (ended.outcome, ended.error and ended.error.code) == (RunOutcome.ROLLED_BACK, "interrupted")


def test_ctrl_c_a_second_time_changes_nothing(world: World, kept: Kept) -> None:
    steps = world.steps()

    def twice() -> Observation:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
        return Observation("went on")

    steps[3] = replace(steps[3], action=twice)
    ended = apply(world, kept, steps)
    assert (ended.outcome, ended.error and ended.error.code) == (RunOutcome.ROLLED_BACK, "interrupted")


def test_nothing_interrupts_rolling_back(world: World, kept: Kept) -> None:
    world.fails = {"prove"}
    steps = world.steps()
    undo = steps[2].undo
    assert undo is not None
    steps[2] = replace(steps[2], undo=lambda: after(lambda: os.kill(os.getpid(), signal.SIGTERM), undo))
    assert apply(world, kept, steps).outcome == RunOutcome.ROLLED_BACK
    assert world.done[-2:] == ["undo second", "undo first"]


def test_evidence_that_cannot_be_written_rolls_back_and_the_rollback_does_not_wait_for_it(
    world: World, kept: Kept
) -> None:
    steps = world.steps()

    def fill() -> Observation:
        kept.is_full = True
        return Observation("full now")

    steps[3] = replace(steps[3], action=fill)
    ended = apply(world, kept, steps)
    assert (ended.outcome, ended.also and ended.also.code) == (RunOutcome.ROLLED_BACK, "evidence_unwritable")
    assert world.on == {"look"}
    assert state(world).outcome == RunOutcome.ROLLED_BACK


# --- crashes ---------------------------------------------------------------------------------------------------------

MOMENTS = [f"{when} {name}" for name in ("look", "first", "second", "prove") for when in ("before", "after")]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("destroys", [False, True])
def test_a_run_that_was_killed_goes_on_to_its_end(world: World, kept: Kept, moment: str, destroys: bool) -> None:
    world.dies = moment
    with pytest.raises(Killed):
        apply(world, kept, world.steps(destroys))
    assert not state(world).is_over
    world.dies = ""
    assert apply(world, kept, world.steps(destroys)) == RunResult(RunOutcome.APPLIED)
    assert world.on == {"look", "first", "second", "prove"}
    assert (world.done.count("first"), world.done.count("second")) == (1, 1)


def test_what_was_seen_before_a_crash_is_looked_at_again_as_long_as_nothing_was_changed(
    world: World, kept: Kept
) -> None:
    steps = [world.step("look"), world.step("ask"), *world.steps()[1:]]
    world.dies = "after ask"
    with pytest.raises(Killed):
        apply(world, kept, steps)
    assert list(state(world).done) == ["look"]
    world.dies = ""
    assert apply(world, kept, steps).outcome == RunOutcome.APPLIED
    assert world.done == ["look", "ask", "look", "ask", "first", "second", "prove"]


def test_once_something_was_changed_what_is_done_is_left_alone(world: World, kept: Kept) -> None:
    world.dies = "before second"
    with pytest.raises(Killed):
        apply(world, kept)
    world.dies = ""
    assert apply(world, kept).outcome == RunOutcome.APPLIED
    assert world.done == ["look", "first", "second", "prove"]
    assert "1 skipped look" in kept.said


def test_a_run_that_was_killed_before_its_last_line_ends_as_it_was_sealed(
    world: World, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Journal.write

    def die(self: Journal, event: str, **facts: object) -> None:
        if event == "run.ended":
            raise Killed
        write(self, event, **facts)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "write", die)
        with pytest.raises(Killed):
            apply(world, kept)
    assert not state(world).is_over
    assert apply(world, kept).outcome == RunOutcome.APPLIED
    assert state(world).evidence == "sha256:ab"
    assert kept.said.count("5 ok seal") == 2  # sealing again is for `Evidence` to understand


def test_a_change_that_somebody_took_back_meanwhile_is_made_again(world: World, kept: Kept) -> None:
    world.dies = "before prove"
    with pytest.raises(Killed):
        apply(world, kept)
    world.dies, world.on = "", {"look", "second"}
    assert apply(world, kept).outcome == RunOutcome.APPLIED
    assert world.done.count("first") == 2


def test_after_a_change_that_is_made_again_its_proofs_are_made_again_too(world: World, kept: Kept) -> None:
    world.dies = "after prove"
    with pytest.raises(Killed):
        apply(world, kept)
    journal = Journal(world.folder, RUN)
    journal.write("step.done", step="prove", seconds=0)
    journal.close()
    world.dies, world.on = "", {"look", "second", "prove"}
    assert apply(world, kept).outcome == RunOutcome.APPLIED
    assert (world.done.count("look"), world.done.count("first"), world.done.count("prove")) == (1, 2, 2)


def test_a_change_without_a_way_back_is_made_again_where_somebody_took_it_back(world: World, kept: Kept) -> None:
    steps = [replace(step, undo=None) for step in world.steps()]
    world.fails = {"prove"}
    assert apply(world, kept, steps).outcome == RunOutcome.STOPPED
    world.fails, world.on = set(), {"look", "first"}
    assert apply(world, kept, steps).outcome == RunOutcome.APPLIED
    assert (world.done.count("first"), world.done.count("second")) == (1, 2)


@pytest.mark.parametrize("part", ["action", "verify", "is_done"])
def test_a_fault_of_ours_backs_out_like_any_failure(world: World, kept: Kept, part: str) -> None:
    def break_down() -> Observation:
        raise KeyError("hidden")

    steps = world.steps()
    if part == "action":
        steps[3] = replace(steps[3], action=break_down)
    elif part == "verify":
        steps[3] = replace(steps[3], verify=break_down)
    else:
        steps[2] = replace(steps[2], is_done=lambda: bool(break_down()))
    ended = apply(world, kept, steps)
    assert (ended.outcome, ended.error and ended.error.code) == (RunOutcome.ROLLED_BACK, "fault_of_ours")
    assert ended.error is not None
    assert "KeyError in test_runner.py:" in ended.error.text
    assert "hidden" not in ended.error.text
    assert "undo first" in world.done


def test_a_fault_of_ours_in_an_undo_does_not_keep_the_others_from_it(world: World, kept: Kept) -> None:
    def break_down() -> Observation:
        raise IndexError

    steps = world.steps()
    steps[2] = replace(steps[2], undo=break_down)
    world.fails = {"prove"}
    ended = apply(world, kept, steps)
    assert (ended.outcome, ended.also and ended.also.code) == (RunOutcome.ROLLBACK_FAILED, "fault_of_ours")
    assert "undo first" in world.done
    assert state(world).outcome == RunOutcome.ROLLBACK_FAILED


# --- the journal -----------------------------------------------------------------------------------------------------


def test_half_a_last_line_does_not_count_and_is_cut_off(world: World, kept: Kept) -> None:
    apply(world, kept)
    path = world.folder / "journal" / f"{RUN}.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"at": 17, "eve')
    assert state(world).outcome == RunOutcome.APPLIED
    Journal(world.folder, RUN).close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", ["{}", "nonsense", '{"at": "x", "event": "run.began"}', "[]", "\x00"])
def test_a_line_of_somebody_else_is_told_and_not_guessed_at(world: World, kept: Kept, line: str) -> None:
    apply(world, kept)
    path = world.folder / "journal" / f"{RUN}.jsonl"
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(LedgerBroken) as told:
        state(world)
    assert told.value.code == "journal_broken"


def test_a_full_disk_is_given_room_once_for_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, RUN)
    room = [False]
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unavailable) as refused:
        journal.write("run.began", plan="sha256:00")
    assert refused.value.code == "journal_unwritable"
    assert journal.path.read_text() == ""
    journal.make_room = lambda: room.__setitem__(0, True)
    journal.write("run.began", plan="sha256:00")
    assert journal.path.read_text().count("\n") == 1


def test_runs_are_listed_oldest_first_and_other_files_are_not_runs(tmp_path: Path) -> None:
    later = ("2026-11-23T00-00-00Z-10-cutover", "2026-11-23T00-00-00Z-2-decommission", "2026-11-23T00-00-00Z-rollback")
    for name in (*later, RUN):
        journal = Journal(tmp_path, name)
        journal.write("run.began", plan="")
        journal.close()
    note_attempt(tmp_path, {"why": "approval_wrong"})
    assert [run.run for run in runs(tmp_path)] == [RUN, *reversed(later)]
    assert [run.operation for run in runs(tmp_path)] == ["cutover", "rollback", "decommission", "cutover"]


def test_attempts_of_two_processes_are_noted_one_after_the_other(tmp_path: Path) -> None:
    """On a full disk a note is taken back by the length that the file had before: no one else may write meanwhile."""
    note_attempt(tmp_path, {"at": 1})
    attempts = tmp_path / FOLDER / ATTEMPTS
    with attempts.open("ab") as other, ThreadPoolExecutor(1) as pool:
        fcntl.flock(other, fcntl.LOCK_EX)
        noted = pool.submit(note_attempt, tmp_path, {"at": 3})
        with pytest.raises(TimeoutError):
            noted.result(timeout=0.3)
        other.write(b'{"at": 2}\n')
        other.flush()
        fcntl.flock(other, fcntl.LOCK_UN)
        noted.result(timeout=10)
    assert [json.loads(line)["at"] for line in attempts.read_text().splitlines()] == [1, 2, 3]


def test_an_attempt_that_a_full_disk_cut_off_is_said_to_be_unrecorded(tmp_path: Path) -> None:
    folder = tmp_path / "evidence"
    with files_at_most(20), pytest.raises(Unavailable) as refused:
        note_attempt(folder, {"why": "approval_wrong", "at": 1})
    assert refused.value.code == "journal_unwritable"
    note_attempt(folder, {"why": "approval_wrong", "at": 2})
    lines = (folder / FOLDER / ATTEMPTS).read_text().splitlines()
    assert json.loads(lines[-1])["at"] == 2, "the part of a line before it is not joined with it"


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.touch()
    for other in (tmp_path / "evidence", tmp_path / "another"):  # one platform may have two directories
        with (
            platform_lock(tmp_path / "evidence", base),
            pytest.raises(Unavailable) as refused,
            platform_lock(other, base),
        ):
            pass
        assert refused.value.code == "run_in_progress"
    with platform_lock(tmp_path / "evidence", base):
        pass


def test_a_missing_compose_file_is_for_the_plan_to_tell(tmp_path: Path) -> None:
    missing = tmp_path / "base.yaml"
    with (
        platform_lock(tmp_path / "evidence", missing),
        pytest.raises(Unavailable),
        platform_lock(tmp_path / "evidence", missing),
    ):
        pass


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o720])
def test_where_others_could_plant_a_journal_nothing_is_begun(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(SignerError) as refused, platform_lock(tmp_path, tmp_path):
        pass
    tmp_path.chmod(0o700)
    assert refused.value.code == "evidence_dir_not_private"


def test_a_name_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run name"):
        Journal(tmp_path, "../x")


def test_audit_3d3_a_lock_on_the_compose_file_that_anybody_may_take_stops_nothing(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.touch(0o644)
    with base.open() as opened:  # as any user may who can read it
        fcntl.flock(opened, fcntl.LOCK_EX)
        with platform_lock(tmp_path / "evidence", base):
            locks = [path for path in own_lock_folder().iterdir() if path.suffix == ".lock"]
            assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in locks)
            assert stat.S_IMODE(own_lock_folder().stat().st_mode) == 0o700


def test_audit_3d6_a_refused_approval_is_not_noted_where_others_may_write(tmp_path: Path) -> None:
    folder = tmp_path / "evidence"
    folder.mkdir(0o777)
    folder.chmod(0o777)
    with pytest.raises(SignerError) as refused:
        note_attempt(folder, {"why": "approval_wrong"})
    assert refused.value.code == "evidence_dir_not_private"
    assert list(folder.iterdir()) == []
