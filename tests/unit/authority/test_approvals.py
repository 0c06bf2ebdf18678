"""Requests that wait for humans: each rule, and what tries to break it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from signer.authority import approvals
from signer.authority.incidents import OVERDUE_AFTER
from signer.errors import SignerError
from signer.protocol.commands import Approve, Claim, Deny, ShowRequest
from signer.units import timestamp
from tests.parts import builders
from tests.parts.asking import (
    CLAIM,
    REASON,
    SECRET,
    Asking,
    approval_key,
    approval_line,
    change_identity,
    change_role,
)
from tests.parts.builders import FakeSignatures, caller, public_line

OTHER_KEY = public_line(name="another")


@pytest.fixture
def bench() -> Asking:
    return Asking()


def code(reply: object) -> str:
    assert isinstance(reply, SignerError), reply
    return reply.code


def waiver(bench: Asking, seconds: int = 7200, uses: int = 3) -> dict[str, Any]:
    return {"until": timestamp(int(bench.now) + seconds), "uses": uses}


# --- a request -------------------------------------------------------------------------------------------------------


def test_a_role_that_asks_humans_answers_with_a_request_and_issues_nothing(bench: Asking) -> None:
    shown = bench.request()
    assert shown["state"] == "pending"
    assert shown["may_approve"] == ["anna", "ben", "carl"]
    assert (shown["needs"], shown["presence"], shown["approvals"]) == (1, None, [])
    assert shown["expires"] == timestamp(int(bench.now) + approvals.PENDING_FOR)
    frozen = shown["frozen"]
    assert frozen["binding"] == {"public_key": public_line()}
    assert (frozen["principals"], frozen["ttl"], frozen["reason"]) == (["llmops"], 600, REASON)
    assert len(frozen["nonce"]) == 32
    assert bench.store.kinds()[-1] == "approval.requested"
    assert bench.issued() == []


def test_the_same_ask_is_the_same_request_and_another_one_is_not(bench: Asking) -> None:
    first = bench.request()
    assert bench.request() == first
    assert bench.request(address="192.0.2.99")["request"] == first["request"]
    for change in (
        {"public_key": OTHER_KEY}, {"ttl": 60}, {"principals": ("backup",)}, {"reason": "another one"},
        {"critical_options": (("force-command", "id"),)}, {"claim_sha256": CLAIM}, {"who": "agent-8"},
    ):  # fmt: skip
        assert bench.request(**change)["request"] != first["request"], change


def test_two_equal_asks_of_one_batch_are_one_request(bench: Asking) -> None:
    first, second = bench.ask(bench.sign_command(), bench.sign_command())
    assert first == {**second, "asked_today": 1}
    assert bench.store.kinds().count("approval.requested") == 1


def test_a_policy_refuses_at_once_what_no_human_could_allow(bench: Asking) -> None:
    assert code(bench.request(principals=("root",))) == "principal_not_allowed"
    assert code(bench.request(ttl=3600)) == "ttl_above_max"
    assert code(bench.request(public_key="junk")) == "public_key_truncated"
    assert code(bench.request(public_key="")) == "public_key_missing"
    assert code(bench.request(reason="x" * 10_000)) == "reason_malformed"
    assert code(bench.request(reason="a\x1b[2Jb")) == "reason_malformed"
    assert "approval.requested" not in bench.store.kinds()


def test_only_a_claim_secret_where_no_human_is_asked_is_refused(bench: Asking) -> None:
    assert code(bench.request(role="llmops", public_key="", claim_sha256=CLAIM)) == "public_key_missing"
    assert "certificate" in bench.request(role="llmops", claim_sha256=CLAIM)


def test_a_request_that_nobody_could_approve_is_refused(bench: Asking) -> None:
    for name in ("anna", "ben"):
        bench.use(change_identity(bench.policy, name, approval_keys=()))
    assert bench.request()["may_approve"] == ["carl"]
    assert code(bench.request(role="pair")) == "no_approver"
    bench.freeze("identity:carl")
    assert code(bench.request(ttl=60)) == "no_approver"


def test_requests_are_limited_for_an_identity_and_in_all(bench: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(approvals.MAX_PENDING_OF_IDENTITY):
        bench.request(reason=f"request {number}")
    assert code(bench.request(reason="one more")) == "too_many_pending"
    assert bench.request(reason="request 3")["state"] == "pending"
    monkeypatch.setattr(approvals, "MAX_PENDING", approvals.MAX_PENDING_OF_IDENTITY + 1)
    first = bench.request("agent-8")
    assert code(bench.request("agent-8", reason="one more")) == "too_many_pending"
    bench.withdraw(first, "agent-8")
    assert bench.request("agent-8", reason="one more")["state"] == "pending"


def test_a_thousand_requests_are_listed_in_pages_that_fit(bench: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approvals, "MAX_PENDING_OF_IDENTITY", 1_001)
    for number in range(approvals.MAX_PENDING):
        bench.request(reason=f"{number} {'é' * 400}")
    assert code(bench.request("agent-8")) == "too_many_pending"
    seen: list[str] = []
    before: str | None = None
    while not seen or before is not None:
        page = bench.listed(before=before)
        assert 0 < len(json.dumps(page)) < 384 * 1024
        seen += [row["request"] for row in page["requests"]]
        before = page["before"]
    assert len(set(seen)) == len(seen) == approvals.MAX_PENDING
    assert bench.listed(state="issued")["requests"] == []


def test_a_request_too_long_for_a_human_is_refused(bench: Asking) -> None:
    command = "x" * approvals.MAX_FROZEN
    assert code(bench.request(critical_options=(("force-command", command),))) == "request_too_long"


def test_a_token_in_a_reason_is_hidden_before_the_digest_is_made(bench: Asking) -> None:
    shown = bench.request(reason=f"oops {builders.token('anna')}")
    assert builders.token("anna") not in json.dumps(shown)
    assert bench.approve(shown)["state"] == "approved"
    bench.restart()
    assert bench.show(shown["request"])["frozen"] == shown["frozen"]


# --- who may see what ------------------------------------------------------------------------------------------------


def test_a_request_is_shown_to_its_asker_its_approvers_and_auditors_only(bench: Asking) -> None:
    shown = bench.request()
    for who in ("agent-7", "anna", "ben", "auditor"):
        assert bench.show(shown["request"], who)["request"] == shown["request"], who
    for who in ("agent-8", "dora", "ci", "stranger"):
        assert code(bench.show(shown["request"], who)) == "unknown_request", who
        assert code(bench.claim(shown, who)) == "unknown_request", who
        assert code(bench.withdraw(shown, who)) == "unknown_request", who
        assert code(bench.deny(shown, who)) == "unknown_request", who
    assert [row["request"] for row in bench.listed("agent-8", identity=None)["requests"]] == []
    assert code(bench.listed("agent-8", identity="agent-7")) == "not_permitted"


def test_the_keys_that_may_sign_are_told_to_the_asker_alone(bench: Asking) -> None:
    shown = bench.request("ben", "touch")
    assert shown["presence_keys"] == [approval_line("ben")]
    assert "presence_keys" not in bench.show(shown["request"], "auditor")


# --- approving -------------------------------------------------------------------------------------------------------


def test_an_approved_request_is_claimed_once_with_the_bound_key(bench: Asking) -> None:
    shown = bench.request()
    approved = bench.approve(shown)
    assert (approved["state"], approved["approvals"][0]["by"]) == ("approved", "anna")
    assert approved["claim_by"] == timestamp(int(bench.now) + 600)
    bench.now += 30
    issued = bench.request()
    assert issued["principals"] == ["llmops"]
    record = bench.issued()[0]
    assert record["valid_before"] == int(bench.now) + 600, "the clock of the certificate starts at its claim"
    assert (record["request"], record["approved_by"], record["waiver"]) == (shown["request"], ["anna"], None)
    assert code(bench.claim(shown)) == "request_issued"
    assert bench.show(shown["request"])["serial"] == issued["serial"]
    assert bench.request()["request"] != shown["request"], "one approval, one certificate"
    assert len(bench.issued()) == 1


def test_a_claim_secret_opens_its_request_for_a_fresh_key(bench: Asking) -> None:
    shown = bench.bound()
    assert shown["frozen"]["binding"] == {"claim_sha256": CLAIM}
    assert bench.claim(shown)["state"] == "pending"
    bench.approve(shown)
    assert bench.bound()["state"] == "approved", "asking again is not claiming"
    for secret in (None, "", "00" * 32, SECRET[:-2], SECRET + "00", CLAIM, "zz" * 32):
        assert code(bench.claim(shown, secret=secret)) == "claim_secret_wrong", secret
    assert code(bench.claim(shown, line="junk")) == "public_key_truncated"
    assert bench.claim(shown, line=OTHER_KEY)["key_id"] == "agent-7:prod"
    assert bench.issued()[0]["fingerprint"] == builders.public_key(name="another").fingerprint
    assert code(bench.claim(shown, line=OTHER_KEY)) == "request_issued"


def test_a_key_that_comes_with_a_claim_secret_is_not_bound(bench: Asking) -> None:
    shown = bench.request(claim_sha256=CLAIM)
    assert shown["frozen"]["binding"] == {"claim_sha256": CLAIM}
    bench.approve(shown)
    assert bench.request(claim_sha256=CLAIM)["state"] == "approved"
    assert bench.issued() == []


def test_a_request_is_not_claimed_with_another_key(bench: Asking) -> None:
    shown = bench.request()
    bench.approve(shown)
    assert code(bench.claim(shown, line=OTHER_KEY)) == "claim_key_differs"
    assert code(bench.claim(shown, line=OTHER_KEY, secret=None)) == "claim_key_differs"
    assert "certificate" in bench.claim(shown, secret=None)


def test_no_one_approves_their_own_request(bench: Asking) -> None:
    shown = bench.request("anna", "pair")
    assert "anna" not in shown["may_approve"]
    assert code(bench.approve(shown, "anna")) == "own_request"
    assert code(bench.deny(shown, "anna")) == "own_request"
    bench.approve(shown, "ben")
    assert bench.show(shown["request"])["state"] == "pending"
    assert bench.approve(shown, "carl")["state"] == "approved"


@pytest.mark.parametrize("kind", ["agent", "workload"])
def test_only_a_human_approves_whatever_the_policy_says(bench: Asking, kind: str) -> None:
    rights = {"may": frozenset({"approve", "ledger.read"}), "groups": frozenset({"operators"})}
    keys = (approval_key("agent-8"),)
    bench.use(change_identity(bench.policy, "agent-8", kind=kind, approval_keys=keys, **rights))
    shown = bench.request()
    assert "agent-8" not in shown["may_approve"]
    assert code(bench.approve(shown, "agent-8")) == "approver_not_human"
    assert code(bench.deny(shown, "agent-8")) == "approver_not_human"
    assert bench.show(shown["request"])["state"] == "pending"


def test_a_human_who_became_an_agent_counts_no_more(bench: Asking) -> None:
    shown = bench.request()
    bench.approve(shown)
    bench.use(change_identity(bench.policy, "anna", kind="agent"))
    assert bench.show(shown["request"])["state"] == "pending"
    assert bench.request()["state"] == "pending"
    assert bench.issued() == []


def test_an_approver_needs_the_right_and_a_group_of_the_role(bench: Asking) -> None:
    shown = bench.request()
    bench.use(change_identity(bench.policy, "dora", may=frozenset({"approve", "ledger.read"})))
    assert code(bench.approve(shown, "dora")) == "not_an_approver"
    bench.use(change_identity(bench.policy, "auditor", groups=frozenset({"operators"})))
    assert code(bench.approve(shown, "auditor")) == "not_an_approver"


LOSSES: dict[str, dict[str, Any]] = {
    "the right": {"may": frozenset()},
    "the group": {"groups": frozenset({"guests"})},
    "the key": {"approval_keys": ()},
    "the key for another": {"approval_keys": (approval_key("another"),)},
    "a key that need not be verified": {"approval_keys": (approval_key("anna", verify=True),)},
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_an_approver_who_loses_right_or_key_counts_no_more_at_once(bench: Asking, loss: dict[str, Any]) -> None:
    shown, other = bench.request(), bench.bound("agent-8")
    for request in (shown, other):
        assert bench.approve(request)["state"] == "approved"
    bench.use(change_identity(bench.policy, "anna", **loss))
    assert bench.request()["state"] == "pending"
    assert bench.claim(other, "agent-8")["state"] == "pending"
    assert [row["counts"] for row in bench.show(shown["request"])["approvals"]] == [False]
    assert bench.issued() == []
    assert bench.approve(shown, "ben")["state"] == "approved"
    assert bench.request()["principals"] == ["llmops"]
    assert bench.issued()[0]["approved_by"] == ["ben"]


def test_an_approver_who_is_frozen_counts_no_more_not_even_when_thawed(bench: Asking) -> None:
    shown = bench.request()
    bench.approve(shown, "ben")
    bench.freeze("identity:ben")
    assert bench.request()["state"] == "pending"
    assert code(bench.approve(shown, "ben")) == "frozen"
    assert code(bench.deny(shown, "ben")) == "frozen"
    bench.restart()
    bench.thaw("identity:ben")
    assert bench.request()["state"] == "pending"
    assert bench.approve(shown, "ben")["state"] == "approved"
    assert "certificate" in bench.request()


def test_a_signature_that_a_freeze_ended_is_not_replayed(bench: Asking) -> None:
    """A FIDO key counts its signatures: who has ben's token and his old signature renews nothing after he is thawed."""
    shown = bench.request()
    assert bench.approve(shown, "ben", counter=7)["state"] == "approved"
    bench.freeze("identity:ben")
    bench.restart()
    bench.thaw("identity:ben")
    assert code(bench.approve(shown, "ben", counter=7)) == "signature_replayed"
    assert bench.show(shown["request"])["state"] == "pending"
    assert bench.approve(shown, "ben", counter=8)["state"] == "approved"
    assert [body["counter"] for body in bench.store.bodies("approval.given")] == [7, 8]


def test_a_frozen_asker_claims_nothing(bench: Asking) -> None:
    shown = bench.request()
    bench.approve(shown)
    bench.freeze("identity:agent-7")
    assert code(bench.request()) == "frozen"
    assert code(bench.claim(shown)) == "frozen"
    assert bench.issued() == []


def test_approving_and_denying_twice_is_told_to_the_second(bench: Asking) -> None:
    shown = bench.request("agent-7", "pair")
    bench.approve(shown)
    assert code(bench.approve(shown)) == "already_approved"
    assert bench.approve(shown, "ben")["state"] == "approved"
    late = bench.approve(shown, "carl")
    assert (code(late), late.text) == ("request_approved", f"{shown['request']} is already approved by anna, ben")
    assert code(bench.deny(shown, "carl")) == "request_approved"
    assert code(bench.approve(shown)) == "already_approved"


@pytest.mark.parametrize("first", ["approve", "deny"])
def test_of_an_approval_and_a_denial_at_once_one_wins_and_the_other_learns_it(bench: Asking, first: str) -> None:
    shown = bench.request()
    yes = Approve(caller("anna"), shown["request"], bench.signature(shown), None)
    no = Deny(caller("ben"), shown["request"], "not today")
    won, lost = bench.ask(*((yes, no) if first == "approve" else (no, yes)))
    assert won["state"] == ("approved" if first == "approve" else "denied")
    assert code(lost) == ("request_approved" if first == "approve" else "request_denied")
    if first == "deny":
        assert lost.facts == {"request": shown["request"], "by": "ben", "why": "not today"}


def test_a_denied_request_stays_denied_for_everybody(bench: Asking) -> None:
    shown = bench.request()
    assert bench.deny(shown)["denied"] == {"by": "ben", "why": "not today"}
    assert code(bench.approve(shown)) == "request_denied"
    assert code(bench.claim(shown)) == "request_denied"
    assert code(bench.request()) == "request_denied", "the same ask does not nag"
    bench.now += approvals.PENDING_FOR
    assert bench.request()["state"] == "pending"


def test_a_withdrawn_request_can_be_asked_again(bench: Asking) -> None:
    shown = bench.request()
    assert bench.withdraw(shown)["state"] == "withdrawn"
    assert code(bench.approve(shown)) == "request_withdrawn"
    assert code(bench.claim(shown)) == "request_withdrawn"
    again = bench.request()
    assert again["request"] != shown["request"]
    bench.approve(again)
    bench.withdraw(again)
    assert bench.request()["state"] == "pending", "also an approved one"


# --- signatures ------------------------------------------------------------------------------------------------------


def test_a_statement_that_differs_in_one_field_approves_nothing(bench: Asking) -> None:
    shown, other = bench.request(), bench.request(ttl=60)
    terms = waiver(bench)
    for change in (
        {"request": other["request"]}, {"digest": other["digest"]}, {"approver": "ben"}, {"signed_waiver": terms},
    ):  # fmt: skip
        assert code(bench.approve(shown, **change)) == "signature_wrong", change
    assert code(bench.approve(shown, waiver=terms, signed_waiver=None)) == "signature_wrong"
    longer = {**terms, "uses": 20}
    assert code(bench.approve(shown, waiver=longer, signed_waiver=terms)) == "signature_wrong"
    assert code(bench.approve(shown, "ben", line=approval_line("anna"))) == "approval_key_unknown"
    assert code(bench.one(Approve(caller("anna"), shown["request"], "junk", None))) == "signature_malformed"
    assert bench.show(shown["request"])["approvals"] == []


def test_a_signature_is_good_for_its_own_request_and_time_only(bench: Asking) -> None:
    shown = bench.request()
    signature = bench.signature(shown)
    bench.withdraw(shown)
    again = bench.request()
    assert code(bench.one(Approve(caller("anna"), again["request"], signature, None))) == "signature_wrong"
    assert code(bench.one(Approve(caller("anna"), shown["request"], signature, None))) == "request_withdrawn"


def test_a_signature_without_the_flags_that_its_key_needs_approves_nothing(bench: Asking) -> None:
    shown = bench.request()
    assert code(bench.approve(shown, present=False)) == "signature_without_presence"
    bench.use(change_identity(bench.policy, "anna", approval_keys=(approval_key("anna", verify=True),)))
    assert code(bench.approve(shown)) == "signature_without_verification"
    assert bench.approve(shown, verified=True)["state"] == "approved"


def test_a_plain_key_approves_only_where_its_line_says_so_and_is_named(bench: Asking) -> None:
    plain = approval_key("anna", "ssh-ed25519")
    bench.use(change_identity(bench.policy, "anna", approval_keys=(plain,)))
    shown = bench.request()
    line = approval_line("anna", "ssh-ed25519")
    assert code(bench.approve(shown, line=line)) == "software_key_not_allowed"
    bench.use(change_identity(bench.policy, "anna", approval_keys=(replace(plain, software=True),)))
    assert bench.approve(shown, line=line)["approvals"][0]["software"] is True
    assert bench.store.bodies("approval.given")[0]["software"] is True


def test_a_line_that_allows_software_does_not_excuse_a_fido_key(bench: Asking) -> None:
    bench.use(change_identity(bench.policy, "anna", approval_keys=(approval_key("anna", software=True),)))
    assert code(bench.approve(bench.request(), present=False)) == "signature_without_presence"


def test_the_ledger_keeps_what_proves_an_approval(bench: Asking) -> None:
    shown = bench.request()
    bench.approve(shown)
    asked, given = bench.store.bodies("approval.requested")[0], bench.store.bodies("approval.given")[0]
    assert (asked["frozen"], asked["digest"]) == (shown["frozen"], shown["digest"])
    assert (given["approver"], given["digest"], given["waiver"]) == ("anna", shown["digest"], None)
    assert json.loads(given["signature"])["key"] == given["public_key"] == approval_line("anna")


# --- claims ----------------------------------------------------------------------------------------------------------


def test_a_tightened_policy_wins_at_the_claim(bench: Asking) -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({"max_ttl": 300, "default_ttl": 300}, "ttl_above_max"),
        ({"principals": ("backup",), "default_principals": ("backup",)}, "principal_not_allowed"),
        ({"force_command": "/bin/true"}, "approved_request_differs"),
        ({"source_address": "caller"}, "approved_request_differs"),
        ({"default_extensions": (), "allowed_extensions": frozenset()}, "extension_not_allowed"),
        ({"key_types": frozenset({"ssh-rsa"})}, "key_type_not_allowed"),
    ]
    good = bench.policy
    for number, (change, refused) in enumerate(changes):
        shown = bench.bound(reason=f"request {number}")
        bench.approve(shown)
        bench.use(change_role(good, "prod", **change))
        assert code(bench.claim(shown)) == refused, change
        bench.use(good)
    shown = bench.bound()
    bench.approve(shown)
    bench.use(change_identity(good, "agent-7", roles=frozenset({"llmops"})))
    assert code(bench.claim(shown)) == "role_not_granted"
    assert bench.issued() == []


def test_a_loosened_policy_does_not_widen_what_was_approved(bench: Asking) -> None:
    shown = bench.bound()
    bench.approve(shown)
    wider = {"default_extensions": ("permit-port-forwarding", "permit-pty")}
    allowed = frozenset({"permit-port-forwarding", "permit-pty"})
    bench.use(change_role(bench.policy, "prod", allowed_extensions=allowed, **wider))
    assert code(bench.claim(shown)) == "approved_request_differs"


def test_a_role_that_asks_two_humans_since_needs_the_second(bench: Asking) -> None:
    shown = bench.request()
    bench.approve(shown)
    asks = bench.policy.roles["prod"].approval
    assert asks is not None
    bench.use(change_role(bench.policy, "prod", approval=replace(asks, count=2)))
    assert bench.request()["state"] == "pending"
    bench.approve(shown, "ben")
    assert "certificate" in bench.request()


def test_the_callers_address_counts_only_where_the_role_pins_it(bench: Asking) -> None:
    shown = bench.bound()
    bench.approve(shown)
    assert "certificate" in bench.claim(shown, address="198.51.100.1")
    bench.use(change_role(bench.policy, "prod", source_address="caller"))
    pinned = bench.bound()
    assert pinned["frozen"]["critical_options"] == {"source-address": "192.0.2.7/32"}
    bench.approve(pinned)
    assert code(bench.claim(pinned, address="198.51.100.1")) == "approved_request_differs"
    assert "certificate" in bench.claim(pinned)


def test_limits_count_at_the_claim(bench: Asking) -> None:
    bench.use(change_role(bench.policy, "prod", limits=replace(bench.policy.roles["prod"].limits, live=1)))
    first, second = bench.bound(), bench.bound(reason="the second one")
    for shown in (first, second):
        bench.approve(shown)
    assert "certificate" in bench.claim(first)
    assert code(bench.claim(second)) == "too_many_live"
    assert bench.show(second["request"])["state"] == "approved", "it can be claimed later"
    bench.now += 599
    assert code(bench.claim(second)) == "too_many_live"


def test_two_claims_of_one_batch_get_one_certificate(bench: Asking) -> None:
    shown = bench.bound()
    bench.approve(shown)
    claim = Claim(caller("agent-7"), shown["request"], public_line(), SECRET)
    first, second = bench.ask(claim, claim)
    assert "certificate" in first
    assert code(second) == "request_issued"


# --- time ------------------------------------------------------------------------------------------------------------


def test_a_request_expires_and_an_approval_lapses(bench: Asking) -> None:
    shown, other = bench.request(), bench.bound("agent-8")
    bench.approve(other)
    bench.now += 600
    assert code(bench.claim(other, "agent-8")) == "request_lapsed"
    bench.now += approvals.PENDING_FOR - 600
    assert code(bench.approve(shown)) == "request_expired"
    assert bench.show(shown["request"])["state"] == "expired"
    bench.core.tick()
    assert sorted(bench.store.kinds()[-2:]) == ["approval.expired", "approval.lapsed"]
    bench.core.tick()
    assert bench.store.kinds().count("approval.expired") == 1


def test_a_clock_that_is_set_back_revives_nothing(bench: Asking) -> None:
    shown, other = bench.request(), bench.bound("agent-8")
    bench.approve(other)
    bench.now += approvals.PENDING_FOR
    bench.core.tick()
    bench.now -= 50
    bench.restart()
    assert code(bench.claim(other, "agent-8")) == "request_lapsed"
    assert code(bench.approve(shown)) == "request_expired"
    bench.now -= approvals.PENDING_FOR
    assert code(bench.approve(shown)) == "clock_behind"
    assert code(bench.request(ttl=60)) == "clock_behind"


def test_a_clock_that_jumps_ahead_ends_requests_and_issues_nothing(bench: Asking) -> None:
    shown = bench.request()
    bench.approve(shown)
    bench.now += 10**6
    assert bench.request()["request"] != shown["request"]
    assert code(bench.claim(shown)) == "request_lapsed"
    assert bench.issued() == []


def test_ended_requests_are_shown_for_a_day(bench: Asking) -> None:
    shown = bench.request()
    bench.deny(shown)
    bench.now += approvals.KEPT_FOR - 1
    bench.core.tick()
    assert bench.show(shown["request"])["state"] == "denied"
    assert bench.request()["asked_today"] == 2
    bench.now += 2
    bench.core.tick()
    assert code(bench.show(shown["request"])) == "unknown_request"
    bench.restart()
    assert code(bench.show(shown["request"])) == "unknown_request"


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fail", ["before", "after"])
def test_what_the_disk_did_not_take_did_not_happen(bench: Asking, fail: str) -> None:
    shown = bench.bound()
    steps: list[Any] = [
        Approve(caller("anna"), shown["request"], bench.signature(shown), None),
        Claim(caller("agent-7"), shown["request"], public_line(), SECRET),
        ShowRequest(caller("agent-7"), shown["request"]),
        bench.sign_command(reason="another one"),
        bench.sign_command(reason="another one"),
    ]
    bench.store.fail = fail
    assert {code(reply) for reply in bench.ask(*steps)} == {"ledger_unavailable"}
    bench.store.fail = ""
    state = bench.show(shown["request"])["state"]
    assert state == ("pending" if fail == "before" else "issued")
    if fail == "after":
        assert code(bench.claim(shown)) == "request_issued", "at worst a certificate that nobody received"


def test_a_restart_at_every_point_of_a_life_changes_nothing() -> None:
    told: list[str] = []
    for restarts in (False, True):
        bench = Asking()
        shown = bench.bound("agent-7", "pair")
        story: list[Any] = [
            lambda b, s: b.approve(s, "anna", waiver(b)),
            lambda b, s: b.bound("agent-7", "pair"),
            lambda b, s: b.approve(s, "ben", waiver(b, 3600, 2)),
            lambda b, s: b.claim(s),
            lambda b, s: b.claim(s),
            lambda b, s: b.request("agent-7", "pair"),
            lambda b, s: b.waivers(),
            lambda b, s: b.request("agent-7", "pair", ttl=60),
            lambda b, s: b.request("agent-7", "pair"),
            lambda b, s: b.listed(),
        ]
        replies: list[Any] = []
        for step in story:
            bench.now += 1
            if restarts:
                bench.restart()
            reply = step(bench, shown)
            replies.append(repr(reply) if isinstance(reply, SignerError) else reply)
            if isinstance(reply, dict) and "certificate" in reply:
                replies[-1] = reply["serial"]
        told.append(scrubbed(replies))
    assert told[0] == told[1]


def scrubbed(value: object) -> str:
    """Without what is random: the two cores drew other numbers."""
    text = json.dumps(value)
    for found in sorted(set(re.findall(r"[rw]-[a-z2-7]{10}|[0-9a-f]{32,64}", text))):
        text = text.replace(found, "X")
    return text


# --- the asker's own signature ---------------------------------------------------------------------------------------


def test_a_role_with_presence_asks_a_human_for_their_own_signature(bench: Asking) -> None:
    shown = bench.request("ben", "touch")
    assert (shown["needs"], shown["presence"], shown["may_approve"]) == (0, "missing", ["anna", "carl"])
    assert code(bench.approve(shown, "anna")) == "request_approved", "another's signature is not asked for"
    assert code(bench.approve(shown, "ben", line=approval_line("anna"))) == "approval_key_unknown"
    assert code(bench.approve(shown, "ben", present=False)) == "signature_without_presence"
    signed = bench.approve(shown, "ben")
    assert (signed["state"], signed["presence"]) == ("approved", "given")
    assert bench.request("ben", "touch")["principals"] == ["llmops"]
    assert bench.issued()[0]["approved_by"] == ["ben"]
    assert code(bench.request("auditor", "touch")) == "approval_key_missing"


def test_presence_is_in_addition_to_the_approval_of_others(bench: Asking) -> None:
    asks = bench.policy.roles["pair"].approval
    bench.use(change_role(bench.policy, "pair", presence=True, approval=asks))
    shown = bench.request("ben", "pair")
    assert (shown["needs"], shown["presence"]) == (2, "missing")
    bench.approve(shown, "anna")
    bench.approve(shown, "ben")
    assert bench.show(shown["request"])["state"] == "pending", "their own signature is not one of the two"
    assert bench.approve(shown, "carl")["state"] == "approved"


def test_an_agent_has_no_presence(bench: Asking) -> None:
    shown = bench.request("agent-7", "touch")
    assert (shown["needs"], shown["presence"]) == (1, None)
    assert code(bench.approve(shown, "agent-7")) == "approver_not_human"


# --- waivers ---------------------------------------------------------------------------------------------------------


def test_a_waiver_covers_the_same_certificates_and_is_counted(bench: Asking) -> None:
    shown = bench.request()
    approved = bench.approve(shown, waiver=waiver(bench, uses=2))
    assert approved["approvals"][0]["waiver"] == waiver(bench, uses=2)
    (row,) = bench.waivers()
    assert (row["waiver"], row["by"], row["uses"], row["used"]) == ("w-" + shown["request"][2:], ["anna"], 2, 0)
    assert "certificate" in bench.request(), "under the waiver or the approval"
    bench.now += 61
    for _ in range(2):
        assert "certificate" in bench.request(public_key=OTHER_KEY)
    assert bench.request(public_key=OTHER_KEY)["state"] == "pending"
    named = [record["waiver"] for record in bench.issued()]
    assert named.count(row["waiver"]) == 2
    assert bench.waivers() == []


def test_a_waiver_makes_a_request_with_a_claim_secret_ready_at_once(bench: Asking) -> None:
    bench.approve(bench.request(), waiver=waiver(bench, uses=1))
    shown, other = bench.bound(), bench.bound(reason="and another")
    assert (shown["state"], shown["waiver"][:2]) == ("approved", "w-")
    assert "certificate" in bench.claim(shown)
    assert bench.claim(other)["state"] == "pending", "its one use is over"
    assert bench.store.bodies("approval.issued")[0]["waiver"] == shown["waiver"]


OUTSIDE: dict[str, dict[str, Any]] = {
    "another identity": {"who": "agent-8"},
    "another role": {"role": "strict"},
    "more principals": {"principals": ("backup", "llmops")},
    "another command": {"critical_options": (("force-command", "id"),)},
    "another address": {"address": "198.51.100.1"},
    "a longer life": {"ttl": 700},
}


@pytest.mark.parametrize("change", OUTSIDE.values(), ids=OUTSIDE)
def test_a_waiver_covers_nothing_else(bench: Asking, change: dict[str, Any]) -> None:
    bench.approve(bench.request(), waiver=waiver(bench))
    assert "certificate" in bench.request()
    assert bench.request(**change)["state"] == "pending"
    assert [record["waiver"] for record in bench.issued()] == [None]
    assert "certificate" in bench.request()


def test_a_waiver_for_a_forced_command_covers_no_shell(bench: Asking) -> None:
    shown = bench.request(critical_options=(("force-command", "uptime"),))
    bench.approve(shown, waiver=waiver(bench))
    assert bench.request()["state"] == "pending"


def test_a_waiver_has_bounds(bench: Asking) -> None:
    for seconds, uses in ((4 * 3600 + 1, 1), (0, 1), (-60, 1), (60, 0), (60, 21), (60, -1)):
        assert code(bench.approve(bench.request(), waiver=waiver(bench, seconds, uses))) == "waiver_malformed"
    for until in ("2099-01-01T00:00:00Z", "2027-02-30T00:00:00Z", "2027-01-15T09:00:00+00:00", "soon", ""):
        assert code(bench.approve(bench.request(), waiver={"until": until, "uses": 1})) == "waiver_malformed", until
    assert bench.approve(bench.request(), waiver=waiver(bench, 4 * 3600, 20))["state"] == "approved"


@pytest.mark.parametrize("who, role", [("agent-7", "strict"), ("ben", "glass"), ("ben", "touch")])
def test_no_waiver_where_the_role_takes_none(bench: Asking, who: str, role: str) -> None:
    shown = bench.request(who, role)
    approver = "anna" if who == "agent-7" else who
    assert code(bench.approve(shown, approver, waiver=waiver(bench))) == "waiver_not_allowed"


def test_a_waiver_of_two_humans_is_what_both_signed(bench: Asking) -> None:
    shown = bench.request("agent-7", "pair")
    bench.approve(shown, "anna", waiver(bench, 3600, 9))
    bench.approve(shown, "ben")
    assert bench.waivers() == [], "one of them gave none"
    other = bench.request("agent-8", "pair")
    bench.approve(other, "anna", waiver(bench, 3600, 9))
    assert bench.waivers() == [], "not yet"
    bench.approve(other, "ben", waiver(bench, 7200, 2))
    (row,) = bench.waivers()
    assert (row["until"], row["uses"], row["by"]) == (timestamp(int(bench.now) + 3600), 2, ["anna", "ben"])


def test_a_waiver_ends_with_its_time(bench: Asking) -> None:
    shown = bench.request()
    bench.approve(shown, waiver=waiver(bench, 1800))
    bench.now += 1799
    bench.core.tick()
    assert "certificate" in bench.request()
    bench.now += 1
    assert bench.request()["state"] == "pending"


ENDINGS: dict[str, Any] = {
    "it is ended": lambda b: b.end_waiver(b.waivers()[0]["waiver"]),
    "the asker ends it": lambda b: b.end_waiver(b.waivers()[0]["waiver"], "agent-7"),
    "the approver is frozen": lambda b: b.freeze("identity:ben"),
    "the asker is frozen": lambda b: b.freeze("identity:agent-7"),
    "the role is frozen": lambda b: b.freeze("role:prod"),
    "everything is frozen": lambda b: b.freeze("all"),
    "the approver loses the right": lambda b: b.use(change_identity(b.policy, "ben", may=frozenset())),
    "the approver loses the key": lambda b: b.use(change_identity(b.policy, "ben", approval_keys=())),
    "the role changes": lambda b: b.use(change_role(b.policy, "prod", max_ttl=899)),
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_a_waiver_ends_at_once_and_for_good(bench: Asking, ending: Any) -> None:
    good = bench.policy
    bench.approve(bench.request(), "ben", waiver(bench))
    assert len(bench.waivers()) == 1
    ending(bench)
    assert bench.waivers() == []
    for scope in dict(bench.store.frozen):
        bench.thaw(scope)
    bench.use(good)
    for _ in range(2):
        assert bench.waivers() == []
        shown = bench.request(public_key=OTHER_KEY)
        assert shown["state"] == "pending"
        bench.restart()
    assert bench.issued() == []


def test_a_start_with_another_policy_ends_a_waiver_for_good(bench: Asking) -> None:
    good = bench.policy
    bench.approve(bench.request(), "ben", waiver(bench))
    bench.restart()
    assert len(bench.waivers()) == 1
    bench.policy = change_identity(good, "ben", approval_keys=())
    bench.restart()
    assert bench.store.bodies("waiver.ended")[0]["reason"] == "the policy changed"
    bench.policy = good
    bench.restart()
    assert bench.waivers() == []
    assert bench.request(public_key=OTHER_KEY)["state"] == "pending"
    assert len(bench.store.bodies("waiver.ended")) == 1


def test_half_of_a_waiver_survives_a_restart(bench: Asking) -> None:
    shown = bench.request("agent-7", "pair")
    bench.approve(shown, "anna", waiver(bench))
    bench.restart()
    bench.approve(shown, "ben", waiver(bench))
    assert len(bench.waivers()) == 1


def test_only_those_who_could_give_a_waiver_end_it(bench: Asking) -> None:
    bench.approve(bench.request(), "ben", waiver(bench))
    name = bench.waivers()[0]["waiver"]
    for who in ("agent-8", "dora"):
        assert bench.waivers(who) == []
        assert code(bench.end_waiver(name, who)) == "unknown_waiver"
    assert code(bench.end_waiver(name, "auditor")) == "not_an_approver"
    assert len(bench.waivers()) == 1
    assert bench.end_waiver(name, "carl") == {"waiver": name, "ended": True}
    assert code(bench.end_waiver(name, "carl")) == "unknown_waiver"


def test_certificates_of_a_waiver_count_towards_limits(bench: Asking) -> None:
    bench.use(change_role(bench.policy, "prod", limits=replace(bench.policy.roles["prod"].limits, per_minute=1)))
    bench.approve(bench.request(), waiver=waiver(bench))
    assert "certificate" in bench.request()
    assert code(bench.request(public_key=OTHER_KEY)) == "rate_limited"


# --- break-glass -----------------------------------------------------------------------------------------------------


def test_break_glass_takes_a_humans_own_signature_and_opens_an_incident(bench: Asking) -> None:
    shown = bench.request("dora", "glass")
    assert (shown["needs"], shown["presence"], shown["state"]) == (0, "missing", "pending")
    assert bench.claim(shown, "dora")["state"] == "pending"
    assert bench.issued() == []
    bench.approve(shown, "dora")
    serial = bench.request("dora", "glass")["serial"]
    (row,) = bench.incidents()
    assert (row["identity"], row["serial"], row["reason"], row["closed"]) == ("dora", serial, REASON, None)
    assert bench.core.incidents() == (1, 0)


@pytest.mark.parametrize("who", ["agent-7", "ci"])
def test_break_glass_is_for_humans_only(bench: Asking, who: str) -> None:
    assert code(bench.request(who, "glass")) == "break_glass_humans_only"
    assert code(bench.bound(who, "glass")) == "break_glass_humans_only"


def test_break_glass_needs_a_reason_and_is_short(bench: Asking) -> None:
    assert code(bench.request("dora", "glass", reason=None)) == "break_glass_reason_too_short"
    assert code(bench.request("dora", "glass", reason="  " + "x" * 19 + "  ")) == "break_glass_reason_too_short"
    bench.use(change_role(bench.policy, "glass", max_ttl=3600))
    assert code(bench.request("dora", "glass", ttl=901)) == "break_glass_too_long"
    assert bench.request("dora", "glass", ttl=900)["state"] == "pending"


def test_the_signature_of_another_breaks_no_glass(bench: Asking) -> None:
    shown = bench.request("dora", "glass")
    assert code(bench.approve(shown, "anna")) == "request_approved"
    signature = bench.signature(shown, "anna", approver="dora")
    assert code(bench.one(Approve(caller("dora"), shown["request"], signature, None))) == "approval_key_unknown"
    assert bench.show(shown["request"])["state"] == "pending"


def test_an_incident_closes_with_a_commit_only_and_by_a_human(bench: Asking) -> None:
    break_glass(bench)
    name = bench.incidents()[0]["incident"]
    for reference in ("done", "4a1f", "4A1F09C", "x" * 40, "4a1f09c ", "https://git.example.org/c/main"):
        assert code(bench.close(name, reference)) == "incident_reference_malformed", reference
    assert code(bench.close(name, who="agent-7")) == "unknown_incident"
    bench.use(change_identity(bench.policy, "ci", may=frozenset({"operate"})))
    assert code(bench.close(name, who="ci")) == "approver_not_human"
    closed = bench.close(name, "https://git.example.org/c/4a1f09cdd3", "dora")
    assert closed["closed"]["by"] == "dora"
    assert code(bench.close(name)) == "incident_closed"
    assert bench.incidents() == []
    assert bench.incidents(also_closed=True)[0]["closed"]["reference"].endswith("4a1f09cdd3")
    bench.restart()
    assert bench.incidents() == []


def test_an_incident_open_for_too_long_costs_the_next_one_a_second_human(bench: Asking) -> None:
    break_glass(bench)
    bench.now += OVERDUE_AFTER - 1
    assert (bench.core.incidents(), bench.core.warnings()) == ((1, 0), [])
    shown = bench.request("dora", "glass")
    bench.approve(shown, "dora")
    assert bench.show(shown["request"])["state"] == "approved"
    bench.now += 1
    bench.restart()
    assert bench.core.incidents() == (1, 1)
    (warning,) = bench.core.warnings()
    assert "dora" not in warning, "everybody may read it"
    assert bench.incidents()[0]["overdue"] is True
    waiting = bench.request("dora", "glass")
    assert (waiting["state"], waiting["needs"], waiting["request"]) == ("pending", 1, shown["request"])
    assert bench.request("anna", "glass")["needs"] == 0, "the same person only"
    assert code(bench.approve(shown, "dora")) == "already_approved"
    assert bench.approve(shown, "ben")["state"] == "approved"
    assert "certificate" in bench.request("dora", "glass")
    for row in bench.incidents():
        bench.close(row["incident"])
    assert bench.request("dora", "glass")["needs"] == 0


def break_glass(bench: Asking, who: str = "dora") -> None:
    bench.approve(bench.request(who, "glass"), who)
    assert "certificate" in bench.request(who, "glass")


def test_signatures_of_tests_are_no_signatures_of_others() -> None:
    with pytest.raises(SignerError):
        FakeSignatures().verify(FakeSignatures.make(public_line(), b"a"), b"b", builders.public_key())
