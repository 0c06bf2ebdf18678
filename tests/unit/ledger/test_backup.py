"""A backup is the whole ledger of one moment in one file, or there is none."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from signer.errors import BadFile, LedgerBroken, Unavailable
from signer.files import lock, open_lock
from signer.ledger.audit import verify
from signer.ledger.backup import back_up
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME
from signer.ledger.store import Ledger
from signer.model import Head
from tests.parts.events import issued
from tests.parts.ledgers import TRIGGERS, fill


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    fill(folder)
    return folder


@pytest.fixture
def source(data_dir: Path) -> Iterator[LedgerReader]:
    with closing(LedgerReader(data_dir)) as reader:
        yield reader


def opened(backup: Path) -> Head:
    """The verified head of a backup."""
    folder = backup.parent / "opened"
    folder.mkdir()
    (folder / FILE_NAME).write_bytes(backup.read_bytes())
    with closing(LedgerReader(folder)) as reader:
        return verify(reader)


def test_a_backup_is_one_private_file_with_every_event(tmp_path: Path, source: LedgerReader) -> None:
    head = back_up(source, tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "data"]
    assert head == source.head() == opened(tmp_path / "copy")


def test_a_keeper_writes_on_while_it_is_backed_up(tmp_path: Path, data_dir: Path, source: LedgerReader) -> None:
    with closing(Ledger(data_dir)) as keeper:
        keeper.commit([issued(4)], 1_800_000_001_000)  # in the write-ahead log, not in the main file
        begun = keeper.head()

        def write_on(_done: int, _total: int) -> None:
            keeper.commit([issued(keeper.last_serial() + 1)], 1_800_000_002_000)

        assert back_up(source, tmp_path / "copy", write_on) == begun
        assert keeper.head().seq == begun.seq + 1
    assert opened(tmp_path / "copy") == begun


def test_nothing_is_overwritten(tmp_path: Path, source: LedgerReader) -> None:
    target = tmp_path / "copy"
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadFile, match="exists, and is not overwritten"):
        back_up(source, target)
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path, source: LedgerReader) -> None:
    target = tmp_path / "copy"

    def interfere(_done: int, _total: int) -> None:
        target.write_text("of somebody else")

    with pytest.raises(BadFile) as caught:
        back_up(source, target, interfere)
    assert caught.value.code == "backup_exists"
    assert target.read_text() == "of somebody else"
    assert not (tmp_path / ".copy.new").exists()


def test_a_broken_ledger_gives_no_backup(tmp_path: Path, data_dir: Path, source: LedgerReader) -> None:
    with closing(sqlite3.connect(data_dir / FILE_NAME)) as db, db:
        db.execute(f"DROP TRIGGER {TRIGGERS[0]}")
        db.execute("UPDATE events SET actor = 'nobody' WHERE seq = 3")
    with pytest.raises(LedgerBroken, match="event 3"):
        back_up(source, tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_what_a_killed_backup_left_is_replaced(tmp_path: Path, source: LedgerReader) -> None:
    left = tmp_path / ".copy.new"
    left.mkdir(mode=0o700)
    (left / FILE_NAME).write_bytes(b"half a copy")
    back_up(source, tmp_path / "copy")
    assert opened(tmp_path / "copy") == source.head()
    assert not left.exists()


def test_a_running_backup_to_the_same_file_is_left_alone(tmp_path: Path, source: LedgerReader) -> None:
    other = tmp_path / ".copy.new"
    other.mkdir(mode=0o700)
    descriptor = open_lock(other / "backup.lock")
    assert lock(descriptor)
    (other / FILE_NAME).write_bytes(b"its copy")
    with pytest.raises(Unavailable) as caught:
        back_up(source, tmp_path / "copy")
    assert caught.value.code == "backup_running"
    assert (other / FILE_NAME).read_bytes() == b"its copy"


def test_a_folder_that_is_a_link_is_not_used(tmp_path: Path, source: LedgerReader) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / ".copy.new").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadFile) as caught:
        back_up(source, tmp_path / "copy")
    assert caught.value.code == "backup_exists"
    assert (tmp_path / "elsewhere" / "kept").exists()


def test_a_folder_that_is_missing_is_named(tmp_path: Path, source: LedgerReader) -> None:
    with pytest.raises(Unavailable) as caught:
        back_up(source, tmp_path / "missing" / "copy")
    assert caught.value.code == "backup_failed"
    assert str(tmp_path / "missing") in caught.value.hint
