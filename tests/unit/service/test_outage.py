"""An outage of the whole service: one line when it begins, one when it ends."""

from __future__ import annotations

import logging

import pytest

from signer.error_catalogue import find_entry
from signer.errors import Refused, Unavailable
from signer.protocol.log_limit import LogLimit
from signer.service.outage import OUTAGES, Outage
from tests.parts.clock import Clock

FULL = Unavailable("ledger_unavailable", "the ledger cannot be used: disk is full", "free disk space")
DOWN = Unavailable("vault_down", "Vault cannot be reached", "start Vault")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def outage(clock: Clock) -> Outage:
    return Outage(LogLimit(logging.getLogger("signer.keeper"), clock), clock)


def test_audit_an_outage_is_logged_when_it_begins_and_when_it_ends(
    outage: Outage, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        outage.note_failure(FULL)
    clock.now += 42
    outage.note_ready()
    outage.note_signature()
    assert caplog.messages == [
        "no certificate is issued: the ledger cannot be used: disk is full; free disk space",
        "certificates are issued again, after 42 s (ledger_unavailable)",
    ]


def test_what_fails_for_one_caller_is_no_outage(outage: Outage, caplog: pytest.LogCaptureFixture) -> None:
    outage.note_failure(Refused("principal_not_allowed", "no", "ask for another"))
    outage.note_failure(Unavailable("vault_busy", "Vault is busy", "retry"))
    outage.note_signature()
    assert caplog.messages == []


@pytest.mark.parametrize("down", [DOWN, Unavailable("ca_agent_down", "the ssh-agent cannot be reached", "start it")])
def test_only_a_signature_ends_an_outage_of_another_signer(
    outage: Outage, caplog: pytest.LogCaptureFixture, down: Unavailable
) -> None:
    outage.note_failure(down)
    outage.note_ready()
    assert len(caplog.messages) == 1
    outage.note_signature()
    assert caplog.messages[1] == f"certificates are issued again, after 0 s ({down.code})"


def test_an_outage_that_comes_and_goes_writes_few_lines(
    outage: Outage, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(100):
        outage.note_failure(FULL)
        outage.note_ready()
        clock.now += 0.1
    assert len(caplog.messages) == 2


def test_each_outage_is_an_error_that_a_caller_may_retry() -> None:
    entries = {code: find_entry(code) for code in OUTAGES}
    assert {code for code, entry in entries.items() if entry is None or entry.status != 503} == set()
