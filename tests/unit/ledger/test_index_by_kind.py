"""One index finds all events that decide besides certificates, and takes the place of those of older releases."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from signer.authority.approvals import REMEMBERED
from signer.errors import Unavailable
from signer.ledger import audit
from signer.ledger.archive import KEEP_AT_LEAST, Archiving, open_segment, verify_segments, write_segment
from signer.ledger.audit import check_recent, export, verify
from signer.ledger.backup import back_up
from signer.ledger.fold import fold_all
from signer.ledger.follow import FOLDER, LedgerCopy
from signer.ledger.origin import ledger_keys, origins
from signer.ledger.pages import CertificateReader
from signer.ledger.reader import REACH, LedgerReader
from signer.ledger.restore import Restoration
from signer.ledger.schema import FILE_NAME
from signer.ledger.store import Ledger
from signer.model import Event, Filter
from tests.parts.events import freeze, issued, refused
from tests.parts.full_disk import files_at_most
from tests.parts.long_ledger import EVENTS, fill_long, time_of
from tests.parts.old_ledgers import INDEXES_BY_GROUP, add_group_indexes, event_indexes, make_older

TODAY = {"events_by_kind", "events_of_vault"}
OLDER = {*INDEXES_BY_GROUP, "events_of_vault"}
NOW = time_of(EVENTS)
RESTORED = Event("ledger.restored", "local:root", {"lost_head": None, "first_serial": 4, "last_serial": 9, "ca": None})
SINCE = NOW // 1000 - REMEMBERED
# All that is read of events that are not certificates, however many of those there are.
READS: dict[str, Callable[[LedgerReader], object]] = {
    "freezes": lambda reader: reader.freezes(),
    "hosts": lambda reader: reader.host_events(),
    "operations": lambda reader: reader.operation_events(),
    "operations found": lambda reader: reader.operations("2" * 64, 500, 9),
    "requests": lambda reader: reader.asked(SINCE),
    "notices": lambda reader: reader.noticed_after(20, 64),
    "restores": lambda reader: reader.restores(),
    "archives": lambda reader: reader.archives(),
    "revocations": lambda reader: reader.revocation_events(),
    "withheld": lambda reader: reader.withheld_since(1),
    "publishing key": lambda reader: reader.last_service_key("publishing.key"),
    "checkpoint keys": lambda reader: ledger_keys(reader, "x"),
    "origins": lambda reader: origins(reader, "x"),
    "limits": lambda reader: reader.recent(NOW // 1000 + 2 * REACH),
    "last serial": lambda reader: reader.last_serial(),
}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """The folder of a ledger with everything that decides."""
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    fill_long(folder)
    return folder


@pytest.fixture
def file(data_dir: Path) -> Path:
    """The ledger's file, as a release before the index by kind left it."""
    make_older(data_dir / FILE_NAME)
    return data_dir / FILE_NAME


def state(reader: LedgerReader) -> dict[str, object]:
    """All that is read."""
    found = {name: read(reader) for name, read in READS.items()}
    return {**found, "vault": [reader.has_vault_serial(serial) for serial in (7, 8, 2_500)], "ca": reader.last_ca()}


def state_of(folder: Path) -> dict[str, object]:
    with closing(LedgerReader(folder)) as reader:
        return state(reader)


# --- queries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READS)
def test_what_decides_is_found_by_the_index(data_dir: Path, name: str) -> None:
    with closing(LedgerReader(data_dir)) as reader:
        said: list[str] = []
        reader.connection().set_trace_callback(said.append)
        READS[name](reader)
        reader.connection().set_trace_callback(None)
        asked = [text for text in said if "kind <> 'certificate.issued'" in text]
        assert asked
        for text in asked:
            steps = [row[3] for row in reader.query(f"EXPLAIN QUERY PLAN {text}")]
            events = [step for step in steps if " events" in step]
            assert [step for step in events if "INDEX events_by_kind (kind=?" in step], steps
            by_number = "SEARCH events USING INTEGER PRIMARY KEY (rowid=?)"  # of those that the index found
            assert all(step.startswith("SEARCH") for step in events), steps
            assert all("INDEX events_by_kind (kind=?" in step or step == by_number for step in events), steps


@pytest.mark.parametrize("is_older", [False, True])
def test_a_serial_of_vault_s_is_found_by_its_own_index(data_dir: Path, *, is_older: bool) -> None:
    if is_older:
        make_older(data_dir / FILE_NAME)
    with closing(LedgerReader(data_dir)) as reader:
        said: list[str] = []
        reader.connection().set_trace_callback(said.append)
        assert reader.has_vault_serial(2_500)
        reader.connection().set_trace_callback(None)
        ((*_, step),) = reader.query(f"EXPLAIN QUERY PLAN {said[-1]}")
        assert step == "SEARCH events USING INDEX events_of_vault (<expr>=?)"


@pytest.mark.parametrize("name", READS)
def test_it_costs_no_more_with_thousands_of_certificates_and_refusals(data_dir: Path, name: str) -> None:
    def steps(reader: LedgerReader) -> int:
        """Of SQLite's machine."""
        count = [0]

        def step() -> None:
            count[0] += 1

        READS[name](reader)  # prepares the statements
        reader.connection().set_progress_handler(step, 1)
        READS[name](reader)
        reader.connection().set_progress_handler(None, 1)
        return count[0]

    with closing(Ledger(data_dir)) as ledger:
        before = steps(ledger)
        assert before > 0
        more = [event for number in range(3_000) for event in (issued(10_000 + number), refused())]
        ledger.commit(more, NOW)
        assert steps(ledger) - before < 300, "what a bisection and a deeper tree take"


def test_a_notice_that_follows_many_others_is_found_at_once(data_dir: Path) -> None:
    with closing(Ledger(data_dir)) as ledger:
        ledger.commit([Event("approval.lapsed", "keeper", {"request": "r"}) for _ in range(2_000)], NOW)
        *_, last = ledger.commit([freeze("all")], NOW)
        count = [0]

        def step() -> None:
            count[0] += 1

        ledger.connection().set_progress_handler(step, 1)
        assert ledger.noticed_after(last.seq - 1, 64) == [last]
        assert count[0] < 1_000
        found = ledger.noticed_after(10, 64)
        assert [entry.seq for entry in found[:3]] == [20, 21, 30]
        assert (len(found), found) == (64, sorted(found, key=lambda entry: entry.seq))
        assert found == ledger.noticed_after(10, 9_999)[:64]
        rest = ledger.noticed_after(EVENTS, 9_999)
        assert [entry.seq for entry in rest] == list(range(EVENTS + 1, last.seq + 1))


def test_a_new_ledger_has_two_indexes_on_events(tmp_path: Path) -> None:
    """SQLite evaluates the condition of each one for each certificate."""
    with closing(Ledger(tmp_path)) as ledger:
        ledger.commit([issued(1)], NOW)
    assert event_indexes(tmp_path / FILE_NAME) == TODAY


# --- ledgers of older releases ------------------------------------------------------------------------------------


def test_the_keeper_replaces_the_indexes_of_an_older_release(data_dir: Path, file: Path) -> None:
    before = state_of(data_dir)
    assert event_indexes(file) == OLDER
    with closing(Ledger(data_dir)) as keeper:
        events = list(export(keeper))
        assert event_indexes(file) == TODAY
        assert keeper.query("PRAGMA user_version") == [(2,)], "an older release can open it again"
        assert state(keeper) == before
        assert check_recent(keeper) == verify(keeper)
        keeper.commit([issued(9_000)], NOW)
        assert list(export(keeper))[:-1] == events
        with pytest.raises(sqlite3.IntegrityError):
            keeper.commit([issued(2_500, backend="vault"), issued(2_500, backend="vault")], NOW)
    assert event_indexes(file) == TODAY


def test_it_replaces_them_each_time_that_an_older_release_has_made_them(data_dir: Path, file: Path) -> None:
    before = state_of(data_dir)
    for _ in range(2):
        with closing(Ledger(data_dir)) as keeper:
            assert state(keeper) == before
        assert event_indexes(file) == TODAY
        add_group_indexes(file)  # as an older release opens it
        assert event_indexes(file) == TODAY | OLDER
        assert state_of(data_dir) == before
        with closing(LedgerReader(data_dir)) as reader:
            assert verify(reader).seq == EVENTS


def test_the_keeper_replaces_all_of_them_or_none(data_dir: Path, file: Path) -> None:
    before = state_of(data_dir)
    with closing(Ledger(data_dir)) as keeper:
        with files_at_most(2_000), pytest.raises(Unavailable):
            keeper.connection()
        assert event_indexes(file) == OLDER
        assert state(keeper) == before
        assert event_indexes(file) == TODAY


def test_a_reader_of_an_older_file_does_without_the_index(data_dir: Path, file: Path) -> None:
    with closing(Ledger(data_dir)) as keeper:
        expected, head = state(keeper), keeper.head()
    make_older(file)
    content = file.read_bytes()
    with closing(CertificateReader(data_dir)) as reader:
        assert state(reader) == expected
        assert check_recent(reader) == verify(reader) == head
        assert [row.serial for row in reader.certificates(Filter(backend="local", limit=2))] == [2_400, 2_398]
    assert file.read_bytes() == content
    assert event_indexes(file) == OLDER


def test_a_reader_goes_on_while_the_keeper_replaces_them(data_dir: Path, file: Path) -> None:
    expected = state_of(data_dir)
    with closing(LedgerReader(data_dir)) as reader, closing(LedgerReader(data_dir)) as apart:
        assert state(reader) == expected
        apart.query("BEGIN")
        assert state(apart) == expected  # its snapshot is of before
        with closing(Ledger(data_dir)) as keeper:
            keeper.head()
            assert event_indexes(file) == TODAY
            assert state(reader) == state(apart) == expected
            assert verify(reader) == verify(apart) == keeper.head()


@pytest.mark.parametrize("has_older", [True, False], ids=["dropped", "made"])
def test_a_verification_goes_on_while_indexes_are_replaced(
    data_dir: Path, file: Path, monkeypatch: pytest.MonkeyPatch, *, has_older: bool
) -> None:
    """Its processes read after the first of them has ended, and then the file has other indexes."""
    monkeypatch.setattr(audit, "_CHUNK", 256)
    with closing(Ledger(data_dir)) as keeper:
        keeper.commit([freeze("all") if serial % 9 == 0 else issued(serial) for serial in range(9_000, 12_000)], NOW)
    make_older(file)
    if not has_older:
        with closing(sqlite3.connect(file)) as db, db:
            for name in OLDER - TODAY:
                db.execute(f"DROP INDEX {name}")
    with closing(Ledger(data_dir)) as keeper, closing(LedgerReader(data_dir)) as reader:
        keeper_opened: list[object] = []

        def progress(_done: int, _of: int) -> None:
            keeper_opened.append(keeper.head())

        assert verify(reader, progress).seq == EVENTS + 3_000
        assert len(keeper_opened) > 10
    assert event_indexes(file) == TODAY


def test_a_backup_of_an_older_file_is_verified_and_restored(data_dir: Path, file: Path, tmp_path: Path) -> None:
    before = state_of(data_dir)
    with closing(LedgerReader(data_dir)) as reader:
        head = back_up(reader, tmp_path / "backup")
    assert event_indexes(tmp_path / "backup") == OLDER
    with closing(open_segment(tmp_path / "backup")) as backup:
        assert verify(backup) == head
        assert state(backup) == before
    with Restoration(data_dir) as restoration:
        assert restoration.finish_interrupted() is None
        restoration.take(io.BytesIO((tmp_path / "backup").read_bytes())).close()
        restoration.commit([RESTORED], NOW)
    assert event_indexes(file) == TODAY
    after = state_of(data_dir)
    for name in ("freezes", "hosts", "operations", "requests", "publishing key"):
        assert after[name] == before[name]


def test_an_older_file_is_archived_and_its_segment_verified(data_dir: Path, file: Path, tmp_path: Path) -> None:
    before, target = state_of(data_dir), tmp_path / "segment"
    with Archiving(data_dir) as archiving:
        done = archiving.run(target, archiving.plan(target, KEEP_AT_LEAST, NOW), "local:root", NOW)
    assert event_indexes(file) == event_indexes(target) == TODAY
    after = state_of(data_dir)
    for name in ("freezes", "hosts", "operations", "requests", "restores", "publishing key", "last serial"):
        assert after[name] == before[name]
    with closing(LedgerReader(data_dir)) as reader:
        assert verify_segments(reader, [target]).compared == (done.archive,)


def test_a_segment_of_an_older_release_is_verified(data_dir: Path, tmp_path: Path) -> None:
    with closing(LedgerReader(data_dir)) as reader:
        write_segment(reader, tmp_path / "segment", 512, lambda _done, _of: None)
        (tmp_path / "segment").chmod(0o600)
        make_older(tmp_path / "segment")
        (tmp_path / "segment").chmod(0o400)
        content = (tmp_path / "segment").read_bytes()
        with closing(open_segment(tmp_path / "segment")) as segment:
            assert verify(segment).hash == reader.hash_at(512)
            assert segment.freezes() == reader.freezes()
    assert (tmp_path / "segment").read_bytes() == content


def test_a_copy_that_an_older_release_followed_goes_on(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "standby").mkdir(mode=0o700)
    with closing(LedgerReader(data_dir)) as reader:
        back_up(reader, tmp_path / "backup")
    with closing(LedgerCopy(tmp_path / "standby")) as copy, (tmp_path / "backup").open("rb") as backup:
        copy.begin_with(backup)
    copied = tmp_path / "standby" / FOLDER / FILE_NAME
    make_older(copied)
    with closing(Ledger(data_dir)) as source, closing(LedgerCopy(tmp_path / "standby")) as copy:
        entries = source.commit([issued(9_000), freeze("all")], NOW)
        copy.append(entries)
        assert copy.head() == source.head()
        assert copy.freezes() == source.freezes()
    assert event_indexes(copied) == TODAY


def test_the_keeper_s_views_go_on_beside_an_older_file(data_dir: Path, file: Path) -> None:
    with closing(Ledger(data_dir)) as keeper:
        keeper.commit([issued(9_000), refused()], NOW)
        fold_all(keeper)
    with closing(CertificateReader(data_dir)) as reader:
        assert next(iter(reader.certificates(Filter()))).serial == 9_000
        assert verify(reader).seq == EVENTS + 2
