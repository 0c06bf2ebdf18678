"""`signer ledger checkpoint` and `signer ledger key`, and the options of `signer ledger verify` about checkpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from signer.cli import output
from signer.cli.arguments import Checked, read_settings
from signer.cli.connection import Service, address_option
from signer.cli.parser import verb
from signer.cli.usage import UsageError
from signer.errors import BadFile, NotFound
from signer.units import timestamp

if TYPE_CHECKING:
    from signer.ledger.checkpoint import VerifierKey
    from signer.ledger.reader import LedgerReader
    from signer.ledger.saved import SavedCheckpoint

_MOST: Final = 128 * 1024  # bytes of a checkpoint


@verb("ledger checkpoint", "signer ledger checkpoint > checkpoint")
@address_option
def ledger_checkpoint(*, address: str | None, as_json: bool) -> None:
    """Prints the newest checkpoint of the running service: origin, number of events, root of their Merkle tree, and
    the signature of the ledger key (c2sp.org/tlog-checkpoint). Needs no token. Keep it where the keeper cannot
    write; `signer ledger verify --checkpoint` compares the ledger with it. No signature is checked."""
    from signer.ledger.checkpoint import parse_checkpoint, parse_note

    with Service(address).open_public() as api:
        data = api.file("ledger/checkpoint", _MOST)
    note = parse_note(data)
    found = parse_checkpoint(note.text)
    facts = {"origin": found.origin, "size": found.size, "root": found.root.hex(), "note": data.decode()}
    output.show_result(facts, *data.decode().rstrip("\n").split("\n"), as_json=as_json)


@verb("ledger key", "signer ledger key")
def ledger_key(as_json: bool) -> None:
    """Prints the verifier key that a witness is configured with (c2sp.org/signed-note), under the ledger's origin.
    Reads the ledger in SIGNER_DATA_DIR, also while the keeper runs. A restored ledger has a new origin, and so
    another line."""
    origin, keys, _ = read_ledger_keys()
    output.show_result({"origin": origin, "vkey": str(keys[-1])}, str(keys[-1]), as_json=as_json)


def read_ledger_keys() -> tuple[str, tuple[VerifierKey, ...], Path]:
    """The ledger's origin, its keys for checkpoints, the newest last, and its directory; raises `NotFound`."""
    from signer.cli.ledger import reading
    from signer.ledger.origin import ledger_keys, origins

    with reading() as reader:
        origin = origins(reader, read_settings().ledger_origin)[-1]
        keys, data_dir = tuple(ledger_keys(reader, origin)), reader.data_dir
    if not keys:
        raise NotFound("ledger_key_missing", "the ledger has no key for checkpoints yet", "start the keeper once")
    return origin, keys, data_dir


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


def read_vkey(word: str, *, of_log: bool) -> VerifierKey:
    """The verifier key of a log or of a witness; raises `ValueError`."""
    from signer.errors import BadNote
    from signer.ledger.checkpoint import COSIGNATURE_KIND, NOTE_KIND, parse_vkey

    try:
        key = parse_vkey(word)
    except BadNote as error:
        raise ValueError(error.text) from None
    if key.kind != (NOTE_KIND if of_log else COSIGNATURE_KIND):
        wanted, other = ("a log", "a witness") if of_log else ("a witness", "a log")
        raise ValueError(f"{key.name} is the key of {other}, not of {wanted}")
    return key


WITNESS_KEY: Final = Checked("vkey", partial(read_vkey, of_log=False))


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
