"""An archive moves old events to a segment; the ledger decides, proves and verifies as before, wherever it ends."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from signer.authority.approvals import REMEMBERED
from signer.authority.hosts import HostList
from signer.authority.restored import is_restored, plan_restore
from signer.cli.backup import DEFAULT_KEEP, LEAST_KEEP
from signer.errors import BadFile, LedgerBroken, NotFound, Refused, Unavailable
from signer.ledger import audit
from signer.ledger.archive import (
    KEEP_AT_LEAST,
    Archived,
    Archiving,
    find_segments,
    open_segment,
    verify_segments,
    write_segment,
)
from signer.ledger.archived import CARRIED, carried_rows
from signer.ledger.audit import check_recent, export, rebuild, verify
from signer.ledger.backup import back_up
from signer.ledger.chain import GENESIS, entry_hash
from signer.ledger.checkpoint import Checkpoint
from signer.ledger.fold import fold_all
from signer.ledger.origin import ledger_keys, origins
from signer.ledger.pages import CertificateReader
from signer.ledger.reader import REACH, LedgerReader
from signer.ledger.restore import Restoration
from signer.ledger.revoked import read_list
from signer.ledger.schema import ARCHIVED_TRIGGERS, FILE_NAME
from signer.ledger.store import LOCK_NAME, Ledger
from signer.ledger.subtrees import TreeReader
from signer.ledger.tree import check_consistency, consistency_proof, tree_root
from signer.model import EventFilter, Filter, Head
from signer.ssh.krl import encode_krl
from signer.units import parse_duration
from tests.parts.builders import names_in
from tests.parts.events import freeze, issued
from tests.parts.full_disk import files_at_most
from tests.parts.killed import dies_at
from tests.parts.ledgers import TRIGGERS
from tests.parts.long_ledger import DAY, EVENTS, event, fill_long, time_of

NOW = time_of(EVENTS)
KEEP = parse_duration(DEFAULT_KEEP)
ARCHIVED = 512  # the last one of 256 that is older than 90 days


@pytest.fixture(scope="module")
def long_ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "data"
    folder.mkdir(mode=0o700)
    fill_long(folder)
    return folder


@pytest.fixture
def data_dir(long_ledger: Path, tmp_path: Path) -> Path:
    return shutil.copytree(long_ledger, tmp_path / "data")


@pytest.fixture
def segment(tmp_path: Path) -> Path:
    return tmp_path / "segment"


def archive(data_dir: Path, segment: Path, keep: int = KEEP, now_ms: int = NOW) -> Archived | None:
    """As `signer ledger archive`; one that was interrupted is ended, and is enough."""
    with Archiving(data_dir) as archiving:
        if archiving.finish_interrupted() is not None:
            return None
        return archiving.run(segment, archiving.plan(segment, keep, now_ms), "local:root", now_ms)


def state(reader: LedgerReader, now_ms: int) -> dict[str, object]:
    """All that is decided by."""
    made = read_list(reader)
    return {
        "serial": reader.last_serial(),
        "ca": reader.last_ca(),
        "freezes": reader.freezes(),
        "restores": reader.restores(),
        "hosts": reader.host_events(),
        "host list": HostList.from_entries(reader.host_events()).hosts,
        "operations": reader.operations(None, None, 99),
        "keys": [reader.last_service_key(kind) for kind in ("publishing.key", "ledger.key")],
        "recent": reader.recent(now_ms // 1000 - REACH),
        "asked": reader.asked(now_ms // 1000 - REMEMBERED),
        "list": (encode_krl(made.revoked), made.changes_at),
        "origins": origins(reader, None),
        "checkpoint keys": ledger_keys(reader, "x"),
        "withheld": reader.withheld_since(ARCHIVED + 1),
    }


def read_state(folder: Path, now_ms: int = NOW) -> dict[str, object]:
    with closing(LedgerReader(folder)) as reader:
        return state(reader, now_ms)


def test_whatever_decides_is_as_before(data_dir: Path, segment: Path) -> None:
    before = read_state(data_dir)
    assert before["serial"] == 2_400, "the last local certificate, which is archived"
    done = archive(data_dir, segment)
    assert done is not None
    assert read_state(data_dir) == before
    with closing(Ledger(data_dir)) as keeper:
        assert check_recent(keeper) == keeper.head() == done.head
        assert keeper.base == ARCHIVED
        with pytest.raises(ValueError, match="does not follow 2400"):
            keeper.commit([issued(2_400)], NOW)
        keeper.commit([issued(2_401), freeze("all")], NOW + DAY)
        fold_all(keeper)
        assert verify(keeper).seq == EVENTS + 3


def test_nothing_that_counts_can_be_archived() -> None:
    assert max(REMEMBERED, REACH) * 2 < KEEP_AT_LEAST
    assert parse_duration(LEAST_KEEP) == KEEP_AT_LEAST < KEEP


def test_the_ledger_has_the_later_events_and_those_that_were_carried_over(data_dir: Path, segment: Path) -> None:
    with closing(LedgerReader(data_dir)) as reader:
        whole = list(export(reader))
    done = archive(data_dir, segment)
    assert done is not None
    assert done.archive.first == 1
    assert done.archive.last == ARCHIVED
    with closing(LedgerReader(data_dir)) as reader:
        assert list(export(reader, ARCHIVED + 1))[:-1] == whole[ARCHIVED:]
        held = [row[0] for row in reader.query("SELECT seq FROM events WHERE seq <= ? ORDER BY seq", (ARCHIVED,))]
        assert held == [1, 2, 3, 20, 21, 30, 40, 50, 60, 62, 70, 80, 90, 400]
        assert [reader.entry(seq) for seq in held] == [whole[seq - 1] for seq in held]
        with pytest.raises(NotFound) as caught:
            reader.entry(100)
        assert caught.value.code == "events_archived"
        with pytest.raises(NotFound):
            list(export(reader))
        with pytest.raises(LedgerBroken, match="event 900: the event is missing"):
            reader.entry(900)
    with closing(LedgerReader(segment.parent, segment.name)) as reader:
        assert list(export(reader)) == whole[:ARCHIVED]
        assert verify(reader) == Head(ARCHIVED, whole[ARCHIVED - 1].hash, time_of(ARCHIVED))
    assert segment.stat().st_mode & 0o777 == 0o400


def test_the_old_files_are_kept_and_marks_stay(data_dir: Path, segment: Path) -> None:
    (data_dir / "ledger.backup").write_text('{"seq": 9, "time": 9}')
    done = archive(data_dir, segment)
    assert done is not None
    assert done.aside is not None
    assert verify_folder(done.aside).seq == EVENTS
    assert (data_dir / "ledger.backup").exists()
    left = {path.name for path in data_dir.iterdir() if path != done.aside}
    assert left == {FILE_NAME, LOCK_NAME, "ledger.backup"}
    assert (data_dir / FILE_NAME).stat().st_mode & 0o777 == 0o600


def verify_folder(folder: Path) -> Head:
    with closing(LedgerReader(folder)) as reader:
        return verify(reader)


def test_every_tree_and_every_proof_is_as_before(data_dir: Path, segment: Path, long_ledger: Path) -> None:
    archive(data_dir, segment)
    with closing(LedgerReader(long_ledger)) as old, closing(CertificateReader(data_dir)) as reader:
        before, now = TreeReader(old, None, 0).node, TreeReader(reader, None, 0).node
        roots = {size: tree_root(size, before) for size in (1, 255, 256, 300, 511, 512, 513, EVENTS)}
        for size, root in roots.items():
            assert tree_root(size, now) == root
            assert reader.hash_at(size) == old.hash_at(size)
            proof = reader.consistency(size, EVENTS)
            assert proof == consistency_proof(size, EVENTS, before)
            check_consistency(size, root, EVENTS, roots[EVENTS], proof)
            verify(reader, saved=Head(size, str(old.hash_at(size)), 0), checkpoint=Checkpoint("x", size, root))
        with pytest.raises(LedgerBroken, match="event 80: it differs from the saved head"):
            verify(reader, saved=Head(80, "0" * 64, 0))
        with pytest.raises(LedgerBroken) as caught:
            verify(reader, checkpoint=Checkpoint("x", 64, roots[EVENTS]))
        assert caught.value.code == "ledger_differs_from_checkpoint"


def test_the_keeper_folds_on_and_finds_only_what_is_there(data_dir: Path, segment: Path) -> None:
    archive(data_dir, segment)
    for _ in range(2):  # first from events in memory, then from the file
        with closing(CertificateReader(data_dir)) as reader:
            found = reader.certificates(Filter(limit=999))
            assert len(found) == EVENTS - ARCHIVED - 2
            assert min(row.seq for row in found) == ARCHIVED + 1
            assert reader.certificate(5) is None
            counts = reader.activity([0, time_of(ARCHIVED + 1), NOW + 1])
            assert [(one.issued, one.refused) for one in counts] == [(0, 0), (EVENTS - ARCHIVED - 2, 0)]
        with closing(Ledger(data_dir)) as ledger:
            root = tree_root(EVENTS + 1, TreeReader(ledger, None, 0).node)
            assert fold_all(ledger) == (EVENTS + 1, ledger.head().hash, root)
            assert rebuild(ledger)[1]["certificates"] == EVENTS - ARCHIVED - 2
    assert verify_folder(data_dir).seq == EVENTS + 1
    with closing(CertificateReader(segment.parent, None, segment.name)) as old:
        assert old.certificate(5) is not None
        assert len(old.certificates(Filter(limit=999))) == ARCHIVED - 17


@pytest.mark.parametrize("is_folded", [False, True])
def test_each_filter_of_events_finds_those_that_were_carried_over(
    data_dir: Path, segment: Path, *, is_folded: bool
) -> None:
    archive(data_dir, segment)
    if is_folded:
        with closing(Ledger(data_dir)) as ledger:
            fold_all(ledger)
    with closing(CertificateReader(data_dir)) as reader:
        everything = reader.matching_events(EventFilter(limit=9_999))
        assert len(everything) == EVENTS + 1 - ARCHIVED + 14
        for kind, identity, since, before, only_others, limit in product(
            (None, "freeze", "freeze.set", "certificate", "certificates.revoked", "keeper"),
            (None, "operator", "ci", "keeper", "deploy-agent", "nobody"),
            (None, time_of(30), time_of(ARCHIVED + 9)),
            (None, 1, 31, 400, 401, ARCHIVED, ARCHIVED + 1, ARCHIVED + 2, EVENTS),
            (False, True),
            (3, 9_999),
        ):
            wanted = EventFilter(kind, identity, since, before, only_others, limit)
            expected = [
                entry
                for entry in everything
                if (kind is None or entry.kind == kind or entry.kind.startswith(f"{kind}."))
                and (identity is None or identity in names_in(entry))
                and (since is None or entry.time_ms >= since)
                and (before is None or entry.seq < before)
                and not (only_others and entry.kind == "certificate.issued")
            ]
            assert reader.matching_events(wanted) == expected[:limit], wanted


def test_views_of_before_are_not_used(data_dir: Path, segment: Path, long_ledger: Path) -> None:
    archive(data_dir, segment)
    shutil.copy(long_ledger / "views.sqlite3", data_dir)
    with closing(CertificateReader(data_dir)) as reader:
        assert reader.certificate(5) is None
    verify_folder(data_dir)


def test_a_second_archive_begins_after_the_first(data_dir: Path, segment: Path, tmp_path: Path) -> None:
    archive(data_dir, segment)
    second = tmp_path / "second"
    with pytest.raises(Refused) as early:
        archive(data_dir, second, keep=KEEP_AT_LEAST)
    assert early.value.code == "nothing_to_archive"
    with closing(Ledger(data_dir)) as ledger:
        for seq in range(EVENTS + 2, 1_000):
            ledger.commit([event(seq)], time_of(seq))
    before = read_state(data_dir, time_of(1_000))
    done = archive(data_dir, second, now_ms=time_of(1_000))
    assert done is not None
    assert (done.archive.first, done.archive.last) == (ARCHIVED + 1, 768)
    assert read_state(data_dir, time_of(1_000)) == before
    with closing(LedgerReader(data_dir)) as reader:
        verify(reader)
        joined = verify_segments(reader, [second, segment])
        assert [one.last for one in joined.compared] == [ARCHIVED, 768]
        assert joined.missing == ()
        assert [one.last for one in verify_segments(reader, [segment]).missing] == [768]
        assert [one.last for one in verify_segments(reader, [second]).missing] == [ARCHIVED]
        assert find_segments(reader, [second, segment]) == [segment, second]
        with pytest.raises(Refused) as caught:
            find_segments(reader, [second])
        assert caught.value.code == "segments_missing"
    with pytest.raises(Refused) as refused:
        archive(data_dir, tmp_path / "third")
    assert refused.value.code == "nothing_to_archive"


def test_a_clock_that_is_ahead_archives_nothing_too_early(data_dir: Path, segment: Path) -> None:
    done = archive(data_dir, segment, now_ms=NOW + 10_000 * DAY)
    assert done is not None
    assert done.archive.last == ARCHIVED


def test_it_is_refused_while_a_keeper_runs(data_dir: Path) -> None:
    with closing(Ledger(data_dir)), pytest.raises(Unavailable) as caught:
        Archiving(data_dir)
    assert (caught.value.code, caught.value.hint) == ("ledger_in_use", "stop the service, then archive")


def test_a_broken_ledger_is_not_archived(data_dir: Path, segment: Path) -> None:
    for seq in (100, 600):
        with closing(sqlite3.connect(data_dir / FILE_NAME)) as db, db:
            (again,) = db.execute("SELECT sql FROM sqlite_master WHERE name = ?", (TRIGGERS[0],)).fetchone()
            db.execute(f"DROP TRIGGER {TRIGGERS[0]}")
            db.execute("UPDATE events SET actor = actor || 'x' WHERE seq = ?", (seq,))
            db.execute(again)
        with pytest.raises(LedgerBroken, match=f"event {seq}"):
            archive(data_dir, segment)
        with closing(LedgerReader(data_dir)) as reader:
            assert (reader.base, reader.head().seq) == (0, EVENTS)
        with closing(sqlite3.connect(data_dir / FILE_NAME)) as db, db:
            db.execute(f"DROP TRIGGER {TRIGGERS[0]}")
            db.execute("UPDATE events SET actor = substr(actor, 1, length(actor) - 1) WHERE seq = ?", (seq,))
            db.execute(again)


def test_no_file_is_overwritten(data_dir: Path, segment: Path) -> None:
    with closing(LedgerReader(data_dir)) as reader:
        back_up(reader, segment)
    content = segment.read_bytes()
    with pytest.raises(BadFile) as caught:
        archive(data_dir, segment)
    assert caught.value.code == "segment_exists"
    assert segment.read_bytes() == content


def test_a_full_disk_leaves_the_old_ledger_and_a_second_run_succeeds(data_dir: Path, segment: Path) -> None:
    with closing(LedgerReader(data_dir)) as reader:
        write_segment(reader, segment, ARCHIVED, lambda _done, _all: None)
    before = (data_dir / FILE_NAME).read_bytes()
    with (
        files_at_most(40_000),  # -shm of the old one has 32,768
        pytest.raises(Unavailable, match="the ledger cannot be archived: ") as caught,
    ):
        archive(data_dir, segment)
    assert caught.value.code == "archive_failed"
    assert (data_dir / FILE_NAME).read_bytes() == before
    assert verify_folder(data_dir).seq == EVENTS
    assert not list(data_dir.glob("ledger.rest*"))
    assert archive(data_dir, segment) is not None
    assert verify_folder(data_dir).seq == EVENTS + 1


def test_a_backup_of_an_archived_ledger_is_one(data_dir: Path, segment: Path, tmp_path: Path) -> None:
    archive(data_dir, segment)
    with closing(LedgerReader(data_dir)) as reader:
        assert back_up(reader, tmp_path / "backup") == reader.head()


def test_a_backup_of_an_archived_ledger_is_restored(data_dir: Path, segment: Path, tmp_path: Path) -> None:
    archive(data_dir, segment)
    with closing(LedgerReader(data_dir)) as reader:
        back_up(reader, tmp_path / "backup")
    with closing(Ledger(data_dir)) as keeper:
        keeper.commit([issued(5_000)], NOW + DAY)
    with Restoration(data_dir) as restoration:
        restoration.finish_interrupted()
        with (tmp_path / "backup").open("rb") as backup:
            taken = restoration.take(backup)
        with closing(taken), restoration.replaced() as replaced:
            assert replaced is not None
            plan = plan_restore(taken, replaced, replaced.head(), None)
            assert (plan.first_serial, plan.last_serial) == (2_401, 1_005_000)
        restoration.commit(plan.events("root"), NOW + 2 * DAY)
    with closing(LedgerReader(data_dir)) as reader:
        verify(reader)
        assert reader.base == ARCHIVED
        assert reader.last_serial() == 1_005_000
        assert verify_segments(reader, [segment]).missing == ()


def test_a_backup_of_before_the_archive_is_of_the_same_ledger(
    data_dir: Path, segment: Path, long_ledger: Path, tmp_path: Path
) -> None:
    archive(data_dir, segment)
    with closing(LedgerReader(long_ledger)) as before, closing(LedgerReader(data_dir)) as after:
        assert plan_restore(before, after, None, None).first_serial == 2_401
        assert not is_restored(before, after)
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    with closing(Ledger(other)) as ledger:
        ledger.commit([issued(1)], NOW)
        with closing(LedgerReader(data_dir)) as after, pytest.raises(Refused) as caught:
            plan_restore(ledger, after, None, None)
    assert caught.value.code == "restore_other_ledger"


# --- what somebody changes --------------------------------------------------------------------------------------


@pytest.fixture
def archived(data_dir: Path, segment: Path) -> Iterator[sqlite3.Connection]:
    """A connection to an archived ledger that lacks the triggers."""
    archive(data_dir, segment)
    with closing(sqlite3.connect(data_dir / FILE_NAME, isolation_level=None)) as db:
        for name in (*TRIGGERS, *(trigger.split()[2] for trigger in ARCHIVED_TRIGGERS)):
            db.execute(f"DROP TRIGGER {name}")
        yield db


@pytest.mark.parametrize(
    "sql, found",
    [
        ("UPDATE events SET actor = 'nobody' WHERE seq = 30", "event 30: it was carried over"),
        ("DELETE FROM events WHERE seq = 30", f"event {EVENTS + 1}: it carried over 14 events"),
        ("UPDATE events SET seq = 31 WHERE seq = 30", "event 31: it was carried over"),
        ("UPDATE archived SET hashes = zeroblob(8192) WHERE level = 0 AND number = 0", f"event {EVENTS + 1}: the kept"),
        ("UPDATE archived SET hashes = zeroblob(64) WHERE level = 8", f"event {EVENTS + 1}: the kept subtrees"),
        ("UPDATE archived SET hashes = x'00' WHERE level = 0 AND number = 1", "broken at event"),
        ("DELETE FROM archived WHERE number = 1", "events 1 to 256 are missing, and no event says"),
        ("DELETE FROM archived", "broken at event 4: the event is missing"),
        ("INSERT INTO archived VALUES (16, 0, x'00')", f"event {EVENTS + 1}: the kept subtrees"),
        ("DELETE FROM events WHERE seq = 701", "no event says that they were archived"),
        ("PRAGMA user_version = 2", "broken at event 4: the event is missing"),
        ("DELETE FROM events WHERE seq = 513", "broken at event 513: the event is missing"),
    ],
)
def test_each_change_is_found_without_the_segment(
    data_dir: Path, archived: sqlite3.Connection, sql: str, found: str
) -> None:
    archived.execute(sql)
    with closing(LedgerReader(data_dir)) as reader, pytest.raises(LedgerBroken, match=found):
        verify(reader)


@pytest.mark.parametrize("seq", [0, -5])
def test_an_event_before_the_first_one_is_found(data_dir: Path, segment: Path, seq: int) -> None:
    archive(data_dir, segment)
    thawed = (seq, time_of(1), "freeze.lifted", "operator", '{"scope":"identity:ci"}', GENESIS)
    with closing(sqlite3.connect(data_dir / FILE_NAME)) as db, db:
        (again,) = db.execute("SELECT sql FROM sqlite_master WHERE name = ?", (TRIGGERS[2],)).fetchone()
        db.execute(f"DROP TRIGGER {TRIGGERS[2]}")
        db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", (*thawed, entry_hash(*thawed)))
        db.execute(again)
    for check in (verify, check_recent):
        with (
            closing(LedgerReader(data_dir)) as reader,
            pytest.raises(LedgerBroken, match=f"event {seq}: events are numbered from 1"),
        ):
            check(reader)


def test_the_progress_of_verify_ends_with_the_last_event(
    data_dir: Path, segment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive(data_dir, segment)
    monkeypatch.setattr(audit, "_CHUNK", 100)
    seen: list[tuple[int, int]] = []
    with closing(LedgerReader(data_dir)) as reader:
        verify(reader, lambda done, total: seen.append((done, total)))
    assert sorted(seen) == seen
    assert len(seen) == 2
    assert seen[0][0] > ARCHIVED
    assert seen[-1] == (EVENTS + 1, EVENTS + 1)


def test_a_dropped_trigger_is_found(data_dir: Path, archived: sqlite3.Connection) -> None:
    with closing(LedgerReader(data_dir)) as reader, pytest.raises(LedgerBroken) as caught:
        verify(reader)
    assert caught.value.code == "ledger_structure_differs"
    assert "archived_is_never_changed is missing" in caught.value.text


def forged(data_dir: Path, segment: Path, forge: Callable[[list[Any]], list[Any]], monkeypatch: Any) -> None:
    """An archive by a program that carries over something else than it should."""
    with monkeypatch.context() as patch:
        patch.setattr("signer.ledger.archived.carried_rows", lambda *place: forge(carried_rows(*place)))
        archive(data_dir, segment)


def test_what_was_left_out_when_it_was_made_is_found_by_the_segment(
    data_dir: Path, segment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged(data_dir, segment, lambda rows: [row for row in rows if row[0] != 30], monkeypatch)
    with closing(LedgerReader(data_dir)) as reader:
        assert "identity:ci" not in reader.freezes()
        verify(reader)  # the chain says what was carried over, and only the segment what should have been
        with pytest.raises(LedgerBroken) as caught:
            verify_segments(reader, [segment])
    assert caught.value.code == "segment_differs"


def test_a_rule_by_which_archives_were_made_never_changes() -> None:
    """An archive by a changed rule would look forged: if a condition of the schema changes, write the old one out."""
    digests = {rule: sha256(condition.encode()).hexdigest()[:16] for rule, condition in CARRIED.items()}
    assert digests == {1: "6a9e993d2fe5a904"}


def test_each_archive_is_compared_by_its_own_rule(
    data_dir: Path, segment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = shutil.copytree(data_dir, tmp_path / "newer")
    archive(data_dir, segment)
    with monkeypatch.context() as patch:  # a later release, which carries over event 100, too
        patch.setitem(CARRIED, 2, f"{CARRIED[1]} OR seq = 100")
        patch.setattr("signer.ledger.archived.CARRY_RULE", 2)
        archive(newer, tmp_path / "other")
        for folder, file, rule, carried in ((data_dir, segment, 1, 14), (newer, tmp_path / "other", 2, 15)):
            with closing(LedgerReader(folder)) as reader:
                assert verify_segments(reader, [file]).missing == ()
                assert [(one.rule, one.carried) for one in reader.archives()] == [(rule, carried)]
    with closing(LedgerReader(newer)) as reader:
        verify(reader)
        with pytest.raises(LedgerBroken, match=r"a newer signer made other: .* by rule 2, not 1") as caught:
            verify_segments(reader, [tmp_path / "other"])
    assert caught.value.code == "ledger_version_newer"


def test_a_segment_that_was_changed_is_not_one(data_dir: Path, segment: Path, tmp_path: Path) -> None:
    archive(data_dir, segment)
    other = tmp_path / "other"
    shutil.copy(segment, other)
    other.chmod(0o600)
    with closing(sqlite3.connect(other)) as db, db:
        db.execute("INSERT INTO probe VALUES (1, 1)")
    with closing(LedgerReader(data_dir)) as reader:
        for path, code in ((other, "segment_unknown"), (tmp_path / "none", "segment_unreadable")):
            with pytest.raises(BadFile) as caught:
                verify_segments(reader, [path])
            assert caught.value.code == code


@pytest.mark.parametrize("content", ["", "this is not a database\n" * 99, "CREATE TABLE ours (a)"])
def test_a_file_that_is_no_ledger_is_not_a_segment(data_dir: Path, tmp_path: Path, content: str) -> None:
    other = tmp_path / "other"
    if content.startswith("CREATE"):
        with closing(sqlite3.connect(other)) as db, db:
            db.execute(content)
    else:
        other.write_text(content)
    with pytest.raises(BadFile, match=f"{other} is not a segment of a ledger") as caught:
        open_segment(other)
    assert (caught.value.code, caught.value.hint) == ("segment_unreadable", "name a file of `signer ledger archive`")
    with pytest.raises(BadFile) as caught:
        archive(data_dir, other)
    assert caught.value.code == "segment_exists"


def test_a_segment_of_a_newer_version_says_so(data_dir: Path, segment: Path) -> None:
    archive(data_dir, segment)
    segment.chmod(0o600)
    with closing(sqlite3.connect(segment)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(LedgerBroken) as caught:
        open_segment(segment)
    assert caught.value.code == "ledger_version_newer"


def test_a_segment_whose_digest_was_recorded_is_still_verified(
    data_dir: Path, segment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from signer.ledger import archive as made_by

    archive(data_dir, segment)
    digest = made_by.file_digest(segment)
    segment.chmod(0o600)
    with closing(sqlite3.connect(segment)) as db, db:
        db.execute(f"DROP TRIGGER {TRIGGERS[0]}")
        db.execute("UPDATE events SET actor = 'x' WHERE seq = 200")
    monkeypatch.setattr(made_by, "file_digest", lambda _path: digest)
    with closing(LedgerReader(data_dir)) as reader, pytest.raises(LedgerBroken, match="event 200"):
        verify_segments(reader, [segment])


def test_a_segment_of_other_events_whose_digest_was_recorded_is_not_one(
    data_dir: Path, segment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from signer.ledger import archive as made_by

    with closing(LedgerReader(data_dir)) as reader:
        write_segment(reader, tmp_path / "short", 256, lambda _done, _all: None)
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    with closing(Ledger(other)) as ledger:
        ledger.commit([freeze("all")] * ARCHIVED, NOW)
        write_segment(ledger, tmp_path / "foreign", ARCHIVED, lambda _done, _all: None)
    archive(data_dir, segment)
    digest = made_by.file_digest(segment)
    monkeypatch.setattr(made_by, "file_digest", lambda _path: digest)
    for name, how in (
        ("short", f"the segment ends with event 256, expected {ARCHIVED}"),
        ("foreign", f"event {ARCHIVED} has another hash in the ledger"),
    ):
        with (
            closing(LedgerReader(data_dir)) as reader,
            pytest.raises(LedgerBroken, match=f"the segment {name} and the ledger do not form one chain: {how}"),
        ):
            verify_segments(reader, [tmp_path / name])


# --- kill -9 at each step ---------------------------------------------------------------------------------------


def test_killed_before_any_call_it_can_be_run_again(tmp_path: Path) -> None:
    short = tmp_path / "data"
    short.mkdir(mode=0o700)
    fill_long(short, 300)
    number, places = 0, set[str]()
    before = read_state(short)
    old = verify_folder(short)
    while True:
        folder = tmp_path / f"run-{number}"
        data_dir, segment = folder / "data", folder / "segment"
        shutil.copytree(short, data_dir)
        if not dies_at(number, lambda: archive(data_dir, segment, KEEP_AT_LEAST)):  # noqa: B023 - called at once
            break
        if (data_dir / FILE_NAME).exists():
            places.add("old" if verify_folder(data_dir) == old else "new")
        else:
            places.add("none")
            with closing(Ledger(data_dir)) as keeper, pytest.raises(Unavailable, match="was interrupted") as caught:
                keeper.connection()
            assert caught.value.code == "ledger_missing"
        with Archiving(data_dir) as archiving:
            archiving.finish_interrupted()
        with closing(LedgerReader(data_dir)) as reader:
            is_done = reader.base == 256
        if not is_done:
            archive(data_dir, segment, KEEP_AT_LEAST)
        assert read_state(data_dir) == before
        with closing(LedgerReader(data_dir)) as reader:
            assert verify(reader).seq == 301, "archived once"
            assert verify_segments(reader, [segment]).missing == ()
        kept = [verify_folder(aside) for aside in data_dir.glob("ledger.archived-*") if any(aside.iterdir())]
        assert old in kept, f"call {number}: the old ledger is kept whole"
        assert not list(data_dir.glob("ledger.rest*"))
        shutil.rmtree(folder)
        number += 1
    assert number > 30, f"it was killed at {number} places"
    assert places == {"old", "none", "new"}
