"""What was done to a ledger as a whole, and up to which event: a small file beside it, for `signer status` alone.

Nothing is decided by a mark: whoever may write the ledger's directory may write one. That of a followed copy only keeps
a keeper from writing the copy by mistake.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from signer.files import read_bounded, write_atomically
from signer.units import render_duration, timestamp

VERIFIED: Final = "verified"
BACKED_UP: Final = "backup"
FOLLOWED: Final = "followed"
COSIGNED: Final = "cosigned"  # by so many witnesses as are needed
DIFFERS: Final = "differs"  # from a checkpoint that a witness holds
_LATE_AFTER: Final = {VERIFIED: 7 * 86_400, COSIGNED: 3_600}  # seconds; the runbooks' timers run daily and each 5 min
_LIMIT: Final = 4096  # bytes


@dataclass(frozen=True, slots=True)
class Mark:
    """Up to which event something was done, and when, in seconds since 1970."""

    seq: int
    time: int


def is_late(name: str, mark: Mark, now: int) -> bool:
    """Whether it was done longer ago than it should be (`VERIFIED` or `COSIGNED`); `now` in seconds since 1970."""
    return now - mark.time > _LATE_AFTER[name]


def mark_name(name: str) -> str:
    """The name of the mark's file in the ledger's directory."""
    return f"ledger.{name}"


def write_mark(data_dir: Path, name: str, mark: Mark) -> bool:
    """Replaces the mark; False where this user may not write: the one who verifies need not be the one who writes."""
    content = msgspec.json.encode(mark) + b"\n"
    try:
        write_atomically(data_dir / mark_name(name), content, 0o600, is_shared=True, like=data_dir.stat())
    except OSError:
        return False
    return True


def read_mark(data_dir: Path, name: str) -> Mark | None:
    """The mark; None if there is none, or if it cannot be read as one."""
    try:
        mark = msgspec.json.decode(read_bounded(data_dir / mark_name(name), _LIMIT), type=Mark)
    except (OSError, msgspec.DecodeError):
        return None
    return mark if 0 <= mark.seq < 2**63 and 0 <= mark.time < 2**40 else None


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
