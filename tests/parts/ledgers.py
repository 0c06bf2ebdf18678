"""Small ledgers with a bit of everything in them, and a way to change them that no honest program has."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from signer.ledger.audit import verify
from signer.ledger.fold import fold_all
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import EVENTS, FILE_NAME, VIEWS, VIEWS_NAME
from signer.ledger.store import Ledger
from signer.model import Event, Head
from tests.parts.events import freeze, issued, refused, thaw, withheld

STORY = [
    Event("keeper.started", "keeper", {"version": "0.1.0"}),
    issued(1, identity="deploy-agent"),
    refused(),
    issued(2, identity="operator", principals=["llmops", "rootß\\"]),
    withheld(2),
    freeze("role:llmops", "first"),
    thaw("role:llmops"),
    freeze("role:llmops", "again"),
    freeze("all", "drill"),
    issued(3),
]
TRIGGERS = ("events_are_never_changed", "events_are_never_removed", "events_are_never_replaced")


def fill(folder: Path, events: list[Event] = STORY) -> Head:
    ledger = Ledger(folder)
    for number, event in enumerate(events):
        ledger.commit([event], 1_800_000_000_000 + number)
    fold_all(ledger)
    head = verify(ledger)
    ledger.close()
    return head


def change_views(folder: Path, sql: str, *values: object) -> int:
    """Changes `views.sqlite3` as no keeper does; returns how many rows."""
    with closing(sqlite3.connect(folder / VIEWS_NAME)) as db, db:
        return db.execute(sql, values).rowcount


def rows_of_views(folder: Path) -> dict[str, list[tuple[object, ...]]]:
    """All rows of all views in the file."""
    with closing(sqlite3.connect(folder / VIEWS_NAME)) as db:
        return {view.name: sorted(db.execute(f"SELECT * FROM {view.name}")) for view in VIEWS}  # noqa: S608


class Opened(LedgerReader):
    """A reader on a connection that the test also writes through, past the triggers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._db = sqlite3.connect(folder / FILE_NAME, isolation_level=None)
        for trigger in TRIGGERS:
            self._db.execute(f"DROP TRIGGER {trigger}")
        self._db.execute("DROP INDEX events_of_vault")  # it refuses a body that is not JSON

    def put_back(self) -> None:
        """Makes the triggers again, as a forger would."""
        with closing(sqlite3.connect(":memory:")) as new:
            new.executescript(EVENTS)
            triggers = new.execute("SELECT sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for (statement,) in triggers:
            self.connection().execute(statement)
