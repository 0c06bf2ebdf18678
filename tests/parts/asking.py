"""Agents that ask and humans who approve, against a core in the test's hand: one policy, and one word for each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from types import MappingProxyType
from typing import Any

from signer.model import Approval, Identity, Role, SshApprovalKey
from signer.policy.decide import Policy
from signer.protocol.commands import (
    Approve,
    Claim,
    CloseIncident,
    Deny,
    EndWaiver,
    Freeze,
    ListIncidents,
    ListRequests,
    ListWaivers,
    ShowRequest,
    Sign,
    Unfreeze,
    Withdraw,
)
from signer.ssh.statement import approval_statement, request_digest
from tests.parts import builders
from tests.parts.builders import Bench, FakeSignatures, caller, public_key, public_line

SK = "sk-ssh-ed25519@openssh.com"
SECRET = "5e" * 32
CLAIM = sha256(bytes.fromhex(SECRET)).hexdigest()
REASON = "the database is down, ticket 812"
HUMANS = ("anna", "ben", "carl")
ROLES = ("prod", "pair", "strict", "touch", "glass")

_ROLE = """
[roles.{role}]
principals = ["llmops", "backup"]
default_principals = ["llmops"]
default_ttl = "10m"
max_ttl = "15m"
key_types = ["ssh-ed25519"]
extensions = { allowed = ["permit-pty"], default = ["permit-pty"] }
critical_options = { allowed = ["force-command"] }
"""
_IDENTITY = """
[identities.{name}]
kind = "{kind}"
groups = {groups}
roles = ["llmops", "prod", "pair", "strict", "touch", "glass"]
may = {may}
approval_keys = {keys}
tokens = [{ sha256 = "{token:{name}}", expires = 2099-01-01T00:00:00Z }]
"""
_PEOPLE = (
    ("agent-7", "agent", "[]", "[]"),
    ("agent-8", "agent", "[]", "[]"),
    ("ci", "workload", "[]", "[]"),
    ("anna", "human", '["operators"]', '["approve", "freeze"]'),
    ("ben", "human", '["operators"]', '["approve"]'),
    ("carl", "human", '["operators", "guests"]', '["approve"]'),
    ("dora", "human", '["guests"]', "[]"),
    ("auditor", "human", "[]", '["ledger.read"]'),
)


def approval_line(name: str, kind: str = SK) -> str:
    """The public key that a human approves with."""
    return public_line(kind, f"approves {name}")


def approval_key(name: str, kind: str = SK, **changes: Any) -> SshApprovalKey:
    return SshApprovalKey(public_key(kind, f"approves {name}"), **changes)


def asking_policy() -> Policy:
    """Roles that ask humans in each way, agents who ask, and humans who may approve."""
    text = builders.POLICY + "".join(_ROLE.replace("{role}", role) for role in ROLES)
    for name, kind, groups, may in _PEOPLE:
        entry = _IDENTITY.replace("{name}", name).replace("{kind}", kind)
        keys = f'[{{ kind = "ssh", key = "{approval_line(name)}" }}]' if name in (*HUMANS, "dora") else "[]"
        for value, key in ((groups, "groups"), (may, "may"), (keys, "approval_keys")):
            slot = f"{key} = {{{'keys' if key == 'approval_keys' else key}}}\n"
            entry = entry.replace(slot, "" if value == "[]" else f"{key} = {value}\n")
        text += entry
    policy = change_identity(builders.policy(text), "operator", may=frozenset())  # leaves the four below
    asks = Approval(frozenset({"agent", "workload"}), ("operators",), 600)
    policy = change_role(policy, "prod", approval=asks)
    policy = change_role(policy, "pair", approval=replace(asks, count=2, kinds=frozenset({"agent", "human"})))
    policy = change_role(policy, "strict", approval=replace(asks, waivers=False))
    policy = change_role(policy, "touch", approval=asks, presence=True)
    return change_role(policy, "glass", break_glass=True)


def change_role(policy: Policy, role: str, **changes: Any) -> Policy:
    roles: Mapping[str, Role] = {**policy.roles, role: replace(policy.roles[role], **changes)}
    return replace(policy, roles=MappingProxyType(roles), digest=_digest(policy, role, changes))


def change_identity(policy: Policy, name: str, **changes: Any) -> Policy:
    identities: Mapping[str, Identity] = {**policy.identities, name: replace(policy.identities[name], **changes)}
    return replace(policy, identities=MappingProxyType(identities), digest=_digest(policy, name, changes))


def _digest(policy: Policy, *what: object) -> str:
    return sha256(f"{policy.digest} {what}".encode()).hexdigest()


@dataclass
class Asking(Bench):
    """A core with a policy that asks humans."""

    policy: Policy = field(default_factory=asking_policy)

    def one(self, command: Any) -> Any:
        return self.ask(command)[0]

    def request(self, who: str = "agent-7", role: str = "prod", address: str = "192.0.2.7", **changes: Any) -> Any:
        """The reply to a sign request of `who`."""
        return self.one(self.sign_command(who, role, address, **changes))

    @staticmethod
    def sign_command(who: str = "agent-7", role: str = "prod", address: str = "192.0.2.7", **changes: Any) -> Sign:
        asked = builders.ask(role=role, **{"reason": REASON, **changes})
        return Sign(caller(who, address), role, asked)

    def bound(self, who: str = "agent-7", role: str = "prod", **changes: Any) -> Any:
        """The same, bound to the claim secret `SECRET`."""
        return self.request(who, role, public_key="", claim_sha256=CLAIM, **changes)

    def show(self, name: str, who: str = "auditor") -> Any:
        return self.one(ShowRequest(caller(who), name))

    def listed(self, who: str = "auditor", **changes: Any) -> Any:
        return self.one(ListRequests(caller(who), **{"state": None, "identity": None, "before": None, **changes}))

    def signature(self, shown: Any, who: str = "anna", waiver: Any = None, **changes: Any) -> str:
        """A human's signature over what a reply shows; `changes` are to the statement or to its making."""
        what = {"request": shown["request"], "digest": request_digest(shown["frozen"]), "approver": who}
        what |= {name: changes.pop(name) for name in ("request", "digest", "approver") if name in changes}
        line = changes.pop("line", approval_line(who))
        return FakeSignatures.make(line, approval_statement(**what, waiver=waiver), **changes)

    def approve(self, shown: Any, who: str = "anna", waiver: Any = None, **changes: Any) -> Any:
        """The reply to an approval that is signed as it should be, but for `changes`."""
        terms = None if waiver is None else (waiver["until"], waiver["uses"])
        signed = changes.pop("signed_waiver", waiver)
        return self.one(self.approval(shown, who, terms, self.signature(shown, who, signed, **changes)))

    @staticmethod
    def approval(shown: Any, who: str, terms: Any, signature: str) -> Approve:
        return Approve(caller(who), shown["request"], signature, terms)

    def deny(self, shown: Any, who: str = "ben", reason: str = "not today") -> Any:
        return self.one(Deny(caller(who), shown["request"], reason))

    def withdraw(self, shown: Any, who: str = "agent-7") -> Any:
        return self.one(Withdraw(caller(who), shown["request"]))

    def claim(
        self,
        shown: Any,
        who: str = "agent-7",
        secret: str | None = SECRET,
        line: str | None = None,
        address: str = "192.0.2.7",
    ) -> Any:
        key = public_line() if line is None else line
        return self.one(Claim(caller(who, address), shown["request"], key, secret))

    def freeze(self, scope: str, who: str = "anna") -> Any:
        return self.one(Freeze(caller(who), scope, "drill", None))

    def thaw(self, scope: str, who: str = "anna") -> Any:
        return self.one(Unfreeze(caller(who), scope))

    def waivers(self, who: str = "auditor") -> Any:
        return self.one(ListWaivers(caller(who)))["waivers"]

    def end_waiver(self, name: str, who: str = "anna") -> Any:
        return self.one(EndWaiver(caller(who), name, "enough"))

    def incidents(self, who: str = "auditor", *, also_closed: bool = False) -> Any:
        return self.one(ListIncidents(caller(who), also_closed))["incidents"]

    def close(self, name: str, reference: str = "4a1f09c", who: str = "anna") -> Any:
        return self.one(CloseIncident(caller(who), name, reference))

    def use(self, policy: Policy) -> None:
        """Another policy from now on."""
        self.policy = policy
        assert self.core.use_policy(policy) is None

    def issued(self) -> list[dict[str, Any]]:
        """The records of all certificates."""
        return self.store.bodies("certificate.issued")
