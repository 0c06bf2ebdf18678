"""The policy as a frozen type, and its two uses: `decide()` grants or refuses, `explain()` reports every rule.

Both apply the rules of `rules.py`; `decide` stops at the first refusal. `file.py` reads policy.toml. Pure: times,
counts and addresses are passed in.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from signer.errors import BadFile, NotAuthenticated, Refused
from signer.model import CaKeys, Finding, Grant, Identity, PublicKey, Role, SignRequest, Terms, Token, UsageCounts
from signer.policy.rules import CHECKS, RULE_KEY, RULES, Case
from signer.policy.tokens import is_mistyped, token_digest


@dataclass(frozen=True, slots=True)
class Policy:
    """A valid policy.toml. `digest` is the hex SHA-256 of the file."""

    digest: str
    ca: CaKeys
    roles: Mapping[str, Role]
    identities: Mapping[str, Identity]
    tokens: Mapping[str, Token] = field(repr=False)

    def authenticate(self, token: str | None, now: int) -> tuple[Identity, Token]:
        """The identity of a token, and the token's entry; raises `NotAuthenticated`."""
        if not token:
            raise NotAuthenticated(
                "token_missing", "the request has no token", "send it as Authorization: Bearer or X-Vault-Token"
            )
        digest = token_digest(token)
        # The lookup uses only a SHA-256, so its timing reveals nothing of a token; the comparison is constant-time.
        known = self.tokens.get(digest)
        if known is None or not hmac.compare_digest(known.sha256, digest):
            if is_mistyped(token):
                raise NotAuthenticated(
                    "token_mistyped", "the token is malformed (bad checksum)", "copy the whole token, without spaces"
                )
            raise NotAuthenticated(
                "token_unknown", "the token is unknown", "ask the operator for a new token (`signer token new`)"
            )
        if now >= known.expires:
            raise NotAuthenticated(
                "token_expired", "the token has expired", "ask the operator for a new token (`signer token new`)"
            )
        return self.identities[known.identity], known

    def check_key(self, fingerprint: str) -> None:
        """Raises `BadFile` unless the CA key may sign under this policy."""
        if fingerprint not in self.ca.may_sign:
            raise BadFile(
                "policy_pins_another_key",
                f"policy.toml pins {' and, as next, '.join(self.ca.may_sign)}; the loaded key is {fingerprint}",
                "pin the loaded key, or name it as ca.next",
                ("neither ca.fingerprint nor ca.next is the loaded key",),
            )

    def role_for(self, identity: Identity, name: str) -> Role | None:
        """The role; None if it does not exist. Raises `Refused` if the identity does not have it."""
        role = self.roles.get(name)
        if role is not None and name not in identity.roles:
            raise Refused(
                "role_not_granted",
                f"{identity.name} may not ask for role {name}",
                f"add {name} to identities.{identity.name}.roles in policy.toml",
            )
        return role


def decide(
    identity: Identity, role: Role, request: SignRequest, key: PublicKey, address: str | None, usage: UsageCounts
) -> Grant:
    """The grant for a request; raises the first `Refused` of the rules."""
    case = Case(identity, role, request, key, address, usage)
    for check in CHECKS:
        check(case)
    return Grant(
        identity=identity.name,
        kind=identity.kind,
        role=role.name,
        public_key=key,
        key_id=case.key_id,
        principals=case.principals,
        ttl=case.ttl,
        backdate=role.backdate,
        critical_options=tuple(sorted(case.critical_options.items())),
        extensions=case.extensions,
        extension_values=case.extension_values,
        reason=request.reason or None,
        address=address,
    )


def preview(identity: Identity, role: Role, request: SignRequest, key: PublicKey | None, address: str | None) -> Terms:
    """What humans are asked to approve; raises the first `Refused` of the rules.

    Limits count when the certificate is claimed. A key that is not known yet is checked then, too.
    """
    case = Case(identity, role, request, key, address, UsageCounts())
    for rule in RULES:
        if key is not None or rule is not RULE_KEY:
            rule.check(case)
    values = dict(case.extension_values)
    return Terms(
        identity=identity.name,
        kind=identity.kind,
        role=role.name,
        key_id=case.key_id,
        principals=case.principals,
        ttl=case.ttl,
        critical_options=tuple(sorted(case.critical_options.items())),
        extensions=tuple((name, values.get(name, "")) for name in case.extensions),
        reason=request.reason or None,
        address=address,
    )


def explain(  # noqa: PLR0917 - as decide(), with the reason why there is no key
    identity: Identity,
    role: Role,
    request: SignRequest,
    key: PublicKey | None,
    address: str | None,
    usage: UsageCounts,
    key_fault: str = "no key was given",
) -> Iterator[tuple[Finding, Refused | None]]:
    """Yields the finding, and the refusal if any, of every rule in order."""
    case = Case(identity, role, request, key, address, usage)
    for rule in RULES:
        if key is None and rule is RULE_KEY:
            yield Finding(rule.name, key_fault, "skipped"), None
            continue
        try:
            rule.check(case)
        except Refused as refusal:
            yield Finding(rule.name, refusal.text, "refused"), refusal
        else:
            yield Finding(rule.name, rule.describe(case), "ok"), None
