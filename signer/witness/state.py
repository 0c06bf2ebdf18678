"""What a witness remembers: for each log the newest checkpoint that it cosigned, and the forks that it refused.

One directory, one process. `<origin hash>.checkpoint` is the whole state of a log: the checkpoint as it was cosigned,
so that a file that was cut off or changed by someone without the keys is noticed. `<origin hash>.fork-…` is a second
checkpoint of one size, which proves that the log has two histories; `<origin hash>.refused-…` is one of another size
whose consistency proof was wrong: a fork, or a wrong proof of a right checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from signer.errors import BadFile, BadNote, SignerError, Unavailable, write_hint
from signer.files import claim, os_errors, read_bounded, write_atomically
from signer.ledger.checkpoint import (
    MAX_NOTE,
    Checkpoint,
    Note,
    VerifierKey,
    check_cosignature,
    check_note,
    parse_checkpoint,
    parse_note,
)

FORK: Final = "fork"
REFUSED: Final = "refused"
MAX_KEPT: Final = 16  # of each kind for each log; the first ones
_LOCK: Final = "witness.lock"
COSIGNATURE_BYTES: Final = 8 + 64  # time and Ed25519 signature (tlog-cosignature)


@dataclass(frozen=True, slots=True)
class Log:
    """A log whose checkpoints are cosigned: its origin, and the keys that may sign them."""

    origin: str
    keys: tuple[VerifierKey, ...]

    @property
    def origin_hash(self) -> str:
        """The lower-case hex SHA-256 of the origin, which names the log in URLs (tlog-witness) and files."""
        return sha256(self.origin.encode()).hexdigest()

    def check(self, note: Note) -> None:
        """Raises `BadNote` unless one of the keys signed the note, and no signature by any of them is wrong."""
        signed = 0
        for key in self.keys:
            try:
                check_note(note, key)
            except BadNote as error:
                if error.code != "note_not_signed":
                    raise
            else:
                signed += 1
        if not signed:
            names = ", ".join(key.name for key in self.keys)
            raise BadNote("note_not_signed", f"the note has no signature by {names}", "sign it with the log's key")

    def signatures(self, note: Note) -> Note:
        """The note with the signatures of these keys alone: nobody has checked the others."""
        wanted = {(key.name, key.key_id) for key in self.keys}
        return Note(note.text, tuple(line for line in note.signatures if (line.name, line.key_id) in wanted))


@dataclass(frozen=True, slots=True)
class Cosigned:
    """The newest checkpoint of a log, with the signature of the log and of the witness; `at` is when it was cosigned,
    in seconds since 1970."""

    checkpoint: Checkpoint
    note: Note
    at: int


def group_logs(keys: Iterable[tuple[str, VerifierKey]]) -> tuple[Log, ...]:
    """Logs from pairs of an origin and a key; an origin may have several keys, as after a rotation."""
    found: dict[str, dict[VerifierKey, None]] = {}
    for origin, key in keys:
        found.setdefault(origin, {})[key] = None
    return tuple(Log(origin, tuple(its)) for origin, its in found.items())


def make_directory(directory: Path) -> None:
    """Makes the directory if it is not there; raises `Unavailable`."""
    with os_errors(_unusable):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def _unusable(error: OSError) -> Unavailable:
    return Unavailable(
        "witness_state_unusable",
        f"the state of the witness cannot be used: {error.strerror}",
        "pass a directory of the witness's own user with --state",
    )


def claim_state(directory: Path) -> int:
    """Makes the directory if needed, and locks it while the returned descriptor is open.

    Two witnesses with one state would each forget what the other cosigned. What a killed one left half written is
    removed. Raises `Unavailable`.
    """
    make_directory(directory)
    in_use = Unavailable("witness_state_in_use", "another witness uses this state", "stop it, or pass another --state")
    with os_errors(_unusable):
        lock = claim(directory / _LOCK, in_use)
        for left in directory.glob(".*.new"):
            left.unlink(missing_ok=True)
    return lock


class State:
    """The newest checkpoints of `logs`, read from `directory` and kept in memory; raises `BadFile`.

    `key` is the witness's own. Whoever writes has called `claim_state`.
    """

    def __init__(self, directory: Path, logs: tuple[Log, ...], key: VerifierKey) -> None:
        self._directory = directory
        self._cosigned = {log.origin: found for log in logs if (found := _load(directory, log, key)) is not None}

    def newest(self, log: Log) -> Cosigned | None:
        """The newest checkpoint that was cosigned; None if there is none."""
        return self._cosigned.get(log.origin)

    def save(self, log: Log, cosigned: Cosigned) -> None:
        """Replaces the newest checkpoint; it is on the disk when this returns. Raises `Unavailable`.

        If it was refused before, only its proof was wrong, and it is evidence no more.
        """
        with os_errors(_not_written):
            write_atomically(self._directory / f"{log.origin_hash}.checkpoint", cosigned.note.render(), 0o600)
            self._cosigned[log.origin] = cosigned
            self._evidence(log, REFUSED, cosigned.checkpoint, cosigned.note).unlink(missing_ok=True)

    def keep_refused(self, log: Log, checkpoint: Checkpoint, note: Note) -> bool:
        """Keeps a checkpoint that does not go on from the newest one; False if it is kept already, or too many are.

        The file has both: the newest one with the witness's cosignature, and what the log's key signed besides. Raises
        `Unavailable`.
        """
        newest = self._cosigned[log.origin]
        kind = FORK if checkpoint.size == newest.checkpoint.size else REFUSED
        path = self._evidence(log, kind, checkpoint, note)
        kept = list_evidence(self._directory, log, kind)
        if path in kept or len(kept) >= MAX_KEPT:
            return False
        with os_errors(_not_written):
            write_atomically(path, newest.note.render() + b"\n" + log.signatures(note).render(), 0o600)
        return True

    def _evidence(self, log: Log, kind: str, checkpoint: Checkpoint, note: Note) -> Path:
        digest = sha256(note.text.encode()).hexdigest()[:16]
        return self._directory / f"{log.origin_hash}.{kind}-{checkpoint.size}-{digest}"


def list_evidence(directory: Path, log: Log, kind: str) -> list[Path]:
    """The files with refused checkpoints of a log, of the kind `FORK` or `REFUSED`."""
    return sorted(directory.glob(f"{log.origin_hash}.{kind}-*"))


def _not_written(error: OSError) -> Unavailable:
    return Unavailable(
        "witness_state_not_written",
        f"the state of the witness cannot be written: {error.strerror}",
        write_hint(error, "--state"),
    )


def _load(directory: Path, log: Log, key: VerifierKey) -> Cosigned | None:
    """The state of a log; raises `BadFile` if it is damaged, or was written by another witness."""
    path = directory / f"{log.origin_hash}.checkpoint"
    try:
        data = read_bounded(path, MAX_NOTE)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _bad_state(path, str(error.strerror)) from None
    try:
        note = parse_note(data)
        checkpoint = parse_checkpoint(note.text, with_extensions=True)
        log.check(note)
        at = check_cosignature(note, key)
    except SignerError as error:
        raise _bad_state(path, error.text) from None
    if checkpoint.origin != log.origin:
        raise _bad_state(path, "it belongs to another log")
    return Cosigned(checkpoint, note, at)


def _bad_state(path: Path, why: str) -> BadFile:
    return BadFile(
        "witness_state_damaged",
        f"{path.name} is not a checkpoint of this log that this witness cosigned: {why}",
        "check --name and --log; restore the file, or delete it if you accept any history of this log from now on",
    )


# --- what an operator looks at ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LogState:
    """One log as its files show it, unverified; `at` is when its newest checkpoint was cosigned, seconds since 1970."""

    origin: str
    size: int
    root: bytes
    at: int
    forks: list[Path]
    refused: list[Path]


def list_states(directory: Path) -> list[LogState]:
    """All logs in a state directory, also of one that a witness uses; raises `BadFile` or `Unavailable`."""
    found = []
    with os_errors(_unusable):
        paths = sorted(path for path in directory.iterdir() if path.match("[!.]*.checkpoint"))
    for path in paths:
        try:
            note = parse_note(read_bounded(path, MAX_NOTE))
            checkpoint = parse_checkpoint(note.text, with_extensions=True)
        except SignerError as error:
            raise _bad_state(path, error.text) from None
        log = Log(checkpoint.origin, ())
        times = [int.from_bytes(line.data[:8]) for line in note.signatures if len(line.data) == COSIGNATURE_BYTES]
        evidence = (list_evidence(directory, log, kind) for kind in (FORK, REFUSED))
        found.append(LogState(checkpoint.origin, checkpoint.size, checkpoint.root, max(times, default=0), *evidence))
    return found
