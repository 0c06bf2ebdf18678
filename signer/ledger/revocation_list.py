"""The revocation list of a ledger, made from its events alone. Pure but for the reader that is passed in.

The list is a function of the events alone. Its version is the `seq` of the newest event that it reflects (after a
restore more, see `revoked.py`), and its date and its "now" are that event's time: each keeper, restart and
restored copy makes the same bytes of the same version.

Free of policy and cryptography, because the process that builds lists at each start imports it.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType

from signer.ledger.reader import IssuedEvent
from signer.ledger.revoked import EventReader, Revocations, find_hits
from signer.ssh.krl import ANY_CA, RevocationList, group_serials, merge_ranges


@dataclass(frozen=True, slots=True)
class BuiltList:
    """A list, and when the first certificate on it expires, in seconds since 1970; None if none does."""

    revoked: RevocationList
    changes_at: int | None


def read_list(reader: EventReader) -> BuiltList:
    """The newest list of a ledger; raises `Unavailable` or `LedgerBroken`. Reads up to a day of events."""
    revoked = Revocations.from_entries(reader.revocation_events())
    return build_list(revoked, find_hits(reader, revoked))


def build_list(revoked: Revocations, hits: Iterable[IssuedEvent]) -> BuiltList:
    """The list of what was revoked and of the certificates that it hits.

    Certificates are listed for their CA's key, or for any CA if the ledger does not have that key.
    """
    ranges: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
    for lost in revoked.lost:
        ranges[revoked.ca_keys.get(lost.ca, ANY_CA)].append((lost.first, lost.last))
    serials: dict[str, list[int]] = defaultdict(list)
    first_end: int | None = None
    for hit in hits:
        serials[hit.ca].append(hit.serial)
        if first_end is None or hit.valid_before < first_end:
            first_end = hit.valid_before
    for ca, found in serials.items():
        ranges[revoked.ca_keys.get(ca, ANY_CA)] += group_serials(filter(None, found))
    certificates = {ca: merge_ranges(found) for ca, found in ranges.items()}
    digests = frozenset(_digest(fingerprint) for fingerprint in revoked.keys | revoked.cas)
    comment = f"signer {revoked.version}" if revoked.version else ""
    made = RevocationList(revoked.version, revoked.at, comment, MappingProxyType(certificates), digests)
    return BuiltList(made, first_end)


def _digest(fingerprint: str) -> bytes:
    return base64.b64decode(fingerprint.removeprefix("SHA256:") + "=")
