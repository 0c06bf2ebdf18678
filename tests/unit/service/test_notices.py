"""The queue of one channel: order, what is repeated after a crash, what makes room, and what is given up."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from signer.protocol.notices import KEPT_FOR, ChannelFacts, Notice, Report
from signer.service import notices
from signer.service.channels import TOPICS, Channel, Result
from signer.service.notices import MAX_QUEUED, CursorFile, Outbox
from tests.parts.clock import Clock
from tests.parts.eventually import eventually

NOW = 1_800_000_000
REFUSED = Result("it answers 500")


def notice(seq: int, *, name: str = "", at: int = NOW, concerns: tuple[str, ...] = ()) -> Notice:
    return Notice(
        id=name or f"n-{seq}", seq=seq, at=at, topic="requests", kind="freeze.set", title=f"event {seq}",
        concerns=concerns,
    )  # fmt: skip


class FakeSender:
    """Takes notices while `is_open`; `answers` come first."""

    def __init__(self) -> None:
        self.tried: list[Notice] = []
        self.taken: list[Notice] = []
        self.answers: deque[Result] = deque()
        self.is_open = threading.Event()
        self.is_open.set()

    def send(self, sent: Notice, now: int) -> Result:
        assert now
        self.is_open.wait()
        self.tried.append(sent)
        result = self.answers.popleft() if self.answers else Result("")
        if not result.error:
            self.taken.append(sent)
        return result

    def close(self) -> None:
        self.is_open.set()


class Bench:
    """A channel with its queue, over any number of processes."""

    def __init__(self, folder: Path, *people: str) -> None:
        self.file = folder / "cursor.json"
        self.channel = Channel(ChannelFacts("hook", "webhook", people, TOPICS), "https://hooks.example")
        self.clock = Clock(NOW)
        self.reports: list[Report] = []
        self.begin()

    def begin(self) -> None:
        """A new process, which starts when a test says so."""
        self.sender = FakeSender()
        self.box = Outbox(self.channel, self.sender, CursorFile(self.file), self.reports.append, self.clock)

    def sent(self, count: int) -> list[str]:
        """The ids of what was taken, once there are that many."""
        eventually(lambda: len(self.sender.taken) >= count, f"{count} notices")
        return [one.id for one in self.sender.taken]

    def end(self) -> None:
        self.sender.is_open.set()
        self.box.stop(10)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "BACK_OFF", (0.001,))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.end()


def test_notices_are_sent_in_their_order_and_again_after_a_failure(bench: Bench) -> None:
    bench.sender.answers.extend([REFUSED, REFUSED])
    for seq in (3, 7, 9):
        bench.box.put(notice(seq))
    bench.box.start()
    assert bench.sent(3) == ["n-3", "n-7", "n-9"]
    assert [one.id for one in bench.sender.tried] == ["n-3", "n-3", "n-3", "n-7", "n-9"]
    eventually(lambda: len(bench.reports) == 5, "a report of each attempt")
    assert [(report.state, report.error) for report in bench.reports] == [
        ("failed", "it answers 500"),
        ("failed", "it answers 500"),
        ("sent", ""),
        ("sent", ""),
        ("sent", ""),
    ]


def test_what_a_channel_took_is_not_sent_again_by_the_next_process(bench: Bench) -> None:
    for seq in (3, 7):
        bench.box.put(notice(seq))
    bench.box.put(notice(0, name="f-disk-1"))
    bench.box.start()
    bench.sent(3)
    bench.end()
    bench.begin()
    assert bench.box.received == 7
    for one in (notice(3), notice(7), notice(0, name="f-disk-1"), notice(9), notice(0, name="f-disk-2")):
        bench.box.put(one)
    bench.box.start()
    assert bench.sent(2) == ["n-9", "f-disk-2"]


def test_what_waited_at_a_kill_is_asked_for_again(bench: Bench) -> None:
    bench.sender.answers.append(Result(""))
    bench.box.put(notice(3))
    bench.box.start()
    bench.sent(1)
    eventually(lambda: bench.reports, "its record")
    bench.sender.is_open.clear()
    bench.box.put(notice(7))
    killed, bench.box = bench.box, bench.box  # a process that is killed writes nothing more
    fresh = Outbox(bench.channel, FakeSender(), CursorFile(bench.file), bench.reports.append, bench.clock)
    assert (killed.received, fresh.received) == (7, 3)


def test_the_oldest_of_too_many_make_room_and_are_counted_in_one_notice(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_QUEUED == 10_000
    monkeypatch.setattr(notices, "MAX_QUEUED", 20)
    for seq in range(1, 26):
        bench.box.put(notice(seq))
    assert [report.notice for report in bench.reports if report.state == "dropped"] == [f"n-{n}" for n in range(1, 6)]
    bench.box.start()
    ids = bench.sent(21)
    assert ids[0] == "m-5-5"
    assert bench.sender.taken[0].title == "5 notices before this one could not be sent in time"
    assert ids[1:] == [f"n-{seq}" for seq in range(6, 26)]


def test_ten_thousand_wait_and_no_more(bench: Bench) -> None:
    for seq in range(1, MAX_QUEUED + 4):
        bench.box.put(notice(seq))
    assert [report.notice for report in bench.reports] == ["n-1", "n-2", "n-3"]
    assert bench.reports[-1].queued == MAX_QUEUED - 1, "and the newest comes after this report"
    assert bench.box.received == MAX_QUEUED + 3


def test_what_is_older_than_an_hour_is_not_sent_but_counted(bench: Bench) -> None:
    bench.box.put(notice(1, at=NOW - KEPT_FOR - 1))
    bench.box.put(notice(2, at=NOW - KEPT_FOR + 1))
    bench.box.start()
    assert bench.sent(2) == ["m-1-1", "n-2"]
    (dropped,) = [report for report in bench.reports if report.state == "dropped"]
    assert (dropped.notice, dropped.error) == ("n-1", "it is older than an hour")


def test_a_channel_that_is_reconfigured_says_once_how_many_were_missed(bench: Bench) -> None:
    bench.sender.answers.extend([REFUSED] * 100_000)  # until it is stopped
    bench.box.put(notice(1, at=NOW - KEPT_FOR - 1))
    bench.box.start()
    eventually(lambda: bench.sender.tried, "an attempt to say that one was given up")
    former = bench.box
    former.stop(10)
    bench.begin()
    bench.box.adopt(former)
    bench.box.put(notice(2))
    bench.box.start()
    eventually(lambda: bench.reports[-1].notice == "n-2", "the report of the last one")
    bench.end()
    assert [one.id for one in bench.sender.taken] == ["m-1-1", "n-2"]


def test_a_message_that_a_channel_never_takes_does_not_block_the_next(bench: Bench) -> None:
    bench.sender.answers.append(Result("it answers 413", is_final=True))
    bench.box.put(notice(1))
    bench.box.put(notice(2))
    bench.box.start()
    assert bench.sent(1) == ["n-2"]
    assert [report.state for report in bench.reports[:1]] == ["dropped"]
    bench.end()
    bench.begin()
    assert bench.box.received == 2


def test_an_internal_error_does_not_end_the_channel(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    fails = iter([True])
    send = bench.sender.send

    def fail_once(sent: Notice, now: int) -> Result:
        if next(fails, False):
            raise RuntimeError("a bug")
        return send(sent, now)

    bench.sender.send = fail_once  # type: ignore[method-assign]
    bench.box.put(notice(1))
    bench.box.start()
    assert bench.sent(1) == ["n-1"]
    assert "internal error while a notice was sent" in caplog.text


def test_people_get_what_concerns_them_and_what_concerns_everybody(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "anna")
    bench.box.put(notice(1, concerns=("ben", "agent-7")))
    bench.box.put(notice(2, concerns=("anna", "ben")))
    bench.box.put(notice(3))
    bench.box.start()
    assert bench.sent(2) == ["n-2", "n-3"]
    bench.end()


def test_another_ledger_starts_again(bench: Bench) -> None:
    bench.box.begin(900)
    bench.box.begin(10)
    bench.box.put(notice(11))
    bench.box.start()
    assert bench.sent(1) == ["n-11"]


@pytest.mark.parametrize("content", ["", "[]", '{"hook": {"seq": "7", "done": []}}', '{"hook": 7}', "[" * 10_000])
def test_a_damaged_cursor_file_starts_again(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cursor.json").write_text(content)
    assert CursorFile(tmp_path / "cursor.json").of("hook").seq is None
    assert "cannot be read" in caplog.text


def test_a_cursor_that_cannot_be_written_stops_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(notices, "write_new", refuse)
    bench.box.put(notice(1))
    bench.box.start()
    assert bench.sent(1) == ["n-1"]
    eventually(lambda: "notices may come twice: No space left on device" in caplog.text, "a line of the log")
