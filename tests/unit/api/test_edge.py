"""Where a request ends, however its bytes arrive; that no two readers can disagree about it; and who is closed when."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signer.api.edge import MAX_CHUNKED, MAX_HEAD, ClientConnection, Phase
from signer.errors import BadRequest
from signer.protocol.sign_request import MAX_BODY
from tests.parts.edge import Clients, FakeTransport, exchange, settle

pytestmark = pytest.mark.unix_socket  # the event loop wakes itself through a pair of them

HEAD = b"POST /api/sign/llmops HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers with what it was asked."""
    message = await receive()
    assert not message["more_body"]
    target = [scope["raw_path"].decode(), scope["query_string"].decode()]
    fields = [(name.decode(), value.decode("latin-1")) for name, value in scope["headers"]]
    asked = [scope["method"], *target, message["body"].decode("latin-1"), fields]
    body = json.dumps(asked).encode()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def ask(*pieces: bytes) -> tuple[list[int], list[Any], Phase]:
    """Statuses and bodies of all answers, and what the connection waits for then."""
    taken, phase = exchange(echo, pieces)
    statuses, bodies = [], []
    while taken:
        head, _, taken = taken.partition(b"\r\n\r\n")
        statuses.append(int(head.split()[1]))
        if statuses[-1] == 100:
            continue
        fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:])
        assert b"server" not in fields
        length = int(fields[b"content-length"])
        bodies.append(json.loads(taken[:length]))
        taken = taken[length:]
    return statuses, bodies, phase


def with_length(body: bytes, length: object = None) -> bytes:
    return HEAD + f"Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def test_a_tls_handshake_is_refused_before_a_head_could_end() -> None:
    """A client with https:// where http is spoken learns it at once, not at the deadline for a head."""
    statuses, bodies, _ = ask(b"\x16")
    assert statuses == [400]
    assert bodies[0]["code"] == "request_malformed"


@pytest.mark.parametrize("request_", [GET, with_length(b"{}"), with_length(b""), with_length(b"x" * MAX_BODY)])
def test_a_whole_request_is_answered_and_the_next_one_waits(request_: bytes) -> None:
    statuses, _, phase = ask(request_ + b"GET /next")
    assert (statuses, phase) == ([200], Phase.ARRIVING)


@pytest.mark.parametrize("request_", [GET, with_length(b"{}"), CHUNKED + b"2;x=1\r\n{}\r\n0\r\nTrailer: x\r\n\r\n"])
def test_a_request_in_single_bytes_is_answered_after_the_last_one(request_: bytes) -> None:
    pieces = [request_[at : at + 1] for at in range(len(request_))]
    assert ask(*pieces[:-1])[0::2] == ([], Phase.ARRIVING)
    assert ask(*pieces)[0::2] == ([200], Phase.IDLE)


def test_chunks_become_one_body_and_trailers_are_no_fields() -> None:
    trailers = b"X-Vault-Token: smuggled\r\nHost: y\r\n"
    statuses, bodies, phase = ask(CHUNKED + b"3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\n" + trailers + b"\r\n" + GET)
    assert (statuses, phase) == ([200, 200], Phase.IDLE)
    assert bodies[0][3:] == ["abc0123456789", [["host", "x"], ["transfer-encoding", "chunked"]]]
    assert bodies[1] == ["GET", "/healthz", "", "", [["host", "x"]]]


@settings(max_examples=60)
@given(st.lists(st.binary(min_size=1, max_size=50), max_size=8), st.integers(1, 40))
def test_chunks_of_any_size_in_pieces_of_any_size_say_the_same(chunks: list[bytes], step: int) -> None:
    data = CHUNKED + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n" + GET
    statuses, bodies, _ = ask(*(data[at : at + step] for at in range(0, len(data), step)))
    assert statuses == [200, 200]
    assert bodies[0][3] == b"".join(chunks).decode("latin-1")


@pytest.mark.parametrize(
    "request_",
    [
        with_length(b"", MAX_BODY + 1),
        with_length(b"", 10**17),
        CHUNKED + b"%x\r\n" % (MAX_BODY + 1),
        CHUNKED + b"FFFFFFFF\r\n",
        CHUNKED + (b"%x\r\n" % MAX_BODY + b"x" * MAX_BODY + b"\r\n") + b"1\r\ny\r\n",
        CHUNKED + b"1\r\nx\r\n" * (MAX_CHUNKED // 6 + 1),
        CHUNKED + b"0\r\n" + b"A: b\r\n" * (MAX_CHUNKED // 6 + 1),
    ],
)
def test_a_body_over_the_limit_is_refused_before_it_has_come(request_: bytes) -> None:
    statuses, _, phase = ask(request_)
    assert statuses[0] in (413, 431)
    assert (len(statuses), phase) == (1, Phase.LINGERING)


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: 1\r\nContent-Length: 1\r\n",
        b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked;q=1\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: +1\r\n",
        b"Content-Length: 0x1\r\n",
        b"Content-Length: 1, 1\r\n",
        b"Content-Length: 1_0\r\n",
        b"Content-Length: 1000000000000000000000000\r\n",
        b"Content-Length:\r\n",
        b"content-length : 1\r\nCONTENT-LENGTH: 2\r\n",
        b"Host: x\r\n",
        b"Host:\r\n",
        b"Expect: 100-continue\r\nExpect: 100-continue\r\n",
        b"Expect: 200-ok\r\n",
        b"Connection: Upgrade\r\nUpgrade : h2c\r\n",
    ],
)
def test_fields_that_readers_could_read_in_two_ways_are_refused(fields: bytes) -> None:
    statuses, bodies, phase = ask(HEAD + fields + b"\r\nxx" + GET)
    assert (statuses, phase) == ([400], Phase.LINGERING)
    assert (bodies[0]["code"], bodies[0]["errors"]) == ("request_malformed", [bodies[0]["detail"]])


@pytest.mark.parametrize(
    "target, path, query",
    [
        (b"/a?b=c?d", "/a", "b=c?d"),
        (b"//v1/x", "//v1/x", ""),
        (b"/v1//x", "/v1//x", ""),
        (b"/a%2fb", "/a%2fb", ""),
        (b"http://other:80/a?b", "/a", "b"),
        (b"*", "*", ""),
    ],
)
def test_a_target_is_split_once(target: bytes, path: str, query: str) -> None:
    _, bodies, _ = ask(b"OPTIONS " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert bodies[0][:3] == ["OPTIONS", path, query]


@pytest.mark.parametrize("target", [b"/a#b", b"a", b"a:80", b"ftp://x/y", b"http://", b"/\xff", b"/a\tb", b""])
def test_another_target_is_refused(target: bytes) -> None:
    assert ask(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")[0] == [400]


@pytest.mark.parametrize("method", [b"LIST", b"CONNECT", b"FOO", b"PRI", b"M-SEARCH"])
def test_any_method_reaches_the_application(method: bytes) -> None:
    _, bodies, phase = ask(method + b" /x HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (bodies[0][0], phase) == (method.decode(), Phase.IDLE)


@pytest.mark.parametrize("chunk", [b"\r\n", b"x\r\n", b"-1\r\n", b" 1\r\n", b"1\r\nab\r\n", b"0x1\r\n", b"1 \r\nx\r\n"])
def test_a_chunk_that_is_none_is_refused(chunk: bytes) -> None:
    assert ask(CHUNKED + chunk + b"\r\n")[0] == [400]


def test_a_head_over_the_limit_is_seen_with_or_without_its_end() -> None:
    long = HEAD + b"X: " + b"y" * MAX_HEAD
    assert ask(long)[0] == [431]
    assert ask(long + b"\r\n\r\n")[0] == [431]
    assert ask(HEAD + b"X: " + b"y" * 9000 + b"\r\n\r\n")[0] == [431]
    assert ask(HEAD + b"X: y\r\n" * 64 + b"\r\n")[0] == [431]
    assert ask(HEAD + b"X: y\r\n" * 63 + b"\r\n")[0] == [200]
    assert ask(b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")[0] == [414]


@pytest.mark.parametrize("value", [b"100-continue", b"100-Continue"])
def test_a_client_that_waits_for_a_word_gets_it_once(value: bytes) -> None:
    head = HEAD + b"Expect: " + value + b"\r\nContent-Length: 2\r\n\r\n"
    assert ask(head)[0::2] == ([100], Phase.ARRIVING)
    assert ask(head, b"{", b"}")[0] == [100, 200]
    assert ask(head + b"{}")[0] == [200]


@pytest.mark.parametrize("last", [b"Connection: close\r\n", b"Connection: x, Close\r\n"])
def test_nothing_follows_the_last_request(last: bytes) -> None:
    assert ask(HEAD + last + b"\r\n" + GET)[0::2] == ([200], Phase.LINGERING)
    assert ask(b"GET / HTTP/1.0\r\n\r\n" + GET)[0::2] == ([200], Phase.LINGERING)


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_no_bytes_are_a_surprise(data: bytes) -> None:
    for before in (b"", HEAD, CHUNKED, GET):
        statuses, _, _ = ask(before + data)
        assert set(statuses) <= {100, 200, 400, 413, 414, 431}


def test_an_application_that_fails_leaves_a_line_and_its_client_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: dict[str, Any], receive: Any, send: Any) -> None:
        raise BadRequest("x", "inner detail")

    with caplog.at_level(logging.WARNING):
        taken, _ = exchange(broken, [GET])
    assert taken.startswith(b"HTTP/1.1 500 ")


# --- deadlines and room ----------------------------------------------------------------------------------------------

Scene = Callable[[], Coroutine[Any, Any, None]]


def later(clients: Clients, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Checks the deadlines as if `seconds` had gone by."""
    now = time.monotonic() + seconds
    with monkeypatch.context() as patch:
        patch.setattr("time.monotonic", lambda: now)
        clients.registry.expire()


def test_each_phase_has_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        clients = Clients(echo)
        silent, half, idle, reader = (clients.connect() for _ in range(4))
        half[0].data_received(HEAD)
        idle[0].data_received(GET)
        reader[1].is_full = True
        reader[0].data_received(GET)
        await settle(idle[0])
        await settle(reader[0])
        assert [one[0].phase for one in (silent, half, idle, reader)] == [
            Phase.ARRIVING, Phase.ARRIVING, Phase.IDLE, Phase.LEAVING,
        ]  # fmt: skip
        later(clients, monkeypatch, 9)
        assert not any(one[1].is_lost for one in (silent, half, idle, reader))
        later(clients, monkeypatch, 11)
        assert b" 408 " in half[1].taken
        assert [one[1].is_lost for one in (silent, half, idle, reader)] == [True, False, False, True]
        later(clients, monkeypatch, 13)
        assert half[1].is_lost
        later(clients, monkeypatch, 76)
        assert idle[1].is_lost
        assert len(clients.registry) == 0

    asyncio.run(scene())


def test_a_slow_reader_gets_its_next_answer_when_it_has_taken_the_last_one() -> None:
    async def scene() -> None:
        connection, transport = Clients(echo).connect()
        transport.is_full = True
        connection.data_received(GET + GET)
        await settle(connection)
        assert (transport.taken.count(b"200 OK"), connection.phase) == (1, Phase.LEAVING)
        connection.data_received(GET * 3000)
        assert transport.is_paused  # what it sends meanwhile is bounded by the kernel
        transport.is_full = False
        connection.resume_writing()
        await settle(connection)
        assert (transport.taken.count(b"200 OK"), connection.phase) == (3002, Phase.IDLE)

    asyncio.run(scene())


def connected(clients: Clients, number: int, peer: str) -> list[tuple[ClientConnection, FakeTransport]]:
    return [clients.connect(peer) for _ in range(number)]


def test_audit_b4_the_longest_waiting_makes_room_and_a_newcomer_is_looked_at() -> None:
    async def scene() -> None:
        clients = Clients(echo, most=40)
        readers = connected(clients, 20, "192.0.2.1")
        for connection, transport in readers:
            transport.is_full = True
            connection.data_received(GET)
            await settle(connection)
        connected(clients, 20, "192.0.2.2")
        for _ in range(30):
            connection, transport = clients.connect("192.0.2.3")
            connection.data_received(GET)
            await settle(connection)
            assert b" 200 " in transport.taken
        assert len(clients.registry) <= 40
        assert all(transport.is_lost for _, transport in readers)  # they never read, and waited longest

    asyncio.run(scene())


def test_audit_b4_a_peer_over_its_share_loses_its_own_connections_only() -> None:
    async def scene() -> None:
        clients = Clients(echo, most=40)
        honest = connected(clients, 10, "192.0.2.1")
        connected(clients, 200, "192.0.2.2")
        assert not any(transport.is_lost for _, transport in honest)
        assert len(clients.registry) <= 40

    asyncio.run(scene())


def test_audit_b4_a_busy_connection_and_one_with_an_accepted_token_stay() -> None:
    async def scene() -> None:
        waiting = asyncio.Event()

        async def slow(scope: dict[str, Any], receive: Any, send: Any) -> None:
            await waiting.wait()
            await echo(scope, receive, send)

        clients = Clients(slow, most=40)
        busy, busy_transport = clients.connect("192.0.2.1")
        busy.data_received(GET)
        known, known_transport = clients.connect("192.0.2.1")
        known.accepted_at = time.monotonic()
        for number in range(200):
            clients.connect(f"192.0.2.{2 + number % 50}")
        assert not busy_transport.is_lost
        assert not known_transport.is_lost
        waiting.set()
        await settle(busy)
        assert b" 200 " in busy_transport.taken

    asyncio.run(scene())
