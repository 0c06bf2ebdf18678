"""What requests, waivers and incidents are rebuilt from: by an index, from recent events, and incidents of any age."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME, IS_ASKED
from signer.ledger.store import Ledger
from signer.model import Event
from tests.parts.events import freeze, issued, refused, thaw, withheld

ASKED = ("approval.requested", "approval.given", "approval.issued", "waiver.used", "waiver.ended")
INCIDENTS = ("incident.opened", "incident.closed")
OTHERS = (
    "keeper.started", "keeper.stopped", "policy.loaded", "ca.rotated", "operation.recorded", "refusals.repeated",
    "shadow.difference",
)  # fmt: skip


def made(kind: str) -> Event:
    return Event(kind, "somebody", {})


def test_recent_events_of_requests_and_all_incidents_are_read_in_order(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        ledger.commit([*map(made, ASKED + INCIDENTS + OTHERS), freeze("all"), thaw("all")], 1_000_000)
        ledger.commit([issued(1), refused(), withheld(1), *map(made, OTHERS)], 2_000_000)
        ledger.commit([made("incident.opened"), freeze("role:x"), *map(made, ASKED), issued(2)], 3_000_000)
        kinds = [entry.kind for entry in ledger.asked(2_500)]
        assert kinds == [*INCIDENTS, "incident.opened", "freeze.set", *ASKED]
        every = [entry.kind for entry in ledger.asked(0)]
        assert every == [*ASKED, *INCIDENTS, "freeze.set", "freeze.lifted", "incident.opened", "freeze.set", *ASKED]
        assert ledger.asked(4_000) == [entry for entry in ledger.asked(0) if entry.kind in INCIDENTS]


def test_they_are_found_by_an_index_that_certificates_are_not_in(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        search = f"SELECT * FROM events WHERE {IS_ASKED} AND seq >= 0 ORDER BY seq"  # noqa: S608 - a constant
        plan = ledger.query(f"EXPLAIN QUERY PLAN {search}")
        assert "SEARCH events USING INDEX events_by_kind (kind=? AND rowid>?)" in str(plan)
        ledger.commit([issued(1), refused(), *map(made, OTHERS), freeze("all")], 1_000_000)
        assert ledger.query(search) == []


@pytest.mark.parametrize("index", ["events_by_kind", "events_of_vault"])
def test_an_index_that_a_ledger_of_an_earlier_release_lacks_is_added(tmp_path: Path, index: str) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        ledger.commit([made("approval.requested")], 1_000_000)
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as db:
        db.execute(f"DROP INDEX {index}")
        db.commit()
        before = db.execute("PRAGMA user_version").fetchone()
    with closing(LedgerReader(tmp_path)) as reader:
        assert [entry.kind for entry in reader.asked(0)] == ["approval.requested"], "readers do without it"
    with closing(Ledger(tmp_path)) as ledger:
        assert (index,) in ledger.query("SELECT name FROM sqlite_master WHERE type = 'index'")
        assert ledger.query("PRAGMA user_version") == [before], "an earlier release can open it again"
