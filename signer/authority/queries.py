"""Queries: commands that change nothing, and their replies. Pure but for reading the ledger.

An identity sees its own certificates; the right `ledger.read` shows all of them. Certificates and operations are looked
up by another process: here is decided who may see what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, Protocol

from signer.errors import NotFound, Refused
from signer.ledger import lookups
from signer.ledger.lookups import operation_details, revocation_row
from signer.ledger.revoked import made_revocations
from signer.model import ActiveFreeze, Entry, Finding, Head, Identity, Role, Token
from signer.policy.decide import Policy
from signer.policy.rules import allowed_principals
from signer.protocol import commands, replies
from signer.units import timestamp

ACTIVITY_STEP: Final = 3_600  # seconds of one span in the reply to `ShowActivity`
ACTIVITY_SPANS: Final = 24
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


def visible_freezes(freezes: Mapping[str, ActiveFreeze], identity: Identity) -> dict[str, ActiveFreeze]:
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
