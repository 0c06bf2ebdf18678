"""Messages without an accepted token do not keep the keeper from those with one."""

from __future__ import annotations

import json
import selectors
import socket
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any

import pytest

from signer.errors import NotAuthenticated
from signer.model import Caller
from signer.protocol.commands import Command, ShowCaller, Unauthenticated
from signer.protocol.log_limit import LogLimit
from signer.protocol.replies import MetricsText
from signer.service.keeper import MAX_STRANGERS, Keeper, _Peer, log

pytestmark = pytest.mark.unix_socket


class Rounds:
    """A keeper's loop, one round at a time; the authority notes what it is asked and answers nothing."""

    def __init__(self, stack: ExitStack) -> None:
        self.batches: list[list[Command]] = []
        self._stack = stack
        self.keeper = made = Keeper.__new__(Keeper)
        made._selector = stack.enter_context(selectors.DefaultSelector())
        made._peers = {}
        made._postponed = deque()
        made._watchers = {}
        made._internal, made._notifier, made._views = (), None, None  # type: ignore[assignment]  # nothing is looked up, built, sent or folded
        made._buffer = memoryview(bytearray(90_000))
        made._lines = LogLimit(log)
        made._listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        made.metrics = SimpleNamespace(  # type: ignore[assignment]
            batch=SimpleNamespace(observe=lambda _: None), count_refusal=lambda _: None
        )
        made._core = SimpleNamespace(  # type: ignore[assignment]
            run=self._run, authenticate=self._authenticate
        )
        made._patience = lambda: 0.0  # type: ignore[method-assign]
        made._health = lambda: MetricsText(text="healthy")  # type: ignore[assignment,method-assign,return-value]

    def _run(self, commands: list[Command]) -> list[Any]:
        self.batches.append(commands)
        return []

    def _authenticate(self, caller: Caller, _now: int) -> None:
        if caller.token != "known":
            raise NotAuthenticated("token_unknown", "no")

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            self._stack.enter_context(end)
            end.setblocking(False)
        peer = _Peer(ours, 1, 1, 0.0)
        self.keeper._peers.setdefault(1, OrderedDict())[peer] = None
        self.keeper._selector.register(ours, selectors.EVENT_READ, peer)
        return theirs

    def turn(self) -> list[Command]:
        """One round; what the authority was asked in it."""
        before = len(self.batches)
        self.keeper._serve_once(self.keeper._listener)
        return [command for batch in self.batches[before:] for command in batch]


@pytest.fixture
def rounds() -> Iterator[Rounds]:
    with ExitStack() as stack:
        yield Rounds(stack)


def message(number: int, op: str, token: str | None) -> bytes:
    header = {"op": op, "token": token, "address": None, "request_id": f"r-{number}"}
    return b"%d " % number + json.dumps(header).encode() + b"\n"


def test_eight_strangers_are_taken_a_round_and_known_callers_at_once(rounds: Rounds) -> None:
    strangers = [rounds.connect() for _ in range(30)]
    known = [rounds.connect() for _ in range(20)]
    for number, client in enumerate((*strangers, *known)):
        client.send(message(number, "whoami", "known" if client in known else f"t{number}"))
    seen = [rounds.turn() for _ in range(4)]
    assert [sum(isinstance(one, Unauthenticated) for one in commands) for commands in seen] == [8, 8, 8, 6]
    assert [sum(isinstance(one, ShowCaller) for one in commands) for commands in seen] == [20, 0, 0, 0]
    assert MAX_STRANGERS == 8


def test_messages_without_a_credential_count_as_well_and_are_all_answered(rounds: Rounds) -> None:
    clients = [rounds.connect() for _ in range(20)]
    for number, client in enumerate(clients):
        client.send(message(number, "health", None))

    def answered() -> int:
        count = 0
        for client in clients:
            try:
                assert client.recv(999).partition(b" ")[0].isdigit()
            except BlockingIOError:
                continue
            count += 1
        return count

    found = []
    for _ in range(3):
        rounds.turn()
        found.append(answered())
    assert found == [8, 8, 4]


def test_the_strangers_of_a_round_share_one_rendering_of_the_metrics(rounds: Rounds) -> None:
    """Each takes a millisecond, in which nobody gets a certificate."""
    rendered = []

    def render(*, by_role: bool) -> str:
        rendered.append(by_role)
        return f"rendering {len(rendered)}"

    rounds.keeper.metrics.render = render  # type: ignore[method-assign]
    clients = [rounds.connect() for _ in range(12)]
    for number, client in enumerate(clients):
        client.send(message(number, "metrics", None))
    texts = []
    for _ in range(2):
        rounds.turn()
        for client in clients:
            with suppress(BlockingIOError):
                texts.append(json.loads(client.recv(999).partition(b"\n")[2])["text"])
    assert texts == ["rendering 1"] * 8 + ["rendering 2"] * 4
    assert rendered == [False, False]


def test_one_who_floods_has_one_message_in_the_queue(rounds: Rounds) -> None:
    flood = rounds.connect()
    for number in range(100):
        flood.send(message(number, "whoami", "stranger"))
    others = [rounds.connect() for _ in range(MAX_STRANGERS)]
    for number, client in enumerate(others):
        client.send(message(number, "whoami", "stranger"))
    for _ in range(5):
        rounds.turn()
        assert len(rounds.keeper._postponed) <= 1 + len(others)


def test_one_who_is_gone_is_not_answered(rounds: Rounds) -> None:
    clients = [rounds.connect() for _ in range(MAX_STRANGERS + 3)]
    for number, client in enumerate(clients):
        client.send(message(number, "whoami", "stranger"))
    rounds.turn()
    assert len(rounds.keeper._postponed) == 3
    for postponed in list(rounds.keeper._postponed):
        rounds.keeper._drop(postponed.peer)
    assert rounds.turn() == []
    assert not rounds.keeper._postponed
