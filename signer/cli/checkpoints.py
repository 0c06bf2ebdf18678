"""`signer ledger checkpoint`, `key` and `witness`, and the options of `signer ledger verify` about checkpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from signer.cli import output
from signer.cli.arguments import FILE, WITNESS_KEY, Checked, quoted, read_settings, whole
from signer.cli.connection import Service, address_option
from signer.cli.parser import verb
from signer.cli.usage import UsageError
from signer.errors import BadFile, NotFound, SignerError
from signer.units import plain, timestamp

if TYPE_CHECKING:
    from signer.ledger.checkpoint import SavedCheckpoint, VerifierKey
    from signer.ledger.reader import LedgerReader
    from signer.witness.cosign import Round

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
    output.show_result(facts, *data.decode().rstrip("\n").split("\n"), as_json=as_json, exactly=True)


@verb("ledger key", "signer ledger key")
def ledger_key(as_json: bool) -> None:
    """Prints the verifier key that a witness is configured with (c2sp.org/signed-note), under the ledger's origin.
    Reads the ledger in SIGNER_DATA_DIR, also while the keeper runs. A restored ledger has a new origin, and so
    another line."""
    origin, keys, _ = read_ledger_keys()
    output.show_result({"origin": origin, "vkey": str(keys[-1])}, str(keys[-1]), as_json=as_json, exactly=True)


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
        from signer.ledger.checkpoint import Demand, read_saved
        from signer.ledger.origin import ledger_keys, origins

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


def checkpoint_facts(saved: SavedCheckpoint) -> dict[str, Any]:
    return {
        "origin": saved.checkpoint.origin,
        "size": saved.checkpoint.size,
        "cosigned": {name: timestamp(at) for name, at in saved.cosigned.items()},
    }


def checkpoint_lines(saved: SavedCheckpoint) -> Sequence[str]:
    found = saved.checkpoint
    lines = [f"saved   {found.origin}, {output.count(found.size, 'event')}, signed by the ledger key"]
    lines += [f"witness {name} cosigned it at {timestamp(at)}" for name, at in saved.cosigned.items()]
    return lines


# --- cosignatures ---------------------------------------------------------------------------------------------------


def _read_url(word: str) -> str:
    from urllib.parse import urlsplit

    parts = urlsplit(word)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or "@" in word:
        raise ValueError(f"{quoted(word)} is not an address such as http://witness.example.org:8333")
    return word


@verb(
    "ledger witness",
    "signer ledger witness --to http://w1.example.org:8333 --witness w1.example.org+1a2b3c4d+BA… --out checkpoint",
)
@click.option("--to", "addresses", type=Checked("url", _read_url), metavar="URL", multiple=True, required=True,
              help="a witness; repeat for more")  # fmt: skip
@click.option("--witness", "keys", type=WITNESS_KEY, metavar="VKEY", multiple=True, required=True,
              help="its verifier key; as many, and in the same order")  # fmt: skip
@click.option("--out", type=FILE, metavar="FILE", required=True, help="the cosigned checkpoint; replaced by newer ones")
@click.option("--quorum", type=whole(1, 64), metavar="N", help="so many cosignatures suffice; default: all")
@address_option
def ledger_witness(
    *,
    addresses: tuple[str, ...],
    keys: tuple[VerifierKey, ...],
    out: Path,
    quorum: int | None,
    address: str | None,
    as_json: bool,
) -> int:
    """Asks the service for its newest checkpoint and each witness to cosign it, checks what they answer, and writes
    the cosigned checkpoint, which `signer ledger verify --checkpoint` takes. Run it by a timer, on the signer's
    host, as the keeper's user. Exit status 1 unless enough witnesses cosigned, or if one holds another history of
    this ledger: that is then kept beside FILE, and `signer status` and readiness tell it, too."""
    from signer.witness.cosign import run_round
    from signer.witness.remote import HttpWitness, ServiceLog
    from signer.witness.state import Log

    needed = len(keys) if quorum is None else quorum
    _check_witnesses(addresses, keys, needed)
    origin, own, data_dir = read_ledger_keys()
    log = Log(origin, own)
    with Service(address).open_public() as api, ExitStack() as remotes:
        asked = [(remotes.enter_context(HttpWitness(one)), key) for one, key in zip(addresses, keys, strict=True)]
        done = run_round(ServiceLog(api, log), asked, needed, out, data_dir, int(time.time()))
    _show_round(done, out, as_json=as_json)
    if not done.is_noted:
        output.note("`signer status` does not show it: this user may not write to SIGNER_DATA_DIR")
    return 0 if done.is_written and not done.differs else 1


def _check_witnesses(addresses: tuple[str, ...], keys: tuple[VerifierKey, ...], needed: int) -> None:
    """Raises `UsageError` unless each address has a key of its own."""
    if len(addresses) != len(keys):
        raise UsageError(f"{len(addresses)} of --to and {len(keys)} of --witness are given", "give one key for each")
    if len(set(keys)) != len(keys) or len(set(addresses)) != len(addresses):
        raise UsageError("a witness is given twice", "name each of them once")
    if needed > len(keys):
        raise UsageError(f"--quorum is {needed}, but {len(keys)} witnesses are given", "give more, or fewer")


def _show_round(done: Round, out: Path, *, as_json: bool) -> None:
    size, written = done.size, out if done.is_written else None
    if as_json:
        rows: list[dict[str, Any]] = [
            {"witness": name, "error": result.as_json()}
            if isinstance(result, SignerError)
            else {"witness": name, "cosigned": timestamp(result.at), "was_behind": result.was_behind}
            for name, result in done.found
        ]
        output.show_json({"size": size, "written": None if written is None else str(written), "witnesses": rows})
        return
    for name, result in done.found:
        if isinstance(result, SignerError):
            output.warn(plain(f"{result.text} ({result.code})"))
            output.note(plain(result.hint))
            continue
        output.show(plain(f"{name} cosigned {output.count(size, 'event')} at {timestamp(result.at)}"))
        if result.was_behind:
            output.warn(plain(f"{name} had forgotten what it cosigned before: it was restored, or changed"))
    if written is not None:
        output.show(plain(f"written to {written}"))
