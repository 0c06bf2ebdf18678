"""What the core says besides certificates: refusals and how they are counted, freezes, explanations, lists."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from signer.errors import BadFile, SignerError
from signer.model import Filter
from signer.protocol.commands import (
    Explain,
    Freeze,
    ListCertificates,
    ListEntries,
    ListFreezes,
    ListRoles,
    ShowHead,
    Sign,
    Unfreeze,
)
from signer.ssh.certificate import decode_certificate
from signer.units import timestamp
from tests.parts import builders
from tests.parts.builders import NOW, Bench, caller, certificate_of, policy, role_lines, sign


def code_of(reply: Any) -> str:
    """The code of a reply that is an error."""
    assert isinstance(reply, SignerError), reply
    return reply.code


def serial_of(reply: Any) -> int:
    return decode_certificate(certificate_of(reply))[0].serial


LIMITED = policy(builders.POLICY, role_lines("limits = { per_minute = 3, live = 5 }"))


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_repeated_refusal_is_recorded_once_and_then_as_a_count() -> None:
    bench = Bench()
    for _ in range(50):
        bench.sign(principals=("root",))
    assert bench.store.kinds() == ["keeper.started", "request.refused"]
    bench.now = NOW + 59.0
    bench.core.tick()
    assert bench.store.kinds() == ["keeper.started", "request.refused"]
    bench.now = NOW + 60.0
    bench.core.tick()
    assert bench.store.kinds()[2:] == ["refusals.repeated"]
    folded = bench.store.bodies("refusals.repeated")[0]
    assert (folded["count"], folded["since"], folded["code"]) == (49, NOW, "principal_not_allowed")
    assert bench.store.entries[-1].actor == "deploy-agent"


def test_what_was_counted_is_recorded_at_the_end() -> None:
    bench = Bench()
    bench.ask(*[sign(principals=("root",)) for _ in range(3)])
    bench.core.end()
    assert bench.store.kinds()[-2:] == ["refusals.repeated", "keeper.stopped"]
    assert bench.store.bodies("refusals.repeated")[0]["count"] == 2


def test_a_flood_without_credentials_cannot_fill_the_ledger() -> None:
    bench = Bench()
    for number in range(5_000):
        bench.ask(Sign(caller(None, f"10.0.{number // 250}.{number % 250}"), f"role-{number}", builders.ask()))
    assert len(bench.store.entries) < 40


def test_in_a_flood_nobody_is_named_for_what_others_did() -> None:
    bench = Bench()
    for number in range(1_500):
        known = number == 1_000
        who = caller("stranger") if known else caller(None, f"10.0.{number // 250}.{number % 250}")
        bench.ask(Sign(who, f"role-{number}", builders.ask()))
    assert [entry.actor for entry in bench.store.entries].count("stranger") == 1, "the flood hides it"
    bench.now = NOW + 61.0
    bench.core.tick()
    counts = [entry for entry in bench.store.entries if entry.kind == "refusals.repeated"]
    assert [entry.actor for entry in counts] == ["unauthenticated"]
    assert bench.store.bodies("refusals.repeated")[0]["count"] == 1_499 - 33
    assert bench.store.bodies("refusals.repeated")[0]["code"] == "various"


def test_no_event_holds_a_token() -> None:
    bench = Bench()
    wrong = builders.token("nobody")
    bench.ask(sign(), Sign(replace(caller(), token=wrong), "llmops", builders.ask()), sign(principals=("root",)))
    text = " ".join(entry.body for entry in bench.store.entries)
    assert wrong not in text
    assert builders.token("deploy-agent") not in text


# --- freezes, policy, explanations, lists ---------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["all", "identity:deploy-agent", "role:llmops"])
def test_a_freeze_stops_what_it_names_until_it_is_lifted(scope: str) -> None:
    bench = Bench()
    bench.ask(Freeze(caller("operator"), scope, "a drill"))
    reply = bench.sign()
    assert code_of(reply) == "frozen"
    assert "a drill" in str(reply)
    bench.restart()
    assert code_of(bench.sign()) == "frozen"
    row = {"scope": scope, "reason": "a drill", "by": "operator", "since": timestamp(int(NOW))}
    assert bench.ask(ListFreezes(caller()))[0] == {"freezes": [row]}
    bench.ask(Unfreeze(caller("operator"), scope))
    assert serial_of(bench.sign()) == 1


def test_audit_freezes_of_others_are_listed_only_for_who_may_freeze_or_read_the_ledger() -> None:
    bench = Bench()
    for scope in ("identity:deploy-agent", "role:llmops"):
        bench.ask(Freeze(caller("operator"), scope, "a key was found in a chat"))
    listed = {
        who: bench.ask(ListFreezes(caller(who)))[0]["freezes"] for who in ("operator", "deploy-agent", "stranger")
    }
    assert [row["scope"] for row in listed["operator"]] == ["identity:deploy-agent", "role:llmops"]
    assert listed["deploy-agent"] == listed["operator"]
    assert listed["stranger"] == []


def test_a_freeze_counts_for_the_commands_behind_it_in_its_batch() -> None:
    bench = Bench()
    replies = bench.ask(sign(), Freeze(caller("operator"), "all", "drill"), sign())
    assert isinstance(replies[0], dict)
    assert code_of(replies[2]) == "frozen"


def test_an_explanation_says_what_is_frozen() -> None:
    bench = Bench()
    bench.ask(Freeze(caller("operator"), "role:llmops", "a drill"))
    answer: Any = bench.ask(Explain(caller(), "llmops", builders.ask()))[0]
    assert answer["granted"] is False
    assert answer["code"] == "frozen"
    rules = {rule["rule"]: rule["outcome"] for rule in answer["rules"]}
    assert rules["freezes"] == "refused"
    assert rules["principals"] == "ok"


def test_only_who_may_freeze_freezes_and_only_what_exists() -> None:
    bench = Bench()
    may_not = Bench(policy(builders.POLICY, ('may = ["approve", "freeze", ', 'may = ["approve", ')))
    assert code_of(may_not.ask(Freeze(caller("operator"), "all", "x"))[0]) == "not_permitted"
    assert code_of(may_not.ask(Unfreeze(caller("operator"), "all"))[0]) == "not_permitted"
    for scope in ("role:none", "identity:none", "everything", "role:", ""):
        assert code_of(bench.ask(Freeze(caller("operator"), scope, "x"))[0]) == "unknown_scope"
    assert code_of(bench.ask(Unfreeze(caller("operator"), "all"))[0]) == "not_frozen"


def test_a_freeze_with_an_end_ends_by_an_event_and_counts_until_then() -> None:
    bench = Bench()
    assert bench.ask(Freeze(caller("operator"), "all", "a drill", 120))[0]["until"] == timestamp(int(NOW) + 120)
    bench.now += 119
    bench.core.tick()
    assert "until 20" in str(bench.sign())
    bench.restart()
    assert code_of(bench.sign()) == "frozen"
    bench.now += 1
    assert code_of(bench.sign()) == "frozen"  # no event has lifted it yet
    bench.core.tick()
    assert serial_of(bench.sign()) == 1
    assert bench.store.entries[-2].kind == "freeze.lifted"
    assert bench.store.entries[-2].actor == "keeper"
    bench.restart()
    assert serial_of(bench.sign()) == 2


def test_a_freeze_that_ends_while_nothing_can_be_recorded_stays_until_its_end_is() -> None:
    bench = Bench()
    bench.ask(Freeze(caller("operator"), "all", "a drill", 60))
    bench.now += 61
    bench.store.fail = "before"
    bench.core.tick()
    bench.store.fail = ""
    assert code_of(bench.sign()) == "frozen"
    bench.core.tick()
    assert serial_of(bench.sign()) == 1


@pytest.mark.parametrize("first, second, last", [(None, 60, None), (600, 60, 600), (60, 600, 600), (60, None, None)])
def test_a_second_freeze_never_shortens_the_first(first: int | None, second: int | None, last: int | None) -> None:
    bench = Bench()
    for seconds in (first, second):
        bench.ask(Freeze(caller("operator"), "all", "a drill", seconds))
    row = bench.ask(ListFreezes(caller("operator")))[0]["freezes"][0]
    assert row.get("until") == (None if last is None else timestamp(int(NOW) + last))


def test_an_agent_freezes_itself_and_nothing_else_and_lifts_nothing() -> None:
    may_freeze = policy(builders.POLICY, ('kind = "agent"', 'kind = "agent"\nmay = ["freeze"]'))
    for bench in (Bench(), Bench(may_freeze)):
        assert bench.ask(Freeze(caller(), "identity:deploy-agent", "my token leaked"))[0]["frozen"] is True
        assert code_of(bench.sign()) == "frozen"
    assert code_of(bench.ask(Freeze(caller(), "role:llmops", "x"))[0]) == "freeze_only_itself"
    assert code_of(bench.ask(Unfreeze(caller(), "identity:deploy-agent"))[0]) == "unfreeze_needs_human"


def test_nobody_who_is_frozen_by_name_lifts_a_freeze_and_others_lift_all() -> None:
    bench = Bench()
    bench.ask(Freeze(caller("operator"), "all", "a drill"), Freeze(caller("operator"), "identity:operator", "a drill"))
    for scope in ("identity:operator", "all"):
        assert code_of(bench.ask(Unfreeze(caller("operator"), scope))[0]) == "frozen_by_name"
    other = Bench()
    other.ask(Freeze(caller("operator"), "all", "a drill"))
    assert other.ask(Unfreeze(caller("operator"), "all"))[0]["frozen"] is False


def test_root_of_this_host_freezes_and_lists_without_a_token_and_does_nothing_else() -> None:
    bench, root = Bench(), replace(caller(), token=None, local_user="root")
    assert bench.ask(Freeze(root, "all", "a drill"))[0]["frozen"] is True
    assert bench.ask(ListFreezes(root))[0]["freezes"][0]["by"] == "local:root"
    assert code_of(bench.sign()) == "frozen"
    for command in (Unfreeze(root, "all"), ListRoles(root), msgspec.structs.replace(sign(), caller=root)):
        assert code_of(bench.ask(command)[0]) in ("token_needed", "token_missing")
    assert code_of(bench.ask(Freeze(root, "role:none", "x"))[0]) == "unknown_scope"


def test_a_policy_that_pins_another_key_is_refused_and_the_old_one_stays() -> None:
    bench = Bench()
    other = policy(builders.POLICY.replace("{ca}", builders.PretendKey("another").fingerprint))
    with pytest.raises(BadFile) as caught:
        bench.core.use_policy(other)
    assert caught.value.code == "policy_pins_another_key"
    assert bench.core.policy is bench.policy
    assert serial_of(bench.sign()) == 1


def test_a_new_policy_holds_from_the_next_command_on() -> None:
    bench = Bench()
    bench.core.use_policy(policy(builders.POLICY, role_lines("reason_required = true")))
    assert bench.store.bodies("policy.loaded")[0]["changed"] is True
    assert code_of(bench.sign()) == "reason_missing"
    assert isinstance(bench.sign(reason="ticket 812"), dict)
    assert bench.store.bodies("certificate.issued")[0]["reason"] == "ticket 812"


def test_explaining_signs_records_and_counts_nothing() -> None:
    bench = Bench(policy=LIMITED)
    for _ in range(10):
        answer: Any = bench.ask(Explain(caller(), "llmops", builders.ask()))[0]
        assert answer["granted"] is True
    assert bench.store.kinds() == ["keeper.started"]
    assert bench.key.signed == []


def test_an_explanation_without_a_key_skips_that_rule_only() -> None:
    answer: Any = Bench().ask(Explain(caller(), "llmops", builders.ask(public_key="")))[0]
    outcomes = {rule["rule"]: rule["outcome"] for rule in answer["rules"]}
    assert outcomes.pop("key") == "skipped"
    assert set(outcomes.values()) == {"ok"}


def test_others_certificates_are_seen_only_with_the_right_to_read_the_ledger() -> None:
    bench = Bench()
    bench.ask(sign(), sign("operator"))
    every = Filter()
    mine: Any = bench.ask(ListCertificates(caller(), every, active=False))[0]
    all_of_them: Any = bench.ask(ListCertificates(caller("operator"), every, active=False))[0]
    assert [row["identity"] for row in mine["certificates"]] == ["deploy-agent"]
    assert [row["identity"] for row in all_of_them["certificates"]] == ["operator", "deploy-agent"]
    other = ListCertificates(caller(), Filter(identity="operator"), active=False)
    assert code_of(bench.ask(other)[0]) == "not_permitted"
    assert code_of(bench.ask(ShowHead(caller()))[0]) == "not_permitted"
    assert code_of(bench.ask(ListEntries(caller(), 0, 200))[0]) == "not_permitted"


def test_a_core_whose_ledger_cannot_be_read_does_not_begin() -> None:
    bench = Bench()
    bench.store.fail = "read"
    failure = bench.core.begin({})
    assert failure is not None
    assert failure.code == "ledger_unavailable"
