"""What humans are told: each event in words, once, with no text of a caller's that could mislead a reader."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from signer.authority.incidents import OVERDUE_AFTER
from signer.authority.notices import (
    NOTICED,
    REPEATED,
    REPEATED_EVERY,
    Fault,
    LastingFaults,
    shown,
    token_notices,
)
from signer.model import Event
from signer.policy.tokens import token_id
from signer.protocol.notices import Notice
from signer.units import timestamp
from tests.parts.asking import Asking

HUMANS = ("agent-7", "anna", "ben", "carl")


@pytest.fixture
def bench() -> Asking:
    bench = Asking()
    bench.core.keep_noticed()
    return bench


def told(bench: Asking) -> list[Notice]:
    """The notices of everything that was recorded since the last call."""
    made = [bench.core.notice_of(entry) for entry in bench.core.take_noticed()]
    return [notice for notice in made if notice is not None]


def record(bench: Asking, kind: str, body: dict[str, Any], actor: str = "anna") -> list[Notice]:
    assert bench.core.record([Event(kind, actor, body)]) is None
    return told(bench)


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_request_names_who_asks_what_why_and_everybody_who_may_decide(bench: Asking) -> None:
    request = bench.request(critical_options=(("force-command", "uptime"),))
    (notice,) = told(bench)
    assert notice.title == "agent-7 asks for role prod"
    assert notice.details == (
        "certificate for llmops, 10m, from 192.0.2.7",
        "only command: uptime",
        "reason: the database is down, ticket 812",
        "may approve: anna, ben, carl",
        f"until {request['expires']}: `signer requests approve {request['request']}`, or the console",
    )
    assert (notice.concerns, notice.request, notice.urgency) == (HUMANS, request["request"], "high")


def test_asking_again_tells_nothing_again(bench: Asking) -> None:
    bench.request()
    assert len(told(bench)) == 1
    bench.request()
    assert told(bench) == []


def test_the_decision_is_told_to_the_asker_and_to_all_approvers_once(bench: Asking) -> None:
    request = bench.request()
    told(bench)
    bench.approve(request, "anna")
    (notice,) = told(bench)
    assert notice.title == "prod for agent-7: approved by anna"
    assert (notice.concerns, notice.tells_age) == (HUMANS, True), "who decided is told, too"
    assert "claimed" not in notice.title
    bench.request()
    assert bench.issued(), "it is claimed by asking again"
    assert told(bench) == [], "nobody has to know that it was claimed"


def test_each_of_two_approvals_is_told_with_what_is_missing(bench: Asking) -> None:
    request = bench.request(role="pair")
    (asked,) = told(bench)
    assert "may approve: anna, ben, carl, 2 of them" in asked.details
    bench.approve(request, "anna")
    first = [notice.title for notice in told(bench)]
    bench.now += 3
    bench.approve(request, "ben")
    second = [notice.title for notice in told(bench)]
    assert first == ["pair for agent-7: 1 of 2 approvals, by anna"]
    assert second == ["pair for agent-7: approved by anna, ben"]


def test_a_notice_that_is_made_later_says_what_was_true_at_its_event(bench: Asking) -> None:
    request = bench.request(role="pair")
    bench.approve(request, "anna")
    bench.now += 3
    bench.approve(request, "ben")
    titles = [notice.title for notice in told(bench)]
    assert titles[1:] == ["pair for agent-7: 1 of 2 approvals, by anna", "pair for agent-7: approved by anna, ben"]


def test_a_denial_says_who_and_why_and_a_withdrawal_and_an_end_close_it_too(bench: Asking) -> None:
    bench.deny(bench.request(), "ben", "not today")
    bench.withdraw(bench.request(reason="second"))
    bench.request(reason="third")
    approved = bench.bound(reason="fourth")
    bench.approve(approved)
    bench.now += 3_601
    bench.core.tick()
    titles = [notice.title for notice in told(bench) if notice.kind != "approval.requested"]
    assert titles == [
        "prod for agent-7: denied by ben: not today",
        "prod for agent-7: withdrawn by agent-7",
        "prod for agent-7: approved by anna",
        "prod for agent-7: expired, not approved in time",
        "prod for agent-7: lapsed, approved and not claimed in time",
    ]


def test_a_waiver_is_told_with_its_terms(bench: Asking) -> None:
    request = bench.request()
    told(bench)
    until = timestamp(int(bench.now) + 7200)
    bench.approve(request, waiver={"until": until, "uses": 3})
    (notice,) = told(bench)
    assert f"and the same ask until {until}, 3 times" in notice.details


def test_a_request_that_waits_for_its_own_asker_only_tells_nobody(bench: Asking) -> None:
    request = bench.bound("anna", "glass", reason="the database is down at night")
    assert request["state"] == "pending"
    assert told(bench) == []
    bench.approve(request, "anna")
    assert told(bench) == []


# --- incidents, freezes, refusals ------------------------------------------------------------------------------------


def test_break_glass_is_told_to_everybody_with_its_reason(bench: Asking) -> None:
    request = bench.bound("anna", "glass", reason="the database is down at night")
    bench.approve(request, "anna")
    bench.claim(request, "anna")
    (opened,) = told(bench)
    assert opened.title == "break-glass: anna has a certificate for role glass"
    assert (opened.urgency, opened.concerns) == ("urgent", ())
    assert "reason: the database is down at night" in opened.details
    (incident,) = bench.incidents()
    bench.now += OVERDUE_AFTER
    bench.close(incident["incident"])
    (closed,) = told(bench)
    assert closed.title == f"{incident['incident']} closed by anna"


def test_a_freeze_and_its_end_are_told(bench: Asking) -> None:
    bench.freeze("identity:agent-7")
    bench.thaw("identity:agent-7")
    set_, lifted = told(bench)
    assert (set_.title, set_.details) == ("identity:agent-7 is frozen by anna", ("reason: drill", "until lifted"))
    assert lifted.title == "identity:agent-7 is no longer frozen: lifted by anna"


def test_a_revocation_is_told(bench: Asking) -> None:
    (notice,) = record(bench, "certificates.revoked", {"by": "identity", "name": "agent-7", "reason": "stolen"})
    assert (notice.title, notice.details) == (
        "certificates revoked by anna",
        ("by identity name agent-7", "reason: stolen"),
    )


def refusals(code: str, count: int) -> dict[str, Any]:
    return {"code": code, "role": "prod", "address": "192.0.2.9", "count": count, "since": 0}


def test_repeated_refusals_are_told_once_an_hour_and_a_few_are_not(bench: Asking) -> None:
    assert record(bench, "refusals.repeated", refusals("frozen", REPEATED - 1), "agent-7") == []
    (notice,) = record(bench, "refusals.repeated", refusals("frozen", REPEATED), "agent-7")
    assert notice.title == f"agent-7 was refused {REPEATED} times within a minute: frozen"
    assert record(bench, "refusals.repeated", refusals("frozen", 999), "agent-7") == []
    assert len(record(bench, "refusals.repeated", refusals("token_unknown", 999), "nobody")) == 1
    bench.now += REPEATED_EVERY
    assert len(record(bench, "refusals.repeated", refusals("frozen", 999), "agent-7")) == 1


def test_the_same_event_has_the_same_notice_again(bench: Asking) -> None:
    bench.core.record([Event("refusals.repeated", "agent-7", refusals("frozen", 99))])
    (entry,) = bench.core.take_noticed()
    assert bench.core.notice_of(entry) == bench.core.notice_of(entry) is not None


def test_other_events_are_not_kept_for_notices(bench: Asking) -> None:
    bench.request(role="llmops")
    assert bench.issued()
    assert bench.core.take_noticed() == []
    assert "certificate.issued" not in NOTICED


def test_without_notices_nothing_is_kept() -> None:
    bench = Asking()
    bench.request()
    assert bench.core.take_noticed() == []


def test_an_event_of_a_request_that_is_forgotten_tells_nothing(bench: Asking) -> None:
    assert record(bench, "approval.expired", {"request": "r-aaaaaaaaaa"}, "keeper") == []


# --- texts of callers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a\x1b[2Jb\nc\r\0d", "a\\x1b[2Jb\\nc\\r\\x00d"),
        ("\u202etxt.exe\u2066", "\\u202etxt.exe\\u2066"),
        ("see https://evil.example/approve", "see https[:]//evil.example/approve"),
        ("x" * 1000, "x" * 299 + "…"),
    ],
)
def test_a_callers_text_is_one_printable_line_without_addresses(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_a_token_in_a_text_is_hidden() -> None:
    assert "hvs.CAESIJ" not in shown("use hvs.CAESIJ0123456789012345678901234567890123456789")


# --- the state of the service ----------------------------------------------------------------------------------------


def test_a_fault_is_told_when_it_begins_and_when_it_ends_with_its_duration() -> None:
    faults = LastingFaults()
    disk = Fault("no certificate is issued: the disk is full", "free space", "urgent")
    (begun,) = faults.update({"ledger_unavailable": disk}, 1_000)
    assert (begun.title, begun.details, begun.urgency) == (disk.text, ("free space",), "urgent")
    assert faults.update({"ledger_unavailable": replace(disk, text="another text")}, 1_010) == []
    (again,) = faults.begun(1_130)  # for a process that connects while it lasts
    assert again.id == begun.id
    assert again.at == 1_130, "an old one would be given up: it is told that the fault lasts now"
    assert again.details == ("free space", "since 1970-01-01T00:16:40Z")
    (over,) = faults.update({}, 1_130)
    assert over.title == "over after 2m: no certificate is issued: the disk is full"
    assert over.id != begun.id
    assert faults.update({}, 1_140) == faults.begun(1_140) == []


def test_the_end_of_an_identitys_last_token_is_told_in_two_stages(bench: Asking) -> None:
    now = int(bench.now)
    token = next(token for token in bench.policy.tokens.values() if token.identity == "ci")
    others = {digest: one for digest, one in bench.policy.tokens.items() if one.identity != "ci"}

    def policy(*ends: int) -> Any:
        tokens = {**others, **{f"{index:064x}": replace(token, sha256=f"{index:064x}", expires=now + end)
                               for index, end in enumerate(ends)}}  # fmt: skip
        return replace(bench.policy, tokens=MappingProxyType(tokens))

    assert token_notices(policy(30 * 86_400), now) == []
    assert token_notices(policy(86_400, 300 * 86_400), now) == [], "a newer one has taken its place"
    assert token_notices(policy(-5), now) == []
    (week,) = token_notices(policy(6 * 86_400), now)
    assert week.title == "the last token of ci ends in 6 days"
    (day,) = token_notices(policy(3_600), now)
    assert day.id != week.id
    assert token_notices(policy(3_600), now + 60)[0].id == day.id
    assert token_id(replace(token, sha256="0" * 64)) in day.id
