"""Bodies as such: JSON and its faults, forms, content types, limits. OpenBao and we say the same of each."""

from __future__ import annotations

from urllib.parse import quote, urlencode

import pytest

from tests.parts.parity import Pair, raw, seen

FORM = "application/x-www-form-urlencoded"
SIGN = '{"public_key":"@KEY@"'

# Each as it is sent; `@KEY@` becomes the user's public line.
JSON: tuple[str | bytes, ...] = (
    "", " ", "\r\n\t ", "null", " null ", "{}", " {} ", "[]", "[1]", "[{}]", "1", "1.5", "-1", "0", "true", "false",
    '"x"', '""', SIGN + "}", SIGN + "}\n", SIGN + "} {}", SIGN + "}[1]", SIGN + "} null", SIGN + "}x", SIGN + "}}",
    SIGN + "},", SIGN + ",}", SIGN, SIGN + ",", SIGN + ',"ttl"', SIGN + ',"ttl":', SIGN + ',"ttl":"1m"',
    SIGN + ' "ttl":"1m"}', SIGN + ',,"ttl":"1m"}', SIGN + ',"ttl":"1m","ttl":"99h"}',
    SIGN + ',"ttl":"99h","ttl":"1m"}', SIGN + ',"ttl":1e3}', SIGN + ',"ttl":1E2}', SIGN + ',"ttl":60.0}',
    SIGN + ',"ttl":-0}', SIGN + ',"ttl":0.6e2}', SIGN + ',"ttl":123456789012345678901234567890}',
    SIGN + ',"valid_principals":1e400}', SIGN + ',"valid_principals":-0.0}',
    SIGN + ',"valid_principals":"\\ud83d\\ude00"}', SIGN + ',"valid_principals":"\\ud800"}',
    SIGN + ',"valid_principals":"\\udc00\\ud800x"}', SIGN + ',"ttl":"\\u0031m"}',
    SIGN + ',"valid_principals":"a\\/b\\b\\f\\n\\r\\tz"}', SIGN + ',"valid_principals":"\x7f"}',
    SIGN + ',"tt\\u006c":"1m"}', "bad", "{bad", "{", "[", "[[", '{"a"', '{"a" ', '{"a":', '{"a":1', '{"a":1,',
    '{"a":1,}', '{"a":1,,}', '{"a":,1}', '{"a"::1}', '{"a",1}', '{"a" 1}', '{"a" "b"}', '{"a":1 "b":2}', '{"a":1 x}',
    '{"a":1}}', '{"a":1]', '{"a":]', '{"a":}', '{"a":[1', '{"a":[1,]}', '{"a":[1 2]}', '{"a":[1,2}', '{"a":[}',
    '{"a":{]}', '{"a":{"b":1]}', '{"a":[{"b":1]', '{"a":{} x}', '{"a":[] []}', '{"a":"b" "c"}', "{'a':1}", "{,}",
    "{:1}", "{1:2}", "{null:1}", "{[]:1}", "{{}:1}", "{tru:1}", "{]", "[}", "[,", "[,1]", "[1,", "[1,,2]", "[1}",
    "[1]}", '["x",}', "{}]", "{}}", "{},{}", ",{}", ":{}", ",", ":", "}", "]", "{}x", "null x", "{} {} x", "1 x",
    "1x", "01", '"a" x', "truefalse", '{"a":1}{"b":tru}', '{"a":tru}', '{"a":nul', '{"a":nulx}', '{"a":truex}',
    '{"a":True}', "nulL", "n", "tru", "truE", "fals", "tr\n", "-", "-x", "--1", "12e", "1.", "1.x", "1e+", '{"a":-}',
    '{"a":-x}', '{"a":01}', '{"a":1.}', '{"a":1.x}', '{"a":.5}', '{"a":1e}', '{"a":1e+}', '{"a":1E+}', '{"a":1ex}',
    '{"a":1x}', '{"a":+1}', '{"a":0x10}', '{"a":1_0}', '{"a":NaN}', '{"a":Infinity}', '{"a":-Infinity}', '"', 'x"',
    '"a', '{"a":"x', '{"a":"x\n"}', '{"a":"\t"}', '{"a":"\x01"}', '{"a":"\x1f"}', '{"\x01":1}', '{"a":"\\',
    '{"a":"\\"', '{"a":"\\q"}', '{"a":"\\x41"}', '{"a":"\\U0041"}', '{"a":"\\\'"}', '{"a":"\\`"}', '{"a":"`\\q"}',
    '{"a":"\\\n"}', '{"a":"\\é"}', '{"a":"\\\x01"}', '{"\\q":1}', '{"a":"\\u', '{"a":"\\u1', '{"a":"\\u12"}',
    '{"a":"\\u12g4"}', '{"a":"\\u00é1"}', '{"a":"\\u12é"}', '{"a":"\\u`"}', '{"a":"\\ud800\\u"}', '"\\ud83d', "\\",
    "'", "é", "{é", '{"a":é}', "🙂", '{"a":🙂}', "\u2028", "\ufeff{}", "\x00", "{}\x00", "\x7f", "\v{}", "\f{}",
    "\u00a0{}", '{"a"\u00a0:1}', '{"a":\u0080}', '{"a":\u200b}', '{"a":\U000e0001}', "/*x*/{}", '{"a":1//x\n}',
    "<html>", "public_key=x", "---\na: 1", "{\n\n\"a\" x", b"\xff", b"{\xff", b'{"\xff":1}', b'{"a":\xff}',
    b'{"a":\xe2\x82}', b'{"a":"\xe2\x82"}', b'{"a":\xed\xa0\x80}', b"\xc3", b"{}\xff", b'{"public_key":"\xff\xfe"}',
    b'{"public_key":"@KEY@","valid_principals":"\xe2\x82x"}', b'{"a":"\\\xff"}', b'{"a":"\\u\xff123"}',
    b'{"a":"\\u12\xc3\xa9"}', b"\xff\xfe{\x00}\x00", b'{"public_key":"@KEY@","\xff":1}',
)  # fmt: skip


def _many(count: int, item: str) -> str:
    return '{"a":[' + ",".join([item] * count) + "]}"


LARGE = {
    "50 lists": '{"a":' + "[" * 50 + "]" * 50 + "}",
    "50 objects": '{"a":' * 50 + "1" + "}" * 50,
    "400 lists": '{"a":' + "[" * 400 + "]" * 400 + "}",
    "400 open lists": "[" * 400,
    "10001 open lists": "[" * 10_001,
    "9000 open objects": '{"a":' * 9000,
    "999 strings and a name": _many(999, '"x"'),
    "1000 strings and a name": _many(1000, '"x"'),
    "1000 names": "{" + ",".join(f'"k{n}":1' for n in range(1000)) + "}",
    "1001 names": "{" + ",".join(f'"k{n}":1' for n in range(1001)) + "}",
    "1001 strings, then a fault": _many(1000, '"x"') + "x",
    "a fault, then 1001 strings": "x" + _many(1000, '"x"'),
    "1001 strings with escaped quotes": _many(1000, '"\\""'),
    "999 strings with escaped quotes": _many(999, '"\\"\\""'),
    "1001 strings in two values": _many(500, '"x"') + _many(500, '"x"'),
    "9000 numbers": _many(9000, "1"),
    "4000 objects without names": _many(4000, "{}"),
    "1200 objects with names": _many(1200, '{"b":1}'),
    "a string of 40 kB": '{"a":"' + "x" * 40_000 + '"}',
    "a number of 4000 digits": '{"a":' + "9" * 4000 + "}",
}

FIELD = urlencode({"public_key": "@KEY@"}, safe="@")
FORMS = (
    "", " ", "x", "=", "&&&", "null", "{}", "{bad", "[", SIGN + "}", " " + SIGN + "}", "\n" + SIGN + "}", "\t{",
    FIELD + "&ttl=1m", FIELD + "&ttl=abc", FIELD + "&ttl=1m&ttl=2m", FIELD + "&valid_principals=llmops",
    FIELD + "&valid_principals=root", FIELD + "&valid_principals=llmops&valid_principals=root",
    FIELD + "&extensions=x", FIELD + "&extensions=", FIELD + "&foo=1", FIELD + "&foo=1&foo=2", FIELD + "&ttl=%31m",
    FIELD + "&%74tl=99h", FIELD + "&cert_type=host", FIELD + "&valid_principals=a+b", FIELD + "&valid_principals=%ff",
    FIELD + "&valid_principals=" + quote("é"), "public_key", "public_key=", "public_key=%&b", "%zz", "a=%zz", "a=%",
    "a;b", FIELD + ";ttl=1m", "a=b=c", "role=x&" + FIELD,
)  # fmt: skip

CONTENT_TYPES = (
    "application/json", "application/json; charset=utf-8", "text/plain", "application/xml", "bad/", "x", "", FORM,
    FORM.upper(), FORM + "; charset=utf-8", FORM + ";charset=utf-8", FORM + " ; a=b", FORM + ";bad", FORM + ";",
    FORM + "x", "multipart/form-data; boundary=x", "application/octet-stream", FORM + ", application/json",
)  # fmt: skip


def _check(pair: Pair, name: str, body: str | bytes, content_type: str | None = None) -> None:
    theirs, ours = pair.both(raw(name, body, content_type))
    assert seen(ours) == seen(theirs), f"\nsent   {body[:200]!r}\ntheirs {theirs.body!r}\nours   {ours.body!r}"


@pytest.mark.parametrize("body", JSON, ids=ascii)
def test_json_is_read_or_refused_alike(pair: Pair, body: str | bytes) -> None:
    _check(pair, "json", body)


@pytest.mark.parametrize("name", LARGE)
def test_large_and_deep_json_is_read_or_refused_alike(pair: Pair, name: str) -> None:
    _check(pair, name, LARGE[name])


@pytest.mark.parametrize("body", FORMS, ids=ascii)
def test_forms_are_read_or_refused_alike(pair: Pair, body: str) -> None:
    _check(pair, "form", body, FORM)


@pytest.mark.parametrize("body", [SIGN + "}", FIELD], ids=["json", "form"])
@pytest.mark.parametrize("content_type", CONTENT_TYPES)
def test_the_content_type_tells_forms_and_nothing_else(pair: Pair, content_type: str, body: str) -> None:
    _check(pair, "content type", body, content_type)


def test_a_body_without_a_content_type_is_json(pair: Pair) -> None:
    _check(pair, "none", SIGN + "}")
