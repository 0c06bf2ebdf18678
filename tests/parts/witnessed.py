"""A ledger with a key for checkpoints, and a checkpoint of it that a witness has cosigned."""

from __future__ import annotations

import json
import os
import time
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from signer.ca.service_key import ServiceKey
from signer.ledger.audit import export
from signer.ledger.checkpoint import (
    COSIGNATURE_KIND,
    NOTE_KIND,
    Checkpoint,
    Note,
    VerifierKey,
    cosign,
    parse_note,
    sign_note,
)
from signer.ledger.fold import fold_all
from signer.ledger.origin import origins
from signer.ledger.pages import CertificateReader
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME, VIEWS_NAME
from signer.ledger.store import Ledger
from signer.model import Event
from signer.witness.client import Answer
from signer.witness.remote import HttpWitness, ServiceLog
from signer.witness.state import State, claim_state, group_logs
from signer.witness.witness import Witness

COSIGNED_AT = 1_740_000_600


def made_key(name: str) -> ServiceKey:
    """A key that is the same in every run."""
    return ServiceKey(
        Ed25519PrivateKey.from_private_bytes(sha256(name.encode()).digest()), f"signer-{name}", is_new=False
    )


LOG, WITNESS = made_key("ledger"), made_key("witness")
WITNESS_KEY = VerifierKey("witness.example.org", COSIGNATURE_KIND, WITNESS.raw_public)


def record_key(ledger: Ledger, key: ServiceKey = LOG, time_ms: int = 1_740_000_500_000) -> None:
    ledger.commit([Event("ledger.key", "keeper", {"public_key": key.line})], time_ms)


def checkpoint_of(
    ledger: Ledger, setting: str | None = None, key: ServiceKey = LOG, at: int | None = COSIGNED_AT
) -> bytes:
    """A checkpoint of all events, signed by the ledger's key, and cosigned at a time in seconds."""
    head = fold_all(ledger)
    checkpoint = Checkpoint(origins(ledger, setting)[-1], head.seq, head.root)
    text = checkpoint.text
    lines = [sign_note(text, VerifierKey(checkpoint.origin, NOTE_KIND, key.raw_public), key.sign)]
    if at is not None:
        lines.append(cosign(text, at, WITNESS_KEY, WITNESS.sign))
    return Note(text, tuple(lines)).render()


def play_witnessed(folder: Path, word: str) -> None:
    """Records the key in the ledger of `folder`/data, and writes `checkpoint` and, of another ledger, `foreign`; or, if
    `word` is `rewritten`, gives the ledger another history."""
    if word == "rewritten":
        rewrite(folder / "data", {6: {"reason": "nothing"}})
        return
    with closing(Ledger(folder / "data")) as ledger:
        record_key(ledger)
        (folder / "checkpoint").write_bytes(checkpoint_of(ledger))
        (folder / "foreign").write_bytes(checkpoint_of(ledger, "other.example.org/ledger"))


def play_witnessing(environ: pytest.MonkeyPatch, folder: Path) -> None:
    """Has the ledger of `folder`/data, and a witness with its state in `folder`/state, answer in this process for the
    service and for each witness that is asked over HTTP."""
    with closing(LedgerReader(folder / "data")) as reader:
        own = VerifierKey(origins(reader, None)[-1], NOTE_KIND, LOG.raw_public)
    known = group_logs([(own.name, own)])
    os.close(claim_state(folder / "state"))
    witness = Witness(State(folder / "state", known, WITNESS_KEY), known, WITNESS_KEY, WITNESS.sign, clock=time.time)

    def answer(_: HttpWitness, path: str, body: bytes | None = None) -> Answer:
        response = witness.answer("GET" if body is None else "POST", path, body or b"")
        return Answer(response.status, response.body)

    def checkpoint(_: ServiceLog) -> Note:
        with closing(Ledger(folder / "data")) as ledger:
            return parse_note(checkpoint_of(ledger, at=None))

    def proof(_: ServiceLog, old: int, new: int) -> list[bytes]:
        with closing(CertificateReader(folder / "data")) as reader:
            return reader.consistency(old, new)

    environ.setattr(HttpWitness, "ask", answer)
    environ.setattr(ServiceLog, "checkpoint", checkpoint)
    environ.setattr(ServiceLog, "proof", proof)


def rewrite(data: Path, forge: dict[int, dict[str, object]], *, keep: int | None = None) -> None:
    """Replaces the ledger by another with valid hashes, as root can: events `forge` get these fields in their bodies,
    and only the first `keep` stay."""
    with closing(LedgerReader(data)) as reader:
        entries = list(export(reader))[:keep]
    new = data / "new"
    new.mkdir(mode=0o700)
    with closing(Ledger(new)) as ledger:
        for entry in entries:
            body = {**json.loads(entry.body), **forge.get(entry.seq, {})}
            ledger.commit([Event(entry.kind, entry.actor, body)], entry.time_ms)
        fold_all(ledger)
    for name in (FILE_NAME, VIEWS_NAME):
        for part in (name, f"{name}-wal", f"{name}-shm"):
            (data / part).unlink(missing_ok=True)
        (new / name).rename(data / name)
