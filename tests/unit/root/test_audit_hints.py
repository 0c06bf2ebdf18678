"""The hint after a failed write fits its cause: nobody is blamed for a disk that is full, read-only or broken."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

import pytest

from signer.errors import Unavailable, write_hint
from signer.ledger.reader import storage_errors

CAUSES = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "free disk space",
    errno.EROFS: "read-only",
    errno.EIO: "the kernel's log",
    errno.EACCES: "owner and mode",
    errno.EPERM: "owner and mode",
}


@pytest.mark.parametrize("number", CAUSES)
def test_audit_7_the_hint_names_the_cause_of_a_failed_write(number: int) -> None:
    hint = write_hint(OSError(number, os.strerror(number)), "the evidence directory")
    assert CAUSES[number] in hint
    assert "the evidence directory" in hint
    assert ("owner" in hint) == (number in (errno.EACCES, errno.EPERM))


def test_audit_7_a_full_database_and_one_that_cannot_be_written_have_their_own_hints(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE one (x)")
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        refused = failure(db, "INSERT INTO one VALUES (1)")
    assert "read-only, then owner and mode" in refused.hint
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA max_page_count = 2")
        full = failure(db, "INSERT INTO one VALUES (zeroblob(100000))")
    assert full.hint == "free disk space for SIGNER_DATA_DIR"


def failure(db: sqlite3.Connection, sql: str) -> Unavailable:
    with pytest.raises(Unavailable) as caught, storage_errors():
        db.execute(sql)
    return caught.value


def test_audit_7_no_error_of_a_start_says_that_the_service_recovers_by_itself() -> None:
    """The same error ends a start; so it says what to do, and not what happens then."""
    with pytest.raises(Unavailable) as failed, storage_errors():
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    assert "itself" not in failed.value.hint
