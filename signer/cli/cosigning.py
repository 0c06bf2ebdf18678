"""`signer ledger witness`: has witnesses cosign the newest checkpoint, and keeps it where `ledger verify` takes it."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from signer.cli import output
from signer.cli.arguments import FILE, Checked, json_option, quoted, read_settings, whole
from signer.cli.checkpoints import read_witness
from signer.cli.connection import address_option, open_public
from signer.cli.parser import verb
from signer.cli.usage import UsageError
from signer.errors import NotFound, SignerError
from signer.units import plain, timestamp

if TYPE_CHECKING:
    from signer.ledger.checkpoint import VerifierKey
    from signer.witness.cosign import Round


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
    from signer.ledger.origin import ledger_keys, origins
    from signer.witness.cosign import run_round
    from signer.witness.remote import HttpWitness, ServiceLog
    from signer.witness.state import Log

    needed = len(keys) if quorum is None else quorum
    _check(addresses, keys, needed)
    with reading() as reader:
        data_dir = reader.data_dir
        origin = origins(reader, read_settings().ledger_origin)[-1]
        log = Log(origin, tuple(ledger_keys(reader, origin)))
    if not log.keys:
        raise NotFound("ledger_key_missing", "the ledger has no key for checkpoints yet", "start the keeper once")
    with open_public(address) as api, ExitStack() as remotes:
        asked = [
            (remotes.enter_context(closing(HttpWitness(one))), key) for one, key in zip(addresses, keys, strict=True)
        ]
        done = run_round(ServiceLog(api, log), asked, needed, out, data_dir, int(time.time()))
    _show(done, out, as_json=as_json)
    if not done.is_noted:
        output.note("`signer status` does not show it: this user may not write to SIGNER_DATA_DIR")
    return 0 if done.is_written and not done.differs else 1


def _check(addresses: tuple[str, ...], keys: tuple[VerifierKey, ...], needed: int) -> None:
    """Raises `UsageError` unless each address has a key of its own."""
    if len(addresses) != len(keys):
        raise UsageError(f"{len(addresses)} of --to and {len(keys)} of --witness are given", "give one key for each")
    if len(set(keys)) != len(keys) or len(set(addresses)) != len(addresses):
        raise UsageError("a witness is given twice", "name each of them once")
    if needed > len(keys):
        raise UsageError(f"--quorum is {needed}, but {len(keys)} witnesses are given", "give more, or fewer")


def _show(done: Round, out: Path, *, as_json: bool) -> None:
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
