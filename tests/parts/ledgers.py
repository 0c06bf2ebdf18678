"""Small ledgers with a bit of everything in them, and a way to change them that no honest program has."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from signer.ledger.audit import verify
from signer.ledger.reader import FILE_NAME, LedgerReader
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
    head = verify(ledger)
    ledger.close()
    return head


class Opened(LedgerReader):
    """A reader on a connection that the test also writes through, past the triggers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._db = sqlite3.connect(folder / FILE_NAME, isolation_level=None)
        for trigger in TRIGGERS:
            self._db.execute(f"DROP TRIGGER {trigger}")
