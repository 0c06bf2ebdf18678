"""The views follow the events whatever happens to their file, and nothing that decides reads them."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from signer.errors import LedgerBroken, Unavailable
from signer.ledger import pages
from signer.ledger.audit import verify
from signer.ledger.fold import PART_EVENTS, SLICE_EVENTS, Fold, delete_views, fold_all
from signer.ledger.pages import CertificateReader
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME, VIEWS, VIEWS_NAME
from signer.ledger.store import Ledger
from signer.model import Filter
from tests.parts.events import freeze, issued, withheld
from tests.parts.full_disk import files_at_most
from tests.parts.ledgers import change_views, rows_of_views

ROOT = Path(__file__).parents[3]
EVENTS = [issued(1), issued(2, identity="operator"), freeze("all"), withheld(2), issued(3, backend="vault"), issued(4)]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with closing(Ledger(tmp_path)) as opened:
        opened.commit(EVENTS, 1_800_000_000_000)
        yield opened


@pytest.fixture
def fold(tmp_path: Path, ledger: Ledger) -> Iterator[Fold]:
    with closing(Fold(tmp_path, ledger)) as opened:
        yield opened


def folded(fold: Fold, ledger: Ledger) -> None:
    """Folds slices as the view writer does, until nothing is missing."""
    while fold.fold_slice() < ledger.newest():
        pass


def shown(folder: Path) -> list[tuple[int, str, bool]]:
    with closing(CertificateReader(folder)) as reader:
        return [(row.serial, row.identity, row.withheld) for row in reader.certificates(Filter())]


EXPECTED = [(4, "deploy-agent", False), (3, "deploy-agent", False), (2, "operator", True), (1, "deploy-agent", False)]


def decisions(ledger: LedgerReader) -> list[object]:
    """Everything that a core reads to decide."""
    serials = [ledger.has_vault_serial(serial) for serial in range(5)]
    return [ledger.head(), ledger.last_serial(), ledger.recent(0), ledger.freezes(), serials]


# --- folding ----------------------------------------------------------------------------------------------------------


def test_a_commit_writes_events_alone(tmp_path: Path, ledger: Ledger) -> None:
    tables = {name for (name,) in ledger.query("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables == {"events", "probe"}
    assert not (tmp_path / VIEWS_NAME).exists()


def test_a_slice_is_bounded(tmp_path: Path, ledger: Ledger, fold: Fold) -> None:
    ledger.commit([issued(serial) for serial in range(5, 1_005)], 1_800_000_001_000)
    assert fold.fold_slice() == SLICE_EVENTS
    assert len(rows_of_views(tmp_path)["certificates"]) == SLICE_EVENTS - 2
    folded(fold, ledger)
    assert len(rows_of_views(tmp_path)["certificates"]) == 1_004
    assert verify(ledger).seq == 1_006


def test_a_slice_that_keeps_pace_pauses_and_one_that_does_not_does_not(
    tmp_path: Path, ledger: Ledger, fold: Fold, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    ledger.commit([issued(serial) for serial in range(5, 5 + SLICE_EVENTS)], 1_800_000_001_000)
    assert fold.fold_slice(0.25) == SLICE_EVENTS
    assert slept == []
    ledger.commit([issued(serial) for serial in range(1_000, 1_000 + PART_EVENTS)], 1_800_000_001_000)
    assert fold.fold_slice(0.25) == ledger.newest()
    assert slept == [0.25, 0.25], f"{PART_EVENTS + 6} events are two parts"
    assert verify(ledger).seq == ledger.newest()


def test_a_slice_without_new_events_changes_nothing(tmp_path: Path, ledger: Ledger, fold: Fold) -> None:
    folded(fold, ledger)
    before = (tmp_path / VIEWS_NAME).read_bytes(), (tmp_path / f"{VIEWS_NAME}-wal").read_bytes(), fold.head()
    assert fold.fold_slice() == ledger.newest()
    assert ((tmp_path / VIEWS_NAME).read_bytes(), (tmp_path / f"{VIEWS_NAME}-wal").read_bytes(), fold.head()) == before


def test_what_a_failed_slice_added_is_folded_again(
    tmp_path: Path, ledger: Ledger, fold: Fold, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded(fold, ledger)
    ledger.commit([issued(serial) for serial in range(5, 35)], 1_800_000_001_000)

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr("signer.ledger.fold.add_leaves", fail)
    with pytest.raises(Unavailable, match="disk I/O error"):
        fold.fold_slice()
    monkeypatch.undo()
    folded(fold, ledger)
    assert len(rows_of_views(tmp_path)["certificates"]) == 34
    assert verify(ledger).seq == 36


def test_a_slice_that_does_not_follow_what_was_folded_is_refused(tmp_path: Path) -> None:
    """Of another ledger in the place of ours: a tree of both would be signed as a fork."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, identity in ((one, "ann"), (two, "bob")):
        folder.mkdir()
        with closing(Ledger(folder)) as ledger:
            ledger.commit([issued(1, identity=identity)], 1_800_000_000_000)
            if folder == two:
                ledger.commit([issued(2, identity=identity)], 1_800_000_001_000)
    with closing(LedgerReader(one)) as reader, closing(Fold(one, reader)) as fold:
        assert fold.fold_slice() == 1
        before = fold.head()
        reader.close()
        delete_views(one / FILE_NAME)
        shutil.copy(two / FILE_NAME, one / FILE_NAME)
        with pytest.raises(LedgerBroken, match="event 2: it does not follow the last event that was folded"):
            fold.fold_slice()
        assert fold.head() == before
        assert fold.fold_slice() == 2, "folded anew, from what is there now"
        assert [row[3] for row in rows_of_views(one)["certificates"]] == ["bob", "bob"]


def test_the_rows_are_those_of_one_fold_however_they_were_sliced(tmp_path: Path) -> None:
    found = []
    for name, size in (("one", 1), ("all", len(EVENTS))):
        (tmp_path / name).mkdir()
        with closing(Ledger(tmp_path / name)) as ledger:
            for at in range(0, len(EVENTS), size):
                ledger.commit(EVENTS[at : at + size], 1_800_000_000_000)
                fold_all(ledger)
            found.append(rows_of_views(tmp_path / name))
    assert found[0] == found[1]
    assert all(found[0][view.name] for view in VIEWS)


# --- the file goes wrong ---------------------------------------------------------------------------------------------


def delete(path: Path) -> None:
    delete_views(path)


def delete_all_but_the_log(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(5_000)


def scramble(path: Path) -> None:
    path.write_bytes(b"not a database, whatever its name says" * 200)


def from_another_version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 5")


def of_somebody_else(path: Path) -> None:
    delete_views(path)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE cats (name TEXT)")


def of_another_ledger(path: Path) -> None:
    other = path.parent / "other"
    other.mkdir()
    with closing(Ledger(other)) as ledger:
        ledger.commit([issued(serial, identity="mallory") for serial in range(1, 7)], 1_800_000_000_000)
        fold_all(ledger)
    delete_views(path)
    shutil.copy(other / VIEWS_NAME, path)


def ahead_of_the_ledger(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE folded SET seq = 99")


def of_an_earlier_boot(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE folded SET boot = boot - 3600, is_synced = 0")


def without_a_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DROP TABLE folded")


FAULTS: list[Callable[[Path], None]] = [
    delete,
    delete_all_but_the_log,
    truncate,
    scramble,
    from_another_version,
    of_somebody_else,
    of_another_ledger,
    ahead_of_the_ledger,
    of_an_earlier_boot,
    without_a_table,
]


@pytest.mark.parametrize("spoil", FAULTS)
def test_views_that_are_wrong_at_the_start_are_folded_anew(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        ledger.commit(EVENTS, 1_800_000_000_000)
        fold_all(ledger)
        expected = decisions(ledger)
    spoil(tmp_path / VIEWS_NAME)
    if spoil is not truncate:  # a page that is read first may be whole; verify and the keeper find the others
        assert shown(tmp_path) == EXPECTED, "a reader beside no keeper folds in memory what the file lacks"
    with closing(Ledger(tmp_path)) as ledger:
        assert decisions(ledger) == expected
        ledger.commit([issued(5)], 1_800_000_001_000)
        with closing(Fold(tmp_path, ledger)) as fold:
            folded_at_last(fold, ledger)
        assert shown(tmp_path) == [(5, "deploy-agent", False), *EXPECTED]
        assert verify(ledger).seq == 7


def folded_at_last(fold: Fold, ledger: Ledger) -> None:
    """Also if the first slices fail."""
    for _ in range(5):
        with suppress(Unavailable, LedgerBroken):
            return folded(fold, ledger)
    return folded(fold, ledger)


@pytest.mark.parametrize(
    "spoil", [delete, delete_all_but_the_log, truncate, scramble, of_another_ledger, of_somebody_else]
)
def test_views_that_go_wrong_under_the_keeper_are_folded_anew(
    tmp_path: Path, ledger: Ledger, fold: Fold, spoil: Callable[[Path], None]
) -> None:
    ledger.commit([issued(serial) for serial in range(5, 400)], 1_800_000_000_000)
    folded(fold, ledger)
    expected = decisions(ledger)
    spoil(tmp_path / VIEWS_NAME)
    assert decisions(ledger) == expected
    ledger.commit([issued(400)], 1_800_000_001_000)
    folded_at_last(fold, ledger)
    with closing(CertificateReader(tmp_path)) as reader:
        assert [row.serial for row in reader.certificates(Filter(limit=1_000))] == list(range(400, 0, -1))
    assert verify(ledger).seq == 402


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE certificates SET serial = '99', valid_before = 99999999999",
        "DELETE FROM certificates",
        "DELETE FROM withheld",
        "INSERT INTO withheld SELECT seq, serial FROM certificates WHERE true ON CONFLICT DO NOTHING",
    ],
)
def test_falsified_views_change_no_decision_and_are_found(tmp_path: Path, ledger: Ledger, fold: Fold, sql: str) -> None:
    folded(fold, ledger)
    expected = decisions(ledger)
    change_views(tmp_path, sql)
    assert decisions(ledger) == expected
    with pytest.raises(LedgerBroken) as found:
        verify(ledger)
    assert found.value.code == "ledger_tables_differ"
    with pytest.raises(ValueError, match="does not follow 4"):
        ledger.commit([issued(4)], 1_800_000_001_000)


def test_a_row_from_the_future_makes_the_keeper_fold_anew(tmp_path: Path, ledger: Ledger, fold: Fold) -> None:
    folded(fold, ledger)
    change_views(tmp_path, "INSERT INTO certificates VALUES (7, '9', 'local', 'x', 'r', '[]', 'f', 'k', 1, 2)")
    assert shown(tmp_path) == EXPECTED, "rows beyond what the file says to contain are not shown"
    ledger.commit([issued(5)], 1_800_000_001_000)
    folded_at_last(fold, ledger)
    assert shown(tmp_path)[0] == (5, "deploy-agent", False)
    assert verify(ledger).seq == 7


def test_no_room_for_the_views_alone_stops_no_commit(tmp_path: Path, ledger: Ledger, fold: Fold) -> None:
    folded(fold, ledger)
    ledger.commit([issued(serial) for serial in range(5, 300)], 1_800_000_001_000)
    log = (tmp_path / f"{FILE_NAME}-wal").stat().st_size
    views = tmp_path / f"{VIEWS_NAME}-wal"
    with files_at_most(max(views.stat().st_size + 5_000, 20_000)), pytest.raises(Unavailable) as caught:
        folded(fold, ledger)
    assert caught.value.code == "views_not_folded"
    assert log == (tmp_path / f"{FILE_NAME}-wal").stat().st_size
    ledger.commit([issued(300)], 1_800_000_002_000)
    assert ledger.last_serial() == 300
    assert [row[0] for row in shown(tmp_path)[:3]] == [300, 299, 298], "readers fold in memory meanwhile"
    folded_at_last(fold, ledger)
    assert verify(ledger).seq == 302


def test_views_that_cannot_be_created_stop_no_commit(tmp_path: Path, ledger: Ledger, fold: Fold) -> None:
    (tmp_path / VIEWS_NAME).mkdir()
    with pytest.raises(Unavailable) as caught:
        fold.fold_slice()
    assert caught.value.code == "views_not_folded"
    ledger.commit([issued(5)], 1_800_000_001_000)
    assert shown(tmp_path)[1:] == EXPECTED
    (tmp_path / VIEWS_NAME).rmdir()
    folded_at_last(fold, ledger)
    assert len(rows_of_views(tmp_path)["certificates"]) == 5


def test_a_slice_without_new_events_notices_that_the_views_are_gone(tmp_path: Path, ledger: Ledger, fold: Fold) -> None:
    folded(fold, ledger)
    delete_views(tmp_path / VIEWS_NAME)
    folded(fold, ledger)
    assert len(rows_of_views(tmp_path)["certificates"]) == 4


@pytest.mark.parametrize("spoil", [scramble, without_a_table, truncate])
def test_views_that_a_reader_cannot_use_are_folded_anew_without_a_new_event(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    with closing(Ledger(tmp_path)) as ledger, closing(Fold(tmp_path, ledger)) as fold:
        ledger.commit([*EVENTS, *(issued(serial) for serial in range(5, 300))], 1_800_000_000_000)
        folded(fold, ledger)
        spoil(tmp_path / VIEWS_NAME)
        fold.recheck(is_damaged=spoil is truncate)
        folded_at_last(fold, ledger)
        assert len(rows_of_views(tmp_path)["certificates"]) == 299
        inode = (tmp_path / VIEWS_NAME).stat().st_ino
        fold.recheck(is_damaged=False)
        folded(fold, ledger)
        assert (tmp_path / VIEWS_NAME).stat().st_ino == inode, "a good file stays"


def test_a_link_in_place_of_the_views_is_not_followed(tmp_path: Path, ledger: Ledger, fold: Fold) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"of somebody else")
    (tmp_path / VIEWS_NAME).symlink_to(elsewhere)
    with pytest.raises(Unavailable, match=os.strerror(errno.ELOOP)):
        fold.fold_slice()
    assert elsewhere.read_bytes() == b"of somebody else"
    elsewhere.unlink()
    folded_at_last(fold, ledger)
    assert not elsewhere.exists()
    assert not (tmp_path / VIEWS_NAME).is_symlink()


KILLED = """
import os, signal, sys
from pathlib import Path
from signer.ledger.fold import Fold
from signer.ledger.store import Ledger
from tests.parts.events import issued
ledger = Ledger(Path(sys.argv[1]))
fold = Fold(ledger.data_dir, ledger)
ledger.commit([issued(serial) for serial in range(1, 251)], 1_800_000_000_000)
fold.fold_slice()
ledger.commit([issued(251)], 1_800_000_000_001)
print("committed", flush=True)
if sys.argv[2] == "within":
    fold._db.execute("BEGIN IMMEDIATE")
    fold._db.execute("DELETE FROM certificates")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("where", ["between", "within"])
def test_a_kill_between_commit_and_fold_loses_nothing(tmp_path: Path, where: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, where],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "committed\n"), done.stderr
    with closing(CertificateReader(tmp_path)) as reader:
        assert [row.serial for row in reader.certificates(Filter(limit=1_000))] == list(range(251, 0, -1))
    with closing(Ledger(tmp_path)) as ledger:
        assert ledger.last_serial() == 251
        fold_all(ledger)
        assert len(rows_of_views(tmp_path)["certificates"]) == 251
        assert verify(ledger).seq == 251


def test_an_orderly_end_keeps_the_views_over_a_restart_of_the_host(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        ledger.commit(EVENTS, 1_800_000_000_000)
        fold_all(ledger)
    with closing(sqlite3.connect(tmp_path / VIEWS_NAME)) as db, db:
        assert db.execute("SELECT is_synced FROM folded").fetchone() == (1,)
        db.execute("UPDATE folded SET boot = boot - 3600")
    inode = (tmp_path / VIEWS_NAME).stat().st_ino
    with closing(Ledger(tmp_path)) as ledger, closing(Fold(tmp_path, ledger)) as fold:
        ledger.commit([issued(5)], 1_800_000_001_000)
        folded(fold, ledger)
        assert (tmp_path / VIEWS_NAME).stat().st_ino == inode
        with closing(sqlite3.connect(tmp_path / VIEWS_NAME)) as db:
            assert db.execute("SELECT seq, is_synced FROM folded").fetchone() == (7, 0)


# --- readers ----------------------------------------------------------------------------------------------------------


def test_a_reader_says_how_far_the_views_are_behind_instead_of_showing_less(
    tmp_path: Path, ledger: Ledger, fold: Fold, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(CertificateReader(tmp_path, max_missing=5)) as reader:
        with pytest.raises(Unavailable) as caught:
            reader.page(Filter())
        assert (caught.value.code, caught.value.facts) == ("views_behind", {"missing": 6})
        assert "6 events" in caught.value.text
        folded(fold, ledger)
        assert len(reader.page(Filter())[0]) == 4
    monkeypatch.setattr(pages, "_STEP", 2)
    delete_views(tmp_path / VIEWS_NAME)
    assert shown(tmp_path) == EXPECTED


def test_a_clock_that_was_set_hides_no_views_from_readers(tmp_path: Path, ledger: Ledger, fold: Fold) -> None:
    folded(fold, ledger)
    of_an_earlier_boot(tmp_path / VIEWS_NAME)
    with closing(CertificateReader(tmp_path, max_missing=0)) as reader:
        assert len(reader.page(Filter())[0]) == 4


def test_a_reader_that_stays_open_sees_each_commit_at_once(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path)) as ledger, closing(CertificateReader(tmp_path, max_missing=40)) as reader:
        for serial in range(1, 200):
            ledger.commit([issued(serial), *([withheld(serial - 1)] if serial % 7 == 0 else [])], 1_800_000_000_000)
            if serial % 23 == 0:
                fold_all(ledger)
            if serial == 100:
                delete_views(tmp_path / VIEWS_NAME)
                fold_all(ledger)
            found = reader.certificates(Filter(limit=10))
            assert [row.serial for row in found] == list(range(serial, max(serial - 10, 0), -1))
            assert [row.serial for row in found if row.withheld] == [
                row.serial for row in found if row.serial % 7 == 6 and row.serial < serial
            ]
            active = reader.certificates(Filter(limit=10, active_at=1))
            assert [row.serial for row in active] == [n for n in range(serial, 0, -1) if n % 7 != 6 or n == serial][:10]
            known = reader.certificate(max(serial - 30, 1))
            assert known is not None
            assert known[0].serial == max(serial - 30, 1)


def test_a_reader_notices_that_another_ledger_was_put_in_place(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, identity in ((one, "ann"), (two, "bob")):
        folder.mkdir()
        with closing(Ledger(folder)) as ledger:
            ledger.commit([issued(1, identity=identity)], 1_800_000_000_000)
            fold_all(ledger)
    with closing(CertificateReader(one)) as reader:
        assert [row.identity for row in reader.certificates(Filter())] == ["ann"]
        for name in (FILE_NAME, VIEWS_NAME):
            (one / name).unlink()
            shutil.copy(two / name, one / name)
        assert [row.identity for row in reader.certificates(Filter())] == ["bob"]


def test_damaged_views_are_told_to_a_reader_and_not_shown(tmp_path: Path, ledger: Ledger, fold: Fold) -> None:
    folded(fold, ledger)
    fold.close()
    ledger.close()
    change_views(tmp_path, "DROP TABLE certificates")
    with closing(CertificateReader(tmp_path)) as reader, pytest.raises(LedgerBroken) as caught:
        reader.page(Filter())
    assert caught.value.code == "ledger_tables_differ"
    ledger.__init__(tmp_path)  # type: ignore[misc] # the fixture closes what is open
