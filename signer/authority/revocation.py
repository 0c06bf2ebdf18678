"""Revocation: who may revoke what, and what the core keeps in memory of it. Pure.

`ledger/revoked.py` makes the list that hosts get.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from signer.authority.freezes import Freezes, freeze
from signer.authority.queries import require_revoker
from signer.errors import Refused, Unavailable
from signer.ledger.reader import REACH
from signer.ledger.revoked import (
    CHANGES_LIST,
    Revocations,
    offset_after,
    revocation_body,
)
from signer.model import Entry, Event, Finding, Identity, Revocation, hide_tokens
from signer.policy.decide import Policy
from signer.protocol.commands import Freeze, Revoke

MAX_KEYS: Final = 10_000  # revoked keys, of users and CAs together; each takes 36 bytes of each list for ever
MAX_REVOCATIONS: Final = 10_000  # of certificates within a day
LIST_EVERY: Final = 3600  # seconds between two versions that differ only in expired certificates
_LATELY: Final = 600  # seconds; longer than any signature may take


# --- the core ---------------------------------------------------------------------------------------------------------


class RevokedState:
    """What the core knows of revocations: which keys it must not sign, and with which; the version of the list."""

    def __init__(self, revoked: Revocations) -> None:
        self.version, self.version_at = revoked.version, revoked.at
        self._offset = revoked.offset
        self.keys, self.cas = set(revoked.keys), set(revoked.cas)
        self.known_cas = revoked.known_cas | set(revoked.ca_keys)
        self._recent = deque(one.at for one in revoked.certificates)

    def note(self, entries: Iterable[Entry]) -> None:
        """Takes the version from what was committed."""
        for entry in entries:
            if entry.kind in CHANGES_LIST:
                if entry.kind == "ledger.restored":
                    self._offset = offset_after(entry)
                self.version, self.version_at = self._offset + entry.seq, entry.time_ms // 1000

    def check_key(self, fingerprint: str) -> None:
        """Raises `Refused` for a user's key that is revoked."""
        if fingerprint in self.keys:
            raise Refused(
                "key_revoked", f"the key {fingerprint} is revoked", "use another key: make one with ssh-keygen"
            )

    def explain(self, fingerprint: str) -> list[tuple[Finding, Refused | None]]:
        """The finding, and the refusal, of `check_key`; none for a key that is not revoked."""
        try:
            self.check_key(fingerprint)
        except Refused as refusal:
            return [(Finding("revocations", refusal.text, "refused"), refusal)]
        return []

    def check_ca(self, fingerprint: str) -> None:
        """Raises `Unavailable` for a CA key that is revoked."""
        if fingerprint in self.cas:
            raise Unavailable(
                "ca_revoked",
                f"the CA key {fingerprint} is revoked and signs nothing",
                "rotate it: see runbooks/ca-rotation.md",
            )

    def revoke(
        self,
        command: Revoke,
        identity: Identity,
        policy: Policy,
        freezes: Freezes,
        now: int,
        *,
        is_known: bool,
    ) -> tuple[Event, ...]:
        """The events of a revocation; adds to this state and to `freezes`. Raises `Refused`.

        Revoking an identity also freezes it, which needs the right for that, too. `is_known` is whether the identity
        holds valid certificates: one that is not in the policy any more is only revoked.
        """
        check_may_revoke(identity, freezes)
        revocation = command.revocation
        reason = hide_tokens(command.reason)
        if revocation.by in ("key", "ca"):
            self._add_key(revocation, policy)
        else:
            self._check_room(now)
        events = [Event("certificates.revoked", identity.name, revocation_body(revocation, reason))]
        if revocation.by == "identity" and (revocation.name in policy.identities or not is_known):
            asked = Freeze(command.caller, f"identity:{revocation.name}", reason)
            events.append(freeze(asked, identity, policy, freezes, now)[1])
        if revocation.by not in ("key", "ca"):
            self._recent.append(now)
        return tuple(events)

    def _check_room(self, now: int) -> None:
        while self._recent and self._recent[0] + REACH <= now:
            self._recent.popleft()
        if len(self._recent) >= MAX_REVOCATIONS:
            raise Refused(
                "too_many_revocations",
                f"{len(self._recent):,} revocations were made within a day; the limit is {MAX_REVOCATIONS:,}",
                "revoke more at once: a range of serials, an identity, or --since",
            )

    def _add_key(self, revocation: Revocation, policy: Policy) -> None:
        if revocation.by == "ca" and not (policy.ca.names(revocation.name) or revocation.name in self.known_cas):
            raise Refused(
                "unknown_ca",
                f"{revocation.name} is not a CA key of this signer",
                "see `signer ca bundle` for its keys",
            )
        known = self.cas if revocation.by == "ca" else self.keys
        if revocation.name not in known and len(self.cas) + len(self.keys) >= MAX_KEYS:
            raise Refused(
                "too_many_revoked_keys",
                f"{len(self.cas) + len(self.keys):,} keys are revoked for ever; the limit is {MAX_KEYS:,}",
                "revoke the certificates of the key by serial or identity instead",
            )
        known.add(revocation.name)


def check_may_revoke(identity: Identity, freezes: Mapping[str, object]) -> None:
    """Raises `Refused`: a revocation cannot be taken back, so no agent and nobody who is frozen by name makes one."""
    require_revoker(identity)
    if f"identity:{identity.name}" in freezes:
        raise Refused(
            "frozen_by_name",
            f"{identity.name} is frozen and revokes nothing",
            "ask another human with the right revoke",
        )


@dataclass(slots=True)
class _Lately:
    revocation: Revocation
    at: int
    last_serial: int


class RevokedLately:
    """Revocations that a certificate that is still being signed must be compared with; lost at a restart, as those."""

    def __init__(self) -> None:
        self._found: list[_Lately] = []

    def add(self, revocation: Revocation, at: int, last_serial: int) -> None:
        """Remembers a revocation that was made at a time in seconds, after the local serial `last_serial`."""
        self._found = [one for one in self._found if one.at > at - _LATELY]
        self._found.append(_Lately(revocation, at, last_serial))

    def check(self, identity: str, asked: int, serial: int | None) -> None:
        """Raises `Refused` for a certificate that was asked for before one of them, at a time in seconds.

        `serial` is that of the local key, None if another CA gives it.
        """
        for one in self._found:
            revocation = one.revocation
            is_before = asked <= one.at if serial is None else serial <= one.last_serial
            is_hit = {
                "identity": revocation.name == identity,
                "since": asked >= revocation.since,
                "serial": serial is not None and revocation.first <= serial <= revocation.last,
            }.get(revocation.by, False)
            if is_before and is_hit:
                raise Refused(
                    "certificate_revoked", "the certificate was revoked before it was signed", "ask the operator"
                )
