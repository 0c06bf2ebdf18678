"""One round of cosigning: every witness is asked for the newest checkpoint, and what comes of it is kept in files.

The cosigned checkpoint replaces the one of the last round as a whole, after that the marks for `signer status`. So a
round may end anywhere, by kill -9 too: the next one goes on from what the witnesses know.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from signer.errors import BadNote, SignerError, Unavailable, write_hint
from signer.files import read_bounded, remove_leftovers, write_atomically
from signer.ledger.checkpoint import (
    MAX_NOTE,
    Note,
    VerifierKey,
    check_cosignature,
    parse_checkpoint,
    parse_note,
)
from signer.ledger.marks import COSIGNED, DIFFERS, Mark, mark_name, write_mark
from signer.units import plain
from signer.witness.client import Cosignature, OtherHistory, Remote, Source, ask_witness


@dataclass(frozen=True, slots=True)
class Round:
    """What came of a round over a checkpoint of `size` events: for each witness its cosignature, or why there is none.

    `is_written`: enough witnesses cosigned, and the checkpoint is in its file; `is_noted`: its mark is, too.
    """

    size: int
    found: tuple[tuple[str, Cosignature | SignerError], ...]
    is_written: bool
    is_noted: bool

    @property
    def differs(self) -> tuple[OtherHistory, ...]:
        """The witnesses' words that they hold another history of this ledger."""
        return tuple(result for _, result in self.found if isinstance(result, OtherHistory))


def run_round(
    source: Source, witnesses: Iterable[tuple[Remote, VerifierKey]], needed: int, out: Path, data_dir: Path, now: int
) -> Round:
    """Has witnesses cosign the newest checkpoint; `needed` of them must for it to be written to `out`.

    Another history that a witness holds is kept beside `out`. `now` is in seconds since 1970. Raises `Unavailable`
    (`checkpoint_not_written`) and what the source raises.
    """
    for folder, left in ((out.parent, out.name), (data_dir, mark_name(COSIGNED)), (data_dir, mark_name(DIFFERS))):
        remove_leftovers(folder, left)  # of killed rounds
    note = source.checkpoint()
    size = parse_checkpoint(note.text).size
    found = tuple((remote.name, _ask(remote, key, source, note, out, now)) for remote, key in witnesses)
    cosigned = [result for _, result in found if isinstance(result, Cosignature)]
    is_written, is_noted = len(cosigned) >= needed, True
    if is_written:
        _write(out, note.with_signatures(one.line for one in cosigned))
        is_noted = write_mark(data_dir, COSIGNED, Mark(size, sorted(one.at for one in cosigned)[-needed]))
    done = Round(size, found, is_written, is_noted)
    for error in done.differs:
        write_mark(data_dir, DIFFERS, Mark(size, now))
        _keep(out, error)
    return done


def _ask(
    remote: Remote, key: VerifierKey, source: Source, note: Note, out: Path, now: int
) -> Cosignature | SignerError:
    """The cosignature of one witness, or why there is none: the others are asked all the same."""
    try:
        return ask_witness(remote, key, source, note, _known(out, key), now)
    except SignerError as error:
        return error


def _known(out: Path, key: VerifierKey) -> int:
    """The size that this witness cosigned last, by the file of the last round; 0 if it does not say."""
    with suppress(OSError, BadNote):
        note = parse_note(read_bounded(out, MAX_NOTE))
        check_cosignature(note, key)
        return parse_checkpoint(note.text).size
    return 0


def _write(path: Path, note: Note) -> None:
    try:
        write_atomically(path, note.render(), 0o644, is_shared=True)
    except OSError as error:
        text = f"{plain(path)} cannot be written: {error.strerror}"
        raise Unavailable("checkpoint_not_written", text, write_hint(error, plain(path.parent))) from None


def _keep(out: Path, error: OtherHistory) -> None:
    """Keeps the witness's checkpoint beside FILE; the first of its size stays."""
    path = out.with_name(f"{out.name}.other-{parse_checkpoint(error.evidence.text).size}")
    if not os.path.lexists(path):
        _write(path, error.evidence)
