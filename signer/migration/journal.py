"""The progress of a run, on disk before and after each step, so that an interrupted run can be resumed.

One file per run, one JSON object per line, each on disk before the next action. An incomplete last line,
left by a crash, is removed. A lock that ends with its process allows one run at a time. The evidence is in
`evidence/store.py`; the journal is what the program itself reads again.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from signer.errors import LedgerBroken, SignerError, Unavailable, write_hint
from signer.files import append_line, lock, open_lock, open_lock_of, open_or_create, os_errors, sync_directory
from signer.migration.evidence.store import RUN_NAME, make_private, operation_of
from signer.model import RunOutcome

FOLDER: Final = "journal"
ATTEMPTS: Final = "attempts.jsonl"
_LOCK: Final = "lock"


@dataclass(slots=True)
class RunState:
    """The state of a run, from its journal. `done` maps the names of steps to their seconds, `outcome` is None until
    the run has ended."""

    run: str
    operation: str
    plan: str = ""
    reason: str = ""
    began_ms: int = 0
    done: dict[str, float] = field(default_factory=dict)
    begun: dict[str, None] = field(default_factory=dict)  # in order; done or not
    failed: str = ""  # name of the step
    is_rolling_back: bool = False
    outcome: RunOutcome | None = None
    ended_ms: int = 0
    evidence: str = ""

    @property
    def is_over(self) -> bool:
        return self.outcome is not None

    def take(self, line: object) -> None:
        """Applies one line of the journal; raises `ValueError`, `KeyError` or `TypeError` for a malformed one."""
        if not isinstance(line, dict):
            raise TypeError("a line is an object")
        name = str(line.get("step", ""))
        match line["event"]:
            case "run.began":
                self.plan, self.reason = str(line.get("plan", "")), str(line.get("reason", ""))
                self.began_ms = int(line["at"])
            case "run.resumed":
                self.failed = ""
            case "step.began":
                self.begun[name] = None
            case "step.done":
                self.done[name] = float(line.get("seconds", 0))
            case "step.failed":
                self.failed = name
            case "rollback.began":
                self.is_rolling_back = True
            case "run.ended":
                self.outcome, self.ended_ms = RunOutcome(line["outcome"]), int(line["at"])
                self.evidence = str(line.get("evidence", ""))


class Journal:
    """The journal of one run, open for writing; `state` is the state so far.

    `make_room` is called once if the disk is full, to free the space reserved for the end of a run. `clean` removes
    secrets from the summaries of steps.
    """

    def __init__(self, folder: Path, run: str, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.path = folder / FOLDER / f"{run}.jsonl"
        self.make_room: Callable[[], object] = lambda: None
        self.clean: Callable[[str], str] = str
        self.state = read_journal(self.path) if self.path.exists() else RunState(run, operation_of(run))
        with os_errors(_unwritable):
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            self._file = open_or_create(self.path)
            _cut_half_line(self._file)
            sync_directory(self.path.parent)

    def write(self, event: str, **facts: object) -> None:
        """Writes one line, on disk when this returns; raises `Unavailable`."""
        kept = {name: self.clean(value) if isinstance(value, str) else value for name, value in facts.items()}
        line = {"at": int(self._clock() * 1000), "event": event, **kept}
        text = json.dumps(line, sort_keys=True).encode() + b"\n"
        try:
            append_line(self._file, text)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise _unwritable(error) from None
            self.make_room()
            with os_errors(_unwritable):
                append_line(self._file, text)
        self.state.take(line)

    def close(self) -> None:
        os.close(self._file)


def _age(state: RunState) -> tuple[str, int]:
    """Sort key for runs in order of creation; the first run of a second has no number."""
    match = RUN_NAME.fullmatch(state.run)
    return ("", 0) if match is None else (match[1], int(match[2] or 1))


def _cut_half_line(descriptor: int) -> None:
    content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.ftruncate(descriptor, whole)
        os.fsync(descriptor)


def read_journal(path: Path) -> RunState:
    """A run's state from its journal; raises `Unavailable` or `LedgerBroken`. Ignores an incomplete last line."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise Unavailable(
            "journal_unreadable", f"the journal of a run cannot be read: {error.strerror}", "see its mode and owner"
        ) from None
    state = RunState(path.stem, operation_of(path.stem))
    lines = text.split("\n")[:-1]
    for number, line in enumerate(lines, 1):
        try:
            state.take(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise LedgerBroken(
                "journal_broken",
                f"line {number} of the journal {path.name} is malformed",
                "keep the file, check the state of the platform, and follow runbooks/rollback.md",
            ) from None
    return state


def runs(folder: Path) -> list[RunState]:
    """The states of all runs, oldest first; raises as `read_journal`."""
    paths = sorted((folder / FOLDER).glob("*.jsonl"))
    return sorted((read_journal(path) for path in paths if RUN_NAME.fullmatch(path.stem) is not None), key=_age)


@contextmanager
def platform_lock(folder: Path, base: Path) -> Iterator[None]:
    """Locks the platform against every other process, also with another evidence directory; raises `Unavailable`.

    `base` is the compose file, which every operation on the platform uses. Others may read it, and who may open a file
    can lock it; so a file of this user's that is named after it is locked in its place.

    A journal decides which steps are not repeated, so no other user may write there: `evidence_dir_not_private`.
    """
    with os_errors(_unwritable):
        make_private(folder)
        held = [open_lock(folder / _LOCK)]
    try:
        with os_errors(_unwritable):
            held.append(open_lock_of(base))
        if not all(lock(descriptor) for descriptor in held):
            raise Unavailable(
                "run_in_progress",
                "another process is changing this platform",
                "wait until it has ended; see the status",
            )
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def note_attempt(folder: Path, attempt: Mapping[str, object]) -> None:
    """Records a refused approval, without the typed text; raises `Unavailable`, or `SignerError` for a directory in
    which other users may write."""
    with os_errors(_unwritable):
        make_private(folder)
        (folder / FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / FOLDER / ATTEMPTS
        descriptor = open_or_create(path, append=True)
        try:
            lock(descriptor, waits=True)  # no other attempt is noted meanwhile
            append_line(descriptor, json.dumps(attempt, sort_keys=True).encode() + b"\n")
        finally:
            os.close(descriptor)


def _unwritable(error: OSError) -> SignerError:
    return Unavailable(
        "journal_unwritable",
        f"the evidence directory cannot be written: {error.strerror}",
        f"{write_hint(error, 'the evidence directory')}; nothing is changed before it is recorded",
    )
