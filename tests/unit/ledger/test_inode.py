"""A commit looks which file its path names without a question for times."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from signer.ledger.inode import device_and_inode, inode_of
from signer.ledger.store import Ledger
from tests.parts.events import issued


def test_they_are_those_of_stat(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to(file)
    for path in (file, link, tmp_path, Path("/proc/self/stat"), Path("/dev/null")):
        facts = path.stat()
        assert device_and_inode(str(path)) == device_and_inode(path) == (facts.st_dev, facts.st_ino)
        assert inode_of(path) == facts.st_ino


def test_a_path_without_a_file(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match="missing"):
        device_and_inode(missing)
    assert inode_of(missing) == 0


def test_a_commit_and_a_fold_ask_for_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Since Linux 6.13 they would make the next write of the same file slower."""
    ledger = Ledger(tmp_path)
    try:
        ledger.commit([issued(1)], 1_000)
        ledger.fold_all()

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("asked for the times of a file")

        for name in ("stat", "lstat", "fstat"):
            monkeypatch.setattr(os, name, refuse)
        ledger.commit([issued(2)], 2_000)
        while ledger.fold() is not None:
            pass
    finally:
        monkeypatch.undo()
        ledger.close()
