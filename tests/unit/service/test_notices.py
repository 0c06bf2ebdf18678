"""The queue of one channel: order, what is repeated after a crash, what makes room, and what is given up."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from signer.protocol.notices import KEPT_FOR, ChannelFacts, Notice, Report, State, Told
from signer.service import notices
from signer.service.channels import TOPICS, Channel, Result
from signer.service.notices import MAX_QUEUED, MAX_TOLD, CursorFile, Outbox, ToldFile
from tests.parts.clock import Clock
from tests.parts.eventually import eventually
from tests.parts.full_disk import files_at_most

NOW = 1_800_000_000
REFUSED = Result("it answers 500")


def notice(
    seq: int, *, name: str = "", at: int = NOW, concerns: tuple[str, ...] = (), request: str | None = None
) -> Notice:
    return Notice(
        id=name or f"n-{seq}", seq=seq, at=at, topic="requests", kind="freeze.set", title=f"event {seq}",
        concerns=concerns, request=request,
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
        self.told_file = folder / "told.jsonl"
        self.channel = Channel(ChannelFacts("hook", "webhook", people, TOPICS), "https://hooks.example")
        self.clock = Clock(NOW)
        self.reports: list[Report] = []
        self.begin()

    def begin(self) -> None:
        """A new process, which starts when a test says so."""
        self.sender, self.told = FakeSender(), ToldFile(self.told_file)
        self.box = self.outbox(self.sender)

    def outbox(self, sender: FakeSender) -> Outbox:
        return Outbox(self.channel, sender, CursorFile(self.file), self.told, self.reports.append, self.clock)

    def remembered(self) -> list[tuple[str, str, str, str]]:
        """What a keeper that has just connected is told, by a process that starts with the files."""
        return [(told.request, told.notice, told.state, told.error) for told in ToldFile(self.told_file).all()]

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
    fresh = bench.outbox(FakeSender())
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

    monkeypatch.setattr(notices, "write_atomically", refuse)
    bench.box.put(notice(1))
    bench.box.start()
    assert bench.sent(1) == ["n-1"]
    eventually(lambda: "notices may come twice: No space left on device" in caplog.text, "a line of the log")


# --- who was told ----------------------------------------------------------------------------------------------------


def told(number: int, state: State, error: str = "", channel: str = "hook") -> Told:
    return Told(channel, state, f"n-{number}", NOW, f"r-{number}", "approval.requested", error)


def test_what_became_of_a_request_is_known_to_the_next_process(bench: Bench) -> None:
    bench.sender.answers.extend([REFUSED, Result(""), Result("it answers 404", is_final=True)])
    bench.box.put(notice(3, request="r-1"))
    bench.box.put(notice(4, request="r-2"))
    bench.box.put(notice(5))
    assert [one.state for one in bench.told.all()] == ["sending", "sending"], "also before the first attempt"
    bench.box.start()
    bench.sent(2)
    eventually(lambda: len(bench.reports) == 4, "a report of each attempt")
    expected = [("r-1", "n-3", "sent", ""), ("r-2", "n-4", "dropped", "it answers 404")]
    assert [(one.request, one.notice, one.state, one.error) for one in bench.told.all()] == expected
    assert bench.remembered() == expected
    assert [one.of for one in bench.told.all()] == ["freeze.set", "freeze.set"]


def test_a_line_that_a_kill_cut_off_hides_no_other(bench: Bench) -> None:
    bench.told.note(told(1, "sent"))
    bench.told.note(told(2, "failed", "it answers 500"))
    whole = bench.told_file.read_bytes()
    bench.told_file.write_bytes(whole[:-9])
    assert bench.remembered() == [("r-1", "n-1", "sent", "")]
    again = ToldFile(bench.told_file)
    again.note(told(3, "sent"))
    assert [name for name, *_ in bench.remembered()] == ["r-1", "r-3"]


def test_attempts_that_fail_alike_are_written_once(bench: Bench) -> None:
    for error in ("it answers 500", "it answers 500", "it answers 502", "it answers 502"):
        bench.told.note(told(1, "failed", error))
    assert bench.told_file.read_bytes().count(b"\n") == 2
    assert bench.remembered() == [("r-1", "n-1", "failed", "it answers 502")]


def test_the_file_is_bounded_and_forgets_channels_that_are_gone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_MAX_LINES", 20)
    for number in range(MAX_TOLD + 50):
        bench.told.note(told(number, "sent"))
    assert len(bench.remembered()) == MAX_TOLD
    bench.told.note(told(1, "sent", channel="away"))
    bench.told.keep({"away"})
    for _ in range(50):
        for error in ("a", "b"):
            bench.told.note(told(1, "failed", error, "away"))
        assert bench.told_file.read_bytes().count(b"\n") <= 21
    assert bench.remembered() == [("r-1", "n-1", "failed", "b")]


@pytest.mark.parametrize("content", ["", "[]", "{}", "\0" * 99, '{"message":"told"}\n'])
def test_a_damaged_file_shows_nobody_and_is_replaced(bench: Bench, content: str) -> None:
    bench.told_file.write_text(content)
    again = ToldFile(bench.told_file)
    assert again.all() == []
    again.note(told(1, "sent"))
    assert bench.remembered() == [("r-1", "n-1", "sent", "")]


def test_a_disk_that_takes_nothing_stops_nothing(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.told_file = bench.told_file.parent / "none" / "told.jsonl"
    lost = ToldFile(bench.told_file)
    lost.note(told(1, "sent"))
    assert [one.request for one in lost.all()] == ["r-1"]
    assert "what was sent cannot be noted" in caplog.text


def test_what_a_full_disk_cut_off_is_noted_with_the_next_outcome(bench: Bench) -> None:
    bench.told.note(told(1, "sent"))
    with files_at_most(bench.told_file.stat().st_size + 20):
        bench.told.note(told(2, "sent"))  # a part of its line
        bench.told.note(told(3, "sent"))  # nothing of it
    bench.told.note(told(4, "sent"))
    assert [name for name, *_ in bench.remembered()] == ["r-1", "r-2", "r-3", "r-4"]


def test_each_of_thousands_of_tokens_that_end_is_sent_once(bench: Bench) -> None:
    """A keeper that connects again names all of them again."""
    tokens = [notice(0, name=f"t-{number}-7d") for number in range(2_000)]
    for one in tokens:
        bench.box.put(one)
    bench.box.start()
    assert len(bench.sent(2_000)) == 2_000
    for one in tokens:
        bench.box.put(one)
    bench.box.put(notice(1))
    assert bench.sent(2_001)[2_000:] == ["n-1"]
    bench.end()
    bench.begin()
    for one in tokens:
        bench.box.put(one)
    bench.box.put(notice(2))
    bench.box.start()
    assert bench.sent(1) == ["n-2"], "also by another process"
