"""Checkpoints of the ledger as the keeper gives them out: the head of the folded tree, signed by the ledger key."""

from __future__ import annotations

from signer.ca.service_key import ServiceKey
from signer.errors import Unavailable
from signer.ledger.checkpoint import NOTE_KIND, Checkpoint, Note, VerifierKey, sign_note
from signer.ledger.fold import FoldedHead
from signer.ledger.origin import origins
from signer.ledger.store import Ledger


class Checkpoints:
    """Signs each size of the ledger once, when it is asked for. Two checkpoints of one size are always the same."""

    def __init__(self, ledger: Ledger, key: ServiceKey, setting: str | None) -> None:
        """`setting` is SIGNER_LEDGER_ORIGIN, None for the name that the ledger has by itself."""
        self._ledger = ledger
        self._key = key
        self._setting = setting
        self._newest: FoldedHead | None = None
        self._note = ""

    def newest(self, head: FoldedHead | None) -> str:
        """The signed note for what is folded; raises `Unavailable` if that is nothing, or not of this ledger.

        Another process folds. The hash of an event stands for all events before it, so that a file which was put in the
        ledger's place for a moment cannot become a fork that no witness ever forgets.
        """
        if head is None or head.seq == 0:
            raise Unavailable("checkpoint_not_ready", "no events have been folded yet", "retry in a second")
        if head != self._newest:
            if self._ledger.hash_at(head.seq) != head.hash:
                text = f"event {head.seq} was folded from another ledger"
                raise Unavailable("checkpoint_not_ready", text, "retry in a second; the events are folded again")
            origin = origins(self._ledger, self._setting)[-1]
            text = Checkpoint(origin, head.seq, head.root).text
            key = VerifierKey(origin, NOTE_KIND, self._key.raw_public)
            self._note = Note(text, (sign_note(text, key, self._key.sign),)).render().decode()
            self._newest = head
        return self._note
