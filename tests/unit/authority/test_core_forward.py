"""The core where Vault signs: decided here, signed there, checked here, and recorded before anybody gets it."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from signer.authority.vault_certificates import PendingCertificate
from signer.errors import ForeignCertificate, Refused
from signer.model import Event
from signer.protocol.commands import Freeze, ShowHead, Unfreeze
from signer.ssh.fingerprint import fingerprint_of
from tests.parts import builders
from tests.parts.builders import NOW, MemoryStore
from tests.parts.episodes import BY_DIGEST, POLICIES, Memory
from tests.parts.vault_episodes import CA, DOWN, Bench, VaultEpisode, VaultWatcher, code, made

LIMITED = builders.policy(builders.POLICY, builders.role_lines("limits = { per_minute = 2, live = 2 }"))


def test_a_grant_goes_out_unrecorded_and_comes_back_recorded() -> None:
    bench = Bench()
    forward = bench.send()
    assert "certificate.issued" not in bench.store.kinds()
    bench.now += 2
    reply = bench.finish_one(forward, made(forward, serial=2**64 - 1, key_id="vault-token-1"))
    (body,) = bench.store.bodies("certificate.issued")
    assert (body["backend"], body["serial"], body["key_id"]) == ("vault", str(2**64 - 1), "vault-token-1")
    assert (body["valid_after"], body["valid_before"]) == (NOW - 30, NOW + 900)
    assert body["ca"] == reply["ca_fingerprint"] == fingerprint_of(CA.blob)
    assert body["policy"] == bench.policy.digest
    assert body["request_id"] == "r-1"
    assert (reply["serial"], reply["expires_in"]) == (str(2**64 - 1), 898)
    assert builders.certificate_of(reply)


def test_what_policy_refuses_is_never_given_out() -> None:
    bench = Bench()
    assert code(bench.sign(principals=("root",))) == "principal_not_allowed"
    assert code(bench.sign("stranger")) == "role_not_granted"
    assert code(bench.sign(public_key="junk")) == "public_key_truncated"


def test_a_certificate_outside_its_grant_is_refused_recorded_and_told_to_the_log() -> None:
    bench = Bench()
    forward = bench.send()
    reply = bench.finish_one(forward, made(forward, principals=("llmops", "root")))
    assert code(reply) == "vault_outside_grant"
    (body,) = bench.store.bodies("request.refused")
    assert (body["code"], body["role"], body["address"]) == ("vault_outside_grant", "llmops", "192.0.2.7")
    assert bench.store.entries[-1].actor == "deploy-agent"
    assert [type(fault) for fault in bench.faults] == [ForeignCertificate]
    assert "certificate.issued" not in bench.store.kinds()


def test_a_fault_of_vaults_is_the_reply_and_is_recorded_as_a_refusal() -> None:
    bench = Bench()
    forward = bench.send()
    assert bench.finish_one(forward, DOWN) is DOWN
    (body,) = bench.store.bodies("request.refused")
    assert body["code"] == "vault_down"
    assert not bench.faults


def test_no_token_of_the_caller_is_in_what_is_recorded_or_shown() -> None:
    bench = Bench()
    forward = bench.send()
    bench.finish_one(forward, DOWN)
    other = bench.send()
    bench.finish_one(other, made(other))
    assert builders.token("deploy-agent") not in f"{bench.store.entries}{forward!r}"


@pytest.mark.parametrize("fail", ["before", "after", "read"])
def test_nothing_is_released_that_could_not_be_recorded(fail: str) -> None:
    bench = Bench()
    forward = bench.send()
    bench.store.fail = fail
    assert code(bench.finish_one(forward, made(forward))) == "ledger_unavailable"
    bench.store.fail = ""
    other = bench.send()
    assert isinstance(bench.finish_one(other, made(other)), dict)


def test_a_batch_that_cannot_be_recorded_releases_none_of_it() -> None:
    bench = Bench()
    one, two, three = bench.send(), bench.send("operator"), bench.send()
    bench.store.fail = "before"
    replies = bench.finish((one, made(one)), (two, DOWN), (three, made(three)))
    assert [code(reply) for reply in replies] == ["ledger_unavailable"] * 3


def test_one_bad_certificate_in_a_batch_spoils_no_other() -> None:
    bench = Bench()
    one, two, three = bench.send(), bench.send("operator"), bench.send()
    replies = bench.finish((one, made(one)), (two, made(two, cert_type=2)), (three, made(three)))
    assert [isinstance(reply, dict) for reply in replies] == [True, False, True]


@pytest.mark.parametrize("scope", ["all", "role:llmops", "identity:deploy-agent"])
def test_what_was_frozen_meanwhile_is_not_released(scope: str) -> None:
    bench = Bench()
    forward = bench.send()
    bench.ask(Freeze(builders.caller("operator"), scope, "drill"))
    assert code(bench.finish_one(forward, made(forward))) == "frozen"
    assert bench.store.bodies("request.refused")[0]["code"] == "frozen"
    bench.ask(Unfreeze(builders.caller("operator"), scope))
    other = bench.send()
    assert isinstance(bench.finish_one(other, made(other)), dict)


def test_a_freeze_in_the_same_batch_counts() -> None:
    bench = Bench()
    forward, _ = bench.ask(builders.sign(), Freeze(builders.caller("operator"), "all", "drill"))
    assert code(bench.finish_one(forward, made(forward))) == "frozen"


def test_a_clock_set_back_before_the_record_shortens_no_minute() -> None:
    bench = Bench(policy=LIMITED)
    bench.now = NOW + 30
    forwards = [bench.send(), bench.send()]
    bench.now = NOW + 10
    bench.finish(*((forward, made(forward)) for forward in forwards))
    bench.restart()
    bench.now = NOW + 75
    assert code(bench.sign()) == "rate_limited"
    bench.now = NOW + 90
    assert code(bench.sign()) == "too_many_live"


def test_a_clock_far_behind_at_the_end_releases_nothing() -> None:
    bench = Bench()
    forward = bench.send()
    bench.now += 200
    bench.core.begin({})
    bench.now -= 100
    assert code(bench.finish_one(forward, made(forward))) == "clock_behind"


def test_the_policy_that_decided_is_the_one_recorded() -> None:
    bench = Bench()
    forward = bench.send()
    before = bench.policy.digest
    bench.core.use_policy(LIMITED)
    bench.finish_one(forward, made(forward))
    assert bench.store.bodies("certificate.issued")[0]["policy"] == before != LIMITED.digest


def test_a_serial_that_comes_twice_is_refused() -> None:
    bench = Bench()
    one, two, three = bench.send(), bench.send("operator"), bench.send()
    replies = bench.finish((one, made(one, serial=7)), (two, made(two, serial=7)))
    assert isinstance(replies[0], dict)
    assert code(replies[1]) == "vault_outside_grant"
    assert code(bench.finish_one(three, made(three, serial=7))) == "vault_outside_grant"
    assert len(bench.store.bodies("certificate.issued")) == 1


def test_what_is_out_counts_towards_the_limits() -> None:
    bench = Bench(policy=LIMITED)
    one, two = bench.ask(builders.sign(), builders.sign())
    assert isinstance(one, PendingCertificate)
    assert isinstance(two, PendingCertificate)
    assert code(bench.sign()) == "rate_limited"


def test_what_is_out_counts_also_after_the_state_was_read_anew() -> None:
    bench = Bench(policy=LIMITED)
    out = [bench.send(), bench.send()]
    bench.store.fail = "before"
    bench.ask(Freeze(builders.caller("operator"), "role:llmops", "lost"))
    bench.store.fail = ""
    assert code(bench.sign()) == "rate_limited"
    bench.finish(*((forward, made(forward)) for forward in out))
    assert code(bench.sign()) == "rate_limited"
    bench.now += 61
    assert code(bench.sign()) == "too_many_live"


def test_a_state_read_while_results_are_checked_misses_none_of_them() -> None:
    bench = Bench(policy=LIMITED)
    out = [bench.send(), bench.send()]
    bench.store.fail = "before"
    bench.ask(Freeze(builders.caller("operator"), "role:llmops", "lost"))
    bench.store.fail = ""
    bench.finish(*((forward, made(forward)) for forward in out))
    assert code(bench.sign()) == "rate_limited"


def test_a_state_read_while_results_are_checked_does_not_count_what_failed_before() -> None:
    bench = Bench(policy=LIMITED)
    one, two = bench.send(), bench.send()
    bench.store.fail = "before"
    bench.ask(Freeze(builders.caller("operator"), "role:llmops", "lost"))
    bench.store.fail = ""
    bench.finish((one, DOWN), (two, made(two)))
    bench.send()
    assert code(bench.sign()) == "rate_limited"


@pytest.mark.parametrize(
    "fails", [lambda forward: DOWN, lambda forward: made(forward, cert_type=2)], ids=["down", "outside"]
)
def test_a_grant_that_fails_is_taken_back(fails: Callable[[PendingCertificate], Any]) -> None:
    bench = Bench(policy=LIMITED)
    for _ in range(20):
        forward = bench.send()
        bench.finish_one(forward, fails(forward))
    kept = bench.send()
    forward = bench.send()
    assert code(bench.sign()) == "rate_limited"
    bench.finish_one(forward, DOWN)
    bench.finish_one(kept, made(kept))
    other = bench.send()
    assert isinstance(bench.finish_one(other, made(other)), dict)
    assert code(bench.sign()) == "rate_limited"


def test_refusals_of_a_vault_that_is_down_are_folded() -> None:
    bench = Bench()
    for _ in range(50):
        bench.finish_one(bench.send(), DOWN)
    assert bench.store.kinds().count("request.refused") == 1
    bench.now += 61
    bench.core.tick()
    assert bench.store.bodies("refusals.repeated")[0]["count"] == 49


def test_everything_else_is_answered_while_grants_are_out() -> None:
    bench = Bench()
    bench.send()
    head, freeze = bench.ask(
        ShowHead(builders.caller("operator")), Freeze(builders.caller("operator"), "role:llmops", "x")
    )
    assert head["seq"] == 1
    assert freeze["frozen"] is True
    bench.core.check_ready()


def test_after_a_restart_the_serials_of_both_backends_are_kept_apart() -> None:
    bench = Bench()
    forward = bench.send()
    bench.finish_one(forward, made(forward, serial=2**63 + 5))
    bench.restart()
    forward = bench.send()
    assert code(bench.finish_one(forward, made(forward, serial=2**63 + 5))) == "vault_outside_grant"


# --- the same promises, after each of many random steps -------------------------------------------------------------

STEPS = 30_000  # commands


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_promise_holds_after_each_of_many_random_steps_where_vault_signs() -> None:
    seed = os.environ.get("SIGNER_RANDOM_SEED") or str(random.SystemRandom().randrange(2**32))
    print(f"repeat with SIGNER_RANDOM_SEED={seed}")
    replies, commands = Counter[str](), 0
    for number in range(12):
        episode = VaultEpisode(f"{seed}/{number}", Memory())
        try:
            while episode.commands < STEPS / 12:
                episode.step()
        except BaseException:
            print(f"episode {number}, after {episode.commands} commands, at {episode.now}: {episode.replies}")
            raise
        commands += episode.commands
        replies += episode.replies
    print(f"{commands} commands; {dict(replies)}")
    assert replies.keys() >= {
        "Released", "vault_outside_grant", "vault_down", "frozen", "ledger_unavailable", "rate_limited",
        "too_many_live", "clock_behind",
    }  # fmt: skip


def test_the_watcher_of_these_steps_sees_a_broken_promise() -> None:
    bench = Bench(policy=POLICIES[0])
    forward = bench.send()
    bench.finish_one(forward, made(forward))
    body = bench.store.bodies("certificate.issued")[0]
    for change, sentence in (
        ({}, "comes twice"),
        ({"serial": "5", "principals": ["root"]}, "root"),
        ({"serial": "5", "backend": "local"}, "vault"),
    ):
        store, watcher = MemoryStore(), VaultWatcher(BY_DIGEST)
        for number, facts in enumerate((body, {**body, **change})):
            store.rows.clear()
            event = Event("certificate.issued", "deploy-agent", json.loads(json.dumps(facts)))
            store.commit([event], NOW * 1000 + number)
        with pytest.raises(AssertionError, match=sentence):
            watcher.look(store.entries)


def test_a_refusal_for_a_freeze_is_the_branch_that_edges_know() -> None:
    bench = Bench()
    forward = bench.send()
    bench.ask(Freeze(builders.caller("operator"), "all", "drill"))
    assert isinstance(bench.finish_one(forward, made(forward)), Refused)
