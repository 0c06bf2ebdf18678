"""The output of `signer cutover` and `signer decommission`: plans, the steps of a run, and its outcome.

A plan is a result and goes to stdout; each step of a run is one line with its duration on stderr.
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
from signer.units import plain, timestamp

_WIDTH: Final = 36  # characters of a step's title
_SAW: Final = 60
_OUTCOMES: Final = {
    APPLIED: "done",
    ROLLED_BACK: "rolled back: the platform is as it was",
    FAILED: "failed, nothing was changed",
    STOPPED: "stopped after the point of no return",
    "rollback_failed": "rolling back failed: see runbooks/rollback.md",
    "": "not finished",
}


def show_plan(plan: Plan, *, facts: Sequence[tuple[str, str]], commands: bool) -> None:
    """The plan as text; `facts` are lines of a name and a value, `commands` adds the commands that would be run."""
    title = plain(plan.title)
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
            output.show(f"  {step['number']:>2}  {plain(step['title'])} would run")
            for line in step["would"]:
                output.show(f"        {plain(line)}")
            for line in step.get("would_undo", ()):
                output.show(f"        to undo: {plain(line)}")
    output.show()


class StepReporter:
    """One line for each step when it is done; on a terminal also the step that runs."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr is not None and sys.stderr.isatty()

    def began(self, number: int, step: Step) -> None:
        if self._is_terminal:
            output.note_over(f"{number:>2} … {step.title}")

    def passed(self, number: int, step: Step, seen: Observation, seconds: float) -> None:
        self._line(number, "✓", step.title, seen.summary, seconds)

    def skipped(self, number: int, step: Step) -> None:
        self._line(number, "✓", step.title, "already done", None)

    def failed(self, number: int, step: Step, error: SignerError, seconds: float) -> None:
        self._line(number, "✗", step.title, error.text, seconds, whole=True)

    def backing_out(self) -> None:
        output.note_bare("rolling back")

    def undone(self, number: int, step: Step, seen: Observation, seconds: float) -> None:
        self._line(number, "✓", f"undo: {step.title}", seen.summary, seconds)

    def _line(
        self, number: int, mark: str, title: str, saw: str, seconds: float | None, *, whole: bool = False
    ) -> None:
        if self._is_terminal:
            output.note_over("")
        took = "" if seconds is None else f"{seconds:5.1f} s"
        saw = saw if whole or len(saw) <= _SAW else f"{saw[: _SAW - 1]}…"
        output.note_bare(f"{number:>2} {mark} {title.ljust(_WIDTH)}  {saw.ljust(_SAW)}  {took}".rstrip())


def show_runs(past: Sequence[Past]) -> None:
    """A table of runs, oldest first."""
    rows = [("RUN", "OUTCOME", "STEPS", "EVIDENCE")]
    for run in past:
        last = next(reversed(run.begun), "")
        at = run.failed or (last if not run.is_over else "")
        count = len(run.done) + (run.outcome == APPLIED)  # the seal is the last, and is not among its own evidence
        where = f"{count} done" + (f", at {at}" if at else "")
        sealed = f"{run.evidence[:19]}…" if run.evidence else "-"
        rows.append((run.run, _OUTCOMES.get(run.outcome, run.outcome), where, sealed))
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


def show_end(ended: Ended, run: str, evidence: str, seconds: float, as_json: bool, sentences: Mapping[str, str]) -> int:
    """Shows the outcome of a run in the operation's own `sentences`; returns the exit status."""
    if as_json:
        facts: dict[str, Any] = {"run": run, "outcome": ended.outcome, "evidence": evidence or None}
        facts["seconds"] = round(seconds, 1)
        for name, error in (("error", ended.error), ("also", ended.also)):
            if error is not None:
                facts[name] = output.error_facts(error)
        output.show_json(facts)
    if ended.error is not None:
        hint = "follow runbooks/rollback.md, section 5" if ended.outcome == ROLLBACK_FAILED else ended.error.hint
        output.report_error(SignerError(ended.error.code, sentences[ended.outcome], hint))
    elif not as_json:
        output.show(f"{sentences[ended.outcome]}, in {seconds:.1f} s")
    if ended.also is not None:
        output.warn(ended.also.text + (f" ({ended.also.hint})" if ended.also.hint else ""))
    where = f"evidence: {run}" + (f" ({evidence[:19]}…)" if evidence else ", not sealed")
    if not as_json:
        output.show(plain(where))
    return 0 if ended.outcome == APPLIED and ended.error is None else 1
