"""The life of requests against a model that a reader can check: random steps, restarts and a disk that fails between.

The model knows only who said what when, and says anew in each situation what that is worth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from signer.authority.approvals import MAX_PENDING_OF_IDENTITY, PENDING_FOR
from signer.errors import SignerError
from signer.policy.decide import Policy
from tests.parts.asking import Asking, asking_policy, change_identity, change_role
from tests.parts.builders import public_line

VALID_FOR = 600
AGENTS, HUMANS = ("agent-7", "agent-8"), ("anna", "ben", "carl")
GOOD = asking_policy()
_ASKS = GOOD.roles["prod"].approval
assert _ASKS is not None
# Each with who may approve under it, and how many role prod needs.
POLICIES: dict[str, tuple[Policy, frozenset[str], int]] = {
    "good": (GOOD, frozenset(HUMANS), 1),
    "ben lost the right": (change_identity(GOOD, "ben", may=frozenset()), frozenset({"anna", "carl"}), 1),
    "anna lost the key": (change_identity(GOOD, "anna", approval_keys=()), frozenset({"ben", "carl"}), 1),
    "two for prod": (change_role(GOOD, "prod", approval=replace(_ASKS, count=2)), frozenset(HUMANS), 2),
}


@dataclass
class Told:
    """A request as the model knows it."""

    shown: dict[str, Any]
    who: str
    role: str
    ask: tuple[object, ...]
    is_bound_to_key: bool
    asked: float
    yes: dict[str, float] = field(default_factory=dict)
    end: str = ""
    denied_by: str = ""


class Life(RuleBasedStateMachine):
    """The core and the model, side by side."""

    requests: Bundle[Told | None] = Bundle("requests")

    @initialize(target=requests)
    def begin(self) -> Told | None:
        self.bench = Asking()
        self.known: list[Told] = []
        self.frozen: set[str] = set()
        self.policy = "good"
        self.issued = 0
        return self.ask("agent-7", "prod", 600, True)

    # --- the model ----------------------------------------------------------------------------------------------

    def counting(self, told: Told) -> list[str]:
        """Whose approval counts: they have right and key now. A freeze has removed theirs for good."""
        return [name for name in told.yes if name in POLICIES[self.policy][1]]

    def needs(self, told: Told) -> int:
        return POLICIES[self.policy][2] if told.role == "prod" else 2

    def state(self, told: Told) -> str:
        if told.end:
            return told.end
        names = self.counting(told)
        if len(names) >= self.needs(told):
            return "approved" if self.bench.now < max(told.yes[name] for name in names) + VALID_FOR else "lapsed"
        return "pending" if self.bench.now < told.asked + PENDING_FOR else "expired"

    def is_stopped(self, told_or_who: str, role: str) -> bool:
        return bool(self.frozen & {f"identity:{told_or_who}", f"role:{role}"})

    def settle(self) -> None:
        """What the keeper notices each second."""
        self.bench.core.tick()
        for told in self.known:
            told.end = self.state(told) if self.state(told) in ("expired", "lapsed") else told.end

    # --- steps --------------------------------------------------------------------------------------------------

    @rule(target=requests, who=st.sampled_from(AGENTS), role=st.sampled_from(["prod", "pair"]), by_key=st.booleans())
    def ask_once_more(self, who: str, role: str, by_key: bool) -> Told | None:
        return self.ask(who, role, 600, by_key)

    def ask(self, who: str, role: str, ttl: int, by_key: bool) -> Told | None:
        ask = (who, role, ttl, by_key)
        mine = [told for told in self.known if told.ask == ask]
        open_ones = [told for told in self.known if told.who == who and not told.end]
        newest = mine[-1] if mine else None
        reply = (self.bench.request if by_key else self.bench.bound)(who, role, ttl=ttl)
        if self.is_stopped(who, role):
            assert reply.code == "frozen"
        elif newest is not None and self.state(newest) == "approved" and by_key:
            self.expect_certificate(reply, newest)
        elif newest is not None and self.state(newest) in ("pending", "approved"):
            assert reply["request"] == newest.shown["request"]
        elif newest is not None and newest.end == "denied" and self.bench.now < newest.asked + PENDING_FOR:
            assert (reply.code, reply.facts["by"]) == ("request_denied", newest.denied_by)
        elif len(open_ones) >= MAX_PENDING_OF_IDENTITY:
            assert reply.code == "too_many_pending"
        elif len(POLICIES[self.policy][1] - self.frozen_people()) < (POLICIES[self.policy][2] if role == "prod" else 2):
            assert reply.code == "no_approver"
        else:
            told = Told(reply, who, role, ask, by_key, self.bench.now)
            assert reply["state"] == "pending"
            self.known.append(told)
            return told
        return newest

    def frozen_people(self) -> set[str]:
        return {scope.removeprefix("identity:") for scope in self.frozen}

    @rule(told=requests, who=st.sampled_from(HUMANS))
    def approve(self, told: Told | None, who: str) -> None:
        if told is None:
            return
        reply, state = self.bench.approve(told.shown, who), self.state(told)
        if who not in POLICIES[self.policy][1]:
            assert reply.code in ("unknown_request", "not_an_approver", "approval_key_unknown", f"request_{state}")
        elif f"identity:{who}" in self.frozen:
            assert reply.code == "frozen"
        elif state in ("pending", "approved") and who in self.counting(told):
            assert reply.code == "already_approved"
        elif state != "pending":
            assert reply.code == f"request_{state}"
        else:
            told.yes[who] = self.bench.now
            assert reply["state"] == self.state(told)

    @rule(told=requests, who=st.sampled_from(("ben", "carl")))
    def deny(self, told: Told | None, who: str) -> None:
        if told is None:
            return
        reply, state = self.bench.deny(told.shown, who), self.state(told)
        if who == "ben" and self.policy == "ben lost the right":
            assert reply.code == "unknown_request"
        elif f"identity:{who}" in self.frozen:
            assert reply.code == "frozen"
        elif state != "pending":
            assert reply.code == f"request_{state}"
        else:
            told.end, told.denied_by = "denied", who
            assert reply["denied"]["by"] == who

    @rule(told=requests)
    def withdraw(self, told: Told | None) -> None:
        if told is None:
            return
        reply, state = self.bench.withdraw(told.shown, told.who), self.state(told)
        if state in ("pending", "approved"):
            assert reply["state"] == "withdrawn"
            told.end = "withdrawn"
        else:
            assert reply.code == f"request_{state}"

    @rule(told=requests, is_wrong=st.booleans())
    def claim(self, told: Told | None, is_wrong: bool) -> None:
        if told is None:
            return
        wrong: dict[str, Any] = {}
        if is_wrong:
            wrong = {"line": public_line(name="another")} if told.is_bound_to_key else {"secret": "00" * 32}
        state = self.state(told)
        reply = self.bench.claim(told.shown, told.who, **wrong)
        if self.is_stopped(told.who, told.role):
            assert reply.code == "frozen"
        elif is_wrong:
            assert reply.code == ("claim_key_differs" if told.is_bound_to_key else "claim_secret_wrong")
        elif state == "approved":
            self.expect_certificate(reply, told)
        elif state == "pending":
            assert reply["state"] == "pending"
        else:
            assert reply.code == f"request_{state}"

    def expect_certificate(self, reply: Any, told: Told) -> None:
        names = self.counting(told)
        assert "certificate" in reply, reply
        told.end = "issued"
        self.issued += 1
        record = self.bench.issued()[-1]
        assert (record["request"], sorted(record["approved_by"])) == (told.shown["request"], sorted(names))
        assert record["valid_before"] - self.bench.now == told.shown["frozen"]["ttl"]

    @rule(scope=st.sampled_from(["identity:ben", "identity:carl", "identity:agent-7", "role:prod"]))
    def freeze_or_thaw(self, scope: str) -> None:
        if scope in self.frozen:
            self.bench.thaw(scope)
            self.frozen.remove(scope)
            return
        self.bench.freeze(scope)
        self.frozen.add(scope)
        for told in self.known:
            if not told.end:
                told.yes.pop(scope.removeprefix("identity:"), None)

    @rule(name=st.sampled_from(sorted(POLICIES)))
    def use(self, name: str) -> None:
        self.policy = name
        self.bench.use(POLICIES[name][0])

    @rule(seconds=st.sampled_from([1, 30, VALID_FOR - 1, VALID_FOR, PENDING_FOR - 1]))
    def wait(self, seconds: int) -> None:
        self.bench.now += seconds
        self.settle()

    @rule()
    def restart(self) -> None:
        self.bench.restart()

    @rule(
        told=requests, step=st.sampled_from(["approve", "deny", "withdraw", "claim"]), fail=st.sampled_from(["before"])
    )
    def fail(self, told: Told | None, step: str, fail: str) -> None:
        """The disk takes nothing: whatever was tried did not happen, and nobody is told otherwise."""
        if told is None:
            return
        steps: dict[str, Callable[[], Any]] = {
            "approve": lambda: self.bench.approve(told.shown, "carl"),
            "deny": lambda: self.bench.deny(told.shown, "carl"),
            "withdraw": lambda: self.bench.withdraw(told.shown, told.who),
            "claim": lambda: self.bench.claim(told.shown, told.who),
        }
        self.bench.store.fail = "before"
        reply = steps[step]()
        self.bench.store.fail = ""
        assert isinstance(reply, SignerError) or reply["state"] == "pending"

    # --- what always holds ----------------------------------------------------------------------------------------

    @invariant()
    def the_core_shows_what_the_model_says(self) -> None:
        for told in self.known[-8:]:
            shown = self.bench.show(told.shown["request"])
            assert shown["state"] == self.state(told)
            assert [row["by"] for row in shown["approvals"] if row["counts"]] == self.counting(told) or told.end
        assert len(self.bench.issued()) == self.issued
        assert not self.bench.faults


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=40,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
