"""The Merkle tree beside the views: it follows the events whatever happens to its file, and lies about none."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from signer.errors import LedgerBroken
from signer.ledger.audit import rebuild, verify
from signer.ledger.chain import GENESIS
from signer.ledger.fold import fold_all
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME, VIEWS_NAME
from signer.ledger.store import Ledger
from signer.ledger.subtrees import TreeReader
from signer.ledger.tree import CompactRange, check_consistency, consistency_proof, tree_root
from tests.parts.events import refused
from tests.parts.ledgers import change_views

EVENTS = 600  # two kept subtrees and a part


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with closing(Ledger(tmp_path)) as ledger:
        ledger.commit([refused(str(number)) for number in range(EVENTS)], 1_800_000_000_000)
        fold_all(ledger)
    return tmp_path


@pytest.fixture
def ledger(folder: Path) -> Iterator[Ledger]:
    with closing(Ledger(folder)) as opened:
        yield opened


def expected(folder: Path, size: int) -> CompactRange:
    """The tree by the events alone."""
    found = CompactRange()
    with closing(LedgerReader(folder)) as reader:
        for (digest,) in reader.query("SELECT hash FROM events WHERE seq <= ? ORDER BY seq", (size,)):
            found.append(bytes.fromhex(digest))
    return found


def kept(folder: Path) -> tuple[list[tuple[int, int]], int, bytes]:
    with closing(sqlite3.connect(folder / VIEWS_NAME)) as db:
        rows = db.execute("SELECT level, number FROM subtrees ORDER BY level, number").fetchall()
        return rows, *db.execute("SELECT seq, tree FROM folded").fetchone()


def test_each_256_events_make_a_row(folder: Path) -> None:
    assert kept(folder) == ([(8, 0), (8, 1)], EVENTS, expected(folder, EVENTS).to_bytes())
    assert verify(LedgerReader(folder)).seq == EVENTS


def test_the_tree_goes_on_after_a_start(folder: Path) -> None:
    for number in range(EVENTS, EVENTS + 200, 50):
        with closing(Ledger(folder)) as ledger:
            ledger.commit([refused(str(number + one)) for one in range(50)], 1_800_000_000_000)
            assert fold_all(ledger) == (number + 50, ledger.head().hash, expected(folder, number + 50).root())
    assert kept(folder) == ([(8, 0), (8, 1), (8, 2)], EVENTS + 200, expected(folder, EVENTS + 200).to_bytes())
    assert verify(LedgerReader(folder)).seq == EVENTS + 200


def test_a_ledger_without_events_has_the_empty_tree(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        assert fold_all(ledger) == (0, GENESIS, CompactRange().root())
        ledger.commit([refused()], 1_800_000_000_000)
        assert fold_all(ledger) == (1, ledger.head().hash, expected(tmp_path, 1).root())


def test_a_rebuild_makes_the_same_tree(folder: Path) -> None:
    before = kept(folder)
    with closing(Ledger(folder)) as ledger:
        rebuild(ledger)
    assert kept(folder) == before
    assert verify(LedgerReader(folder)).seq == EVENTS


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE subtrees SET hash = randomblob(32) WHERE number = 0",
        "UPDATE subtrees SET hash = randomblob(32) WHERE number = 1",
        "UPDATE subtrees SET hash = randomblob(31) WHERE number = 1",
        "DELETE FROM subtrees WHERE number = 0",
        "DELETE FROM subtrees",
        "UPDATE folded SET tree = randomblob(length(tree))",
        "UPDATE folded SET tree = substr(tree, 33)",
        "UPDATE folded SET tree = x''",
    ],
)
def test_a_tree_that_was_changed_is_found_and_folded_anew_at_the_start(folder: Path, sql: str) -> None:
    """The keeper signs the root: a wrong one would be a fork that no witness ever forgets."""
    assert change_views(folder, sql)
    with pytest.raises(LedgerBroken) as caught:
        verify(LedgerReader(folder))
    assert caught.value.code == "ledger_tables_differ"
    with closing(Ledger(folder)) as ledger:
        ledger.commit([refused()], 1_800_000_000_000)
        assert fold_all(ledger) == (EVENTS + 1, ledger.head().hash, expected(folder, EVENTS + 1).root())


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO subtrees VALUES (8, 2, zeroblob(32))",
        "INSERT INTO subtrees VALUES (16, 0, zeroblob(32))",
        "INSERT INTO subtrees VALUES (7, 0, zeroblob(32))",
        "INSERT INTO subtrees VALUES (0, 0, zeroblob(32))",
    ],
)
def test_a_subtree_that_no_events_make_is_found(folder: Path, sql: str) -> None:
    change_views(folder, sql)
    with pytest.raises(LedgerBroken, match="view subtrees differs"):
        verify(LedgerReader(folder))


def test_a_fold_that_fails_leaves_the_tree_as_it_was(ledger: Ledger, folder: Path) -> None:
    ledger.commit([refused(str(number)) for number in range(200)], 1_800_000_000_000)
    with closing(sqlite3.connect(folder / VIEWS_NAME)) as db:
        db.execute("CREATE TRIGGER full BEFORE INSERT ON subtrees BEGIN SELECT RAISE(ABORT, 'no room'); END")
        db.commit()
    with pytest.raises(Exception, match="no room"):
        fold_all(ledger)
    # The file was deleted and is made again.
    assert fold_all(ledger) == (EVENTS + 200, ledger.head().hash, expected(folder, EVENTS + 200).root())
    assert verify(LedgerReader(folder)).seq == EVENTS + 200


def test_a_hash_that_is_none_breaks_the_ledger_and_not_the_keeper(folder: Path) -> None:
    with closing(sqlite3.connect(folder / FILE_NAME)) as db:
        db.execute("DROP TRIGGER events_are_never_changed")
        db.execute("UPDATE events SET hash = replace(hash, substr(hash, 1, 2), ' z') WHERE seq = 300")
        db.commit()
    with closing(Ledger(folder)) as ledger, pytest.raises(LedgerBroken, match="event 300"):
        rebuild(ledger)


@pytest.mark.parametrize("folded", [0, 255, 256, 511, 512, EVENTS])
def test_nodes_are_the_same_from_views_and_from_events(folder: Path, folded: int) -> None:
    with closing(LedgerReader(folder)) as reader, closing(sqlite3.connect(folder / VIEWS_NAME)) as db:
        node, by_events = TreeReader(reader, db, folded).node, TreeReader(reader, None, 0).node
        for level in range(10):
            for index in {0, 1, (EVENTS >> level) - 1}:
                if 0 <= index < EVENTS >> level:
                    assert node(level, index) == by_events(level, index)
        roots = {size: expected(folder, size).root() for size in (1, 255, 256, 300, EVENTS)}
        for old, old_root in roots.items():
            assert tree_root(old, node) == old_root
            check_consistency(old, old_root, EVENTS, roots[EVENTS], consistency_proof(old, EVENTS, node))


def test_the_tree_of_seventy_thousand_events_has_a_row_of_the_second_kind(tmp_path: Path) -> None:
    """65,536 events make a row of level 16; filled by rows of the events' table alone, whose hashes are made up."""
    size = 66_000

    def digest(number: int) -> str:
        return number.to_bytes(32).hex()

    with closing(Ledger(tmp_path)) as ledger:
        db = ledger.connection()
        rows = ((number, 0, "x", "x", "{}", digest(number - 1), digest(number)) for number in range(1, size + 1))
        db.execute("BEGIN")
        db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        db.execute("COMMIT")
        assert fold_all(ledger) == (size, ledger.head().hash, expected(tmp_path, size).root())
        assert [row for row in kept(tmp_path)[0] if row[0] != 8] == [(16, 0)]
    with closing(LedgerReader(tmp_path)) as reader, closing(sqlite3.connect(tmp_path / VIEWS_NAME)) as views:
        node = TreeReader(reader, views, size).node
        for old in (1, 65_535, 65_536, 65_537):
            root = expected(tmp_path, old).root()
            check_consistency(old, root, size, tree_root(size, node), consistency_proof(old, size, node))
