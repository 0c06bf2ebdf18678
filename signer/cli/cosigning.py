"""`signer ledger witness`: has witnesses cosign the newest checkpoint, and keeps it where `ledger verify` takes it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from signer.cli import output
from signer.cli.arguments import FILE, Checked, json_option, quoted, read_settings, whole
from signer.cli.checkpoints import read_witness
from signer.cli.connection import address_option, open_public
from signer.cli.parser import verb
from signer.cli.usage import UsageError
from signer.errors import NotFound, SignerError, Unavailable, write_hint
from signer.units import plain, timestamp

if TYPE_CHECKING:
    from signer.ledger.checkpoint import Note, VerifierKey
    from signer.witness.client import Cosignature
    from signer.witness.remote import ServiceLog

_MOST: Final = 128 * 1024  # bytes of a checkpoint


def _read_url(word: str) -> str:
    from urllib.parse import urlsplit

    parts = urlsplit(word)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or "@" in word:
        raise ValueError(f"{quoted(word)} is not an address such as http://witness.example.org:8333")
    return word


@verb(
    "ledger witness",
    examples=[
        "signer ledger witness --to http://w1.example.org:8333 --witness w1.example.org+1a2b3c4d+BA… --out checkpoint",
    ],
)
@click.option("--to", "addresses", type=Checked("url", _read_url), metavar="URL", multiple=True, required=True,
              help="a witness; repeat for more")  # fmt: skip
@click.option("--witness", "keys", type=Checked("vkey", read_witness), metavar="VKEY", multiple=True, required=True,
              help="its verifier key; as many, and in the same order")  # fmt: skip
@click.option("--out", type=FILE, metavar="FILE", required=True, help="the cosigned checkpoint; replaced by newer ones")
@click.option("--quorum", type=whole(1, 64), metavar="N", help="so many cosignatures suffice; default: all")
@address_option
@json_option
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
    from signer.cli.ledger import reading
    from signer.ledger.marks import COSIGNED, DIFFERS, Mark, write_mark
    from signer.ledger.origin import ledger_keys, origins
    from signer.witness.remote import ServiceLog
    from signer.witness.state import Log

    needed = len(keys) if quorum is None else quorum
    _check(addresses, keys, needed)
    with reading() as reader:
        data_dir = reader.data_dir
        origin = origins(reader, read_settings().ledger_origin)[-1]
        log = Log(origin, tuple(ledger_keys(reader, origin)))
    if not log.keys:
        raise NotFound("ledger_key_missing", "the ledger has no key for checkpoints yet", "start the keeper once")
    now = int(time.time())
    with open_public(address) as api:
        source = ServiceLog(api, log)
        note = source.checkpoint()
        found = [_ask(one, key, source, note, out, now) for one, key in zip(addresses, keys, strict=True)]
    cosigned = [result for _, result in found if not isinstance(result, SignerError)]
    size = _size_of(note)
    is_enough, is_noted = len(cosigned) >= needed, True
    if is_enough:
        _write(out, note.with_signatures(one.line for one in cosigned))
        oldest = sorted(one.at for one in cosigned)[-needed]
        is_noted = write_mark(data_dir, COSIGNED, Mark(size, oldest))
    other = [error for _, error in found if isinstance(error, SignerError) and _is_other_history(error)]
    for error in other:
        write_mark(data_dir, DIFFERS, Mark(size, now))
        _keep(out, error)
    _show(found, size, out if is_enough else None, as_json=as_json)
    if not is_noted:
        output.note("`signer status` does not show it: this user may not write to SIGNER_DATA_DIR")
    return 0 if is_enough and not other else 1


def _check(addresses: tuple[str, ...], keys: tuple[VerifierKey, ...], needed: int) -> None:
    """Raises `UsageError` unless each address has a key of its own."""
    if len(addresses) != len(keys):
        raise UsageError(f"{len(addresses)} of --to and {len(keys)} of --witness are given", "give one key for each")
    if len(set(keys)) != len(keys) or len(set(addresses)) != len(addresses):
        raise UsageError("a witness is given twice", "name each of them once")
    if needed > len(keys):
        raise UsageError(f"--quorum is {needed}, but {len(keys)} witnesses are given", "give more, or fewer")


def _ask(
    address: str, key: VerifierKey, source: ServiceLog, note: Note, out: Path, now: int
) -> tuple[str, Cosignature | SignerError]:
    """The cosignature of one witness, or why there is none: the others are asked all the same."""
    from signer.witness.client import ask_witness
    from signer.witness.remote import HttpWitness

    with HttpWitness(address) as remote:
        try:
            return address, ask_witness(remote, key, source, note, _known(out, key), now)
        except SignerError as error:
            return address, error


def _known(out: Path, key: VerifierKey) -> int:
    """The size that this witness cosigned last, by the file of the last round; 0 if it does not say."""
    from signer.errors import BadNote
    from signer.files import read_bounded
    from signer.ledger.checkpoint import check_cosignature, parse_checkpoint, parse_note

    with suppress(OSError, BadNote):
        note = parse_note(read_bounded(out, _MOST))
        check_cosignature(note, key)
        return parse_checkpoint(note.text).size
    return 0


def _size_of(note: Note) -> int:
    from signer.ledger.checkpoint import parse_checkpoint

    return parse_checkpoint(note.text).size


def _is_other_history(error: SignerError) -> bool:
    return error.code == "ledger_differs_from_witness"


def _write(path: Path, note: Note) -> None:
    from signer.files import write_atomically

    try:
        write_atomically(path, note.render(), 0o644, temporary=f".{path.name}.{os.getpid()}.new")
    except OSError as error:
        text = f"{plain(path)} cannot be written: {error.strerror}"
        raise Unavailable("checkpoint_not_written", text, write_hint(error, plain(path.parent))) from None


def _keep(out: Path, error: SignerError) -> None:
    """Keeps the witness's checkpoint beside FILE; the first of its size stays."""
    from signer.witness.client import OtherHistory

    if isinstance(error, OtherHistory):
        path = out.with_name(f"{out.name}.other-{_size_of(error.evidence)}")
        if not os.path.lexists(path):
            _write(path, error.evidence)


def _show(
    found: list[tuple[str, Cosignature | SignerError]], size: int, written: Path | None, *, as_json: bool
) -> None:
    if as_json:
        rows: list[dict[str, Any]] = [
            {"witness": name, "error": result.as_json()}
            if isinstance(result, SignerError)
            else {"witness": name, "cosigned": timestamp(result.at), "was_behind": result.was_behind}
            for name, result in found
        ]
        output.show_json({"size": size, "written": None if written is None else str(written), "witnesses": rows})
        return
    for name, result in found:
        if isinstance(result, SignerError):
            output.warn(plain(f"{result.text} ({result.code})"))
            output.note(plain(result.hint))
            continue
        output.show(plain(f"{name} cosigned {output.count(size, 'event')} at {timestamp(result.at)}"))
        if result.was_behind:
            output.warn(plain(f"{name} had forgotten what it cosigned before: it was restored, or changed"))
    if written is not None:
        output.show(plain(f"written to {written}"))
