"""The native API of the real service: answers are what openapi.json says, and each caller sees what it may."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from signer.api import schemas
from signer.protocol import replies
from tests.parts.eventually import eventually
from tests.parts.keys import KeyRing
from tests.parts.service import STANDARD_POLICY, Answer, Service, StartService


@pytest.fixture
def service(start_service: StartService) -> Service:
    return start_service()


def pages(service: Service, query: str, identity: str) -> Iterator[Answer]:
    """Every page, by way of the header Link alone."""
    path = f"/api/certificates?{query}"
    while path:
        page = service.ask("GET", path, identity=identity)
        assert page.status == 200, page.body
        yield page
        path = page.headers.get("link", "").partition("<")[2].partition(">")[0]


def metric(service: Service, name: str, **labels: str) -> float:
    text = service.ask("GET", "/metrics", identity="operator").body.decode()
    return next(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and sample.labels == labels
    )


def test_real_answers_are_what_the_models_say(service: Service, keyring: KeyRing) -> None:
    line = keyring("ed25519", "user").public_line
    issued = service.sign(line, identity="operator")
    replies.Certificate.model_validate_json(issued.body)
    serial = issued.json()["serial"]

    def ask(method: str, path: str, body: object = None) -> bytes:
        return service.ask(method, path, body, identity="operator").body

    replies.CertificatePage.model_validate_json(ask("GET", "/api/certificates?active=true"))
    replies.CertificateDetails.model_validate_json(ask("GET", f"/api/certificates/{serial}"))
    replies.Recorded.model_validate_json(ask("GET", "/api/ledger/head"))
    granted = replies.Explanation.model_validate_json(ask("POST", "/api/explain/llmops", {"public_key": line}))
    refused = replies.Explanation.model_validate_json(ask("POST", "/api/explain/llmops", {"ttl": "2h"}))
    assert (granted.granted, refused.granted, refused.code) == (True, False, "ttl_above_max")
    frozen = replies.FreezeState.model_validate_json(
        ask("POST", "/api/freezes", {"scope": "identity:ci", "reason": "drill"})
    )
    assert frozen.frozen
    listed = replies.Freezes.model_validate_json(ask("GET", "/api/freezes"))
    assert [(row.scope, row.reason) for row in listed.freezes] == [("identity:ci", "drill")]
    replies.FreezeState.model_validate_json(ask("DELETE", "/api/freezes/identity:ci"))
    me = schemas.WhoAmI.model_validate_json(ask("GET", "/api/whoami"))
    assert (me.identity, me.kind, me.token.expires) == ("operator", "human", "2099-01-01T00:00:00Z")
    schemas.Alive.model_validate_json(ask("GET", "/healthz"))
    replies.Ready.model_validate_json(ask("GET", "/readyz"))
    schemas.Problem.model_validate_json(ask("GET", "/api/certificates/999"))
    schemas.Problem.model_validate_json(service.sign(line, identity="stranger").body)


def test_explaining_issues_and_records_nothing(service: Service, keyring: KeyRing) -> None:
    head = service.ask("GET", "/api/ledger/head", identity="operator").json()
    body = {"public_key": keyring("ed25519", "user").public_line}
    assert service.ask("POST", "/api/explain/llmops", body, identity="ci").json()["granted"] is True
    assert service.ask("GET", "/api/ledger/head", identity="operator").json() == head


def test_the_ca_line_is_what_trusted_user_ca_keys_wants_and_needs_no_token(service: Service) -> None:
    answer = service.ask("GET", "/api/ca")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.body.decode().split()[:2] == service.ca.public_line.split()[:2]


def test_pages_follow_one_another_without_gap_or_repetition(service: Service, keyring: KeyRing) -> None:
    line = keyring("ed25519", "user").public_line
    serials = [service.sign(line, identity=name).json()["serial"] for name in ("ci", "operator", "ci", "ci", "ci")]

    def found(query: str, identity: str) -> list[str]:
        return [row["serial"] for page in pages(service, query, identity) for row in page.json()["certificates"]]

    assert found("limit=2", "operator") == serials[::-1]
    assert found("limit=1&identity=ci&active=true", "operator") == [serials[4], serials[3], serials[2], serials[0]]
    assert found("limit=200&principal=llmops", "operator") == serials[::-1]
    assert found("principal=root", "operator") == []
    assert found("limit=3", "ci") == [serials[4], serials[3], serials[2], serials[0]]


def test_an_identity_sees_its_own_certificates_only(service: Service, keyring: KeyRing) -> None:
    serial = service.sign(keyring("ed25519", "user").public_line, identity="ci").json()["serial"]
    assert service.ask("GET", f"/api/certificates/{serial}", identity="deploy-agent").status == 404
    assert service.ask("GET", "/api/certificates?identity=ci", identity="deploy-agent").status == 403
    assert service.ask("GET", "/api/certificates", identity="deploy-agent").json()["certificates"] == []
    assert service.ask("GET", f"/api/certificates/{serial}", identity="ci").status == 200
    assert service.ask("GET", "/api/ledger/head", identity="ci").json()["code"] == "not_permitted"
    assert service.ask("GET", "/api/certificates").json()["code"] == "token_missing"


def test_a_freeze_stops_signing_at_once_and_its_end_lets_it_go_on(service: Service, keyring: KeyRing) -> None:
    line = keyring("ed25519", "user").public_line
    assert service.ask("POST", "/api/freezes", {"scope": "all", "reason": "x"}, identity="ci").status == 403
    assert (
        service.ask("POST", "/api/freezes", {"scope": "role:llmops", "reason": "x"}, identity="operator").status == 201
    )
    refused = service.sign(line)
    assert (refused.status, refused.json()["code"]) == (403, "frozen")
    assert service.ask("DELETE", "/api/freezes/role:llmops", identity="operator").status == 200
    assert service.ask("DELETE", "/api/freezes/role:llmops", identity="operator").json()["code"] == "not_frozen"
    assert service.sign(line).status == 201


def test_a_long_token_and_a_long_role_are_refused_as_what_they_are(service: Service) -> None:
    line: dict[str, Any] = {"public_key": "x"}
    long = service.ask("POST", "/api/sign/llmops", line, headers={"X-Vault-Token": "x" * 8000})
    assert long.status == 401
    assert service.ask("POST", "/api/sign/" + "r" * 300, line, identity="ci").status == 404


def test_figures_count_what_happens(service: Service, keyring: KeyRing) -> None:
    assert metric(service, "signer_signatures_total", role="llmops") == 0
    assert metric(service, "signer_refusals_total", code="role_not_granted") == 0
    commits = metric(service, "signer_ledger_commit_seconds_count")
    line = keyring("ed25519", "user").public_line
    assert service.sign(line).status == 201
    assert service.sign(line, identity="stranger").status == 403
    assert metric(service, "signer_signatures_total", role="llmops") == 1
    assert metric(service, "signer_refusals_total", code="role_not_granted") == 1
    assert metric(service, "signer_ledger_commit_seconds_count") == commits + 2
    assert metric(service, "signer_batch_commands_count") == 2
    assert metric(service, "signer_command_seconds_count") == 2
    assert metric(service, "signer_key_age_seconds") > 0
    assert service.ask("GET", "/metrics").headers["content-type"].startswith("text/plain; version=")


def test_the_age_of_the_policy_is_that_of_the_one_in_force(start_service: StartService) -> None:
    service = start_service()

    def younger_than_key() -> float:
        text = service.ask("GET", "/metrics").body.decode()
        ages = {
            line.split()[0]: float(line.split()[1])
            for line in text.splitlines()
            if "_age_seconds " in line[:40] and line[0] != "#"
        }
        return ages["signer_key_age_seconds"] - ages["signer_policy_age_seconds"]

    service.write_policy("nonsense")
    os.kill(service.pid, signal.SIGHUP)
    eventually(lambda: "the current policy stays in force" in service.log(), "the broken policy is refused")
    assert younger_than_key() < 0.001
    service.write_policy(STANDARD_POLICY)
    os.kill(service.pid, signal.SIGHUP)
    eventually(lambda: younger_than_key() > 0.001, "the policy is loaded anew")
