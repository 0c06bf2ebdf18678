"""The two phrases: what approves, what does not, and that what was typed goes nowhere."""

from __future__ import annotations

import pytest

from signer.errors import ApprovalRefused
from signer.migration.approval import PHRASES, ask_approval
from signer.migration.plan import Operation, Plan

NOW = 1_800_000_000


def a_plan(operation: Operation = "cutover") -> Plan:
    return Plan(operation, "a title", {"a": 1}, {"mode": "vault"}, {"mode": "local"}, ())


def refusal(given: str | None, operation: Operation = "cutover", typed: str | None = None) -> ApprovalRefused:
    with pytest.raises(ApprovalRefused) as refused:
        ask_approval(a_plan(operation), given, None if typed is None else lambda: typed, NOW)
    return refused.value


def test_the_phrases_are_those_of_the_issue() -> None:
    assert dict(PHRASES) == {
        "cutover": "m04-vault-runtime-cutover-approved",
        "decommission": "m04-vault-destructive-cleanup-approved",
    }


@pytest.mark.parametrize("operation", ["cutover", "decommission"])
def test_its_own_phrase_approves_exactly_this_plan(operation: Operation) -> None:
    plan = a_plan(operation)
    approval = ask_approval(plan, PHRASES[operation], None, NOW)
    assert (approval.plan, approval.operation, approval.way) == (plan.digest, operation, "--approve")
    assert approval.at == "2027-01-15T08:00:00Z"
    assert PHRASES[operation] not in str(approval)


@pytest.mark.parametrize("operation", ["cutover", "decommission"])
def test_the_one_phrase_never_opens_the_other(operation: Operation) -> None:
    other: Operation = "decommission" if operation == "cutover" else "cutover"
    assert refusal(PHRASES[other], operation).code == "approval_for_another_operation"


@pytest.mark.parametrize(
    "given",
    ["", "x", "m04-vault-runtime-cutover-approved ", "M04-vault-runtime-cutover-approved", "m04", "\udcff", "é" * 99],
)
def test_anything_else_is_refused_without_being_repeated(given: str) -> None:
    refused = refusal(given)
    assert refused.code == "approval_wrong"
    assert not given or given not in f"{refused.text} {refused.hint} {refused.facts}"


def test_without_a_phrase_and_without_a_terminal_nothing_is_read() -> None:
    assert refusal(None).code == "approval_missing"


def test_a_person_at_a_terminal_is_asked() -> None:
    assert ask_approval(a_plan(), None, lambda: PHRASES["cutover"], NOW).way == "terminal"
    assert refusal(None, typed="yes").code == "approval_wrong"


def test_a_phrase_on_the_command_line_is_not_asked_for_again() -> None:
    def never() -> str:
        raise AssertionError

    assert ask_approval(a_plan(), PHRASES["cutover"], never, NOW).way == "--approve"


def test_the_environment_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SIGNER_APPROVE", "APPROVE", "PHRASE", "SIGNER_APPROVAL"):
        monkeypatch.setenv(name, PHRASES["cutover"])
    assert refusal(None).code == "approval_missing"
