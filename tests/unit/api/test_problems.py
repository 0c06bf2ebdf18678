"""Problems of the native API: one status for each error, and everything that RFC 9457 and a caller need."""

from __future__ import annotations

import json
from http import HTTPStatus

import pytest

from signer import errors
from signer.api.problems import CONTENT_TYPE, render_problem, status_of
from signer.errors import SignerError


@pytest.mark.parametrize(
    "kind, code, status",
    [
        (errors.NotAuthenticated, "token_missing", 401),
        (errors.Refused, "frozen", 403),
        (errors.Refused, "unknown_role", 404),
        (errors.Refused, "rate_limited", 429),
        (errors.Refused, "too_many_live", 429),
        (errors.BadRequest, "json_malformed", 400),
        (errors.BadRequest, "body_too_large", 413),
        (errors.BadRequest, "method_not_allowed", 405),
        (errors.BadPublicKey, "public_key_missing", 400),
        (errors.NotFound, "unknown_serial", 404),
        (errors.Unavailable, "keeper_gone", 503),
        (errors.Unavailable, "internal_error", 500),
        (errors.LedgerBroken, "ledger_broken", 503),
        (errors.ForeignCertificate, "vault_outside_grant", 500),
        (errors.CertificateMismatch, "certificate_differs_from_grant", 500),
        (SignerError, "never_heard_of", 500),
    ],
)
def test_the_status_follows_from_the_code(kind: type[SignerError], code: str, status: int) -> None:
    assert status_of(kind(code, "text")) == status


def test_every_branch_of_the_tree_has_a_status() -> None:
    def below(kind: type[SignerError]) -> set[type[SignerError]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    for kind in below(SignerError):
        error = kind.__new__(kind)
        SignerError.__init__(error, "some_code", "text")  # some kinds set their own code
        assert isinstance(status_of(error), HTTPStatus)


def test_a_problem_says_code_hint_and_request() -> None:
    error = errors.Refused("frozen", "all is frozen: drill", "ask the operator who froze it", {"scope": "all"})
    status, headers, body = render_problem(error, "r-1")
    assert status == 403
    assert dict(headers) == {"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"}
    assert json.loads(body) == {
        "type": "about:blank",
        "title": "Forbidden",
        "status": 403,
        "detail": "all is frozen: drill",
        "code": "frozen",
        "hint": "ask the operator who froze it",
        "request_id": "r-1",
    }


def test_what_may_succeed_later_says_when() -> None:
    _, headers, _ = render_problem(errors.Unavailable("keeper_gone", "the keeper does not answer"), "")
    assert dict(headers)["Retry-After"] == "1"
    limit = errors.Refused("rate_limited", "too fast", "retry in 17 s", {"retry_after_s": 17})
    _, headers, _ = render_problem(limit, "")
    assert dict(headers)["Retry-After"] == "17"
    for error in (
        errors.Refused("frozen", "frozen", "", {"retry_after_s": 17}),
        errors.Refused("rate_limited", "fast"),
    ):
        _, headers, _ = render_problem(error, "")
        assert "Retry-After" not in dict(headers)


def test_a_missing_credential_says_which_kind_is_wanted() -> None:
    _, headers, _ = render_problem(errors.NotAuthenticated("token_missing", "no token"), "")
    assert dict(headers)["WWW-Authenticate"] == "Bearer"
