"""The plan of a restore: what is lost, which serials are skipped, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from signer.authority.approvals import Approvals
from signer.authority.restored import SKIPPED, is_restored, plan_restore
from signer.errors import Refused
from signer.ledger.store import Ledger
from signer.model import CaKeys, Event, Head
from tests.parts.asking import Asking
from tests.parts.events import issued, refused

CA = "SHA256:" + "B" * 43
KEYS = CaKeys(CA)
BASE = [Event("keeper.started", "keeper", {"ca": CA}), issued(1), issued(2), refused()]
NOW = 1_800_000_000_000
Make = Callable[[list[Event]], Ledger]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Ledgers with the events that are asked for; the first ones of two are the same."""
    with ExitStack() as stack:

        def new(events: list[Event]) -> Ledger:
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            folder.mkdir()
            ledger = stack.enter_context(closing(Ledger(folder)))
            for event in events:
                ledger.commit([event], NOW)
            return ledger

        yield new


def test_what_the_replaced_ledger_has_more_is_lost(make: Make) -> None:
    backup, replaced = make(BASE), make([*BASE, issued(3), issued(4), refused()])
    plan = plan_restore(backup, replaced, None, KEYS)
    assert plan.head == backup.head()
    assert plan.lost_head == replaced.head()
    assert (plan.first_serial, plan.last_serial) == (3, 4 + SKIPPED)
    assert (plan.ca, plan.requests, plan.is_newer) == (CA, (), False)


def test_the_events_name_what_is_lost_and_freeze_everything(make: Make) -> None:
    backup = make(BASE)
    plan = plan_restore(backup, None, Head(9, "a" * 64, 0), KEYS)
    restored, frozen = plan.events("root")
    assert (restored.kind, restored.actor) == ("ledger.restored", "local:root")
    assert restored.body == {
        "lost_head": {"seq": 9, "hash": "a" * 64}, "first_serial": 3, "last_serial": 2 + SKIPPED, "ca": CA
    }  # fmt: skip
    assert (frozen.kind, frozen.actor, frozen.body["scope"]) == ("freeze.set", "local:root", "all")
    backup.commit([restored, frozen], NOW)
    assert backup.last_serial() == 2 + SKIPPED
    assert list(backup.freezes()) == ["all"]
    assert [(one.lost_seq, one.first_serial, one.last_serial) for one in backup.restores()] == [(9, 3, 2 + SKIPPED)]


def test_without_any_knowledge_of_the_end_there_is_no_lost_head(make: Make) -> None:
    plan = plan_restore(make(BASE), None, None, KEYS)
    assert plan.lost_head is None
    assert plan.events("root")[0].body["lost_head"] is None


def test_more_serials_are_skipped_than_events_can_be_lost(make: Make) -> None:
    plan = plan_restore(make(BASE), None, Head(5_000_004, "a" * 64, 0), KEYS)
    assert plan.last_serial == 2 + 5_000_000


def test_the_newest_known_head_counts(make: Make) -> None:
    backup, replaced = make(BASE), make([*BASE, issued(3)])
    assert plan_restore(backup, replaced, replaced.head(), KEYS).lost_head == replaced.head()
    assert plan_restore(backup, replaced, Head(99, "a" * 64, 0), KEYS).lost_head == Head(99, "a" * 64, 0)
    assert plan_restore(backup, replaced, backup.head(), KEYS).lost_head == replaced.head()
    assert plan_restore(backup, None, backup.head(), KEYS).lost_head is None


def test_a_saved_head_of_another_ledger_is_refused(make: Make) -> None:
    backup, replaced = make(BASE), make([*BASE, issued(3)])
    for seq in (3, 5):
        with pytest.raises(Refused) as caught:
            plan_restore(backup, replaced, Head(seq, "a" * 64, 0), KEYS, allow_other=True)
        assert caught.value.code == "restore_head_differs"


def test_a_newer_backup_is_said_to_be_newer(make: Make) -> None:
    backup, replaced = make([*BASE, issued(3)]), make(BASE)
    plan = plan_restore(backup, replaced, None, KEYS)
    assert (plan.is_newer, plan.lost_head) == (True, None)
    assert plan.first_serial == 4


def test_a_backup_of_another_ledger_is_refused_unless_it_is_meant(make: Make) -> None:
    backup, replaced = make([*BASE, issued(7)]), make([*BASE[:-1], issued(3), issued(4), issued(900)])
    with pytest.raises(Refused) as caught:
        plan_restore(backup, replaced, None, KEYS)
    assert caught.value.code == "restore_other_ledger"
    plan = plan_restore(backup, replaced, None, KEYS, allow_other=True)
    assert (plan.first_serial, plan.last_serial) == (8, 900 + SKIPPED)


def test_a_backup_of_another_ca_is_refused_unless_it_is_meant(make: Make) -> None:
    other = CaKeys("SHA256:" + "C" * 43)
    with pytest.raises(Refused) as caught:
        plan_restore(make(BASE), None, None, other)
    assert caught.value.code == "restore_other_ca"
    assert plan_restore(make(BASE), None, None, other, allow_other=True).ca is None


def test_the_range_is_of_any_ca_if_another_key_may_have_signed_what_is_lost(make: Make) -> None:
    backup = make(BASE)
    rotated = make([*BASE, Event("ca.rotated", "keeper", {"from": CA, "to": "SHA256:" + "C" * 43})])
    assert plan_restore(backup, None, None, KEYS).ca == CA
    assert plan_restore(backup, rotated, None, KEYS).ca is None
    assert plan_restore(backup, None, None, None).ca is None


def test_a_restore_is_recognized_until_something_follows_it(make: Make) -> None:
    backup = make(BASE)
    events = plan_restore(backup, None, None, KEYS).events("root")
    replaced = make(BASE)
    assert not is_restored(backup, replaced)
    replaced.commit(events, NOW + 5)
    assert is_restored(backup, replaced)
    assert not is_restored(make(BASE[:-1]), replaced)
    replaced.commit([Event("keeper.started", "keeper", {})], NOW + 6)
    assert not is_restored(backup, replaced)


def test_no_request_of_the_backup_is_open_after_it(make: Make) -> None:
    asking = Asking()
    asked = asking.request()
    approved = asking.approve(asking.request("agent-8"))
    assert approved["state"] == "approved"
    backup = make([Event(entry.kind, entry.actor, json.loads(entry.body)) for entry in asking.store.entries])
    assert list(Approvals.from_entries(backup.asked(0)).open) == [asked["request"], approved["request"]]
    plan = plan_restore(backup, None, None, None)
    assert plan.requests == (asked["request"], approved["request"])
    backup.commit(plan.events("root"), NOW)
    assert not Approvals.from_entries(backup.asked(0)).open
