"""A known caller's sign request goes to the keeper without a task, and is answered as every other request."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import time
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from signer.api.asgi import Api, create_app
from signer.api.edge import ClientConnection, Phase
from signer.api.sign import SignCall
from signer.errors import NotAuthenticated, Refused, SignerError
from signer.policy.tokens import render_token
from signer.protocol.replies import Certificate, Reply, encode_reply
from signer.settings import load_settings
from tests.parts.edge import Clients, FakeTransport

pytestmark = pytest.mark.unix_socket

TOKEN = render_token(os.urandom(32))
ISSUED = Certificate(
    certificate="ssh-ed25519-cert-v01@openssh.com AAAA", serial="17", key_id="ci", identity="ci", role="llmops",
    principals=["llmops"], valid_after="2026-11-30T04:00:00Z", valid_before="2026-11-30T04:15:00Z", expires_in=900,
    ca_fingerprint="SHA256:" + "x" * 43,
)  # fmt: skip
PATHS = ("/v1/ssh/sign/llmops", "/api/sign/llmops")


class Keeper:
    """The other end of the socket, which answers when it is told to."""

    def __init__(self, folder: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(folder / "keeper.sock"))
        self.listener.listen(8)
        self.listener.setblocking(False)
        self.peers: list[socket.socket] = []

    def questions(self) -> list[tuple[socket.socket, bytes, dict[str, Any], bytes]]:
        """What was asked until now: each with its connection, number, header and body."""
        with suppress(BlockingIOError):
            while True:
                self.peers.append(self.listener.accept()[0])
                self.peers[-1].setblocking(False)
        asked = []
        for peer in self.peers:
            try:
                number, _, rest = peer.recv(99_999).partition(b" ")
            except BlockingIOError:
                continue
            header, _, body = rest.partition(b"\n")
            asked.append((peer, number, json.loads(header), body))
        return asked

    def answer(self, reply: Reply | SignerError = ISSUED) -> dict[str, Any]:
        """Answers the only question; returns its header."""
        ((peer, number, header, _),) = self.questions()
        peer.send(number + b" " + encode_reply(reply))
        return header

    def close(self) -> None:
        for end in (*self.peers, self.listener):
            end.close()


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    made = Keeper(tmp_path)
    yield made
    made.close()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    made = create_app(load_settings({"SIGNER_RUN_DIR": str(tmp_path)}))
    made.admission.accept(TOKEN)
    yield made
    made._pool.shutdown()


def sign(path: str = PATHS[0], body: bytes = b"{}", *fields: str, version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: x", f"X-Vault-Token: {TOKEN}", *fields]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def run(api: Api, scene: Coroutine[Any, Any, None]) -> None:
    async def to_its_end() -> None:
        try:
            await asyncio.wait_for(scene, 20)
        finally:
            api.keeper.close()

    asyncio.run(to_its_end())


async def response_of(transport: FakeTransport, count: int = 1) -> list[tuple[list[str], bytes]]:
    """Head lines and body of each of the `count` responses that were taken."""
    deadline = time.monotonic() + 10
    while transport.taken.count(b"HTTP/1.1 ") < count:
        assert time.monotonic() < deadline
        await asyncio.sleep(0)
    taken, found = bytes(transport.taken), []
    while taken:
        head, _, taken = taken.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        (length,) = (int(line.partition(": ")[2]) for line in lines if line.startswith("content-length:"))
        found.append((lines, taken[:length]))
        taken = taken[length:]
    assert len(found) == count
    return found


async def is_read(api: Api) -> None:
    """Returns when no question waits for its reply."""
    deadline = time.monotonic() + 10
    while api.keeper._out:
        assert time.monotonic() < deadline
        await asyncio.sleep(0)


def connect(api: Api) -> tuple[ClientConnection, FakeTransport]:
    return Clients(api, lines=api.lines).connect()


@pytest.mark.parametrize("path", PATHS)
def test_a_known_callers_request_is_with_the_keeper_before_the_loop_turns(path: str, api: Api, keeper: Keeper) -> None:
    async def scene() -> None:
        connection, _ = connect(api)
        connection.data_received(sign(path, b'{"public_key": "x"}'))
        ((_, _, header, body),) = keeper.questions()
        assert (header["op"], header["role"], header["token"]) == ("sign", "llmops", TOKEN)
        assert body == b'{"public_key": "x"}'
        assert connection.phase is Phase.BUSY
        assert connection.accepted_at <= time.monotonic() < connection.accepted_at + 10

    run(api, scene())


@pytest.mark.parametrize("reply", [ISSUED, Refused("frozen", "all is frozen", "wait"), NotAuthenticated("x", "no")])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("last", [(), ("Connection: close",)])
def test_the_response_is_the_same_as_to_a_caller_that_is_not_known_yet(
    path: str, reply: Reply | SignerError, last: tuple[str, ...], api: Api, keeper: Keeper
) -> None:
    async def scene() -> None:
        found = []
        for is_known in (True, False):
            if is_known:
                api.admission.accept(TOKEN)
            else:
                api.admission.forget(TOKEN)
            connection, transport = connect(api)
            connection.data_received(sign(path, b"{}", *last))
            if is_known:
                assert connection.requests_as_stranger == 0
            await asyncio.sleep(0)
            request_id = keeper.answer(reply)["request_id"]
            ((lines, body),) = await response_of(transport)
            found.append((lines, body.decode().replace(request_id, "ID"), connection.phase, transport.has_ended))
        assert found[0] == found[1]
        assert found[0][2] is (Phase.LINGERING if last else Phase.IDLE)

    run(api, scene())


def test_http_1_0_ends_with_its_response(api: Api, keeper: Keeper) -> None:
    async def scene() -> None:
        connection, transport = connect(api)
        connection.data_received(sign(version="1.0"))
        keeper.answer()
        ((lines, _),) = await response_of(transport)
        assert lines[0] == "HTTP/1.1 200 OK"
        assert "connection: close" in lines
        assert (connection.phase, transport.has_ended) == (Phase.LINGERING, True)

    run(api, scene())


def test_requests_that_follow_each_other_are_asked_one_at_a_time_and_answered_in_order(
    api: Api, keeper: Keeper
) -> None:
    async def scene() -> None:
        connection, transport = connect(api)
        connection.data_received(b"".join(sign(body=b"%d" % number) for number in range(3)))
        for number in range(3):
            ((peer, asked, _, body),) = keeper.questions()
            assert body == b"%d" % number
            reply = ISSUED.model_copy(update={"serial": str(number + 10)})
            peer.send(asked + b" " + encode_reply(reply))
            await response_of(transport, number + 1)
        serials = [json.loads(body)["data"]["serial_number"] for _, body in await response_of(transport, 3)]
        assert serials == ["a", "b", "c"]
        assert connection.phase is Phase.IDLE

    run(api, scene())


def test_a_thousand_requests_at_once_without_a_keeper_are_refused_each(api: Api) -> None:
    """A refusal that came from within the request would make one call stack of them all."""

    async def scene() -> None:
        connection, transport = connect(api)
        connection.data_received(sign() * 1000)
        assert not transport.taken
        statuses = {lines[0] for lines, _ in await response_of(transport, 1000)}
        assert statuses == {"HTTP/1.1 503 Service Unavailable"}
        assert connection.phase is Phase.IDLE

    run(api, scene())


def test_a_reply_to_a_client_that_is_gone_goes_nowhere(api: Api, keeper: Keeper) -> None:
    async def scene() -> None:
        connection, transport = connect(api)
        connection.data_received(sign())
        transport.abort()
        keeper.answer()
        await is_read(api)
        assert not transport.taken
        assert len(connection.registry) == 0

    run(api, scene())


def test_a_reply_after_the_refusal_of_a_stopping_worker_is_not_sent(api: Api, keeper: Keeper) -> None:
    async def scene() -> None:
        connection, transport = connect(api)
        connection.data_received(sign())
        connection.shutdown()
        connection.give_up()
        keeper.answer()
        await is_read(api)
        ((lines, _),) = await response_of(transport)
        assert lines[0] == "HTTP/1.1 503 Service Unavailable"

    run(api, scene())


def test_a_response_to_a_request_that_has_ended_is_not_the_next_ones(api: Api, keeper: Keeper) -> None:
    async def scene() -> None:
        connection, transport = connect(api)
        connection.data_received(sign())
        first = connection.scope
        keeper.answer()
        ((_, body),) = await response_of(transport)
        connection.data_received(sign())
        assert connection.phase is Phase.BUSY
        connection.respond(first, api._fail(KeyError("late")))
        assert (transport.taken.count(b"HTTP/1.1"), connection.phase) == (1, Phase.BUSY)
        assert b"signed_key" in body

    run(api, scene())


@pytest.mark.parametrize("broken", ["__init__", "response"])
def test_an_internal_error_is_answered_and_logged_once(
    broken: str, api: Api, keeper: Keeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **_more: object) -> None:
        raise KeyError("sgn_inner")

    async def scene() -> None:
        connection, transport = connect(api)
        monkeypatch.setattr(SignCall, broken, fail)
        for number in range(3):
            connection.data_received(sign())
            if broken == "response":
                keeper.answer()
            lines, body = (await response_of(transport, number + 1))[number]
            assert lines[0] == "HTTP/1.1 500 Internal Server Error"
            assert json.loads(body)["code"] == "internal_error"

    with caplog.at_level(logging.WARNING):
        run(api, scene())
    assert caplog.text.count("Traceback") == 1


def test_what_the_keeper_no_longer_accepts_waits_for_its_turn_again(api: Api, keeper: Keeper) -> None:
    async def scene() -> None:
        connection, transport = connect(api)
        connection.data_received(sign())
        keeper.answer(NotAuthenticated("token_unknown", "no", "no"))
        ((lines, _),) = await response_of(transport)
        assert lines[0] == "HTTP/1.1 403 Forbidden"
        assert not api.admission.is_known(TOKEN)
        connection.data_received(sign())
        assert not keeper.questions()  # a task asks, after the next turn of the loop
        await asyncio.sleep(0)
        assert connection.requests_as_stranger == 1
        keeper.answer()
        assert re.match("HTTP/1.1 200", (await response_of(transport, 2))[1][0][0])

    run(api, scene())
