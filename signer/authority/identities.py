"""Queries about the policy's identities: who there is, what each may ask for, and who holds certificates now. Pure.

An identity sees itself; the right `ledger.read` shows all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from signer.authority.limits import CertificateUsage
from signer.authority.queries import freeze_row, require, role_details
from signer.errors import NotFound
from signer.model import ActiveFreeze, Identity, Role, SshApprovalKey, Token
from signer.policy.decide import Policy
from signer.policy.tokens import token_id
from signer.protocol import replies
from signer.protocol.commands import AboutIdentities, ListIdentities, ListLive
from signer.units import timestamp

MOST_HOLDERS: Final = 20  # identities in the reply to `ListLive`
MOST_ROLES: Final = 100  # in one reply, as tokens and approval keys: it is one message
Freezes = Mapping[str, ActiveFreeze]


def answer(
    query: AboutIdentities, asker: Identity, policy: Policy, usage: CertificateUsage, freezes: Freezes, now: int
) -> replies.LiveByIdentity | replies.IdentityPage | replies.IdentityDetails:
    """The reply to one query at `now` (seconds since 1970); raises `Refused` or `NotFound`."""
    sees_all = "ledger.read" in asker.may
    if isinstance(query, ListLive):
        live = usage.live_by_identity(now)
        return _live(live if sees_all else {name: count for name, count in live.items() if name == asker.name})
    if isinstance(query, ListIdentities):
        names = sorted(policy.identities) if sees_all else [asker.name]
        return _page(query, names, policy, usage.live_by_identity(now), freezes)
    if query.identity != asker.name:
        require(asker, "ledger.read")
    found = policy.identities.get(query.identity)
    if found is None:
        text = f"there is no identity {query.identity[:64]}"
        raise NotFound("unknown_identity", text, "use the name of an identity of policy.toml")
    return _details(found, policy, usage, freezes, now)


def _live(live: Mapping[str, int]) -> replies.LiveByIdentity:
    holders = sorted((-count, name) for name, count in live.items() if count)
    return replies.LiveByIdentity(
        identities=[replies.LiveOfIdentity(identity=name, count=-count) for count, name in holders[:MOST_HOLDERS]],
        holders=len(holders),
        certificates=-sum(count for count, _ in holders),
    )


def _page(
    query: ListIdentities, names: list[str], policy: Policy, live: Mapping[str, int], freezes: Freezes
) -> replies.IdentityPage:
    part, after = (query.part or "").lower(), query.after or ""
    wanted = [name for name in names if part in name.lower() and name > after]
    page, ends = wanted[: query.limit], last_ends(policy)
    return replies.IdentityPage(
        identities=[_row(policy.identities[name], ends.get(name), live.get(name, 0), freezes) for name in page],
        after=page[-1] if len(wanted) > len(page) else None,
    )


def last_ends(policy: Policy) -> dict[str, int]:
    """When the last token of each identity ends, in seconds since 1970; one pass, however many there are."""
    found: dict[str, int] = {}
    for token in policy.tokens.values():
        found[token.identity] = max(found.get(token.identity, 0), token.expires)
    return found


def token_end(token: Token) -> replies.TokenEnd:
    """When a token ends, for whoever may see it."""
    return replies.TokenEnd(id=token_id(token), identity=token.identity, expires=timestamp(token.expires))


def _row(identity: Identity, last_end: int | None, live: int, freezes: Freezes) -> replies.IdentityRow:
    return replies.IdentityRow(
        name=identity.name,
        kind=identity.kind,
        groups=sorted(identity.groups),
        roles=sorted(identity.roles),
        may=sorted(identity.may),
        expires=None if last_end is None else timestamp(last_end),
        approval_keys=len(identity.approval_keys),
        frozen="all" in freezes or f"identity:{identity.name}" in freezes,
        live=live,
    )


def _details(
    identity: Identity, policy: Policy, usage: CertificateUsage, freezes: Freezes, now: int
) -> replies.IdentityDetails:
    tokens = sorted((t for t in policy.tokens.values() if t.identity == identity.name), key=lambda t: t.expires)
    scopes = ("all", f"identity:{identity.name}", *(f"role:{role}" for role in sorted(identity.roles)))
    roles = [policy.roles[name] for name in sorted(identity.roles) if name in policy.roles][:MOST_ROLES]
    granted = [_granted(role, identity, usage.usage(identity.name, role.name, now).live) for role in roles]
    live = usage.live_by_identity(now).get(identity.name, 0)  # of roles that it has no more, too
    return replies.IdentityDetails(
        identity=_row(identity, tokens[-1].expires if tokens else None, live, freezes),
        roles=granted,
        tokens=[token_end(token) for token in tokens[:MOST_ROLES]],
        approval_keys=[
            replies.ApprovalKeyRow(
                kind=key.kind,
                fingerprint=key.fingerprint,
                software=isinstance(key, SshApprovalKey) and key.software,
            )
            for key in identity.approval_keys[:MOST_ROLES]
        ],
        freezes=[freeze_row(scope, freezes[scope]) for scope in scopes if scope in freezes],
    )


def _granted(role: Role, identity: Identity, holds: int) -> replies.GrantedRole:
    approval = role.approval
    return replies.GrantedRole(
        **dict(role_details(role, identity)),
        approval=None
        if approval is None
        else replies.ApprovalTerms(
            kinds=sorted(approval.kinds),
            by=sorted(approval.by),
            count=approval.count,
            valid_for=approval.valid_for,
            waivers=approval.waivers,
            key_kinds=sorted(role.key_kinds),
        ),
        presence=role.presence,
        break_glass=role.break_glass,
        per_minute=role.limits.per_minute,
        live=role.limits.live,
        holds=holds,
        any_key=role.keys is None and identity.keys is None,
    )
