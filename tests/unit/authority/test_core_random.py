"""The promises, after each of 100,000 random commands: a clock that jumps, a disk and a key that fail, restarts.

What is checked is read from the ledger and from the certificates themselves, not from what the core remembers.
`SIGNER_RANDOM_SEED` repeats a run; a failure prints the seed and the story so far.
"""

from __future__ import annotations

import os
import random
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from signer.ledger.audit import verify
from signer.ledger.schema import FILE_NAME
from signer.model import Event
from signer.protocol.replies import Reply
from tests.parts import builders
from tests.parts.episodes import BY_DIGEST, Disk, Episode, Memory
from tests.parts.watcher import Watcher

EPISODES = 40
COMMANDS = 2_600  # an episode's
ON_DISK = 3_000  # commands of the run on SQLite


@pytest.fixture
def seed() -> str:
    chosen = os.environ.get("SIGNER_RANDOM_SEED") or str(random.SystemRandom().randrange(2**32))
    print(f"repeat with SIGNER_RANDOM_SEED={chosen}")
    return chosen


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("commands", [100_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_every_promise_holds_after_each_of_many_random_commands(seed: str, commands: int) -> None:
    total, replies, events = 0, Counter[str](), Counter[str]()
    for number in range(EPISODES * commands // 100_000):
        episode = Episode(f"{seed}/{number}", Memory())
        try:
            while episode.commands < COMMANDS:
                episode.step()
        except BaseException:
            print(f"episode {number}, after {episode.commands} commands, at {episode.now}: {episode.replies}")
            raise
        total += episode.commands
        replies += episode.replies
        events += episode.watcher.counts
    print(f"{total} commands; replies {dict(replies)}; events {dict(events)}")
    assert total >= commands
    # The run is worth its name only if it went everywhere.
    assert replies.keys() >= {
        "Sign", "Explain", "Freeze", "Unfreeze", "ListCertificates", "frozen", "clock_behind", "ledger_unavailable",
        "signing_failed", "rate_limited", "too_many_live", "token_missing", "role_not_granted", "unknown_role",
        "principal_not_allowed", "no_principals", "ttl_above_max", "reason_missing", "not_permitted", "not_frozen",
        "unknown_scope", "critical_option_not_allowed", "public_key_missing", "token_expired",
    }  # fmt: skip
    assert events.keys() >= {"certificate.withheld", "refusals.repeated", "policy.loaded", "request.refused"}


@pytest.mark.slow
def test_every_promise_holds_on_a_real_ledger_that_is_cut_off_in_its_commits(seed: str, tmp_path: Path) -> None:
    ledger = Disk(tmp_path)
    episode = Episode(seed, ledger)
    while episode.commands < ON_DISK:
        episode.step()
    ledger.fail = ""
    head = verify(ledger)
    ledger.close()
    assert head.seq == episode.watcher.seen
    assert episode.released <= episode.watcher.issued.keys() - episode.watcher.withheld
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_the_watcher_sees_a_broken_promise() -> None:
    """The check is checked: events that no honest core writes are told apart."""
    episode = Episode("watcher", Memory())
    reply = dict(episode.core.run([builders.sign("operator")]))[0]
    assert isinstance(reply, Reply)
    body = episode.store.bodies("certificate.issued")[0]
    early = {"valid_after": body["valid_after"] - 200, "valid_before": body["valid_before"] - 200}
    for change, sentence in (
        ({"serial": "1"}, "does not rise"),
        ({"serial": "2", **early}, "clock far behind"),
        ({"serial": "2", "principals": ["root"]}, "root"),
        ({"serial": "2", "valid_before": body["valid_before"] + 10**6}, "outside max_ttl"),
        ({"serial": "2", "extensions": ["permit-port-forwarding"]}, "permit-port-forwarding"),
    ):
        store, watcher = Memory(), Watcher(BY_DIGEST)
        store.commit([Event("certificate.issued", "operator", body)], int(episode.now * 1000))
        store.rows.clear()
        store.commit([Event("certificate.issued", "operator", {**body, **change})], int(episode.now * 1000) + 1)
        with pytest.raises(AssertionError, match=sentence):
            watcher.look(store.entries)
