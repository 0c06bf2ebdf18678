"""What a list is made of, read from a real ledger: revocations by an index, certificates by their events."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from signer.errors import LedgerBroken
from signer.ledger.revoked import Revocations, find_hits
from signer.ledger.schema import IS_REVOCATION
from signer.ledger.store import Ledger
from signer.model import Event
from tests.parts.builders import NOW
from tests.parts.events import issued, refused


def revoked(**body: object) -> Event:
    return Event("certificates.revoked", "operator", {**body, "reason": "x"})


def hits(ledger: Ledger) -> list[int]:
    found = Revocations.from_entries(ledger.revocation_events())
    return [hit.serial for hit in find_hits(ledger, found)]


def test_the_certificates_of_an_identity_and_since_a_time_are_found(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        ledger.commit([issued(1), issued(2, identity="ci"), refused()], NOW * 1000)
        ledger.commit([issued(3, identity="ci")], NOW * 1000 + 60_000)
        ledger.commit([revoked(by="identity", identity="ci"), issued(4, identity="ci")], NOW * 1000 + 60_000)
        assert hits(ledger) == [2, 3]
        ledger.commit([revoked(by="since", since=NOW + 60)], NOW * 1000 + 60_000)
        assert hits(ledger) == [2, 3, 4]
        ledger.commit([revoked(by="since", since=NOW)], NOW * 1000 + 60_000)
        assert hits(ledger) == [1, 2, 3, 4]
        ledger.commit([Event("list.published", "keeper", {"reason": "expired"})], (NOW + 900) * 1000)
        assert hits(ledger) == [], "all have expired"


def test_revocations_are_found_by_an_index_that_certificates_are_not_in(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        search = f"SELECT * FROM events WHERE {IS_REVOCATION} AND seq >= 0 ORDER BY seq"  # noqa: S608 - a constant
        plan = str(ledger.query(f"EXPLAIN QUERY PLAN {search}"))
        assert "SEARCH events USING INDEX events_by_kind (kind=? AND rowid>?)" in plan
        ledger.commit([issued(1), refused()], NOW * 1000)
        assert ledger.query(search) == []


@pytest.mark.parametrize(
    "body",
    [{"by": "serial", "first": "x", "last": "1"}, {"by": "since"}, {"by": "name", "name": "ci"}, {"serial": "1"}],
    ids=json.dumps,
)
def test_a_malformed_revocation_is_a_broken_ledger(tmp_path: Path, body: dict[str, object]) -> None:
    with closing(Ledger(tmp_path)) as ledger:
        ledger.commit([revoked(**body)], NOW * 1000)
        with pytest.raises(LedgerBroken, match="event 1"):
            hits(ledger)
