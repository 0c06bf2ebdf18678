"""The Merkle tree against another implementation's, against the words of RFC 6962, and against forged proofs."""

from __future__ import annotations

import random
from base64 import b64decode
from functools import lru_cache
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymerkle import InmemoryTree

from signer.errors import BadProof
from signer.ledger.tree import (
    EMPTY_ROOT,
    MAX_PROOF,
    CompactRange,
    check_consistency,
    check_inclusion,
    complete_root,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    tree_root,
)

ALL_SIZES = 300
LARGE = 1_000_000

# The tree of eight leaves that Certificate Transparency's implementations test with: their data, and the root of each
# size from 0 on.
CT_LEAVES = [
    bytes.fromhex(text)
    for text in (
        "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
    )
]  # fmt: skip
CT_ROOTS = [
    b64decode(text)
    for text in (
        "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=",
        "bjQLnP+zepicpUTmu3gKLHiQHT+zNzh2hRGjBhevoB0=",
        "+sVCA+fMaWzw38tCySodnbr3CtnmIfS9jZhmLwDjwSU=",
        "rra8/idLcKFPsGel5VeCZNsPqbUa9eC6FZFY8yngbnc=",
        "037kGJdt2VdTwcc4Yrk5j6Kiz5tP8P3+izDNlSCWFLc=",
        "Tju7H3tHjc/nH7YxYxUZo7yhLJrvyhYSv85ME6hiZNQ=",
        "duZ9rbzfHhDht03cYIq9L5jfsW+851J3tSMqEn8gh+8=",
        "3bib5AOAnjJXUNPSY814kpwpQreUKjS3fhIslZSnTIw=",
        "XcnaeacGWamtVZy3Ad7ZoqudgjqtL0lgz+Nw7/RgQyg=",
    )
]


class Tree:
    """Leaves in memory with every complete subtree over them."""

    def __init__(self, leaves: list[bytes]) -> None:
        self.leaves = leaves
        self.levels = [[leaf_hash(leaf) for leaf in leaves]]
        while len(self.levels[-1]) > 1:
            pairs = iter(self.levels[-1])
            self.levels.append([node_hash(left, right) for left, right in zip(pairs, pairs, strict=False)])

    def node(self, level: int, index: int) -> bytes:
        return self.levels[level][index]

    def root(self, size: int) -> bytes:
        return tree_root(size, self.node)


@pytest.fixture(scope="module")
def small() -> Tree:
    return Tree([sha256(b"%d" % number).digest() for number in range(ALL_SIZES)])


@lru_cache(maxsize=1)
def large() -> Tree:
    return Tree([number.to_bytes(32) for number in range(LARGE)])


@pytest.fixture(scope="module")
def oracle(small: Tree) -> InmemoryTree:
    tree = InmemoryTree(algorithm="sha256")
    for leaf in small.leaves:
        tree.append_entry(leaf)
    return tree


def test_roots_of_certificate_transparency() -> None:
    tree, grown = Tree(CT_LEAVES), CompactRange()
    assert CT_ROOTS[0] == EMPTY_ROOT == grown.root()
    for size, leaf in enumerate(CT_LEAVES, 1):
        grown.append(leaf)
        assert tree.root(size) == grown.root() == CT_ROOTS[size]
    assert complete_root(tree.levels[0]) == CT_ROOTS[8]


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 3))
def test_a_tree_that_grows_by_many_leaves_at_once_is_the_one_that_grows_leaf_by_leaf(
    small: Tree, sizes: list[int], step: int
) -> None:
    leaves, one_by_one, at_once = small.leaves[:ALL_SIZES], CompactRange(), CompactRange()
    found = []
    for size in sizes:
        part, leaves = leaves[:size], leaves[size:]
        for leaf in part:
            one_by_one.append(leaf)
        found += at_once.extend(part, step)
        assert (at_once.size, at_once.to_bytes()) == (one_by_one.size, one_by_one.to_bytes())
    kept = range(step, at_once.size.bit_length(), step)
    wanted = {(level, number, small.node(level, number)) for level in kept for number in range(at_once.size >> level)}
    assert (len(found), set(found)) == (len(wanted), wanted)


def test_proofs_of_certificate_transparency() -> None:
    tree = Tree(CT_LEAVES)
    proof = [
        b64decode(text)
        for text in (
            "DrxdNDf74tsVi58Sah0RjjCBgQMdCpSfje3t68VY72o=",
            "yoVOoSjtBQtBs1/8G4e46yveRh6eO1WW7Oa51ZdaCuA=",
            "037kGJdt2VdTwcc4Yrk5j6Kiz5tP8P3+izDNlSCWFLc=",
        )
    ]
    assert consistency_proof(6, 8, tree.node) == proof
    check_consistency(6, CT_ROOTS[6], 8, CT_ROOTS[8], proof)
    proof[0] = b64decode("vBoGQ7EuTS18d5GPROD095qDi2z57FtcKD4fTYhZnms=")
    assert inclusion_proof(5, 8, tree.node) == proof
    check_inclusion(leaf_hash(CT_LEAVES[5]), 5, 8, CT_ROOTS[8], proof)


def test_the_last_leaf_of_a_log_that_another_program_serves() -> None:
    """Tessera's log of 76,959 entries, as project-oak/oak tests with it."""
    proof = [
        b64decode(text)
        for text in (
            "fGRlLyuz+L9Jb8+uTSut/2aVc4z7fKFW+clvsb6xjEM=",
            "F6LautOHD5eppkWC0xn/lz00X5g2yLlZAkl2jCI/wdE=",
            "qH7OJxFNup+TDvJuohd2HphKVngfMeMzUK8QChEDcas=",
            "+Y3g758yXtPCRh/eqhLTA3bdcx+cCV1Uah0JdgB0YEs=",
            "vq8cJSjj8dPVmFBRUqDLlaMqW6aAYR2GKugVhgudXLs=",
            "J0z3X5qTb9WFC1gABhVFx0bW1rVZRL+DAoBL2e2h4G4=",
            "NmSbYg25xNFzTRerIsF3HbEMyTIDqW87AQd9ekzopE8=",
            "L8BZipjURnkctkjJtGJs+YyTXMssvNKA7+a8nV2JT/s=",
            "pva4RFzCejMkVMVmYc93As2lbk7WAyrw58TvrzEOjNc=",
        )
    ]
    root = b64decode("QYfrD7XAd4qUHbRBs4dDyDZwpZN4M/cccXr2G56pxkY=")
    check_inclusion(leaf_hash(b"hello tesseroak\n"), 76_958, 76_959, root, proof)


def test_another_implementation_has_the_same_roots_and_proofs(small: Tree, oracle: InmemoryTree) -> None:
    """Its consistency proofs have another form than RFC 6962's; so ours lead from one of its roots to the other."""
    grown = CompactRange()
    chosen = random.Random(1)
    for size, leaf in enumerate(small.leaves, 1):
        grown.append(leaf)
        assert oracle.get_root(size) == small.root(size) == grown.root()
        for index in {0, size - 1, size // 2, chosen.randrange(size)}:
            found = inclusion_proof(index, size, small.node)
            assert oracle.prove_inclusion(index + 1, size).path[1:] == found
        for old in {1, size // 2, size - 1, chosen.randrange(size)} - {0, size}:
            proof = consistency_proof(old, size, small.node)
            check_consistency(old, oracle.get_root(old), size, oracle.get_root(size), proof)


def _path_by_the_rfc(index: int, hashes: list[bytes]) -> list[bytes]:
    """RFC 6962 section 2.1.1, word for word."""
    if len(hashes) == 1:
        return []
    k = 1 << ((len(hashes) - 1).bit_length() - 1)
    if index < k:
        return [*_path_by_the_rfc(index, hashes[:k]), _root_by_the_rfc(hashes[k:])]
    return [*_path_by_the_rfc(index - k, hashes[k:]), _root_by_the_rfc(hashes[:k])]


def _root_by_the_rfc(hashes: list[bytes]) -> bytes:
    if len(hashes) == 1:
        return hashes[0]
    k = 1 << ((len(hashes) - 1).bit_length() - 1)
    return node_hash(_root_by_the_rfc(hashes[:k]), _root_by_the_rfc(hashes[k:]))


def _proof_by_the_rfc(old: int, hashes: list[bytes], *, is_whole: bool = True) -> list[bytes]:
    """RFC 6962 section 2.1.2, word for word."""
    if old == len(hashes):
        return [] if is_whole else [_root_by_the_rfc(hashes)]
    k = 1 << ((len(hashes) - 1).bit_length() - 1)
    if old <= k:
        return [*_proof_by_the_rfc(old, hashes[:k], is_whole=is_whole), _root_by_the_rfc(hashes[k:])]
    return [*_proof_by_the_rfc(old - k, hashes[k:], is_whole=False), _root_by_the_rfc(hashes[:k])]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 63, 64, 65, 100])
def test_proofs_are_those_of_the_rfc(small: Tree, size: int) -> None:
    hashes = small.levels[0][:size]
    for number in range(size):
        assert inclusion_proof(number, size, small.node) == _path_by_the_rfc(number, hashes)
        assert consistency_proof(number + 1, size, small.node) == _proof_by_the_rfc(number + 1, hashes)


def test_every_proof_at_all_sizes_up_to_300_verifies_and_no_other_root_does(small: Tree) -> None:
    roots = [small.root(size) for size in range(ALL_SIZES + 1)]
    other = sha256(b"another tree").digest()
    for new in range(ALL_SIZES + 1):
        for old in range(new + 1):
            proof = consistency_proof(old, new, small.node)
            check_consistency(old, roots[old], new, roots[new], proof)
            for wrong in ((other, roots[new]), (roots[old], other)) if old and (old + new) % 7 == 0 else ():
                with pytest.raises(BadProof):
                    check_consistency(old, wrong[0], new, wrong[1], proof)
        for index in range(0, new, 7):
            proof = inclusion_proof(index, new, small.node)
            check_inclusion(small.levels[0][index], index, new, roots[new], proof)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_proofs_up_to_a_million_verify_and_bent_ones_do_not(data: st.DataObject) -> None:
    tree = large()
    new = data.draw(st.integers(2, LARGE))
    old = data.draw(st.integers(1, new - 1))
    proof = consistency_proof(old, new, tree.node)
    old_root, new_root = tree.root(old), tree.root(new)
    check_consistency(old, old_root, new, new_root, proof)
    at = data.draw(st.integers(0, len(proof) - 1))
    bent = bytes([proof[at][0] ^ 1]) + proof[at][1:]
    for wrong in (
        proof[:-1], [*proof, proof[-1]], [new_root, *proof], [*proof[:at], bent, *proof[at + 1 :]],
        [*proof[:at], proof[at][:31], *proof[at + 1 :]],
    ):  # fmt: skip
        with pytest.raises(BadProof):
            check_consistency(old, old_root, new, new_root, wrong)
    index = data.draw(st.integers(0, new - 1))
    path = inclusion_proof(index, new, tree.node)
    check_inclusion(tree.levels[0][index], index, new, new_root, path)
    for place in {(index + 1) % new, (index ^ 1) % new} - {index}:
        with pytest.raises(BadProof):
            check_inclusion(tree.levels[0][index], place, new, new_root, path)


@settings(max_examples=200)
@given(
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**63 - 1),
    st.lists(st.binary(min_size=32, max_size=32), max_size=MAX_PROOF + 2),
    st.binary(min_size=32, max_size=32),
)
def test_no_proof_of_a_stranger_does_more_than_fail(old: int, new: int, proof: list[bytes], root: bytes) -> None:
    with pytest.raises(BadProof):
        check_consistency(old, root, new, root[::-1] + b"", [*proof, root])
    with pytest.raises(BadProof):
        check_inclusion(root, old, new, root, [*proof, root])


def test_only_the_empty_tree_has_size_0() -> None:
    check_consistency(0, EMPTY_ROOT, 0, EMPTY_ROOT, [])
    check_consistency(0, EMPTY_ROOT, 8, CT_ROOTS[8], [])
    for old_root, new, new_root, proof in (
        (CT_ROOTS[1], 8, CT_ROOTS[8], []),
        (EMPTY_ROOT, 8, CT_ROOTS[8], [CT_ROOTS[8]]),
        (EMPTY_ROOT, 0, CT_ROOTS[1], []),
    ):
        with pytest.raises(BadProof):
            check_consistency(0, old_root, new, new_root, proof)


def test_sizes_that_cannot_be_are_refused(small: Tree) -> None:
    for old, new in ((2, 1), (-1, 1), (1, 0)):
        with pytest.raises(BadProof):
            check_consistency(old, CT_ROOTS[1], new, CT_ROOTS[1], [])
        with pytest.raises(ValueError, match="does not begin"):
            consistency_proof(old, new, small.node)
    for index, size in ((0, 0), (1, 1), (-1, 1)):
        with pytest.raises(BadProof):
            check_inclusion(CT_ROOTS[1], index, size, CT_ROOTS[1], [])
        with pytest.raises(ValueError, match="has no leaf"):
            inclusion_proof(index, size, small.node)


def test_a_tree_grows_by_subtrees_as_by_leaves(small: Tree) -> None:
    grown = CompactRange(160, [small.node(7, 0), small.node(5, 4)])
    assert grown.root() == small.root(160)
    grown.append_subtree(small.node(5, 5), 5)
    grown.append_subtree(small.node(6, 3), 6)
    assert grown.size == 256
    assert grown.root() == small.root(256)
    with pytest.raises(ValueError, match="cannot begin at leaf 1"):
        CompactRange(1, [small.node(0, 0)]).append_subtree(small.node(1, 0), 1)
    with pytest.raises(ValueError, match="3 leaves are 2 complete subtrees, not 1"):
        CompactRange(3, [small.node(1, 0)])


def test_a_node_is_never_taken_for_a_leaf(small: Tree) -> None:
    """The prefixes of RFC 6962 section 2.1 keep a forger from passing two hashes off as one entry."""
    forged = leaf_hash(small.node(0, 0) + small.node(0, 1))
    with pytest.raises(BadProof):
        check_inclusion(forged, 0, 2, small.root(2), [])
    with pytest.raises(BadProof):
        check_inclusion(forged, 0, 1, small.root(2), [])
