"""What the keeper knows of itself: gauges, and the reply to `signer status`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from signer.authority.core import StateOverview
from signer.authority.limits import CertificateUsage
from signer.errors import Unavailable
from signer.ledger.marks import Mark
from signer.model import Head, Token
from signer.policy.tokens import ENDS_SOON
from signer.protocol.replies import Status, decode_reply, encode_reply
from signer.service.metrics import Metrics, commit_histogram
from signer.service.overview import MAX_ROWS, Overview
from signer.service.publisher import ListState
from tests.parts.keeper_replies import BEGAN, overview


def gauges(of: Overview, *, by_role: bool = True) -> dict[str, float]:
    text = Metrics(of.gauges, tuple, commit_histogram()).render(by_role=by_role)
    return {
        f"{sample.name}{''.join(sample.labels.values()) and '/'}{''.join(sample.labels.values())}": sample.value
        for family in text_string_to_metric_families(text)
        if family.type == "gauge"
        for sample in family.samples
    }


def test_gauges_count_what_is_in_memory() -> None:
    found = gauges(overview(frozen=True))
    assert found["signer_live_certificates/llmops"] == 3
    assert found["signer_live_certificates/deploy"] == 0
    assert "signer_live_certificates/gone" not in found  # a role that policy.toml no longer has
    assert (found["signer_freezes"], found["signer_ledger_events"], found["signer_ledger_bytes"]) == (1, 4711, 123_456)
    assert found["signer_token_expires_timestamp_seconds/operator"] == BEGAN + 90 * 86_400
    assert (found["signer_key_age_seconds"], found["signer_policy_age_seconds"]) == (640, 630)


def test_the_end_of_an_identity_is_that_of_its_last_token() -> None:
    given = overview()
    more = {**given.policy.tokens, "c" * 64: Token("deploy-agent", "c" * 64, BEGAN + 500)}
    found = gauges(replace(given, policy=replace(given.policy, tokens=more)))
    assert found["signer_token_expires_timestamp_seconds/deploy-agent"] == BEGAN + 86_400


def test_without_the_ledger_its_gauges_are_missing_and_not_zero() -> None:
    found = gauges(overview(has_state=False))
    assert "signer_freezes" not in found
    assert "signer_ledger_events" not in found
    assert [name for name in found if "live" in name] == []
    assert "signer_ledger_bytes" in found


def test_totals_name_no_identity_and_have_the_earliest_end() -> None:
    found = gauges(overview(live=2), by_role=False)
    assert found["signer_live_certificates"] == 2
    assert found["signer_token_expires_timestamp_seconds"] == BEGAN + 86_400


def test_a_status_has_tokens_that_end_soon_and_comes_back_as_it_was() -> None:
    given = overview(frozen=True)
    status = given.status("SHA256:x", None)
    assert decode_reply(encode_reply(status)) == status
    assert [(row.identity, row.id) for row in status.tokens] == [("deploy-agent", "4a" * 6)]
    later = replace(given, now=BEGAN + 90 * 86_400 - ENDS_SOON)
    assert [row.identity for row in later.status(None, None).tokens] == ["deploy-agent", "operator"]
    assert [(row.scope, row.by, row.until) for row in status.freezes] == [("role:deploy", "operator", None)]
    assert {row.role: row.count for row in status.live} == {"llmops": 3, "gone": 1}


@pytest.mark.parametrize("age, late", [(0, (False, False)), (3_600, (False, False)), (3_601, (False, True)),
                                       (7 * 86_400, (False, True)), (7 * 86_400 + 1, (True, True))])  # fmt: skip
def test_a_status_says_whether_verification_and_cosignature_are_late(age: int, late: tuple[bool, bool]) -> None:
    mark = Mark(9, BEGAN + 640 - age)
    ledger = replace(overview(), verified=mark, cosigned=mark).status(None, None).ledger
    assert ledger is not None
    assert ledger.verified is not None
    assert ledger.cosigned is not None
    assert (ledger.verified.late, ledger.cosigned.late) == late


@pytest.mark.parametrize(
    "version, wanted, behind", [(None, 3, False), (3, 3, False), (3, 4, True), (3, None, False), (4, 3, True)]
)
def test_a_status_says_whether_the_list_is_behind(version: int | None, wanted: int | None, behind: bool) -> None:
    status = replace(overview(), published=ListState(version, BEGAN, wanted)).status(None, None)
    assert status.revocation_list.behind is behind


def test_a_status_says_what_prevents_signing() -> None:
    status = overview(has_state=False).status(None, Unavailable("clock_behind", "late", "correct it", {"x": object()}))
    assert (status.ledger, status.live, status.freezes) == (None, [], [])
    assert status.fault is not None
    assert (status.fault.code, status.fault.text, status.fault.hint) == ("clock_behind", "late", "correct it")
    assert isinstance(decode_reply(encode_reply(status)), Status)


def test_a_status_fits_into_one_message() -> None:
    many = {f"role-{number}": 1 for number in range(MAX_ROWS * 3)}
    state = StateOverview(Head(1, "h", 0), many, {})
    status = replace(overview(), state=state).status(None, None)
    assert len(status.live) == MAX_ROWS


def test_live_certificates_are_counted_by_role_without_those_that_have_ended() -> None:
    usage = CertificateUsage()
    for identity, role, ends in (("a", "x", 200), ("b", "x", 300), ("a", "y", 100), ("a", "x", 150)):
        usage.add(identity, role, 50, ends)
    assert usage.live_by_role(50) == {"x": 3, "y": 1}
    assert usage.live_by_role(150) == {"x": 2, "y": 0}
    usage.withhold("a", "x", 50, 200)
    assert usage.live_by_role(150) == {"x": 1, "y": 0}
