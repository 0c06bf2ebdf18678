"""How old the newest cosigned checkpoint of the ledger is, from the marks of `signer ledger witness`."""

from __future__ import annotations

from pathlib import Path

from signer.ledger.marks import COSIGNED, DIFFERS, is_late, read_mark
from signer.units import render_duration, timestamp


def cosigning_warnings(data_dir: Path, now: int) -> dict[str, str]:
    """What should not stay as it is, by a stable name; nothing where no witness was ever asked."""
    found = {}
    if (differs := read_mark(data_dir, DIFFERS)) is not None:
        found["witness_differs"] = (
            f"a witness held another history of the ledger at {timestamp(differs.time)}: see runbooks/ledger.md; "
            "delete ledger.differs in SIGNER_DATA_DIR when that is resolved"
        )
    cosigned = read_mark(data_dir, COSIGNED)
    if cosigned is not None and is_late(COSIGNED, cosigned, now):
        ago = render_duration(now - cosigned.time)
        found["witness_late"] = f"the ledger was last cosigned {ago} ago: run `signer ledger witness`"
    return found
