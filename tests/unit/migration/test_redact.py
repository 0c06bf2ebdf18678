"""No secret in what is written down: what looks like one, and the values that a caller holds, are taken out."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.migration.evidence.redact import REMOVED, SHORTEST, Guard
from tests.parts.marked_secrets import KEY, SECRETS


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_what_looks_like_a_secret_is_taken_out(secret: str) -> None:
    found = Guard().clean(f'before "{secret}" after')
    assert secret not in found
    assert "MARKER" not in found.upper()
    assert found.startswith('before "[removed]')


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_it_is_taken_out_of_every_place_of_a_value(secret: str) -> None:
    value = {"a": [secret, {"b": (f"x {secret} y",)}], secret: Path("/run") / secret.replace("/", "-")}
    assert "MARKER" not in json.dumps(Guard().clean_value(value)).upper()


@pytest.mark.parametrize(
    "line",
    ["X-Vault-Token: root1", '"X-Vault-Token": "root1"', "VAULT_TOKEN=root1", "Authorization: Bearer root1",
     "BAO_TOKEN='root1'"],
)  # fmt: skip
def test_what_stands_behind_a_name_of_secrets_is_taken_out_and_the_name_stays(line: str) -> None:
    assert Guard().clean(line) == line.replace("root1", REMOVED)


def test_a_field_whose_name_says_secret_is_taken_out_of_json() -> None:
    cleaned = Guard().clean_value({"auth": {"client_token": "root1", "accessor": "abc"}, "password": ""})
    assert cleaned == {"auth": {"client_token": REMOVED, "accessor": "abc"}, "password": ""}


SHARE = "0a1b2c3d4e"


@pytest.mark.parametrize(
    "name",
    [
        "unseal_keys_b64", "unseal_keys_hex", "unseal_keys", "recovery_keys_b64", "recovery_keys_base64", "keys_base64",
        "recovery_keys_hex", "root_token", "access_token", "accessToken", "secretValue", "clientSecret", "token",
        "wrapping_token", "tls_private_key", "privateKey", "API-Key", "db_password", "passwd", "secret_key",
    ],
)  # fmt: skip
def test_audit_names_of_secrets_are_known_in_every_spelling(name: str) -> None:
    assert Guard().clean_value({"data": {name: [SHARE]}}) == {"data": {name: REMOVED}}
    assert Guard().clean_value({name: SHARE}) == {name: REMOVED}


@pytest.mark.parametrize(
    "name",
    ["token_file", "token_policies", "token_ttl", "key_type", "private_key_file", "keys", "public_key"],
)
def test_names_that_only_mention_a_secret_keep_their_value(name: str) -> None:
    assert Guard().clean_value({name: "value of it"}) == {name: "value of it"}


def test_audit_the_shares_that_vault_prints_when_it_is_made_are_taken_out() -> None:
    made = {"keys": [SHARE], "keys_base64": [SHARE], "root_token": "root1", "shares": 1}
    assert SHARE not in json.dumps(Guard().clean_value(made))
    assert SHARE not in Guard().clean(json.dumps({"unseal_keys_b64": [SHARE, SHARE], "x": 1}, indent=2))
    assert Guard().clean(f"Unseal Key 1: {SHARE}\nRecovery Key 12: {SHARE}\n") == (
        f"Unseal Key 1: {REMOVED}\nRecovery Key 12: {REMOVED}\n"
    )


def test_lines_of_a_private_key_one_by_one_are_taken_out_up_to_its_end() -> None:
    lines = ["before", *KEY.splitlines(), "after"]
    assert Guard().clean_value(lines) == ["before", *[REMOVED] * 4, "after"]
    assert Guard().clean_value(lines[:3]) == ["before", REMOVED, REMOVED]


@pytest.mark.parametrize(
    "innocent",
    [
        "sha256:" + "4f" * 32,
        "SHA256:uT1kLocalLocalLocalLocalLocalLocalLocalLoca",
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFjyRzHvFvrOGGlNLZqdTVpZ0y9e",
        "-----BEGIN PUBLIC KEY-----\nMCow\n-----END PUBLIC KEY-----",
        "2026-11-22T14-05-02Z-cutover",
        "podman-compose -p safe-session -f /opt/signer/overlays/safe-session.yaml up -d",
        "tokens.token_digest and hosts.example",
        "m04-vault-runtime-cutover-approved",
    ],
)
def test_what_is_no_secret_stays(innocent: str) -> None:
    assert Guard().clean(innocent) == innocent


FORMS = {
    "as it is": lambda value: value,
    "in JSON": lambda value: json.dumps({"x": value}),
    "in JSON with its letters": lambda value: json.dumps({"x": value}, ensure_ascii=False),
    "in an address": lambda value: f"http://h/?t={quote(value, safe='')}",
    "in base64": lambda value: base64.b64encode(value.encode()).decode(),
    "in a header's base64": lambda value: base64.urlsafe_b64encode(value.encode()).decode(),
    "in hex": lambda value: value.encode().hex(),
    "as Python shows it": repr,
}


@pytest.mark.parametrize("form", FORMS)
@given(value=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Zs", "Zl", "Zp", "Cc"]), min_size=8))
def test_a_registered_value_is_taken_out_in_every_form(form: str, value: str) -> None:
    guard = Guard()
    assert guard.never(value)
    shown = FORMS[form](value)
    assert REMOVED in guard.clean(shown)
    assert value not in guard.clean(shown) or value in REMOVED


def test_each_line_of_a_registered_value_is_taken_out() -> None:
    guard = Guard()
    guard.never("first line of the secret\nsecond line of the secret\n")
    assert guard.clean("log: second line of the secret") == f"log: {REMOVED}"


def test_a_value_that_is_too_short_is_not_registered_as_it_would_mutilate_all() -> None:
    guard = Guard()
    assert not guard.never("root\n")
    assert not guard.never("x" * (SHORTEST - 1))
    assert guard.clean("root:root") == "root:root"


def test_a_registered_number_is_taken_out_of_json() -> None:
    guard = Guard()
    guard.never("4711471147114711")
    assert guard.clean_value({"pin": 4711471147114711, "n": 4711}) == {"pin": REMOVED, "n": 4711}


def test_what_json_cannot_hold_is_told_by_its_type_only() -> None:
    class Holder:
        def __str__(self) -> str:
            return "a secret of a form that nobody knows"

    deep: list[object] = []
    deep.append(deep)
    cleaned = Guard().clean_value({"bytes": b"secret", "object": Holder(), "nan": float("inf"), "deep": deep})
    assert "secret" not in json.dumps(cleaned)
    assert re.search(r"\[a bytes, not shown\]", json.dumps(cleaned))


def test_the_guard_itself_shows_nothing() -> None:
    guard = Guard()
    guard.never("MARKERMARKER")
    assert "MARKER" not in repr(guard)
