"""Whether a saved checkpoint is one of a ledger, and which witnesses have cosigned it, how long ago. Pure.

The root is compared with the events by `audit.verify`; here are only signatures, names and times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from signer.errors import BadNote
from signer.ledger.checkpoint import (
    Checkpoint,
    VerifierKey,
    check_cosignature,
    check_note,
    parse_checkpoint,
    parse_note,
)
from signer.units import render_duration

CLOCK_TOLERANCE: Final = 300  # seconds by which a witness's clock may be ahead


@dataclass(frozen=True, slots=True)
class Demand:
    """What a saved checkpoint must have: so many cosignatures by `witnesses`, none older than `max_age` seconds."""

    witnesses: tuple[VerifierKey, ...] = ()
    quorum: int = 0
    max_age: int | None = None


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A checkpoint that a ledger's key has signed, and when each witness has cosigned it (seconds since 1970)."""

    checkpoint: Checkpoint
    cosigned: dict[str, int]


def read_saved(
    data: bytes, origins: Sequence[str], keys: Sequence[VerifierKey], demand: Demand, now: int
) -> SavedCheckpoint:
    """The checkpoint in a file, if it is of a log with one of `origins` and has what `demand` asks for.

    `keys` are those of the log under any name. A signature by a known key that does not verify refuses the whole file,
    whoever else has signed it. Raises `BadNote`.
    """
    note = parse_note(data)
    found = parse_checkpoint(note.text)
    if found.origin not in origins:
        raise BadNote(
            "checkpoint_of_another_log",
            f"the checkpoint is one of {found.origin!a}, this ledger is {origins[-1]}",
            "take a checkpoint of this ledger, and the same SIGNER_LEDGER_ORIGIN; if both are right, the ledger was "
            "rewritten from its first event",
        )
    own = [VerifierKey(found.origin, key.kind, key.key) for key in keys]
    signed = {(line.name, line.key_id) for line in note.signatures}
    mine = [key for key in own if (key.name, key.key_id) in signed]
    if not mine:
        raise BadNote(
            "note_not_signed",
            "no key that this ledger has recorded signed the checkpoint",
            "take a checkpoint of this ledger; if it is one, the ledger was rewritten with another key",
        )
    for key in mine:
        check_note(note, key)
    cosigned: dict[str, int] = {}
    for witness in demand.witnesses:
        if (witness.name, witness.key_id) in signed:
            cosigned[str(witness)] = check_cosignature(note, witness)
    _check_demand(cosigned, demand, now)
    return SavedCheckpoint(found, {text.split("+")[0]: at for text, at in cosigned.items()})


def _check_demand(cosigned: dict[str, int], demand: Demand, now: int) -> None:
    possible = [at for at in cosigned.values() if at <= now + CLOCK_TOLERANCE]
    if len(possible) < demand.quorum:
        future = len(cosigned) - len(possible)
        raise BadNote(
            "checkpoint_not_cosigned",
            f"{len(possible)} of {len(demand.witnesses)} witnesses have cosigned the checkpoint, {demand.quorum} must"
            + (f"; {future} did at a time that is still to come" if future else ""),
            "take a newer checkpoint from `signer ledger witness`, or ask the witness why it refused",
        )
    if demand.max_age is None:
        return
    young = [at for at in possible if at >= now - demand.max_age]
    if len(young) < demand.quorum:
        newest = sorted(possible)[-demand.quorum]
        raise BadNote(
            "checkpoint_too_old",
            f"the checkpoint was cosigned {render_duration(max(now - newest, 1))} ago, "
            f"above the limit of {render_duration(demand.max_age)}",
            "take a newer one; if the service offers none, its witness refuses or does not see it",
        )
