"""A ledger with a key for checkpoints, and a checkpoint of it that a witness has cosigned."""

from __future__ import annotations

import json
from contextlib import closing
from hashlib import sha256
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from signer.ca.key import ServiceKey
from signer.ledger.audit import export
from signer.ledger.checkpoint import COSIGNATURE_KIND, NOTE_KIND, Checkpoint, Note, VerifierKey, cosign, sign_note
from signer.ledger.origin import origins
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME, VIEWS_NAME
from signer.ledger.store import Ledger
from signer.model import Event

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
    ledger.fold_all()
    head = ledger.folded_tree()
    assert head is not None
    checkpoint = Checkpoint(origins(ledger, setting)[-1], *head)
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
        ledger.fold_all()
    for name in (FILE_NAME, VIEWS_NAME):
        for part in (name, f"{name}-wal", f"{name}-shm"):
            (data / part).unlink(missing_ok=True)
        (new / name).rename(data / name)
