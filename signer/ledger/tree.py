"""The Merkle tree over a ledger's entries: roots, inclusion and consistency proofs (RFC 6962 section 2.1). Pure.

A leaf's data are the 32 bytes of an entry's hash. A `Node` function gives the hash of a complete subtree, wherever it
is kept or computed; whoever checks a proof needs none. Nothing here knows SQLite, keys or notes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from typing import Final

from signer.errors import BadProof

HASH_BYTES: Final = 32
MAX_SIZE: Final = 2**63 - 1  # leaves
MAX_PROOF: Final = 63  # hashes; c2sp.org/tlog-witness allows as many lines
EMPTY_ROOT: Final = sha256(b"").digest()  # of a tree without leaves

Node = Callable[[int, int], bytes]
"""The hash of the complete subtree of 2**level leaves that begins at leaf index * 2**level, by level and index."""
Subtree = tuple[int, int, bytes]  # level, index, hash


def leaf_hash(data: bytes) -> bytes:
    return sha256(b"\0" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return sha256(b"\1" + left + right).digest()


def complete_root(hashes: Sequence[bytes]) -> bytes:
    """The root of a complete subtree from the hashes of all its nodes at one level, a power of two of them."""
    while len(hashes) > 1:
        hashes = _parents(hashes)
    return hashes[0]


def _parents(hashes: Sequence[bytes]) -> list[bytes]:
    """The hashes of the nodes above pairs of others; what `node_hash` does, without a call for each."""
    pairs = iter(hashes)
    return [sha256(b"\1" + left + right).digest() for left, right in zip(pairs, pairs, strict=True)]


class CompactRange:
    """The complete subtrees that make up the first `size` leaves: what a tree needs to grow. At most 63 hashes."""

    __slots__ = ("_hashes", "size")

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        """`hashes` are those of the subtrees from left to right, one for each bit of `size` that is 1."""
        if len(hashes) != size.bit_count():
            raise ValueError(f"{size} leaves are {size.bit_count()} complete subtrees, not {len(hashes)}")
        self.size = size
        self._hashes = list(hashes)

    def append(self, data: bytes) -> None:
        self.append_subtree(leaf_hash(data), 0)

    def append_subtree(self, digest: bytes, level: int) -> None:
        """Adds a complete subtree of 2**`level` leaves, of whose size `size` must be a multiple."""
        if self.size & ((1 << level) - 1):
            raise ValueError(f"a subtree of level {level} cannot begin at leaf {self.size}")
        rest = self.size >> level
        while rest & 1:
            digest = node_hash(self._hashes.pop(), digest)
            rest >>= 1
        self._hashes.append(digest)
        self.size += 1 << level

    def extend(self, leaves: Iterable[bytes], step: int) -> list[Subtree]:
        """Adds leaves by their data; returns the subtrees of every `step` levels that they complete, smallest first.

        Hashes level by level, not leaf by leaf: with 100 leaves at once that takes a fifth less.
        """
        row = [sha256(b"\0" + data).digest() for data in leaves]
        level, first = 0, self.size  # `row` holds the nodes of `level` from number `first` on
        self.size += len(row)
        alone, found = list[bytes](), list[Subtree]()
        while row:
            if first & 1:  # the node before it is the left one of a pair
                row.insert(0, self._hashes.pop())
            if len(row) & 1:
                alone.append(row.pop())
            row, first, level = _parents(row), first >> 1, level + 1
            if level % step == 0:
                found += [(level, number, digest) for number, digest in enumerate(row, first)]
        self._hashes += reversed(alone)
        return found

    def to_bytes(self) -> bytes:
        """The hashes, one after the other."""
        return b"".join(self._hashes)

    def root(self) -> bytes:
        return _join(self._hashes)


def _join(hashes: Sequence[bytes]) -> bytes:
    """The root over complete subtrees that become smaller from left to right."""
    *left, digest = hashes or [EMPTY_ROOT]
    for one in reversed(left):
        digest = node_hash(one, digest)
    return digest


def _range_root(start: int, end: int, node: Node) -> bytes:
    """The root over the leaves from `start` up to `end`; `start` is a multiple of the largest subtree among them."""
    hashes = []
    while start < end:
        level = (end - start).bit_length() - 1
        hashes.append(node(level, start >> level))
        start += 1 << level
    return _join(hashes)


def _split(count: int) -> int:
    """The largest power of two below `count`, which is 2 or more."""
    return 1 << ((count - 1).bit_length() - 1)


def tree_root(size: int, node: Node) -> bytes:
    """The root of the tree of the first `size` leaves (RFC 6962 section 2.1)."""
    return _range_root(0, size, node)


def inclusion_proof(index: int, size: int, node: Node) -> list[bytes]:
    """The hashes that lead from leaf `index`, counted from 0, to the root over `size` leaves (section 2.1.1)."""
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has no leaf {index}")
    proof: list[bytes] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            proof.append(_range_root(middle, end, node))
            end = middle
        else:
            proof.append(_range_root(start, middle, node))
            start = middle
    return proof[::-1]


def consistency_proof(old: int, new: int, node: Node) -> list[bytes]:
    """The hashes that show that the tree of `new` leaves begins with that of `old` (section 2.1.2).

    Empty if `old` is 0 or `new`; c2sp.org/tlog-witness wants it so.
    """
    if not 0 <= old <= new:
        raise ValueError(f"a tree of {new} leaves does not begin with one of {old}")
    if old in (0, new):
        return []
    proof: list[bytes] = []
    start, end = 0, new
    while old < end:
        middle = start + _split(end - start)
        if old <= middle:
            proof.append(_range_root(middle, end, node))
            end = middle
        else:
            proof.append(_range_root(start, middle, node))
            start = middle
    if start:  # else the old root itself, which whoever checks it has
        proof.append(_range_root(start, end, node))
    return proof[::-1]


def check_inclusion(leaf: bytes, index: int, size: int, root: bytes, proof: Sequence[bytes]) -> None:
    """Raises `BadProof` unless leaf `index` (from 0) of the tree with this size and root has the hash `leaf`.

    RFC 9162 section 2.1.3.2.
    """
    if not 0 <= index < size:
        raise BadProof("proof_malformed", f"a tree of {size} entries has no leaf {index}")
    _check_hashes(proof)
    here, last, digest = index, size - 1, leaf
    for other in proof:
        if last == 0:
            raise _wrong("inclusion")
        if here & 1 or here == last:
            digest = node_hash(other, digest)
            while not here & 1 and here:
                here, last = here >> 1, last >> 1
        else:
            digest = node_hash(digest, other)
        here, last = here >> 1, last >> 1
    if last or digest != root:
        raise _wrong("inclusion")


def check_consistency(old: int, old_root: bytes, new: int, new_root: bytes, proof: Sequence[bytes]) -> None:
    """Raises `BadProof` unless the tree of `new` leaves begins with that of `old`, by their roots.

    RFC 9162 section 2.1.4.2. Of size 0 there is only one tree, which all others begin with, without a proof.
    """
    if not 0 <= old <= new:
        raise BadProof("proof_malformed", f"a tree of {new} entries does not begin with one of {old}")
    _check_hashes(proof)
    if old in (0, new):
        is_good = not proof and (old_root == EMPTY_ROOT if old == 0 else old_root == new_root)
        if not is_good or (new == 0 and new_root != EMPTY_ROOT):
            raise _wrong("consistency")
        return
    path = list(proof) if old & (old - 1) else [old_root, *proof]
    if not path:
        raise _wrong("consistency")
    here, last = old - 1, new - 1
    while here & 1:
        here, last = here >> 1, last >> 1
    old_digest = new_digest = path[0]
    for other in path[1:]:
        if last == 0:
            raise _wrong("consistency")
        if here & 1 or here == last:
            old_digest = node_hash(other, old_digest)
            new_digest = node_hash(other, new_digest)
            while not here & 1 and here:
                here, last = here >> 1, last >> 1
        else:
            new_digest = node_hash(new_digest, other)
        here, last = here >> 1, last >> 1
    if last or old_digest != old_root or new_digest != new_root:
        raise _wrong("consistency")


def _check_hashes(proof: Sequence[bytes]) -> None:
    if len(proof) > MAX_PROOF:
        raise BadProof("proof_malformed", f"the proof has {len(proof)} hashes; {MAX_PROOF} is the most that one needs")
    if any(len(digest) != HASH_BYTES for digest in proof):
        raise BadProof("proof_malformed", f"a hash of the proof does not have {HASH_BYTES} bytes")


def _wrong(what: str) -> BadProof:
    return BadProof("proof_wrong", f"the {what} proof does not lead to the given root")
