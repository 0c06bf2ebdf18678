"""Shadow mode: compares Vault's certificates with those that the local CA key would sign for the same grants. Pure.

The caller gets Vault's certificate in any case. The local one has no serial, is never signed and is discarded after
the comparison. Each difference is counted; the first of its kind is recorded with the serial of the certificate, its
repeats as a count (`Differences` in `limits.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from signer.authority.certificates import prepare_certificate
from signer.authority.limits import Differences
from signer.authority.vault_certificates import PendingCertificate, VaultCertificate
from signer.errors import SignerError
from signer.ledger.chain import canonical_json
from signer.model import Event
from signer.ssh.certificate import NONCE_BYTES
from signer.vault.parity import Difference, compare_certificates

# Vault permanently refuses what policy.toml grants: after a cutover the same request would get a certificate.
REFUSALS: Final = frozenset({"vault_refused", "vault_outside_grant", "vault_role_missing"})
REFUSED: Final = "refused"  # the field name of that difference
MAX_SHOWN: Final = 512  # characters of a value in an event


class Shadow:
    """Compares certificates whose order names a local key (mode shadow); `report` logs internal errors."""

    def __init__(self, report: Callable[[Exception], None]) -> None:
        self._report = report
        self.compared: Counter[str] = Counter()  # certificates by role
        self.differences: Counter[tuple[str, str]] = Counter()  # by role and field
        self.faults: Counter[str] = Counter()  # comparisons that failed, by role
        self.repeats = Differences()

    def compare(self, made: VaultCertificate, pending: PendingCertificate, now: int) -> tuple[Event, ...]:
        """The events of one comparison. Never raises: a failed comparison must not withhold the certificate."""
        key = pending.order.local_key
        if key is None:
            return ()
        role = pending.grant.role
        try:
            certificate = prepare_certificate(pending.grant, 0, bytes(NONCE_BYTES), pending.asked_at, key.blob)
            events = self._note(
                pending, compare_certificates(certificate.fields, made.fields), str(made.fields.serial), now
            )
        except Exception as error:  # noqa: BLE001 - a failed comparison is only logged and counted
            self._report(error)
            self.faults[role] += 1
            return ()
        self.compared[role] += 1
        return events

    def refused(self, pending: PendingCertificate, error: SignerError, now: int) -> tuple[Event, ...]:
        """The events if Vault refused a grant; none if it was unavailable or the refusal is local."""
        if pending.order.local_key is None or error.code not in REFUSALS:
            return ()
        refusal = Difference(REFUSED, "granted", f"{error.code}: {error.text}", "error", error.hint)
        return self._note(pending, [refusal], "", now)

    def _note(
        self, pending: PendingCertificate, found: Iterable[Difference], serial: str, now: int
    ) -> tuple[Event, ...]:
        grant = pending.grant
        events = [_event(grant.identity, grant.role, difference, serial) for difference in found]
        for event in events:
            canonical_json(
                event.body
            ).encode()  # an event that the ledger cannot hold must fail here, not in the commit
        for event in events:
            self.differences[grant.role, str(event.body["field"])] += 1
        return tuple(first for event in events for first in self.repeats.note(event, now))


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
