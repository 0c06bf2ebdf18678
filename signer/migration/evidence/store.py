"""The evidence of one run: a directory of files, their sums, and one digest over them.

    plan.json  approvals.json  preflight.json  parity.json  steps/NN-name.json  smoke/NN-target.log  observed.json
    timings.json  versions.json  journal.jsonl  outcome.json  evidence.html  SHA256SUMS  ledger.json

Every byte goes through `_write`, and every text before that through the guard (`redact.py`). `SHA256SUMS` is
written last and covers every file but itself and `ledger.json`, the ledger's entry for its digest. `verify.py` checks
evidence, `page.py` renders it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Self

from signer.errors import NotFound, SignerError, Unavailable, write_hint
from signer.files import open_or_create, os_errors, sync_directory, write_atomically
from signer.migration.evidence import files
from signer.migration.evidence.page import render_page
from signer.migration.evidence.redact import REMOVED, Guard
from signer.units import plain, timestamp

RESERVE: Final = 4 << 20  # bytes: enough for outcome, page, sums and journal of a large run
SUPERSEDED: Final = "superseded"
_RESERVED: Final = ".reserved"
# Time, number from 2 among the runs of one second, and operation.
RUN_NAME: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ)(?:-(\d+))?-(cutover|rollback|decommission)", re.ASCII)


class Evidence:
    """The evidence of one run, being collected. Raises `Unavailable` with code `evidence_unwritable` if
    a write fails; the previous file is then kept."""

    def __init__(self, folder: Path, guard: Guard | None = None) -> None:
        self.folder = folder
        self.guard = guard or Guard()

    @classmethod
    def create(cls, parent: Path, operation: str, now: float, guard: Guard | None = None) -> Self:
        """A new directory in `parent`, which is created with mode 0700 if missing; `now` is seconds since 1970."""
        folder = parent / _run_name(operation, now, 1)
        with os_errors(_unwritable):
            make_private(parent)
            again = 1
            while os.path.lexists(folder):
                again += 1
                folder = parent / _run_name(operation, now, again)
            folder.mkdir(mode=0o700)
            sync_directory(parent)
        return cls(folder, guard)

    @classmethod
    def open(cls, folder: Path, guard: Guard | None = None) -> Self:
        """The directory of a run that is resumed; raises `NotFound`."""
        if RUN_NAME.fullmatch(folder.name) is None or folder.is_symlink() or not folder.is_dir():
            raise NotFound("evidence_missing", f"run {folder.name} does not exist", "see the evidence directory")
        return cls(folder, guard)

    @property
    def run(self) -> str:
        return self.folder.name

    # --- collecting -------------------------------------------------------------------------------------------------

    def write_json(self, name: str, value: object) -> None:
        """Writes a JSON file without secrets, from any value."""
        self._collect(name, _json(self.guard.clean_value(value)))

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file without secrets, with control characters escaped. Each line of `.jsonl` stays JSON."""
        if name.endswith(".jsonl"):
            cleaned = "".join(self._json_line(line) for line in text.splitlines(keepends=True))
        else:
            cleaned = self.guard.clean(text)
        self._collect(name, plain(cleaned, keep="\n\t").encode())

    def read_json(self, name: str) -> Any:
        """The value of a JSON file, None if it does not exist; raises `SignerError` if it is damaged."""
        try:
            return json.loads(files.read_bounded(self.folder, name, files.JSON_LIMIT))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError, files.UnexpectedFile):
            raise SignerError(
                "evidence_damaged",
                f"{name} of the run cannot be read back",
                "run `signer evidence verify`, and do not change the directory",
            ) from None

    def _json_line(self, line: str) -> str:
        try:
            return json.dumps(self.guard.clean_value(json.loads(line)), sort_keys=True) + "\n"
        except (ValueError, RecursionError):
            return self.guard.clean(line)

    def _collect(self, name: str, content: bytes) -> None:
        """Adds a file. A run that is in the ledger is final; one that is only sealed continues, its seal superseded."""
        if files.NAME.fullmatch(name) is None:
            raise ValueError(f"{name!a} is not a name of an evidence file")
        if self._holds(name, content):
            return
        if self.is_recorded:
            raise SignerError(
                "evidence_recorded",
                f"the evidence of {self.run} is sealed and in the ledger: nothing can be added",
                "start a new run",
            )
        if (self.folder / files.SUMS).exists():
            self._supersede()
        self._write(name, content, 0o600)

    def _holds(self, name: str, content: bytes) -> bool:
        try:
            return files.read_bounded(self.folder, name, len(content)) == content
        except (OSError, files.UnexpectedFile):
            return False

    def _write(self, name: str, content: bytes, mode: int) -> None:
        """Whole or not at all, and on the disk when this returns."""
        target = self.folder / name
        with os_errors(_unwritable):
            if target.parent != self.folder and not target.parent.exists():
                target.parent.mkdir(mode=0o700)
                sync_directory(self.folder)
            write_atomically(target, content, mode)

    # --- room for the end --------------------------------------------------------------------------------------------

    def reserve_space(self, size: int = RESERVE) -> None:
        """Reserves disk space, so that the outcome can be written even if the disk fills up."""
        path = self.folder / _RESERVED
        with os_errors(_unwritable):
            descriptor = open_or_create(path)
            try:
                os.posix_fallocate(descriptor, 0, size)
                os.fsync(descriptor)
            except OSError:
                path.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)

    def release_space(self) -> None:
        """Frees the reserved space; `seal` also does this."""
        with os_errors(_unwritable):
            (self.folder / _RESERVED).unlink(missing_ok=True)

    # --- the end -----------------------------------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        """`sha256:` and the hash of SHA256SUMS; empty until the run is sealed."""
        try:
            return files.digest_of(files.read_bounded(self.folder, files.SUMS, files.JSON_LIMIT))
        except (OSError, files.UnexpectedFile):
            return ""

    @property
    def is_recorded(self) -> bool:
        """True when the ledger holds the digest: the run is over, and nothing can be added."""
        return (self.folder / files.LEDGER).exists()

    def seal(self, outcome: str, facts: Mapping[str, object] | None = None) -> str:
        """Ends the run with this outcome and returns the digest. Raises `SignerError`.

        1  a complete seal with the same outcome is kept, so that this can be called again after a crash
        2  a complete seal with another outcome, or of files that have changed since, is moved to `superseded/`
        3  outcome.json and evidence.html are written
        4  every file gets mode 0400, and SHA256SUMS is written, which completes the seal
        """
        self.release_space()
        sums = self._unsealed_sums()
        # 1
        if (self.folder / files.SUMS).exists():
            known = self.read_json(files.OUTCOME)
            is_same = isinstance(known, dict) and known.get("outcome") == outcome
            if is_same and self._holds(files.SUMS, files.render_sums(sums)):
                return self.digest
            if self.is_recorded:
                raise SignerError(
                    "evidence_recorded",
                    f"the evidence of {self.run} is in the ledger with another outcome or other files",
                    "run `signer evidence verify`, and do not change the directory",
                )
            # 2
            self._supersede()
        # 3
        plan = self.read_json("plan.json")
        said = {
            **(facts or {}),
            "run": self.run,
            "operation": operation_of(self.run),
            "outcome": outcome,
            "plan": plan.get("digest") if isinstance(plan, dict) else None,
        }
        said["removed"] = self._count_removed() + _json(self.guard.clean_value(said)).count(REMOVED.encode())
        self._write(files.OUTCOME, _json(self.guard.clean_value(said)), 0o600)
        self._write(files.PAGE, self._page().encode(), 0o600)
        # 4
        with os_errors(_unwritable):
            sums = self._unsealed_sums()
            for name in sums:
                (self.folder / name).chmod(0o400)
        self._write(files.SUMS, files.render_sums(sums), 0o400)
        return self.digest

    def keep_ledger_answer(self, answer: Mapping[str, object]) -> None:
        """Stores the ledger's entry for the digest, which makes the run final."""
        self._write(files.LEDGER, _json(self.guard.clean_value(dict(answer))), 0o400)

    def _unsealed_sums(self) -> dict[str, str]:
        """Name to checksum of every file to seal; first removes partial files of a crash."""
        try:
            for path in self.folder.rglob(".*.new"):
                path.unlink()
            return {
                name: sha256(files.read_bounded(self.folder, name, None)).hexdigest()
                for name in files.found_in(self.folder)
                if name not in (files.SUMS, files.LEDGER)
            }
        except files.UnexpectedFile as error:
            raise SignerError(
                "evidence_damaged", f"{error.name} in the run {error.what}", "move it away, then seal again"
            ) from None
        except OSError as error:
            raise _unwritable(error) from None

    def _supersede(self) -> None:
        """Moves an outdated seal and its outcome away; repeatable after a crash."""
        try:
            number = 1 + len(list((self.folder / SUPERSEDED).glob("*-SHA256SUMS")))
            outcome = files.read_bounded(self.folder, files.OUTCOME, files.JSON_LIMIT)
            self._write(f"{SUPERSEDED}/{number:02}-{files.OUTCOME}", outcome, 0o600)
            (self.folder / files.SUMS).rename(self.folder / SUPERSEDED / f"{number:02}-{files.SUMS}")
            sync_directory(self.folder / SUPERSEDED)
            sync_directory(self.folder)
        except files.UnexpectedFile as error:
            raise SignerError("evidence_damaged", f"{error.name} in the run {error.what}", "move it away") from None
        except OSError as error:
            raise _unwritable(error) from None

    def _count_removed(self) -> int:
        """The number of redactions, counted in the files, as a run may have had several processes."""
        names = [name for name in files.found_in(self.folder) if name not in (files.OUTCOME, files.PAGE)]
        return sum(files.read_bounded(self.folder, name, None).count(REMOVED.encode()) for name in names)

    def _page(self) -> str:
        """The page; an error in it must not prevent the seal, as it only repeats other files."""
        content = {name: files.read_bounded(self.folder, name, None) for name in files.found_in(self.folder)}
        try:
            page = render_page(self.run, content)
        except Exception as error:  # noqa: BLE001 - see above; only its type is shown, as its text may contain a secret
            page = f"<!DOCTYPE html><title>evidence</title><p>No page could be made: {type(error).__name__}</p>\n"
        return plain(self.guard.clean(page), keep="\n\t")


def _run_name(operation: str, now: float, again: int) -> str:
    """`2026-11-22T14-05-02Z-cutover`; `again` counts the runs of one second."""
    moment = timestamp(int(now)).replace(":", "-")
    return f"{moment}-{operation}" if again == 1 else f"{moment}-{again}-{operation}"


def operation_of(run: str) -> str:
    """The operation in a run's name; raises `ValueError` if it is not one."""
    match = RUN_NAME.fullmatch(run)
    if match is None:
        raise ValueError(f"{run!a} is not a run name")
    return match[3]


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def make_private(parent: Path) -> None:
    """Makes the directory, 0700, if needed; raises `SignerError` if other users could write there, or `OSError`."""
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = parent.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_mode & 0o022 or facts.st_uid not in (0, os.geteuid()):
        raise SignerError(
            "evidence_dir_not_private",
            "the evidence directory is a link, belongs to another user, or other users may write there",
            "choose another, or chmod 0700 and chown it",
        )


def _unwritable(error: OSError) -> Unavailable:
    return Unavailable(
        "evidence_unwritable",
        f"the evidence cannot be written: {error.strerror or 'input or output failed'}",
        write_hint(error, "the evidence directory"),
    )
