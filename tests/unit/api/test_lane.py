"""The worker's way to the keeper: every question is answered once, whatever becomes of the keeper."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from signer.api import lane as lane_module
from signer.api.lane import AsyncKeeperClient, Outcome
from signer.errors import Refused, SignerError, Unavailable
from signer.protocol.replies import MetricsText, Reply, encode_reply

pytestmark = pytest.mark.unix_socket


class Poll:
    """The main loop's selector, one round at a time."""

    def __init__(self) -> None:
        self.callbacks: dict[socket.socket, Callable[[Any], None]] = {}

    def register(self, fileobj: Any, _events: int, callback: Callable[[Any], None]) -> None:
        self.callbacks[fileobj] = callback

    def unregister(self, fileobj: Any) -> None:
        del self.callbacks[fileobj]

    def turn(self) -> None:
        ready, _, _ = select.select(list(self.callbacks), [], [], 1)
        for connection in ready:
            if connection in self.callbacks:
                self.callbacks[connection](connection)


class Keeper:
    """The other end, which answers when it is told to."""

    def __init__(self, path: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(path))
        self.listener.listen(200)
        self.peers: list[socket.socket] = []

    def accept(self) -> socket.socket:
        self.peers.append(self.listener.accept()[0])
        return self.peers[-1]

    def close(self) -> None:
        for end in (*self.peers, self.listener):
            end.close()


@pytest.fixture
def poll() -> Poll:
    return Poll()


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    made = Keeper(tmp_path / "k")
    yield made
    made.close()


@pytest.fixture
def lane(tmp_path: Path, poll: Poll) -> Iterator[AsyncKeeperClient]:
    made = AsyncKeeperClient(tmp_path / "k", poll, lambda done, outcome: done(outcome))
    yield made
    made.close()


def reply(number: int) -> bytes:
    return encode_reply(numbered(number))


def numbered(number: int) -> Reply:
    return MetricsText(text=str(number))


def code(outcome: Outcome) -> str:
    assert isinstance(outcome, SignerError)
    return outcome.code


def test_questions_are_out_together_and_answered_in_any_order(
    lane: AsyncKeeperClient, keeper: Keeper, poll: Poll
) -> None:
    got: dict[str, Outcome] = {}
    lane.ask(b"first", lambda outcome: got.update(first=outcome))
    lane.ask(b"second", lambda outcome: got.update(second=outcome))
    first, second = keeper.accept(), keeper.accept()
    assert (first.recv(99), second.recv(99)) == (b"first", b"second")
    second.send(reply(2))
    poll.turn()
    assert got == {"second": numbered(2)}
    first.send(reply(1))
    poll.turn()
    assert got == {"second": numbered(2), "first": numbered(1)}


def test_a_connection_that_was_answered_serves_the_next_question(
    lane: AsyncKeeperClient, keeper: Keeper, poll: Poll
) -> None:
    got: list[Outcome] = []
    lane.ask(b"one", got.append)
    peer = keeper.accept()
    peer.send(reply(1))
    poll.turn()
    lane.ask(b"two", got.append)
    assert [peer.recv(99), peer.recv(99)] == [b"one", b"two"]


def test_the_keepers_refusal_is_the_outcome(lane: AsyncKeeperClient, keeper: Keeper, poll: Poll) -> None:
    got: list[Outcome] = []
    lane.ask(b"may I", got.append)
    keeper.accept().send(encode_reply(Refused("frozen", "no")))
    poll.turn()
    assert code(got[0]) == "frozen"


def test_without_a_keeper_the_outcome_is_there_at_once(lane: AsyncKeeperClient) -> None:
    got: list[Outcome] = []
    lane.ask(b"anybody", got.append)
    assert isinstance(got[0], Unavailable)
    assert code(got[0]) == "keeper_gone"


def test_a_keeper_that_dies_with_a_question_answers_it_with_its_death_and_is_not_asked_again(
    lane: AsyncKeeperClient, keeper: Keeper, poll: Poll
) -> None:
    got: list[Outcome] = []
    lane.ask(b"sign", got.append)
    keeper.accept().close()
    poll.turn()
    assert [code(outcome) for outcome in got] == ["keeper_gone"]
    assert poll.callbacks == {}
    keeper.listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        keeper.listener.accept()


def test_after_a_restart_a_question_goes_to_the_new_keeper(
    tmp_path: Path, lane: AsyncKeeperClient, keeper: Keeper, poll: Poll
) -> None:
    got: list[Outcome] = []
    lane.ask(b"before", got.append)
    keeper.accept().send(reply(1))
    poll.turn()
    keeper.close()
    (tmp_path / "k").unlink()
    fresh = Keeper(tmp_path / "k")
    lane.ask(b"after", got.append)
    peer = fresh.accept()
    assert peer.recv(99) == b"after"
    peer.send(reply(2))
    poll.turn()
    assert got == [numbered(1), numbered(2)]
    fresh.close()


def test_more_questions_than_may_be_out_wait_for_their_turn(
    lane: AsyncKeeperClient, keeper: Keeper, poll: Poll, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "MOST", 1)
    got: list[Outcome] = []
    lane.ask(b"one", got.append)
    lane.ask(b"two", got.append)
    peer = keeper.accept()
    assert peer.recv(99) == b"one"
    peer.send(reply(1))
    poll.turn()
    assert peer.recv(99) == b"two"
    peer.send(reply(2))
    poll.turn()
    assert got == [numbered(1), numbered(2)]


def test_a_question_without_an_answer_is_given_up_and_the_next_one_sent(
    lane: AsyncKeeperClient, keeper: Keeper, poll: Poll, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "MOST", 1)
    monkeypatch.setattr(lane_module, "TIMEOUT", 0.0)
    got: list[Outcome] = []
    lane.ask(b"hangs", got.append)
    monkeypatch.setattr(lane_module, "TIMEOUT", 60.0)
    lane.ask(b"waits", got.append)
    keeper.accept()
    lane.expire()
    assert [code(outcome) for outcome in got] == ["keeper_gone"]
    assert keeper.accept().recv(99) == b"waits"


def test_an_answer_that_nobody_asked_for_ends_the_connection(
    lane: AsyncKeeperClient, keeper: Keeper, poll: Poll
) -> None:
    got: list[Outcome] = []
    lane.ask(b"one", got.append)
    peer = keeper.accept()
    peer.send(reply(1))
    poll.turn()
    peer.send(reply(99))
    poll.turn()
    assert (got, poll.callbacks) == ([numbered(1)], {})
