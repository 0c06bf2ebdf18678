"""The api's way to the keeper: every question is answered once, and with its own answer, whatever the keeper does."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.errors import BadRequest, NotAuthenticated, Refused, SignerError, Unavailable
from signer.protocol import client as client_module
from signer.protocol.client import KeeperClient, make_message
from signer.protocol.commands import split_message
from signer.protocol.replies import MetricsText, Reply, encode_reply

pytestmark = pytest.mark.unix_socket


class Keeper:
    """The other end, which answers when it is told to."""

    def __init__(self, path: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(path))
        self.listener.listen(200)
        self.listener.settimeout(10)
        self.peers: list[socket.socket] = []

    def accept(self) -> socket.socket:
        self.peers.append(self.listener.accept()[0])
        return self.peers[-1]

    def close(self) -> None:
        for end in (*self.peers, self.listener):
            end.close()


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    made = Keeper(tmp_path / "k")
    yield made
    made.close()


@pytest.fixture
def judged() -> list[tuple[str, bool]]:
    return []


@pytest.fixture
def client(tmp_path: Path, judged: list[tuple[str, bool]]) -> KeeperClient:
    return KeeperClient(tmp_path / "k", 5, lambda *verdict: judged.append(verdict))


def run(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 20))


def question(peer: socket.socket) -> tuple[bytes, bytes]:
    """Number and rest of the next question."""
    number, _, rest = peer.recv(9999).partition(b" ")
    assert number.isdigit()
    return number, rest


def answer(peer: socket.socket, number: bytes, reply: Reply | SignerError) -> None:
    peer.send(number + b" " + encode_reply(reply))


def start(client: KeeperClient, name: str, **fields: object) -> asyncio.Task[Reply]:
    return asyncio.get_running_loop().create_task(client.ask_async({"op": name, **fields}))


async def code_of(task: asyncio.Task[Reply]) -> str:
    with pytest.raises(SignerError) as caught:
        await task
    return caught.value.code


NUMBERED = [MetricsText(text=str(number)) for number in range(4)]


def test_questions_are_out_together_and_answered_in_any_order(client: KeeperClient, keeper: Keeper) -> None:
    async def scene() -> None:
        one, two = start(client, "one"), start(client, "two")
        await asyncio.sleep(0)
        first, second = keeper.accept(), keeper.accept()
        (n1, q1), (n2, q2) = question(first), question(second)
        assert (q1, q2) == (b'{"op":"one"}\n', b'{"op":"two"}\n')
        answer(second, n2, NUMBERED[2])
        assert await two == NUMBERED[2]
        answer(first, n1, NUMBERED[1])
        assert await one == NUMBERED[1]
        client.close()

    run(scene())


def test_a_connection_that_was_answered_serves_the_next_question(client: KeeperClient, keeper: Keeper) -> None:
    async def scene() -> None:
        for number in range(3):
            task = start(client, "one")
            await asyncio.sleep(0)
            peer = keeper.accept() if number == 0 else keeper.peers[0]
            answer(peer, question(peer)[0], NUMBERED[number])
            assert await task == NUMBERED[number]
        client.close()

    run(scene())


def test_the_keepers_refusal_is_raised(client: KeeperClient, keeper: Keeper) -> None:
    async def scene() -> None:
        task = start(client, "one")
        await asyncio.sleep(0)
        peer = keeper.accept()
        answer(peer, question(peer)[0], Refused("frozen", "no"))
        assert await code_of(task) == "frozen"
        client.close()

    run(scene())


def test_without_a_keeper_the_error_is_there_at_once(client: KeeperClient) -> None:
    async def scene() -> None:
        assert await code_of(start(client, "one")) == "keeper_gone"

    run(scene())
    with pytest.raises(Unavailable):
        client.ask({"op": "one"})


def test_a_keeper_that_dies_with_a_question_is_not_asked_again(client: KeeperClient, keeper: Keeper) -> None:
    async def scene() -> None:
        task = start(client, "sign")
        await asyncio.sleep(0)
        keeper.accept().close()
        assert await code_of(task) == "keeper_gone"
        keeper.listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            keeper.listener.accept()

    run(scene())


def test_after_a_restart_a_question_goes_to_the_new_keeper(
    tmp_path: Path, client: KeeperClient, keeper: Keeper
) -> None:
    async def scene() -> None:
        task = start(client, "before")
        await asyncio.sleep(0)
        peer = keeper.accept()
        answer(peer, question(peer)[0], NUMBERED[1])
        await task
        keeper.close()
        (tmp_path / "k").unlink()
        fresh = Keeper(tmp_path / "k")
        try:
            task = start(client, "after")
            await asyncio.sleep(0)
            peer = fresh.accept()
            number, asked = question(peer)
            assert asked == b'{"op":"after"}\n'
            answer(peer, number, NUMBERED[2])
            assert await task == NUMBERED[2]
        finally:
            client.close()
            fresh.close()

    run(scene())


def test_more_questions_than_may_be_out_wait_for_their_turn(
    client: KeeperClient, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MOST", 1)

    async def scene() -> None:
        one, two = start(client, "one"), start(client, "two")
        await asyncio.sleep(0)
        peer = keeper.accept()
        answer(peer, question(peer)[0], NUMBERED[1])
        assert await one == NUMBERED[1]
        answer(peer, question(peer)[0], NUMBERED[2])
        assert await two == NUMBERED[2]
        client.close()

    run(scene())


def test_a_question_without_an_answer_is_given_up_and_the_next_one_sent(
    tmp_path: Path, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MOST", 1)
    client = KeeperClient(tmp_path / "k", 0.05)

    async def scene() -> None:
        one = start(client, "hangs")
        await asyncio.sleep(0)
        keeper.accept()
        await asyncio.sleep(0.06)
        two = start(client, "waits")
        await asyncio.sleep(0)
        client.expire()
        assert await code_of(one) == "keeper_gone"
        peer = keeper.accept()
        number, asked = question(peer)
        assert asked == b'{"op":"waits"}\n'
        answer(peer, number, NUMBERED[2])
        assert await two == NUMBERED[2]
        client.close()

    run(scene())


@pytest.mark.parametrize("message", [b"1 MetricsText\n{}", b"MetricsText\n{}", b"", b"99", b"99 ", b" x"])
def test_a_message_that_answers_no_question_ends_its_connection_and_reaches_nobody(
    client: KeeperClient, keeper: Keeper, message: bytes
) -> None:
    async def scene() -> None:
        first = start(client, "one")
        await asyncio.sleep(0)
        peer = keeper.accept()
        answer(peer, question(peer)[0], NUMBERED[1])
        assert await first == NUMBERED[1]
        if message:
            peer.send(message)  # while nobody asks: a late answer to the first question, or worse
        else:
            peer.close()
        await asyncio.sleep(0.01)
        second = start(client, "two")
        await asyncio.sleep(0)
        peer = keeper.accept()
        number, _ = question(peer)
        peer.send(message or b"1 x")
        assert await code_of(second) == "keeper_gone"
        assert number == b"2"

    run(scene())


def in_a_thread(client: KeeperClient, keeper: Keeper, *messages: bytes) -> list[Any]:
    """The outcomes of as many questions in this thread; the keeper sends those messages, `@` for the number."""

    def serve() -> None:
        peer: socket.socket | None = None
        for message in messages:
            if peer is None or not (got := peer.recv(9999)):
                peer = keeper.accept()
                got = peer.recv(9999)
            peer.send(message.replace(b"@", got.partition(b" ")[0]))

    thread = threading.Thread(target=serve)
    thread.start()
    outcomes: list[Any] = []
    for _ in messages:
        try:
            outcomes.append(client.ask({"op": "x", "token": "t"}))
        except SignerError as error:
            outcomes.append(error.code)
    thread.join()
    client._drop()
    return outcomes


def test_a_thread_gets_the_answer_to_its_question_and_no_other(client: KeeperClient, keeper: Keeper) -> None:
    good = b"@ " + encode_reply(NUMBERED[1])
    assert in_a_thread(client, keeper, good, b"7@ x", good, encode_reply(NUMBERED[2]), good) == [
        NUMBERED[1], "keeper_gone", NUMBERED[1], "keeper_gone", NUMBERED[1],
    ]  # fmt: skip


def test_each_token_that_the_keeper_judged_is_told(
    client: KeeperClient, keeper: Keeper, judged: list[tuple[str, bool]]
) -> None:
    replies = (
        NUMBERED[1],
        NotAuthenticated("token_unknown", "no"),
        Refused("frozen", "no"),
        BadRequest("token_in_request", "a good token, and another one in the wrong field"),
    )
    in_a_thread(client, keeper, *(b"@ " + encode_reply(reply) for reply in replies))
    assert judged == [("t", True), ("t", False)]  # a refusal may come before the token was looked at


# --- messages --------------------------------------------------------------------------------------------------------

_TEXT = st.text() | st.sampled_from(["\ud800", "a\udfff\u20ac", '\x7f\x00\x1f\u2028<>&\\"'])
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(_TEXT, _VALUES, max_size=5), st.binary(max_size=20))
def test_the_keeper_reads_what_was_written(header: dict[str, object], body: bytes) -> None:
    message = make_message(header, body)
    assert split_message(message) == (header, body)
    assert len(message) <= len(json.dumps(header)) + 1 + len(body)
