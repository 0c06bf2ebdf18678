"""How plans, steps as they go, and runs are shown by `signer cutover` and `signer decommission`.

A plan is a result and goes to stdout; what happens while it is applied goes to stderr, line by line, with timings.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from signer.cli import output
from signer.errors import SignerError
from signer.migration.journal import Past
from signer.migration.plan import Observation, Plan, Step
from signer.migration.runner import APPLIED, FAILED, ROLLBACK_FAILED, ROLLED_BACK, STOPPED, Ended
from signer.units import timestamp

_WIDTH: Final = 36  # characters of a step's title
_SAW: Final = 60
_SAYS: Final = {
    APPLIED: "done",
    ROLLED_BACK: "rolled back: the platform is as it was",
    FAILED: "failed, nothing was changed",
    STOPPED: "stopped after the point of no return",
    "rollback_failed": "rolling back failed: see runbooks/rollback.md",
    "": "not at its end",
}


def show_plan(plan: Plan, *, facts: Sequence[tuple[str, str]], commands: bool) -> None:
    """The plan for a person; `facts` are lines of a word and what it says, `commands` adds what would be run."""
    title = output.plain(plan.title)
    output.show(f"{title.ljust(74)}  plan {plan.digest[:19]}…")
    output.show()
    output.show_table(facts, "  ")
    output.show()
    rows = []
    for step in plan.steps:
        effect = f"{step['effect']}, {step['undo']}" if step["undo"] else step["effect"]
        rows.append((str(step["number"]).rjust(2), step["title"], effect))
    output.show_table(rows, "  ")
    if commands:
        for step in plan.steps:
            output.show()
            output.show(f"  {step['number']:>2}  {output.plain(step['title'])} would run")
            for line in step["would"]:
                output.show(f"        {output.plain(line)}")
            for line in step.get("would_undo", ()):
                output.show(f"        to undo: {output.plain(line)}")
    output.show()


class Teller:
    """Tells of each step as it goes; on a terminal the step that runs stands there until it is done."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr is not None and sys.stderr.isatty()

    def began(self, number: int, step: Step) -> None:
        if self._is_terminal:
            output.say_over(f"{number:>2} … {step.title}")

    def passed(self, number: int, step: Step, seen: Observation, seconds: float) -> None:
        self._line(number, "✓", step.title, seen.summary, seconds)

    def skipped(self, number: int, step: Step) -> None:
        self._line(number, "✓", step.title, "was done before", None)

    def failed(self, number: int, step: Step, error: SignerError, seconds: float) -> None:
        self._line(number, "✗", step.title, error.text, seconds, whole=True)

    def backing_out(self) -> None:
        output.say_bare("rolling back")

    def undone(self, number: int, step: Step, seen: Observation, seconds: float) -> None:
        self._line(number, "✓", f"undo: {step.title}", seen.summary, seconds)

    def _line(
        self, number: int, mark: str, title: str, saw: str, seconds: float | None, *, whole: bool = False
    ) -> None:
        if self._is_terminal:
            output.say_over("")
        took = "" if seconds is None else f"{seconds:5.1f} s"
        saw = saw if whole or len(saw) <= _SAW else f"{saw[: _SAW - 1]}…"
        output.say_bare(f"{number:>2} {mark} {title.ljust(_WIDTH)}  {saw.ljust(_SAW)}  {took}".rstrip())


def show_runs(past: Sequence[Past]) -> None:
    """A table of runs, oldest first."""
    rows = [("RUN", "OUTCOME", "STEPS", "EVIDENCE")]
    for run in past:
        last = next(reversed(run.begun), "")
        at = run.failed or (last if not run.is_over else "")
        count = len(run.done) + (run.outcome == APPLIED)  # the seal is the last, and is not among its own evidence
        where = f"{count} done" + (f", at {at}" if at else "")
        sealed = f"{run.evidence[:19]}…" if run.evidence else "-"
        rows.append((run.run, _SAYS.get(run.outcome, run.outcome), where, sealed))
    output.show_table(rows)


def run_as_json(past: Past) -> dict[str, Any]:
    """The same facts of one run."""
    return {
        "run": past.run,
        "operation": past.operation,
        "outcome": past.outcome or None,
        "plan": past.plan,
        "reason": past.reason or None,
        "began": timestamp(past.began_ms // 1000),
        "ended": timestamp(past.ended_ms // 1000) if past.ended_ms else None,
        "done": list(past.done),
        "begun": [name for name in past.begun if name not in past.done],
        "failed": past.failed or None,
        "rolling_back": past.is_rolling_back and not past.is_over,
        "evidence": past.evidence or None,
    }


def tell_end(ended: Ended, run: str, evidence: str, seconds: float, json: bool, sentences: Mapping[str, str]) -> int:
    """How a run ended, in words of the operation; returns the exit status."""
    if json:
        facts: dict[str, Any] = {"run": run, "outcome": ended.outcome, "evidence": evidence or None}
        facts["seconds"] = round(seconds, 1)
        for name, error in (("error", ended.error), ("also", ended.also)):
            if error is not None:
                facts[name] = {**error.facts, "code": error.code, "text": error.text, "hint": error.hint}
        output.show_json(facts)
    if ended.error is not None:
        hint = "follow runbooks/rollback.md, section 5" if ended.outcome == ROLLBACK_FAILED else ended.error.hint
        output.say_error(SignerError(ended.error.code, sentences[ended.outcome], hint))
    elif not json:
        output.show(f"{sentences[ended.outcome]}, in {seconds:.1f} s")
    if ended.also is not None:
        output.warn(ended.also.text + (f" ({ended.also.hint})" if ended.also.hint else ""))
    where = f"evidence: {run}" + (f" ({evidence[:19]}…)" if evidence else ", not sealed")
    if not json:
        output.show(output.plain(where))
    return 0 if ended.outcome in (APPLIED,) and ended.error is None else 1
