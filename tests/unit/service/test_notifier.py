"""The keeper's end of notices: it never waits, loses nothing to a full pipe, and believes little of what it is told."""

from __future__ import annotations

import json
import logging
import os
import selectors
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from signer.authority.notices import Fault
from signer.errors import Unavailable
from signer.model import Entry, Head
from signer.protocol.log_limit import LogLimit
from signer.protocol.notices import (
    KEPT_FOR,
    MAX_MESSAGE,
    ChannelFacts,
    Hello,
    Notice,
    Report,
    Start,
    State,
    Told,
    encode,
    read_for_sender,
)
from signer.protocol.replies import FrozenFields, NextSteps, RequestDetails
from signer.service import notifier
from signer.service.channels import TOPICS
from signer.service.notifier import MAX_OF_REQUEST, MAX_REQUESTS, Notifier, SenderPlace, Sources
from signer.units import timestamp
from tests.parts.clock import Clock

pytestmark = pytest.mark.unix_socket
NOW = 1_800_000_000
HOOK = ChannelFacts("hook", "webhook", (), TOPICS)
PHONE = ChannelFacts("phone", "ntfy", ("ben",), ("requests",))


def entry(seq: int) -> Entry:
    return Entry(seq, NOW * 1000, "freeze.set", "anna", json.dumps({"seq": seq}), "", f"{seq:064x}")


class FakeLedger:
    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.is_gone = False

    def head(self) -> Head:
        if self.is_gone:
            raise Unavailable("ledger_unavailable", "the disk is gone")
        return Head(self.entries[-1].seq if self.entries else 0, "", 0)

    def first_since(self, time_ms: int) -> int:
        return next((one.seq for one in self.entries if one.time_ms >= time_ms), self.head().seq + 1)

    def noticed_after(self, after: int, limit: int) -> list[Entry]:
        if self.is_gone:
            raise Unavailable("ledger_unavailable", "the disk is gone")
        return [one for one in self.entries if one.seq > after][:limit]


class Bench:
    """A keeper's notifier, and the process that it connects to."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notices.sock"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(self.path))
        self.listener.listen()
        self.ledger = FakeLedger()
        self.faults: dict[str, Fault] = {}
        self.tokens: list[Notice] = []
        self.clock = Clock(NOW)
        self.lines = LogLimit(logging.getLogger("signer.keeper"))
        self.connection: socket.socket | None = None
        self.make(os.geteuid())

    def remake(self, uid: int, begun_at: int = 0) -> None:
        """Another keeper, for a process of that user."""
        self.notifier.close()
        self.make(uid, begun_at)

    def make(self, uid: int, begun_at: int = 0) -> None:
        sources = Sources(self.notice_of, lambda: self.faults, lambda: self.tokens)
        self.notifier = Notifier(
            SenderPlace(self.path, uid), selectors.DefaultSelector(), self.ledger, sources, self.lines,
            begun_at=begun_at, clock=self.clock,
        )  # fmt: skip

    def notice_of(self, one: Entry) -> Notice:
        request = f"r-{one.seq}"
        return Notice(
            id=f"n-{one.seq}", seq=one.seq, at=NOW, topic="requests", kind="approval.requested", title="t" * 100,
            request=request, concerns=("ben", "agent-7"),
        )  # fmt: skip

    def record(self, *numbers: int) -> None:
        """Events that were just committed."""
        new = [entry(number) for number in numbers]
        self.ledger.entries += new
        self.notifier.turn(new)

    def connect(self, cursor: int | None, *channels: ChannelFacts) -> None:
        self.notifier._tried = -100.0
        self.notifier.turn([])
        self.accept()
        self.say(Hello(cursor=cursor, channels=channels or (HOOK, PHONE)))
        self.notifier.turn([])

    def accept(self) -> None:
        """Takes the newest connection."""
        self.listener.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                fresh, _ = self.listener.accept()
                if self.connection is not None:
                    self.connection.close()
                self.connection = fresh
                fresh.setblocking(False)

    def say(self, message: Hello | Report | Told | bytes) -> None:
        assert self.connection is not None
        self.connection.send(message if isinstance(message, bytes) else encode(message))

    def read(self) -> list[Notice | Start]:
        """What has arrived."""
        assert self.connection is not None
        found: list[Notice | Start] = []
        while True:
            try:
                data = self.connection.recv(MAX_MESSAGE)
            except BlockingIOError:
                return found
            if not data:
                return found
            found.append(read_for_sender(data))

    def numbers(self) -> list[int]:
        return [one.seq for one in self.read() if isinstance(one, Notice)]

    def close(self) -> None:
        self.notifier.close()
        self.accept()
        self.listener.close()
        if self.connection is not None:
            self.connection.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def test_events_are_handed_over_as_they_are_recorded(bench: Bench) -> None:
    bench.connect(0)
    bench.record(1, 2)
    assert bench.numbers() == [1, 2]


def test_a_process_gets_what_it_missed_and_nothing_twice(bench: Bench) -> None:
    bench.record(1, 2, 3, 4)
    bench.connect(2)
    bench.record(5)
    bench.notifier.turn([])
    assert bench.numbers() == [3, 4, 5]


def test_a_process_that_was_never_told_anything_begins_at_the_keepers_start(bench: Bench) -> None:
    bench.record(1, 2, 3)
    bench.remake(os.geteuid(), begun_at=2)
    bench.connect(None)
    first, *rest = bench.read()
    assert first == Start(seq=2)
    assert [one.seq for one in rest if isinstance(one, Notice)] == [3]


def test_a_cursor_of_another_ledger_starts_again(bench: Bench) -> None:
    bench.record(1)
    bench.remake(os.geteuid(), begun_at=1)
    bench.connect(900)
    assert bench.read() == [Start(seq=1)]
    bench.record(2)
    assert bench.numbers() == [2]


def test_what_is_older_than_an_hour_is_not_handed_over(bench: Bench) -> None:
    bench.record(1)
    bench.clock.now += 7_200
    bench.connect(0)
    assert bench.numbers() == []


def test_a_full_pipe_blocks_nothing_and_loses_nothing(bench: Bench) -> None:
    bench.connect(0)
    last = 10_000
    for first in range(1, last, 50):
        bench.record(*range(first, first + 50))
    assert bench.notifier.due() == notifier.RETRY_AFTER
    got: list[int] = []
    for _ in range(last):
        bench.notifier.turn([])
        found = bench.numbers()
        got += found
        if got and got[-1] == last:
            break
    assert got == list(range(1, last + 1))
    bench.notifier.turn([])
    assert bench.notifier.due() is None


def test_a_ledger_that_cannot_be_read_is_read_later(bench: Bench) -> None:
    bench.record(1, 2)
    bench.ledger.is_gone = True
    bench.connect(0)
    assert bench.numbers() == []
    bench.ledger.is_gone = False
    bench.connect(0)
    assert bench.numbers() == [1, 2]


def test_a_notice_that_concerns_thousands_is_sent_and_one_that_is_too_large_is_logged_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = {1: 5_000, 2: 10_000, 3: 10_000, 4: 1}

    def make(one: Entry) -> Notice:
        concerns = tuple(f"agent-{number:010}" for number in range(names[one.seq]))
        return Notice(id=f"n-{one.seq}", seq=one.seq, at=NOW, topic="requests", kind="x", title="t", concerns=concerns)

    monkeypatch.setattr(bench.notifier, "_sources", Sources(make, dict, list))
    bench.connect(0)
    bench.record(*names)
    assert bench.numbers() == [1, 4]
    (line,) = caplog.messages
    assert line == "the notice of event 2 is not sent: it takes 190,175 bytes, and at most 131,072 may be"


def test_a_notice_that_cannot_be_made_is_left_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.connect(0)
    make = bench.notice_of

    def fail(one: Entry) -> Notice:
        if one.seq == 1:
            raise KeyError("a bug")
        return make(one)

    monkeypatch.setattr(bench.notifier, "_sources", Sources(fail, dict, list))
    bench.record(1, 2)
    assert bench.numbers() == [2]


def test_a_notice_that_cannot_be_made_now_is_made_later(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.connect(0)
    is_late = [True]

    def wait(one: Entry) -> Notice:
        if is_late[0]:
            raise Unavailable("clock_behind", "the clock is behind")
        return bench.notice_of(one)

    monkeypatch.setattr(bench.notifier, "_sources", Sources(wait, dict, list))
    bench.record(1, 2)
    assert bench.numbers() == []
    is_late[0] = False
    bench.record(3)
    assert bench.numbers() == [1, 2, 3]


def test_a_state_that_cannot_be_looked_at_ends_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, Fault]:
        raise KeyError("a bug")

    monkeypatch.setattr(bench.notifier, "_sources", Sources(bench.notice_of, fail, list))
    bench.connect(0)
    bench.record(1)
    assert bench.numbers() == [1]


def test_a_process_of_another_user_is_told_nothing(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.remake(os.geteuid() + 1)
    bench.notifier.turn([])
    assert not bench.notifier.is_up
    assert "no notices are sent: user" in caplog.text


def test_a_process_that_comes_is_found_within_a_fraction_of_a_second(bench: Bench) -> None:
    bench.notifier.turn([])
    bench.notifier.close()
    due = bench.notifier.due()
    assert due is not None
    assert due <= 0.2
    bench.connect(0)
    assert bench.notifier.due() is None, "the loop waits for what happens"


def test_without_a_process_nothing_is_kept_and_nothing_raised(bench: Bench) -> None:
    bench.path.unlink()
    bench.record(*range(1, 2_000))
    assert bench.notifier.due() == notifier.CONNECT_EVERY


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"message":"hello"}', b'{"message":"report","channel":1}', b"\xff"])
def test_a_malformed_message_ends_the_connection_and_no_more(bench: Bench, data: bytes) -> None:
    bench.connect(0)
    bench.say(data)
    bench.record(1)
    assert not bench.notifier.is_up
    bench.connect(0)
    assert bench.numbers() == [1]


def test_faults_are_told_while_they_last_also_to_a_process_that_comes_later(bench: Bench) -> None:
    bench.faults = {"disk": Fault("the disk is full")}
    bench.connect(0)
    (begun,) = bench.read()
    bench.notifier.close()
    bench.clock.now += KEPT_FOR + 60
    bench.connect(0)
    (again,) = bench.read()
    assert isinstance(begun, Notice)
    assert isinstance(again, Notice)
    assert (again.id, again.at) == (begun.id, NOW + KEPT_FOR + 60), "or it would be given up as too old"
    assert again.details == (f"since {timestamp(NOW)}",)
    bench.faults = {}
    bench.notifier._looked_at_faults = -100.0
    bench.notifier.turn([])
    (over,) = bench.read()
    assert isinstance(over, Notice)
    assert over.kind == "fault.over"


def test_each_of_many_tokens_that_end_is_told_once_in_a_connection(bench: Bench) -> None:
    bench.tokens = [
        Notice(id=f"t-{n}-7d", seq=0, at=NOW, topic="tokens", kind="token.ends", title="t" * 100) for n in range(600)
    ]

    def turns() -> list[str]:
        """The ids of what is told in as many rounds as it takes, and of what is found at the next look at tokens."""
        got: list[str] = []
        for _ in range(2):
            while found := [one.id for one in bench.read() if isinstance(one, Notice)]:
                got += found
                bench.notifier.turn([])
            bench.notifier._looked_at_tokens = -notifier.TOKENS_EVERY
            bench.notifier.turn([])
        return got + [one.id for one in bench.read() if isinstance(one, Notice)]

    bench.connect(0)
    everyone = [one.id for one in bench.tokens]
    assert turns() == everyone
    bench.tokens.append(Notice(id="t-1-1d", seq=0, at=NOW, topic="tokens", kind="token.ends", title="its next stage"))
    bench.notifier._looked_at_tokens = -notifier.TOKENS_EVERY
    bench.notifier.turn([])
    assert turns() == ["t-1-1d"]
    bench.connect(0)
    assert turns() == [], "the process has not connected again"
    bench.notifier.close()
    bench.connect(0)
    assert turns() == [*everyone, "t-1-1d"], "another process knows which ones it has told"


def test_tokens_that_wait_hide_no_fault(bench: Bench) -> None:
    bench.tokens = [
        Notice(id=f"t-{n}-7d", seq=0, at=NOW, topic="tokens", kind="token.ends", title="t" * 100) for n in range(600)
    ]
    bench.connect(0)
    bench.faults = {"disk": Fault("the disk is full")}
    bench.notifier._looked_at_faults = -notifier.TOKENS_EVERY
    bench.notifier.turn([])
    told: list[str] = []
    while found := [one.kind for one in bench.read() if isinstance(one, Notice)]:
        told += found
        bench.notifier.turn([])
    assert told.count("fault.begun") == 1


def test_a_fault_that_lasts_is_told_whatever_came_and_went_while_there_was_no_room(bench: Bench) -> None:
    bench.connect(0)
    bench.record(*range(1, 1_000))

    def look() -> None:
        bench.notifier._looked_at_faults = -notifier.TOKENS_EVERY
        bench.notifier.turn([])

    for _ in range(100):
        for bench.faults in ({"clock": Fault("the clock is behind")}, {}):
            look()
    bench.faults = {"disk": Fault("the disk is full")}
    look()
    assert len(bench.notifier._unsent) <= 64
    titles: list[str] = []
    while found := [one.title for one in bench.read() if isinstance(one, Notice)]:
        titles += found
        bench.notifier.turn([])
    assert "the disk is full" in titles


# --- who was told ----------------------------------------------------------------------------------------------------


def report(seq: int, channel: str, state: Any, error: str = "", **changes: Any) -> Report:
    return Report(**{
        "channel": channel, "state": state, "notice": f"n-{seq}", "at": NOW, "queued": 3,
        "request": f"r-{seq}", "error": error, **changes,
    })  # fmt: skip


def details(seq: int, **changes: Any) -> RequestDetails:
    frozen = FrozenFields.model_construct(identity="agent-7", asked=timestamp(NOW))
    return RequestDetails.model_construct(
        **{"request": f"r-{seq}", "state": "pending", "needs": 1, "may_approve": ["ben"], "frozen": frozen,
           "next": NextSteps(wait="", claim=""), **changes}
    )  # fmt: skip


def rows(bench: Bench, seq: int, **changes: Any) -> dict[str, tuple[str, str | None]]:
    told = bench.notifier.told(details(seq, **changes)).told
    assert told is not None
    return {row.channel: (row.state, row.error) for row in told}


def test_a_request_shows_each_channel_from_its_first_reply_on(bench: Bench) -> None:
    bench.connect(0)
    assert rows(bench, 1) == {"hook": ("sending", None), "phone": ("sending", None)}
    assert rows(bench, 1, may_approve=["anna"]) == {"hook": ("sending", None)}, "the phone is ben's"
    assert rows(bench, 1, needs=0) == {}
    bench.record(1)
    bench.say(report(1, "hook", "sent"))
    bench.say(report(1, "phone", "failed", "it answers 500"))
    bench.notifier.turn([])
    assert rows(bench, 1) == {"hook": ("sent", None), "phone": ("failed", "it answers 500")}
    assert bench.notifier.take_changes() == {"r-1"}
    bench.record(2)
    assert rows(bench, 2)["phone"] == ("failed", "it answers 500"), "it waits behind the one that fails"
    bench.clock.now += 60
    assert rows(bench, 3) == {}, "of an older request nothing is known any more"


def test_reports_of_what_was_never_handed_over_are_not_believed(bench: Bench) -> None:
    bench.connect(0)
    bench.record(1)
    for one in (
        report(9, "hook", "sent"),
        report(1, "none", "sent"),
        report(1, "hook", "sent", notice="n-77"),
        report(1, "hook", "failed", "x" * 5_000, at=2**62, queued=2**62),
    ):
        bench.say(one)
    bench.notifier.turn([])
    assert set(rows(bench, 1)) == {"hook", "phone"}
    state, error = rows(bench, 1)["hook"]
    assert (state, error) == ("failed", "x" * notifier.MAX_ERROR)
    assert rows(bench, 9, frozen=FrozenFields.model_construct(asked=timestamp(0))) == {}


def test_another_keeper_learns_who_was_told_and_believes_it_over_what_it_hands_over_again(bench: Bench) -> None:
    bench.connect(0)
    bench.record(1)
    bench.remake(os.geteuid())
    bench.connect(0)
    bench.notifier.turn([])
    assert rows(bench, 1) == {"hook": ("sending", None), "phone": ("sending", None)}, "handed over again"

    def told(seq: int, channel: str, state: State, error: str = "") -> Told:
        return Told(channel, state, f"n-{seq}", NOW, f"r-{seq}", "approval.requested", error)

    for one in (
        told(1, "hook", "sent"),
        told(1, "phone", "failed", "it answers 500"),
        told(9, "phone", "dropped", "x" * 5_000),
        told(9, "none", "sent"),
        Told("hook", "sent", "n" * 999, 2**62, "r" * 999, "k" * 999),
    ):
        bench.say(one)
    bench.notifier.turn([])
    assert rows(bench, 1) == {"hook": ("sent", None), "phone": ("failed", "it answers 500")}
    assert rows(bench, 9) == {"phone": ("dropped", "x" * notifier.MAX_ERROR)}
    assert max(map(len, bench.notifier.take_changes())) == notifier.MAX_NAME
    assert not any(counts.totals for counts in bench.notifier._counts.values()), "nothing is counted twice"


def test_what_is_remembered_is_bounded(bench: Bench) -> None:
    bench.connect(0, HOOK)
    notice = bench.notice_of(entry(1))
    for number in range(MAX_OF_REQUEST + 50):
        bench.notifier._note_handed_over(notice.__class__(**{**_fields(notice), "id": f"n-{number}"}), "r-1")
    assert len(bench.notifier._told["r-1"]) == MAX_OF_REQUEST
    for number in range(MAX_REQUESTS + 50):
        bench.notifier._note_handed_over(notice, f"r-{number}")
    assert len(bench.notifier._told) == MAX_REQUESTS


def _fields(notice: Notice) -> dict[str, Any]:
    return {name: getattr(notice, name) for name in notice.__struct_fields__}


def test_metrics_count_by_channel(bench: Bench) -> None:
    bench.connect(0, HOOK)
    bench.record(1)
    for state in ("sent", "failed", "failed", "dropped"):
        bench.say(report(1, "hook", state))
    bench.notifier.turn([])
    samples = {sample.name: sample.value for family in bench.notifier.gauges() for sample in family.samples}
    assert samples == {
        "signer_notices_up": 1,
        "signer_notices_sent_total": 1,
        "signer_notices_failed_total": 2,
        "signer_notices_dropped_total": 1,
        "signer_notices_queued": 3,
    }
