"""What the verbs that make and apply plans share: the plan file, the approval phrase, and what they show.

A plan is a result and goes to stdout; each step of a run is one line with its duration on stderr.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Final

from signer.api_client import ApiClient
from signer.cli import output
from signer.errors import ApprovalRefused, BadFile, SignerError, write_hint
from signer.files import read_owned, write_atomically
from signer.migration.approval import Approval, ask_approval, current_operator
from signer.migration.config import CutoverFile
from signer.migration.journal import RunState, note_attempt
from signer.migration.plan import Observation, Operation, Plan, Step, read_plan
from signer.migration.run import Run
from signer.migration.runner import RunResult
from signer.model import RunOutcome
from signer.units import cut, plain, timestamp

MAX_PLAN: Final = 4 * 1024 * 1024  # bytes


def present_plan(
    plan: Plan,
    *,
    facts: Sequence[tuple[str, str]],
    config: Path,
    out: Path | None,
    commands: bool,
    as_json: bool,
    remarks: Sequence[str] = (),
) -> None:
    """Writes the plan file if `out` is given, and shows the plan, `remarks`, and the command that applies it."""
    if out is not None:
        write_plan(out, plan)
    if as_json:
        output.show_json(plan.as_json())
        return
    show_plan(plan, facts=facts, commands=commands)
    for line in remarks:
        output.show(line)
    output.show("Nothing has been changed. To apply exactly this:")
    name = plain(out or "plan.json")
    if out is None:
        output.show_command(f"  signer {plan.operation} plan --config {plain(config)} --out {name}")
    output.show_command(f"  signer {plan.operation} apply {name} --approve <phrase of the runbook, section 4>")


def write_plan(path: Path, plan: Plan) -> None:
    """Writes the plan file, 0600, completely or not at all; raises `BadFile`. Follows no symbolic link."""
    content = json.dumps(plan.as_json(), indent=2).encode() + b"\n"
    try:
        write_atomically(path, content, 0o600, is_shared=True)
    except OSError as error:
        text = f"the plan file cannot be written: {error.strerror}"
        raise BadFile(
            "plan_unwritable", text, f"{write_hint(error, str(path.parent))}, or choose another file"
        ) from None


def load_plan(path: Path, operation: Operation) -> tuple[Plan, Path]:
    """The plan of a plan file and the path of its configuration; raises `BadFile`."""
    try:
        raw = read_owned(path, MAX_PLAN, "the plan file")
    except OSError as error:
        raise BadFile(
            "plan_unreadable",
            f"the plan file cannot be read: {error.strerror}",
            f"signer {operation} plan --config FILE --out PLAN",
        ) from None
    plan = read_plan(raw.decode(errors="replace") if len(raw) <= MAX_PLAN else "", operation)
    config = plan.inputs.get("config")
    where = config.get("path") if isinstance(config, dict) else None
    if not isinstance(where, str) or not where.startswith("/"):
        raise BadFile(
            "plan_unreadable", "the plan file is not a plan", f"make one: signer {operation} plan --config FILE"
        )
    return plan, Path(where)


def check_approval(plan: Plan, given: str | None, file: CutoverFile, recorder: ApiClient) -> Approval:
    """The approval of this plan; raises `ApprovalRefused`.

    A refusal is recorded beside the journals and in the ledger, without the text that was typed; if it cannot be
    recorded, that is a warning.
    """
    is_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))
    try:
        return ask_approval(plan, given, (lambda: _ask(plan)) if is_terminal else None, int(time.time()))
    except ApprovalRefused as refused:
        facts = {"code": refused.code, "operation": plan.operation, "plan": plan.digest, "who": current_operator()}
        try:
            note_attempt(file.evidence_dir, {"at": timestamp(int(time.time())), **facts})
        except SignerError as error:
            output.warn(f"this attempt is not recorded: {error.text}")
        try:
            recorder.record(plan.operation, "approval_refused", plan.digest, "", refused.code)
        except SignerError as error:
            output.warn(f"this attempt is not recorded in the ledger: {error.text}")
        raise


def _ask(plan: Plan) -> str:
    facts = [
        (word, ", ".join(f"{name} {value}" for name, value in state.items() if value and isinstance(value, str)))
        for word, state in (("now", plan.now), ("then", plan.then))
    ]
    with redirect_stdout(sys.stderr):  # it is part of the question; stdout is for the result
        show_plan(plan, facts=[*facts, ("plan", plan.digest)], commands=False)
    output.note(f"to approve {plan.digest}, type the phrase of the runbook")
    return sys.stdin.readline().strip()


# --- runs -----------------------------------------------------------------------------------------------------------


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
        saw = saw if whole else cut(saw, _SAW)
        line = f"{number:>2} {mark} {title.ljust(_WIDTH)}  {saw.ljust(_SAW)}  {took}".rstrip()
        width = output.width_of(sys.stderr)
        if width is None or len(line) <= width:
            output.note_bare(line)
        else:
            output.note_bare(f"{number:>2} {mark} {title}  {took}".rstrip())
            output.note_bare(f"     {saw}")


def show_runs(runs: Sequence[RunState]) -> None:
    """A table of runs, oldest first."""
    rows = [("RUN", "OUTCOME", "STEPS", "EVIDENCE")]
    for run in runs:
        last = next(reversed(run.begun), "")
        at = run.failed or (last if not run.is_over else "")
        count = len(run.done) + (run.outcome is RunOutcome.APPLIED)  # the seal writes no step.done
        where = f"{count} done" + (f", at {at}" if at else "")
        sealed = f"{run.evidence[:19]}…" if run.evidence else "-"
        rows.append((run.run, _OUTCOMES[run.outcome], where, sealed))
    output.show_table(rows)


def run_as_json(run: RunState) -> dict[str, Any]:
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


def show_end(result: RunResult, run: Run, seconds: float, sentences: Mapping[RunOutcome, str], *, as_json: bool) -> int:
    """Shows the outcome of a run in the operation's own `sentences`; returns the exit status."""
    where, evidence = str(run.evidence.folder), run.journal.state.evidence
    if as_json:
        facts: dict[str, Any] = {"run": where, "outcome": result.outcome, "evidence": evidence or None}
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
    if not as_json:
        output.show(plain(f"evidence: {where}" + (f" ({evidence[:19]}…)" if evidence else ", not sealed")))
    return 0 if result.outcome is RunOutcome.APPLIED and result.error is None else 1
