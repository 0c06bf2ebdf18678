"""The view writer: slices are asked for when they are due, a dead process is replaced, and nothing is missed."""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from signer.errors import Unavailable
from signer.ledger.audit import verify
from signer.ledger.fold import delete_views, fold_all
from signer.ledger.schema import FILE_NAME, VIEWS_NAME
from signer.ledger.store import Ledger
from signer.service import helper_process
from signer.service import view_writer as module
from signer.service.view_writer import DUE_EVENTS, FOLD_AFTER, HANGS_AFTER, LOOK_AFTER, RETRY_AFTER, ViewWriter
from tests.parts import missing
from tests.parts.events import issued
from tests.parts.ledgers import rows_of_views

pytestmark = pytest.mark.unix_socket

NOW = 1_800_000_000_000


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with closing(Ledger(tmp_path)) as opened:
        opened.commit([issued(1), issued(2, identity="operator")], NOW)
        yield opened


# --- when a slice is due ---------------------------------------------------------------------------------------------


class Still:
    """The process, played: takes requests, and replies when it is told to."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.replies: deque[bytes] = deque()
        self.is_there = True
        self.stopped = 0

    def ensure(self) -> bool:
        return self.is_there

    def send(self, message: bytes) -> None:
        self.asked.append(msgspec.json.decode(message))

    def receive(self) -> bytes | None:
        return self.replies.popleft() if self.replies else None

    def stop(self) -> None:
        self.stopped += 1


class Paced:
    """A view writer whose time and process stand still until they are moved."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.process = Still()
        self.writer = ViewWriter(tmp_path, selectors.DefaultSelector())
        monkeypatch.setattr(self.writer, "_helper", self.process)

    def turn(self, newest: int, reply: int | bytes | None = None, after: float = 0.0) -> float:
        self.now += after
        if isinstance(reply, int):
            reply = msgspec.json.encode({"type": "folded", "head": (reply, "h", b"r" * 32)})
        if reply is not None:
            self.process.replies.append(reply)
        return self.writer.turn(newest, has_reply=reply is not None)


@pytest.fixture
def paced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paced:
    return Paced(tmp_path, monkeypatch)


def test_the_first_slice_is_asked_for_at_once(paced: Paced) -> None:
    assert paced.turn(0) == HANGS_AFTER
    assert paced.process.asked == [{"is_new": False, "is_damaged": False}]
    assert (paced.writer.head, paced.writer.is_idle) == (None, False)
    assert paced.turn(0, reply=0) == LOOK_AFTER
    assert (paced.writer.head, paced.writer.is_idle) == ((0, "h", b"r" * 32), True)


def test_an_event_waits_for_others_but_not_for_long(paced: Paced) -> None:
    paced.turn(5)
    paced.turn(5, reply=5)
    assert paced.turn(6, after=0.3) == pytest.approx(FOLD_AFTER)
    assert not paced.writer.is_idle
    assert paced.turn(7, after=FOLD_AFTER / 2) == pytest.approx(FOLD_AFTER / 2), "since the first of them"
    assert len(paced.process.asked) == 1
    assert paced.turn(7, after=FOLD_AFTER / 2) == HANGS_AFTER
    assert len(paced.process.asked) == 2
    paced.turn(7, reply=7)
    assert paced.writer.is_idle


def test_enough_events_wait_for_nothing(paced: Paced) -> None:
    paced.turn(0)
    assert paced.turn(DUE_EVENTS, reply=0) > 0, "what the reply does not contain is not there yet for the process"
    paced.turn(DUE_EVENTS, after=FOLD_AFTER)
    assert len(paced.process.asked) == 2
    assert paced.turn(2 * DUE_EVENTS - 1, reply=DUE_EVENTS) > 0, "one is missing"
    assert paced.turn(2 * DUE_EVENTS) == HANGS_AFTER
    assert len(paced.process.asked) == 3
    paced.turn(3 * DUE_EVENTS, reply=2 * DUE_EVENTS)
    assert len(paced.process.asked) == 4, "the next one is asked for with the reply"
    assert paced.turn(9 * DUE_EVENTS) == HANGS_AFTER
    assert len(paced.process.asked) == 4, "one at a time"


def test_a_process_that_does_not_see_the_events_is_not_asked_without_pause(paced: Paced) -> None:
    paced.turn(1_000)
    for _ in range(10):
        assert paced.turn(1_000, reply=400) > 0 or len(paced.process.asked) == 2
        paced.turn(1_000, after=FOLD_AFTER)
    assert len(paced.process.asked) <= 12


def test_a_failure_is_told_and_the_slice_tried_again_after_a_pause(paced: Paced) -> None:
    paced.turn(1_000)
    failed = {"type": "failed", "code": "views_not_folded", "text": "no room", "hint": "free space"}
    with pytest.raises(Unavailable, match="no room") as caught:
        paced.turn(1_000, reply=msgspec.json.encode(failed))
    assert (caught.value.code, caught.value.hint) == ("views_not_folded", "free space")
    assert paced.turn(1_000) == pytest.approx(RETRY_AFTER)
    assert paced.turn(1_000, after=RETRY_AFTER) == HANGS_AFTER
    assert len(paced.process.asked) == 2


def test_a_process_that_ended_or_hangs_is_stopped_and_told(paced: Paced) -> None:
    paced.turn(1)
    with pytest.raises(Unavailable, match="did not answer"):
        paced.turn(1, reply=b"")
    assert paced.process.stopped == 1
    paced.turn(1, after=RETRY_AFTER)
    assert paced.turn(1, after=HANGS_AFTER - 1) == pytest.approx(1)
    with pytest.raises(Unavailable, match="did not answer"):
        paced.turn(1, after=1)
    assert paced.process.stopped == 2
    assert paced.writer.head is None


def test_a_process_that_cannot_be_started_is_tried_again(paced: Paced) -> None:
    paced.process.is_there = False
    assert paced.turn(1) == RETRY_AFTER
    paced.process.is_there = True
    assert paced.turn(1) == HANGS_AFTER


def test_without_events_it_looks_once_a_second_whether_the_file_is_there(paced: Paced) -> None:
    paced.turn(5)
    assert paced.turn(5, reply=5, after=0.01) == pytest.approx(LOOK_AFTER - 0.01)
    assert paced.turn(5, after=LOOK_AFTER) == HANGS_AFTER
    assert len(paced.process.asked) == 2


def test_a_recheck_is_due_at_once_and_asked_for_once(paced: Paced) -> None:
    paced.turn(5)
    paced.turn(5, reply=5)
    paced.writer.recheck(is_damaged=True)
    paced.turn(5)
    paced.turn(5, reply=5, after=LOOK_AFTER)
    assert paced.process.asked[1:] == [{"is_new": True, "is_damaged": True}, {"is_new": False, "is_damaged": False}]


# --- the process ------------------------------------------------------------------------------------------------------


class Loop:
    """A keeper's loop with nothing but its view writer."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.selector = selectors.DefaultSelector()
        self.writer = ViewWriter(ledger.data_dir, self.selector)
        self.writer.start()
        self.failures: list[str] = []

    def turn(self, due: float = 0.05) -> None:
        has_reply = any(key.data is self.writer for key, _ in self.selector.select(min(due, 0.05)))
        try:
            self.writer.turn(self.ledger.newest(), has_reply=has_reply)
        except Unavailable as error:
            self.failures.append(error.text)

    def until(self, is_done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not is_done():
            assert time.monotonic() < deadline, self.failures
            self.turn()

    def folded(self) -> None:
        """Until the tree has all events."""
        newest = self.ledger.newest()
        self.until(lambda: self.writer.head is not None and self.writer.head.seq == newest)

    def pid(self) -> int:
        process = self.writer._helper.process
        assert process is not None
        return process.pid


@pytest.fixture
def loop(ledger: Ledger) -> Iterator[Loop]:
    made = Loop(ledger)
    yield made
    made.writer.close()
    made.selector.close()


def test_what_is_committed_is_folded_and_the_tree_is_that_of_the_events(
    loop: Loop, ledger: Ledger, tmp_path: Path
) -> None:
    loop.folded()
    for first in range(3, 1_000, 90):
        ledger.commit([issued(serial) for serial in range(first, first + 90)], NOW)
        loop.turn()
    loop.folded()
    assert len(rows_of_views(tmp_path)["certificates"]) == ledger.newest()
    assert verify(ledger).seq == ledger.newest()
    head = loop.writer.head
    delete_views(tmp_path / VIEWS_NAME)
    assert fold_all(ledger) == head
    assert loop.failures == []


def test_a_process_that_is_killed_is_replaced_and_folds_on(
    loop: Loop, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helper_process, "RESTART_PAUSE", 0.1)
    loop.folded()
    first = loop.pid()
    os.kill(first, signal.SIGKILL)
    ledger.commit([issued(serial) for serial in range(3, 300)], NOW)
    loop.folded()
    assert loop.pid() != first
    assert loop.failures == ["the process that folds events into the views did not answer"]
    assert verify(ledger).seq == 299
    assert len(rows_of_views(tmp_path)["certificates"]) == 299


def test_a_process_that_hangs_holds_nothing_up_and_is_replaced(
    loop: Loop, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.folded()
    monkeypatch.setattr(helper_process, "RESTART_PAUSE", 0.1)
    monkeypatch.setattr(module, "HANGS_AFTER", 0.5)
    first = loop.pid()
    os.kill(first, signal.SIGSTOP)
    ledger.commit([issued(3)], NOW)
    loop.folded()
    assert loop.pid() != first
    assert loop.failures


def test_a_copy_that_was_put_in_the_ledgers_place_is_folded_on(loop: Loop, ledger: Ledger, tmp_path: Path) -> None:
    """The keeper opens its file again when its path names another; the process has to notice by itself."""
    loop.folded()
    ledger.commit([issued(3)], NOW)
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    copy = tmp_path / "copy"
    shutil.copy2(tmp_path / FILE_NAME, copy)
    for name in (f"{FILE_NAME}-wal", f"{FILE_NAME}-shm"):
        (tmp_path / name).unlink()
    copy.rename(tmp_path / FILE_NAME)
    with pytest.raises(Unavailable):
        ledger.commit([issued(4)], NOW)
    ledger.commit([issued(4), issued(5)], NOW)
    loop.folded()
    assert len(rows_of_views(tmp_path)["certificates"]) == 5
    assert verify(ledger).seq == 5


def test_views_that_are_removed_or_damaged_are_made_again_without_a_new_event(
    loop: Loop, ledger: Ledger, tmp_path: Path
) -> None:
    loop.folded()
    delete_views(tmp_path / VIEWS_NAME)
    loop.until((tmp_path / VIEWS_NAME).exists)
    loop.until(lambda: loop.writer.is_idle)
    assert len(rows_of_views(tmp_path)["certificates"]) == 2
    (tmp_path / VIEWS_NAME).write_bytes(b"not a database, whatever its name says" * 200)
    loop.writer.recheck(is_damaged=True)
    loop.turn()
    loop.until(lambda: loop.writer.is_idle)
    assert verify(ledger).seq == 2


def test_a_disk_that_does_not_take_the_views_is_told_and_tried_again(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_AFTER", 0.1)
    (tmp_path / VIEWS_NAME).mkdir()
    loop = Loop(ledger)
    try:
        loop.until(lambda: bool(loop.failures))
        assert VIEWS_NAME in loop.failures[0]
        (tmp_path / VIEWS_NAME).rmdir()
        loop.folded()
    finally:
        loop.writer.close()
        loop.selector.close()
    assert len(rows_of_views(tmp_path)["certificates"]) == 2


def test_it_syncs_the_views_and_ends_with_the_keepers_end_of_the_connection(loop: Loop, tmp_path: Path) -> None:
    loop.folded()
    process = loop.writer._helper.process
    assert process is not None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
    loop.ledger.commit([issued(3)], NOW)
    loop.folded()  # signals to the whole group do not end it first
    loop.writer.disconnect()
    assert process.wait(timeout=20) == 0
    with closing(sqlite3.connect(tmp_path / VIEWS_NAME)) as db:
        assert db.execute("SELECT seq, is_synced FROM folded").fetchone() == (3, 1)


@missing.needs_root
def test_the_process_gets_no_setting_and_no_descriptor_of_the_keeper(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGNER_VAULT_TOKEN_FILE", "/secret")
    loop = Loop(ledger)
    try:
        loop.folded()
        assert b"SIGNER_" not in Path(f"/proc/{loop.pid()}/environ").read_bytes()
        links = []
        for path in Path(f"/proc/{loop.pid()}/fd").iterdir():
            with suppress(FileNotFoundError):
                links.append(os.readlink(path))  # noqa: PTH115
        assert sum(link.startswith("socket:") for link in links) == 1
        assert not [link for link in links if "ledger.lock" in link]
    finally:
        loop.writer.close()
        loop.selector.close()
