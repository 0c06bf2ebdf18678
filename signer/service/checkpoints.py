"""Checkpoints of the ledger as the keeper gives them out: the head of the folded tree, signed by the ledger key."""

from __future__ import annotations

from signer.ca.service_key import ServiceKey
from signer.errors import Unavailable
from signer.ledger.checkpoint import NOTE_KIND, Checkpoint, Note, VerifierKey, sign_note
from signer.ledger.origin import origins
from signer.ledger.store import Ledger


class Checkpoints:
    """Signs each size of the ledger once, when it is asked for. Two checkpoints of one size are always the same."""

    def __init__(self, ledger: Ledger, key: ServiceKey, setting: str | None) -> None:
        """`setting` is SIGNER_LEDGER_ORIGIN, None for the name that the ledger has by itself."""
        self._ledger = ledger
        self._key = key
        self._setting = setting
        self._newest: tuple[int, bytes] | None = None
        self._note = ""

    def newest(self) -> str:
        """The signed note for the newest folded event; raises `Unavailable` while there is none."""
        head = self._ledger.folded_tree()
        if head is None or head[0] == 0:
            raise Unavailable("checkpoint_not_ready", "no events have been folded yet", "retry in a second")
        if head != self._newest:
            size, root = head
            origin = origins(self._ledger, self._setting)[-1]
            text = Checkpoint(origin, size, root).text
            key = VerifierKey(origin, NOTE_KIND, self._key.raw_public)
            self._note = Note(text, (sign_note(text, key, self._key.sign),)).render().decode()
            self._newest = head
        return self._note
