"""Revocations: who may, what they stop in the core, and the list that the events make, against a naive reading."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signer.authority import revocation
from signer.authority.freezes import local_identity
from signer.authority.revocation import LIST_EVERY
from signer.errors import BadRequest, Refused, SignerError, Unavailable
from signer.ledger.reader import REACH
from signer.ledger.revoked import read_list
from signer.model import Caller, Event, Filter, Revocation
from signer.protocol.bodies import read_revocation
from signer.protocol.commands import (
    Explain,
    Freeze,
    ListCertificates,
    ListRevocations,
    PreviewRevocation,
    Revoke,
    ShowCertificate,
    Unfreeze,
)
from signer.ssh.krl import ANY_CA, decode_krl, encode_krl
from tests.parts import agent_episodes
from tests.parts.builders import (
    NOW,
    POLICY,
    Bench,
    MemoryStore,
    PretendKey,
    ask,
    caller,
    policy,
    public_key,
    public_line,
)


def revoke(by: str, value: str, who: str = "operator", reason: str = "stolen") -> Revoke:
    return Revoke(caller(who), read_revocation(by, value), reason)


def listed(bench: Bench) -> tuple[int, dict[bytes, tuple[tuple[int, int], ...]]]:
    found = read_list(bench.store).revoked
    return found.version, dict(found.certificates)


# --- the list ----------------------------------------------------------------------------------------------------


def naive_list(store: MemoryStore) -> tuple[int, int, dict[str, set[int]], set[str]]:
    """Version, time, serials by the fingerprint of their CA, and revoked keys: one event after another."""
    made = [one for one in store.entries if one.kind in ("certificates.revoked", "list.published", "ledger.restored")]
    if not made:
        return 0, 0, {}, set()
    restores = [one.time_ms * 1000 for one in made if one.kind == "ledger.restored"]
    version, now = made[-1].seq + sum(restores[-1:]), made[-1].time_ms // 1000
    serials: dict[str, set[int]] = defaultdict(set)
    keys = set()
    for one in made:
        body = json.loads(one.body)
        if one.kind == "ledger.restored":
            serials[body["ca"]] |= set(range(int(body["first_serial"]), int(body["last_serial"]) + 1))
        if one.kind != "certificates.revoked":
            continue
        if body["by"] in ("key", "ca"):
            keys.add(body[body["by"]])
        for issued in store.entries[: one.seq - 1]:
            record: dict[str, Any] = json.loads(issued.body)
            if issued.kind != "certificate.issued" or record["valid_before"] <= now:
                continue
            if (
                (body["by"] == "identity" and record["identity"] == body["identity"])
                or (body["by"] == "since" and issued.time_ms // 1000 >= body["since"])
                or (body["by"] == "serial" and int(body["first"]) <= int(record["serial"]) <= int(body["last"]))
            ):
                serials[record["ca"]].add(int(record["serial"]))
    return version, now, {ca: found for ca, found in serials.items() if found}, keys


def serials_of(ranges: tuple[tuple[int, int], ...]) -> set[int]:
    return {serial for first, last in ranges for serial in range(first, last + 1)}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 60))
def test_the_list_is_what_the_events_say_and_the_same_after_every_restart(seed: int, steps: int) -> None:
    dice, bench = random.Random(seed), Bench()
    two = ('[identities.stranger]\nkind = "agent"', '[identities.stranger]\nkind = "agent"\nroles = ["llmops"]')
    bench.policy = policy(POLICY, two)
    bench.restart()
    built: tuple[int, int | None] = (0, None)
    for _ in range(steps):
        step = dice.randrange(10)
        if step < 5:
            bench.sign(dice.choice(["deploy-agent", "stranger"]), ttl=dice.randint(60, 1800))
        elif step < 8:
            serial = dice.randint(1, 20)
            by, value = dice.choice(
                [
                    ("serial", str(serial)),
                    ("serial", f"{serial}-{serial + dice.randint(0, 20)}"),
                    ("identity", dice.choice(["deploy-agent", "stranger"])),
                    ("since", f"2027-01-15T{8 + dice.randint(0, 3):02}:{dice.randint(0, 59):02}:00Z"),
                    ("key", public_key(name=f"k{dice.randint(0, 3)}").fingerprint),
                ]
            )
            (reply,) = bench.ask(revoke(by, value))
            assert isinstance(reply, dict), reply
            bench.ask(*(Unfreeze(caller("operator"), f"identity:{name}") for name in ("deploy-agent", "stranger")))
        elif step == 8:
            bench.restart()
        bench.now += dice.choice([0, 1, 60, 600, 3600])
        bench.core.tick(built)
        found = read_list(bench.store)
        built = found.revoked.version, found.changes_at
        version, now, serials, keys = naive_list(bench.store)
        assert (found.revoked.version, found.revoked.date) == (version, now)
        assert bench.core.list_version() == version
        assert set(serials) <= {bench.key.fingerprint}
        by_ca = dict(zip([bench.key.blob], serials.values(), strict=False))
        assert {ca: serials_of(one) for ca, one in found.revoked.certificates.items()} == by_ca
        assert len(found.revoked.sha256) == len(keys)
    before = encode_krl(read_list(bench.store).revoked)
    bench.restart()
    bench.sign()
    assert encode_krl(read_list(bench.store).revoked) == before
    assert decode_krl(before) == read_list(bench.store).revoked


def test_without_a_revocation_the_list_is_empty_and_has_version_0() -> None:
    bench = Bench()
    bench.sign()
    found = read_list(bench.store)
    assert (found.revoked.version, found.revoked.date, found.revoked.comment, found.changes_at) == (0, 0, "", None)
    assert not found.revoked.certificates
    assert bench.core.list_version() == 0


def test_expiry_alone_makes_a_new_list_at_most_hourly_and_only_when_it_changes_one() -> None:
    bench = Bench()
    bench.sign(ttl=900)
    bench.sign(ttl=1800)
    bench.ask(revoke("serial", "1-2"))
    version, found = listed(bench)
    assert found == {bench.key.blob: ((1, 2),)}
    changes_at = read_list(bench.store).changes_at
    assert changes_at == NOW + 900
    bench.now = NOW + LIST_EVERY - 1
    bench.core.tick((version, changes_at))
    assert "list.published" not in bench.store.kinds()
    bench.core.tick((version - 1, changes_at))
    bench.now = NOW + LIST_EVERY
    bench.core.tick((version - 1, changes_at))  # a list that is not the current one says nothing
    assert "list.published" not in bench.store.kinds()
    bench.core.tick((version, changes_at))
    assert bench.store.bodies("list.published") == [{"reason": "expired"}]
    version, found = listed(bench)
    assert (version, found) == (bench.core.list_version(), {})
    assert read_list(bench.store).changes_at is None
    bench.now += 10 * LIST_EVERY
    bench.core.tick((version, None))
    assert bench.store.kinds().count("list.published") == 1


def test_the_serials_that_a_restore_skipped_are_revoked_for_ever() -> None:
    bench = Bench()
    ca = bench.key.fingerprint
    body: dict[str, object] = {"lost_head": None, "first_serial": "5", "last_serial": "1000004", "ca": ca}
    bench.core.record([Event("ledger.restored", "local:root", body)])
    bench.now += 400 * 86_400
    bench.restart()
    assert listed(bench) == (bench.core.list_version(), {bench.key.blob: ((5, 1_000_004),)})


def test_after_a_restore_versions_are_above_those_of_the_lost_events() -> None:
    """Hosts refuse a version that is older than the one that they have."""
    lost = Bench()
    for _ in range(20):
        lost.ask(revoke("identity", "deploy-agent"))
    before = listed(lost)[0]
    restored = Bench()
    restored.now = lost.now + 60
    body: dict[str, object] = {"lost_head": None, "first_serial": "5", "last_serial": "1000004", "ca": None}
    restored.core.record([Event("ledger.restored", "local:root", body)])
    versions = [before, listed(restored)[0]]
    assert restored.core.list_version() == versions[-1]
    restored.ask(revoke("identity", "deploy-agent"))
    versions.append(listed(restored)[0])
    assert restored.core.list_version() == versions[-1]
    restored.restart()
    assert restored.core.list_version() == versions[-1]
    assert versions == sorted(set(versions))
    assert versions[-1] < 10**18  # the host kit reads 18 digits


def test_a_ca_key_that_the_ledger_does_not_have_is_listed_for_any_ca() -> None:
    bench = Bench()
    bench.sign()
    for entry in bench.store.entries:  # as an earlier release wrote it
        body = json.loads(entry.body)
        body.pop("public_key", None)
        bench.store.entries[entry.seq - 1] = entry.__class__(
            entry.seq, entry.time_ms, entry.kind, entry.actor, json.dumps(body), entry.prev, entry.hash
        )
    bench.ask(revoke("identity", "deploy-agent"))
    version, found = listed(bench)
    assert found == {ANY_CA: ((1, 1),)}
    bench.restart()  # which records the key: the same version must not get other bytes
    assert listed(bench) == (version, {ANY_CA: ((1, 1),)})
    bench.ask(revoke("serial", "1"))
    assert listed(bench)[1] == {bench.key.blob: ((1, 1),)}


# --- the core ----------------------------------------------------------------------------------------------------


def test_an_identity_is_frozen_with_its_revocation_in_one_transaction() -> None:
    bench = Bench()
    bench.sign()
    bench.store.fail = "before"
    (failed,) = bench.ask(revoke("identity", "deploy-agent"))
    assert isinstance(failed, SignerError)
    bench.store.fail = ""
    assert bench.store.frozen == {}
    (reply,) = bench.ask(revoke("identity", "deploy-agent"))
    assert (reply["by"], reply["value"], reply["frozen"], reply["reason"]) == (
        "identity",
        "deploy-agent",
        True,
        "stolen",
    )
    assert bench.store.kinds()[-2:] == ["certificates.revoked", "freeze.set"]
    assert reply["seq"] == bench.core.list_version() == len(bench.store.entries) - 1
    refused = bench.sign()
    assert isinstance(refused, Refused)
    assert refused.code == "frozen"
    bench.restart()
    assert isinstance(bench.sign(), Refused)


def test_a_revoked_key_gets_no_certificate_from_any_door_also_after_a_restart() -> None:
    bench = Bench()
    key = public_key()
    bench.ask(revoke("key", key.fingerprint))
    for _ in range(2):
        refused = bench.sign()
        assert isinstance(refused, Refused)
        assert refused.code == "key_revoked"
        (explained,) = bench.ask(Explain(caller(), "llmops", ask()))
        assert not explained["granted"]
        assert explained["code"] == "key_revoked"
        assert isinstance(bench.sign(public_key=public_line(name="another")), dict)
        bench.restart()
    assert sha256(key.blob).digest() in read_list(bench.store).revoked.sha256


def test_a_revoked_ca_key_signs_nothing_and_the_service_is_not_ready() -> None:
    bench = Bench()
    (unknown,) = bench.ask(revoke("ca", PretendKey("other").fingerprint))
    assert isinstance(unknown, Refused)
    assert unknown.code == "unknown_ca"
    bench.core.check_ready()
    bench.ask(revoke("ca", bench.key.fingerprint))
    for _ in range(2):
        refused = bench.sign()
        assert isinstance(refused, Unavailable)
        assert refused.code == "ca_revoked"
        with pytest.raises(Unavailable, match="is revoked"):
            bench.core.check_ready()
        bench.restart()
    assert bench.key.signed == []
    assert sha256(bench.key.blob).digest() in read_list(bench.store).revoked.sha256


@pytest.mark.parametrize(
    "by, value",
    [
        ("identity", "deploy-agent"),
        ("serial", "1"),
        ("since", "2027-01-15T08:00:00Z"),
        ("key", public_key().fingerprint),
        ("ca", PretendKey().fingerprint),
    ],
)
def test_a_signature_that_is_being_made_when_its_certificate_is_revoked_is_withheld(by: str, value: str) -> None:
    bench = agent_episodes.Bench()
    pending = bench.send()
    bench.ask(revoke(by, value))
    if by == "identity":
        bench.ask(Unfreeze(caller("operator"), "identity:deploy-agent"))
    reply = bench.finish_one(pending)
    assert isinstance(reply, SignerError)
    assert reply.code in ("certificate_revoked", "key_revoked", "ca_revoked")
    assert [body["serial"] for body in bench.store.bodies("certificate.withheld")] == ["1"]


def test_a_signature_that_no_revocation_hits_is_released() -> None:
    bench = agent_episodes.Bench()
    bench.ask(revoke("since", "2027-01-15T08:00:00Z"), revoke("serial", "1-9"))
    pending = bench.send()
    bench.ask(revoke("serial", "2-9"), revoke("since", "2027-01-15T08:00:01Z"))
    reply = bench.finish_one(pending)
    assert isinstance(reply, dict), reply


# --- who may ----------------------------------------------------------------------------------------------------


def test_no_agent_and_nobody_without_the_right_revokes_or_looks() -> None:
    bench = Bench()
    for command in (revoke("serial", "1", "deploy-agent"), revoke("key", public_key().fingerprint, "deploy-agent")):
        (refused,) = bench.ask(command)
        assert isinstance(refused, Refused)
        assert refused.code == "revoke_needs_human"
    bench.policy = policy(POLICY, (', "revoke"', ""))
    bench.restart()
    replies = bench.ask(revoke("serial", "1"), PreviewRevocation(caller("operator"), Revocation("serial", "", 1, 1)))
    for refused in replies:
        assert isinstance(refused, Refused)
        assert refused.code == "not_permitted"
    (refused,) = bench.ask(ListRevocations(caller(), None, 50))
    assert isinstance(refused, Refused)
    assert "certificates.revoked" not in bench.store.kinds()


def test_a_local_user_needs_a_token() -> None:
    bench = Bench()
    (refused,) = bench.ask(Revoke(Caller(None, None, "r-1", "root"), Revocation("serial", "", 1, 1), "x"))
    assert isinstance(refused, Refused)
    assert refused.code == "token_needed"
    assert "revoke" not in local_identity("root").may


def test_whoever_is_frozen_by_name_revokes_nothing() -> None:
    bench = Bench()
    bench.ask(Freeze(caller("operator"), "all", "drill"))
    assert isinstance(bench.ask(revoke("serial", "1"))[0], dict), "what stops everybody does not stop this"
    bench.ask(Freeze(caller("operator"), "identity:operator", "leaked"))
    (refused,) = bench.ask(revoke("serial", "1"))
    assert isinstance(refused, Refused)
    assert refused.code == "frozen_by_name"


def test_to_revoke_an_identity_needs_the_right_to_freeze_and_a_name_that_is_known() -> None:
    bench = Bench()
    (refused,) = bench.ask(revoke("identity", "nobody"))
    assert isinstance(refused, Refused)
    assert refused.code == "unknown_scope"
    bench.sign()
    text = POLICY
    bench.policy = policy(text, ('"approve", "freeze", "hosts"', '"approve", "hosts"'))
    bench.restart()
    (refused,) = bench.ask(revoke("identity", "deploy-agent"))
    assert isinstance(refused, Refused)
    assert refused.code == "not_permitted"
    start, end = text.index("[identities.deploy-agent]"), text.index("[identities.operator]")
    bench.policy = policy(text[:start] + text[end:])
    bench.restart()
    (reply,) = bench.ask(revoke("identity", "deploy-agent"))
    assert reply["frozen"] is False, "it has left the policy, and still holds a certificate"
    assert listed(bench)[1] == {bench.key.blob: ((1, 1),)}


def test_there_is_a_limit_to_keys_and_to_revocations_of_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocation, "MAX_KEYS", 1)
    monkeypatch.setattr(revocation, "MAX_REVOCATIONS", 2)
    bench = Bench()
    one, two = public_key(name="one").fingerprint, public_key(name="two").fingerprint
    replies = bench.ask(revoke("key", one), revoke("key", one), revoke("key", two))
    assert [getattr(reply, "code", "") for reply in replies] == ["", "", "too_many_revoked_keys"]
    replies = bench.ask(revoke("serial", "1"), revoke("serial", "2"), revoke("serial", "3"))
    assert [getattr(reply, "code", "") for reply in replies] == ["", "", "too_many_revocations"]
    bench.restart()
    assert isinstance(bench.ask(revoke("serial", "3"))[0], Refused)
    bench.now += REACH
    assert isinstance(bench.ask(revoke("serial", "3"))[0], dict)


# --- what is shown ------------------------------------------------------------------------------------------------


def test_a_preview_says_what_a_revocation_would_hit_and_changes_nothing() -> None:
    bench = Bench()
    bench.sign(ttl=60)
    bench.now += 100
    bench.sign()
    bench.sign("operator", principals=("operator",))
    count = len(bench.store.entries)
    for by, value, hits in (
        ("identity", "deploy-agent", ["2"]),
        ("serial", "1-9", ["3", "2"]),
        ("since", "2027-01-15T08:00:00Z", ["3", "2"]),
        ("since", "2027-01-15T09:00:00Z", []),
        ("key", public_key().fingerprint, ["3", "2"]),
        ("ca", bench.key.fingerprint, ["3", "2"]),
    ):
        (seen,) = bench.ask(PreviewRevocation(caller("operator"), read_revocation(by, value)))
        assert seen["certificates"] == len(hits)
        assert [row["serial"] for row in seen["newest"]] == hits
        names = {"identity": {"deploy-agent"}, "since": {"operator", "deploy-agent"} if hits else set()}
        expected = names.get(by, {"operator", "deploy-agent"})
        assert {row["name"] for row in seen["identities"]} == expected
        assert {row["name"] for row in seen["principals"]} == {
            name.replace("deploy-agent", "llmops") for name in expected
        }
    assert len(bench.store.entries) == count


def test_a_revoked_certificate_is_shown_as_such_and_is_not_active() -> None:
    bench = Bench()
    for _ in range(3):
        bench.sign()
    bench.ask(revoke("serial", "2"))
    every = ListCertificates(caller(), wanted(), active=False)
    (page,) = bench.ask(every)
    assert [row["status"] for row in page["certificates"]] == ["active", "revoked", "active"]
    (page,) = bench.ask(ListCertificates(caller(), wanted(), active=True))
    assert [row["serial"] for row in page["certificates"]] == ["3", "1"]
    (shown,) = bench.ask(ShowCertificate(caller(), 2))
    assert shown["revoked"]["value"] == "2"
    bench.now += 3600
    bench.ask(revoke("ca", bench.key.fingerprint))
    (page,) = bench.ask(every)
    assert [row["status"] for row in page["certificates"]] == ["expired", "revoked", "expired"]
    (found,) = bench.ask(ListRevocations(caller("operator"), None, 1))
    assert [row["by"] for row in found["revocations"]] == ["ca"]
    (found,) = bench.ask(ListRevocations(caller("operator"), int(found["before"]), 1))
    assert ([row["by"] for row in found["revocations"]], found["before"]) == (["serial"], None)


def wanted() -> Any:
    return Filter()


@pytest.mark.parametrize(
    "by, value",
    [
        ("serial", "0"), ("serial", "5-4"), ("serial", "18446744073709551616"), ("serial", "x"), ("serial", "1-"),
        ("since", "yesterday"), ("since", "2027-01-15T08:00:00"), ("since", "1969-01-15T08:00:00Z"),
        ("key", "SHA256:abc"), ("ca", "deploy-agent"), ("identity", "x" * 65), ("name", "x"),
    ],
)  # fmt: skip
def test_a_malformed_value_is_refused(by: str, value: str) -> None:
    with pytest.raises(BadRequest):
        read_revocation(by, value)
