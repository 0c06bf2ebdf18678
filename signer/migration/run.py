"""One run of an operation on a platform: starting, resuming, evidence, and the entry in the ledger.

Shared by cutover, rollback and decommission; each has its own steps.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from signer import __version__
from signer.errors import NotFound, SignerError, Unavailable
from signer.migration.approval import Approval, current_operator
from signer.migration.evidence.after import differing
from signer.migration.evidence.files import OUTCOME, numbered
from signer.migration.evidence.store import Evidence
from signer.migration.journal import Journal, RunState, runs
from signer.migration.observe import Observed
from signer.migration.plan import Observation, Plan, Step, StepOutcome
from signer.migration.runner import Reporter, RunResult, carry_out
from signer.model import RunOutcome
from signer.subprocesses import NoSuchCommand, run
from signer.units import timestamp

_DESTROYING: Final = ("disable", "revoke", "remove-data")  # steps of a decommission, for a run whose plan is lost
_BACK: Final = "signer cutover rollback --config FILE --reason …"


class Unfinished(SignerError):
    """Another run is not finished; `code` identifies what it needs first."""


class Recorder(Protocol):
    """Records operations in the ledger; `ApiClient`."""

    def record(
        self, operation: str, outcome: str, plan: str = "", evidence: str = "", reason: str = ""
    ) -> dict[str, Any]: ...
    def operations(self, evidence: str | None = None) -> list[dict[str, Any]]: ...


@dataclass(slots=True)
class Run:
    """An open run: journal, evidence and plan digest; `reason` is set for a rollback.

    `look` returns what is planned to be in force after the run, and what is; None where nobody looks.
    """

    journal: Journal
    evidence: Evidence
    plan: str
    recorder: Recorder
    reason: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    look: Callable[[], tuple[Mapping[str, Any], Observed]] | None = None

    @property
    def operation(self) -> str:
        return self.journal.state.operation

    def carry_out(self, steps: Sequence[Step], reporter: Reporter) -> RunResult:
        return carry_out(steps, self.journal, self, reporter)

    def step(self, number: int, step: Step, what: StepOutcome, seen: Observation, seconds: float) -> None:
        """Keeps a step's observation; the step that seals the evidence is only in the journal."""
        if self.evidence.is_recorded:
            return
        facts = {"step": step.name, "title": step.title, "what": what, "summary": seen.summary}
        name = numbered("steps", number, step.name if what is StepOutcome.DONE else f"{step.name}-{what}", "json")
        self.evidence.write_json(name, {**facts, "seconds": round(seconds, 3), "facts": dict(seen.facts)})

    def keep_logs(self, name: str, observe: Callable[[], Observation], *, required: bool = True) -> Observation:
        """What `observe` returns of all targets; the log of each one is kept as evidence, also when it fails.

        Raises `SignerError` if a log cannot be written. Not `required`: `facts["logs_not_kept"]` has the error's code,
        because a full disk must not prevent a way back from proving itself.
        """
        try:
            seen = observe()
        except SignerError as error:
            self._write_logs(name, error.facts)
            raise
        failure = self._write_logs(name, seen.facts)
        if failure is None:
            return seen
        if required:
            raise failure
        return Observation(seen.summary, {**seen.facts, "logs_not_kept": failure.code})

    def _write_logs(self, name: str, facts: Mapping[str, object]) -> SignerError | None:
        """Writes what can be written; returns the first failure."""
        failure: SignerError | None = None
        targets = facts.get("targets")
        for number, (target, fact) in enumerate(targets.items() if isinstance(targets, dict) else (), 1):
            lines = [f"{key}: {value}" for key, value in fact.items() if key != "log"]
            text = "\n".join([*lines, "", str(fact.get("log", ""))]) + "\n"
            try:
                self.evidence.write_text(numbered("smoke", number, f"{target}-{name}", "log"), text)
            except SignerError as error:
                failure = failure or error
        return failure

    def conclude(self, outcome: RunOutcome, error: SignerError | None = None) -> Observation:
        """Seals the evidence and records its digest in the ledger; may be repeated after a crash."""
        state = self.journal.state
        facts: dict[str, object] = {"reason": self.reason, "began": state.began_ms, "error": None}
        if error is not None:
            problem = {**error.as_json(), "step": state.failed}
            facts["error"] = {**problem, "facts": error.facts} if error.facts else problem
        different: list[str] = []
        if not self._is_sealed(outcome):
            different = self._keep_look()
            self.evidence.write_json("timings.json", {"steps": state.done, "began_ms": state.began_ms})
            self.evidence.write_json("versions.json", {**own_versions(), **self.versions})
            self.evidence.write_text("journal.jsonl", self.journal.path.read_text())
        digest = self.evidence.seal(outcome, facts)
        answer = _record(self.operation, outcome, self.plan, self.reason, self.evidence, self.recorder)
        summary = f"{digest[:19]}…, event {answer.get('seq')} of the ledger"
        if different and outcome is RunOutcome.APPLIED:
            summary = f"differs from the plan: {', '.join(different)}; {summary}"
        return Observation(summary, {"evidence": digest})

    def _is_sealed(self, outcome: RunOutcome) -> bool:
        """True if the evidence is sealed with this outcome; else what it says of the end is outdated."""
        if not self.evidence.digest:
            return False
        said = self.evidence.read_json(OUTCOME)
        return isinstance(said, dict) and said.get("outcome") == outcome

    def _keep_look(self) -> list[str]:
        """Writes what is in force now, beside what was planned; returns the titles of what differs."""
        if self.look is None:
            return []
        try:
            planned, seen = self.look()
        except Exception as error:  # noqa: BLE001 - a look must not decide how a run ends; the page says that it failed
            planned, seen = {}, Observed(unread={"all": f"the look ended with {type(error).__name__}"})
        now = timestamp(int(time.time()))
        kept = {"at": now, "planned": planned, "observed": seen.facts, "unread": seen.unread}
        self.evidence.write_json("observed.json", kept)
        return differing(planned, seen.facts)


def unfinished(folder: Path) -> list[RunState]:
    """Runs that have not ended, oldest first."""
    return [state for state in runs(folder) if not state.is_over]


@contextmanager
def open_run(
    folder: Path,
    operation: str,
    plan: Plan | None,
    approval: Approval | None,
    recorder: Recorder,
    *,
    reason: str = "",
    clock: Callable[[], float] = time.time,
) -> Iterator[Run]:
    """A new run, or the interrupted one of the same plan; raises `Unfinished` if another run must be finished first.

    An interrupted run that has changed nothing is ended as failed. The caller holds `platform_lock`.
    """
    digest = plan.digest if plan is not None else ""
    state, over = _to_resume(folder, operation, digest)
    for other in over:
        _close(folder, other, recorder, RunOutcome.FAILED, "another plan")
    if state is None:
        evidence = Evidence.create(folder, operation, clock())
        evidence.reserve_space()
    else:
        evidence = Evidence.open(folder / state.run)
    journal = Journal(folder, evidence.run, clock)
    journal.make_room, journal.clean = evidence.release_space, evidence.guard.clean
    try:
        event = "run.began" if state is None else "run.resumed"
        journal.write(event, plan=digest, reason=reason, who=current_operator())
        if plan is not None:
            evidence.write_json("plan.json", plan.as_json())
        if approval is not None and not evidence.is_recorded:  # else it was interrupted between ledger and journal
            known = evidence.read_json("approvals.json") or []
            evidence.write_json("approvals.json", [*known, asdict(approval)])
        yield Run(journal, evidence, digest, recorder, reason)
    finally:
        journal.close()


def _to_resume(folder: Path, operation: str, plan: str) -> tuple[RunState | None, list[RunState]]:
    """The run to resume, and the runs to end before it; raises `Unfinished` if another run must be finished first."""
    over: list[RunState] = []
    for state in unfinished(folder):
        if state.operation == operation and state.plan == plan and not state.is_rolling_back:
            return state, over
        if operation == "rollback" and not destroyed_by(folder, state):
            continue  # the rollback ends it, see `close_others`
        if state.is_rolling_back:
            raise Unfinished(
                "rollback_unfinished",
                f"the run {state.run} was interrupted during its rollback",
                f"finish it first: {_BACK}",
            )
        if _has_changed(folder, state):
            again = (
                f"apply its plan ({state.plan[:19]}…) again, or, before anything was destroyed: " if state.plan else ""
            )
            raise Unfinished("run_unfinished", f"the run {state.run} has not ended", f"{again}{_BACK}")
        over.append(state)
    return None, over


def _has_changed(folder: Path, state: RunState) -> bool:
    """False only if the run was certainly interrupted before its first changing step."""
    if not state.begun:
        return False
    if state.operation == "rollback":  # a rollback has no plan
        return "up" in state.begun
    try:
        steps = (Evidence.open(folder / state.run).read_json("plan.json") or {})["steps"]
        return any(step["effect"] in ("CHANGES", "DESTROYS") and step["name"] in state.begun for step in steps)
    except (NotFound, KeyError, TypeError):
        return True


def destroyed_by(folder: Path, state: RunState) -> str:
    """The title of an irreversible step that the run has begun; empty if there is none."""
    try:
        plan = Evidence.open(folder / state.run).read_json("plan.json") or {}
        steps = plan.get("steps", [])
        if steps:
            return next((str(s["title"]) for s in steps if s["effect"] == "DESTROYS" and s["name"] in state.begun), "")
    except (NotFound, KeyError, TypeError, AttributeError):
        steps = []  # no evidence, or no plan in it: the journal decides
    known = _DESTROYING if state.operation == "decommission" else ()
    return next((f"step {name}" for name in known if name in state.begun), "")


def close_others(folder: Path, recorder: Recorder, outcome: RunOutcome, by: str) -> list[str]:
    """Ends every other open run, after a rollback has restored the platform; returns their names."""
    others = [state for state in unfinished(folder) if state.run != by]
    return [state.run for state in others if _close(folder, state, recorder, outcome, by)]


def _close(folder: Path, state: RunState, recorder: Recorder, outcome: RunOutcome, by: str) -> bool:
    """Ends an interrupted run; False if only its journal exists."""
    journal = Journal(folder, state.run)
    try:
        try:
            evidence = Evidence.open(folder / state.run)
        except NotFound:  # interrupted before its first step
            journal.write("run.ended", outcome=RunOutcome.FAILED, evidence="", by=by)
            return False
        kept = Run(journal, evidence, state.plan, recorder, f"ended by {by}")
        sealed = kept.conclude(outcome).facts["evidence"]
        journal.write("run.ended", outcome=outcome, evidence=sealed, by=by)
    finally:
        journal.close()
    return True


def catch_up(folder: Path, recorder: Recorder) -> list[str]:
    """Records the evidence of runs that ended while the ledger could not be reached; returns their names."""
    names = []
    for state in runs(folder):
        try:
            evidence = Evidence.open(folder / state.run)
        except NotFound:
            continue
        if state.outcome is not None and evidence.digest and not evidence.is_recorded:
            _record(state.operation, state.outcome, state.plan, state.reason, evidence, recorder)
            names.append(state.run)
    return names


def _record(
    operation: str, outcome: str, plan: str, reason: str, evidence: Evidence, recorder: Recorder
) -> Mapping[str, Any]:
    """The ledger's entry for sealed evidence; creates it unless it exists."""
    digest = evidence.digest
    answer = next(iter(recorder.operations(evidence=digest)), None)
    if answer is None:
        try:
            answer = recorder.record(operation, outcome, plan, digest, reason)
        except Unavailable:  # the answer may be lost although the entry was written
            answer = next(iter(recorder.operations(evidence=digest)), None)
            if answer is None:
                raise
    evidence.keep_ledger_answer(answer)
    return answer


def own_versions() -> dict[str, str]:
    try:
        ended = run(["ssh", "-V"], environment={"PATH": os.environ.get("PATH", os.defpath)}, within=5)
        openssh = ended.err.strip()[:100] or "unknown"
    except NoSuchCommand:
        openssh = "unknown"
    return {
        "signer": __version__,
        "python": sys.version.split()[0],
        "openssh": openssh,
        "system": platform.platform(terse=True),
    }
