"""`signer witness`: the witness that this program can be for logs, its own or others'."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from signer.cli import output
from signer.cli.arguments import FILE, Checked, quoted, read_vkey
from signer.cli.parser import verb

if TYPE_CHECKING:
    from signer.ledger.checkpoint import VerifierKey
    from signer.settings import Listen

_STATE: Final = "/var/lib/signer-witness"
_LISTEN: Final = "127.0.0.1:8333"


def _read_name(word: str) -> str:
    from signer.ledger.checkpoint import is_key_name

    if not is_key_name(word):
        raise ValueError(f"{quoted(word)} is not a name of a witness: one word of at most 255 bytes, without +")
    return word


def _read_log(word: str) -> tuple[str, VerifierKey]:
    """Origin and key of a log: `VKEY`, or `ORIGIN=VKEY` where the key has another name than the log."""
    origin, equals, rest = word.partition("=")
    if not equals or "+" in origin or not origin:
        origin, rest = "", word
    key = read_vkey(rest, of_log=True)
    return origin or key.name, key


def _read_listen(word: str) -> Listen:
    from signer.settings import parse_listen

    listen = parse_listen(word)
    if listen.path is not None:
        raise ValueError(f"{quoted(word)} is not HOST:PORT")
    return listen


_name = click.option(
    "--name", metavar="NAME", required=True, type=Checked("name", _read_name), help="of this witness, such as a host"
)
_state = click.option(
    "--state", metavar="DIR", type=FILE, default=_STATE, help=f"its key and what it cosigned; default: {_STATE}"
)


@verb(
    "witness serve", "signer witness serve --name witness.example.org --log log.example/l+1f2e3d4c+AQ…", is_service=True
)
@_name
@click.option("--log", "logs", metavar="[ORIGIN=]VKEY", multiple=True, required=True, type=Checked("vkey", _read_log),
              help="a log, by its verifier key; repeat for more")  # fmt: skip
@_state
@click.option("--listen", metavar="HOST:PORT", type=Checked("address", _read_listen), default=_LISTEN,
              help=f"default: {_LISTEN}")  # fmt: skip
def witness_serve(name: str, logs: tuple[tuple[str, VerifierKey], ...], state: Path, listen: Listen | str) -> None:
    """Cosigns the checkpoints of the given logs, each only if it goes on from the one before, and keeps a fork
    as evidence (c2sp.org/tlog-witness). Needs no other part of the service: run it on a machine that other
    people administer. It speaks plain http, as all that it sends is signed."""
    import os
    import sys

    from signer.settings import parse_listen
    from signer.witness.server import bind

    place = parse_listen(listen) if isinstance(listen, str) else listen
    listener = bind(place)
    listener.set_inheritable(True)
    words = [str(listener.fileno()), str(place), name, str(state), *(f"{origin}={key}" for origin, key in logs)]
    # The same process goes on without the parser, which takes 3 MB: a witness is to take at most 30.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "signer.cli.witness_process", *words])  # noqa: S606


@verb("witness key", "signer witness key --name witness.example.org")
@_name
@_state
def witness_key(name: str, state: Path, as_json: bool) -> None:
    """Prints the verifier key, which those who check its cosignatures need. The first call makes the key. Run it
    as the user that the witness runs as."""
    from signer.cli.witness_process import open_key
    from signer.witness.state import make_directory

    make_directory(state)
    key, own = open_key(state, name)
    output.show_result({"vkey": str(own), "new": key.is_new}, str(own), as_json=as_json, exactly=True)


@verb("witness list", "signer witness list")
@_state
def witness_list(state: Path, as_json: bool) -> int:
    """Shows the newest checkpoint that was cosigned for each log, and how many were refused and kept: forks,
    which are two checkpoints of one size, and others, whose proof was wrong. Reads files, also while the
    witness runs; no signature is checked. Exit status 1 if a fork was kept."""
    from signer.units import timestamp
    from signer.witness.state import list_states

    found = list_states(state)
    logs = [
        {
            "origin": one.origin,
            "size": one.size,
            "root": one.root.hex(),
            "cosigned": timestamp(one.at),
            "forks": [path.name for path in one.forks],
            "refused": [path.name for path in one.refused],
        }
        for one in found
    ]
    titles = ("SIZE", "COSIGNED", "FORKS", "REFUSED", "ORIGIN")
    rows = [(one.size, timestamp(one.at), len(one.forks), len(one.refused), one.origin) for one in found]
    output.show_rows({"logs": logs}, titles, rows, "no checkpoint has been cosigned", as_json=as_json)
    return 1 if any(one.forks for one in found) else 0
