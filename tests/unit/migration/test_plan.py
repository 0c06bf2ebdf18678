"""A plan: one digest over all of it, read back whole or not at all, and each difference told by its field."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from signer.errors import BadFile, Drift
from signer.ledger.chain import canonical_json
from signer.migration.plan import Observation, Plan, Step, check_drift, describe, differences, read_plan

STEPS = describe(
    (
        Step("look", "look", "reads", lambda: Observation(""), lines=("cat file",)),
        Step("up", "compose up", "CHANGES", lambda: Observation(""), lines=("up",), undo_text="undone by down"),
    )
)
PLAN = Plan(
    "cutover",
    "Cutover of safe-session-api",
    {"files": {"overlay": {"path": "/o", "sha256": "aa"}}, "vault": {"roles": {"llmops": {"ttl": 900}}}},
    {"mode": "vault"},
    {"mode": "local"},
    STEPS,
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=8,
)


def test_a_plan_is_read_back_as_it_was_written() -> None:
    assert read_plan(json.dumps(PLAN.as_json()), "cutover") == PLAN


@pytest.mark.parametrize("name", ["title", "inputs", "now", "then", "steps", "digest", "version"])
def test_a_plan_whose_file_was_edited_is_refused(name: str) -> None:
    raw = PLAN.as_json()
    raw[name] = [*raw[name], STEPS[0]] if name == "steps" else "x" if isinstance(raw[name], str | int) else {"x": 1}
    with pytest.raises(BadFile) as refused:
        read_plan(json.dumps(raw), "cutover")
    assert refused.value.code == "plan_edited"


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "[" * 99_999, '{"operation": 1}'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(BadFile) as refused:
        read_plan(text, "cutover")
    assert refused.value.code == "plan_unreadable"


@pytest.mark.parametrize(
    "part", [{"inputs": [["config", {}]]}, {"now": "x"}, {"steps": ({"number": 1},)}, {"steps": ("up",)}], ids=str
)
def test_a_plan_of_another_form_is_refused_though_its_digest_fits(part: dict[str, Any]) -> None:
    raw = {**PLAN.as_json(), **part}
    content = {name: value for name, value in raw.items() if name != "digest"}
    raw["digest"] = "sha256:" + sha256(canonical_json(content).encode()).hexdigest()
    with pytest.raises(BadFile) as refused:
        read_plan(json.dumps(raw), "cutover")
    assert refused.value.code == "plan_unreadable"


def test_a_plan_of_one_operation_is_not_applied_as_the_other() -> None:
    with pytest.raises(BadFile) as refused:
        read_plan(json.dumps(PLAN.as_json()), "decommission")
    assert refused.value.code == "plan_of_another_operation"


def test_every_part_of_a_plan_is_under_its_digest() -> None:
    others = [
        replace(PLAN, title="x"),
        replace(PLAN, operation="decommission"),
        replace(PLAN, now={}),
        replace(PLAN, then={}),
        replace(PLAN, inputs={}),
        replace(PLAN, steps=STEPS[:1]),
        replace(PLAN, steps=STEPS[::-1]),
        replace(PLAN, steps=(STEPS[0], {**STEPS[1], "would": ["rm -rf /"]})),
    ]
    assert len({PLAN.digest, *(other.digest for other in others)}) == len(others) + 1


def _drift(found: Plan, *, with_state: bool = True) -> tuple[str, ...]:
    with pytest.raises(Drift) as drifted:
        check_drift(PLAN, found, with_state=with_state)
    return drifted.value.problems


def test_an_overlay_that_was_edited_is_told_by_its_field_and_both_values() -> None:
    inputs: dict[str, Any] = json.loads(json.dumps(PLAN.inputs))
    inputs["files"]["overlay"]["sha256"] = "bb"
    assert _drift(replace(PLAN, inputs=inputs)) == ('inputs.files.overlay.sha256: planned "aa", found "bb"',)


def test_a_role_that_was_widened_is_told() -> None:
    inputs: dict[str, Any] = json.loads(json.dumps(PLAN.inputs))
    inputs["vault"]["roles"]["llmops"]["allowed_users"] = "llmops,root"
    (told,) = _drift(replace(PLAN, inputs=inputs))
    assert "inputs.vault.roles.llmops.allowed_users: planned nothing" in told


def test_another_step_is_drift_too() -> None:
    assert any("steps.2" in line for line in _drift(replace(PLAN, steps=STEPS[:1])))


@pytest.mark.parametrize("with_state", [True, False])
def test_what_no_field_shows_is_drift_by_the_digest(with_state: bool) -> None:
    """A plan file that somebody made shows more than will be done, under a digest of its own."""
    shown = {**STEPS[0], "title": "a step that nobody takes"}
    for made in (replace(PLAN, steps=(shown, *STEPS)), replace(PLAN, title="Cutover of something else")):
        with pytest.raises(Drift) as drifted:
            check_drift(made, PLAN, with_state=with_state)
        assert drifted.value.problems == (f"digest: planned {made.digest}, found {PLAN.digest}",)


def test_a_run_that_is_taken_up_again_may_have_changed_the_state_and_nothing_else() -> None:
    moved = replace(PLAN, now={"mode": "local"})
    assert _drift(moved) == ('now.mode: planned "vault", found "local"',)
    check_drift(PLAN, moved, with_state=False)
    assert _drift(replace(moved, inputs={}), with_state=False)


def test_the_same_world_is_no_drift() -> None:
    check_drift(PLAN, read_plan(json.dumps(PLAN.as_json()), "cutover"), with_state=True)


@given(VALUES, VALUES)
@example(True, 1)
@example({"a": None}, {})
@example([], {})
@example([{}], [])
def test_two_values_differ_exactly_if_a_difference_is_told(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert same == (not list(differences(one, other, "x")))
