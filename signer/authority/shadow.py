"""Shadow mode: what our CA key would have signed, held against what Vault signed for the same grant. Pure.

Vault's certificate is what the caller gets, whatever is found here. Ours is a draft: no serial is allotted to it, no
key is at hand to sign it, and it goes no further than the comparison. Each difference is counted; the first of its
kind is recorded with the certificate that showed it, and its repeats as a number (`Differences` in `counts.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from signer.authority.certificates import Signing, prepare_certificate
from signer.authority.limits import Differences
from signer.authority.vault_certificates import ForeignCertificate, PendingSignature
from signer.errors import SignerError
from signer.ledger.chain import canonical_json
from signer.model import Event, PublicKey
from signer.ssh.certificate import NONCE_BYTES
from signer.ssh.publickey import parse_public_key, render_public_key
from signer.vault.parity import Difference, compare_certificates

# Vault says no, for good, to what policy.toml grants: after a cutover the same request would get a certificate.
REFUSALS: Final = frozenset({"vault_refused", "vault_outside_grant", "vault_role_missing"})
REFUSED: Final = "refused"  # the field under which that is told
MAX_SHOWN: Final = 512  # characters of a value in an event


class Shadow:
    """Compares with `key`, the public half of our CA key; `report` is told of faults that are ours, for the log."""

    def __init__(self, key: PublicKey, report: Callable[[Exception], None]) -> None:
        self.key = key
        self._report = report
        self.compared: Counter[str] = Counter()  # certificates by role
        self.differences: Counter[tuple[str, str]] = Counter()  # by role and field
        self.faults: Counter[str] = Counter()  # comparisons that failed, by role
        self._folding = Differences()

    def take(self, key: Signing) -> None:
        """Compares with another key from now on; only its public half is kept."""
        self.key = parse_public_key(render_public_key(key.kind, key.blob))

    def compare(self, made: ForeignCertificate, forward: PendingSignature, now: int) -> tuple[Event, ...]:
        """What to record beside a certificate of Vault's. It never raises: the caller is to get that certificate."""
        role = forward.grant.role
        try:
            draft = prepare_certificate(forward.grant, 0, bytes(NONCE_BYTES), forward.asked_at, self.key.blob)
            events = self._note(forward, compare_certificates(draft.fields, made.fields), str(made.fields.serial), now)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a comparison, it decides nothing
            self._report(error)
            self.faults[role] += 1
            return ()
        self.compared[role] += 1
        return events

    def refused(self, forward: PendingSignature, error: SignerError, now: int) -> tuple[Event, ...]:
        """What to record if Vault gave no certificate; nothing if it was down, or the refusal is our own."""
        if error.code not in REFUSALS:
            return ()
        told = Difference(REFUSED, "granted", f"{error.code}: {error.text}", "error", error.hint)
        return self._note(forward, [told], "", now)

    def due(self, now: int) -> list[Event]:
        """Counts of repeats whose time is over."""
        return self._folding.due(now)

    def rest(self) -> list[Event]:
        """All of them, for the end."""
        return self._folding.rest()

    def _note(self, forward: PendingSignature, found: Iterable[Difference], serial: str, now: int) -> tuple[Event, ...]:
        grant = forward.grant
        events = [_event(grant.identity, grant.role, difference, serial) for difference in found]
        for event in events:
            canonical_json(event.body).encode()  # what no ledger can hold must fail here, not in the commit
        for event in events:
            self.differences[grant.role, str(event.body["field"])] += 1
        return tuple(told for event in events for told in self._folding.note(event, now))


def _event(identity: str, role: str, difference: Difference, serial: str) -> Event:
    return Event(
        "shadow.difference",
        identity,
        {
            "role": role,
            "field": difference.field,
            "ours": str(difference.ours)[:MAX_SHOWN],
            "vault": str(difference.vaults)[:MAX_SHOWN],
            "severity": difference.severity,
            "serial": serial,
        },
    )
