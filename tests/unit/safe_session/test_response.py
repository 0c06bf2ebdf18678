"""Nothing the signing service says is trusted: every answer that is not a certificate for our key is an error."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.errors import BadFormat, NotAuthenticated, Refused, SignerError, Unavailable
from signer.safe_session import output, statuses
from signer.safe_session.approval import HumanRequest
from signer.safe_session.arguments import parse_arguments
from signer.safe_session.http import HttpResponse, Incoming, NoResponse, read_response
from signer.safe_session.keypair import make_key, sha256
from signer.safe_session.request import render_body
from signer.safe_session.response import CERTIFICATE_TYPE, check_certificate, parse_object, read_certificate
from signer.ssh.wire import string, uint32, uint64

OURS = bytes(range(32))
PLACE = "http://127.0.0.1:8222"


def certificate(
    *,
    kind: str = CERTIFICATE_TYPE,
    public: bytes = OURS,
    purpose: int = 1,
    after: int = 1000,
    before: int = 1930,
    tail: bytes = b"",
) -> str:
    """By draft-ietf-sshm-cert; its signature is nonsense, as this side cannot judge it."""
    fields = [string(kind.encode()), string(bytes(32)), string(public), uint64(4711), uint32(purpose)]
    fields += [string(b"deploy-agent"), string(string(b"llmops")), uint64(after), uint64(before)]
    fields += [string(b"")] * 3 + [string(b"ca"), string(b"signature"), tail]
    return f"{kind} {base64.b64encode(b''.join(fields)).decode()}"


def http(body: bytes, status: str = "201 Created", *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode() + body


def parse_response(raw: bytes, place: str) -> HttpResponse:
    """A response that arrives as a whole before its connection is closed."""
    pieces = [raw]
    return read_response(Incoming(lambda: pieces.pop() if pieces else b"", place))


def test_a_certificate_for_our_key_is_taken() -> None:
    taken = check_certificate(certificate(), OURS, 900)
    assert (taken.serial, taken.lifetime) == (4711, 900)
    assert string(OURS) in taken.blob


@pytest.mark.parametrize(
    "words,why",
    [
        (certificate(public=bytes(32)), "it is for another key"),
        (certificate(purpose=2), "it is not for a user"),
        (certificate(purpose=0), "it is not for a user"),
        (certificate(kind="ssh-rsa-cert-v01@openssh.com"), "it is not an Ed25519 certificate"),
        (certificate().replace(CERTIFICATE_TYPE, "ssh-ed25519", 1), "it is not an Ed25519 certificate"),
        (certificate(tail=b"x"), "it cannot be read"),
        (certificate()[:-40], "it cannot be read"),
        (certificate() + "!", "it cannot be read"),
        (CERTIFICATE_TYPE, "it cannot be read"),
        ("", "it cannot be read"),
        (certificate() + "\u00e9", "it cannot be read"),
        (certificate(after=1930), "it has expired"),
        (certificate(after=2000), "it has expired"),
    ],
)
def test_a_certificate_that_is_not_ours_to_use_is_refused(words: str, why: str) -> None:
    with pytest.raises(BadFormat) as caught:
        check_certificate(words, OURS, 900)
    assert caught.value.code == "bad_certificate"
    assert caught.value.text.endswith(why)


@pytest.mark.parametrize("expires_in,lifetime", [(1, 1), (900, 900), (931, 930), (10**12, 930)])
def test_the_agent_never_holds_a_key_longer_than_the_certificate_spans(expires_in: int, lifetime: int) -> None:
    assert check_certificate(certificate(), OURS, expires_in).lifetime == lifetime


def test_a_certificate_without_an_end_is_held_for_a_day_at_most() -> None:
    endless = certificate(after=0, before=2**64 - 1)
    assert check_certificate(endless, OURS, 2**40).lifetime == 24 * 3600


@pytest.mark.parametrize("expires_in", [0, -1])
def test_a_certificate_that_is_over_by_the_services_clock_is_refused(expires_in: int) -> None:
    with pytest.raises(BadFormat):
        check_certificate(certificate(), OURS, expires_in)


@given(st.binary(max_size=300))
def test_no_bytes_for_a_certificate_raise_anything_outside_the_tree(blob: bytes) -> None:
    with pytest.raises(BadFormat):
        check_certificate(f"{CERTIFICATE_TYPE} {base64.b64encode(blob).decode()}", OURS, 900)


def answer(status: int, body: object) -> HttpResponse:
    return HttpResponse(status, {}, json.dumps(body).encode())


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"certificate": certificate()},
        {"certificate": 7, "expires_in": 900},
        {"certificate": certificate(), "expires_in": "900"},
        {"certificate": certificate(), "expires_in": True},
        {"certificate": certificate(), "expires_in": 900.0},
        [],
        None,
        "text",
    ],
)
def test_a_201_without_a_certificate_is_not_our_service(body: object) -> None:
    with pytest.raises(BadFormat) as caught:
        read_certificate(answer(201, body), OURS, PLACE)
    assert caught.value.code == "not_our_service"


@pytest.mark.parametrize("status", [200, 202, 302])
def test_only_201_brings_a_certificate(status: int) -> None:
    with pytest.raises(BadFormat):
        read_certificate(answer(status, {"certificate": certificate(), "expires_in": 900}), OURS, PLACE)


@pytest.mark.parametrize("status,kind", [(400, Refused), (401, NotAuthenticated), (403, Refused), (503, Unavailable)])
def test_a_refusal_is_the_services_own_sentence_and_hint(status: int, kind: type[SignerError]) -> None:
    said = {"detail": "role llmops does not allow principal root", "hint": "it allows llmops", "code": "c"}
    with pytest.raises(kind) as caught:
        read_certificate(answer(status, said), OURS, PLACE)
    assert (caught.value.text, caught.value.hint, caught.value.code) == (said["detail"], said["hint"], "c")


@pytest.mark.parametrize(
    "header,text,hint,seconds,shown",
    [
        ("7", "too many", "", 7, "try again in 7 s"),
        ("7", "too many", "use another role", 7, "try again in 7 s; use another role"),
        ("7", "too many", "wait 7 s", 7, "wait 7 s"),
        ("soon", "too many", "later", None, "later"),
        ("12345678", "too many", "later", None, "later"),
    ],
)
def test_a_limit_says_in_how_many_seconds(header: str, text: str, hint: str, seconds: int | None, shown: str) -> None:
    body = json.dumps({"detail": text, "hint": hint, "code": "rate_limited"}).encode()
    with pytest.raises(statuses.Limited) as caught:
        read_certificate(HttpResponse(429, {"retry-after": header}, body), OURS, PLACE)
    assert caught.value.hint == shown
    assert caught.value.facts.get("retry_after_s") == seconds


@pytest.mark.parametrize(
    "body", [b"<html>502</html>", b"", b"\xff\xfe", b"[" * 60000, b'{"detail": 7}', b"{} {}", b"NaN"]
)
def test_an_error_without_a_problem_is_not_our_service(body: bytes) -> None:
    with pytest.raises(BadFormat) as caught:
        read_certificate(HttpResponse(502, {}, body), OURS, PLACE)
    assert "502" in caught.value.text
    assert "SAFE_SESSION_ADDR" in caught.value.hint


def test_one_whole_answer_is_parsed() -> None:
    parsed = parse_response(http(b"{}", "503 Busy", "Retry-After: 1", "content-length: 2"), PLACE)
    assert (parsed.status, parsed.headers["retry-after"], parsed.body) == (503, "1", b"{}")


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        b"HTTP/1.0 201",
        b"HTTP/1.0 201 Created\r\nContent-Length: 2\r\n",
        b"HTTP/2 201 x\r\n\r\n{}",
        b"HTTP/1.0 2O1 x\r\n\r\n{}",
        b"HTTP/1.0  201 x\r\n\r\n{}",
        b"\r\n\r\n",
        b"\0" * 100,
        http(b"{}", "201 x", "Content-Length: 3"),
        http(b"{}", "201 x", "Content-Length: 1"),
        http(b"{}", "201 x", "Content-Length: -1"),
        http(b"2\r\n{}\r\n0\r\n\r\n", "201 x", "Transfer-Encoding: gzip, chunked"),
        http(b"2\r\n{}\r\n0\r\n\r\n", "201 x", "Transfer-Encoding: chunked", "Content-Length: 12"),
        http(b"2\r\n{}\r\n0\r\n", "201 x", "Transfer-Encoding: chunked"),
        http(b"2\r\n{}\r\n", "201 x", "Transfer-Encoding: chunked"),
        http(b"3\r\n{}\r\n0\r\n\r\n", "201 x", "Transfer-Encoding: chunked"),
        http(b"1\r\n{}\r\n0\r\n\r\n", "201 x", "Transfer-Encoding: chunked"),
        http(b"-2\r\n{}\r\n0\r\n\r\n", "201 x", "Transfer-Encoding: chunked"),
        http(b"2_0\r\n{}\r\n0\r\n\r\n", "201 x", "Transfer-Encoding: chunked"),
        http(b"2\r\n{}\r\n0\r\n\r\nx", "201 x", "Transfer-Encoding: chunked"),
        http(b"", "100 Continue") * 20 + http(b"{}", "201 x"),
        http(b"", "100 Continue"),
        http(b" " * 70000),
    ],
)
def test_what_is_not_one_whole_http_answer_is_not_our_service(raw: bytes) -> None:
    with pytest.raises(BadFormat) as caught:
        parse_response(raw, PLACE)
    assert caught.value.code == "not_our_service"


class Wire:
    """A server that sends `pieces`, one a read, and keeps the connection open."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def receive(self) -> bytes:
        assert self.pieces, "the end of the response was not seen"
        return self.pieces.pop(0)


def cut(raw: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(raw), *(place % len(raw) for place in places)})
    return [raw[start:end] for start, end in pairwise(edges)]


@given(
    st.binary(max_size=300),
    st.lists(st.integers(1, 50), min_size=1),
    st.lists(st.integers(0, 5000)),
    st.sampled_from([(), ("X: y",), ("X: y", "Z: 0")]),
    st.integers(0, 3),
)
def test_audit_f8_a_chunked_body_is_the_same_however_it_is_cut(
    body: bytes, sizes: list[int], places: list[int], trailer: tuple[str, ...], interim: int
) -> None:
    chunks, at = b"", 0
    while at < len(body):
        piece = body[at : at + sizes[at % len(sizes)]]
        chunks += b"%X;a=b\r\n%s\r\n" % (len(piece), piece)
        at += len(piece)
    chunks += b"0\r\n" + "".join(f"{line}\r\n" for line in trailer).encode() + b"\r\n"
    raw = http(b"", "103 Hints", "Link: x") * interim + http(chunks, "201 x", "Transfer-Encoding: Chunked")
    wire = Wire(cut(raw, places))
    assert read_response(Incoming(wire.receive, PLACE)).body == body
    assert wire.pieces == []


@given(st.binary(max_size=300), st.lists(st.integers(0, 5000)))
def test_audit_f8_a_body_of_known_length_ends_there(body: bytes, places: list[int]) -> None:
    raw = http(body, "201 x", f"Content-Length: {len(body)}")
    assert read_response(Incoming(Wire(cut(raw, places)).receive, PLACE)).body == body


def test_silence_is_no_answer() -> None:
    with pytest.raises(NoResponse):
        parse_response(b"", PLACE)


@given(st.binary(max_size=200))
def test_no_answer_raises_anything_outside_the_tree(raw: bytes) -> None:
    with contextlib.suppress(SignerError):
        read_certificate(parse_response(raw, PLACE), OURS, PLACE)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON), st.sampled_from([None, 1]), st.booleans())
def test_json_objects_are_read_as_json_reads_them(value: dict[str, object], indent: int | None, escaped: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=escaped)
    assert parse_object(f" {text}\n") == json.loads(text)


@given(st.text())
def test_what_json_refuses_is_refused(text: str) -> None:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        with pytest.raises(BadFormat):
            parse_object(text)


@pytest.mark.parametrize("text", ['{"a":NaN}', '{"a":1', '{"a":"\n"}', '{"a":1}x', "{'a':1}", '{"a":}', ""])
def test_bad_json_is_refused(text: str) -> None:
    with pytest.raises(BadFormat):
        parse_object(text)


DIGEST = 64 * "0"


def body_of(*words: str) -> dict[str, object]:
    body: dict[str, object] = json.loads(render_body(parse_arguments(list(words)), b"blob", DIGEST))
    return body


def test_a_request_holds_what_was_given_and_nothing_else() -> None:
    bare = body_of("ssh", "h")
    assert bare == {"public_key": "ssh-ed25519 YmxvYg==", "claim_sha256": DIGEST, "ttl": 120}
    assert body_of("exec", "--", "make") == {"public_key": "ssh-ed25519 YmxvYg==", "claim_sha256": DIGEST}
    words = ["--ttl", "900", "--principal", "a", "--principal", 'b"', "--reason", 'say "hi"\n\u00e9', "ssh", "h"]
    full = body_of(*words)
    assert full == {**bare, "ttl": 900, "principals": ["a", 'b"'], "reason": 'say "hi"\n\u00e9'}
    assert body_of("--ttl", "15m", "ssh", "h")["ttl"] == "15m"
    exact = body_of("ssh", "--exact", "h", "echo", 'a "b"')
    assert exact["critical_options"] == {"force-command": 'echo a "b"'}


def test_keys_are_new_match_their_public_half_and_can_be_wiped() -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, other = make_key(), make_key()
    assert key.seed.raw != other.seed.raw
    assert Ed25519PrivateKey.from_private_bytes(key.seed.raw).public_key().public_bytes_raw() == key.public
    key.wipe()
    assert key.seed.raw == bytes(32)


@given(st.binary(max_size=200))
def test_sha256_is_what_hashlib_computes(data: bytes) -> None:
    assert sha256(data) == hashlib.sha256(data).digest()


def test_a_missing_libcrypto_is_named() -> None:
    with pytest.raises(Unavailable) as caught:
        make_key(("libcrypto.so.0",))
    assert "libcrypto.so.0" in caught.value.text


@given(st.text())
def test_what_is_printed_is_one_line_that_moves_no_cursor(text: str) -> None:
    shown = output.plain(text)
    assert all(c.isprintable() for c in shown)
    assert len(shown) <= 600


def test_escape_sequences_from_a_server_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    error = Refused("c", "no\x1b]0;owned\x07\r\nsafe-session: fake\u202e", "\x9b2Jdo")
    assert output.report(error, as_json=False) == statuses.REFUSED
    err = capsys.readouterr().err
    assert err == "safe-session: error: no ]0;owned safe-session: fake\nsafe-session: hint: 2Jdo\n"


@pytest.mark.parametrize("seconds,said", [(900, "15 min"), (59, "59 s"), (60, "1 min"), (3600, "60 min")])
def test_the_line_of_v_says_what_was_issued(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seconds: int, said: str
) -> None:
    monkeypatch.setattr("time.time", lambda: 0)
    monkeypatch.setattr("time.localtime", __import__("time").gmtime)
    output.say_certificate("llmops", 4711, seconds, as_json=False)
    until = f"{seconds // 3600:02}:{seconds // 60 % 60:02}"
    said_whole = f"safe-session: llmops for {said} (serial 4711, until {until}), key only in a private agent\n"
    assert capsys.readouterr().err == said_whole


@pytest.mark.parametrize(
    "told, expected",
    [
        (None, None),
        ("phone", None),
        ([], []),
        (
            [
                {"channel": "phone", "kind": "ntfy", "state": "sending", "error": None, "of": "approval.requested"},
                {"channel": "hook", "kind": "webhook", "state": "failed", "error": "it answers 500"},
                {"channel": "phone", "kind": "ntfy", "state": "sent", "error": None, "people": ["ben"]},
                7,
            ],
            [
                {"channel": "phone", "kind": "ntfy", "state": "sent"},
                {"channel": "hook", "kind": "webhook", "state": "failed", "error": "it answers 500"},
            ],
        ),
    ],
)
def test_a_pending_request_says_who_was_told(told: object, expected: object) -> None:
    fields = {"request": "r-aaaaaaaaaa", "state": "pending", "frozen": {}, "told": told}
    facts = HumanRequest({name: value for name, value in fields.items() if value is not None}, PLACE).pending_facts("x")
    assert facts.get("told") == expected
    assert ("told" in facts) == (expected is not None)
