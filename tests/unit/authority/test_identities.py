"""What an identity sees of the others, of live certificates, and of the ledger's events."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from signer.errors import NotFound, Refused, SignerError
from signer.model import EventFilter
from signer.protocol.commands import (
    Command,
    Freeze,
    ListEvents,
    ListIdentities,
    ListLive,
    ShowActivity,
    ShowIdentity,
)
from tests.parts.builders import NOW, POLICY, Bench, caller, policy, role_lines

SWAPS = (
    role_lines(
        'approval = { for = ["agent"], by = ["operators"], valid_for = "10m" }',
        "limits = { per_minute = 30, live = 20 }",
    ),
)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def ask(bench: Bench, command: Command) -> Any:
    (reply,) = bench.ask(command)
    return reply


def refused(reply: object, kind: type[SignerError], code: str) -> None:
    assert isinstance(reply, kind), reply
    assert reply.code == code


def test_live_certificates_are_counted_by_identity_until_they_expire(bench: Bench) -> None:
    for who in ("deploy-agent", "deploy-agent", "operator"):
        bench.sign(who)
    rows = [{"identity": "deploy-agent", "count": 2}, {"identity": "operator", "count": 1}]
    assert ask(bench, ListLive(caller("operator"))) == {"identities": rows, "holders": 2, "certificates": 3}
    own = {"identities": rows[:1], "holders": 1, "certificates": 2}
    assert ask(bench, ListLive(caller("deploy-agent"))) == own
    bench.now = NOW + 901
    assert ask(bench, ListLive(caller("operator"))) == {"identities": [], "holders": 0, "certificates": 0}


def test_certificates_of_a_role_that_was_taken_away_still_count(bench: Bench) -> None:
    bench.sign("deploy-agent")
    now = bench.core.policy
    agent = replace(now.identities["deploy-agent"], roles=frozenset())
    assert bench.core.use_policy(replace(now, identities={**now.identities, "deploy-agent": agent})) is None
    (row,) = ask(bench, ListIdentities(caller("operator"), "deploy", None, 50))["identities"]
    assert ask(bench, ShowIdentity(caller("operator"), "deploy-agent"))["identity"] == row
    assert row["live"] == 1


def test_only_the_right_to_read_the_ledger_shows_all_identities(bench: Bench) -> None:
    def names(who: str, part: str | None = None, after: str | None = None, limit: int = 50) -> list[str]:
        page = ask(bench, ListIdentities(caller(who), part, after, limit))
        assert (page["after"] is None) == (len(page["identities"]) < limit)
        return [row["name"] for row in page["identities"]]

    assert names("operator") == ["deploy-agent", "operator", "stranger"]
    assert names("operator", "STR") == ["stranger"]
    assert names("operator", limit=2) == ["deploy-agent", "operator"]
    assert names("operator", after="deploy-agent") == ["operator", "stranger"]
    assert names("stranger") == ["stranger"]
    assert names("stranger", "operator") == []


def test_the_others_details_need_the_right_and_ones_own_do_not(bench: Bench) -> None:
    assert ask(bench, ShowIdentity(caller("stranger"), "stranger"))["identity"]["name"] == "stranger"
    refused(ask(bench, ShowIdentity(caller("stranger"), "operator")), Refused, "not_permitted")
    # It does not reveal either whether there is such an identity.
    refused(ask(bench, ShowIdentity(caller("stranger"), "nobody")), Refused, "not_permitted")
    refused(ask(bench, ShowIdentity(caller("operator"), "nobody")), NotFound, "unknown_identity")


def test_an_identitys_roles_tokens_keys_and_freezes_are_those_of_the_policy() -> None:
    bench = Bench(policy(POLICY, *SWAPS))
    bench.sign("operator")
    bench.ask(Freeze(caller("operator"), "role:llmops", "drill"))
    found = ask(bench, ShowIdentity(caller("operator"), "deploy-agent"))
    (role,) = found["roles"]
    assert role["name"] == "llmops"
    assert role["principals"] == ["deploy-agent", "llmops"]
    assert role["approval"] == {
        "kinds": ["agent"],
        "by": ["operators"],
        "count": 1,
        "valid_for": 600,
        "waivers": True,
        "key_kinds": ["ssh", "webauthn"],
    }
    assert (role["per_minute"], role["live"], role["holds"], role["any_key"]) == (30, 20, 0, True)
    assert [(row["scope"], row["reason"], row["by"]) for row in found["freezes"]] == [
        ("role:llmops", "drill", "operator")
    ]
    assert [row["expires"] for row in found["tokens"]] == ["2099-01-01T00:00:00Z"]
    own = ask(bench, ShowIdentity(caller("operator"), "operator"))
    (key,) = own["approval_keys"]
    assert (key["kind"], key["software"]) == ("ssh", False)
    assert (own["identity"]["live"], own["roles"][0]["holds"]) == (1, 1)


def test_an_identity_is_frozen_by_its_own_name_and_with_everything(bench: Bench) -> None:
    def frozen() -> dict[str, bool]:
        page = ask(bench, ListIdentities(caller("operator"), None, None, 50))
        return {row["name"]: row["frozen"] for row in page["identities"]}

    assert not any(frozen().values())
    bench.ask(Freeze(caller("operator"), "identity:stranger", "lost laptop"))
    assert frozen() == {"deploy-agent": False, "operator": False, "stranger": True}
    bench.ask(Freeze(caller("operator"), "all", "drill"))
    assert all(frozen().values())


def test_events_and_activity_need_the_right_to_read_the_ledger(bench: Bench) -> None:
    bench.sign()
    for command in (ListEvents(caller("deploy-agent"), EventFilter()), ShowActivity(caller("deploy-agent"))):
        refused(ask(bench, command), Refused, "not_permitted")
    page = ask(bench, ListEvents(caller("operator"), EventFilter(kind="certificate", limit=1)))
    assert [(entry["kind"], entry["actor"]) for entry in page["entries"]] == [("certificate.issued", "deploy-agent")]
    assert page["before"] is None
    # The second refusal repeats the first one within a minute: it is counted when that minute is over.
    activity = ask(bench, ShowActivity(caller("operator")))
    assert activity["step"] == 3600
    assert len(activity["rows"]) == 24
    assert activity["rows"][-1] == {"start": "2027-01-15T08:00:00Z", "signatures": 1, "refusals": 1}
    assert all(row["signatures"] == row["refusals"] == 0 for row in activity["rows"][:-1])


def test_a_page_of_events_says_where_the_next_one_begins(bench: Bench) -> None:
    for _ in range(3):
        bench.sign()
    first = ask(bench, ListEvents(caller("operator"), EventFilter(kind="certificate", limit=2)))
    second = ask(
        bench, ListEvents(caller("operator"), EventFilter(kind="certificate", before=int(first["before"]), limit=2))
    )
    serials = [entry["body"]["serial"] for page in (first, second) for entry in page["entries"]]
    assert serials == ["3", "2", "1"]
    assert second["before"] is None
