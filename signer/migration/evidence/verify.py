"""Is a run's evidence as it was sealed, does it agree with itself, and does the ledger hold its digest? Only reads.

A directory may come from anywhere, made by anybody: nothing of it is followed, waited for, or read without a bound, and
what it says counts for nothing that the sums and the ledger do not bear out.
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
from signer.migration.evidence.files import (
    JSON_LIMIT,
    LEDGER,
    MAX_FILES,
    OUTCOME,
    PAGE,
    SUMS,
    UnexpectedFile,
    digest_of,
    entries,
    kind_of,
    numbered,
    parse_sums,
    read_bounded,
    sum_of,
)
from signer.migration.plan import Operation, read_plan
from signer.model import RunOutcome

MOST_BYTES: Final = 1 << 30  # of all files together
_PLANNED: Final = ("cutover", "decommission")
_NEEDED: Final = (OUTCOME, PAGE)
_TELLING: Final = frozenset({OUTCOME, "plan.json", "approvals.json"})
FindInLedger = Callable[[str], Mapping[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Defect:
    """One thing that is not as it should be; `code` is stable. A warning does not make evidence bad."""

    code: str
    text: str
    is_warning: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found. `recorded` is the ledger's entry, None if it has none that fits."""

    digest: str
    outcome: str
    operation: str
    files: int
    problems: tuple[Defect, ...]
    recorded: Mapping[str, Any] | None

    @property
    def is_good(self) -> bool:
        """Intact, in agreement with itself, and recorded."""
        return not any(not problem.is_warning for problem in self.problems)


def check_evidence(folder: Path, find_in_ledger: FindInLedger) -> Verdict:
    """Everything that is wrong with a run's evidence. Raises only what `find_in_ledger` raises besides `SignerError`.

    1  SHA256SUMS is whole; without it there is nothing to hold the files against
    2  every file is there, with its sum; there is no other, no link, nothing that is no file
    3  plan, approvals and outcome are of one run
    4  the ledger holds the digest, with the same operation, outcome and plan
    """
    problems: list[Defect] = []
    # 1
    try:
        if folder.is_symlink():
            raise UnexpectedFile(folder.name, "is a link")
        content = read_bounded(folder, SUMS, JSON_LIMIT)
        sums = parse_sums(content)
    except FileNotFoundError:
        missing = "it was not sealed" if folder.is_dir() else "there is no such directory"
        return _nothing(Defect("evidence_not_sealed", f"there is no {SUMS}: {missing}"))
    except OSError as error:
        return _nothing(Defect("evidence_unreadable", f"{SUMS}: {error.strerror}"))
    except UnexpectedFile as error:
        return _nothing(Defect("evidence_sums_malformed", f"{error.name} {error.what}"))
    except ValueError as error:
        return _nothing(Defect("evidence_sums_malformed", f"{SUMS} is not as it was written: {_reason(error)}"))
    digest = digest_of(content)
    # 2
    problems += _check_listing(folder, sums)
    bad = dict(_check_sums(folder, sums))
    problems += bad.values()
    problems += [Defect("evidence_incomplete", f"{name}: every run has one") for name in _NEEDED if name not in sums]
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


def _reason(error: ValueError) -> str:
    return "it is no ASCII" if isinstance(error, UnicodeDecodeError) else str(error)


def _check_listing(folder: Path, sums: Mapping[str, str]) -> Iterator[Defect]:
    """Whatever lies there, against what should; stops at a number of files that no run has."""
    try:
        facts = folder.stat()
        owner = facts.st_uid
        if owner not in (0, os.geteuid()):
            yield Defect("evidence_owner", f"the directory belongs to user {owner}", is_warning=True)
        if facts.st_mode & 0o077:
            yield Defect("evidence_mode", "others may enter the directory: 0700 is right", is_warning=True)
        for count, (name, found) in enumerate(entries(folder)):
            if count > 2 * MAX_FILES:
                yield Defect("evidence_file_added", f"there are over {2 * MAX_FILES:,} files")
                return
            yield from _check_entry(name, found, sums, owner)
    except OSError as error:
        yield Defect("evidence_unreadable", f"the directory: {error.strerror}")


def _check_entry(name: str, facts: os.stat_result, sums: Mapping[str, str], owner: int) -> Iterator[Defect]:
    if stat.S_ISDIR(facts.st_mode) and "/" not in name and any(known.startswith(f"{name}/") for known in sums):
        return
    if name not in sums and name not in (SUMS, LEDGER):
        what = "a file" if stat.S_ISREG(facts.st_mode) else kind_of(facts)
        yield Defect("evidence_file_added", f"{name}: {what} that was not sealed")
    elif not stat.S_ISREG(facts.st_mode):
        if name not in sums:  # those are read, and told then
            yield Defect("evidence_file_kind", f"{name}: is {kind_of(facts)}")
    elif facts.st_nlink > 1:
        yield Defect("evidence_file_kind", f"{name}: has another name, through which it can be changed")
    elif facts.st_mode & 0o277:
        mode = f"{stat.S_IMODE(facts.st_mode):04o}"
        yield Defect("evidence_mode", f"{name}: mode {mode}, 0400 is right", is_warning=True)
    elif facts.st_uid != owner:
        yield Defect("evidence_owner", f"{name}: belongs to user {facts.st_uid}", is_warning=True)


def _check_sums(folder: Path, sums: Mapping[str, str]) -> Iterator[tuple[str, Defect]]:
    """Each file that is not as it was sealed, by its name."""
    left = MOST_BYTES
    for name, expected in sums.items():
        try:
            if "/" in name and (folder / name).parent.is_symlink():
                raise UnexpectedFile(name, "lies behind a link")
            found, size = sum_of(folder, name, left)
            left -= size
            if found != expected:
                yield name, Defect("evidence_file_changed", f"{name}: it is not what was sealed")
        except FileNotFoundError:
            yield name, Defect("evidence_file_missing", f"{name}: it was sealed and is not there")
        except UnexpectedFile as error:
            yield name, Defect("evidence_file_kind", f"{name}: {error.what}")
        except OSError as error:
            yield name, Defect("evidence_unreadable", f"{name}: {error.strerror}")


class _Said:
    """What the files of a run say of it; unreadable ones say nothing."""

    def __init__(self, folder: Path, names: Set[str], sealed: Set[str]) -> None:
        self._folder = folder
        self._names = names
        self._sealed = sealed
        self.outcome = self._object(OUTCOME)
        self.plan = self._object("plan.json")

    def word(self, name: str) -> str:
        """A text of outcome.json."""
        value = self.outcome.get(name)
        return value if isinstance(value, str) else ""

    def _json(self, name: str) -> Any:
        if name not in self._names:
            return None
        try:
            return json.loads(read_bounded(self._folder, name, JSON_LIMIT))
        except (OSError, UnexpectedFile, ValueError, RecursionError):
            return None

    def _object(self, name: str) -> Mapping[str, Any]:
        value = self._json(name)
        return value if isinstance(value, dict) else {}

    def problems(self) -> Iterator[Defect]:
        """Where plan, approvals and outcome contradict each other."""
        if not self.word("outcome") or not self.word("operation"):
            yield Defect("evidence_inconsistent", f"{OUTCOME} names no outcome and operation")
            return
        if self.plan:
            yield from self._plan_problems()
            yield from self._step_problems()
        elif self.word("operation") in _PLANNED:
            yield Defect("evidence_incomplete", f"plan.json: a {self.word('operation')} has one that can be read")
        if self.outcome.get("plan") not in (self.plan.get("digest"), "", None):
            yield Defect("evidence_inconsistent", f"{OUTCOME} names another plan than plan.json is")
        yield from self._approval_problems()

    def _plan_problems(self) -> Iterator[Defect]:
        """The plan's digest is made again from its content."""
        operation = str(self.plan.get("operation"))
        if operation != self.word("operation"):
            yield Defect("evidence_inconsistent", f"plan.json is a plan for another operation than {OUTCOME} tells")
        try:
            read_plan(json.dumps(self.plan), cast(Operation, operation))
        except BadFile as error:
            yield Defect("evidence_inconsistent", f"plan.json: {error.text}")

    def _step_problems(self) -> Iterator[Defect]:
        """What was applied has done every step of its plan; only the last one, which seals, leaves nothing."""
        steps = self.plan.get("steps")
        if self.word("outcome") != RunOutcome.APPLIED or not isinstance(steps, list):
            return
        for step in [one for one in steps if isinstance(one, dict)][:-1]:
            number, name = step.get("number"), str(step.get("name"))
            kept = numbered("steps", number if isinstance(number, int) else 0, name, "json")
            if kept not in self._sealed:
                yield Defect("evidence_incomplete", f"{kept}: nothing shows that the step was done")

    def _approval_problems(self) -> Iterator[Defect]:
        found = self._json("approvals.json")
        approvals = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
        wanted = (self.plan.get("digest"), self.plan.get("operation"))
        if any((one.get("plan"), one.get("operation")) != wanted for one in approvals):
            yield Defect("evidence_inconsistent", "approvals.json approves another plan")
        elif self.word("operation") in _PLANNED and not approvals:
            yield Defect("evidence_incomplete", f"approvals.json: nobody approved this {self.word('operation')}")


def _look_up(
    digest: str, said: _Said, find_in_ledger: FindInLedger
) -> tuple[Mapping[str, Any] | None, tuple[Defect, ...]]:
    """The ledger's entry for the digest, and what in it does not fit."""
    try:
        found = find_in_ledger(digest)
    except SignerError as error:
        return None, (Defect("evidence_ledger_unreachable", f"the ledger does not tell: {error.text}"),)
    if found is None:
        return None, (Defect("evidence_not_recorded", f"the ledger holds no {digest}"),)
    if not said.outcome:
        return found, ()  # which is told already
    told = {"operation": said.word("operation"), "outcome": said.word("outcome"), "plan": said.outcome.get("plan")}
    wrong = [name for name, value in told.items() if (found.get(name) or "") != (value or "")]
    if wrong:
        return None, (Defect("evidence_ledger_differs", f"the ledger tells another {', '.join(wrong)}"),)
    return found, ()


def _check_answer(folder: Path, digest: str, found: Mapping[str, Any] | None) -> Iterator[Defect]:
    """ledger.json is a copy, which proves nothing; one that differs from the ledger misleads."""
    try:
        answer = json.loads(read_bounded(folder, LEDGER, JSON_LIMIT))
    except FileNotFoundError:
        yield Defect("evidence_ledger_json", f"{LEDGER}: the ledger's answer is not there", is_warning=True)
        return
    except (OSError, UnexpectedFile, ValueError, RecursionError):
        answer = None
    known = {name: found[name] for name in ("seq", "hash") if found and name in found}
    if not isinstance(answer, dict) or any(
        answer.get(name, value) != value for name, value in {**known, "evidence": digest}.items()
    ):
        yield Defect("evidence_ledger_json", f"{LEDGER} is not what the ledger says")
