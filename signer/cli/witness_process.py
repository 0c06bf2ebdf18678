"""The process that `signer witness serve` becomes: the witness, without the parser of the command line.

It imports nothing that a witness does not need: a witness is to take at most 30 megabytes.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from signer.ca.service_key import ServiceKey
from signer.cli import output
from signer.errors import SignerError
from signer.hardening import forbid_dumps, release_memory
from signer.ledger.checkpoint import COSIGNATURE_KIND, VerifierKey, parse_vkey
from signer.service.logs import start_log
from signer.witness.server import Server
from signer.witness.state import State, claim_state, group_logs
from signer.witness.witness import Witness


def main(words: Sequence[str]) -> int:
    """Serves until a signal ends it; returns the exit status.

    `words` are the listener's descriptor and address, name, state directory, and each log as `ORIGIN=VKEY`.
    """
    output.prepare()
    descriptor, place, name, state, *logs = words
    try:
        serve(socket.socket(fileno=int(descriptor)), place, name, Path(state), logs)
    except SignerError as error:
        output.report_error(error)
        return 1
    return 0


def serve(listener: socket.socket, place: str, name: str, state: Path, logs: Sequence[str]) -> None:
    """Serves until a signal; raises `SignerError` if the state or the key cannot be used."""
    start_log()
    forbid_dumps()
    listener.set_inheritable(False)
    named = (log.partition("=") for log in logs)
    known = group_logs([(origin, parse_vkey(key)) for origin, _, key in named])
    claim_state(state)  # until the process ends
    key, own = open_key(state, name)
    server = Server(listener, Witness(State(state, known, own), known, own, key.sign).answer)
    output.note(f"serving on {place}, for {output.count(len(known), 'log')}")
    release_memory()
    server.serve()


def open_key(state: Path, name: str) -> tuple[ServiceKey, VerifierKey]:
    """The witness's key in its state directory, made if it is not there, and the line that it is known by."""
    key = ServiceKey.open(state / "witness.key", "--state")
    return key, VerifierKey(name, COSIGNATURE_KIND, key.raw_public)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
