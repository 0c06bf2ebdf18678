"""The Merkle tree over a ledger's events as it is kept: where the views have a subtree, and where events must be read.

`Fold` writes rows of `subtrees` as it folds; nothing is decided by them. Those of archived events are in the ledger.
The leaf of event n is leaf n - 1.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from typing import Final

from signer.ledger.reader import LedgerReader, broken_at
from signer.ledger.schema import TREE_STEP
from signer.ledger.tree import HASH_BYTES, CompactRange, complete_root, leaf_hash

TILE: Final = 1 << TREE_STEP  # events, or subtrees, under one kept row
_HEX: Final = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)
_ROWS: Final = "SELECT hash FROM subtrees WHERE level = ? AND number >= ? AND number < ? ORDER BY number"


def leaves(events: Sequence[tuple[int, str]]) -> list[bytes]:
    """The data of the leaves of events (seq, hash in hex); raises `LedgerBroken` for what is not a hash."""
    digests = [digest for _, digest in events]
    try:
        data = bytes.fromhex("".join(digests))
    except ValueError:
        data = b""
    if len(data) != HASH_BYTES * len(digests) or not all(len(digest) == 2 * HASH_BYTES for digest in digests):
        wrong = next(seq for seq, digest in events if _HEX.fullmatch(digest) is None)
        raise broken_at(wrong, "its hash is not 64 hexadecimal digits")
    return [data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES)]


class TreeReader:
    """Finds hashes of complete subtrees: in `views`, folded up to event `folded`, else by reading events.

    Raises the ledger's errors, and `sqlite3.Error` for the views.
    """

    def __init__(self, ledger: LedgerReader, views: sqlite3.Connection | None, folded: int) -> None:
        self._ledger = ledger
        self._views = views
        self._folded = folded if views is not None else 0

    def node(self, level: int, index: int) -> bytes:
        """The hash of the subtree of 2**`level` events, all of which the ledger has, as `tree.Node`."""
        base = level // TREE_STEP * TREE_STEP
        if level == base and level:
            found = self._kept(level, index, index + 1)
            if found:
                return found[0]
            base -= TREE_STEP
        first, last = index << (level - base), (index + 1) << (level - base)
        return complete_root(self._leaves(first, last) if base == 0 else self._nodes(base, first, last))

    def _nodes(self, level: int, first: int, last: int) -> list[bytes]:
        found = self._kept(level, first, last)
        return found + [self.node(level, index) for index in range(first + len(found), last)]

    def _kept(self, level: int, first: int, last: int) -> list[bytes]:
        """The kept hashes at a level, from number `first` to before `last` or the last that is kept."""
        archived = self._ledger.archived_subtrees(level, first, last)
        first, last = first + len(archived), min(last, self._folded >> level)
        if self._views is None or first >= last:
            return archived
        found = [bytes(digest) for (digest,) in self._views.execute(_ROWS, (level, first, last))]
        if len(found) != last - first:
            raise sqlite3.DatabaseError(f"it lacks subtrees of level {level} from {first} to {last}")
        return archived + found

    def _leaves(self, first: int, last: int) -> list[bytes]:
        found = leaves(self._ledger.hashes(first, last))
        if len(found) != last - first:
            raise broken_at(first + len(found) + 1, "the event is missing")
        return [leaf_hash(data) for data in found]

    def compact(self, size: int) -> CompactRange:
        """The tree of the first `size` events, from which it grows."""
        found = CompactRange()
        while found.size < size:
            level = (size - found.size).bit_length() - 1
            found.append_subtree(self.node(level, found.size >> level), level)
        return found
