"""Compares what a ledger's file has besides its events with what it should have: tables and triggers, and the partial
indexes on events, by which what decides is found.

A trigger that was dropped lets events be changed; a trigger or column that was added makes writes fail or do more than
they say. The keeper makes indexes that are missing, and drops those of older releases that they replace.

SQLite's `integrity_check` does that too, but evaluates the condition of each index for each event, JSON included, which
takes four times as long as its `quick_check`. Nearly all events of a large ledger are local certificates, in no index.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from functools import cache
from typing import Any, Final

import msgspec

from signer.errors import LedgerBroken
from signer.ledger.reader import LedgerReader, broken_at
from signer.ledger.schema import (
    ARCHIVED,
    ARCHIVED_TRIGGERS,
    ARCHIVED_VERSION,
    BY_KIND,
    EVENT_INDEXES,
    EVENTS,
    ISSUED,
    OLDER_INDEXES,
    EventIndex,
)


class _AnyBody(msgspec.Struct):
    """Any JSON object."""


_ANY_BODY: Final = msgspec.json.Decoder(_AnyBody)
_VAULTS: Final = '"backend":"vault"'  # in the canonical JSON of each certificate of Vault's


def check_file(reader: LedgerReader) -> None:
    """Checks the pages of the table and its indexes, and all entries if `known_indexes` is None.

    Raises `LedgerBroken`. The tables of version 1 do not matter.
    """
    check = "integrity_check" if known_indexes(reader) is None else "quick_check"
    for (finding,) in _query(reader, f"PRAGMA {check}(events)"):
        if finding != "ok":
            raise _damaged(finding)


def known_indexes(reader: LedgerReader) -> Sequence[EventIndex] | None:
    """The indexes on events that the file has, of this or an older release; None if one is not as signer makes it."""
    found = dict(reader.query("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name = 'events'"))
    known = [index for index in (*EVENT_INDEXES, *OLDER_INDEXES) if found.get(index.name) == index.definition]
    return known if len(known) == len(found) else None


class IndexEntries:
    """Looks events up in those of `indexes` whose condition they meet.

    A keeper that was started meanwhile may have dropped some of them: their events are counted all the same. Make and
    finish it within one transaction.
    """

    def __init__(self, reader: LedgerReader, indexes: Sequence[EventIndex]) -> None:
        self._reader = reader
        self._present = {index.name for index in known_indexes(reader) or ()}
        self._is_by_kind = BY_KIND in indexes
        self._by_kind: defaultdict[str, list[int]] = defaultdict(list)
        self._indexes = [index for index in indexes if index != BY_KIND]
        self._conditions = [f"({index.condition})" for index in self._indexes]
        self._may_be_indexed: dict[str, bool] = {}  # by kind
        self._candidates: list[int] = []

    def add(self, rows: Iterable[tuple[Any, ...]]) -> None:
        """Takes the rows of more events, in their order."""
        for row in rows:
            kind = row[2]
            if kind == ISSUED:
                if _VAULTS in row[4]:
                    self._candidates.append(row[0])
                continue
            self._by_kind[kind].append(row[0])
            if self._may_be_indexed.get(kind) or (kind not in self._may_be_indexed and self._is_in_one(kind)):
                self._candidates.append(row[0])

    def finish(self) -> dict[str, int]:
        """How many of the events each index must have; raises `LedgerBroken` if it lacks one."""
        counts = self._count_by_kind() if self._is_by_kind else {}
        if not self._candidates or not self._indexes:
            return counts
        conditions = ", ".join(self._conditions)
        found = _query(
            self._reader,
            f"SELECT seq, {conditions} FROM events NOT INDEXED WHERE seq IN (SELECT value FROM json_each(?))",  # noqa: S608 - conditions from the schema
            json.dumps(self._candidates),
        )
        for place, index in enumerate(self._indexes, 1):
            wanted = [row[0] for row in found if row[place]]
            counts[index.name] = len(wanted)
            is_present = index.name in self._present
            if wanted and is_present and _found(self._reader, index, wanted) != len(wanted):
                raise _damaged(f"index {index.name} lacks one of the events {wanted[0]} to {wanted[-1]}")
        return counts

    def _count_by_kind(self) -> dict[str, int]:
        """As `finish`, of the index that has many events, so it is read in its own order."""
        listed = (
            f"SELECT seq FROM events INDEXED BY {BY_KIND.name} WHERE {BY_KIND.condition} AND kind = ?"  # noqa: S608 - from the schema
            " AND seq >= ? AND seq <= ? ORDER BY seq"
        )
        if BY_KIND.name in self._present:
            for kind, wanted in self._by_kind.items():
                rows = _query(self._reader, listed, kind, wanted[0], wanted[-1])
                if [seq for (seq,) in rows] != wanted:
                    raise _damaged(f"index {BY_KIND.name} has other entries than events {wanted[0]} to {wanted[-1]}")
        return {BY_KIND.name: sum(map(len, self._by_kind.values()))}

    def _is_in_one(self, kind: str) -> bool:
        """True if an index besides that by kind has events of this kind, which is not that of certificates."""
        any_of_them = " OR ".join(self._conditions) or "0"
        found = _query(self._reader, f"SELECT {any_of_them} FROM (SELECT ? AS kind, '{{}}' AS body)", kind)  # noqa: S608
        self._may_be_indexed[kind] = bool(found[0][0])
        return self._may_be_indexed[kind]


def _found(reader: LedgerReader, index: EventIndex, wanted: Sequence[int]) -> int:
    """How many of these events the index has under their key."""
    keys = (
        f"SELECT {index.key} AS wanted_key, seq AS wanted_seq FROM events NOT INDEXED"  # noqa: S608 - names from the schema
        " WHERE seq IN (SELECT value FROM json_each(?))"
    )
    looked_up = (
        f"WITH wanted AS MATERIALIZED ({keys}) SELECT count(*) FROM wanted CROSS JOIN events INDEXED BY {index.name}"  # noqa: S608 - as above
        f" ON {index.key} IS wanted_key AND seq = wanted_seq WHERE {index.condition}"
    )
    return int(_query(reader, looked_up, json.dumps(wanted))[0][0])


def check_entries(reader: LedgerReader, indexes: Sequence[EventIndex], counts: Mapping[str, int]) -> None:
    """Raises `LedgerBroken` if one of `indexes` has more entries than there are events for it, by `IndexEntries`."""
    for index in indexes:
        # An index is read that has the condition as its own: SQLite counts its entries and looks at no event.
        entries = f"SELECT count(*) FROM events INDEXED BY {index.name} WHERE {index.condition}"  # noqa: S608
        listed, events = _query(reader, entries)[0][0], counts.get(index.name, 0)
        if listed != events:
            raise _damaged(f"index {index.name} has {listed} entries for {events} events")


def _query(reader: LedgerReader, sql: str, *values: object) -> list[tuple[Any, ...]]:
    try:
        return reader.query(sql, values)
    except LedgerBroken:  # an index has no entry for a body that is not JSON
        check_json(reader)
        raise


def check_bodies(reader: LedgerReader, rows: Iterable[tuple[Any, ...]]) -> None:
    """Raises `LedgerBroken` if the body of one of these certificates is not JSON, for which no index has an entry."""
    for row in rows:
        try:
            if row[2] == ISSUED:
                _ANY_BODY.decode(row[4])
        except (msgspec.DecodeError, RecursionError):
            check_json(reader)


def check_json(reader: LedgerReader) -> None:
    """Raises `LedgerBroken` for the first event whose body is not JSON."""
    for (bad,) in reader.query("SELECT seq FROM events WHERE NOT json_valid(body) ORDER BY seq LIMIT 1"):
        raise broken_at(bad, "its body is not JSON") from None


def _damaged(what: str) -> LedgerBroken:
    return LedgerBroken("ledger_broken", f"the ledger's file is damaged: {what}", "restore a backup")


# --- tables and triggers ----------------------------------------------------------------------------------------------

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
