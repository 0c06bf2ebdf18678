"""Approvals are checked again from the ledger alone: an honest one has no problem, and each lie in one has its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from signer.authority.approval_audit import ApprovalAuditor, Audit
from signer.ledger.chain import chain
from signer.model import Entry, Event, Head
from signer.policy.decide import Policy
from signer.policy.file import parse_policy
from signer.ssh.statement import approval_statement, request_digest
from tests.parts.builders import policy_text, public_key, public_line
from tests.parts.fido import PRESENT, FidoKey, sign_by_hand

POLICY = """\
[ca]
fingerprint = "{ca}"

[roles.prod]
principals = ["llmops"]
key_types = ["ssh-ed25519"]
extensions = { allowed = ["permit-pty"] }
approval = { for = ["agent"], by = ["operators"], valid_for = "10m" }

[roles.touch]
principals = ["llmops"]
key_types = ["ssh-ed25519"]
presence = true

[identities.agent]
kind = "agent"
roles = ["prod"]
tokens = [{ sha256 = "{token:agent}", expires = 2099-01-01T00:00:00Z }]

[identities.anna]
kind = "human"
groups = ["operators"]
roles = ["touch"]
may = ["approve"]
approval_keys = [{ kind = "ssh", key = "{fido:anna}" }]

[identities.ben]
kind = "human"
groups = ["operators"]
may = ["approve"]
approval_keys = [{ kind = "ssh", key = "{fido:ben}", verify = true }]
"""
NOW = int(datetime.fromisoformat("2026-11-29T10:00:00Z").timestamp())
NAME = "r-abcdefghij"
TEXT = policy_text(POLICY.replace("{token:agent}", "ab" * 32))
IN_FORCE = parse_policy(TEXT.encode())
FROZEN: dict[str, Any] = {
    "id": NAME,
    "nonce": "00" * 16,
    "asked": "2026-11-29T10:00:00Z",
    "expires": "2026-11-29T11:00:00Z",
    "policy": IN_FORCE.digest,
    "identity": "agent",
    "kind": "agent",
    "role": "prod",
    "key_id": "agent:prod",
    "principals": ["llmops"],
    "critical_options": {"force-command": "true"},
    "extensions": {"permit-pty": ""},
    "ttl": 900,
    "reason": "ticket 812",
    "address": "192.0.2.7",
    "binding": {"public_key": public_line()},
}
WAIVER = {"until": "2026-11-29T12:00:00Z", "uses": 2}
Events = list[Event]


def requested(**changes: Any) -> Event:
    frozen = {**FROZEN, **changes}
    return Event(
        "approval.requested",
        frozen["identity"],
        {"request": frozen["id"], "digest": request_digest(frozen), "frozen": frozen},
    )


def given(
    approver: str = "anna",
    *,
    waiver: dict[str, Any] | None = None,
    frozen: dict[str, Any] | None = None,
    flags: int = PRESENT,
    key: str | None = None,
    **changes: Any,
) -> Event:
    held = FidoKey(name=key or approver)
    held.flags = flags
    shown = frozen or FROZEN
    digest = request_digest(shown)
    body: dict[str, Any] = {
        "request": shown["id"],
        "digest": digest,
        "approver": approver,
        "waiver": waiver,
        "signature": sign_by_hand(held, approval_statement(shown["id"], digest, approver, waiver)),
        "key": held.fingerprint,
        "public_key": held.line,
        "software": False,
        "user_present": bool(flags & 1),
        "user_verified": bool(flags & 4),
        "role_digest": "00",
    }
    return Event("approval.given", approver, {**body, **changes})


def issued(serial: int = 1, **changes: Any) -> Event:
    body: dict[str, Any] = {
        "serial": str(serial),
        "identity": "agent",
        "kind": "agent",
        "role": "prod",
        "key_id": "agent:prod",
        "principals": ["llmops"],
        "critical_options": {"force-command": "true"},
        "extensions": ["permit-pty"],
        "valid_after": NOW - 30,
        "valid_before": NOW + 900,
        "fingerprint": public_key().fingerprint,
        "address": "192.0.2.7",
        "policy": IN_FORCE.digest,
        "request": NAME,
        "approved_by": ["anna"],
        "waiver": None,
    }
    return Event("certificate.issued", "agent", {**body, **changes})


def ended(kind: str, actor: str = "agent", **more: Any) -> Event:
    return Event(f"approval.{kind}", actor, {"request": NAME, **more})


def audit(*events: Event, policy: Policy | None = IN_FORCE, at: int = NOW) -> Audit:
    auditor = ApprovalAuditor({} if policy is None else {policy.digest: policy})
    entries = list(chain(copy.deepcopy(events), Head(0, "0" * 64, 0), at * 1000))
    for entry in entries:
        auditor.take(entry)
    return auditor.audit


def problems(*events: Event, at: int = NOW) -> list[str]:
    return [problem.text for problem in audit(*events, at=at).problems]


# --- what is right ---------------------------------------------------------------------------------------------------


def test_an_honest_approval_has_no_problem_and_its_key_is_confirmed() -> None:
    found = audit(requested(), given(), issued(), ended("issued", serial="1", waiver=None))
    assert found.problems == []
    assert (found.signatures, found.software, found.certificates) == (1, 0, 1)
    key = ("anna", FidoKey(name="anna").fingerprint)
    assert dict(found.keys) == {key: 1}
    assert found.owned == {key}
    assert not found.unknown_policies


def test_the_counter_of_a_fido_key_is_checked_where_it_is_recorded() -> None:
    assert audit(requested(), given(counter=7), issued()).problems == []
    (wrong,) = audit(requested(), given(counter=8), issued()).problems
    assert wrong.text.endswith("is recorded with another counter than it has")
    freeze = Event("freeze.set", "ben", {"scope": "identity:anna"})
    (again,) = audit(requested(), given(counter=7), freeze, given(counter=7), issued()).problems
    assert again.text.endswith("is a signature that was recorded before")


def test_without_the_policy_signatures_are_checked_and_no_key_is_confirmed() -> None:
    found = audit(requested(), given(), issued(), policy=None)
    assert found.problems == []
    assert found.signatures == 1
    assert found.owned == set()
    assert dict(found.unknown_policies) == {IN_FORCE.digest: 1}


def test_a_certificate_under_a_waiver_may_be_narrower_than_what_was_approved() -> None:
    used = Event("waiver.used", "agent", {"waiver": "w-abcdefghij", "serial": "2"})
    under = {"request": None, "waiver": "w-abcdefghij"}
    found = audit(
        requested(), given(waiver=WAIVER), issued(), ended("issued"),
        issued(2, **under), used, issued(3, **under, extensions=[], valid_before=NOW + 60), used,
    )  # fmt: skip
    assert found.problems == []
    assert found.certificates == 3


def test_an_identity_that_needs_nobody_is_no_concern() -> None:
    body = {name: value for name, value in issued().body.items() if name not in ("request", "approved_by", "waiver")}
    assert problems(Event("certificate.issued", "agent", {**body, "kind": "human"})) == []


def test_the_askers_own_signature_counts_where_the_role_takes_it() -> None:
    own: dict[str, Any] = {**FROZEN, "identity": "anna", "kind": "human", "role": "touch", "key_id": "anna:touch"}
    certificate = issued(identity="anna", kind="human", role="touch", key_id="anna:touch")
    assert problems(requested(**own), given(frozen=own), certificate) == []
    without = issued(identity="anna", kind="human", role="touch", key_id="anna:touch", approved_by=[])
    assert any("lacks the signature of anna" in text for text in problems(requested(**own), given(frozen=own), without))


# --- what is not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [name for name in FROZEN if name not in ("id", "binding", "identity")])
def test_a_request_that_was_changed_afterwards_is_told(field: str) -> None:
    values = {"ttl": 7, "principals": ["root"], "critical_options": {}, "extensions": {}}
    values |= dict.fromkeys(("asked", "expires"), "2026-11-29T23:00:00Z")
    other = requested(**{field: values.get(field, "x")})
    found = problems(other, given())
    assert any("has another digest than the request" in text for text in found)
    assert any("does not verify" in text for text in found)
    # Whoever changes the digests along with it still has no signature.
    digest = other.body["digest"]
    assert any("does not verify" in text for text in problems(other, given(digest=digest)))


SPOILED: dict[str, tuple[Callable[[], Event], str]] = {
    "no signature": (lambda: given(signature="nonsense"), "does not verify: the signature is malformed"),
    "of another approver": (lambda: given("ben", signature=given().body["signature"]), "does not verify"),
    "a waiver taken away": (lambda: given(signature=given(waiver=WAIVER).body["signature"]), "does not verify"),
    "a waiver added": (lambda: given(waiver=WAIVER, signature=given().body["signature"]), "does not verify"),
    "a waiver widened": (
        lambda: given(waiver={**WAIVER, "uses": 20}, signature=given(waiver=WAIVER).body["signature"]),
        "does not verify",
    ),
    "another key": (lambda: given(public_key=FidoKey(name="ben").line), "does not verify: the signature is by"),
    "no touch": (lambda: given(flags=0), "was made without a touch of the key"),
    "presence hidden": (lambda: given(user_present=False), "other flags than it has"),
    "verification claimed": (lambda: given(user_verified=True), "other flags than it has"),
    "hardware hidden": (lambda: given(software=True), "other flags than it has"),
    "another digest": (lambda: given(digest="sha256:00"), "has another digest"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_signature_that_was_changed_is_told(name: str) -> None:
    event, words = SPOILED[name]
    found = problems(requested(), event())
    assert any(words in text for text in found), found


def test_a_fingerprint_that_is_not_the_keys_is_told() -> None:
    honest = given()
    changed = Event(honest.kind, honest.actor, {**honest.body, "key": "SHA256:other"})
    assert problems(requested(), changed) == [
        f"the approval of {NAME} by anna is recorded with another key or other flags than it has"
    ]


def test_a_signature_is_recorded_for_its_approver() -> None:
    honest = given()
    assert problems(requested(), Event(honest.kind, "ben", honest.body)) == [
        f"the approval of {NAME} by anna was recorded for ben"
    ]


@pytest.mark.parametrize("kind", ["denied", "withdrawn", "expired", "lapsed", "issued"])
def test_nothing_is_approved_or_issued_after_the_end(kind: str) -> None:
    assert problems(requested(), ended(kind), given()) == [
        f"the approval of {NAME} by anna came after the request was {kind}"
    ]
    assert problems(requested(), given(), ended(kind), issued()) == [
        f"certificate 1 was issued for {NAME} after it was {kind}"
    ]


def test_nothing_is_approved_after_the_request_expired() -> None:
    (problem,) = problems(requested(), given(), at=NOW + 3601)
    assert problem.endswith("came after the request had expired")


def test_one_approval_is_one_certificate() -> None:
    assert problems(requested(), given(), issued(), issued(2)) == [
        f"certificate 2 was issued for {NAME} after it was used"
    ]


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"principals": ["root"]}, "other principals"),
        ({"critical_options": {}}, "other critical_options"),
        ({"extensions": ["permit-pty", "permit-user-rc"]}, "other extensions"),
        ({"valid_before": NOW + 901}, "other ttl"),
        ({"valid_before": NOW + 899}, "other ttl"),
        ({"backdate": 0}, "other ttl"),
        ({"key_id": "root"}, "other key_id"),
        ({"role": "touch"}, "other role"),
        ({"identity": "stranger"}, "other identity"),
        ({"fingerprint": public_key(name="other").fingerprint}, "other public key"),
    ],
)
def test_a_certificate_that_is_not_what_was_signed_is_told(changes: dict[str, Any], words: str) -> None:
    assert any(words in text for text in problems(requested(), given(), issued(**changes)))


@pytest.mark.parametrize(
    "events,words",
    [
        ([requested(), issued()], "names anna, who has given no signature"),
        ([requested(), given("ben", flags=5), issued()], "names anna, who has given no signature"),
        ([issued()], f"names {NAME}, which was never requested"),
        ([given()], f"approves {NAME}, which was never requested"),
        ([requested(), requested()], f"{NAME} was requested before"),
        ([requested(), given(), issued(approved_by=[])], "has 0 of the 1 approvals"),
        ([requested(), given(), issued(approved_by=["agent"])], "names agent, who has given no signature"),
        ([requested(), given("eve"), issued(approved_by=["eve"])], "names eve, whom its policy does not know"),
        ([requested(), given(key="mallory"), issued()], "names anna, whose key by its policy is not SHA256:"),
        ([requested(), given("ben"), issued(approved_by=["ben"])], "without the PIN or fingerprint"),
        ([requested(), given("agent"), issued(approved_by=["agent"])], "has 0 of the 1 approvals"),
        ([requested(identity="anna", kind="human"), given(frozen={**FROZEN, "identity": "anna", "kind": "human"}),
          issued(identity="anna", kind="agent")], "has 0 of the 1 approvals"),
    ],
)  # fmt: skip
def test_a_certificate_without_enough_of_the_right_people_is_told(events: Events, words: str) -> None:
    assert any(words in text for text in problems(*events)), problems(*events)


def test_a_certificate_without_any_approval_is_told_if_its_policy_requires_one() -> None:
    body = {name: value for name, value in issued().body.items() if name not in ("request", "approved_by", "waiver")}
    bare = Event("certificate.issued", "agent", body)
    assert problems(bare) == ["certificate 1 of role prod was issued without an approval"]
    assert audit(bare, policy=None).problems == []


@pytest.mark.parametrize("scope", ["identity:anna", "identity:agent", "role:prod", "all"])
def test_a_freeze_voids_signatures_of_the_identity_and_ends_waivers(scope: str) -> None:
    freeze = Event("freeze.set", "operator", {"scope": scope, "reason": "stolen"})
    found = problems(requested(), given(), freeze, issued())
    assert bool(found) == (scope == "identity:anna")
    under = issued(2, request=None, waiver="w-abcdefghij")
    waived = problems(requested(), given(waiver=WAIVER), freeze, under)
    assert any("names" in text or "was ended" in text for text in waived)


@pytest.mark.parametrize(
    "events,at,words",
    [
        ([given()], NOW, "which an approver has not given"),
        ([given(waiver=WAIVER)], NOW + 7201, "after w-abcdefghij had ended"),
        ([given(waiver=WAIVER), *[Event("waiver.used", "agent", {"waiver": "w-abcdefghij", "serial": "1"})] * 2], NOW,
         "after w-abcdefghij was used up"),
        ([given(waiver=WAIVER), Event("waiver.ended", "anna", {"waiver": "w-abcdefghij", "reason": ""})], NOW,
         "after w-abcdefghij was ended"),
        ([given(waiver=WAIVER), ended("denied", "ben", reason="")], NOW, "after w-abcdefghij was ended"),
    ],
)  # fmt: skip
def test_a_waiver_that_does_not_cover_a_certificate_is_told(events: Events, at: int, words: str) -> None:
    frozen = {**FROZEN, "expires": "2026-11-29T20:00:00Z"}
    again = [
        given(frozen=frozen, waiver=dict(WAIVER) if event.body["waiver"] else None)
        if event.kind == "approval.given"
        else event
        for event in events
    ]
    found = problems(requested(**frozen), *again, issued(2, request=None, waiver="w-abcdefghij"), at=at)
    assert any(words in text for text in found), found


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"principals": ["root"]}, "principals"),
        ({"critical_options": {}}, "critical_options"),
        ({"extensions": ["permit-pty", "permit-user-rc"]}, "extensions"),
        ({"valid_before": NOW + 901}, "ttl"),
        ({"address": "198.51.100.1"}, "address"),
        ({"key_id": "root"}, "key_id"),
    ],
)
def test_a_certificate_that_is_wider_than_its_waiver_is_told(changes: dict[str, Any], words: str) -> None:
    wide = issued(2, request=None, waiver="w-abcdefghij", **changes)
    assert problems(requested(), given(waiver=WAIVER), wide) == [
        f"certificate 2 has other {words} than w-abcdefghij covers"
    ]


@pytest.mark.parametrize(
    "kind", ["approval.requested", "approval.given", "certificate.issued", "waiver.used", "freeze.set"]
)
@pytest.mark.parametrize(
    "body", ["{}", "[]", "nonsense", '{"request":7,"frozen":[],"serial":"1","approved_by":7}', "null"]
)
def test_an_event_that_no_signer_wrote_is_told_and_ends_nothing(kind: str, body: str) -> None:
    auditor = ApprovalAuditor({})
    auditor.take(Entry(1, NOW * 1000, kind, "x", body, "0" * 64, "1" * 64))
    assert [problem.seq for problem in auditor.audit.problems] == [1]


def test_other_events_are_passed_over() -> None:
    auditor = ApprovalAuditor({})
    auditor.take(Entry(1, NOW * 1000, "policy.loaded", "keeper", "nonsense", "0" * 64, "1" * 64))
    assert auditor.audit == Audit()
