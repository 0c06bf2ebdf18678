"""`signer ledger checkpoint` and `signer ledger key`, and the options of `signer ledger verify` about checkpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from signer.cli import output
from signer.cli.arguments import json_option, read_settings
from signer.cli.connection import address_option, open_public
from signer.cli.parser import verb
from signer.cli.usage import UsageError
from signer.errors import BadFile, NotFound
from signer.units import timestamp

if TYPE_CHECKING:
    from signer.ledger.checkpoint import VerifierKey
    from signer.ledger.reader import LedgerReader
    from signer.ledger.saved import SavedCheckpoint

_MOST: Final = 128 * 1024  # bytes of a checkpoint


@verb("ledger checkpoint", examples=["signer ledger checkpoint > checkpoint"])
@address_option
@json_option
def ledger_checkpoint(*, address: str | None, as_json: bool) -> int:
    """Prints the newest checkpoint of the running service: origin, number of events, root of their Merkle tree, and
    the signature of the ledger key (c2sp.org/tlog-checkpoint). Needs no token. Keep it where the keeper cannot
    write; `signer ledger verify --checkpoint` compares the ledger with it. No signature is checked."""
    from signer.ledger.checkpoint import parse_checkpoint, parse_note

    with open_public(address) as api:
        data = api.file("ledger/checkpoint", _MOST)
    note = parse_note(data)
    found = parse_checkpoint(note.text)
    if as_json:
        facts = {"origin": found.origin, "size": found.size, "root": found.root.hex(), "note": data.decode()}
        output.show_json(facts)
    else:
        output.show_exactly(data.decode().rstrip("\n"))
    return 0


@verb("ledger key", examples=["signer ledger key"])
@json_option
def ledger_key(as_json: bool) -> int:
    """Prints the verifier key that a witness is configured with (c2sp.org/signed-note), under the ledger's origin.
    Reads the ledger in SIGNER_DATA_DIR, also while the keeper runs. A restored ledger has a new origin, and so
    another line."""
    from signer.cli.ledger import reading
    from signer.ledger.origin import ledger_keys, origins

    with reading() as reader:
        origin = origins(reader, read_settings().ledger_origin)[-1]
        keys = ledger_keys(reader, origin)
    if not keys:
        raise NotFound("ledger_key_missing", "the ledger has no key for checkpoints yet", "start the keeper once")
    if as_json:
        output.show_json({"origin": origin, "vkey": str(keys[-1])})
    else:
        output.show_exactly(str(keys[-1]))
    return 0


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """The options of `verify`: a saved checkpoint, and who must have cosigned it."""

    file: Path | None
    witnesses: tuple[VerifierKey, ...]
    quorum: int | None
    max_age: int | None

    def check(self) -> None:
        """Raises `UsageError` for options that do not go together."""
        if self.file is None and (self.witnesses or self.quorum is not None or self.max_age is not None):
            raise UsageError("--witness, --quorum and --max-age go with --checkpoint", "add --checkpoint FILE")
        if not self.witnesses and (self.quorum is not None or self.max_age is not None):
            raise UsageError("--quorum and --max-age go with --witness", "add --witness VKEY")
        if self.quorum is not None and self.quorum > len(set(self.witnesses)):
            raise UsageError(
                f"--quorum is {self.quorum}, but {len(set(self.witnesses))} witnesses are given", "give more, or fewer"
            )

    def read(self, reader: LedgerReader) -> SavedCheckpoint | None:
        """The checked checkpoint, None if none was given; raises `BadFile` or `BadNote`."""
        from signer.files import read_bounded
        from signer.ledger.origin import ledger_keys, origins
        from signer.ledger.saved import Demand, read_saved

        if self.file is None:
            return None
        try:
            data = read_bounded(self.file, _MOST, follow_links=True)
        except OSError as error:
            text = f"{self.file} cannot be read: {error.strerror}"
            raise BadFile("checkpoint_unreadable", text, "name a file that `signer ledger checkpoint` wrote") from None
        known = origins(reader, read_settings().ledger_origin)
        witnesses = tuple(dict.fromkeys(self.witnesses))
        demand = Demand(witnesses, len(witnesses) if self.quorum is None else self.quorum, self.max_age)
        return read_saved(data, known, ledger_keys(reader, known[-1]), demand, int(time.time()))


def read_witness(word: str) -> VerifierKey:
    """The verifier key of a witness; raises `ValueError`."""
    from signer.errors import BadNote
    from signer.ledger.checkpoint import COSIGNATURE_KIND, parse_vkey

    try:
        key = parse_vkey(word)
    except BadNote as error:
        raise ValueError(error.text) from None
    if key.kind != COSIGNATURE_KIND:
        raise ValueError(f"{key.name} is the key of a log, not of a witness")
    return key


def checkpoint_facts(saved: SavedCheckpoint) -> dict[str, Any]:
    """What `verify --json` shows of a checkpoint."""
    return {
        "origin": saved.checkpoint.origin,
        "size": saved.checkpoint.size,
        "cosigned": {name: timestamp(at) for name, at in saved.cosigned.items()},
    }


def checkpoint_lines(saved: SavedCheckpoint) -> Sequence[str]:
    """What `verify` shows of a checkpoint."""
    found = saved.checkpoint
    lines = [f"saved   {found.origin}, {output.count(found.size, 'event')}, signed by the ledger key"]
    lines += [f"witness {name} cosigned it at {timestamp(at)}" for name, at in saved.cosigned.items()]
    return lines
