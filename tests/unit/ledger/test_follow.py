"""A followed copy only grows, by events that continue its chain; everything else is refused and changes nothing."""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from signer.errors import BadFile, LedgerBroken, NotFound, Unavailable
from signer.ledger.archive import KEEP_AT_LEAST, Archiving, verify_segments
from signer.ledger.audit import verify
from signer.ledger.backup import back_up
from signer.ledger.chain import canonical_json, entry_hash
from signer.ledger.follow import FOLDER, LedgerCopy, Page, catch_up, read_entry
from signer.ledger.lookups import FindEntries, decode_lookup, encode_lookup
from signer.ledger.pages import CertificateReader
from signer.ledger.schema import FILE_NAME
from signer.ledger.store import Ledger
from signer.model import Entry, Event
from signer.protocol.commands import MAX_REPLY
from signer.protocol.replies import LedgerPage, decode_reply
from tests.parts.events import issued
from tests.parts.ledgers import STORY
from tests.parts.long_ledger import fill_long, time_of

NOW = 1_800_000_000_000


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Ledger]:
    folder = tmp_path / "source"
    folder.mkdir()
    with closing(Ledger(folder)) as ledger:
        ledger.commit(STORY, NOW)
        yield ledger


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[LedgerCopy]:
    (tmp_path / "standby").mkdir()
    opened = LedgerCopy(tmp_path / "standby")
    yield opened
    with suppress(OSError):  # a test that opens it again has closed it
        opened.close()


class Served:
    """Pages of a ledger as the API gives them, three events each."""

    def __init__(self, ledger: Ledger) -> None:
        self.asked: list[int] = []
        self._folder = ledger.data_dir

    def __call__(self, after: int) -> Page:
        self.asked.append(after)
        with closing(CertificateReader(self._folder)) as reader:
            lookup = decode_lookup(encode_lookup(FindEntries("standby", MAX_REPLY, after, 3)))
            page = decode_reply(lookup.answer(reader))
        assert isinstance(page, LedgerPage)
        rows = json.loads(page.model_dump_json())["entries"]
        return Page([read_entry(row) for row in rows], page.after is not None)


def follow(copy: LedgerCopy, fetch: Any) -> int:
    return catch_up(copy, fetch, lambda _seq: None)


def test_the_copy_has_every_event_as_it_is(source: Ledger, copy: LedgerCopy) -> None:
    assert follow(copy, Served(source)) == len(STORY)
    assert copy.events_after(0, 99) == source.events_after(0, 99)
    assert verify(copy) == source.head()


def test_it_resumes_where_it_was(tmp_path: Path, source: Ledger, copy: LedgerCopy) -> None:
    follow(copy, Served(source))
    copy.close()
    source.commit([issued(4), issued(5)], NOW)
    served = Served(source)
    with closing(LedgerCopy(tmp_path / "standby")) as again:
        assert follow(again, served) == 2
        assert served.asked == [len(STORY) - 1]
        assert follow(again, served) == 0
        assert again.head() == source.head()


def test_a_break_between_pages_loses_nothing(source: Ledger, copy: LedgerCopy) -> None:
    served = Served(source)

    def breaking(after: int) -> Page:
        if after >= 6:
            raise Unavailable("service_down", "away")
        return served(after)

    with pytest.raises(Unavailable, match="away"):
        follow(copy, breaking)
    assert copy.head().seq == 6
    assert follow(copy, served) == len(STORY) - 6


def _rewritten(source: Ledger, tmp_path: Path, change: int) -> Ledger:
    """A ledger with valid hashes that differs from `source` from event `change` on."""
    folder = tmp_path / "rewritten"
    folder.mkdir()
    other = Ledger(folder)
    events = [Event(entry.kind, entry.actor, json.loads(entry.body)) for entry in source.events_after(0, 99)]
    events[change - 1] = Event("request.refused", "nobody", {"code": "x"})
    other.commit(events, NOW)
    return other


@pytest.mark.parametrize("change", [1, len(STORY) - 1, len(STORY)])
def test_a_rewritten_ledger_is_refused(tmp_path: Path, source: Ledger, copy: LedgerCopy, change: int) -> None:
    follow(copy, Served(source))
    head = copy.head()
    with closing(_rewritten(source, tmp_path, change)) as other:
        for more in ([], [issued(4)]):
            other.commit(more, NOW)
            with pytest.raises(LedgerBroken) as caught:
                follow(copy, Served(other))
            assert caught.value.code == "ledger_forked"
            assert copy.head() == head


def test_a_ledger_that_was_cut_off_is_refused(tmp_path: Path, source: Ledger, copy: LedgerCopy) -> None:
    follow(copy, Served(source))
    folder = tmp_path / "short"
    folder.mkdir()
    with closing(Ledger(folder)) as short:
        short.commit(STORY[:-2], NOW)
        with pytest.raises(LedgerBroken, match=f"ends before event {len(STORY)}"):
            follow(copy, Served(short))
    assert copy.head() == source.head()


def _sealed(entry: Entry, **changes: Any) -> Entry:
    """The entry with changes, and the hash that fits them."""
    changed = replace(entry, **changes)
    digest = entry_hash(changed.seq, changed.time_ms, changed.kind, changed.actor, changed.body, changed.prev)
    return replace(changed, hash=digest)


def test_an_event_that_does_not_continue_the_chain_is_refused(source: Ledger, copy: LedgerCopy) -> None:
    follow(copy, Served(source))
    source.commit([issued(4), issued(5)], NOW)
    known, fourth, fifth = source.events_after(len(STORY) - 1, 3)
    bad: dict[str, Sequence[Entry]] = {
        "its content does not match its hash": [replace(fourth, actor="nobody")],
        "its prev is not the hash": [_sealed(fourth, prev="a" * 64)],
        "is missing": [fifth],
        "its time is before": [_sealed(fourth, time_ms=1)],
        "is out of order": [fourth, fourth],
    }
    for text, entries in bad.items():
        with pytest.raises(LedgerBroken, match=text) as caught:
            follow(copy, lambda _after, found=entries: Page([known, *found], has_more=False))
        assert caught.value.code == "ledger_forked"
        assert copy.head() == Ledger.head(copy)
        assert copy.head().seq == len(STORY)
    assert follow(copy, Served(source)) == 2


def test_a_serial_of_vaults_twice_is_refused(source: Ledger, copy: LedgerCopy) -> None:
    source.commit([issued(77, backend="vault")], NOW)
    follow(copy, Served(source))
    known = source.entry(len(STORY) + 1)
    again = _sealed(known, seq=known.seq + 1, prev=known.hash)
    with pytest.raises(LedgerBroken, match="serial of Vault's"):
        follow(copy, lambda _after: Page([known, again], has_more=False))
    assert copy.head().seq == known.seq


def test_pages_without_end_are_refused(source: Ledger, copy: LedgerCopy) -> None:
    with pytest.raises(Unavailable, match="pages without events"):
        follow(copy, lambda _after: Page([], has_more=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"seq": "1"}, {"seq": True}, {"seq": -1}, {"seq": 2**63}, {"time": None}, {"time": 1.5}, {"kind": None},
        {"body": "{}"}, {"body": {"a": 1.5}}, {"body": {"ä": 1}}, {"prev": 3}, {"hash": []}, {"body": {"a": 2**60}},
    ],
)  # fmt: skip
def test_an_event_of_another_shape_is_refused(changes: dict[str, Any]) -> None:
    row: dict[str, Any] = {"seq": 1, "time": 2, "kind": "k", "actor": "a", "body": {}, "prev": "", "hash": ""}
    assert read_entry(row).body == canonical_json({})
    with pytest.raises(ValueError, match=r"event|integer|ASCII"):
        read_entry({**row, **changes})


def test_no_keeper_writes_the_copy(tmp_path: Path, source: Ledger, copy: LedgerCopy) -> None:
    follow(copy, Served(source))
    copy.close()
    with pytest.raises(Unavailable) as caught:
        Ledger(tmp_path / "standby" / FOLDER)
    assert caught.value.code == "ledger_followed"
    with closing(LedgerCopy(tmp_path / "standby")) as again:  # the refused keeper has released the lock
        assert again.head() == source.head()


def test_a_ledger_of_a_keeper_is_not_followed_into(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    with closing(Ledger(tmp_path / FOLDER)) as keeper:
        keeper.commit(STORY, NOW)
    with pytest.raises(Unavailable) as caught:
        LedgerCopy(tmp_path)
    assert caught.value.code == "ledger_not_followed"


def test_one_process_follows(tmp_path: Path, copy: LedgerCopy) -> None:
    with pytest.raises(Unavailable) as caught:
        LedgerCopy(tmp_path / "standby")
    assert caught.value.code == "ledger_in_use"


def test_a_page_has_at_least_one_event_and_else_fits_its_room(source: Ledger) -> None:
    with closing(CertificateReader(source.data_dir)) as reader:
        for room, expected in ((1, 1), (4_000, 3), (MAX_REPLY, len(STORY))):
            page = decode_reply(FindEntries("standby", room, 0, 200).answer(reader))
            assert isinstance(page, LedgerPage)
            assert len(page.entries) == expected
            assert page.after == (None if expected == len(STORY) else str(expected))


def test_a_copy_of_an_archived_ledger_begins_with_a_backup(tmp_path: Path, copy: LedgerCopy) -> None:
    archived = tmp_path / "archived"
    archived.mkdir(mode=0o700)
    fill_long(archived, 300)
    before = LedgerCopy(tmp_path)
    with closing(Ledger(archived)) as ledger:
        catch_up(before, Served(ledger), lambda _seq: None)
    with Archiving(archived) as archiving:
        plan = archiving.plan(tmp_path / "segment", KEEP_AT_LEAST, time_of(300))
        archiving.run(tmp_path / "segment", plan, "local:root", time_of(300))
    with closing(Ledger(archived)) as ledger:
        ledger.commit([issued(5_000)], time_of(301))
        with pytest.raises(NotFound) as caught:
            catch_up(copy, Served(ledger), lambda _seq: None)
        assert caught.value.code == "events_archived"
        back_up(ledger, tmp_path / "backup")
        with (tmp_path / "backup").open("rb") as backup:
            assert copy.begin_with(backup) == ledger.head()
        with (tmp_path / "backup").open("rb") as backup, pytest.raises(BadFile) as again:
            copy.begin_with(backup)
        assert again.value.code == "copy_exists"
        ledger.commit([issued(5_001)], time_of(302))
        for one in (copy, before):  # the copy that has the archived events goes on as well
            catch_up(one, Served(ledger), lambda _seq: None)
            assert verify(one) == ledger.head()
    assert (copy.base, before.base) == (256, 0)
    with closing(before):
        assert verify_segments(before, [tmp_path / "segment"]).missing == ()


def _no_events(folder: Path) -> bytes:
    folder.mkdir()
    with closing(Ledger(folder)) as ledger:
        ledger.head()
        ledger.connection().execute("PRAGMA journal_mode = DELETE")
    return (folder / FILE_NAME).read_bytes()


def _foreign(folder: Path) -> bytes:
    folder.mkdir()
    with closing(sqlite3.connect(folder / FILE_NAME)) as db, db:
        db.execute("CREATE TABLE ours (a)")
    return (folder / FILE_NAME).read_bytes()


@pytest.mark.parametrize(
    "make, code",
    [
        (lambda _folder: b"this is not a database\n" * 99, "ledger_broken"),
        (lambda _folder: b"", "backup_empty"),
        (_no_events, "backup_empty"),
        (_foreign, "ledger_not_ours"),
    ],
)
def test_a_backup_that_is_none_begins_no_copy(
    tmp_path: Path, copy: LedgerCopy, make: Callable[[Path], bytes], code: str
) -> None:
    with pytest.raises((LedgerBroken, BadFile)) as caught:
        copy.begin_with(io.BytesIO(make(tmp_path / "other")))
    assert caught.value.code == code
    assert "SIGNER_DATA_DIR" not in caught.value.text + caught.value.hint
    assert not list(copy.data_dir.glob("ledger.begun*"))
    copy.note(1)
