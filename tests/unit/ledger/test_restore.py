"""A restore puts a copy in the ledger's place: wholly or not at all, and once, wherever it is killed."""

from __future__ import annotations

import io
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from signer.errors import BadFile, LedgerBroken, Unavailable
from signer.ledger.audit import verify
from signer.ledger.backup import Restoration, back_up
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME
from signer.ledger.store import LOCK_NAME, Ledger
from signer.model import Event, Head
from tests.parts.events import freeze, issued
from tests.parts.full_disk import files_at_most
from tests.parts.killed import dies_at
from tests.parts.ledgers import TRIGGERS, fill

NOW = 1_800_000_100_000
RESTORED = Event(
    "ledger.restored", "local:root", {"lost_head": None, "first_serial": 4, "last_serial": 1_000_003, "ca": None}
)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    fill(folder)
    return folder


@pytest.fixture
def backup(tmp_path: Path, data_dir: Path) -> Path:
    """A backup, after which two certificates more are issued; they are in the write-ahead log only."""
    with closing(LedgerReader(data_dir)) as reader:
        back_up(reader, tmp_path / "backup")
    keeper = Ledger(data_dir)
    keeper.commit([issued(4), issued(5)], 1_800_000_001_000)
    for name in (FILE_NAME, f"{FILE_NAME}-wal"):  # as a keeper leaves them that is killed
        shutil.copy(data_dir / name, tmp_path / name)
    keeper.close()
    for name in (FILE_NAME, f"{FILE_NAME}-wal"):
        shutil.copy(tmp_path / name, data_dir / name)
    return tmp_path / "backup"


def restore(data_dir: Path, backup: Path) -> Path | None:
    """As `signer ledger restore`; a restore that was interrupted is ended, and is enough."""
    with Restoration(data_dir) as restoration:
        if restoration.finish_interrupted() is not None:
            return None
        restoration.take(io.BytesIO(backup.read_bytes())).close()
        return restoration.commit([RESTORED, freeze("all")], NOW)[1]


def head_of(folder: Path) -> Head:
    """The head of a ledger that verifies."""
    with closing(LedgerReader(folder)) as reader:
        return verify(reader)


def test_the_copy_is_in_the_place_and_the_old_files_are_kept(data_dir: Path, backup: Path) -> None:
    old = head_of(data_dir)
    aside = restore(data_dir, backup)
    assert aside is not None
    assert head_of(aside) == old
    assert head_of(data_dir).seq == 12
    assert {path.name for path in data_dir.iterdir() if path != aside} == {FILE_NAME, LOCK_NAME}
    assert (data_dir / FILE_NAME).stat().st_mode & 0o777 == 0o600
    with closing(Ledger(data_dir)) as keeper:
        assert (keeper.last_serial(), list(keeper.freezes())) == (1_000_003, ["role:llmops", "all"])
        keeper.commit([issued(1_000_004)], NOW)
    assert head_of(data_dir).seq == 13


def test_a_skipped_serial_is_not_given(data_dir: Path, backup: Path) -> None:
    restore(data_dir, backup)
    with closing(Ledger(data_dir)) as keeper, pytest.raises(ValueError, match="does not follow 1000003"):
        keeper.commit([issued(4)], NOW)


def test_verify_finds_a_skipped_serial_that_was_given(data_dir: Path, backup: Path) -> None:
    restore(data_dir, backup)
    with closing(Ledger(data_dir)) as keeper:
        keeper.head()  # opens the file
        keeper._last_serial = 0
        keeper.commit([issued(4)], NOW)
    with pytest.raises(LedgerBroken, match="event 13: its serial 4 is one that the restore of event 11 skipped"):
        head_of(data_dir)


def test_verify_says_of_a_lost_head_that_it_was_lost(data_dir: Path, backup: Path) -> None:
    lost = head_of(data_dir)
    restore(data_dir, backup)
    with closing(LedgerReader(data_dir)) as reader:
        for saved in (lost, Head(99, "a" * 64, 0)):
            with pytest.raises(LedgerBroken) as caught:
                verify(reader, saved=saved)
            assert caught.value.code == "ledger_head_lost"
        with pytest.raises(LedgerBroken) as caught:
            verify(reader, saved=Head(3, "a" * 64, 0))
        assert caught.value.code == "ledger_broken"


def test_a_second_restore_skips_on_from_the_first(data_dir: Path, backup: Path) -> None:
    restore(data_dir, backup)
    with closing(LedgerReader(data_dir)) as reader:
        assert [(one.seq, one.lost_seq, one.last_serial) for one in reader.restores()] == [(11, None, 1_000_003)]
        assert reader.last_serial() == 1_000_003


def test_it_is_refused_while_a_keeper_runs(data_dir: Path) -> None:
    with closing(Ledger(data_dir)), pytest.raises(Unavailable) as caught:
        Restoration(data_dir)
    assert (caught.value.code, caught.value.hint) == ("ledger_in_use", "stop the service, then restore")


def broken_chain(file: Path) -> None:
    with closing(sqlite3.connect(file)) as db, db:
        db.execute(f"DROP TRIGGER {TRIGGERS[0]}")
        db.execute("UPDATE events SET actor = 'nobody' WHERE seq = 3")


def dropped_trigger(file: Path) -> None:
    with closing(sqlite3.connect(file)) as db, db:
        db.execute(f"DROP TRIGGER {TRIGGERS[1]}")


def added_trigger(file: Path) -> None:
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("CREATE TRIGGER more AFTER INSERT ON events BEGIN SELECT 1; END")


def cut_off(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def newer_version(file: Path) -> None:
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("PRAGMA user_version = 99")


def foreign(file: Path) -> None:
    file.unlink()
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("CREATE TABLE ours (a)")


def emptied(file: Path) -> None:
    with closing(sqlite3.connect(file)) as db, db:
        (again,) = db.execute("SELECT sql FROM sqlite_master WHERE name = ?", (TRIGGERS[1],)).fetchone()
        db.execute(f"DROP TRIGGER {TRIGGERS[1]}")
        db.execute("DELETE FROM events")
        db.execute(again)


def no_database(file: Path) -> None:
    file.write_bytes(b"this is not a database\n" * 99)


def nothing(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    "damage, code",
    [
        (broken_chain, "ledger_broken"),
        (dropped_trigger, "ledger_structure_differs"),
        (added_trigger, "ledger_structure_differs"),
        (cut_off, "ledger_broken"),
        (newer_version, "ledger_version_newer"),
        (foreign, "ledger_not_ours"),
        (emptied, "backup_empty"),
        (no_database, "ledger_broken"),
        (nothing, "backup_empty"),
    ],
)
def test_a_bad_backup_changes_nothing(data_dir: Path, backup: Path, damage: Callable[[Path], None], code: str) -> None:
    damage(backup)
    files = {path.name: path.read_bytes() for path in data_dir.iterdir()}
    with pytest.raises((LedgerBroken, BadFile)) as caught:
        restore(data_dir, backup)
    assert caught.value.code == code
    assert "SIGNER_DATA_DIR" not in caught.value.text + caught.value.hint, "it is in good order"
    assert {path.name: path.read_bytes() for path in data_dir.iterdir()} == files


@pytest.mark.parametrize("is_ledger", [False, True])
def test_a_full_disk_leaves_the_old_ledger_and_a_second_run_succeeds(
    data_dir: Path, backup: Path, is_ledger: bool
) -> None:
    """A backup comes as a file; a followed copy as a ledger, which SQLite copies."""
    before = head_of(data_dir)
    with (
        files_at_most(20_000),
        Restoration(data_dir) as restoration,
        closing(LedgerReader(backup.parent, backup.name)) as reader,
        backup.open("rb") as file,
        pytest.raises(Unavailable, match="the ledger cannot be restored: ") as caught,
    ):
        restoration.take(reader if is_ledger else file)
    assert caught.value.code == "restore_failed"
    assert head_of(data_dir) == before
    assert not list(data_dir.glob("ledger.rest*"))
    restore(data_dir, backup)
    assert head_of(data_dir).seq == 12


def test_a_folder_that_never_had_a_ledger_takes_one(tmp_path: Path, backup: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir(mode=0o700)
    assert restore(folder, backup) is None
    assert head_of(folder).seq == 12
    assert (folder / LOCK_NAME).stat().st_size > 0


def test_a_ledger_that_cannot_be_read_is_kept_as_it_is(data_dir: Path, backup: Path) -> None:
    (data_dir / FILE_NAME).write_bytes(b"ruined by a disk" * 300)
    (data_dir / f"{FILE_NAME}-wal").unlink()
    with Restoration(data_dir) as restoration, restoration.replaced() as replaced:
        assert replaced is None
    aside = restore(data_dir, backup)
    assert aside is not None
    assert (aside / FILE_NAME).read_bytes() == b"ruined by a disk" * 300


def test_a_keeper_that_wrote_since_an_interrupted_restore_loses_nothing(
    data_dir: Path, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy was complete, and nothing was moved: the old ledger went on."""
    with Restoration(data_dir) as restoration:
        restoration.take(io.BytesIO(backup.read_bytes())).close()
        monkeypatch.setattr(Restoration, "_place", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            restoration.commit([RESTORED, freeze("all")], NOW)
    with closing(Ledger(data_dir)) as keeper:
        keeper.commit([issued(6)], NOW)
    with Restoration(data_dir) as restoration:
        assert restoration.finish_interrupted() is None
    assert head_of(data_dir).seq == 13
    assert not list(data_dir.glob("ledger.rest*"))


def _interrupt(_self: Restoration) -> None:
    raise KeyboardInterrupt


# --- kill -9 at each step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_ledger", [True, False])
def test_killed_before_any_call_it_can_be_run_again(tmp_path: Path, backup: Path, has_ledger: bool) -> None:
    number, old = 0, head_of(tmp_path / "data")
    saw_no_ledger = False
    while True:
        folder = tmp_path / f"data-{number}"
        if has_ledger:
            shutil.copytree(tmp_path / "data", folder, symlinks=True)
        else:
            folder.mkdir(mode=0o700)
        if not dies_at(number, lambda: restore(folder, backup)):  # noqa: B023 - called at once
            break
        if (folder / FILE_NAME).exists():
            assert head_of(folder).seq in (old.seq, 12)
        elif has_ledger:
            saw_no_ledger = True
            with closing(Ledger(folder)) as keeper, pytest.raises(Unavailable, match="the ledger is missing"):
                keeper.connection()
        restore(folder, backup)
        with closing(LedgerReader(folder)) as reader:
            assert verify(reader).seq in (12, 14), "restored once, or twice with the first one kept"
            assert len(reader.restores()) == 1
        kept = [head_of(aside) for aside in folder.glob("ledger.replaced-*") if any(aside.iterdir())]
        assert (old in kept) == has_ledger, f"call {number}: the old ledger is kept whole"
        assert not list(folder.glob("ledger.rest*"))
        number += 1
    assert number > 20, "it was killed at many places"
    assert saw_no_ledger == has_ledger
