"""The native routes without a keeper: what they pass on, what they refuse, and that every end is a problem document."""

from __future__ import annotations

import io
import json
import logging
import re
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from signer.api import openapi
from signer.api.app import make_flask
from signer.api.published import FILES
from signer.errors import NotAuthenticated, SignerError, Unavailable
from signer.protocol.client import KeeperClient
from signer.protocol.replies import (
    CaKey,
    CallerDetails,
    CertificatePage,
    ConsistencyProof,
    MetricsText,
    NotReady,
    OperationPage,
    Ready,
    Reply,
    RequestPage,
    SignedCheckpoint,
)
from signer.protocol.sign_request import MAX_BODY
from signer.settings import load_settings


class FakeKeeperClient(KeeperClient):
    """Keeps what it is asked and answers with what a test set."""

    def __init__(self) -> None:
        self.asked: list[tuple[dict[str, Any], bytes]] = []
        self.reply: Reply | Exception | None = None

    def ask(self, header: dict[str, object], body: bytes = b"") -> Reply:
        self.asked.append((header, body))
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply or REPLIES[str(header["op"])]


REPLIES: dict[str, Reply] = {
    "certificates": CertificatePage(certificates=[], before=None),
    "operations": OperationPage(operations=[], before=None),
    "requests": RequestPage(requests=[], before=None),
    "ca": CaKey(fingerprint="f", public_key="k", bundle="b"),
    "checkpoint": SignedCheckpoint(note="n"),
    "proof": ConsistencyProof(from_size=1, to_size=2, hashes=[]),
    "whoami": CallerDetails(
        identity="ci",
        kind="workload",
        roles=["deploy", "llmops"],
        groups=["bots"],
        may=["operate"],
        expires="2027-01-01T00:00:00Z",
        expires_in=60,
        accessor="a" * 24,
    ),
    "metrics": MetricsText(text="t"),
    "health": Ready(ready=True, ca_fingerprint="f", policy="p", mode="local"),
    **dict.fromkeys(
        ("request", "claim", "approve", "deny", "withdraw", "waivers", "end_waiver", "incidents", "close_incident"),
        MetricsText(text="t"),
    ),
    **dict.fromkeys(("host_keys", "add_host_keys", "remove_host_keys"), MetricsText(text="t")),
    **dict.fromkeys(
        ("sign", "explain", "certificate", "head", "entries", "record", "freezes", "freeze", "unfreeze"),
        MetricsText(text="t"),
    ),
}


@pytest.fixture
def link() -> FakeKeeperClient:
    return FakeKeeperClient()


@pytest.fixture
def flask(link: FakeKeeperClient) -> Flask:
    return make_flask(link, load_settings({}))


@pytest.fixture
def client(flask: Flask) -> FlaskClient:
    return flask.test_client()


def problem(answer: TestResponse, status: int) -> dict[str, Any]:
    """The problem document, its form checked."""
    assert answer.status_code == status, answer.data
    assert answer.content_type == "application/problem+json"
    assert answer.headers["Cache-Control"] == "no-store"
    found: dict[str, Any] = json.loads(answer.data)
    assert set(found) == {"type", "title", "status", "detail", "code", "hint", "request_id"}
    assert found["status"] == status
    assert found["hint"]
    assert re.fullmatch(r"[0-9a-f-]{36}", found["request_id"])
    return found


def asked(link: FakeKeeperClient) -> dict[str, Any]:
    *before, (header, _) = link.asked
    assert {header["op"] for header, _ in before} <= {"whoami"}
    return {key: value for key, value in header.items() if key not in ("token", "address", "request_id")}


@pytest.mark.parametrize(
    "method, path, body, expected",
    [
        ("POST", "/api/explain/llmops", b"{}", {"op": "explain", "role": "llmops"}),
        ("POST", "/api/sign/llmops", b"{}", {"op": "sign", "role": "llmops"}),
        ("GET", "/api/certificates/17", None, {"op": "certificate", "serial": 17}),
        ("GET", "/api/ledger/head", None, {"op": "head"}),
        ("GET", "/api/ledger/entries?after=7&limit=3", None, {"op": "entries", "after": 7, "limit": 3}),
        ("GET", "/api/freezes", None, {"op": "freezes"}),
        ("GET", "/api/whoami", None, {"op": "whoami"}),
        ("POST", "/api/freezes", b'{"scope":"all","reason":"r"}', {"op": "freeze"}),
        ("GET", "/api/host-keys?after=edge1", None, {"op": "host_keys", "after": "edge1"}),
        ("POST", "/api/host-keys", b'{"name":"edge1"}', {"op": "add_host_keys"}),
        (
            "DELETE",
            "/api/host-keys/%5Bedge1%5D%3A2222",
            None,
            {"op": "remove_host_keys", "host": "[edge1]:2222"},
        ),
        ("POST", "/api/operations", b'{"operation":"cutover"}', {"op": "record"}),
        ("GET", "/api/requests/r-1", None, {"op": "request", "request": "r-1"}),
        ("POST", "/api/requests/r-1/claim", b"{}", {"op": "claim", "request": "r-1"}),
        ("POST", "/api/requests/r-1/approve", b"{}", {"op": "approve", "request": "r-1"}),
        ("POST", "/api/requests/r-1/deny", b"{}", {"op": "deny", "request": "r-1"}),
        ("POST", "/api/requests/r-1/withdraw", b"{}", {"op": "withdraw", "request": "r-1"}),
        ("GET", "/api/waivers", None, {"op": "waivers"}),
        ("POST", "/api/waivers/w-1/end", b"{}", {"op": "end_waiver", "waiver": "w-1"}),
        ("GET", "/api/incidents?state=all", None, {"op": "incidents", "state": "all"}),
        ("POST", "/api/incidents/i-1/close", b"{}", {"op": "close_incident", "incident": "i-1"}),
        ("DELETE", "/api/freezes/identity:ci", None, {"op": "unfreeze", "scope": "identity:ci"}),
        ("DELETE", "/api/freezes/identity%3Aci", None, {"op": "unfreeze", "scope": "identity:ci"}),
    ],
)
def test_a_route_asks_the_keeper_with_the_callers_credential(
    client: FlaskClient, link: FakeKeeperClient, method: str, path: str, body: bytes | None, expected: dict[str, Any]
) -> None:
    answer = client.open(path, method=method, data=body, headers={"X-Vault-Token": "sgn_x"})
    assert answer.status_code in (200, 201)
    assert asked(link) == expected
    header, sent = link.asked[-1]
    assert (header["token"], header["address"]) == ("sgn_x", "127.0.0.1")
    assert sent == (body or b"")


def test_whoami_shows_the_caller_and_when_its_token_ends_and_nothing_else(client: FlaskClient) -> None:
    answer = client.get("/api/whoami", headers={"Authorization": "Bearer sgn_x"})
    assert answer.json == {
        "identity": "ci",
        "kind": "workload",
        "roles": ["deploy", "llmops"],
        "groups": ["bots"],
        "may": ["operate"],
        "token": {"expires": "2027-01-01T00:00:00Z"},
    }
    assert answer.headers["Cache-Control"] == "no-store"


def test_a_list_passes_every_filter_on_and_links_to_the_next_page(client: FlaskClient, link: FakeKeeperClient) -> None:
    link.reply = CertificatePage(certificates=[], before="41")
    answer = client.get(
        "/api/certificates?identity=ci&role=llmops&principal=llmops&fingerprint=SHA256:a%2Bb"
        "&backend=vault&active=true&limit=2&before=99"
    )
    assert asked(link) == {
        "op": "certificates",
        "identity": "ci",
        "role": "llmops",
        "principal": "llmops",
        "fingerprint": "SHA256:a+b",
        "backend": "vault",
        "active": True,
        "limit": 2,
        "before": 99,
    }
    assert answer.headers["Link"] == (
        "</api/certificates?identity=ci&role=llmops&principal=llmops&fingerprint=SHA256%3Aa%2Bb&backend=vault&active=true&limit=2"
        '&before=41>; rel="next"'
    )


def test_a_list_of_operations_passes_its_filters_on_and_links_to_the_next_page(
    client: FlaskClient, link: FakeKeeperClient
) -> None:
    link.reply = OperationPage(operations=[], before="7")
    answer = client.get("/api/operations?evidence=sha256:aa&limit=2&before=9")
    assert asked(link) == {"op": "operations", "evidence": "sha256:aa", "limit": 2, "before": 9}
    assert answer.headers["Link"] == '</api/operations?evidence=sha256%3Aaa&limit=2&before=7>; rel="next"'
    link.asked.clear()
    assert problem(client.get("/api/operations?identity=ci"), 400)["code"] == "query_malformed"
    assert not link.asked


def test_a_list_of_requests_passes_its_filters_on_and_links_to_the_next_page(
    client: FlaskClient, link: FakeKeeperClient
) -> None:
    link.reply = RequestPage(requests=[], before="r-2")
    answer = client.get("/api/requests?state=pending&identity=ci&before=r-9")
    assert asked(link) == {"op": "requests", "state": "pending", "identity": "ci", "before": "r-9"}
    assert answer.headers["Link"] == '</api/requests?state=pending&identity=ci&before=r-2>; rel="next"'
    for path in ("/api/requests?state=open", "/api/requests?limit=5", "/api/incidents?state=pending",
                 "/api/requests/r-1?wait=51", "/api/requests/r-1?wait=soon", "/api/requests/r-1?x=1"):  # fmt: skip
        link.asked.clear()
        assert problem(client.get(path), 400)["code"] == "query_malformed", path
        assert not link.asked


def test_the_last_page_links_nowhere(client: FlaskClient, link: FakeKeeperClient) -> None:
    assert "Link" not in client.get("/api/certificates").headers


@pytest.mark.parametrize(
    "query, detail",
    [
        ("identiti=ci", "unknown parameter 'identiti'"),
        ("identity=a&identity=b", "identity is given more than once"),
        ("identity=", "identity must have 1 to 256 printable characters"),
        ("role=a%00b", "role must have 1 to 256 printable characters"),
        ("principal=" + "x" * 257, "principal must have 1 to 256 printable characters"),
        ("backend=gpg", "backend must be one of local, vault"),
        ("active=yes", "active must be true or false"),
        ("active=", "active must be true or false"),
        ("before=abc", "before must be a whole number"),
        ("before=-1", "before must be a whole number"),
        ("before=%C2%B2", "before must be a whole number"),
        ("before=" + "9" * 20, "before must be a whole number"),
        ("limit=0", "limit must be at least 1"),
        ("limit=1.5", "limit must be a whole number"),
    ],
)
def test_a_bad_query_is_refused_in_a_clear_sentence(
    client: FlaskClient, link: FakeKeeperClient, query: str, detail: str
) -> None:
    found = problem(client.get(f"/api/certificates?{query}"), 400)
    assert (found["code"], found["detail"]) == ("query_malformed", detail)
    assert not link.asked


@pytest.mark.parametrize("serial", ["abc", "-1", "1.0", "9" * 20, str(2**64), "9" * 5000])
def test_a_serial_that_is_no_number_is_refused(client: FlaskClient, serial: str) -> None:
    assert problem(client.get(f"/api/certificates/{serial}"), 400)["detail"] == "serial must be a whole number"


@pytest.mark.parametrize(
    "method, path, status, code",
    [
        ("GET", "/", 404, "unknown_route"),
        ("GET", "/api", 404, "unknown_route"),
        ("GET", "/api/certificates/", 404, "unknown_route"),
        ("POST", "/api/explain/-bad", 404, "unknown_route"),
        ("POST", "/api/explain/" + "x" * 257, 404, "unknown_route"),
        ("GET", "/api/sign/llmops", 405, "method_not_allowed"),
        ("PUT", "/api/freezes", 405, "method_not_allowed"),
        ("DELETE", "/healthz", 405, "method_not_allowed"),
    ],
)
def test_flasks_own_refusals_are_problems_too(
    client: FlaskClient, method: str, path: str, status: int, code: str
) -> None:
    answer = client.open(path, method=method)
    assert problem(answer, status)["code"] == code
    assert ("Allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize("method, path", [("POST", "/api/freezes"), ("POST", "/api/explain/a"), ("GET", "/api/ca")])
def test_a_body_over_the_limit_is_refused_with_the_limit(
    client: FlaskClient, link: FakeKeeperClient, method: str, path: str
) -> None:
    found = problem(client.open(path, method=method, data=b"x" * (MAX_BODY + 1)), 413)
    assert (found["code"], str(MAX_BODY) in found["detail"]) == ("body_too_large", True)
    assert not link.asked


def test_a_body_over_the_limit_that_does_not_say_its_length_is_refused(flask: Flask) -> None:
    with flask.test_client() as client:
        answer = client.post(
            "/api/freezes",
            input_stream=io.BytesIO(b"x" * (MAX_BODY + 1)),
            environ_overrides={"wsgi.input_terminated": True, "CONTENT_LENGTH": ""},
        )
    assert problem(answer, 413)["code"] == "body_too_large"


def test_the_keepers_refusal_keeps_its_code_and_gets_its_status(client: FlaskClient, link: FakeKeeperClient) -> None:
    link.reply = NotAuthenticated("token_missing", "no token was sent", "send it")
    answer = client.get("/api/freezes")
    found = problem(answer, 401)
    assert (found["code"], found["detail"], found["hint"]) == ("token_missing", "no token was sent", "send it")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert found["request_id"] == link.asked[0][0]["request_id"]


@pytest.mark.parametrize("path", ["/readyz", "/metrics", "/api/ca", "/api/ledger/head"])
def test_without_a_keeper_a_route_says_when_to_come_back(
    client: FlaskClient, link: FakeKeeperClient, path: str
) -> None:
    link.reply = Unavailable("keeper_gone", "the keeper does not answer", "retry in a second")
    answer = client.get(path)
    assert problem(answer, 503)["code"] == "keeper_gone"
    assert answer.headers["Retry-After"] == "1"


def test_without_a_keeper_the_process_is_healthy_all_the_same(client: FlaskClient, link: FakeKeeperClient) -> None:
    link.reply = Unavailable("keeper_gone", "the keeper does not answer", "retry in a second")
    assert client.get("/healthz").get_json() == {"status": "ok"}
    assert not link.asked


def test_a_keeper_that_is_not_ready_fails_readiness_with_its_reason(
    client: FlaskClient, link: FakeKeeperClient
) -> None:
    link.reply = NotReady(ready=False, code="ledger_unavailable", text="the disk is full", hint="make room")
    found = problem(client.get("/readyz"), 503)
    assert (found["code"], found["detail"], found["hint"]) == ("ledger_unavailable", "the disk is full", "make room")


@pytest.mark.parametrize("fault", [KeyError("s3cret"), SignerError("odd_code", "odd"), ValueError("s3cret")])
def test_a_fault_of_ours_tells_the_caller_a_number_and_the_log_the_rest(
    client: FlaskClient, link: FakeKeeperClient, fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    link.reply = fault
    with caplog.at_level(logging.ERROR):
        answer = client.get("/api/freezes")
    assert answer.status_code == 500
    assert b"s3cret" not in answer.data
    if not isinstance(fault, SignerError):
        found = problem(answer, 500)
        assert found["code"] == "internal_error"
        assert found["request_id"] in caplog.text
        assert "s3cret" in caplog.text


def test_below_v1_errors_are_in_vaults_words(client: FlaskClient) -> None:
    answer = client.post("/v1/nowhere", data=b"x" * (MAX_BODY + 1))
    assert (answer.status_code, answer.get_json()) == (413, {"errors": ["http: request body too large"]})
    answer = client.get("/v1/nowhere")
    assert answer.content_type == "application/json"
    assert isinstance(answer.get_json()["errors"], list)


def test_openapi_lists_exactly_the_routes_that_there_are(flask: Flask) -> None:
    served = {
        (method, re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in flask.url_map.iter_rules()
        if not rule.rule.startswith(("/v1/", "/console"))
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    document = openapi.document()
    listed = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert listed == served


def test_openapi_says_which_parameters_a_list_takes() -> None:
    parameters = openapi.document()["paths"]["/api/certificates"]["get"]["parameters"]
    assert [parameter["name"] for parameter in parameters] == [
        *("identity", "role", "principal", "fingerprint", "backend", "active", "before", "limit")
    ]
    parameters = openapi.document()["paths"]["/api/operations"]["get"]["parameters"]
    assert [parameter["name"] for parameter in parameters] == ["evidence", "before", "limit"]


def test_every_reference_in_openapi_leads_somewhere_and_every_id_is_its_own() -> None:
    document = openapi.document()
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    assert set(re.findall(r"#/components/schemas/(\w+)", text)) <= set(schemas)
    ids = re.findall(r'"operationId": "(\w+)"', text)
    assert len(ids) == len(set(ids)) == len(openapi.ROUTES)


def test_audit_openapi_has_the_statuses_of_the_edge_on_every_route() -> None:
    operations = [operation for item in openapi.document()["paths"].values() for operation in item.values()]
    edge = {"400", "408", "413", "414", "429", "431"}
    assert all(edge <= operation["responses"].keys() for operation in operations)


def test_openapi_says_which_routes_need_no_token(client: FlaskClient, link: FakeKeeperClient) -> None:
    paths = openapi.document()["paths"]
    opened = {path for path, item in paths.items() for operation in item.values() if operation.get("security") == []}
    published = {f"/api/{name}" for name in FILES}
    assert {client.get(path).status_code for path in opened - published} == {200}
    assert {client.get(path).status_code for path in published} == {503}  # no keeper has published any here
    assert all(header.get("token") is None for header, _ in link.asked)
    assert opened - published == {
        "/api/ca",
        "/api/ledger/checkpoint",
        "/api/ledger/proof",
        "/api/openapi.json",
        "/healthz",
        "/readyz",
        "/metrics",
    }
