"""Where a request ends, however its bytes arrive; and that two readers can never disagree about it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.api.framing import MAX_HEAD, MAX_REQUEST, Arrival, Framing
from signer.protocol.sign_request import MAX_BODY

HEAD = b"POST /api/sign/llmops HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def look(data: bytes) -> tuple[Arrival, bytes, bytes]:
    """The verdict, the request that is taken, and what is left."""
    framing, inbox = Framing(), bytearray(data)
    return framing.look(inbox), framing.take(inbox), bytes(inbox)


def with_length(body: bytes, length: object = None) -> bytes:
    return HEAD + f"Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


@pytest.mark.parametrize("request_", [GET, with_length(b"{}"), with_length(b""), with_length(b"x" * MAX_BODY)])
def test_a_whole_request_is_taken_as_it_came_and_the_next_one_stays(request_: bytes) -> None:
    assert look(request_ + b"GET /next") == (Arrival.WHOLE, request_, b"GET /next")


@pytest.mark.parametrize("request_", [GET, with_length(b"{}"), CHUNKED + b"2;x=1\r\n{}\r\n0\r\nTrailer: x\r\n\r\n"])
def test_any_part_of_a_request_waits_for_the_rest(request_: bytes) -> None:
    framing, inbox = Framing(), bytearray()
    for byte in request_[:-1]:
        inbox.append(byte)
        assert framing.look(inbox) is Arrival.PART
    inbox.append(request_[-1])
    assert framing.look(inbox) is Arrival.WHOLE


def test_chunks_become_one_body_with_its_length() -> None:
    verdict, request_, rest = look(CHUNKED + b"3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\nX: y\r\n\r\nGET")
    assert verdict is Arrival.WHOLE
    assert request_ == HEAD + b"Content-Length: 13\r\n\r\nabc0123456789"
    assert rest == b"GET"


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=8), st.integers(1, 40))
def test_chunks_of_any_size_in_pieces_of_any_size_say_the_same(chunks: list[bytes], step: int) -> None:
    data = CHUNKED + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    framing, inbox = Framing(), bytearray()
    verdicts = []
    for at in range(0, len(data), step):
        inbox += data[at : at + step]
        verdicts.append(framing.look(inbox))
    assert verdicts[-1] is Arrival.WHOLE
    body = b"".join(chunks)
    assert framing.take(inbox) == HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize(
    "request_",
    [
        with_length(b"", MAX_BODY + 1),
        with_length(b"", 10**30),
        CHUNKED + b"%x\r\n" % (MAX_BODY + 1),
        CHUNKED + b"FFFFFFFF\r\n",
        CHUNKED + (b"%x\r\n" % MAX_BODY + b"x" * MAX_BODY + b"\r\n") + b"1\r\ny\r\n",
        CHUNKED + b"1\r\nx\r\n" * (MAX_REQUEST // 6 + 1),
    ],
)
def test_a_body_over_the_limit_is_known_before_it_has_come_and_its_head_says_so(request_: bytes) -> None:
    verdict, taken, _ = look(request_)
    assert verdict is Arrival.OVERSIZED
    assert taken.endswith(b"\r\n\r\n")
    assert int(taken.partition(b"Content-Length: ")[2]) > MAX_BODY


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: 1\r\nContent-Length: 1\r\n",
        b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: +1\r\n",
        b"Content-Length: 0x1\r\n",
        b"Content-Length: 1, 1\r\n",
        b"Content-Length:\r\n",
        b"content-length : 1\r\nCONTENT-LENGTH: 2\r\n",
    ],
)
def test_a_length_said_twice_or_oddly_is_broken(fields: bytes) -> None:
    assert look(HEAD + fields + b"\r\nxx")[0] is Arrival.BROKEN


@pytest.mark.parametrize(
    "chunk", [b"\r\n", b"x\r\n", b"-1\r\n", b" 1\r\n", b"123456789\r\n", b"1\r\nab\r\n", b"0x1\r\n"]
)
def test_a_chunk_that_is_none_is_broken(chunk: bytes) -> None:
    assert look(CHUNKED + chunk + b"\r\n")[0] is Arrival.BROKEN


def test_chunks_need_http_1_1() -> None:
    assert look(CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n")[0] is Arrival.BROKEN


def test_a_head_over_the_limit_is_seen_with_or_without_its_end() -> None:
    long = HEAD + b"X: " + b"y" * MAX_HEAD
    assert look(long)[0] is Arrival.HEAD_TOO_LARGE
    assert look(long + b"\r\n\r\n")[0] is Arrival.HEAD_TOO_LARGE


@pytest.mark.parametrize("value, expected", [(b"100-continue", True), (b"100-Continue", True), (b"200-ok", False)])
def test_it_is_seen_that_a_client_waits_for_a_word(value: bytes, expected: bool) -> None:
    framing = Framing()
    assert framing.look(bytearray(HEAD + b"Expect: " + value + b"\r\nContent-Length: 2\r\n\r\n")) is Arrival.PART
    assert framing.expects_continue is expected


@given(st.binary(max_size=300))
def test_no_bytes_are_a_surprise(data: bytes) -> None:
    assert look(data)[0] in Arrival
    assert look(CHUNKED + data)[0] in Arrival
