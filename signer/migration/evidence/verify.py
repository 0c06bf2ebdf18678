"""Verification of a run's evidence: unchanged since the seal, consistent, and recorded in the ledger. Only reads.

A directory may come from anywhere: no link is followed, no read blocks or is unbounded, and only content that the
checksums and the ledger confirm counts.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from signer.errors import BadFile, SignerError
from signer.migration.evidence import files
from signer.migration.plan import Operation, read_plan
from signer.model import RunOutcome

MOST_BYTES: Final = 1 << 30  # of all files together
_PLANNED: Final = ("cutover", "decommission")
_NEEDED: Final = (files.OUTCOME, files.PAGE)
_TELLING: Final = frozenset({files.OUTCOME, "plan.json", "approvals.json"})
FindInLedger = Callable[[str], Mapping[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Defect:
    """One problem; `code` is stable. A warning does not invalidate the evidence."""

    code: str
    text: str
    is_warning: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result. `recorded` is the ledger's matching entry, None if there is none."""

    digest: str
    outcome: str
    operation: str
    files: int
    problems: tuple[Defect, ...]
    recorded: Mapping[str, Any] | None

    @property
    def is_good(self) -> bool:
        return not any(not problem.is_warning for problem in self.problems)


def check_evidence(folder: Path, find_in_ledger: FindInLedger) -> Verdict:
    """Lists every problem of a run's evidence. Raises only exceptions of `find_in_ledger` other than `SignerError`.

    1  SHA256SUMS is complete; without it no file can be checked
    2  every file exists and matches its checksum; no other file, link or special file exists
    3  plan, approvals and outcome belong to one run
    4  the ledger holds the digest, with the same operation, outcome and plan
    """
    problems: list[Defect] = []
    # 1
    try:
        if folder.is_symlink():
            raise files.UnexpectedFile(folder.name, "is a link")
        content = files.read_bounded(folder, files.SUMS, files.JSON_LIMIT)
        sums = files.parse_sums(content)
    except FileNotFoundError:
        missing = "it was not sealed" if folder.is_dir() else "the directory does not exist"
        return _nothing(Defect("evidence_not_sealed", f"{files.SUMS} does not exist: {missing}"))
    except OSError as error:
        return _nothing(Defect("evidence_unreadable", f"{files.SUMS}: {error.strerror}"))
    except files.UnexpectedFile as error:
        return _nothing(Defect("evidence_sums_malformed", f"{error.name} {error.what}"))
    except ValueError as error:
        why = "it is not ASCII" if isinstance(error, UnicodeDecodeError) else str(error)
        return _nothing(Defect("evidence_sums_malformed", f"{files.SUMS} is malformed: {why}"))
    digest = files.digest_of(content)
    # 2
    problems += _check_listing(folder, sums)
    bad = dict(_check_sums(folder, sums))
    problems += bad.values()
    problems += [Defect("evidence_incomplete", f"{name}: missing") for name in _NEEDED if name not in sums]
    # 3
    said = _Said(folder, sums.keys() - bad.keys(), sums.keys())
    problems += [] if bad.keys() & _TELLING else said.problems()
    # 4
    found, faults = _look_up(digest, said, find_in_ledger)
    problems += faults
    problems += _check_answer(folder, digest, found)
    return Verdict(digest, said.word("outcome"), said.word("operation"), len(sums), tuple(problems), found)


def _nothing(problem: Defect) -> Verdict:
    return Verdict("", "", "", 0, (problem,), None)


def _check_listing(folder: Path, sums: Mapping[str, str]) -> Iterator[Defect]:
    """Compares the directory's entries with the checksums; stops beyond the file limit of a run."""
    try:
        facts = folder.stat()
        owner = facts.st_uid
        if owner not in (0, os.geteuid()):
            yield Defect("evidence_owner", f"the directory belongs to user {owner}", is_warning=True)
        if facts.st_mode & 0o077:
            yield Defect("evidence_mode", "other users may enter the directory, its mode must be 0700", is_warning=True)
        for count, (name, found) in enumerate(files.entries(folder)):
            if count > 2 * files.MAX_FILES:
                yield Defect("evidence_file_added", f"the directory has over {2 * files.MAX_FILES:,} files")
                return
            yield from _check_entry(name, found, sums, owner)
    except OSError as error:
        yield Defect("evidence_unreadable", f"the directory: {error.strerror}")


def _check_entry(name: str, facts: os.stat_result, sums: Mapping[str, str], owner: int) -> Iterator[Defect]:
    if stat.S_ISDIR(facts.st_mode) and "/" not in name and any(known.startswith(f"{name}/") for known in sums):
        return
    if name not in sums and name not in (files.SUMS, files.LEDGER):
        what = "a file" if stat.S_ISREG(facts.st_mode) else files.kind_of(facts)
        yield Defect("evidence_file_added", f"{name}: {what} that was not sealed")
    elif not stat.S_ISREG(facts.st_mode):
        if name not in sums:  # files with a checksum are reported when they are read
            yield Defect("evidence_file_kind", f"{name}: is {files.kind_of(facts)}")
    elif facts.st_nlink > 1:
        yield Defect("evidence_file_kind", f"{name}: has a second hard link, through which it can be changed")
    elif facts.st_mode & 0o277:
        mode = f"{stat.S_IMODE(facts.st_mode):04o}"
        yield Defect("evidence_mode", f"{name}: mode {mode}, must be 0400", is_warning=True)
    elif facts.st_uid != owner:
        yield Defect("evidence_owner", f"{name}: belongs to user {facts.st_uid}", is_warning=True)


def _check_sums(folder: Path, sums: Mapping[str, str]) -> Iterator[tuple[str, Defect]]:
    """Each file that has changed since the seal, by its name."""
    left = MOST_BYTES
    for name, expected in sums.items():
        try:
            if "/" in name and (folder / name).parent.is_symlink():
                raise files.UnexpectedFile(name, "is behind a link")
            found, size = files.sum_of(folder, name, left)
            left -= size
            if found != expected:
                yield name, Defect("evidence_file_changed", f"{name}: it has changed since the seal")
        except FileNotFoundError:
            yield name, Defect("evidence_file_missing", f"{name}: it was sealed and is missing")
        except files.UnexpectedFile as error:
            yield name, Defect("evidence_file_kind", f"{name}: {error.what}")
        except OSError as error:
            yield name, Defect("evidence_unreadable", f"{name}: {error.strerror}")


class _Said:
    """Plan, approvals and outcome of a run; an unreadable file counts as empty."""

    def __init__(self, folder: Path, names: Set[str], sealed: Set[str]) -> None:
        self._folder = folder
        self._names = names
        self._sealed = sealed
        self.outcome = self._object(files.OUTCOME)
        self.plan = self._object("plan.json")

    def word(self, name: str) -> str:
        value = self.outcome.get(name)
        return value if isinstance(value, str) else ""

    def _json(self, name: str) -> Any:
        if name not in self._names:
            return None
        try:
            return json.loads(files.read_bounded(self._folder, name, files.JSON_LIMIT))
        except (OSError, files.UnexpectedFile, ValueError, RecursionError):
            return None

    def _object(self, name: str) -> Mapping[str, Any]:
        value = self._json(name)
        return value if isinstance(value, dict) else {}

    def problems(self) -> Iterator[Defect]:
        """Contradictions between plan, approvals and outcome."""
        if not self.word("outcome") or not self.word("operation"):
            yield Defect("evidence_inconsistent", f"{files.OUTCOME} lacks the outcome or the operation")
            return
        if self.plan:
            yield from self._plan_problems()
            yield from self._step_problems()
        elif self.word("operation") in _PLANNED:
            yield Defect(
                "evidence_incomplete", f"plan.json: missing or unreadable, but required for a {self.word('operation')}"
            )
        if self.outcome.get("plan") not in (self.plan.get("digest"), "", None):
            yield Defect("evidence_inconsistent", f"{files.OUTCOME} names another plan than plan.json")
        yield from self._approval_problems()

    def _plan_problems(self) -> Iterator[Defect]:
        """Recomputes the plan's digest from its content."""
        operation = str(self.plan.get("operation"))
        if operation != self.word("operation"):
            yield Defect("evidence_inconsistent", f"plan.json is a plan for another operation than {files.OUTCOME}")
        try:
            read_plan(json.dumps(self.plan), cast(Operation, operation))
        except BadFile as error:
            yield Defect("evidence_inconsistent", f"plan.json: {error.text}")

    def _step_problems(self) -> Iterator[Defect]:
        """An applied run has evidence of every step of its plan but the last one, which seals."""
        steps = self.plan.get("steps")
        if self.word("outcome") != RunOutcome.APPLIED or not isinstance(steps, list):
            return
        for step in [one for one in steps if isinstance(one, dict)][:-1]:
            number, name = step.get("number"), str(step.get("name"))
            kept = files.numbered("steps", number if isinstance(number, int) else 0, name, "json")
            if kept not in self._sealed:
                yield Defect("evidence_incomplete", f"{kept}: no evidence that the step was done")

    def _approval_problems(self) -> Iterator[Defect]:
        found = self._json("approvals.json")
        approvals = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
        wanted = (self.plan.get("digest"), self.plan.get("operation"))
        if any((one.get("plan"), one.get("operation")) != wanted for one in approvals):
            yield Defect("evidence_inconsistent", "approvals.json approves another plan")
        elif self.word("operation") in _PLANNED and not approvals:
            yield Defect("evidence_incomplete", f"approvals.json: no approval of this {self.word('operation')}")


def _look_up(
    digest: str, said: _Said, find_in_ledger: FindInLedger
) -> tuple[Mapping[str, Any] | None, tuple[Defect, ...]]:
    """The ledger's entry for the digest, and its contradictions."""
    try:
        found = find_in_ledger(digest)
    except SignerError as error:
        return None, (Defect("evidence_ledger_unreachable", f"the ledger cannot be read: {error.text}"),)
    if found is None:
        return None, (Defect("evidence_not_recorded", f"the ledger has no entry for {digest}"),)
    if not said.outcome:
        return found, ()  # reported already
    named = {"operation": said.word("operation"), "outcome": said.word("outcome"), "plan": said.outcome.get("plan")}
    wrong = [name for name, value in named.items() if (found.get(name) or "") != (value or "")]
    if wrong:
        return None, (Defect("evidence_ledger_differs", f"the ledger has another {', '.join(wrong)}"),)
    return found, ()


def _check_answer(folder: Path, digest: str, found: Mapping[str, Any] | None) -> Iterator[Defect]:
    """Compares ledger.json, which is only a copy, with the ledger."""
    try:
        answer = json.loads(files.read_bounded(folder, files.LEDGER, files.JSON_LIMIT))
    except FileNotFoundError:
        yield Defect("evidence_ledger_json", f"{files.LEDGER}: missing", is_warning=True)
        return
    except (OSError, files.UnexpectedFile, ValueError, RecursionError):
        answer = None
    known = {name: found[name] for name in ("seq", "hash") if found and name in found}
    if not isinstance(answer, dict) or any(
        answer.get(name, value) != value for name, value in {**known, "evidence": digest}.items()
    ):
        yield Defect("evidence_ledger_json", f"{files.LEDGER} differs from the ledger's entry")
