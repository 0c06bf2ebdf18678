"""The output of `signer cutover` and `signer decommission`: plans, the steps of a run, and its outcome.

A plan is a result and goes to stdout; each step of a run is one line with its duration on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from signer.cli import output
from signer.errors import SignerError
from signer.migration.journal import RunState
from signer.migration.plan import Observation, Plan, Step
from signer.migration.runner import RunResult
from signer.model import RunOutcome
from signer.units import plain, timestamp

_WIDTH: Final = 36  # characters of a step's title
_SAW: Final = 60
_OUTCOMES: Final = {
    RunOutcome.APPLIED: "done",
    RunOutcome.ROLLED_BACK: "rolled back: the platform is as it was",
    RunOutcome.FAILED: "failed, nothing was changed",
    RunOutcome.STOPPED: "stopped after the point of no return",
    RunOutcome.ROLLBACK_FAILED: "rolling back failed: see runbooks/rollback.md",
    None: "not finished",
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
        line = f"{number:>2} {mark} {title.ljust(_WIDTH)}  {saw.ljust(_SAW)}  {took}".rstrip()
        width = output.width_of(sys.stderr)
        if width is None or len(line) <= width:
            output.note_bare(line)
        else:
            output.note_bare(f"{number:>2} {mark} {title}  {took}".rstrip())
            output.note_bare(f"     {saw}")


def show_runs(runs: Sequence[RunState]) -> None:
    """A table of runs, oldest first."""
    rows = []
    for run in runs:
        last = next(reversed(run.begun), "")
        at = run.failed or (last if not run.is_over else "")
        count = len(run.done) + (run.outcome is RunOutcome.APPLIED)  # the seal writes no step.done
        where = f"{count} done" + (f", at {at}" if at else "")
        sealed = f"{run.evidence[:19]}…" if run.evidence else "-"
        rows.append((run.run, _OUTCOMES[run.outcome], where, sealed))
    output.show_table(rows, titles=("RUN", "OUTCOME", "STEPS", "EVIDENCE"))


def run_as_json(run: RunState) -> dict[str, Any]:
    """The same facts of one run."""
    return {
        "run": run.run,
        "operation": run.operation,
        "outcome": run.outcome,
        "plan": run.plan,
        "reason": run.reason or None,
        "began": timestamp(run.began_ms // 1000),
        "ended": timestamp(run.ended_ms // 1000) if run.ended_ms else None,
        "done": list(run.done),
        "begun": [name for name in run.begun if name not in run.done],
        "failed": run.failed or None,
        "rolling_back": run.is_rolling_back and not run.is_over,
        "evidence": run.evidence or None,
    }


def show_end(
    result: RunResult, run: str, evidence: str, seconds: float, as_json: bool, sentences: Mapping[RunOutcome, str]
) -> int:
    """Shows the outcome of a run in the operation's own `sentences`; returns the exit status."""
    if as_json:
        facts: dict[str, Any] = {"run": run, "outcome": result.outcome, "evidence": evidence or None}
        facts["seconds"] = round(seconds, 1)
        for name, error in (("error", result.error), ("also", result.also)):
            if error is not None:
                facts[name] = output.error_facts(error)
        output.show_json(facts)
    if result.error is not None:
        is_stuck = result.outcome is RunOutcome.ROLLBACK_FAILED
        hint = "follow runbooks/rollback.md, section 5" if is_stuck else result.error.hint
        output.report_error(SignerError(result.error.code, sentences[result.outcome], hint, result.error.facts))
    elif not as_json:
        output.show(f"{sentences[result.outcome]}, in {seconds:.1f} s")
    if result.also is not None:
        output.warn(result.also.text + (f" ({result.also.hint})" if result.also.hint else ""))
    where = f"evidence: {run}" + (f" ({evidence[:19]}…)" if evidence else ", not sealed")
    if not as_json:
        output.show(plain(where))
    return 0 if result.outcome is RunOutcome.APPLIED and result.error is None else 1
