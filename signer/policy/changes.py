"""What one policy changes in another, by the names that an operator knows. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from signer.model import Identity, Token
from signer.policy.decide import Policy
from signer.units import timestamp


@dataclass(frozen=True, slots=True)
class Difference:
    """Names that were added, removed, or kept with another meaning; each sorted."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PolicyChanges:
    """The differences of two policies. A token is shown by its identity and its end, never by its digest."""

    roles: Difference
    identities: Difference
    tokens: Difference


def compare_policies(old: Policy, new: Policy) -> PolicyChanges:
    tokens = _compare(old.tokens, new.tokens)
    return PolicyChanges(
        roles=_compare(old.roles, new.roles),
        identities=_compare(_alone(old.identities), _alone(new.identities)),
        tokens=Difference(
            added=_shown(tokens.added, new.tokens),
            removed=_shown(tokens.removed, old.tokens),
            changed=_shown(tokens.changed, new.tokens),
        ),
    )


def _alone(identities: Mapping[str, Identity]) -> dict[str, Identity]:
    """Each identity without what it knows of the others."""
    return {name: replace(identity, known=frozenset()) for name, identity in identities.items()}


def _compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Difference:
    return Difference(
        added=tuple(sorted(new.keys() - old.keys())),
        removed=tuple(sorted(old.keys() - new.keys())),
        changed=tuple(sorted(name for name in old.keys() & new.keys() if old[name] != new[name])),
    )


def _shown(digests: tuple[str, ...], tokens: Mapping[str, Token]) -> tuple[str, ...]:
    found = [tokens[digest] for digest in digests]
    return tuple(sorted(f"{token.identity} until {timestamp(token.expires)}" for token in found))
