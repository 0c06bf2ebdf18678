"""What a valid policy allows and an operator may not mean: each as a warning of `signer policy check`. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from signer.model import Identity, Role, SshApprovalKey
from signer.policy.decide import Policy
from signer.settings import Settings
from signer.toml import Faults, find_places


class Concern(NamedTuple):
    """A stable code, a sentence without a full stop, and the next action."""

    code: str
    text: str
    hint: str


LOCKED_OUT: Final = (
    '"caller" pins this host: SIGNER_LISTEN is reached from here only, and SIGNER_TRUSTED_PROXIES names nobody'
)


def pins_own_address(policy: Policy, settings: Settings) -> list[str]:
    """The roles whose `source_address = "caller"` can only be this host's own, by where the API listens."""
    if settings.trusted_proxies or settings.trusted_proxy_users:
        return []
    if not all(listen.is_private() for listen in settings.listen):
        return []
    return [role.name for role in policy.roles.values() if role.source_address == "caller"]


def check_callers(raw: bytes, name: str, policy: Policy, settings: Settings) -> None:
    """Raises `BadFile`, with the line of each, if there are such roles in a policy file's bytes."""
    if roles := pins_own_address(policy, settings):
        faults = Faults("policy_refused", name, "list the networks of the callers, or name the proxies in the settings")
        faults.places = find_places(raw.decode("utf-8-sig"))
        for role in roles:
            faults.add(("roles", role, "source_address"), LOCKED_OUT)
        faults.check()


def find_concerns(policy: Policy) -> Iterator[Concern]:
    """Yields what the approvals of a policy leave open, identities first, in the order of the file."""
    for identity in policy.identities.values():
        yield from _concerns_of_identity(policy, identity)
    for role in policy.roles.values():
        yield from _concerns_of_role(policy, role)


def _concerns_of_identity(policy: Policy, identity: Identity) -> Iterator[Concern]:
    place = f"identities.{identity.name}"
    for line in identity.approval_keys:
        if isinstance(line, SshApprovalKey) and line.software:
            yield Concern(
                "approval_key_in_software",
                f"{place}: {line.fingerprint} is a software key, with which any program of {identity.name}'s"
                " approves unseen",
                "replace it with a FIDO key (sk-…)",
            )
    if identity.kind == "human":
        roles = [policy.roles[name] for name in sorted(identity.roles)]
        own = [role for role in roles if role.presence or role.break_glass]
        if signed := [role.name for role in own if not identity.holds_key_of(role.key_kinds)]:
            yield Concern(
                "approval_key_missing",
                f"{place}: cannot get {', '.join(signed)}, which takes {identity.name}'s own signature",
                f"add {place}.approval_keys, or remove the role",
            )


def _concerns_of_role(policy: Policy, role: Role) -> Iterator[Concern]:
    if (approval := role.approval) is None:
        return
    place = f"roles.{role.name}"
    humans = [who.name for who in policy.identities.values() if who.kind == "human" and role.name in who.roles]
    if "human" not in approval.kinds:
        if humans and not role.presence:
            yield Concern(
                "role_by_token_alone",
                f"{place}: {' and '.join(sorted(approval.kinds))}s get it only by approval,"
                f" {', '.join(humans)} by a token alone",
                "set presence = true, or add human to approval.for: an agent may hold a human's token",
            )
        return
    approvers = {
        who.name
        for who in policy.identities.values()
        if "approve" in who.may and not who.groups.isdisjoint(approval.by) and who.holds_key_of(role.key_kinds)
    }
    for name in humans:
        if len(approvers - {name}) < approval.count:
            yield Concern(
                "approvers_too_few",
                f"{place}: {name} cannot get it: nobody approves their own request,"
                f" and only {len(approvers - {name})} of {approval.count} can approve it",
                f"let more members of {', '.join(approval.by)} approve",
            )
