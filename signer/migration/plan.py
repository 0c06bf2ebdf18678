"""A plan: its steps and everything that they depend on, under one digest. Pure.

The same function makes the plan twice, to print it and before it is applied; `differences` lists the fields that have
changed in between. `runner.py` carries the steps out, `journal.py` records the progress.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal

from signer.errors import BadFile, Drift, SignerError
from signer.ledger.chain import canonical_json
from signer.units import cut

VERSION: Final = 1
_MOST_SHOWN: Final = 120  # characters of a value in a difference
_NOTHING: Final = object()
_OF_A_STEP: Final = frozenset({"number", "name", "title", "effect", "undo", "reads", "would"})
Effect = Literal["reads", "reads, signs", "connects", "logs in", "writes evidence", "CHANGES", "DESTROYS"]
Operation = Literal["cutover", "decommission"]


class StepOutcome(StrEnum):
    DONE = "done"
    UNDONE = "undone"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Observation:
    """The result of a step: one line for people, and facts that are ready for JSON and contain no secret."""

    summary: str
    facts: Mapping[str, object] = field(default_factory=dict)


class StepFailed(SignerError):
    """A step did not have its expected result; `facts` are kept as evidence."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step: the plan shows its `lines`, a run calls its `action`.

    `action` does the step and `verify` checks that it worked; both raise `SignerError` if not. `lines` are the commands
    and requests of both, in order. `is_done` lets a resumed run skip the action. `undo` reverts the step, with its own
    `undo_lines`; a changing step without it is irreversible. `undo_text` describes that in words. `reads` lists the
    sources that the step reads.
    """

    name: str
    title: str
    effect: Effect
    action: Callable[[], Observation]
    lines: tuple[str, ...] = ()
    verify: Callable[[], Observation] | None = None
    is_done: Callable[[], bool] = lambda: False
    undo: Callable[[], Observation] | None = None
    undo_lines: tuple[str, ...] = ()
    undo_text: str = ""
    reads: tuple[str, ...] = ()

    @property
    def is_irreversible(self) -> bool:
        """True if the step changes something and has no undo."""
        return self.effect in ("CHANGES", "DESTROYS") and self.undo is None


def seal_step(evidence_dir: Path, address: str, action: Callable[[], Observation]) -> Step:
    """The last step of every plan: seals the evidence below `evidence_dir`, and has the service record it."""
    return Step(
        "seal",
        "seal the evidence",
        "writes evidence",
        action,
        lines=(f"SHA256SUMS below {evidence_dir}", f"POST {address}/api/operations with its digest"),
        reads=("evidence",),
    )


@dataclass(frozen=True, slots=True)
class PlanPart:
    """The inputs of a plan, or the state before or after it; each operation derives its own, with values for JSON."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps and what they depend on, as a plan file contains them.

    `inputs` must not change until the run has ended; `now` is the state that the steps change, `then` the state after
    them. `steps` are descriptions, with the commands that they run.
    """

    operation: Operation
    title: str
    inputs: Mapping[str, Any]
    now: Mapping[str, Any]
    then: Mapping[str, Any]
    steps: tuple[Mapping[str, Any], ...]

    def as_json(self) -> dict[str, Any]:
        """The plan file's content, its digest included."""
        return {**self._content(), "digest": self.digest}

    def _content(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    @property
    def digest(self) -> str:
        """`sha256:` and the hash of the canonical JSON (RFC 8785) of everything else."""
        return "sha256:" + sha256(canonical_json(self._content()).encode()).hexdigest()


def describe(steps: Sequence[Step], *, with_undo: bool = False) -> tuple[dict[str, Any], ...]:
    """Every step as the plan contains it; `with_undo` adds the commands that its undo would run."""
    return tuple(
        {
            "number": number,
            "name": step.name,
            "title": step.title,
            "effect": step.effect,
            "undo": step.undo_text,
            "reads": list(step.reads),
            "would": list(step.lines),
            **({"would_undo": list(step.undo_lines)} if with_undo else {}),
        }
        for number, step in enumerate(steps, 1)
    )


def read_plan(text: str, operation: Operation) -> Plan:
    """The plan in a plan file; raises `BadFile` unless it is whole, unedited and of that operation."""
    try:
        raw = json.loads(text)
        known = {name: raw[name] for name in ("operation", "title", "inputs", "now", "then")}
        plan = Plan(**known, steps=tuple(raw["steps"]))
        if not all(isinstance(part, dict) for part in (plan.inputs, plan.now, plan.then, *plan.steps)):
            raise TypeError("not a table")
        if any(_OF_A_STEP - step.keys() for step in plan.steps):
            raise KeyError("incomplete step")
        is_ours = raw["version"] == VERSION and plan.digest == raw["digest"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadFile(
            "plan_unreadable", "the plan file is not a plan", f"make one: signer {operation} plan --config FILE"
        ) from None
    if not is_ours:
        raise BadFile("plan_edited", "the plan file was edited: its digest differs", "make a new plan")
    if plan.operation != operation:
        raise BadFile(
            "plan_of_another_operation",
            f"this is a plan for {plan.operation}, not for {operation}",
            f"apply it with: signer {plan.operation} apply",
        )
    return plan


def check_drift(planned: Plan, found: Plan, *, with_state: bool) -> None:
    """Raises `Drift` unless the plan made now is the plan that was printed.

    `with_state` is False for a run that is resumed: its own steps have changed the state since.
    """
    problems = [*differences(planned.inputs, found.inputs, "inputs")]
    if with_state:
        problems += differences(planned.now, found.now, "now")
    problems += differences(
        {str(step["number"]): step for step in planned.steps},
        {str(step["number"]): step for step in found.steps},
        "steps",
    )
    if not problems:
        problems += differences(planned.then, found.then, "then")
    same = found if with_state else replace(found, now=planned.now)
    if not problems and same.digest != planned.digest:  # the approved digest covers more than the compared fields
        problems.append(f"digest: planned {planned.digest}, found {same.digest}")
    if problems:
        count = f"{len(problems)} difference{'s' if len(problems) > 1 else ''}"
        raise Drift(
            "plan_drifted",
            f"state has changed since the plan: {count}",
            f"review them, then make a new plan: signer {planned.operation} plan --config FILE",
            tuple(problems),
        )


def differences(planned: object, found: object, place: str) -> Iterator[str]:
    """One line for each field that differs, with its place and both values."""
    if isinstance(planned, Mapping) and isinstance(found, Mapping):
        for name in sorted({*planned, *found}):
            yield from differences(planned.get(name, _NOTHING), found.get(name, _NOTHING), f"{place}.{name}")
    elif isinstance(planned, list | tuple) and isinstance(found, list | tuple) and len(planned) == len(found):
        for number, (one, other) in enumerate(zip(planned, found, strict=True)):
            yield from differences(one, other, f"{place}.{number}")
    elif _shown(planned) != _shown(found):
        yield f"{place}: planned {cut(_shown(planned), _MOST_SHOWN)}, found {cut(_shown(found), _MOST_SHOWN)}"


def _shown(value: object) -> str:
    return "nothing" if value is _NOTHING else json.dumps(value, sort_keys=True)
