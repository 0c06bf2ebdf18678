"""Messages to the keeper come from whoever holds a socket: each is a command, or refused as `BadRequest`."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from signer.errors import BadRequest, BadSettings
from signer.model import MAX_HOST_PRINCIPALS, Caller, Filter
from signer.protocol.commands import (
    MAX_HEADER,
    MAX_PAGE,
    AddHostKeys,
    Command,
    Explain,
    Freeze,
    ListCertificates,
    ListFreezes,
    ListRoles,
    ShowCaller,
    ShowCertificate,
    ShowHead,
    ShowRole,
    Sign,
    Unfreeze,
    read_command,
    split_message,
)
from signer.protocol.sign_request import MAX_BODY, decode_body, read_native_sign, read_vault_sign, vault_sign_warnings
from signer.settings import SETTINGS, load_settings
from tests.parts import builders

HEADER = {"op": "head", "token": "t", "address": "192.0.2.7", "request_id": "r-1"}


def header(**changes: Any) -> dict[str, Any]:
    return {**HEADER, **changes}


def read_known(drawn: dict[str, Any], body: bytes) -> Command:
    """The command of a caller whose token is good."""
    return read_command(drawn, body, lambda _caller: None)


def code_of(changes: dict[str, Any], body: bytes = b"") -> str:
    with pytest.raises(BadRequest) as caught:
        read_known(header(**changes), body)
    return caught.value.code


def test_a_host_is_added_with_the_principals_that_its_body_gives() -> None:
    def read(**more: object) -> Command:
        return read_known(header(op="add_host_keys"), json.dumps({"name": "edge1", "keys": ["k"], **more}).encode())

    caller = Caller("t", "192.0.2.7", "r-1")
    without = AddHostKeys(caller, "edge1", (), ("k",), replace=False)
    assert read() == read(principals=None) == without
    assert read(principals=["ops", "dev"]) == msgspec.structs.replace(without, principals=("ops", "dev"))
    for wrong in ("ops", [1], [None], {"ops": True}):
        body = json.dumps({"name": "edge1", "keys": ["k"], "principals": wrong}).encode()
        assert code_of({"op": "add_host_keys"}, body) == "field_malformed"


def test_the_largest_list_of_principals_fits_into_a_message() -> None:
    names = ["\\" * 256] * MAX_HOST_PRINCIPALS
    body = json.dumps({"name": "edge1", "keys": ["k" * 4_000] * 4, "principals": names}).encode()
    assert len(body) < MAX_BODY
    command = read_known(header(op="add_host_keys"), body)
    assert isinstance(command, AddHostKeys)
    assert command.principals == tuple(names)


def test_each_operation_is_its_command() -> None:
    caller = Caller("t", "192.0.2.7", "r-1")
    for changes, command in (
        ({"op": "head"}, ShowHead(caller)),
        ({"op": "freezes"}, ListFreezes(caller)),
        ({"op": "roles"}, ListRoles(caller)),
        ({"op": "role", "role": "llmops"}, ShowRole(caller, "llmops")),
        ({"op": "whoami"}, ShowCaller(caller)),
        ({"op": "unfreeze", "scope": "all"}, Unfreeze(caller, "all")),
        ({"op": "certificate", "serial": 7}, ShowCertificate(caller, 7)),
        ({"op": "certificates"}, ListCertificates(caller, Filter(limit=50), active=False)),
    ):
        assert read_known(header(**changes), b"") == command


def test_a_freeze_is_read_from_its_body() -> None:
    asked = b'{"scope": "role:llmops", "reason": "drill"}'
    assert read_known(header(op="freeze"), asked) == Freeze(Caller("t", "192.0.2.7", "r-1"), "role:llmops", "drill")


@pytest.mark.parametrize(
    "body, field",
    [
        (b"{}", "scope"),
        (b'{"scope":"all"}', "reason"),
        (b'{"scope":5,"reason":"r"}', "scope"),
        (b'{"scope":{},"reason":"r"}', "scope"),
        (b'{"scope":"","reason":"r"}', "scope"),
        (b'{"scope":"a\\nb","reason":"r"}', "scope"),
        (b'{"scope":"all","reason":""}', "reason"),
        (b'{"scope":"all","reason":5}', "reason"),
        (b'{"scope":"all","reason":"' + b"r" * 501 + b'"}', "reason"),
        (b'{"scope":"all","reason":"r","extra":1}', "extra"),
        (b'{"scope":"' + b"x" * 257 + b'","reason":"r"}', "scope"),
        (b"[]", None),
        (b"{", None),
    ],
)
def test_a_bad_freeze_is_refused_with_its_field(body: bytes, field: str | None) -> None:
    with pytest.raises(BadRequest) as caught:
        read_known(header(op="freeze"), body)
    assert caught.value.code == ("json_malformed" if field is None else "field_malformed")
    assert field is None or f"field '{field}'" in caught.value.text


def test_audit_a_line_break_in_a_reason_is_named_as_the_callers_fault() -> None:
    for line in ("a\nb", "a\u2028b", "\x1b[2J"):
        with pytest.raises(BadRequest, match="field 'reason': must be one printable line") as caught:
            read_known(header(op="freeze"), json.dumps({"scope": "all", "reason": line}).encode())
        assert caught.value.code == "field_malformed"


def test_a_sign_request_carries_the_callers_body_in_either_shape() -> None:
    line = builders.public_line()
    native = read_known(header(op="sign", role="llmops"), json.dumps({"public_key": line, "ttl": "5m"}).encode())
    assert isinstance(native, Sign)
    assert native.request == builders.ask(ttl=300)
    fields = {"public_key": line, "valid_principals": "llmops,backup", "ttl": 300, "strange": 1}
    vault = read_known(header(op="sign", role="llmops", shape="vault"), json.dumps(fields).encode())
    assert isinstance(vault, Sign)
    assert vault.request == builders.ask(ttl=300, principals=("llmops", "backup"))
    assert vault.warnings == ("Endpoint ignored these unrecognized parameters: [strange]",)


def test_a_fault_in_a_field_is_kept_for_a_caller_who_is_known() -> None:
    command = read_known(header(op="sign", role="llmops"), b'{"ttl": []}')
    assert isinstance(command, Sign)
    assert isinstance(command.request, BadRequest)
    explain = read_known(header(op="explain", role="llmops"), b'{"colour": 1}')
    assert isinstance(explain, Explain)
    assert isinstance(explain.request, BadRequest)


@pytest.mark.parametrize(
    "changes",
    [
        {"op": "shutdown"},
        {"op": None},
        {"op": ["head"]},
        {"token": 1},
        {"token": ["t"]},
        {"request_id": None},
        {"request_id": ""},
        {"request_id": "a" * 65},
        {"request_id": "a\nb"},
        {"address": 7},
        {"address": "localhost"},
        {"address": "192.0.2.7/24"},
        {"address": "fe80::1%eth0"},
        {"address": ""},
        {"op": "sign"},
        {"op": "sign", "role": ""},
        {"op": "sign", "role": "a" * 257},
        {"op": "sign", "role": "a\x1b[2J"},
        {"op": "sign", "role": "\ud800"},
        {"op": "certificate"},
    ],
)
def test_a_message_that_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    assert code_of(changes) == "message_malformed"


@pytest.mark.parametrize(
    "changes",
    [
        {"op": "certificate", "serial": -1},
        {"op": "certificate", "serial": 2**64},
        {"op": "certificate", "serial": True},
        {"op": "certificate", "serial": "1"},
        {"op": "certificate", "serial": 1.0},
        {"op": "certificates", "limit": MAX_PAGE + 1},
        {"op": "certificates", "limit": -1},
        {"op": "certificates", "before": "x"},
    ],
)
def test_a_number_out_of_range_is_refused(changes: dict[str, Any]) -> None:
    assert code_of(changes) == "field_malformed"


def test_no_token_and_an_empty_one_are_the_same() -> None:
    for token in (None, ""):
        assert read_known(header(token=token), b"").caller.token is None


def test_the_token_does_not_show_in_the_text_of_a_command() -> None:
    token = "sgn_" + "a" * 49
    command = read_known(header(token=token), b"")
    assert command.caller.token == token
    assert token not in repr(command)


@pytest.mark.parametrize(
    "sent,read",
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:DB8:0::7", "2001:db8::7"),
        (None, None),
    ],
)
def test_an_address_has_one_form(sent: str | None, read: str | None) -> None:
    assert read_known(header(address=sent), b"").caller.address == read


def test_a_message_is_a_line_and_a_body() -> None:
    assert split_message(b'{"op":"x"}\n{"a":1}\nmore') == ({"op": "x"}, b'{"a":1}\nmore')
    assert split_message(b"{}") == ({}, b"")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(st.characters()), JSON, max_size=4),
    st.booleans(),
    st.integers(0, 80),
    st.binary(max_size=2),
)
@example({"a": 2**70, "b": 1e308, "c": -0.0, "d": float("inf"), "e": "\ud83d\ude00\ude00"}, True, 0, b"")
@example({}, True, 0, b"\xef\xbb\xbf")
def test_a_header_is_read_as_pythons_own_decoder_reads_it(
    header: dict[str, Any], ascii_only: bool, at: int, added: bytes
) -> None:
    line = json.dumps(header, ensure_ascii=ascii_only).encode(errors="surrogatepass").replace(b"\n", b"")
    line = line[:at] + added.replace(b"\n", b"") + line[at:]
    try:
        wanted = json.loads(line)
    except ValueError:
        wanted = None
    if not isinstance(wanted, dict):
        with pytest.raises(BadRequest):
            split_message(line + b"\nbody")
    else:
        assert repr(split_message(line + b"\nbody")) == repr((wanted, b"body"))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"1",
        b"null",
        b"{",
        b"\xff\xfe",
        b'"x"',
        b"{}" + b" " * MAX_HEADER,
        b"[" * 9_000,
        b'{"a":' + b"9" * 5_000 + b"}",
    ],
    ids=range(10),
)
def test_a_header_that_is_no_object_is_refused(line: bytes) -> None:
    with pytest.raises(BadRequest):
        split_message(line + b"\n{}")


@given(st.binary(max_size=300))
@example(b"\x00{\x00}\x00\n")
@example(b"{\x00}\x00")
def test_no_bytes_raise_anything_but_bad_request(message: bytes) -> None:
    try:
        read_known(*split_message(message))
    except BadRequest:
        return
    pytest.fail("bytes without a request id are no command")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_OPS = "sign explain freeze unfreeze certificates certificate head freezes roles role whoami"
_KEYS = """
    token address role scope reason serial limit before identity principal fingerprint active content_type
"""
HEADERS = st.fixed_dictionaries(
    {"op": st.sampled_from(_OPS.split()), "request_id": st.just("r-1") | VALUES},
    optional={**dict.fromkeys(_KEYS.split(), VALUES), "shape": st.just("vault") | VALUES},
)


@given(HEADERS, st.binary(max_size=200))
def test_no_header_raises_anything_but_bad_request(drawn: dict[str, Any], body: bytes) -> None:
    try:
        command = read_known(drawn, body)
    except BadRequest:
        return
    assert command.caller.request_id == drawn["request_id"]


_FIELDS = """
    public_key ttl valid_principals principals cert_type key_id critical_options extensions reason
"""
NAMES = st.sampled_from(_FIELDS.split())


@given(st.dictionaries(NAMES | st.text(max_size=5), VALUES, max_size=6))
def test_no_fields_raise_anything_but_bad_request(fields: dict[str, Any]) -> None:
    body = json.dumps(fields).encode()
    read = decode_body(body) if len(body) <= MAX_BODY else {}
    assert all(warning.isascii() or warning for warning in vault_sign_warnings(read))
    for reader in (read_vault_sign, read_native_sign):
        try:
            asked = reader("llmops", read)
        except BadRequest:
            continue
        assert asked.role == "llmops"
        asked.public_key.encode()
        (asked.reason or "").encode()


@given(st.binary(max_size=200), st.sampled_from(["", "application/json", "application/x-www-form-urlencoded", "x;y"]))
@example(b"{" * 100_000, "")
@example(b'{"a":' * 10_000, "")
@example(b'{"a": 1e999999}', "")
@example(b'{"a": NaN}', "")
@example(b"\xef\xbb\xbf{}", "")
def test_no_body_raises_anything_but_bad_request(body: bytes, content_type: str) -> None:
    try:
        fields = decode_body(body, content_type)
    except BadRequest:
        return
    assert isinstance(fields, dict)
    read_or_refused(fields)


@pytest.mark.parametrize("depth", range(100, 1_100, 50))
@pytest.mark.parametrize("field", ["critical_options", "extensions", "ttl", "public_key", "strange"])
def test_no_depth_raises_anything_but_bad_request(field: str, depth: int) -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        body = f'{{"{field}": {{"x": {opening * depth}1{closing * depth}}}}}'
        try:
            fields = decode_body(body.encode())
        except BadRequest:
            continue
        assert read_or_refused(fields) in (0, 1, 2)


def read_or_refused(fields: dict[str, Any]) -> int:
    """How many of the two shapes refuse; anything but `BadRequest` goes through."""
    refused = 0
    for reader in (read_vault_sign, read_native_sign):
        try:
            reader("llmops", fields)
        except BadRequest:
            refused += 1
    return refused


@given(st.dictionaries(st.sampled_from([name for name, *_ in SETTINGS] + ["SIGNER_X", "PATH"]), st.text(max_size=30)))
def test_no_environment_raises_anything_but_bad_settings(environ: dict[str, str]) -> None:
    try:
        settings = load_settings(environ)
    except BadSettings as refused:
        problems = refused.problems
    else:
        problems = ("none",)
        assert settings.mounts
    assert problems
