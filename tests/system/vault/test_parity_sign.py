"""Sign requests: OpenBao and we answer alike, certificate and all, or refuse with the same sentence."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.parts.keys import KeyRing
from tests.parts.parity import FIVE, Case, Pair, seen, sign

TTL_GRANTED = (
    "60", 60, "60s", "1m", "29m59s", "1500ms", "1.9s", "0.25h", ".25h", "1800", 1800, "30m", "+60", "+60s", "00060",
    "1m0.5s", "0.0000001h1s", "1s1s1m", "1800000000000ns", "600000000us", "600000000µs", "600000000μs",
)  # fmt: skip
TTL_REFUSED: tuple[object, ...] = (
    0, "0", "0s", "500ms", "0d", "-0", "1d", "30m1s", 1801, "1801", "768h", 9223372036, "100000h",
    "9223372036854775807ns", -1, "-1", "-1s", "-1.5s", "-5m", "-1d", 60.0, 60.5, "60.0", "90.5", "1.5", "1w", "1y",
    " 60", "60 ", "1h30", "1 h", "1h 1m", "1h-30m", "h", ".", "1.h1", "1.5.5s", "1H", "2D", "1hh", "d", "-d", "1.5d",
    "1d12h", "abc", "0x10", "1_000", "1e3", "é", "\uff10", "\n60", "\x7f", '"', "\\", "99999999999", "9223372037",
    "106752d", "9999999999999999999", "99999999999999999999d", "2562048h", "9223372036854775808ns", True, False, [],
    ["60"], {},
)  # fmt: skip

WRONG_KINDS: tuple[object, ...] = (5, 5.5, True, False, [], ["a"], {}, {"a": 1})

PRINCIPALS = (
    "llmops", "llmops,deploy", "deploy,llmops", "llmops,llmops", " llmops ", ",llmops,,", "\tllmops\n",
    "\u00a0llmops", "\u2003llmops\u3000", "\x85llmops", "web-1.eu_x", "admin , deploy",
)  # fmt: skip
STRANGERS = (
    "root", "root,llmops", "zeus,admin,mallory", "*", "LLMOPS", "ll mops", "llmops;root", "{{identity.entity.name}}",
    "<b>&", "\u2028x", "é", "\ud800x", "x" * 300, "root\x00", "\x1fllmops", "llmops\nroot", "\x1b[31m", ".", "-",
)  # fmt: skip

MAPS: tuple[object, ...] = (
    None, {}, [], [{}], [None], [[]], [[None]], {"permit-pty": ""}, [{"permit-pty": ""}],
    [{"permit-pty": ""}, {"permit-pty": ""}], [[[{"permit-pty": ""}]]], "", "x", "{}", 5, 5.5, True, False, [1],
    ["a"], [True], [1.5], [{"a": 1}, 2], [[1]], [[{"a": 1}], ["x"]], [{"a": 1}, [{"b": 2}]], {"Permit-Pty": ""},
    {"zzz": "", "aaa": ""}, {"a b": ""}, {"<x>": "&"}, {"no-such@example.com": "1"}, {"\ud800": ""}, {"x" * 200: ""},
)  # fmt: skip

KEY_TEXTS = (
    "", " ", "\n", " @KEY@", "@KEY@\n", "\n@KEY@", "@KEY@ and more words", "ssh-ed25519", "ssh-ed25519 ", "AAAA",
    "ssh-ed25519 AAAA", "no base64!!", "abcd!", "a", "ab", "abc", "abcde", "ab=", "ab==", "ab=c", "a=", "=", "====",
    "abc=d", "ab==cd", "abcdé", "é", "hello", "hello world", "ssh-ed25519\tAAAA", 'command="ls" @KEY@', "ab\r\ncd!",
    "abc\n=", "ab\n==\n", "ab=\n=", "ab==\nx", "AAA AAA-", "AAAA_", "AB==CD==", "ABC=\n", "ABC=ABC=", "AB=A",
    "@cert-authority @KEY@", "-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n", "ssh-ed25519  AAAA", "\x00", "AAAA\x00",
    "\ud800", "1", "AAAAAAA=", "////", "/////w==",
)  # fmt: skip

# Two faults each; which of two fields of the wrong kind Vault tells is Go's random order of maps, so none of those.
ORDER: tuple[Case, ...] = (
    sign("field types before the role", ttl="abc", role="nope"),
    sign("the role before the key", public_key="x!", role="nope"),
    sign("a key before what it must be", public_key="x!", key_id="a"),
    sign("key type before key id", key_id="a", role="curves"),
    sign("key id before certificate type", key_id="a", cert_type="nope"),
    sign("certificate type before principals", cert_type="nope", valid_principals="root"),
    sign("principals before ttl", valid_principals="root", ttl="99h"),
    sign("ttl before critical options", ttl="99h", critical_options={"a": ""}),
    sign("critical options before extensions", critical_options={"a": ""}, extensions={"a": ""}),
    sign("not yours before field types", ttl="abc", role="others"),
)


def _named(prefix: str, values: tuple[Any, ...], field: str, role: str = "llmops") -> list[Case]:
    return [
        sign(f"{prefix} {number}: {str(value)[:40]!a}", {field: value}, role) for number, value in enumerate(values)
    ]


def _nested(levels: int, inner: object = "x") -> object:
    return inner if levels == 0 else [_nested(levels - 1, inner)]


PLAIN: tuple[Case, ...] = (
    sign("nothing but the key"),
    sign("no key", public_key=...),
    sign("no key, nothing", public_key=None),
    sign("default principals, two of them", role="many"),
    sign("no principals by default", role="nobody"),
    sign("no principals by default, asked", role="nobody", valid_principals="llmops"),
    sign("a role with every kind of character", role="a.b-c@d_1"),
    sign("a role of one letter", role="x"),
    sign("a role that does not exist", role="nope"),
    sign("a role in other letters", role="LLMOPS"),
    sign("a role of somebody else", role="others"),
    sign("a user certificate", cert_type="user"),
    sign("a host certificate", cert_type="host"),
    sign("cert_type in capitals", cert_type="USER"),
    sign("cert_type empty", cert_type=""),
    sign("cert_type null", cert_type=None),
    sign("cert_type both", cert_type="user,host"),
    sign("a key id, not allowed", key_id="me"),
    sign("a key id, allowed", key_id="me@host:1", role="keyid"),
    sign("a key id of 256 bytes", key_id="k" * 256, role="keyid"),
    sign("a key id that is a number", key_id=12, role="keyid"),
    sign("a key id that is true", key_id=True, role="keyid"),
    sign("no extensions by default", role="none"),
    sign("no extensions allowed", role="none", extensions={"permit-pty": ""}),
    sign("five extensions", role="five", extensions=dict.fromkeys(FIVE.split(","), "")),
    sign("five extensions, two asked", role="five", extensions={"permit-user-rc": "", "permit-pty": ""}),
    sign("five extensions, none asked", role="five"),
    sign("a default that is asked for", extensions={"permit-pty": ""}),
    sign("a forced command by default", role="forced"),
    sign("source addresses by default", role="fixed"),
    sign("a source address, allowed", role="options", critical_options={"source-address": "10.0.0.0/8"}),
    sign("two source addresses", role="options", critical_options={"source-address": "10.0.0.0/8,2001:db8::/32"}),
    sign("a command, allowed", role="options", critical_options={"force-command": "ls -l"}),
    sign("both, in a list", role="options", critical_options=[{"force-command": "ls"}, {"source-address": "10.0.0.1"}]),
    sign(
        "an option in a list, twice", role="options", critical_options=[{"force-command": "a"}, {"force-command": "b"}]
    ),
    sign("a command that is a number", role="options", critical_options={"force-command": 1.50}),
    sign("a command that is null", role="options", critical_options={"force-command": None}),
    sign("a command that is a map", role="options", critical_options={"force-command": {"b": 2, "a": [1, None, True]}}),
    sign("a command in thirty lists", role="options", critical_options={"force-command": _nested(30)}),
    sign("a map in thirty lists", extensions=_nested(30, {"permit-pty": ""})),
    sign("an option that is not allowed", role="options", critical_options={"verify-required": ""}),
    sign("one allowed, one not", role="options", critical_options={"force-command": "ls", "x": "y"}),
    sign("unknown field", foo=1),
    sign("unknown fields", zoo=1, bar=None, Foo=[1]),
    sign("unknown fields of many letters", {"a b": 1, "é": 2, "<x>": 3, "": 4, "\ud800": 5}),
    sign("the role again in the body", {"role": "x"}),
    sign("the role again and an unknown field", {"role": "x", "foo": 1}),
    sign("field names in capitals", {"TTL": "1m"}),
    sign("key name in capitals", {"public_key": ..., "PUBLIC_KEY": "@KEY@"}),
    Case("PUT signs like POST", "@/sign/llmops", "PUT", {"public_key": "@KEY@"}),
    Case("parameters in the query are ignored", "@/sign/llmops?ttl=99h&public_key=x", body={"public_key": "@KEY@"}),
    Case("a role with percent-encoding", "@/sign/llm%6fps", body={"public_key": "@KEY@"}),
)

CASES = (
    *PLAIN,
    *ORDER,
    *_named("ttl granted", TTL_GRANTED, "ttl"),
    *_named("ttl refused", TTL_REFUSED, "ttl"),
    *(
        case
        for field in ("public_key", "valid_principals", "cert_type", "key_id")
        for case in _named(f"{field} of another kind", WRONG_KINDS, field)
    ),
    *_named("principals", PRINCIPALS, "valid_principals", "many"),
    *_named("strangers", STRANGERS, "valid_principals", "many"),
    *_named("extensions", MAPS, "extensions"),
    *_named("critical options", MAPS, "critical_options"),
    *_named("key text", KEY_TEXTS, "public_key"),
)


def _check(pair: Pair, case: Case) -> None:
    theirs, ours = pair.both(case)
    assert seen(ours) == seen(theirs), f"\nsent   {case.body!r}\ntheirs {theirs.body!r}\nours   {ours.body!r}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_we_answer_as_openbao_does(pair: Pair, case: Case) -> None:
    _check(pair, case)


KINDS = ("ed25519", "ecdsa256", "ecdsa384", "ecdsa521", "rsa2048", "rsa3072", "rsa4096", "sk-ed25519", "sk-ecdsa256")
# Listed differences: test_difference_key_types_are_exact and test_difference_sizes_of_ecdsa_keys_are_named.
DIFFERENT = {
    "llmops": (),
    "keys": ("rsa4096", "sk-ed25519", "sk-ecdsa256", "ecdsa384", "ecdsa521"),
    "curves": ("ecdsa256", "ecdsa521", "sk-ecdsa256"),
}


@pytest.mark.parametrize(
    "kind, role",
    [(kind, role) for role, different in DIFFERENT.items() for kind in KINDS if kind not in different],
)
def test_keys_of_every_kind_are_certified_or_refused_alike(pair: Pair, keyring: KeyRing, kind: str, role: str) -> None:
    _check(pair, sign(f"{kind} for {role}", role=role, public_key=keyring(kind).public_line))


def _string(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


ED, RSA, EC, FIDO = b"ssh-ed25519", b"ssh-rsa", b"ecdsa-sha2-nistp256", b"sk-ssh-ed25519@openssh.com"
BLOBS = {
    "nothing": b"",
    "half a length": b"\0\0\0",
    "a length of four gigabytes": b"\xff\xff\xff\xff",
    "half a kind": b"\0\0\0\x0bssh",
    "an empty kind": _string(b""),
    "an unknown kind": _string(b"nope"),
    "an unknown kind with more": _string(b"nope") + _string(b"x"),
    "ed448": _string(b"ssh-ed448") + _string(b"x" * 57),
    "ed25519 without a key": _string(ED),
    "ed25519, 31 bytes": _string(ED) + _string(b"x" * 31),
    "ed25519, 33 bytes": _string(ED) + _string(b"x" * 33),
    "ed25519 and a byte": _string(ED) + _string(b"x" * 32) + b"z",
    "ed25519 with a cut key": _string(ED) + _string(b"x" * 32)[:-1],
    "rsa without anything": _string(RSA),
    "rsa without a modulus": _string(RSA) + _string(b"\3"),
    "rsa with an even exponent": _string(RSA) + _string(b"\2") + _string(b"\0" + b"\xff" * 256),
    "rsa with a huge exponent": _string(RSA) + _string(b"\1\0\0\0\0\1") + _string(b"\0" + b"\xff" * 256),
    "rsa and a byte": _string(RSA) + _string(b"\1\0\1") + _string(b"\0" + b"\xff" * 256) + b"z",
    "ecdsa without anything": _string(EC),
    "ecdsa with a point off the curve": _string(EC) + _string(b"nistp256") + _string(b"\4" + b"x" * 64),
    "ecdsa of another curve": _string(EC) + _string(b"nistp384") + _string(b"\4" + b"x" * 64),
    "ecdsa of no curve": _string(EC) + _string(b"nistp999") + _string(b"\4" + b"x" * 64),
    "ecdsa with a short point": _string(EC) + _string(b"nistp256") + _string(b"\4" + b"x" * 63),
    "ecdsa with no point": _string(EC) + _string(b"nistp256") + _string(b""),
    "fido and a byte": _string(FIDO) + _string(b"x" * 32) + _string(b"ssh:") + b"1",
    "fido of 31 bytes": _string(FIDO) + _string(b"x" * 31) + _string(b"ssh:"),
}


@pytest.mark.parametrize("name", BLOBS)
def test_a_malformed_key_is_refused_with_the_same_sentence(pair: Pair, name: str) -> None:
    encoded = base64.b64encode(BLOBS[name]).decode()
    _check(pair, sign(name, public_key=encoded))


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_key_that_lost_its_end_is_refused_with_the_same_sentence(pair: Pair, cut: int) -> None:
    _check(pair, sign(f"{cut} characters short", public_key=" ".join(pair.key.public_line.split()[:2])[:-cut]))


@pytest.mark.parametrize("character", ["!", "=", " ", "\n", "-", "é", "\x00"])
@pytest.mark.parametrize("place", [0, 1, 2, 3, 30, 67])
def test_a_character_that_does_not_belong_in_base64_is_found_at_the_same_byte(
    pair: Pair, character: str, place: int
) -> None:
    kind, encoded = pair.key.public_line.split()[:2]
    spoiled = encoded[:place] + character + encoded[place + 1 :]
    _check(pair, sign("spoiled", public_key=f"{kind} {spoiled}"))


def test_there_are_at_least_150_requests() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 150
