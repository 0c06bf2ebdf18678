"""Carries out the steps of a plan: each is recorded before and after, and a failure rolls back.

`carry_out` knows nothing of Vault or containers: each step has its action.
"""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Final, Protocol, TypeVar

from signer.errors import SignerError, Unavailable
from signer.migration.journal import Journal
from signer.migration.plan import Observation, Step, StepOutcome
from signer.model import RunOutcome

_CHANGING: Final = ("CHANGES", "DESTROYS")
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_T = TypeVar("_T")


class Reporter(Protocol):
    def began(self, number: int, step: Step) -> None: ...
    def passed(self, number: int, step: Step, seen: Observation, seconds: float) -> None: ...
    def skipped(self, number: int, step: Step) -> None: ...
    def failed(self, number: int, step: Step, error: SignerError, seconds: float) -> None: ...
    def backing_out(self) -> None: ...
    def undone(self, number: int, step: Step, seen: Observation, seconds: float) -> None: ...


class EvidenceKeeper(Protocol):
    def step(self, number: int, step: Step, what: StepOutcome, seen: Observation, seconds: float) -> None: ...
    def conclude(self, outcome: RunOutcome, error: SignerError | None) -> Observation: ...


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended; `error` made it fail."""

    outcome: RunOutcome
    error: SignerError | None = None
    also: SignerError | None = None  # an error of the rollback or of recording the outcome


def carry_out(steps: Sequence[Step], journal: Journal, evidence: EvidenceKeeper, reporter: Reporter) -> RunResult:
    """Runs every step that is not done yet; the last one seals the evidence. Never raises `SignerError` for a step.

    1  until a step has changed something, every step runs again, as earlier observations may be outdated.
       After that, a step that the journal records as done is skipped, unless it changes something and its `is_done`
       is False; then the steps after it are repeated, as they observed another state
    2  the journal records that the step begins; then it acts and is verified; both results are kept as evidence
    3  a failed step, Ctrl-C, SIGTERM or a lost terminal ends the run:
       after an irreversible step the run stops where it is and can be resumed;
       otherwise the begun steps are undone, last first, without interruption by signals
    4  the last step seals the evidence and records its digest in the ledger; it may be repeated after a crash
    """
    *before, seal = enumerate(steps, 1)
    is_as_left = any(step.effect in _CHANGING and step.name in journal.state.begun for step in steps)
    number, step, began = 1, steps[0], time.monotonic()
    with _on_signals(_interrupt), ExitStack() as stack:
        try:
            for number, step in before:
                began = time.monotonic()
                # 1
                if (
                    is_as_left
                    and step.name in journal.state.done
                    and (step.effect != "CHANGES" or _translated(step.is_done))
                ):
                    reporter.skipped(number, step)
                    continue
                is_as_left = False
                # 2
                reporter.began(number, step)
                journal.write("step.began", step=step.name)
                seen = _done(step)
                seconds = time.monotonic() - began
                _translated(lambda: evidence.step(number, step, StepOutcome.DONE, seen, seconds))  # noqa: B023 - called at once
                journal.write("step.done", step=step.name, seconds=round(seconds, 3), summary=seen.summary)
                reporter.passed(number, step, seen, seconds)
            stack.enter_context(_on_signals(signal.SIG_IGN))
        except (SignerError, _Interrupted) as caught:
            # 3
            with _on_signals(signal.SIG_IGN):
                error = caught.error if isinstance(caught, _Interrupted) else caught
                reporter.failed(number, step, error, time.monotonic() - began)
                return _end_by(error, step, steps, journal, evidence, reporter)
        # 4
        return _seal(*seal, steps, journal, evidence, reporter)


def _seal(
    number: int, step: Step, steps: Sequence[Step], journal: Journal, evidence: EvidenceKeeper, reporter: Reporter
) -> RunResult:
    """Runs the last step. An outcome that is in the ledger is final, whatever fails afterwards."""
    began = time.monotonic()
    reporter.began(number, step)
    try:
        journal.write("step.began", step=step.name)
        seen = _done(step)
    except SignerError as error:
        reporter.failed(number, step, error, time.monotonic() - began)
        return _end_by(error, step, steps, journal, evidence, reporter)
    reporter.passed(number, step, seen, time.monotonic() - began)
    digest = seen.facts.get("evidence", "")
    return RunResult(
        RunOutcome.APPLIED,
        also=_try(lambda: journal.write("run.ended", outcome=RunOutcome.APPLIED, evidence=digest)),
    )


def _done(step: Step) -> Observation:
    """Does the step, unless an interrupted run has done it already; verifies it in both cases."""
    seen = Observation("already done") if _translated(step.is_done) else _translated(step.action)
    if step.verify is None:
        return seen
    proof = _translated(step.verify)
    summary = "; ".join(part for part in (seen.summary, proof.summary) if part)
    return Observation(summary, {**seen.facts, **proof.facts})


def _translated(act: Callable[[], _T]) -> _T:
    """Returns the result of `act`. An unexpected exception becomes a `SignerError`, which rolls the run back."""
    try:
        return act()
    except SignerError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise SignerError(
            "fault_of_ours",
            f"internal error: {type(error).__name__} in {Path(place.filename).name}:{place.lineno}",
            "report this line with the command that led to it",
        ) from error


def _end_by(
    error: SignerError,
    failed: Step,
    steps: Sequence[Step],
    journal: Journal,
    evidence: EvidenceKeeper,
    reporter: Reporter,
) -> RunResult:
    """Undoes the begun steps, also on a full disk, and returns the result of the run."""
    also = _try(lambda: journal.write("step.failed", step=failed.name, error=error.code))
    begun = [(number, step) for number, step in enumerate(steps, 1) if step.name in journal.state.begun]
    if any(step.is_irreversible for _, step in begun):
        return RunResult(RunOutcome.STOPPED, error, also)
    outcome = RunOutcome.FAILED
    for number, step in reversed(begun):
        if step.undo is None:
            continue
        if outcome == RunOutcome.FAILED:
            outcome = RunOutcome.ROLLED_BACK
            reporter.backing_out()
            also = also or _try(lambda: journal.write("rollback.began"))
        if fault := _try(lambda: _undo(number, step, journal, evidence, reporter)):  # noqa: B023 - called at once
            outcome, also = RunOutcome.ROLLBACK_FAILED, fault
    fault = _try(lambda: _conclude(outcome, error, journal, evidence))
    return RunResult(outcome, error, also or fault)


def _undo(number: int, step: Step, journal: Journal, evidence: EvidenceKeeper, reporter: Reporter) -> None:
    assert step.undo is not None, "checked by the caller"  # noqa: S101
    began = time.monotonic()
    try:
        seen = _translated(step.undo)
    except SignerError as fault:
        reporter.failed(number, replace(step, title=f"undo: {step.title}"), fault, time.monotonic() - began)
        raise
    seconds = time.monotonic() - began
    reporter.undone(number, step, seen, seconds)  # the platform is restored; the rest only records it
    _try(lambda: evidence.step(number, step, StepOutcome.UNDONE, seen, seconds))
    _try(lambda: journal.write("undo.done", step=step.name, summary=seen.summary))


def _conclude(outcome: RunOutcome, error: SignerError, journal: Journal, evidence: EvidenceKeeper) -> None:
    digest: object = ""
    try:
        digest = _translated(lambda: evidence.conclude(outcome, error)).facts.get("evidence", "")
    finally:
        journal.write("run.ended", outcome=outcome, evidence=digest)


def _try(act: Callable[[], object]) -> SignerError | None:
    try:
        _translated(act)
    except SignerError as error:
        return error
    return None


@contextmanager
def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    before = [(number, signal.signal(number, handler)) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, previous in before:
            signal.signal(number, previous)


class _Interrupted(BaseException):
    """Ctrl-C, SIGTERM or a lost terminal, which become a step's failure. Not an `Exception`: a step that waits for a
    service takes its errors for "not yet", and would go on waiting."""

    def __init__(self, number: int) -> None:
        text = f"interrupted by {signal.Signals(number).name}"
        super().__init__(text)
        self.error = Unavailable("interrupted", text, "give the same command again")


def _interrupt(number: int, _frame: FrameType | None) -> None:
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # once is enough, and another one would interrupt the rollback's beginning
    raise _Interrupted(number)
