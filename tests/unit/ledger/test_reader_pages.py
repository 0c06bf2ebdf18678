"""Pages of certificates: every filter finds what it should, and none looks at everything at once."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from signer.ledger import pages
from signer.ledger.fold import fold_all
from signer.ledger.pages import CertificateReader
from signer.ledger.schema import VIEWS_NAME
from signer.ledger.store import Ledger
from signer.model import Event, Filter, Issued

NOW = 1_000


def issued(serial: int, identity: str, role: str, principals: list[str], valid_before: int) -> Event:
    return Event(
        "certificate.issued",
        identity,
        {
            "serial": str(serial),
            "backend": "local",
            "identity": identity,
            "role": role,
            "principals": principals,
            "fingerprint": f"SHA256:{serial % 7}",
            "key_id": "k",
            "valid_after": 0,
            "valid_before": valid_before,
        },
    )


@pytest.fixture(params=[0, 1, 60, 119, 120])
def ledger(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[CertificateReader]:
    """So many of its 120 events are in the file; the reader folds the others in memory."""
    made = Ledger(tmp_path)
    cases = product(("ann", "bob"), ("deploy", "read"), (["root"], ["llmops", "root"], ["llmops"]), (500, 2_000))
    events = [issued(n + 1, *case) for n, case in enumerate(list(cases) * 5)]
    made.commit(events[: request.param], 1)
    fold_all(made)
    made.commit(events[request.param :], 1)
    reader = CertificateReader(tmp_path)
    yield reader
    reader.close()
    made.close()


def by_hand(rows: list[Issued], wanted: Filter) -> list[int]:
    return [
        row.seq
        for row in rows
        if wanted.identity in (None, row.identity)
        and wanted.role in (None, row.role)
        and wanted.fingerprint in (None, row.fingerprint)
        and wanted.backend in (None, row.backend)
        and (wanted.principal is None or wanted.principal in row.principals)
        and (wanted.any_of is None or set(wanted.any_of) & set(row.principals))
        and (wanted.active_at is None or row.valid_before > wanted.active_at)
        and (wanted.before is None or row.seq < wanted.before)
    ]


FILTERS = [
    Filter(identity=identity, role=role, principal=principal, fingerprint=fingerprint, active_at=active_at)
    for identity, role, principal, fingerprint, active_at in product(
        (None, "ann", "nobody"), (None, "read"), (None, "root", "nobody"), (None, "SHA256:3"), (None, NOW)
    )
]
ANY_OF = [
    Filter(identity=identity, role=role, principal=principal, any_of=any_of, active_at=active_at)
    for identity, role, principal, any_of, active_at in product(
        (None, "ann"), (None, "read"), (None, "llmops"), (("root", "nobody"), ("llmops", "root"), ()), (None, NOW)
    )
] + [Filter(fingerprint="SHA256:3", any_of=("root",)), Filter(backend="vault", any_of=("root",))]


def test_every_combination_of_filters_finds_exactly_what_fits(ledger: CertificateReader) -> None:
    everything = ledger.certificates(Filter(limit=1_000))
    assert len(everything) == 120
    for wanted in FILTERS + ANY_OF:
        for before in (None, 61):
            asked = replace(wanted, before=before, limit=1_000)
            assert [row.seq for row in ledger.certificates(asked)] == by_hand(everything, asked), asked


@pytest.mark.parametrize("looked_at", [1, 7, 1_000])
def test_pages_put_together_are_the_whole_however_short_each_is(
    ledger: CertificateReader, looked_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "MAX_SCANNED", looked_at)
    everything = ledger.certificates(Filter(limit=1_000))
    for wanted in FILTERS + ANY_OF:
        found: list[int] = []
        before: int | None = None
        for _ in range(200):
            rows, before = ledger.page(replace(wanted, before=before, limit=1_000))
            found += [row.seq for row in rows]
            if before is None:
                break
        assert before is None
        assert found == by_hand(everything, wanted), wanted


def test_pages_of_any_principal_hold_each_certificate_once_and_as_many_as_fit(ledger: CertificateReader) -> None:
    everything = ledger.certificates(Filter(limit=1_000))
    for wanted in ANY_OF:
        expected = by_hand(everything, wanted)
        found: list[int] = []
        while rows := ledger.certificates(replace(wanted, before=found[-1] if found else None, limit=7)):
            assert len(rows) == min(7, len(expected) - len(found)), wanted
            found += [row.seq for row in rows]
        assert found == expected, wanted


def test_a_principal_that_few_have_is_found_without_a_look_at_the_others(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path)) as made:
        rare = [issued(1, "ann", "read", ["rare", "root"], 2_000)]
        made.commit(rare + [issued(serial, "ann", "read", ["root"], 2_000) for serial in range(2, 5_000)], 1)
        fold_all(made)
    with closing(CertificateReader(tmp_path)) as reader:
        with reader._snapshot() as (_, file, _folded):
            assert file is not None
            steps = 0

            def count() -> int:
                nonlocal steps
                steps += 1
                return 0

            file.set_progress_handler(count, 10)  # after each 10 instructions
        assert [row.serial for row in reader.certificates(Filter(any_of=("rare", "rarer")))] == [1]
        assert [row.serial for row in reader.certificates(Filter(role="read", any_of=("rare", "rarer")))] == [1]
        assert 0 < steps < 100


@pytest.mark.parametrize("folded", [0, 7, 60, 120])
@pytest.mark.parametrize("identity", [None, "ann"])
@pytest.mark.parametrize("active_at", [None, NOW])
def test_since_finds_what_was_recorded_then_or_later_in_both_files_and_on_every_page(
    tmp_path: Path, folded: int, identity: str | None, active_at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "MAX_SCANNED", 7)
    with closing(Ledger(tmp_path)) as made:
        for serial in range(1, 121):  # ten in each second
            made.commit(
                [issued(serial, "ann" if serial % 3 else "bob", "read", ["root"], 500 + serial % 2 * 1_000)],
                (serial - 1) // 10 * 1_000,
            )
            if serial == folded:
                fold_all(made)
        with closing(CertificateReader(tmp_path)) as reader:
            for since in (0, 1, 6, 11, 12):
                wanted = Filter(identity=identity, active_at=active_at, since=since, limit=1_000)
                expected = [
                    serial
                    for serial in range(120, since * 10, -1)
                    if (identity is None or serial % 3) and (active_at is None or serial % 2)
                ]
                assert [row.serial for row in reader.certificates(wanted)] == expected
                found: list[int] = []
                before: int | None = None
                while True:
                    rows, before = reader.page(replace(wanted, before=before))
                    found += [row.serial for row in rows]
                    if before is None:
                        break
                assert found == expected


def test_a_page_never_looks_at_more_rows_of_the_file_than_its_bound(
    ledger: CertificateReader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pages, "MAX_SCANNED", 10)
    with closing(sqlite3.connect(tmp_path / VIEWS_NAME)) as db:
        of_ann = db.execute("SELECT seq FROM certificates WHERE identity = 'ann' ORDER BY seq DESC").fetchall()
    tenth = of_ann[9][0] if len(of_ann) >= 10 else None
    assert ledger.page(Filter(identity="ann", role="read", principal="nobody")) == ([], tenth)
