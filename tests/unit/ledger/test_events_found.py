"""Events by kind, identity and time, and what happened in each hour: the same answers as by reading all events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from signer.ledger.fold import fold_all
from signer.ledger.pages import CertificateReader
from signer.ledger.store import Ledger
from signer.model import Activity, Entry, Event, EventFilter
from tests.parts.builders import MemoryStore, names_in
from tests.parts.events import freeze, issued, refused, thaw, withheld

START = 1_800_000_000_000
HOUR = 3_600_000


def repeated(count: int) -> Event:
    body: dict[str, object] = {"code": "token_unknown", "role": "", "address": "", "count": count, "since": 1}
    return Event("refusals.repeated", "unauthenticated", body)


def opened(incident: str, identity: str) -> Event:
    return Event("incident.opened", "keeper", {"incident": incident, "identity": identity, "role": "glass"})


def story() -> list[Event]:
    events: list[Event] = []
    for serial in range(1, 31):
        events.append(issued(serial, identity=("deploy-agent", "anna")[serial % 2]))
        if serial % 3 == 0:
            events += [refused(), withheld(serial)]
        if serial % 5 == 0:
            events += [freeze("identity:anna"), thaw("identity:anna"), repeated(serial), opened(f"i-{serial}", "anna")]
    return events


EVENTS = story()


@pytest.fixture(params=[0, 1, 20, len(EVENTS)])
def reader(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[CertificateReader]:
    """So many of the events are in the file of views; the reader folds the others in memory."""
    ledger = Ledger(tmp_path)
    for number, event in enumerate(EVENTS):
        ledger.commit([event], START + number * HOUR // 8)
        if number + 1 == request.param:
            fold_all(ledger)
    with_views = CertificateReader(tmp_path)
    yield with_views
    with_views.close()
    ledger.close()


def all_events(reader: CertificateReader) -> list[Entry]:
    return reader.events_after(0, 10_000)


@pytest.mark.parametrize("kind", [None, "certificate", "certificate.issued", "freeze", "freeze.set", "freez"])
def test_the_events_of_each_filter_are_those_of_reading_all(reader: CertificateReader, kind: str | None) -> None:
    for identity, since, before, only_others in product(
        (None, "anna", "operator", "unauthenticated", "nobody", ""),
        (None, START + HOUR),
        (None, 30),
        (False, True),
    ):
        wanted = EventFilter(kind, identity, since, before, only_others, limit=7)
        expected = [
            entry.seq
            for entry in reversed(all_events(reader))
            if (kind is None or entry.kind == kind or entry.kind.startswith(f"{kind}."))
            and (identity is None or identity in names_in(entry)[:1] or (identity and identity in names_in(entry)))
            and (since is None or entry.time_ms >= since)
            and (before is None or entry.seq < before)
            and not (only_others and entry.kind == "certificate.issued")
        ]
        assert [entry.seq for entry in reader.matching_events(wanted)] == expected[:7], wanted


def test_pages_of_events_meet_without_a_gap(reader: CertificateReader) -> None:
    found: list[int] = []
    before: int | None = None
    while page := reader.matching_events(EventFilter(identity="anna", before=before, limit=4)):
        found += [entry.seq for entry in page]
        before = found[-1]
    everything = reader.matching_events(EventFilter(identity="anna", limit=1_000))
    assert found == [entry.seq for entry in everything]
    assert len(found) > 20


def test_the_counts_of_each_hour_are_those_of_reading_all(reader: CertificateReader) -> None:
    bounds = [START + number * HOUR for number in range(-1, 12)]
    store = MemoryStore()
    store.entries = all_events(reader)
    counted = reader.activity(bounds)
    assert counted == store.activity(bounds)
    assert counted[0] == Activity(0, 0)  # before the first event
    assert sum(hour.issued for hour in counted) == 30 - 10  # the withheld ones were never released
    assert sum(hour.refused for hour in counted) == 10 + sum(range(5, 31, 5))


def test_finding_events_reads_no_more_of_a_larger_ledger(tmp_path: Path) -> None:
    def steps_of(folder: Path, size: int) -> int:
        """Thousands of SQLite's steps for each kind of page, with `size` events of each kind."""
        folder.mkdir()
        ledger = Ledger(folder)
        ledger.commit([event for serial in range(size) for event in (issued(serial + 1), refused())], START)
        fold_all(ledger)
        reader = CertificateReader(folder)
        reader.matching_events(EventFilter(kind="freeze"))  # opens the file
        steps = 0

        def count() -> int:
            nonlocal steps
            steps += 1
            return 0

        assert reader._views is not None
        reader._views.set_progress_handler(count, 100)
        for wanted in (
            EventFilter(kind="certificate", limit=10),
            EventFilter(kind="request.refused", identity="deploy-agent", limit=10),
            EventFilter(identity="deploy-agent", limit=10),
            EventFilter(identity="nobody", limit=10),
            EventFilter(only_others=True, kind="freeze", limit=10),
        ):
            reader.matching_events(wanted)
        reader.close()
        ledger.close()
        return steps

    assert steps_of(tmp_path / "large", 4_000) <= steps_of(tmp_path / "small", 400) + 2


def test_a_body_with_foreign_values_is_counted_once_and_is_about_nobody(tmp_path: Path) -> None:
    body: dict[str, object] = {"identity": ["anna"], "scope": 7, "count": -5}
    ledger = Ledger(tmp_path)
    ledger.commit([Event("request.refused", "ci", body)], START)
    fold_all(ledger)
    reader = CertificateReader(tmp_path)
    (found,) = reader.matching_events(EventFilter(kind="request"))
    assert json.loads(found.body) == body
    assert reader.matching_events(EventFilter(identity="anna")) == []
    assert reader.activity([START, START + HOUR]) == [Activity(0, 1)]
    reader.close()
    ledger.close()
