"""Everything below /v1/ without a keeper: what it is asked, and that no answer is ever a framework's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from signer.api.app import make_flask
from signer.api.vault import responses
from signer.errors import BadRequest, LedgerBroken, NotAuthenticated, NotFound, Refused, SignerError, Unavailable
from signer.protocol.client import KeeperClient
from signer.protocol.replies import CaKey, CallerDetails, Certificate, Extensions, Ready, Reply, RoleDetails, Roles
from signer.settings import load_settings

ROLE = RoleDetails(
    name="llmops",
    principals=["a", "b"],
    default_principals=["a"],
    default_ttl=900,
    max_ttl=1800,
    key_types=["ssh-rsa", "sk-ssh-ed25519@openssh.com"],
    rsa_min_bits=3072,
    extensions=Extensions(allowed=["permit-pty"], default=["permit-pty"], values={}),
    critical_options=["source-address"],
    force_command="ls",
    source_address=["10.0.0.0/8", "192.0.2.0/24"],
    verify_required=True,
    no_touch_required=True,
    allow_key_id=True,
    reason_required=False,
    backdate=30,
)
SETTINGS = replace(load_settings({}), mounts=("ssh", "team/ssh", "team"))


class Keeper(KeeperClient):
    """Answers from a table, and remembers what it was asked. An error in the table is raised."""

    def __init__(self, **answers: object) -> None:
        super().__init__(Path("/nowhere"))
        self.asked: list[tuple[dict[str, object], bytes]] = []
        self.answers: dict[str, object] = {
            "whoami": CallerDetails(
                identity="me",
                kind="human",
                roles=["llmops"],
                groups=[],
                may=[],
                expires="x",
                expires_in=1,
                accessor="abc",
            ),
            "roles": Roles(roles=["llmops", "web"]),
            "role": ROLE,
            "ca": CaKey(fingerprint="SHA256:x", public_key="ssh-ed25519 AAAA", bundle=""),
            "health": Ready(ready=True, ca_fingerprint="SHA256:x", policy="", mode="local"),
            "sign": Certificate(
                certificate="c",
                serial="255",
                key_id="",
                identity="",
                role="",
                principals=[],
                valid_after="",
                valid_before="",
                expires_in=1,
                ca_fingerprint="SHA256:x",
            ),
            **answers,
        }

    def ask(self, header: dict[str, object], body: bytes = b"") -> Reply:
        self.asked.append((header, body))
        answer = self.answers[str(header["op"])]
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Reply)
        return answer


def _app(keeper: Keeper) -> Flask:
    return make_flask(keeper, SETTINGS)


def _ask(
    keeper: Keeper,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> TestResponse:
    sent = {"X-Vault-Token": "t", **(headers or {})}
    return _app(keeper).test_client().open(path, method=method, data=body, headers=sent)


# --- no answer is a framework's own ----------------------------------------------------------------------------------

SEGMENT = st.sampled_from(
    [
        "ssh",
        "team",
        "roles",
        "sign",
        "llmops",
        "config",
        "ca",
        "issuer",
        "default",
        "public_key",
        "sys",
        "health",
        "-",
        "%2e%2e",
        "..",
        ".",
        "",
        "%00",
        "%0a",
        "%ff",
        "é",
        "a b",
        "issue",
        "issuers",
        "auth",
        "token",
        "lookup-self",
    ]
)
METHOD = st.sampled_from(["GET", "LIST", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "FOO", "TRACE"])
QUERY = st.sampled_from(["", "?list=true", "?list=%ff", "?help=1", "?limit=x&list=1", "?%zz", "?list=true&after=z"])
BODY = st.sampled_from([None, b"", b"{}", b"{bad", b"\xff", b"[" * 60_000, b"x" * 70_000])
HEADERS = st.sampled_from(
    [
        {},
        {"X-Vault-Namespace": "ns"},
        {"X-Vault-Wrap-TTL": "1"},
        {"X-Vault-Wrap-TTL": "é"},
        {"Content-Type": "a/b"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/merge-patch+json"},
    ]
)


@given(METHOD, st.lists(SEGMENT, max_size=5), QUERY, BODY, HEADERS, st.booleans())
def test_every_answer_is_vaults(
    method: str, segments: list[str], query: str, body: bytes | None, headers: dict[str, str], known: bool
) -> None:
    keeper = Keeper() if known else Keeper(whoami=NotAuthenticated("token_unknown", "no"))
    answer = _ask(keeper, method, "/v1/" + "/".join(segments) + query, body, headers)
    assert answer.status_code < 500
    assert answer.headers["Content-Type"] in ("application/json", "text/plain")
    assert answer.headers["Cache-Control"] == "no-store"
    if answer.status_code in (200, 307) or not answer.data:
        return
    told = json.loads(answer.data)
    assert list(told) == ["errors"]
    assert all(isinstance(sentence, str) for sentence in told["errors"])


@pytest.mark.parametrize(
    "path", ["/v1/ssh/config/ca", "/v1/ssh/roles/llmops", "/v1/ssh/public_key", "/v1/ssh/roles?list=true"]
)
def test_a_fault_of_ours_is_a_500_without_its_details(path: str) -> None:
    answer = _ask(Keeper(ca=KeyError("a secret"), role=KeyError("a secret"), roles=KeyError("a secret")), "GET", path)
    assert answer.status_code == 500
    assert isinstance(json.loads(answer.data)["errors"], list)
    assert b"secret" not in answer.data


@pytest.mark.parametrize("path", ["/v1/ssh/config/ca", "/v1/ssh/nope", "/v1/nomount/x", "/v1/auth/token/lookup-self"])
def test_a_keeper_that_is_gone_is_a_503_that_says_when_to_return(path: str) -> None:
    answer = _ask(Keeper(whoami=Unavailable("keeper_gone", "the keeper does not answer", "try again")), "GET", path)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert json.loads(answer.data) == {"errors": ["the keeper does not answer; try again"]}


def test_a_path_that_cannot_be_printed_is_a_bare_400() -> None:
    answer = _ask(Keeper(), "GET", "/v1/ssh/roles/%00")
    assert (answer.status_code, answer.data) == (400, b"")


def test_broken_json_is_told_to_a_caller_with_a_good_token() -> None:
    answer = _ask(Keeper(), "POST", "/v1/ssh/roles/x", b"{bad")
    assert answer.status_code == 400
    assert json.loads(answer.data)["errors"][0].startswith("failed to decode JSON input: ")


def test_a_body_of_a_caller_without_a_good_token_is_not_decoded() -> None:
    for path, status in (("/v1/ssh/roles/x", 403), ("/v1/nomount/x", 403), ("/v1/ssh/public_key", 405)):
        keeper = Keeper(whoami=NotAuthenticated("token_unknown", "no"))
        assert _ask(keeper, "POST", path, b"{bad").status_code == status
        assert [header["op"] for header, _ in keeper.asked] == ["whoami"]


# --- who is asked what -----------------------------------------------------------------------------------------------


def test_a_line_for_hosts_needs_no_token_and_asks_nobody_for_one() -> None:
    keeper = Keeper(whoami=NotAuthenticated("token_missing", "no"))
    for path in ("/v1/ssh/public_key", "/v1/team/ssh/public_key", "/v1/ssh/issuer/default/public_key"):
        answer = _ask(keeper, "GET", path)
        assert (answer.status_code, answer.data) == (200, b"ssh-ed25519 AAAA\n")
        assert answer.headers["Content-Type"] == "text/plain"
    assert {header["op"] for header, _ in keeper.asked} == {"ca"}


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "/v1/ssh/config/ca"),
        ("POST", "/v1/ssh/roles/x"),
        ("GET", "/v1/x/y"),
        ("POST", "/v1/ssh/issue/llmops"),
        ("DELETE", "/v1/sys/mounts/ssh"),
        ("GET", "/v1/sys/mounts"),
        ("LIST", "/v1/ssh/issuers"),
        ("GET", "/v1/ssh/zz"),
    ],
)
def test_a_stranger_learns_nothing(method: str, path: str) -> None:
    answer = _ask(Keeper(whoami=NotAuthenticated("token_unknown", "no")), method, path)
    assert (answer.status_code, json.loads(answer.data)) == (403, {"errors": ["permission denied"]})


def test_the_longest_mount_wins() -> None:
    keeper = Keeper()
    assert _ask(keeper, "LIST", "/v1/team/ssh/roles").status_code == 200
    assert _ask(keeper, "LIST", "/v1/team/roles").status_code == 200
    refused = _ask(keeper, "GET", "/v1/teams/roles")
    assert json.loads(refused.data) == {"errors": ['no handler for route "teams/roles". route entry not found.']}


@pytest.mark.parametrize(
    "header", [{"X-Vault-Namespace": "root"}, {"X-Vault-Wrap-TTL": "0"}, {"X-Vault-Namespace": ""}]
)
def test_headers_that_ask_for_nothing_still_sign(header: dict[str, str]) -> None:
    keeper = Keeper()
    answer = _ask(keeper, "PUT", "/v1/ssh/sign/llmops", b'{"public_key":"k"}', header)
    assert json.loads(answer.data)["data"]["serial_number"] == "ff"
    asked, body = keeper.asked[-1]
    assert (asked["op"], asked["shape"], asked["role"], body) == ("sign", "vault", "llmops", b'{"public_key":"k"}')


def test_a_cleaned_path_never_leads_elsewhere() -> None:
    for path in ("/v1/..//evil.example/x", "/v1/ssh/../../../x", "/v1//evil.example", "/v1/.//..//..//x"):
        answer = _ask(Keeper(), "GET", path)
        assert answer.status_code == 307
        assert answer.headers["Location"].startswith("/")
        assert not answer.headers["Location"].startswith("//")


def test_paths_outside_are_left_to_others() -> None:
    assert _ask(Keeper(), "GET", "/healthz").status_code == 200
    assert json.loads(_ask(Keeper(), "GET", "/v1x").data)["code"]


# --- words -----------------------------------------------------------------------------------------------------------


@given(st.text() | st.sampled_from(['\x7f\x00\x1f\b\f\u2028<>&\\"', "a\ud800<\u20ac", "</script>"]))
def test_json_is_written_as_go_does(text: str) -> None:
    value = {text: [text, None, True, -1, 2**63]}
    written = responses.go_json(value)
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == value
    for char in "<>&\u2028\u2029":
        text = text.replace(char, "?")
    plain = {text: [text, None, True, -1, 2**63]}
    assert responses.go_json(plain) == json.dumps(plain, ensure_ascii=False, separators=(",", ":"))


def test_an_envelope_has_vaults_eight_keys_in_order() -> None:
    body = responses.envelope({"a": "<&>\u2028"}, "r", ["w"])
    assert body == (
        b'{"request_id":"r","lease_id":"","renewable":false,"lease_duration":0,"data":{"a":"\\u003c\\u0026\\u003e\\u2028"},'
        b'"wrap_info":null,"warnings":["w"],"auth":null}\n'
    )


def test_a_role_shows_what_policy_pins() -> None:
    fields = responses.role_fields(ROLE, "ssh-rsa AAAA")
    assert list(fields) == sorted(fields)
    assert len(fields) == 27
    assert fields["default_critical_options"] == {
        "force-command": "ls",
        "source-address": "10.0.0.0/8,192.0.2.0/24",
        "verify-required": "",
    }
    assert fields["default_extensions"] == {"no-touch-required": "", "permit-pty": ""}
    assert fields["allowed_user_key_lengths"] == {"rsa": [3072], "sk-ssh-ed25519@openssh.com": [0]}
    assert fields["algorithm_signer"] == "rsa-sha2-512"
    bound = responses.role_fields(ROLE.model_copy(update={"source_address": "caller"}), "ssh-ed25519 AAAA")
    assert bound["default_critical_options"]["source-address"] == "caller"


@pytest.mark.parametrize(
    "error, status",
    [
        (Refused("frozen", "all is frozen", "ask"), 403),
        (Refused("rate_limited", "too fast"), 429),
        (Refused("reason_missing", "say why"), 400),
        (BadRequest("body_too_large", "large"), 413),
        (NotFound("unknown_serial", "no"), 404),
        (Unavailable("clock_behind", "late"), 503),
        (LedgerBroken("ledger_broken", "broken"), 503),
        (SignerError("internal_error", "oh"), 500),
        (SignerError("never_heard_of", "oh"), 500),
    ],
    ids=lambda value: getattr(value, "code", str(value)),
)
def test_an_error_without_a_sentence_of_vaults_keeps_ours(error: SignerError, status: int) -> None:
    answer = responses.render_error(error)
    assert answer.status == status
    assert json.loads(answer.body) == {"errors": [f"{error.text}; {error.hint}" if error.hint else error.text]}
    assert (("Retry-After", "1") in answer.headers) == (status == 503)


def test_audit_7_the_sentence_about_an_ecdsa_key_says_its_size_where_another_size_is_allowed() -> None:
    def sentence(kind: str, bits: int, *allowed: str) -> str:
        facts = {"key_type": kind, "bits": bits, "allowed": list(allowed)}
        body = json.loads(responses.render_error(Refused("key_type_not_allowed", "no", "", facts)).body)
        return str(body["errors"][0]).removeprefix("public_key failed to meet the key requirements: ")

    assert sentence("ecdsa-sha2-nistp521", 521, "ssh-ed25519") == "key of type ecdsa is not allowed"
    assert sentence("ssh-ed25519", 256, "ecdsa-sha2-nistp256") == "key of type ed25519 is not allowed"
    assert sentence("ecdsa-sha2-nistp521", 521, "ssh-ed25519", "ecdsa-sha2-nistp256") == (
        "key of type ecdsa is not allowed: it is ecdsa-sha2-nistp521 (521 bits), the role takes ecdsa-sha2-nistp256"
    )


def test_a_limit_says_when_it_frees_a_place() -> None:
    answer = responses.render_error(Refused("too_many_live", "held", "", {"retry_after_s": 240}))
    assert (answer.status, ("Retry-After", "240") in answer.headers) == (429, True)
