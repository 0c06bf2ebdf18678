"""Carries a plan's steps out: one after the other, each written down before and after, backed out of when one fails.

`carry_out` is the one function that tells it. It knows nothing of Vault or containers: what a step does is the step's.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Final, Protocol

from signer.errors import SignerError, Unavailable
from signer.ops.journal import Journal
from signer.ops.plan import Observation, Step

APPLIED, ROLLED_BACK, FAILED, STOPPED, ROLLBACK_FAILED = (
    "applied",
    "rolled_back",
    "failed",
    "stopped",
    "rollback_failed",
)
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Report(Protocol):
    """Who is told how it goes, as it goes."""

    def began(self, number: int, step: Step) -> None: ...
    def passed(self, number: int, step: Step, seen: Observation, seconds: float) -> None: ...
    def skipped(self, number: int, step: Step) -> None: ...
    def failed(self, number: int, step: Step, error: SignerError, seconds: float) -> None: ...
    def backing_out(self) -> None: ...
    def undone(self, number: int, step: Step, seen: Observation, seconds: float) -> None: ...


class Record(Protocol):
    """Where a run's evidence goes."""

    def step(self, number: int, step: Step, what: str, seen: Observation, seconds: float) -> None: ...
    def conclude(self, outcome: str, error: SignerError | None) -> Observation: ...


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended; `error` is what made it fail."""

    outcome: str
    error: SignerError | None = None
    also: SignerError | None = None  # what made backing out fail as well


def carry_out(steps: Sequence[Step], journal: Journal, record: Record, report: Report) -> Ended:
    """Runs every step that is not done yet; the last one seals the evidence. Never raises `SignerError` for a step.

    1  a step that the journal calls done is left alone, unless it changes something and its own check denies it
    2  it is written down that the step begins; then it acts and proves that it worked; both are kept as evidence
    3  a step that fails, or Ctrl-C, SIGTERM or a lost terminal meanwhile, ends the run:
       after a step that nothing takes back it stays where it is, and can be taken up again;
       otherwise what has begun is undone, last first, which nothing interrupts
    4  the last step seals the evidence and has the ledger hold its digest; it may be done again after a crash
    """
    *before, seal = enumerate(steps, 1)
    with _interruptible():
        for number, step in before:
            began = time.monotonic()
            try:
                # 1
                if step.name in journal.past.done and (step.undo is None or step.is_done()):
                    report.skipped(number, step)
                    continue
                # 2
                report.began(number, step)
                journal.write("step.began", step=step.name)
                seen = _done(step)
                seconds = time.monotonic() - began
                record.step(number, step, "done", seen, seconds)
                journal.write("step.done", step=step.name, seconds=round(seconds, 3), summary=seen.summary)
                report.passed(number, step, seen, seconds)
            except SignerError as error:
                # 3
                with _undisturbed():
                    report.failed(number, step, error, time.monotonic() - began)
                    return _end_by(error, step, steps, journal, record, report)
        # 4
        with _undisturbed():
            return _seal(*seal, steps, journal, record, report)


def _seal(number: int, step: Step, steps: Sequence[Step], journal: Journal, record: Record, report: Report) -> Ended:
    """The last step. Once the ledger holds the outcome it is what happened, whatever fails after that."""
    began = time.monotonic()
    report.began(number, step)
    try:
        journal.write("step.began", step=step.name)
        seen = _done(step)
    except SignerError as error:
        report.failed(number, step, error, time.monotonic() - began)
        return _end_by(error, step, steps, journal, record, report)
    report.passed(number, step, seen, time.monotonic() - began)
    evidence = seen.facts.get("evidence", "")
    return Ended(APPLIED, also=_try(lambda: journal.write("run.ended", outcome=APPLIED, evidence=evidence)))


def _done(step: Step) -> Observation:
    """Does it, unless a run that was cut off came so far that nothing is left to do; the proof is looked at anyway."""
    seen = Observation("was done already") if step.is_done() else step.act()
    if step.verify is None:
        return seen
    proof = step.verify()
    summary = "; ".join(part for part in (seen.summary, proof.summary) if part)
    return Observation(summary, {**seen.facts, **proof.facts})


def _end_by(
    error: SignerError, failed: Step, steps: Sequence[Step], journal: Journal, record: Record, report: Report
) -> Ended:
    """Takes back what can be, and says how the run ended. A disk that is full does not keep it from taking back."""
    also = _try(lambda: journal.write("step.failed", step=failed.name, error=error.code))
    begun = [(number, step) for number, step in enumerate(steps, 1) if step.name in journal.past.begun]
    if any(step.is_irreversible for _, step in begun):
        return Ended(STOPPED, error, also)
    outcome = FAILED
    for number, step in reversed(begun):
        if step.undo is None:
            continue
        if outcome == FAILED:
            outcome = ROLLED_BACK
            report.backing_out()
            also = also or _try(lambda: journal.write("rollback.began"))
        if fault := _try(lambda: _undo(number, step, journal, record, report)):  # noqa: B023 - called at once
            outcome, also = ROLLBACK_FAILED, fault
    fault = _try(lambda: _conclude(outcome, error, journal, record))
    return Ended(outcome, error, also or fault)


def _undo(number: int, step: Step, journal: Journal, record: Record, report: Report) -> None:
    assert step.undo is not None, "asked for by the caller"  # noqa: S101
    began = time.monotonic()
    try:
        seen = step.undo()
    except SignerError as fault:
        report.failed(number, replace(step, title=f"undo: {step.title}"), fault, time.monotonic() - began)
        raise
    seconds = time.monotonic() - began
    report.undone(number, step, seen, seconds)  # the platform is as it was; what follows only remembers it
    _try(lambda: record.step(number, step, "undone", seen, seconds))
    _try(lambda: journal.write("undo.done", step=step.name, summary=seen.summary))


def _conclude(outcome: str, error: SignerError, journal: Journal, record: Record) -> None:
    fault: SignerError | None = None
    evidence: object = ""
    try:
        evidence = record.conclude(outcome, error).facts.get("evidence", "")
    except SignerError as unwritten:
        fault = unwritten
    journal.write("run.ended", outcome=outcome, evidence=evidence)
    if fault is not None:
        raise fault


def _try(act: Callable[[], object]) -> SignerError | None:
    """None, or what went wrong: for what is worth trying when something else matters more."""
    try:
        act()
    except SignerError as error:
        return error
    return None


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a lost terminal become a step's failure."""
    before = [(number, signal.signal(number, _interrupt)) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise Unavailable("interrupted", f"interrupted by {signal.Signals(number).name}", "apply the same plan again")


@contextmanager
def _undisturbed() -> Iterator[None]:
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
