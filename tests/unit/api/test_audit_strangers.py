"""What a caller without a token can make the service do: nothing that grows faster than the bytes that it sends.

Each reader of foreign bytes reads each of the nasty texts in `NASTY` twice, the second eight times as long. Time is CPU
time of the thread. A reader that is linear needs eight times as long, somewhat more where the longer text leaves the
processor's caches; one that is quadratic sixty-four times. The bound lies in the middle, by ratio.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import ipaddress
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pytest

from signer.api.admission import Admission, busy
from signer.api.asgi import Api, create_app, read_environ, run_flask
from signer.api.console.session import HEADERS
from signer.api.edge import MAX_HEAD, Phase
from signer.api.request import read_address, read_token
from signer.api.vault.responses import failure
from signer.errors import BadRequest, NotAuthenticated, SignerError
from signer.model import MAX_PUBLIC_KEY, Caller, hide_tokens
from signer.policy.decide import Policy
from signer.policy.rules import check_cidr_list
from signer.policy.tokens import is_mistyped, token_digest
from signer.protocol.bodies import read_body_as
from signer.protocol.commands import MAX_HEADER, Sign, Unauthenticated, read_command, split_message
from signer.protocol.go_duration import BadDuration, go_nanoseconds
from signer.protocol.go_json import has_too_many_strings, is_too_deep, unverified_text, well_formed
from signer.protocol.log_limit import WINDOW, LogLimit
from signer.protocol.operations import OperationBody
from signer.protocol.replies import MetricsText, decode_reply, encode_reply, expect
from signer.protocol.sign_request import (
    MAX_BODY,
    decode_body,
    is_form,
    read_native_sign,
    read_vault_sign,
    vault_sign_warnings,
)
from signer.safe_session.http import Incoming, read_response
from signer.safe_session.response import check_certificate, parse_object
from signer.settings import Proxies, load_settings
from signer.ssh.publickey import parse_public_key
from signer.ssh.sshsig import MAX_ARMOR, verify
from signer.ssh.statement import request_digest
from signer.units import parse_duration
from signer.vault.audit_log import read_audit_log
from tests.parts import builders
from tests.parts.edge import Clients, exchange
from tests.parts.fido import FidoKey

pytestmark = pytest.mark.unix_socket  # the api looks for a keeper that is not there

Reader = Callable[[str], object]
APPROVER: Final = parse_public_key(FidoKey().line)
FORM: Final = "application/x-www-form-urlencoded"
MAX_FIELD: Final = 8_000  # characters of one header field; gunicorn takes 8,190
TIMES: Final = 8  # as long is the second text
AT_MOST: Final = TIMES**1.5  # times the first one's seconds: as far from linear as from quadratic
TOO_SHORT_TO_MEASURE: Final = 0.003  # seconds
ROUNDS: Final = 40  # at most, of which the best counts: other processes take turns with this one


def _repeated(prefix: str, unit: str, suffix: str = "") -> Callable[[int], str]:
    """Texts of about the given length."""
    return lambda size: prefix + unit * ((size - len(prefix) - len(suffix)) // len(unit)) + suffix


NASTY: dict[str, Callable[[int], str]] = {
    "blanks": _repeated("", " ", "x"),
    "tabs": _repeated("x", "\t", "\x0b"),
    "line ends": _repeated("", "\r\n"),
    "line feeds": _repeated("a/login/", "/login/", "\n"),
    "quotes": _repeated("", '"'),
    "escaped quotes": _repeated('{} "', '\\"'),
    "escaped quotes in an object": _repeated('{"a":"', '\\"', '"}'),
    "backslashes": _repeated('{"a":"', "\\", '"'),
    "escapes": _repeated('"', "\\ud800"),
    "open lists": _repeated("", "["),
    "closed lists": lambda size: "[" * (size // 2) + "]" * (size // 2),
    "open objects": _repeated("", '{"a":'),
    "lists in lists": lambda size: "[" * 30 + ",".join(["[]"] * ((size - 60) // 3)) + "]" * 30,
    "maps in a list": _repeated("[", '{"a":1},', "{}]"),
    "a wide map": lambda size: "{" + ",".join(f'"{number:06}":[1]' for number in range(size // 13)) + "}",
    "numbers": _repeated("[", "1,", "1]"),
    "commas": _repeated("", ","),
    "semicolons": _repeated("", ";"),
    "parameters": _repeated("", "; a=b"),
    "quoted parameters": _repeated(";a=", '";a="'),
    "blanks in parameters": _repeated("", "; a=b   ", "!"),
    "percent signs": _repeated("", "%"),
    "percent escapes": _repeated("", "%61"),
    "ampersands": _repeated("", "&"),
    "a name repeated": _repeated("", "a=1&"),
    "names": lambda size: "&".join(f"{number:06}=1" for number in range(size // 9)),
    "digits": _repeated("", "9"),
    "zeros": _repeated("", "0", "d"),
    "fractions": _repeated("", "1.", "s"),
    "durations": _repeated("", "1s"),
    "letters": _repeated("", "a", "!"),
    "names with dots": _repeated("", "a.", "!"),
    "slashes": _repeated("", "/", "x"),
    "paths": _repeated("", "/sign/x"),
    "dots": _repeated("", "../"),
    "colons": _repeated("", ":"),
    "addresses": _repeated("", "127.0.0.1,", "127.0.0.1"),
    "networks": _repeated("", "10.0.0.0/8,", "x"),
    "minus signs": _repeated("", "-"),
    "base64": _repeated("", "AAAA", "!"),
    "base64 in lines": _repeated("", "AAAA\n", "="),
    "our prefix": _repeated("", "sgn_a"),
    "letters outside ASCII": _repeated("", "é"),
    "bytes that are not UTF-8": _repeated("", "\udcff"),
    "zero bytes": _repeated("", "\0"),
    "fields": _repeated("", "\r\na: b"),
    "framing fields": _repeated("", "\r\nexpect : x"),
    "chunks": _repeated("", "1\r\nx\r\n"),
    "a chunk's extension": _repeated("1", ";x", "\n"),
    "a chunk's blanks": _repeated("1", " ", "x\r\n"),
}


# --- the readers -----------------------------------------------------------------------------------------------------


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _signature(text: str) -> None:
    verify(text, b"", "approval.v1@signer", APPROVER)


def _armored(text: str) -> str:
    """The text in an armor, where it is read as base64 and then as the fields of a signature."""
    encoded = base64.b64encode(b"SSHSIG\0\0\0\1" + _raw(text)[: MAX_ARMOR * 7 // 10]).decode()
    lines = (encoded[at : at + 70] for at in range(0, len(encoded), 70))
    return "\n".join(("-----BEGIN SSH SIGNATURE-----", *lines, "-----END SSH SIGNATURE-----"))


def _shown_request(text: str) -> None:
    request_digest({"reason": text, text: {"reason": text}})
    request_digest(decode_body(_raw(f'{{"options":{text}}}')))


def _vault_fields(text: str) -> None:
    """Each field as that text."""
    fields = dict.fromkeys(("public_key", "valid_principals", "key_id", "cert_type", "reason", "x"), text)
    read_vault_sign("llmops", fields)
    vault_sign_warnings({text: text, **fields})


def _vault_body(text: str) -> None:
    fields = decode_body(_raw(f'{{"extensions":{text}}}'))
    vault_sign_warnings(fields)
    read_vault_sign("llmops", fields)


def _native_body(text: str) -> None:
    for field in ("principals", "critical_options", "ttl"):
        with suppress(SignerError):
            read_native_sign("llmops", decode_body(_raw(f'{{"{field}":{text}}}')))


def _ttl(text: str) -> None:
    read_vault_sign("llmops", {"ttl": text})


def _header_line(text: str) -> None:
    policy = builders.policy()
    for line in (text, json.dumps({"op": "head", "token": text, "address": text, "request_id": text})):
        with suppress(SignerError):
            read_command(*split_message(_raw(line)), lambda caller: _known(policy, caller))


def _known(policy: Policy, caller: Caller) -> None:
    policy.authenticate(caller.token, builders.NOW)


def _token(text: str) -> None:
    token_digest(text)
    is_mistyped(text)
    is_mistyped("sgn_" + text)
    hide_tokens(text)


NETWORKS: Final = Proxies((ipaddress.ip_network("127.0.0.0/8"),))


def _sender(text: str) -> None:
    read_token({"HTTP_AUTHORIZATION": "Bearer " + text})
    read_token({"HTTP_X_VAULT_TOKEN": text})
    read_address({"REMOTE_ADDR": "127.0.0.1", "HTTP_X_FORWARDED_FOR": text}, NETWORKS)


HEAD: Final = b"POST /api/sign/llmops HTTP/1.1\r\nHost: x\r\n"
CHUNKED: Final = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


async def _refuse_all(_scope: object, receive: Callable[[], Any], _send: object) -> None:
    """An application that answers nothing."""
    await receive()


async def _arrive(beginning: bytes, data: bytes, piece: int) -> None:
    connection, _ = Clients(_refuse_all).connect()
    connection.data_received(beginning)
    for at in range(0, len(data), piece):
        if connection.phase is not Phase.ARRIVING:
            break
        connection.data_received(data[at : at + piece])


def _framed(beginning: bytes, text: str, piece: int) -> None:
    """A request that arrives in pieces."""
    LOOP.run_until_complete(_arrive(beginning, _raw(text), piece))


def _head(text: str) -> None:
    _framed(HEAD + b"X: ", text, 16)
    _framed(HEAD + b"X: ", text + "\r\n\r\n", MAX_HEAD)
    _framed(HEAD + b"Transfer-Encoding: ", text + "\r\n\r\n", MAX_HEAD)


def _chunks(text: str) -> None:
    _framed(CHUNKED, text, 16)
    _framed(CHUNKED + b"0\r\n", text, 16)


def _parsed(text: str) -> None:
    """A field, and the environment that the application reads from it."""
    for field in (f"X: {text}", text.strip()):
        _framed(HEAD, field + "\r\n\r\n", MAX_HEAD)
    for name in (b"x-vault-token", b"authorization", b"x-forwarded-for", b"content-type", b"x-vault-namespace"):
        scope = {"client": ("127.0.0.1", 4711), "method": "GET", "raw_path": b"/", "query_string": b""}
        read_environ({**scope, "headers": [(name, _raw(text))]}, b"")


def _no_keeper() -> Api:
    """The whole API, whose keeper is not there: it lets every check before the keeper's run."""
    return create_app(load_settings({"SIGNER_RUN_DIR": "/nonexistent", "SIGNER_TRUSTED_PROXIES": "127.0.0.0/8"}))


LOOP: Final = asyncio.new_event_loop()
API: Final = _no_keeper()


def _escaped(text: str) -> bytes:
    """What of a target the edge lets pass: printable ASCII."""
    return quote(text.encode("latin-1"), safe="!#$%&'()*+,-./:;<=>?@[]^_{|}~\\\"`").encode()


def _call(method: str = "POST", path: str = "/v1/ssh/roles/x", body: bytes = b"a", **fields: str) -> None:
    scope: dict[str, Any] = {
        "client": ("127.0.0.1", 4711),
        "method": method,
        "raw_path": _escaped(path),
        "query_string": _escaped(fields.pop("QUERY_STRING", "")),
        "headers": [
            (name.removeprefix("HTTP_").replace("_", "-").lower().encode(), value.encode("latin-1"))
            for name, value in fields.items()
        ],
    }
    environ = read_environ(scope, body)
    if (call := API._routes.sign_call(environ, body)) is not None:
        call.run(API.keeper)
    else:
        run_flask(API._flask, environ, body)


def _paths(text: str) -> None:
    latin = text.encode("utf-8", "surrogateescape").decode("latin-1")
    for path in ("/", "/v1/", "/v1/ssh/", "/v1/ssh/sign/", "/v1/ssh/issuer/", "/api/sign/", "/api/freezes/"):
        _call("POST" if "sign" in path else "GET", path + latin)


def _field(name: str, text: str) -> dict[str, Any]:
    return {name: text}


def _fields(text: str) -> None:
    for name in ("CONTENT_TYPE", "HTTP_ACCEPT", "HTTP_COOKIE", "HTTP_HOST", "HTTP_X_FORWARDED_FOR", "QUERY_STRING"):
        for path in ("/v1/ssh/roles/x", "/api/certificates"):
            _call("POST" if path.startswith("/v1") else "GET", path, **_field(name, text))
    for name in ("HTTP_X_VAULT_NAMESPACE", "HTTP_X_VAULT_WRAP_TTL", "HTTP_RANGE", "HTTP_IF_NONE_MATCH"):
        _call("POST", "/v1/ssh/sign/llmops", **_field(name, text))


class _Wire:
    """A service that answers a few bytes at a time."""

    def __init__(self, data: bytes, piece: int = 8) -> None:
        self._data, self._piece, self._at = data, piece, 0

    def receive(self) -> bytes:
        self._at += self._piece
        return self._data[self._at - self._piece : self._at]


def _answered(text: str) -> None:
    raw = b"HTTP/1.1 201 Created\r\nX: " + _raw(text)
    for whole in (raw, raw.replace(b"X: ", b"Content-Length: 99999\r\n\r\n", 1)):
        with suppress(SignerError):
            read_response(Incoming(_Wire(whole).receive, "there"))


def _answer_body(text: str) -> None:
    for read in (parse_object, lambda words: check_certificate("ssh-ed25519 " + words, b"", 60), read_problem):
        with suppress(SignerError):
            read(text)


def read_problem(text: str) -> object:
    """A reply of the keeper's, as the api reads it."""
    return expect(MetricsText, decode_reply(encode_reply(MetricsText(text=text))))


def _audit_log(text: str) -> None:
    entry = {"time": "2026-11-22T14:02:11Z", "type": "response", "request": {"path": text + "/sign/x"}}
    LOG.write_text(json.dumps(entry) + "\n" + json.dumps({**entry, "request": {"path": "auth/" + text}}) + "\n")
    read_audit_log(LOG, 0)


LOG = Path("audit.log")  # in a folder of the test's

# Whose bytes they are, who reads them, and how long they can be.
READERS: dict[str, tuple[Reader, int]] = {
    "audit_A1 a body of JSON": (lambda text: decode_body(_raw(text)), MAX_BODY),
    "audit_A1 a body of JSON that ends early": (lambda text: decode_body(_raw("{} " + text)), MAX_BODY - 3),
    "audit_A1 strings and depth of JSON": (lambda text: (has_too_many_strings(text), is_too_deep(text)), MAX_BODY),
    "audit_A1 a body in Vault's shape": (_vault_body, MAX_BODY - 20),
    "audit_A1 a native body": (_native_body, MAX_BODY - 30),
    "audit_A1 an operation's body": (lambda text: read_body_as(OperationBody, decode_body(_raw(text))), MAX_BODY),
    "audit_A1 a message's line": (_header_line, MAX_HEADER // 2),
    "audit_A2 a form": (lambda text: decode_body(_raw(text), FORM), MAX_BODY),
    "audit_A2 a Content-Type": (lambda text: (is_form(text), is_form(FORM + text)), MAX_FIELD),
    "audit_A2 a ttl of Vault's": (_ttl, MAX_BODY),
    "audit_A2 a ttl in a field": (go_nanoseconds, MAX_FIELD),
    "audit_A2 a native ttl": (parse_duration, MAX_BODY),
    "audit_A2 fields in Vault's shape": (_vault_fields, MAX_BODY),
    "audit_A2 text as Go holds it": (lambda text: well_formed(unverified_text(_raw(text))), MAX_BODY),
    "audit_A2 a key": (parse_public_key, MAX_PUBLIC_KEY),
    "audit_A2 a key with its kind": (lambda text: parse_public_key("ssh-ed25519 " + text), MAX_PUBLIC_KEY - 12),
    "a signature of an approver": (_signature, MAX_ARMOR),
    "a signature's content": (lambda text: _signature(_armored(text)), MAX_ARMOR),
    "a request to be approved": (_shown_request, MAX_BODY),
    "audit_A2 a token": (_token, MAX_HEADER),
    "audit_A2 a sender": (_sender, MAX_FIELD),
    "audit_A2 source addresses": (check_cidr_list, MAX_BODY),
    "audit_A2 an answer with a caller's words": (lambda text: failure(400, text), MAX_BODY),
    "audit_A2 a request's fields, in Flask": (_fields, MAX_FIELD),
    "audit_A2 a request's path, in Flask": (_paths, 4_000),
    "audit_A2 a request's body, in Flask": (lambda text: _call(body=_raw(text), CONTENT_TYPE=FORM), MAX_BODY),
    "audit_A2 a request's fields": (_parsed, MAX_FIELD),
    "audit_A3 a head as it arrives": (_head, MAX_HEAD - 100),
    "audit_A3 chunks as they arrive": (_chunks, 2 * MAX_BODY),
    "audit_A2 an answer as it arrives": (_answered, 60_000),
    "audit_A2 an answer's body": (_answer_body, 60_000),
    "audit_A2 a line of Vault's audit log": (_audit_log, 256 * 1024),
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """As `timeit` does: a collection looks at all that pytest holds, and comes when it wants."""
    gc.disable()
    yield
    gc.enable()


def _seconds(reader: Reader, text: str) -> float:
    began = time.thread_time()
    with suppress(SignerError, BadDuration, ValueError, UnicodeError):
        reader(text)
    return time.thread_time() - began


@pytest.mark.parametrize("name", READERS)
def test_a_reader_of_foreign_bytes_is_linear(name: str) -> None:
    reader, size = READERS[name]
    slow = {}
    for kind, make in NASTY.items():
        short, long = make(size // TIMES), make(size)
        least = [_seconds(reader, short), _seconds(reader, long)]
        for _ in range(ROUNDS - 1):
            if least[1] < max(AT_MOST * least[0], TOO_SHORT_TO_MEASURE):
                break
            least = [min(least[0], _seconds(reader, short)), min(least[1], _seconds(reader, long))]
        if least[1] >= max(AT_MOST * least[0], TOO_SHORT_TO_MEASURE):
            slow[kind] = f"{least[0] * 1000:.2f} ms, then {least[1] * 1000:.2f} ms"
    assert not slow


def test_audit_a1_the_worst_body_costs_milliseconds() -> None:
    """The body that stopped all signing for 30 s."""
    body = b'{} "' + b'\\"' * ((MAX_BODY - 4) // 2)
    began = time.thread_time()
    with pytest.raises(BadRequest):
        decode_body(body)
    assert time.thread_time() - began < 1  # seconds; it took 30


def test_audit_a2_the_worst_content_type_costs_milliseconds() -> None:
    began = time.thread_time()
    assert not is_form(FORM + " " * 8_000 + "x")
    assert time.thread_time() - began < 0.1


def test_audit_a3_a_field_is_no_expression() -> None:
    """A field that frames the body, as long as a head may be: to compile it took 50 ms, and its memory was kept."""
    field = b"Transfer-Encoding:" + b" \t" * 12_000 + b"chunked"

    async def arrive() -> Phase:
        connection, _ = Clients(_refuse_all).connect()
        connection.data_received(HEAD + field + b"\r\n\r\n0\r\n\r\n")
        return connection.phase

    began = time.thread_time()
    phase = LOOP.run_until_complete(arrive())
    assert time.thread_time() - began < 0.03
    assert phase is Phase.BUSY  # it is a whole request


# --- who is looked at before what ------------------------------------------------------------------------------------


class Untouchable(bytes):
    """A body that must not be looked at."""

    def __len__(self) -> int:
        raise AssertionError("somebody looked at the body")

    def decode(self, *_: Any) -> str:
        raise AssertionError("somebody decoded the body")


FIELDS: dict[str, dict[str, object]] = {
    "sign": {"role": "llmops"},
    "explain": {"role": "llmops"},
    "record": {},
    "freeze": {"scope": "all", "reason": "r"},
    "head": {},
    "certificates": {},
}
VAULTS: dict[str, object] = {"role": "llmops", "shape": "vault", "content_type": FORM}


@pytest.mark.parametrize("op, fields", [*FIELDS.items(), ("sign", VAULTS)])
@pytest.mark.parametrize("token", [None, "", "x", builders.token("nobody"), "sgn_" + "0" * 49])
def test_audit_a1_the_body_of_a_stranger_is_never_decoded(
    op: str, fields: dict[str, object], token: str | None
) -> None:
    bench = builders.Bench()
    header = {"op": op, "token": token, "address": "192.0.2.9", "request_id": "r-1", **fields}
    command = read_command(header, Untouchable(b"{}"), lambda caller: _known(bench.policy, caller))
    assert isinstance(command, Unauthenticated)
    reply = bench.ask(command)[0]
    assert isinstance(reply, NotAuthenticated)
    (event,) = bench.store.bodies("request.refused")
    assert event == {
        "code": reply.code,
        "text": reply.text,
        "role": fields.get("role", ""),
        "address": "192.0.2.9",
        "request_id": "r-1",
    }
    assert bench.store.entries[-1].actor == "unauthenticated"


def test_audit_a1_a_stranger_is_refused_and_recorded_as_by_the_core_itself() -> None:
    seen = []
    for direct in (True, False):
        bench = builders.Bench()
        caller = Caller("sgn_unknown", "192.0.2.9", "r-1")
        with pytest.raises(NotAuthenticated) as caught:
            bench.policy.authenticate(caller.token, builders.NOW)
        fault = caught.value
        asked = Sign(caller, "llmops", builders.ask()) if direct else Unauthenticated(caller, "llmops", fault)
        reply = bench.ask(asked)[0]
        entry = bench.store.entries[-1]
        seen.append((type(reply), reply.code, reply.text, reply.hint, entry.kind, entry.actor, entry.body))
    assert seen[0] == seen[1]


def test_audit_a1_the_body_of_a_known_caller_is_decoded() -> None:
    header = {"op": "sign", "role": "llmops", "token": "t", "address": None, "request_id": "r-1"}
    with pytest.raises(AssertionError, match="looked at the body"):
        read_command(header, Untouchable(b"{}"), lambda _caller: None)


# --- what is logged --------------------------------------------------------------------------------------------------

SECRET: Final = b"sgn_TheTokenInTheWrongPlace"
MALFORMED: dict[str, bytes] = {
    "no version": b"POST /api/sign/@ 2\r\n\r\n",
    "no version in Vault's shape": b"POST /v1/ssh/sign/@ 2\r\n\r\n",
    "no version after a blank": b"POST /api/sign/@ \r\n\r\n",
    "half a version": b"POST /api/sign/@ HTTP/1.\r\n\r\n",
    "another version": b"POST /api/sign/@ HTTP/9.9\r\n\r\n",
    "no version elsewhere": b"GET /@ 2\r\n\r\n",
    "no path": b"GET\r\n\r\n@\r\n\r\n",
    "no method": b"\xff@ / HTTP/1.1\r\n\r\n",
    "TLS": b"\x16\x03\x01@\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM@\r\n\r\n",
    "a bad name": b"POST /api/sign/@ HTTP/1.1\r\nA @: c\r\n\r\n",
    "no name": b"POST /api/sign/@ HTTP/1.1\r\n: @\r\n\r\n",
    "no colon": b"POST /api/sign/x HTTP/1.1\r\n@\r\n\r\n",
    "a bad value": b"POST /api/sign/x HTTP/1.1\r\nA: \x01@\r\n\r\n",
    "two hosts": b"POST /api/sign/@ HTTP/1.1\r\nHost: @\r\nHost: b\r\n\r\n",
    "an expectation": b"POST /api/sign/@ HTTP/1.1\r\nExpect: @\r\n\r\n",
    "a folded line": b"POST /api/sign/@ HTTP/1.1\r\nA: b\r\n @\r\n\r\n",
    "a long path": b"GET /" + b"@" * 400 + b" HTTP/1.1\r\n\r\n",
    "many fields": b"GET /@ HTTP/1.1\r\n" + b"A: @\r\n" * 80 + b"\r\n",
    "a long field": b"GET /@ HTTP/1.1\r\nA: " + b"@" * 800 + b"\r\n\r\n",
    "a bad target": b"POST http://[@/api HTTP/1.1\r\n\r\n",
    "an odd target": b"POST //[@ HTTP/1.1\r\n\r\n",
    "an asterisk": b"OPTIONS * HTTP/1.1\r\nA: @\r\n\r\n",
    "bytes that are not ASCII": b"GET /@\xff HTTP/1.1\r\n\r\n",
    "a control character in the namespace": b"GET /v1/@ HTTP/1.1\r\nX-Vault-Namespace: @\x01\r\n\r\n",
    "a namespace in Latin 1": b"GET /v1/@ HTTP/1.1\r\nX-Vault-Namespace: @\xe9\r\n\r\n",
    "a redirect": b"GET /v1//@\xe9 HTTP/1.1\r\n\r\n",
    "a redirect with a line end": b"GET /v1//@%0d%0aX:y HTTP/1.1\r\n\r\n",
    "a host that is none": b"GET /v1/@ HTTP/1.1\r\nHost: @ []\r\n\r\n",
    "a host that is none, native": b"GET /api/@ HTTP/1.1\r\nHost: @ []\r\n\r\n",
    "a zero byte": b"GET /api/@%00 HTTP/1.1\r\n\r\n",
    "a path that is not UTF-8": b"GET /api/certificates/@%ff HTTP/1.1\r\n\r\n",
    "a query that is not UTF-8": b"GET /api/certificates?@=%ff&%ff=@ HTTP/1.1\r\n\r\n",
    "a length that is none": b"POST /api/sign/@ HTTP/1.1\r\nContent-Length: @\r\n\r\n",
    "two lengths": b"POST /api/sign/@ HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n@",
    "another coding": b"POST /api/sign/@ HTTP/1.1\r\nTransfer-Encoding: @\r\n\r\n",
    "a bad chunk": b"POST /api/sign/@ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n@\r\n",
    "chunks without HTTP/1.1": b"POST /api/sign/@ 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
}


MALFORMED = {
    name: data if b"\nHost" in data else data.replace(b" HTTP/1.1\r\n", b" HTTP/1.1\r\nHost: h\r\n", 1)
    for name, data in MALFORMED.items()
}


class _Edge:
    """An edge without sockets, whose keeper is not there; what it logs is in `caplog`."""

    def __init__(self) -> None:
        self.api = _no_keeper()

    def send(self, data: bytes) -> bytes:
        """The answer to those bytes on a new connection."""
        self.api.admission = Admission()
        return exchange(self.api, [data], self.api.lines)[0]


@pytest.fixture
def edge(caplog: pytest.LogCaptureFixture) -> Iterator[_Edge]:
    with caplog.at_level(logging.INFO):  # the service runs at WARNING
        made = _Edge()
        yield made
        made.api._pool.shutdown()


@pytest.mark.parametrize("name", MALFORMED)
def test_audit_b1_a_malformed_request_is_answered_and_leaves_no_stack_and_none_of_its_bytes(
    name: str, edge: _Edge, caplog: pytest.LogCaptureFixture
) -> None:
    answer = edge.send(MALFORMED[name].replace(b"@", SECRET))
    assert answer.startswith(b"HTTP/1."), "no answer"
    assert b" 500 " not in answer.partition(b"\r\n")[0]
    assert "Traceback" not in caplog.text
    assert SECRET.decode() not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]


def test_audit_b1_a_request_line_without_a_version_is_a_problem(edge: _Edge) -> None:
    for line in (b"POST /api/sign/x 2", b"GET /healthz 2"):
        head, _, body = edge.send(line + b"\r\n\r\n").partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert json.loads(body)["code"] == "request_malformed"


def test_audit_b1_many_malformed_requests_are_a_few_lines(edge: _Edge, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(200):
        edge.send(MALFORMED["no version"])
    assert len([record for record in caplog.records if record.levelno >= logging.INFO]) == 1


@pytest.mark.parametrize("raised", [KeyError("sgn_inner"), OSError(5, "sgn_inner")])
def test_audit_b1_an_internal_error_is_one_stack_a_minute(
    raised: Exception, edge: _Edge, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise raised

    monkeypatch.setattr(edge.api, "_answer", broken)
    for _ in range(100):
        assert edge.send(b"GET /sgn_path HTTP/1.1\r\nHost: h\r\nA: sgn_field\r\n\r\n").startswith(b"HTTP/1.1 500 ")
    assert caplog.text.count("Traceback") == 1
    assert "sgn_path" not in caplog.text
    assert "sgn_field" not in caplog.text


def test_audit_b1_a_limited_log_counts_what_it_does_not_write(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    lines = LogLimit(logging.getLogger("test.limit"), lambda: now[0])
    for _ in range(5):
        lines.warn("odd", "an odd request")
        lines.warn("other", "another request")
    assert [record.getMessage() for record in caplog.records] == ["an odd request", "another request"]
    now[0] = WINDOW - 1
    lines.flush()
    assert len(caplog.records) == 2
    now[0] = WINDOW
    lines.flush()
    lines.flush()
    counts = [record.getMessage() for record in caplog.records[2:]]
    assert counts == ["4 more in a minute: odd", "4 more in a minute: other"]
    lines.warn("odd", "an odd request")
    assert caplog.records[-1].getMessage() == "an odd request"


# --- addresses that old clients make ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, status, location",
    [
        (b"//v1/sys/health", b"404", None),
        (b"//v1/ssh/roles?list=true", b"404", None),
        (b"///", b"404", None),
        (b"/v1//sys/health", b"307", b"/v1/sys/health"),
        (b"/v1/ssh//roles/x?a=b", b"307", b"/v1/ssh/roles/x?a=b"),
        (b"/v1/sys//", b"307", b"/v1/sys/"),
    ],
)
def test_audit_f6_doubled_slashes_are_answered_as_openbao_does(
    target: bytes, status: bytes, location: bytes | None, edge: _Edge
) -> None:
    answer = edge.send(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    head = answer.partition(b"\r\n\r\n")[0]
    assert head.split()[1] == status
    locations = [line.partition(b": ")[2] for line in head.split(b"\r\n") if line.lower().startswith(b"location:")]
    assert locations == ([] if location is None else [location])


def test_a_stranger_for_whom_there_is_no_room_is_told_when_to_retry_and_its_connection_ends(
    edge: _Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> None:
        raise busy()

    for path, code in ((b"/api/certificates", b"edge_busy"), (b"/v1/ssh/sign/x", b"edge_busy")):
        monkeypatch.setattr(Admission, "enter", full)
        head, _, body = edge.send(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n").partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 429 ")
        assert {b"retry-after: 1", b"connection: close"} <= set(head.lower().split(b"\r\n"))
        assert code in body
        assert json.loads(body)["errors"]


def test_what_the_edge_answers_below_the_console_has_the_consoles_headers(
    edge: _Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> None:
        raise busy()

    monkeypatch.setattr(Admission, "enter", full)
    head = edge.send(b"GET /console HTTP/1.1\r\nHost: x\r\n\r\n").partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
    for name, value in HEADERS:
        assert head.count(f"{name}: {value}".lower().encode()) == 1
        assert len([line for line in head if line.startswith(f"{name}:".lower().encode())]) == 1
