"""The views follow the events whatever happens to their file, and nothing that decides reads them."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from signer.errors import LedgerBroken, Unavailable
from signer.ledger import fold, pages
from signer.ledger.audit import verify
from signer.ledger.fold import SLICE_EVENTS, delete_views
from signer.ledger.pages import CertificateReader
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME, VIEWS, VIEWS_NAME
from signer.ledger.store import Ledger
from signer.model import Filter
from tests.parts.events import freeze, issued, withheld
from tests.parts.ledgers import change_views, rows_of_views

ROOT = Path(__file__).parents[3]
EVENTS = [issued(1), issued(2, identity="operator"), freeze("all"), withheld(2), issued(3, backend="vault"), issued(4)]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with closing(Ledger(tmp_path)) as opened:
        opened.commit(EVENTS, 1_800_000_000_000)
        yield opened


def folded(ledger: Ledger) -> float:
    """As the keeper's loop does, until nothing is missing. Returns the seconds for which it was told to wait."""
    deadline = time.monotonic() + 60
    waited = 0.0
    while (due := ledger.fold()) is not None:
        assert time.monotonic() < deadline
        waited += due
        time.sleep(due)
    return waited


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


def test_events_are_folded_within_a_tenth_of_a_second(tmp_path: Path, ledger: Ledger) -> None:
    folded(ledger)
    ledger.commit([issued(5)], 1_800_000_001_000)
    first = ledger.fold()
    assert first is not None
    assert 0 < first <= 0.05, "one event alone waits for others, but not for long"
    assert len(rows_of_views(tmp_path)["certificates"]) == 4
    time.sleep(first)
    assert ledger.fold() is None
    assert len(rows_of_views(tmp_path)["certificates"]) == 5
    assert verify(ledger).seq == 7


def test_a_slice_is_bounded_by_events_and_by_time(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.commit([issued(serial) for serial in range(5, 1_005)], 1_800_000_001_000)
    assert ledger.fold() == 0.0
    first = len(rows_of_views(tmp_path)["certificates"])
    assert 0 < first <= SLICE_EVENTS
    monkeypatch.setattr(fold, "SLICE_SECONDS", 0.0)
    assert ledger.fold() == 0.0
    assert len(rows_of_views(tmp_path)["certificates"]) == first + 20
    monkeypatch.undo()
    folded(ledger)
    assert len(rows_of_views(tmp_path)["certificates"]) == 1_004


def test_a_fold_that_keeps_pace_adds_few_events_at_a_time_and_shows_a_slice_together(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice at once stops the keeper's loop for 2 ms; a transaction for each few events costs a tenth more."""
    folded(ledger)
    monkeypatch.setattr(fold, "FOLD_AFTER", 10.0)
    added = [0]
    add_events = fold.add_events

    def counted(db: sqlite3.Connection, events: list[tuple[int, str, str, str]]) -> None:
        added[-1] += len(events)
        add_events(db, events)

    monkeypatch.setattr(fold, "add_events", counted)
    visible = set()
    for first in range(5, 45 + 3 * SLICE_EVENTS, 8):
        ledger.commit([issued(serial) for serial in range(first, first + 8)], 1_800_000_001_000)
        added.append(0)
        ledger.fold()
        visible.add(len(rows_of_views(tmp_path)["certificates"]) - 4)
    assert max(added) <= 20
    assert sum(added) >= 3 * SLICE_EVENTS, "it keeps pace"
    assert visible == {0, SLICE_EVENTS, 2 * SLICE_EVENTS, 3 * SLICE_EVENTS}


def test_the_end_of_a_load_is_folded_within_a_tenth_of_a_second(tmp_path: Path, ledger: Ledger) -> None:
    """Events that were added in part, without the rest of their slice."""
    folded(ledger)
    for first in (5, 15, 25):
        ledger.commit([issued(serial) for serial in range(first, first + 10)], 1_800_000_001_000)
        ledger.fold()
    assert folded(ledger) <= 0.1
    assert len(rows_of_views(tmp_path)["certificates"]) == 34
    assert verify(ledger).seq == 36


def test_what_was_added_in_part_is_folded_again_after_a_failure(tmp_path: Path, ledger: Ledger) -> None:
    folded(ledger)
    ledger.commit([issued(serial) for serial in range(5, 35)], 1_800_000_001_000)
    ledger.fold()
    ledger.recheck_views(is_damaged=False)
    folded(ledger)
    assert len(rows_of_views(tmp_path)["certificates"]) == 34
    assert verify(ledger).seq == 36


def test_the_rows_are_those_of_one_fold_however_they_were_sliced(tmp_path: Path) -> None:
    found = []
    for name, size in (("one", 1), ("all", len(EVENTS))):
        (tmp_path / name).mkdir()
        with closing(Ledger(tmp_path / name)) as ledger:
            for at in range(0, len(EVENTS), size):
                ledger.commit(EVENTS[at : at + size], 1_800_000_000_000)
                ledger.fold_all()
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
        ledger.fold_all()
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
        ledger.fold_all()
        expected = decisions(ledger)
    spoil(tmp_path / VIEWS_NAME)
    if spoil is not truncate:  # a page that is read first may be whole; verify and the keeper find the others
        assert shown(tmp_path) == EXPECTED, "a reader beside no keeper folds in memory what the file lacks"
    with closing(Ledger(tmp_path)) as ledger:
        assert decisions(ledger) == expected
        ledger.commit([issued(5)], 1_800_000_001_000)
        folded_at_last(ledger)
        assert shown(tmp_path) == [(5, "deploy-agent", False), *EXPECTED]
        assert verify(ledger).seq == 7


def folded_at_last(ledger: Ledger) -> None:
    """Also if the first slices fail."""
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline
        try:
            due = ledger.fold()
        except (Unavailable, LedgerBroken):
            due = 0.1
        if due is None:
            return
        time.sleep(due)


@pytest.mark.parametrize(
    "spoil", [delete, delete_all_but_the_log, truncate, scramble, of_another_ledger, of_somebody_else]
)
def test_views_that_go_wrong_under_the_keeper_are_folded_anew(
    tmp_path: Path, ledger: Ledger, spoil: Callable[[Path], None]
) -> None:
    ledger.commit([issued(serial) for serial in range(5, 400)], 1_800_000_000_000)
    folded(ledger)
    expected = decisions(ledger)
    spoil(tmp_path / VIEWS_NAME)
    assert decisions(ledger) == expected
    ledger.commit([issued(400)], 1_800_000_001_000)
    folded_at_last(ledger)
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
def test_falsified_views_change_no_decision_and_are_found(tmp_path: Path, ledger: Ledger, sql: str) -> None:
    folded(ledger)
    expected = decisions(ledger)
    change_views(tmp_path, sql)
    assert decisions(ledger) == expected
    with pytest.raises(LedgerBroken) as found:
        verify(ledger)
    assert found.value.code == "ledger_tables_differ"
    with pytest.raises(ValueError, match="does not follow 4"):
        ledger.commit([issued(4)], 1_800_000_001_000)


def test_a_row_from_the_future_makes_the_keeper_fold_anew(tmp_path: Path, ledger: Ledger) -> None:
    folded(ledger)
    change_views(tmp_path, "INSERT INTO certificates VALUES (7, '9', 'local', 'x', 'r', '[]', 'f', 'k', 1, 2)")
    assert shown(tmp_path) == EXPECTED, "rows beyond what the file says to contain are not shown"
    ledger.commit([issued(5)], 1_800_000_001_000)
    folded_at_last(ledger)
    assert shown(tmp_path)[0] == (5, "deploy-agent", False)
    assert verify(ledger).seq == 7


def test_no_room_for_the_views_alone_stops_no_commit(tmp_path: Path, ledger: Ledger) -> None:
    folded(ledger)
    ledger.commit([issued(serial) for serial in range(5, 300)], 1_800_000_001_000)
    log = (tmp_path / f"{FILE_NAME}-wal").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    views = tmp_path / f"{VIEWS_NAME}-wal"
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(views.stat().st_size + 5_000, 20_000), limits[1]))
    try:
        with pytest.raises(Unavailable) as caught:
            folded(ledger)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == "views_not_folded"
    assert log == (tmp_path / f"{FILE_NAME}-wal").stat().st_size
    ledger.commit([issued(300)], 1_800_000_002_000)
    assert ledger.last_serial() == 300
    assert [row[0] for row in shown(tmp_path)[:3]] == [300, 299, 298], "readers fold in memory meanwhile"
    folded_at_last(ledger)
    assert verify(ledger).seq == 302


def test_views_that_cannot_be_created_stop_no_commit(tmp_path: Path, ledger: Ledger) -> None:
    (tmp_path / VIEWS_NAME).mkdir()
    with pytest.raises(Unavailable) as caught:
        ledger.fold()
    assert caught.value.code == "views_not_folded"
    assert 0 < (ledger.fold() or 0) <= 1, "it waits before it tries again"
    ledger.commit([issued(5)], 1_800_000_001_000)
    assert shown(tmp_path)[1:] == EXPECTED
    (tmp_path / VIEWS_NAME).rmdir()
    folded_at_last(ledger)
    assert len(rows_of_views(tmp_path)["certificates"]) == 5


def test_a_keeper_without_new_events_notices_that_the_views_are_gone(tmp_path: Path, ledger: Ledger) -> None:
    folded(ledger)
    delete_views(tmp_path / VIEWS_NAME)
    assert ledger.fold() is not None
    folded(ledger)
    assert len(rows_of_views(tmp_path)["certificates"]) == 4


@pytest.mark.parametrize("spoil", [scramble, without_a_table, truncate])
def test_views_that_a_reader_cannot_use_are_folded_anew_without_a_new_event(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        ledger.commit([*EVENTS, *(issued(serial) for serial in range(5, 300))], 1_800_000_000_000)
        folded(ledger)
        spoil(tmp_path / VIEWS_NAME)
        ledger.recheck_views(is_damaged=spoil is truncate)
        folded_at_last(ledger)
        assert len(rows_of_views(tmp_path)["certificates"]) == 299
        inode = (tmp_path / VIEWS_NAME).stat().st_ino
        ledger.recheck_views(is_damaged=False)
        folded(ledger)
        assert (tmp_path / VIEWS_NAME).stat().st_ino == inode, "a good file stays"


def test_a_link_in_place_of_the_views_is_not_followed(tmp_path: Path, ledger: Ledger) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"of somebody else")
    (tmp_path / VIEWS_NAME).symlink_to(elsewhere)
    with pytest.raises(Unavailable, match=os.strerror(errno.ELOOP)):
        ledger.fold()
    assert elsewhere.read_bytes() == b"of somebody else"
    elsewhere.unlink()
    folded_at_last(ledger)
    assert not elsewhere.exists()
    assert not (tmp_path / VIEWS_NAME).is_symlink()


KILLED = """
import os, signal, sys
from pathlib import Path
from signer.ledger import fold
from signer.ledger.store import Ledger
from tests.parts.events import issued
fold.FOLD_AFTER = 60.0
ledger = Ledger(Path(sys.argv[1]))
ledger.commit([issued(serial) for serial in range(1, 251)], 1_800_000_000_000)
ledger.fold()
if sys.argv[2] == "in part":
    ledger.fold_all()
    ledger.commit([issued(251)], 1_800_000_000_001)
    ledger.commit([issued(serial) for serial in range(252, 282)], 1_800_000_000_001)
    ledger.fold()
    assert ledger._views._db.in_transaction
else:
    ledger.commit([issued(251)], 1_800_000_000_001)
print("committed", flush=True)
if sys.argv[2] == "within":
    db = ledger._views._db
    db.execute("BEGIN IMMEDIATE")
    db.execute("DELETE FROM certificates")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("where, last", [("between", 251), ("within", 251), ("in part", 281)])
def test_a_kill_between_commit_and_fold_loses_nothing(tmp_path: Path, where: str, last: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, where],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "committed\n"), done.stderr
    with closing(CertificateReader(tmp_path)) as reader:
        assert [row.serial for row in reader.certificates(Filter(limit=1_000))] == list(range(last, 0, -1))
    with closing(Ledger(tmp_path)) as ledger:
        assert ledger.last_serial() == last
        folded(ledger)
        assert len(rows_of_views(tmp_path)["certificates"]) == last
        assert verify(ledger).seq == last


def test_an_orderly_end_keeps_the_views_over_a_restart_of_the_host(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        ledger.commit(EVENTS, 1_800_000_000_000)
        folded(ledger)
    with closing(sqlite3.connect(tmp_path / VIEWS_NAME)) as db, db:
        assert db.execute("SELECT is_synced FROM folded").fetchone() == (1,)
        db.execute("UPDATE folded SET boot = boot - 3600")
    inode = (tmp_path / VIEWS_NAME).stat().st_ino
    with closing(Ledger(tmp_path)) as ledger:
        ledger.commit([issued(5)], 1_800_000_001_000)
        folded(ledger)
        assert (tmp_path / VIEWS_NAME).stat().st_ino == inode
        with closing(sqlite3.connect(tmp_path / VIEWS_NAME)) as db:
            assert db.execute("SELECT seq, is_synced FROM folded").fetchone() == (7, 0)


# --- readers ----------------------------------------------------------------------------------------------------------


def test_a_reader_says_how_far_the_views_are_behind_instead_of_showing_less(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(CertificateReader(tmp_path, max_missing=5)) as reader:
        with pytest.raises(Unavailable) as caught:
            reader.page(Filter())
        assert (caught.value.code, caught.value.facts) == ("views_behind", {"missing": 6})
        assert "6 events" in caught.value.text
        folded(ledger)
        assert len(reader.page(Filter())[0]) == 4
    monkeypatch.setattr(pages, "_STEP", 2)
    delete_views(tmp_path / VIEWS_NAME)
    assert shown(tmp_path) == EXPECTED


def test_a_clock_that_was_set_hides_no_views_from_readers(tmp_path: Path, ledger: Ledger) -> None:
    folded(ledger)
    of_an_earlier_boot(tmp_path / VIEWS_NAME)
    with closing(CertificateReader(tmp_path, max_missing=0)) as reader:
        assert len(reader.page(Filter())[0]) == 4


def test_a_reader_that_stays_open_sees_each_commit_at_once(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path)) as ledger, closing(CertificateReader(tmp_path, max_missing=40)) as reader:
        for serial in range(1, 200):
            ledger.commit([issued(serial), *([withheld(serial - 1)] if serial % 7 == 0 else [])], 1_800_000_000_000)
            if serial % 23 == 0:
                ledger.fold_all()
            if serial == 100:
                delete_views(tmp_path / VIEWS_NAME)
                folded(ledger)
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
            ledger.fold_all()
    with closing(CertificateReader(one)) as reader:
        assert [row.identity for row in reader.certificates(Filter())] == ["ann"]
        for name in (FILE_NAME, VIEWS_NAME):
            (one / name).unlink()
            shutil.copy(two / name, one / name)
        assert [row.identity for row in reader.certificates(Filter())] == ["bob"]


def test_damaged_views_are_told_to_a_reader_and_not_shown(tmp_path: Path, ledger: Ledger) -> None:
    folded(ledger)
    ledger.close()
    change_views(tmp_path, "DROP TABLE certificates")
    with closing(CertificateReader(tmp_path)) as reader, pytest.raises(LedgerBroken) as caught:
        reader.page(Filter())
    assert caught.value.code == "ledger_tables_differ"
    ledger.__init__(tmp_path)  # type: ignore[misc] # the fixture closes what is open
