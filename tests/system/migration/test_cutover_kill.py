"""kill -9 before and after every step of a cutover: the status explains it, and it goes on or back to a right end."""

from __future__ import annotations

import json
from typing import Final

import pytest

from tests.parts import missing
from tests.parts.journalwatch import Watched
from tests.parts.platform import CUTOVER_PHRASE, Platform

pytestmark = [missing.needs_podman, missing.needs_podman_compose, pytest.mark.slow, pytest.mark.timeout(500)]

STEPS: Final = ("preflight", "parity", "trust", "remember", "up", "ready", "smoke", "seal")


@pytest.fixture
def platform(new_platform: Platform) -> Platform:
    """In mode vault, with nothing done yet."""
    new_platform.reset()
    return new_platform


def kill_at(platform: Platform, event: str, step: str, *words: str) -> bool:
    """Starts `signer WORDS`, kills it there, and checks what the status says; False if it came to a good end."""
    watched = Watched(platform, *words)
    if not watched.reaches(event, step):
        ended = watched.wait()
        assert ended.status == 0, ended.out
        return False
    watched.kill()
    status = platform.status()
    (cut_off,) = [run for run in status["runs"] if not run["outcome"]]
    assert cut_off["run"] in status["next"]
    assert "interrupted" in status["next"]
    return True


def test_the_steps_that_are_killed_are_those_of_the_plan(platform: Platform) -> None:
    plan = json.loads((platform.folder / platform.plan()).read_text())
    assert tuple(step["name"] for step in plan["steps"]) == STEPS


def test_killed_before_and_after_every_step_it_is_taken_up_again_each_time(platform: Platform) -> None:
    apply = ("cutover", "apply", platform.plan(), "--approve", CUTOVER_PHRASE)
    points = [(event, step) for step in STEPS for event in ("step.began", "step.done")]
    killed = [point for point in points if kill_at(platform, *point, *apply)]
    assert killed == [point for point in points if point != ("step.done", "seal")]  # that is the end
    platform.wait_for_mode("local")
    assert platform.can_log_in()
    (run,) = platform.status()["runs"]
    assert run["outcome"] == "applied"
    (operation,) = platform.operations()[:1]
    assert (operation["operation"], operation["outcome"]) == ("cutover", "applied")
    assert platform.verify_evidence().status == 0
    approvals = json.loads(next(platform.evidence_dir.glob("*/approvals.json")).read_text())
    assert len(approvals) >= len(killed)


def test_killed_after_the_change_it_can_be_taken_back_as_well(platform: Platform) -> None:
    assert kill_at(platform, "step.done", "smoke", "cutover", "apply", platform.plan(), "--approve", CUTOVER_PHRASE)
    done = platform.rollback("it was killed")
    assert done.status == 0, done.err
    platform.wait_for_mode("vault")
    assert platform.can_log_in()
    status = platform.status()
    assert [run["outcome"] for run in status["runs"]] == ["rolled_back", "applied"]
    assert status["next"].startswith("signer cutover plan")
    assert platform.verify_evidence().status == 0


def test_killed_while_it_rolls_back_by_itself_it_is_finished_by_hand(platform: Platform) -> None:
    platform.untrust_at_up("edge1")
    plan = platform.plan()
    assert kill_at(platform, "rollback.began", "", "cutover", "apply", plan, "--approve", CUTOVER_PHRASE)
    refused = platform.apply(plan)
    assert refused.status == 1
    assert "was interrupted during its rollback" in refused.err
    done = platform.rollback("it was killed")
    assert done.status == 0, done.err
    platform.wait_for_mode("vault")
    assert platform.can_log_in()
    assert [run["outcome"] for run in platform.status()["runs"]] == ["rolled_back", "applied"]
    assert platform.verify_evidence().status == 0


def test_a_rollback_needs_a_vault_that_signs_and_killed_in_its_steps_it_ends_when_asked_again(
    platform: Platform,
) -> None:
    assert platform.apply(platform.plan()).status == 0
    platform.bao.seal()
    refused = platform.rollback("too early")
    assert refused.status == 1
    assert "sealed" in refused.err + refused.out
    platform.wait_for_mode("local")
    assert platform.can_log_in()
    platform.bao.unseal()
    rollback = ("cutover", "rollback", "--config", platform.config.name, "--reason", "killed, too")
    for point in (("step.began", "up"), ("step.done", "up"), ("step.began", "seal")):
        assert kill_at(platform, *point, *rollback)
    done = platform.signer(*rollback)
    assert done.status == 0, done.err
    platform.wait_for_mode("vault")
    assert platform.can_log_in()
    outcomes = [run["outcome"] for run in platform.status()["runs"]]
    assert outcomes[:2] == ["applied", "failed"]
    assert outcomes[-1] == "applied"
    assert all(outcomes)
    assert platform.verify_evidence().status == 0
