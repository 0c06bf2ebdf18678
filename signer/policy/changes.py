"""What one policy changes in another, by the names that an operator knows. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from signer.model import Identity, Token
from signer.policy.decide import Policy
from signer.units import timestamp


def compare_policies(old: Policy, new: Policy) -> dict[str, dict[str, tuple[str, ...]]]:
    """The roles, identities and tokens that were added, removed, or kept with another meaning; each sorted.

    A token is shown by its identity and its end, never by its digest.
    """
    tokens = _compare(old.tokens, new.tokens)
    all_tokens = {**old.tokens, **new.tokens}
    return {
        "roles": _compare(old.roles, new.roles),
        "identities": _compare(_alone(old.identities), _alone(new.identities)),
        "tokens": {what: _shown(all_tokens[digest] for digest in digests) for what, digests in tokens.items()},
    }


def _alone(identities: Mapping[str, Identity]) -> dict[str, Identity]:
    """Each identity without what it knows of the others."""
    return {name: replace(identity, known=frozenset()) for name, identity in identities.items()}


def _compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {
        "added": tuple(sorted(new.keys() - old.keys())),
        "removed": tuple(sorted(old.keys() - new.keys())),
        "changed": tuple(sorted(name for name in old.keys() & new.keys() if old[name] != new[name])),
    }


def _shown(tokens: Iterable[Token]) -> tuple[str, ...]:
    return tuple(sorted(f"{token.identity} until {timestamp(token.expires)}" for token in tokens))
