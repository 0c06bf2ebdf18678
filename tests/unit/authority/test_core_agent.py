"""The core where signing takes time: recorded first, released once it is signed, withheld on record if it is not."""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from signer.ca.agent import too_slow
from signer.errors import SignerError
from signer.ledger.audit import verify
from signer.model import Returned
from signer.protocol.commands import Freeze, ShowHead, Unfreeze
from signer.ssh.certificate import decode_certificate
from tests.parts import builders
from tests.parts.agent_episodes import AgentEpisode, Bench
from tests.parts.builders import NOW, PretendKey
from tests.parts.episodes import Disk, Memory

SLOW = too_slow()
LIMITED = builders.policy(builders.POLICY, builders.role_lines("limits = { per_minute = 2, live = 2 }"))


def code(reply: object) -> str:
    assert isinstance(reply, SignerError), reply
    return reply.code


def test_a_certificate_is_recorded_before_the_key_is_asked() -> None:
    bench = Bench()
    pending = bench.send()
    (body,) = bench.store.bodies("certificate.issued")
    assert (body["serial"], body["backend"], bench.key.signed) == ("1", "local", [])
    bench.now += 2
    reply = bench.finish_one(pending)
    assert (reply["serial"], reply["expires_in"]) == ("1", 898)
    fields, unsigned, signature = decode_certificate(builders.certificate_of(reply))
    assert (fields.valid_after, fields.valid_before) == (NOW - 30, NOW + 900)
    assert (bench.key.signed, signature) == ([unsigned], PretendKey().sign(unsigned))
    assert bench.store.kinds() == ["keeper.started", "certificate.issued"]


@pytest.mark.parametrize("fail", ["before", "after"])
def test_what_cannot_be_recorded_is_never_to_be_signed(fail: str) -> None:
    bench = Bench()
    bench.store.fail = fail
    assert code(bench.sign()) == "ledger_unavailable"
    bench.store.fail = ""
    assert bench.finish_one(bench.send())["serial"] == "2"


def test_a_failure_is_the_reply_and_the_serial_is_withheld_on_record() -> None:
    bench = Bench()
    assert bench.finish_one(bench.send(), SLOW) is SLOW
    assert bench.store.bodies("certificate.withheld") == [{"serial": "1", "error": "ca_agent_slow"}]
    assert bench.store.entries[-1].actor == "deploy-agent"
    assert not bench.faults
    assert "request.refused" not in bench.store.kinds()


def test_something_else_than_a_signature_is_withheld() -> None:
    bench = Bench()
    assert code(bench.finish_one(bench.send(), Returned("a line", b"a key"))) == "internal_error"
    assert bench.store.bodies("certificate.withheld") == [{"serial": "1", "error": "internal_error"}]


def test_a_failure_no_longer_counts() -> None:
    bench = Bench(policy=LIMITED)
    for _ in range(20):
        bench.finish_one(bench.send(), SLOW)
    bench.finish_one(bench.send())
    pending = bench.send()
    assert code(bench.sign()) == "rate_limited", "what is out counts"
    bench.finish_one(pending, SLOW)
    bench.send()
    assert code(bench.sign()) == "rate_limited"


def test_what_is_out_counts_once_also_after_the_state_was_read_anew() -> None:
    bench = Bench(policy=LIMITED)
    pending = bench.send()
    bench.store.fail = "before"
    bench.ask(Freeze(builders.caller("operator"), "role:llmops", "lost"))
    bench.store.fail = ""
    bench.send()
    assert code(bench.sign()) == "rate_limited"
    bench.finish_one(pending, SLOW)
    bench.send()
    assert code(bench.sign()) == "rate_limited"


@pytest.mark.parametrize("fail", ["before", "read"])
def test_a_failure_that_cannot_be_recorded_releases_nothing_and_counts(fail: str) -> None:
    bench = Bench(policy=LIMITED)
    pending, other = bench.send(), bench.send()
    bench.store.fail = fail
    assert code(bench.finish_one(pending, SLOW)) == "ledger_unavailable"
    bench.store.fail = ""
    bench.finish_one(other)
    assert code(bench.sign()) == "rate_limited"
    assert "certificate.withheld" not in bench.store.kinds()


def test_a_ledger_that_cannot_be_read_leaves_freezes_unknown_so_nothing_is_released() -> None:
    bench = Bench()
    pending = bench.send()
    bench.store.fail = "before"
    bench.ask(Freeze(builders.caller("operator"), "role:llmops", "lost"))  # the state is discarded
    bench.store.fail = "read"
    assert code(bench.finish_one(pending)) == "ledger_unavailable"


@pytest.mark.parametrize("scope", ["all", "role:llmops", "identity:deploy-agent"])
def test_what_was_frozen_meanwhile_is_withheld(scope: str) -> None:
    bench = Bench()
    pending, other = bench.send(), bench.send("operator")
    bench.ask(Freeze(builders.caller("operator"), scope, "drill"))
    replies = bench.finish((pending, pending.obtain()), (other, other.obtain()))
    assert code(replies[0]) == "frozen"
    assert isinstance(replies[1], dict) == scope.startswith("identity")
    assert {"serial": "1", "error": "frozen"} in bench.store.bodies("certificate.withheld")
    bench.ask(Unfreeze(builders.caller("operator"), scope))
    assert isinstance(bench.finish_one(bench.send()), dict)


def test_a_freeze_in_the_same_batch_counts() -> None:
    bench = Bench()
    pending, _ = bench.ask(builders.sign(), Freeze(builders.caller("operator"), "all", "drill"))
    assert code(bench.finish_one(pending)) == "frozen"


def test_a_clock_far_behind_at_the_end_releases_nothing() -> None:
    bench = Bench()
    pending = bench.send()
    bench.now += 200
    bench.core.begin({})
    bench.now -= 100
    assert code(bench.finish_one(pending)) == "clock_behind"
    assert bench.store.bodies("certificate.withheld") == [{"serial": "1", "error": "clock_behind"}]


def test_a_key_that_no_policy_names_any_more_releases_nothing() -> None:
    bench, new = Bench(), PretendKey("new")
    pending = bench.send()
    assert bench.core.use_key(new) is None
    assert bench.core.use_policy(builders.policy(builders.POLICY.replace("{ca}", new.fingerprint))) is None
    assert code(bench.finish_one(pending)) == "ca_key_replaced_meanwhile"
    reply = bench.finish_one(bench.send())
    assert reply["ca_fingerprint"] == new.fingerprint
    assert decode_certificate(builders.certificate_of(reply))[0].ca_key == new.blob


def test_the_key_of_the_record_signs_although_another_came_that_the_policy_names_as_well() -> None:
    bench, new = Bench(), PretendKey("new")
    ca = replace(bench.policy.ca, next=new.public)
    pending = bench.send()
    bench.core.use_key(new)
    bench.core.policy = replace(bench.policy, ca=ca)
    assert bench.finish_one(pending)["ca_fingerprint"] == bench.key.fingerprint
    assert new.signed == []


def test_everything_else_is_answered_while_signatures_are_out() -> None:
    bench = Bench()
    bench.send()
    head, freeze = bench.ask(
        ShowHead(builders.caller("operator")), Freeze(builders.caller("operator"), "role:llmops", "x")
    )
    assert (head["seq"], freeze["frozen"]) == (2, True)


def test_one_that_fails_spoils_no_other() -> None:
    bench = Bench()
    one, two, three = bench.send(), bench.send("operator"), bench.send()
    replies: list[Any] = bench.finish((three, three.obtain()), (two, SLOW), (one, one.obtain()))
    assert [reply["serial"] if isinstance(reply, dict) else reply.code for reply in replies] == [
        "3", "ca_agent_slow", "1",
    ]  # fmt: skip


# --- the same promises, after each of many random steps -------------------------------------------------------------

STEPS = 30_000  # commands
ON_DISK = 2_000  # commands of the run on SQLite


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_promise_holds_after_each_of_many_random_steps_where_an_agent_signs() -> None:
    seed = os.environ.get("SIGNER_RANDOM_SEED") or str(random.SystemRandom().randrange(2**32))
    print(f"repeat with SIGNER_RANDOM_SEED={seed}")
    replies, events, commands = Counter[str](), Counter[str](), 0
    for number in range(12):
        episode = AgentEpisode(f"{seed}/{number}", Memory())
        try:
            while episode.commands < STEPS / 12:
                episode.step()
        except BaseException:
            print(f"episode {number}, after {episode.commands} commands, at {episode.now}: {episode.replies}")
            raise
        assert not episode.released & (episode.watcher.withheld | episode.lost)
        commands += episode.commands
        replies += episode.replies
        events += episode.watcher.counts
    print(f"{commands} commands; {dict(replies)}")
    assert replies.keys() >= {
        "Released", "ca_agent_slow", "ca_agent_key_missing", "frozen", "ledger_unavailable", "rate_limited",
        "too_many_live", "clock_behind", "keeper_stopping",
    }  # fmt: skip
    assert events["certificate.withheld"] > 100


@pytest.mark.slow
def test_every_promise_holds_on_a_real_ledger_where_an_agent_signs(tmp_path: Path) -> None:
    seed = os.environ.get("SIGNER_RANDOM_SEED") or str(random.SystemRandom().randrange(2**32))
    print(f"repeat with SIGNER_RANDOM_SEED={seed}")
    ledger = Disk(tmp_path)
    episode = AgentEpisode(seed, ledger)
    while episode.commands < ON_DISK:
        episode.step()
    ledger.fail = ""
    head = verify(ledger)
    ledger.close()
    assert head.seq == episode.watcher.seen
    assert episode.released <= episode.watcher.issued.keys() - episode.watcher.withheld - episode.lost


def test_the_watcher_of_these_steps_sees_a_broken_promise() -> None:
    episode = AgentEpisode("watcher", Memory())
    assert len(list(episode.core.run([builders.sign("operator")]))) == 1
    episode.watcher.look(episode.store.entries_after(0))
    body = episode.store.bodies("certificate.issued")[0]
    episode.watcher.check_release(body)
    list(episode.core.run([Freeze(builders.caller("operator"), "identity:operator", "drill")]))
    episode.watcher.look(episode.store.entries_after(episode.watcher.seen))
    with pytest.raises(AssertionError, match="released although"):
        episode.watcher.check_release(body)
