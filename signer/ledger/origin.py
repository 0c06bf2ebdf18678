"""What a ledger is called among logs, and which keys have signed its checkpoints; read from its events.

An origin stands for one history. So a ledger that was restored or promoted, whose newest events may be lost, goes on
under a new one: its event `ledger.restored` names the lost head, and the end of the origin names that event.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator

from signer.errors import Unavailable
from signer.ledger.checkpoint import NOTE_KIND, VerifierKey
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import IS_RESTORED, IS_SERVICE_KEY

LEDGER_KEY = "ledger.key"  # the file in SIGNER_DATA_DIR; the kind of its event is the same
_DIGITS = 16  # of the first event's hash, in the name of a ledger without SIGNER_LEDGER_ORIGIN


def origins(reader: LedgerReader, setting: str | None) -> list[str]:
    """All names that the ledger has had, the present one last. `setting` is SIGNER_LEDGER_ORIGIN.

    Raises `Unavailable` for a ledger without events, and the ledger's errors.
    """
    base = setting
    if base is None:
        first = reader.hash_at(1)
        if first is None:
            raise Unavailable("checkpoint_not_ready", "the ledger has no events yet", "start the keeper once")
        base = f"signer-ledger/{first[:_DIGITS]}"
    restored = reader.query(f"SELECT seq, hash FROM events WHERE {IS_RESTORED} ORDER BY seq")  # noqa: S608
    return [base, *(f"{base}/restored-{seq}-{digest[:8]}" for seq, digest in restored)]


def ledger_keys(reader: LedgerReader, origin: str) -> list[VerifierKey]:
    """The keys that the ledger has recorded for its checkpoints, oldest first, as verifier keys under this origin."""
    rows = reader.query(
        f"SELECT body ->> 'public_key' FROM events WHERE {IS_SERVICE_KEY} AND kind = ? ORDER BY seq",  # noqa: S608
        (LEDGER_KEY,),
    )
    return [VerifierKey(origin, NOTE_KIND, key) for (line,) in rows for key in _raw_key(str(line))]


def _raw_key(line: str) -> Iterator[bytes]:
    """The 32 bytes of a line `ssh-ed25519 AAAA… comment` (RFC 8709 section 4); nothing for any other line."""
    kind, _, rest = line.partition(" ")
    try:
        blob = binascii.a2b_base64(rest.partition(" ")[0], strict_mode=True)
    except ValueError:
        return
    if kind == "ssh-ed25519" and len(blob) == 51:
        yield blob[-32:]
