"""A log with a key and entries of its own, and the requests that it sends to a witness."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from signer.ledger.checkpoint import (
    COSIGNATURE_KIND,
    NOTE_KIND,
    Checkpoint,
    Note,
    VerifierKey,
    sign_note,
)
from signer.ledger.tree import CompactRange, complete_root, consistency_proof, leaf_hash
from signer.witness.client import render_request
from signer.witness.state import State, claim_state, group_logs
from signer.witness.witness import Witness


def private_key(name: str) -> Ed25519PrivateKey:
    """The same key for the same name."""
    return Ed25519PrivateKey.from_private_bytes(sha256(name.encode()).digest())


def witness_key(name: str) -> tuple[Ed25519PrivateKey, VerifierKey]:
    """A witness's key, and the line that it is known by."""
    key = private_key(name)
    return key, VerifierKey(name, COSIGNATURE_KIND, key.public_key().public_bytes_raw())


@dataclass
class SmallLog:
    """A log of at most some hundred entries; `fork_at` is the first entry that differs from those of other logs."""

    origin: str = "log.example/ledger"
    key_name: str = "log.example/ledger"
    fork_at: int | None = None
    word: str = "fork"
    extensions: tuple[str, ...] = ()
    key: Ed25519PrivateKey = field(init=False)

    def __post_init__(self) -> None:
        self.key = private_key(self.key_name)

    @property
    def vkey(self) -> VerifierKey:
        return VerifierKey(self.key_name, NOTE_KIND, self.key.public_key().public_bytes_raw())

    def _leaf(self, index: int) -> bytes:
        is_other = self.fork_at is not None and index >= self.fork_at
        return f"{self.word if is_other else 'entry'} {index}".encode()

    def _node(self, level: int, index: int) -> bytes:
        first, last = index << level, (index + 1) << level
        return complete_root([leaf_hash(self._leaf(one)) for one in range(first, last)])

    def checkpoint(self, size: int) -> Checkpoint:
        grown = CompactRange()
        for index in range(size):
            grown.append(self._leaf(index))
        return Checkpoint(self.origin, size, grown.root(), self.extensions)

    def note(self, size: int) -> Note:
        """The signed checkpoint of the first `size` entries."""
        text = self.checkpoint(size).text
        return Note(text, (sign_note(text, self.vkey, self.key.sign),))

    def proof(self, old: int, new: int) -> list[bytes]:
        return consistency_proof(old, new, self._node) if 0 < old < new else []

    def request(self, old: int, new: int, *, proof: list[bytes] | None = None) -> bytes:
        """The body of `POST /add-checkpoint`."""
        return render_request(old, self.proof(old, new) if proof is None else proof, self.note(new))


def fill_state(folder: Path) -> None:
    """The state of a witness that cosigned five entries of a log in 2025, and refused two checkpoints after that."""
    log, rewritten = SmallLog(), SmallLog(fork_at=3)
    key, own = witness_key("witness.example")
    os.close(claim_state(folder))
    text = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    (folder / "witness.key").write_bytes(text)
    (folder / "witness.key").chmod(0o600)
    known = group_logs([(log.origin, log.vkey)])
    witness = Witness(State(folder, known, own), known, own, key.sign, clock=lambda: 1_740_000_000)
    for body in (log.request(0, 5), rewritten.request(5, 5), rewritten.request(5, 8)):
        witness.answer("POST", "/add-checkpoint", body)
