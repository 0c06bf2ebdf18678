"""Compares the tables and triggers of a ledger with those that it was made with.

A trigger that was dropped lets events be changed; a trigger or column that was added makes writes fail or do more than
they say. Indexes are no part of it: the keeper makes those that are missing.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import cache
from typing import Final

from signer.errors import LedgerBroken
from signer.ledger.schema import ARCHIVED, ARCHIVED_TRIGGERS, ARCHIVED_VERSION, EVENTS

# Older ledgers have others beside them, which nothing reads; so is `archived` in one of an older version.
_TABLES: Final = ("events", "probe")
_ARCHIVED_TABLES: Final = (*_TABLES, "archived")


def check_structure(db: sqlite3.Connection) -> None:
    """Raises `LedgerBroken` with every difference; raises `sqlite3` errors as they are."""
    is_archived = db.execute("PRAGMA user_version").fetchone()[0] == ARCHIVED_VERSION
    tables = _ARCHIVED_TABLES if is_archived else _TABLES
    expected, found = _expected(tables), _read(db, tables)
    differences = [f"{name} is missing" for name in expected if name not in found]
    differences += [f"{name} is not one of signer's" for name in found if name not in expected]
    differences += [
        f"{name} is another one" for name, text in expected.items() if name in found and found[name] != text
    ]
    if differences:
        raise LedgerBroken(
            "ledger_structure_differs",
            f"the ledger's file was changed by another program: {', '.join(differences)}",
            "keep the file unchanged, run `signer ledger verify` with a saved head, and restore a backup",
        )


@cache
def _expected(tables: tuple[str, ...]) -> dict[str, str]:
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(EVENTS + ARCHIVED + "".join(ARCHIVED_TRIGGERS))
        return _read(db, tables)


def _read(db: sqlite3.Connection, tables: tuple[str, ...]) -> dict[str, str]:
    """What each column and trigger of the tables is, by its name."""
    found: dict[str, str] = {}
    for table in tables:
        columns = db.execute('SELECT name, type, "notnull", pk, hidden FROM pragma_table_xinfo(?)', (table,))
        for name, *facts in columns:
            found[f"column {table}.{name}"] = " ".join(map(str, facts))
    triggers = db.execute("SELECT name, sql, tbl_name FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, sql in ((name, sql) for name, sql, table in triggers if table in tables):
        found[f"trigger {name}"] = " ".join(sql.split())
    return found
