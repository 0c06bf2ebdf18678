"""The ledger on disk: what is committed stays, what fails leaves nothing, and one process writes."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from signer.errors import LedgerBroken, Unavailable
from signer.ledger.audit import verify
from signer.ledger.reader import REACH, LedgerReader, Recent
from signer.ledger.schema import ARCHIVED_VERSION, FILE_NAME
from signer.ledger.store import LOCK_NAME, Ledger
from signer.model import BACKDATE, ActiveFreeze, Event
from tests.parts.events import freeze, issued, refused, thaw, withheld
from tests.parts.full_disk import files_at_most

ROOT = Path(__file__).parents[3]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path)
    yield opened
    opened.close()


def test_a_new_ledger_is_empty(ledger: Ledger) -> None:
    assert ledger.head().seq == 0
    assert (ledger.last_serial(), ledger.freezes(), ledger.recent(0), ledger.newest()) == (0, {}, [], 0)


def test_what_was_committed_is_there_after_reopening(tmp_path: Path, ledger: Ledger) -> None:
    entries = ledger.commit([issued(1), freeze("all"), refused()], 1_000)
    ledger.close()
    again = Ledger(tmp_path)
    assert [again.entry(seq) for seq in (1, 2, 3)] == entries
    assert again.head().hash == entries[-1].hash
    assert again.last_serial() == 1
    assert again.freezes() == {"all": ActiveFreeze("drill", "operator", 1)}
    again.close()
    ledger.__init__(tmp_path)  # type: ignore[misc] # the fixture closes what is open


def test_only_the_owner_may_open_the_lock(tmp_path: Path, ledger: Ledger) -> None:
    assert (tmp_path / LOCK_NAME).stat().st_mode & 0o777 == 0o600


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path, ledger: Ledger) -> None:
    with pytest.raises(Unavailable) as caught:
        Ledger(tmp_path)
    assert caught.value.code == "ledger_in_use"
    ledger.close()
    ledger.__init__(tmp_path)  # type: ignore[misc]
    assert ledger.head().seq == 0


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unavailable):
        Ledger(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "statement",
    ["UPDATE events SET actor = 'nobody'", "DELETE FROM events", "REPLACE INTO events SELECT * FROM events"],
)
def test_the_table_of_events_refuses_to_be_edited(tmp_path: Path, ledger: Ledger, statement: str) -> None:
    ledger.commit([refused()], 1_000)
    db = sqlite3.connect(tmp_path / FILE_NAME)
    with pytest.raises(sqlite3.IntegrityError):
        db.execute(statement)
    db.close()


def test_a_ledger_of_a_newer_version_is_refused_and_left_as_it_is(tmp_path: Path, ledger: Ledger) -> None:
    ledger.commit([refused()], 1_000)
    ledger.connection().execute(f"PRAGMA user_version = {ARCHIVED_VERSION + 1}")
    LedgerReader.close(ledger)
    for opened in (ledger, LedgerReader(tmp_path)):
        with pytest.raises(LedgerBroken) as caught:
            opened.head()
        assert caught.value.code == "ledger_version_newer"


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"this is not a database, whatever its name says\n" * 100)
    for opened in (LedgerReader(tmp_path), Ledger(tmp_path)):
        with pytest.raises(LedgerBroken):
            opened.head()
        opened.close()
    assert (tmp_path / FILE_NAME).read_bytes().startswith(b"this is not")


@pytest.mark.parametrize("version", [0, 1])
def test_somebody_elses_database_is_refused_and_left_as_it_is(tmp_path: Path, version: int) -> None:
    db = sqlite3.connect(tmp_path / FILE_NAME)
    db.executescript(f"CREATE TABLE cats (name TEXT); PRAGMA user_version = {version};")
    db.close()
    opened = Ledger(tmp_path)
    with pytest.raises(LedgerBroken) as caught:
        opened.head()
    opened.close()
    assert caught.value.code == "ledger_not_ours"
    db = sqlite3.connect(tmp_path / FILE_NAME)
    assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("cats",)]
    db.close()


def test_a_reader_without_a_ledger_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        LedgerReader(tmp_path).head()
    assert caught.value.code == "ledger_missing"
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_whose_table_is_gone_is_broken_not_busy(tmp_path: Path, ledger: Ledger) -> None:
    ledger.commit([issued(1)], 1_000)
    ledger.connection().execute("DROP TABLE events")
    with pytest.raises(LedgerBroken):
        ledger.recent(0)


def test_a_batch_is_kept_whole_or_not_at_all(ledger: Ledger) -> None:
    ledger.commit([issued(1)], 1_000)
    with pytest.raises(ValueError, match="serial 1 does not follow 2"):  # nothing of the batch may stay
        ledger.commit([issued(2), issued(1), freeze("all")], 2_000)
    assert ledger.head().seq == 1
    with pytest.raises(ValueError, match="serial 1 does not follow 1"):
        ledger.commit([issued(1)], 2_000)
    ledger.commit([issued(7, backend="vault")], 2_000)
    with pytest.raises(sqlite3.IntegrityError):  # a serial of Vault's again
        ledger.commit([freeze("all"), issued(7, backend="vault")], 2_000)
    assert ledger.head().seq == 2
    assert (ledger.last_serial(), ledger.freezes()) == (1, {})
    ledger.commit([issued(2)], 3_000)
    assert verify(ledger).seq == 3


def test_an_event_that_cannot_be_written_leaves_the_ledger_usable(ledger: Ledger) -> None:
    ledger.commit([issued(1)], 1_000)
    for bad in (Event("x", "y", {"a": 0.5}), Event("x", "\ud800", {}), Event("certificate.issued", "y", {})):
        with pytest.raises((ValueError, KeyError)):
            ledger.commit([issued(2), bad], 2_000)
        assert ledger.head().seq == 1
    ledger.commit([issued(2)], 3_000)
    assert verify(ledger).seq == 2


def test_a_full_database_is_unavailable_and_recovers_when_there_is_room(ledger: Ledger) -> None:
    ledger.commit([issued(1)], 1_000)
    pages = ledger.connection().execute("PRAGMA page_count").fetchone()[0]
    ledger.connection().execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(Unavailable) as caught:
        ledger.commit([issued(serial) for serial in range(2, 300)], 2_000)
    assert caught.value.code == "ledger_unavailable"
    assert (ledger.head().seq, ledger.last_serial()) == (1, 1)
    ledger.commit([issued(serial) for serial in range(2, 300)], 3_000)
    assert verify(ledger).seq == 299


def test_a_full_disk_is_unavailable_and_recovers_when_there_is_room(tmp_path: Path, ledger: Ledger) -> None:
    ledger.commit([issued(1)], 1_000)
    size = (tmp_path / f"{FILE_NAME}-wal").stat().st_size
    with files_at_most(size + 6_000):
        for _ in range(3):
            with pytest.raises(Unavailable):
                ledger.commit([issued(serial) for serial in range(2, 300)], 2_000)
    assert ledger.head().seq == 1
    ledger.probe(2_500)
    ledger.commit([issued(serial) for serial in range(2, 300)], 3_000)
    assert verify(ledger).seq == 299


READ_ONLY = """
import sys
from pathlib import Path
from signer.errors import Unavailable
from signer.ledger.store import Ledger
from signer.ledger.reader import LedgerReader
from tests.parts.events import issued
folder = Path(sys.argv[1])
try:
    Ledger(folder)
except Unavailable as error:
    print(error.code)
reader = LedgerReader(folder)
try:
    print(reader.head().seq)
except Unavailable as error:
    print(error.code)
"""


def test_a_directory_that_may_not_be_written_is_unavailable(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    ledger = Ledger(folder)
    ledger.commit([issued(1)], 1_000)
    ledger.close()
    for path in (folder, folder / FILE_NAME, *tmp_path.parents):
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o555)
    folder.chmod(0o555)
    nobody: dict[str, Any] = {"user": 65534, "group": 65534} if os.geteuid() == 0 else {}
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY, folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        **nobody,
    )
    folder.chmod(0o755)
    assert done.stdout.split()[0] == "ledger_unavailable", done.stderr


def test_a_ledger_whose_directory_vanishes_is_unavailable(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    ledger = Ledger(folder)
    folder.rename(tmp_path / "gone")
    with pytest.raises(Unavailable):
        ledger.commit([issued(1)], 1_000)
    (tmp_path / "gone").rename(folder)
    ledger.commit([issued(1)], 1_000)
    assert ledger.last_serial() == 1
    ledger.close()


def test_times_never_run_backwards_when_the_clock_does(ledger: Ledger) -> None:
    for now in (5_000, 4_000, 6_000):
        ledger.commit([refused()], now)
    assert [ledger.entry(seq).time_ms for seq in (1, 2, 3)] == [5_000, 5_000, 6_000]


def test_a_reader_reads_and_verifies_while_a_writer_commits(tmp_path: Path, ledger: Ledger) -> None:
    ledger.commit([issued(1)], 1_000)
    faults: list[BaseException] = []
    rounds: list[int] = []
    done = threading.Event()

    def read() -> None:
        reader = LedgerReader(tmp_path)
        try:
            while not done.is_set() or not rounds:
                rounds.append(verify(reader).seq)
        except BaseException as fault:  # noqa: BLE001 - told by the assertion below
            faults.append(fault)
        finally:
            reader.close()

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(2, 400):
        ledger.commit([issued(number), freeze("all") if number % 2 else thaw("all")], number * 1_000)
    done.set()
    thread.join()
    assert faults == []
    assert rounds == sorted(rounds)


def test_what_still_counts_is_read_back_without_what_was_withheld(ledger: Ledger) -> None:
    ends = {1: 100, 2: 200, 3: 300}
    ledger.commit([issued(serial, valid_after=20, valid_before=end) for serial, end in ends.items()], 50_000)
    ledger.commit([withheld(3)], 60_000)
    assert ledger.recent(100) == [Recent("deploy-agent", "llmops", 50, 200)]


def test_a_certificate_counts_from_its_grant_if_the_clock_was_set_back_before_its_record(ledger: Ledger) -> None:
    ledger.commit([issued(1, valid_after=70 - BACKDATE, valid_before=200)], 50_000)
    assert ledger.recent(100) == [Recent("deploy-agent", "llmops", 70, 200)]


def test_what_still_counts_is_found_however_many_older_events_there_are(ledger: Ledger) -> None:
    now = 1_800_000_000
    serials = iter(range(1, 10_000))

    def at(second: int, *ends: int) -> None:
        events = [issued(next(serials), valid_after=second - BACKDATE, valid_before=end) for end in ends]
        ledger.commit([refused(), *events, refused()], second * 1_000)

    for second in range(now - 10 * REACH, now - REACH, REACH // 20):
        at(second, second + 60)
    at(now - REACH, now)  # the last second that is looked at; it ends now, so it counts no more
    at(now - REACH + 1, now + 1)
    at(now - 900, now + 900, now - 1)
    expected = [now + 1, now + 900]
    assert [row.valid_before for row in ledger.recent(now)] == expected
    ledger.commit([withheld(int(ledger.last_serial()) - 1)], now * 1_000)
    assert [row.valid_before for row in ledger.recent(now)] == expected[:1]
    assert ledger.recent(now + 10 * REACH) == []


def test_only_the_end_of_a_long_ledger_is_read_for_what_still_counts(ledger: Ledger) -> None:
    for day in range(60):
        ledger.commit([issued(day * 50 + n + 1, valid_before=day * 86_400 + 900) for n in range(50)], day * 86_400_000)
    statements: list[str] = []
    ledger.connection().set_trace_callback(statements.append)
    assert [row.valid_before for row in ledger.recent(59 * 86_400)] == [59 * 86_400 + 900] * 50
    ledger.connection().set_trace_callback(None)
    read = [statement for statement in statements if "kind = 'certificate.issued'" in statement]
    assert len(read) == 1
    assert f"seq >= {58 * 50 + 1} " in read[0], "events of more than the last day were read"
    assert len(statements) < 20


def test_the_last_serial_is_of_the_local_key(ledger: Ledger) -> None:
    ledger.commit([issued(5), issued(900, backend="vault"), refused()], 1_000)
    assert ledger.last_serial() == 5
    assert [ledger.has_vault_serial(serial) for serial in (5, 900, 901)] == [False, True, False]


def test_a_withheld_serial_of_the_local_key_withholds_none_of_vaults(ledger: Ledger) -> None:
    ledger.commit([issued(5), issued(5, backend="vault", identity="operator"), withheld(5)], 1_000)
    assert [row.identity for row in ledger.recent(0)] == ["operator"]
