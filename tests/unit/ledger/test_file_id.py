"""A commit looks which file its path names without a question for times."""

from __future__ import annotations

import os
import struct
import time
from contextlib import closing
from pathlib import Path

import pytest

from signer.ledger.file_id import file_id, found_file
from signer.ledger.fold import Fold
from signer.ledger.store import Ledger
from tests.parts.events import issued


def test_they_are_those_of_stat(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to(file)
    for path in (file, link, tmp_path, Path("/proc/self/stat"), Path("/dev/null")):
        facts = path.stat()
        assert file_id(str(path)) == file_id(path) == file_id(os.fsencode(path)) == found_file(path)
        inode, _, major, minor = struct.unpack("=Q12sII", file_id(path))
        assert (os.makedev(major, minor), inode) == (facts.st_dev, facts.st_ino)


def test_a_file_with_the_number_of_another_is_another(tmp_path: Path) -> None:
    file = tmp_path / "file"
    seen = set()
    for _ in range(20):  # ext4 gives the number that became free first
        file.touch()
        seen.add(file_id(file))
        file.unlink()
        time.sleep(0.01)
    if bytes(12) in {one[8:20] for one in seen}:
        pytest.skip("this file system does not say when a file was made")
    assert len(seen) == 20


def test_a_path_without_a_file(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match="missing"):
        file_id(missing)
    assert found_file(missing) is None


def test_a_commit_and_a_fold_ask_for_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Since Linux 6.13 they would make the next write of the same file slower."""
    with closing(Ledger(tmp_path)) as ledger:
        ledger.commit([issued(1)], 1_000)
        fold = Fold(tmp_path, ledger)
        fold.fold_slice()

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("asked for the times of a file")

        for name in ("stat", "lstat", "fstat"):
            monkeypatch.setattr(os, name, refuse)
        ledger.commit([issued(2)], 2_000)
        assert fold.fold_slice() == 2
        monkeypatch.undo()
        fold.close()
