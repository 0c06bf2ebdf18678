"""Queries: commands that change nothing, and their replies. Pure but for reading the ledger.

An identity sees its own certificates; the right `ledger.read` shows all of them. Certificates and operations are looked
up by another process: here is decided who may see what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, Protocol

from signer.authority.limits import CertificateUsage
from signer.errors import NotFound, Refused
from signer.ledger import lookups
from signer.ledger.lookups import operation_details, revocation_row
from signer.ledger.revoked import made_revocations
from signer.model import ActiveFreeze, Entry, Finding, Head, Identity, Role, SshApprovalKey, Token
from signer.policy.decide import Policy
from signer.policy.rules import allowed_principals
from signer.policy.tokens import token_id
from signer.protocol import commands, replies
from signer.units import timestamp

ACTIVITY_STEP: Final = 3_600  # seconds of one span in the reply to `ShowActivity`
ACTIVITY_SPANS: Final = 24
MOST_HOLDERS: Final = 20  # identities in the reply to `ListLive`
MOST_ROLES: Final = 100  # in one reply, as tokens and approval keys: it is one message
Freezes = Mapping[str, ActiveFreeze]
_NOT_HUMAN: Final = {"agent": "an agent", "workload": "a workload"}


class LedgerReader(Protocol):
    """The read access that queries need."""

    def head(self) -> Head: ...
    def freezes(self) -> dict[str, ActiveFreeze]: ...


def require(identity: Identity, right: str) -> None:
    """Raises `Refused` if policy does not give the identity the right."""
    if right not in identity.may:
        raise Refused(
            "not_permitted",
            f"{identity.name} lacks the right {right}",
            f'add "{right}" to identities.{identity.name}.may in policy.toml',
        )


def require_revoker(identity: Identity) -> None:
    """Raises `Refused` unless the identity is a human with the right `revoke`."""
    if identity.kind != "human":
        raise Refused(
            "revoke_needs_human", f"{identity.name} is {_NOT_HUMAN[identity.kind]} and revokes nothing", "ask a human"
        )
    require(identity, "revoke")


def check_scope(scope: str, policy: Policy) -> None:
    """Raises `Refused` if the scope matches nothing in the policy."""
    kind, _, name = scope.partition(":")
    if scope != "all" and name not in {"identity": policy.identities, "role": policy.roles}.get(kind, {}):
        raise Refused(
            "unknown_scope",
            f"unknown scope {scope[:80]!a}",
            "use all, identity:NAME or role:NAME, with a name from policy.toml",
        )


def answer(
    query: commands.LedgerQuery, identity: Identity, token: Token, policy: Policy, ledger: LedgerReader, now: int
) -> replies.Reply | lookups.Lookup:
    """The reply to one query, or the lookup that finds it; raises `Refused`, `NotFound` or the ledger's errors."""
    if isinstance(query, commands.OfWholeLedger):
        require(identity, "ledger.read")
        return _of_whole_ledger(query, identity, ledger, now)
    match query:
        case commands.ListCertificates():
            return _certificates(query, identity, now)
        case commands.ShowCertificate():
            only = None if "ledger.read" in identity.may else identity.name
            return lookups.FindCertificate(identity.name, commands.MAX_REPLY, query.serial, only, now)
        case commands.PreviewRevocation() | commands.ListRevocations():
            return _revocations(query, identity, now)
        case commands.ListFreezes():
            return freezes_in_force(identity, ledger)
        case commands.ListRoles() | commands.ShowRole():
            return _roles(query, identity, policy)
        case commands.ShowCaller():
            return replies.CallerDetails(
                identity=identity.name,
                kind=identity.kind,
                roles=sorted(identity.roles),
                groups=sorted(identity.groups),
                may=sorted(identity.may),
                expires=timestamp(token.expires),
                expires_in=token.expires - now,
                accessor=token.sha256[:24],
            )


def _of_whole_ledger(
    query: commands.OfWholeLedger, identity: Identity, ledger: LedgerReader, now: int
) -> replies.Reply | lookups.Lookup:
    match query:
        case commands.ShowHead():
            head = ledger.head()
            return replies.Recorded(seq=head.seq, hash=head.hash, time=timestamp(head.time_ms // 1000))
        case commands.ListEntries():
            return lookups.FindEntries(identity.name, commands.MAX_REPLY, query.after, query.limit)
        case commands.ListEvents():
            return lookups.FindEvents(identity.name, commands.MAX_REPLY, query.wanted)
        case commands.ShowActivity():
            return lookups.CountActivity(identity.name, commands.MAX_REPLY, ACTIVITY_STEP, ACTIVITY_SPANS, now)
        case commands.ListOperations():
            return lookups.FindOperations(identity.name, commands.MAX_REPLY, query.evidence, query.before, query.limit)


def freezes_in_force(identity: Identity, ledger: LedgerReader) -> replies.Freezes:
    """The freezes that the identity may see."""
    rows = sorted(visible_freezes(ledger.freezes(), identity).items())
    return replies.Freezes(freezes=[freeze_row(scope, freeze) for scope, freeze in rows])


def freeze_row(scope: str, freeze: ActiveFreeze) -> replies.FreezeRow:
    row = replies.FreezeRow(scope=scope, reason=freeze.reason, by=freeze.by, since=timestamp(freeze.since))
    return row if freeze.until is None else row.model_copy(update={"until": timestamp(freeze.until)})


def visible_freezes(freezes: Freezes, identity: Identity) -> dict[str, ActiveFreeze]:
    """All freezes with the right `freeze` or `ledger.read`; otherwise those that stop the identity."""
    if {"freeze", "ledger.read"} & identity.may:
        return dict(freezes)
    own = {"all", f"identity:{identity.name}", *(f"role:{role}" for role in identity.roles)}
    return {scope: freeze for scope, freeze in freezes.items() if scope in own}


def _revocations(
    query: commands.PreviewRevocation | commands.ListRevocations, identity: Identity, now: int
) -> lookups.Lookup:
    if isinstance(query, commands.PreviewRevocation):
        require_revoker(identity)
        return lookups.PreviewHits(identity.name, commands.MAX_REPLY, query.revocation, now)
    if "revoke" not in identity.may:
        require(identity, "ledger.read")
    return lookups.FindRevocations(identity.name, commands.MAX_REPLY, query.before, query.limit)


def _certificates(query: commands.ListCertificates, identity: Identity, now: int) -> lookups.FindCertificates:
    wanted = replace(query.wanted, active_at=now if query.active else None)
    if wanted.identity != identity.name and "ledger.read" not in identity.may:
        if wanted.identity is not None:
            require(identity, "ledger.read")
        wanted = replace(wanted, identity=identity.name)
    return lookups.FindCertificates(identity.name, commands.MAX_REPLY, wanted, now)


def recorded_reply(entries: Sequence[Entry]) -> replies.OperationDetails | replies.Revoked:
    """The reply that shows what the events of one command recorded."""
    first = entries[0]
    if first.kind == "certificates.revoked":
        row = revocation_row(made_revocations(entries)[0])
        return replies.Revoked.model_validate({**row, "frozen": any(entry.kind == "freeze.set" for entry in entries)})
    fields, shape = operation_details(first), replies.OperationDetails  # a later release may have recorded more
    return shape.model_validate({name: fields[name] for name in shape.model_fields if name in fields})


def _roles(
    query: commands.ListRoles | commands.ShowRole, identity: Identity, policy: Policy
) -> replies.Roles | replies.RoleDetails:
    if isinstance(query, commands.ListRoles):
        return replies.Roles(roles=sorted(identity.roles))
    role = policy.role_for(identity, query.role)
    if role is None:
        raise NotFound("unknown_role", f"there is no role {query.role[:64]}", "list your roles with GET /api/roles")
    return role_details(role, identity)


def role_details(role: Role, identity: Identity) -> replies.RoleDetails:
    """A role with the principals of the identity."""
    return replies.RoleDetails(
        name=role.name,
        principals=sorted(allowed_principals(role, identity)),
        default_principals=sorted(n.replace("{identity}", identity.name) for n in role.default_principals),
        default_ttl=role.default_ttl,
        max_ttl=role.max_ttl,
        key_types=sorted(role.key_types),
        rsa_min_bits=role.rsa_min_bits,
        extensions=replies.Extensions(
            allowed=sorted(role.allowed_extensions),
            default=list(role.default_extensions),
            values={name: value.replace("{identity}", identity.name) for name, value in role.extension_values},
        ),
        critical_options=sorted(role.allowed_critical_options),
        force_command=role.force_command,
        source_address=list(role.source_address) if isinstance(role.source_address, tuple) else role.source_address,
        verify_required=role.verify_required,
        no_touch_required=role.no_touch_required,
        allow_key_id=role.allow_key_id,
        reason_required=role.reason_required,
        backdate=role.backdate,
    )


def explained(identity: Identity, role: Role, findings: list[tuple[Finding, Refused | None]]) -> replies.Explanation:
    """The explanation for an authenticated identity that has the role."""
    known: list[tuple[Finding, Refused | None]] = [
        (Finding("identity", f"{identity.name}, {identity.kind}", "ok"), None),
        (Finding("role", f"{identity.name} may ask for {role.name}", "ok"), None),
    ]
    return explanation(identity.name, role.name, [*known, *findings])


def explanation(identity: str, role: str, findings: list[tuple[Finding, Refused | None]]) -> replies.Explanation:
    """The explanation with every rule, and the first refusal if there is one."""
    refusal = next((refused for _, refused in findings if refused is not None), None)
    rules = [replies.Rule(rule=found.rule, outcome=found.outcome, detail=found.detail) for found, _ in findings]
    found = replies.Explanation(identity=identity, role=role, granted=refusal is None, rules=rules)
    return found if refusal is None else found.model_copy(update=refusal.as_json())


# --- who there is, what each may ask for, and who holds certificates now ----------------------------------------------


def answer_about_identities(
    query: commands.AboutIdentities,
    asker: Identity,
    policy: Policy,
    usage: CertificateUsage,
    freezes: Freezes,
    now: int,
) -> replies.LiveByIdentity | replies.IdentityPage | replies.IdentityDetails:
    """The reply to one query at `now` (seconds since 1970); raises `Refused` or `NotFound`.

    An identity sees itself; the right `ledger.read` shows all of them.
    """
    sees_all = "ledger.read" in asker.may
    if isinstance(query, commands.ListLive):
        live = usage.live_by_identity(now)
        return _live(live if sees_all else {name: count for name, count in live.items() if name == asker.name})
    if isinstance(query, commands.ListIdentities):
        names = sorted(policy.identities) if sees_all else [asker.name]
        return _identity_page(query, names, policy, usage.live_by_identity(now), freezes)
    if query.identity != asker.name:
        require(asker, "ledger.read")
    found = policy.identities.get(query.identity)
    if found is None:
        text = f"there is no identity {query.identity[:64]}"
        raise NotFound("unknown_identity", text, "use the name of an identity of policy.toml")
    return _identity_details(found, policy, usage, freezes, now)


def _live(live: Mapping[str, int]) -> replies.LiveByIdentity:
    holders = sorted((-count, name) for name, count in live.items() if count)
    return replies.LiveByIdentity(
        identities=[replies.LiveOfIdentity(identity=name, count=-count) for count, name in holders[:MOST_HOLDERS]],
        holders=len(holders),
        certificates=-sum(count for count, _ in holders),
    )


def _identity_page(
    query: commands.ListIdentities,
    names: list[str],
    policy: Policy,
    live: Mapping[str, int],
    freezes: Freezes,
) -> replies.IdentityPage:
    part, after = (query.part or "").lower(), query.after or ""
    wanted = [name for name in names if part in name.lower() and name > after]
    page, ends = wanted[: query.limit], last_ends(policy)
    return replies.IdentityPage(
        identities=[
            _identity_row(policy.identities[name], ends.get(name), live.get(name, 0), freezes) for name in page
        ],
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


def _identity_row(identity: Identity, last_end: int | None, live: int, freezes: Freezes) -> replies.IdentityRow:
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


def _identity_details(
    identity: Identity, policy: Policy, usage: CertificateUsage, freezes: Freezes, now: int
) -> replies.IdentityDetails:
    tokens = sorted((t for t in policy.tokens.values() if t.identity == identity.name), key=lambda t: t.expires)
    scopes = ("all", f"identity:{identity.name}", *(f"role:{role}" for role in sorted(identity.roles)))
    roles = [policy.roles[name] for name in sorted(identity.roles) if name in policy.roles][:MOST_ROLES]
    granted = [_granted(role, identity, usage.usage(identity.name, role.name, now).live) for role in roles]
    live = usage.live_by_identity(now).get(identity.name, 0)  # of roles that it has no more, too
    return replies.IdentityDetails(
        identity=_identity_row(identity, tokens[-1].expires if tokens else None, live, freezes),
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
