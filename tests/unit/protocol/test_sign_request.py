"""Bodies of sign requests, read. What OpenBao says to the same bodies is in tests/system/test_parity_*.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from signer.errors import BadRequest
from signer.model import SignRequest
from signer.protocol.go_syntax import MAX_DEPTH, BadDuration, has_too_many_strings, is_too_deep, parse_go_duration
from signer.protocol.sign_request import (
    MAX_BODY,
    MAX_TTL_SECONDS,
    Number,
    decode_any_body,
    decode_body,
    is_form,
    read_native_sign,
    read_vault_sign,
    vault_sign_warnings,
)

FORM = "application/x-www-form-urlencoded"
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
BROKEN = st.text(alphabet='{}[]:,"\\ \n01.eE-+truefalsn\u00e9\x00u') | st.text()


def _vault(**fields: Any) -> SignRequest:
    return read_vault_sign("llmops", decode_body(json.dumps(fields).encode()))


# --- JSON ------------------------------------------------------------------------------------------------------------

TEXTS = st.sampled_from(
    ["public_key", "ttl", "15m", "\\ud83d\\ude00", "\\ud800", "\\n", "\ud800", "\x7f", "é", "", '"']
)
SHALLOW = st.dictionaries(TEXTS, TEXTS | st.none() | st.booleans() | st.dictionaries(TEXTS, TEXTS | st.integers()))
EDITS = st.sampled_from(
    [b"{", b"}", b'"', b",", b":", b" ", b"\n", b"\x0b", b"\xff", b"\x00", b"1", b"{}", b"null", b"x"]
)


@given(SHALLOW, st.booleans(), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2), EDITS), max_size=2))
@example({}, True, [(0, 0, b"\xef\xbb\xbf")])
@example({"ttl": "1m"}, True, [(13, 0, b"{}")])
@example({"ttl": "1m"}, True, [(1, 0, b'"ttl":"2m",')])
def test_a_plain_body_is_read_as_any_other(
    fields: dict[str, object], ascii_only: bool, edits: list[tuple[int, int, bytes]]
) -> None:
    body = json.dumps(fields, ensure_ascii=ascii_only).replace("\\\\u", "\\u").encode(errors="surrogatepass")
    for at, removed, added in edits:
        body = body[:at] + added + body[at + removed :]
    assert shown(decode_body, body) == shown(decode_any_body, body)


def shown(read: Callable[[bytes], dict[str, Any]], body: bytes) -> str:
    """What was read, with its types, or how it was refused."""
    try:
        return repr([(name, type(value), value) for name, value in sorted(read(body).items())])
    except BadRequest as refused:
        return f"{refused.code} {refused.facts}"


@pytest.mark.parametrize("count", [999, 1000, 1001])
def test_a_plain_body_has_no_more_strings_than_any_other(count: int) -> None:
    body = ("{" + ",".join(f'"{number}":null' for number in range(count)) + "}").encode()
    if count > 1000:
        with pytest.raises(BadRequest, match="maximum number of strings"):
            decode_body(body)
    else:
        assert len(decode_body(body)) == count


@given(st.dictionaries(st.text(), PLAIN))
def test_an_object_is_read_as_it_is_written(value: dict[str, Any]) -> None:
    read = decode_body(json.dumps(value).encode())
    assert list(read) == list(json.loads(json.dumps(value)))


@given(st.binary() | BROKEN.map(lambda text: text.encode("utf-8", "surrogatepass")), st.sampled_from(["", FORM, "x"]))
@example(b"[" * 60_000, "")
@example(b'{"a":' * 12_000, "")
@example(b'"' * 60_000, "")
@example(b"1 " * 30_000, "")
@example(b"9" * 60_000, "")
@example(b"1e999999999", "")
def test_no_body_raises_anything_but_a_bad_request(body: bytes, content_type: str) -> None:
    for read in (read_vault_sign, read_native_sign):
        try:
            fields = decode_body(body, content_type)
            told = "".join(vault_sign_warnings(fields)) + repr(read("llmops", fields))
        except BadRequest as refusal:
            told = f"{refusal.text} {refusal.facts.get('vault')}"
        assert told.encode().decode() == told


CUT_OFF = ("[", "[1", "[1,", " [1 , ", "{", '{"a"', '{"a" ', '{"a":', '{"a":1', '{"a":1,', '{"a":[{}', "{}{}[")
CUT_WITHIN_A_TOKEN = ('"', '"a', '{"a', '{"a":"b', "[tru", "nul", "[-", "-", "[1.", "1e", '["\\', '["\\u12')


@pytest.mark.parametrize("rest", CUT_OFF)
def test_what_follows_the_first_value_may_end_between_two_tokens(rest: str) -> None:
    assert decode_body(f'{{"ttl":"1m"}}{rest}'.encode()) == {"ttl": "1m"}
    with pytest.raises(BadRequest, match="is not valid JSON"):
        decode_body(rest.removeprefix("{}{}").encode())


@pytest.mark.parametrize("rest", [*CUT_WITHIN_A_TOKEN, "x", ",", "]", "[}", "[1,]", '{"a":1,}', "NaN", "1e400"])
def test_what_follows_the_first_value_is_json(rest: str) -> None:
    with pytest.raises(BadRequest, match="is not valid JSON"):
        decode_body(f"{{}}{rest}".encode())


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}")])
def test_a_body_nests_so_deep_and_no_deeper(opening: str, closing: str) -> None:
    def nested(levels: int) -> str:
        return opening * levels + '"[{\\"[["' + closing * levels

    assert not is_too_deep(nested(MAX_DEPTH) + nested(MAX_DEPTH))
    assert is_too_deep(nested(MAX_DEPTH + 1))
    with pytest.raises(BadRequest, match="exceeded max depth"):
        decode_body(nested(MAX_DEPTH + 1).encode())


def test_a_body_over_the_limit_is_refused_unread() -> None:
    assert decode_body(b" " * MAX_BODY) == {}
    with pytest.raises(BadRequest) as refusal:
        decode_body(b" " * (MAX_BODY + 1))
    assert refusal.value.code == "body_too_large"


@pytest.mark.parametrize("strings", [999, 1000, 1001])
def test_a_thousand_strings_are_read_and_no_more(strings: int) -> None:
    for word in ('"\\""', '"\\\\"', '"\\\\\\""', '"\\u0022"', '""'):
        text = "[" + ",".join([word] * strings) + "]"
        assert has_too_many_strings(text) == (strings > 1000)


def test_the_last_of_two_equal_names_counts() -> None:
    assert decode_body(b'{"ttl":"1m","ttl":"2m"}') == {"ttl": "2m"}


@pytest.mark.parametrize("body", [b"", b" \n", b"null", b"{}", b"{} {}", b"{}[", b"null 1"])
def test_nothing_is_an_empty_object(body: bytes) -> None:
    assert decode_body(body) == {}


@pytest.mark.parametrize(
    "content_type, known",
    [
        (FORM, True), (FORM.upper(), True), (f" {FORM}\t", True), (f"{FORM};", True), (f"{FORM} ; ", True),
        (f'{FORM}; a="b;c" ; d=e;', True), (f"{FORM};a=b;;", False), (f"{FORM};bad", False), (f"{FORM};a=", False),
        (f'{FORM};a="b', False), (f"{FORM};a =b", False), (f"{FORM}x", False), (f"{FORM}, text/plain", False),
        ("", False), (";", False), ("application/json", False),
    ],
)  # fmt: skip
def test_a_content_type_is_that_of_a_form(content_type: str, known: bool) -> None:
    assert is_form(content_type) == known


def test_a_form_is_a_form_by_type_and_look() -> None:
    assert decode_body(b"a=1&b=%31+x&a=2", FORM) == {"a": "1,2", "b": "1 x"}
    assert decode_body(b'{"a":"1"}', FORM) == {"a": "1"}
    with pytest.raises(BadRequest):
        decode_body(b"a=1", "application/json")


# --- Vault's fields --------------------------------------------------------------------------------------------------


def test_nothing_said_is_nothing_asked() -> None:
    assert _vault() == SignRequest(role="llmops", public_key="")


def test_what_hvac_always_sends_is_nothing_asked() -> None:
    asked = _vault(
        public_key="k", ttl="", valid_principals="", key_id="", cert_type="user", critical_options=None, extensions=None
    )
    assert asked == SignRequest(role="llmops", public_key="k")


def test_every_field_is_coerced_as_vault_does() -> None:
    asked = _vault(
        public_key="k",
        ttl=90,
        valid_principals=" a ,b,, c",
        key_id=True,
        cert_type=5,
        critical_options=[{"x": 1.50}, [{"y": None}]],
        extensions={"z": {"b": 2, "a": [True, None]}},
        reason="because",
    )
    assert asked == SignRequest(
        role="llmops",
        public_key="k",
        principals=("a", "b", "c"),
        ttl=90,
        key_id="1",
        cert_type="5",
        critical_options=(("x", "1.5"), ("y", "<nil>")),
        extensions=(("z", "map[a:[true <nil>] b:2]"),),
        reason="because",
    )


def test_a_principal_that_is_blank_is_none() -> None:
    assert _vault(valid_principals=" , ").principals == ()
    assert _vault(valid_principals="\x1fa").principals == ("\x1fa",)


def test_a_lone_surrogate_is_the_replacement_character() -> None:
    assert decode_body(b'{"key_id":"\\ud800\\ud83d\\ude00\xff"}')["key_id"]
    assert read_vault_sign("x", decode_body(b'{"key_id":"\\ud800\\ud83d\\ude00\xff"}')).key_id == "\ufffd😀\ufffd"


@pytest.mark.parametrize("field", ["extensions", "critical_options"])
def test_a_map_nested_too_deep_is_refused(field: str) -> None:
    def lists(levels: int) -> object:
        return {} if levels == 0 else [lists(levels - 1)]

    _vault(**{field: lists(32)})
    with pytest.raises(BadRequest, match="exceeded max depth"):
        _vault(**{field: lists(40)})
    with pytest.raises(BadRequest, match="exceeded max depth"):
        _vault(**{field: {"x": lists(40)}})


def test_warnings_name_what_nobody_reads_in_order() -> None:
    assert vault_sign_warnings({"public_key": "", "ttl": "", "reason": ""}) == []
    assert vault_sign_warnings({"b": 1, "a": 2, "role": 3}) == [
        "Endpoint ignored these unrecognized parameters: [a b]",
        "Endpoint replaced the value of these parameters with the values captured from the endpoint's path: [role]",
    ]


# --- durations -------------------------------------------------------------------------------------------------------

UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}


@given(st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(sorted(UNITS))), min_size=1, max_size=5))
def test_a_duration_is_the_sum_of_its_parts(parts: list[tuple[int, str]]) -> None:
    text = "".join(f"{number}{unit}" for number, unit in parts)
    nanoseconds = sum(number * UNITS[unit] for number, unit in parts)
    if nanoseconds < 2**63:
        assert parse_go_duration(text) == nanoseconds // 10**9
    else:
        with pytest.raises(BadDuration):
            parse_go_duration(text)


@given(st.text(alphabet="0123456789.+-smhdnuµe ") | st.text())
@example("9" * 5000)
@example("0" * 5000 + "1s")
@example("9" * 5000 + "d")
def test_a_duration_is_read_or_refused_and_never_negative(text: str) -> None:
    try:
        assert parse_go_duration(text) >= 0
    except BadDuration as fault:
        str(fault).encode()


@pytest.mark.parametrize("text", ["-1", "-1s", "-5m", "-1d", "-1.5s"])
def test_a_negative_duration_is_refused(text: str) -> None:
    with pytest.raises(BadDuration, match="must not be negative"):
        parse_go_duration(text)


@pytest.mark.parametrize("text", ["2562047h", "9223372036s", "100000d"])
def test_a_long_duration_is_cut_to_what_a_certificate_could_ever_live(text: str) -> None:
    assert _vault(ttl=text).ttl == MAX_TTL_SECONDS


# --- our own body ----------------------------------------------------------------------------------------------------


def test_the_native_body_is_strict() -> None:
    body = b'{"public_key":"k","principals":["a"],"ttl":"15m","extensions":["permit-pty"],"reason":"r"}'
    assert read_native_sign("llmops", decode_body(body)) == SignRequest(
        role="llmops",
        public_key="k",
        principals=("a",),
        ttl=900,
        extensions=(("permit-pty", ""),),
        reason="r",
    )


@pytest.mark.parametrize(
    "body",
    [
        b'{"unknown":1}',
        b'{"principals":"a"}',
        b'{"principals":[1]}',
        b'{"ttl":true}',
        b'{"ttl":1.5}',
        b'{"ttl":"abc"}',
        b'{"public_key":5}',
        b'{"extensions":{"permit-pty":""}}',
        b'{"critical_options":{"a":1}}',
    ],
)
def test_the_native_body_coerces_nothing(body: bytes) -> None:
    with pytest.raises(BadRequest) as refusal:
        read_native_sign("llmops", decode_body(body))
    assert refusal.value.code == "field_malformed"


def test_a_warning_about_unknown_fields_is_short_whatever_their_names() -> None:
    fields = dict.fromkeys(["\x01" * 60_000, *(f"n{number}" for number in range(500))], "")
    (warning,) = vault_sign_warnings(fields)
    assert len(warning) < 8_192


def test_a_number_of_vaults_shape_is_text_from_here_on() -> None:
    asked = read_vault_sign("r", {"key_id": Number("12"), "reason": Number("812"), "public_key": Number("7")})
    assert [(type(value), value) for value in (asked.key_id, asked.reason, asked.public_key)] == [
        (str, "12"),
        (str, "812"),
        (str, "7"),
    ]


TOKEN = "sgn_" + "0123456789abcdefghijABCDEFGHIJ0123456789abcdefghi"


@pytest.mark.parametrize(
    "field, vaults, natives",
    [
        ("key_id", f"me:{TOKEN}", f"me:{TOKEN}"),
        ("principals", f"llmops,{TOKEN}", ["llmops", TOKEN]),
        ("critical_options", {"force-command": f"login {TOKEN}"}, {"force-command": f"login {TOKEN}"}),
        ("extensions", {f"x-{TOKEN}": ""}, [f"x-{TOKEN}"]),
    ],
)
def test_audit_f1_a_token_in_a_field_of_the_certificate_is_refused(field: str, vaults: object, natives: object) -> None:
    named = "valid_principals" if field == "principals" else field
    for read, fields in ((read_vault_sign, {named: vaults}), (read_native_sign, {field: natives})):
        with pytest.raises(BadRequest) as caught:
            read("r", fields)
        assert caught.value.code == "token_in_request"
        assert TOKEN not in f"{caught.value.text} {caught.value.hint} {caught.value.facts}"
