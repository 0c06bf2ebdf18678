"""The revocation list of a ledger, and what it is made of: revocations, CA keys, and the certificates that are hit.

Reads events and no view: a view that somebody falsified must not hide a certificate. The list is a function of the
events alone. Its version is the `seq` of the newest event that it reflects (after a restore more, see `offset_after`),
and its date and its "now" are that event's time: each keeper, restart and restored copy makes the same bytes of the
same version.

The keeper reads only what `Revocations` holds, and other processes read the certificates. Free of policy and
cryptography, so that these processes are small.
"""

from __future__ import annotations

import base64
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Protocol

from signer.ledger.reader import REACH, IssuedEvent, broken_at
from signer.model import Entry, Issued, Revocation
from signer.ssh.fingerprint import fingerprint_of
from signer.ssh.krl import ANY_CA, RevocationList, group_serials, merge_ranges

CHANGES_LIST: Final = ("certificates.revoked", "ledger.restored", "list.published")  # each makes a version of the list


class EventReader(Protocol):
    """The read access that lists need."""

    def revocation_events(self) -> list[Entry]: ...
    def first_since(self, time_ms: int) -> int: ...
    def entry(self, seq: int) -> Entry: ...
    def withheld_since(self, first: int) -> set[int]: ...
    def issued_between(
        self, first: int, before: int, identities: Collection[str] | None = None
    ) -> list[IssuedEvent]: ...


@dataclass(frozen=True, slots=True)
class MadeRevocation:
    """A revocation as event `seq` recorded it, at a time in seconds since 1970; `by` and `reason` say who and why."""

    seq: int
    at: int
    revocation: Revocation
    by: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LostRange:
    """Serials of a CA that a ledger lost when it was restored, first to last; they are revoked for ever."""

    ca: str
    first: int
    last: int


@dataclass(slots=True)
class Revocations:
    """Everything that events up to `version` say of a list. `at` is that event's time in seconds since 1970.

    `keys` and `cas` are fingerprints that are revoked for ever, `ca_keys` the blobs of CA keys by fingerprint, and
    `certificates` the revocations that may still hit a certificate that is valid at `at`.
    """

    version: int = 0
    at: int = 0
    keys: set[str] = field(default_factory=set)
    cas: set[str] = field(default_factory=set)
    ca_keys: dict[str, bytes] = field(default_factory=dict)
    lost: list[LostRange] = field(default_factory=list)
    certificates: list[MadeRevocation] = field(default_factory=list)
    offset: int = 0  # of versions: see `offset_after`
    known_cas: set[str] = field(default_factory=set)  # fingerprints, also those whose key is not in the ledger

    @classmethod
    def from_entries(cls, entries: Iterable[Entry]) -> Revocations:
        """What the events say, oldest first; raises `LedgerBroken` for one that is malformed.

        A CA key that is recorded after the version is left out: the same version must always give the same list.
        """
        found, late = cls(), dict[str, bytes]()
        for entry in entries:
            try:
                found._apply(entry, late)
            except (KeyError, ValueError, TypeError, IndexError):
                raise broken_at(entry.seq, f"it is not a valid {entry.kind} event") from None
        found.certificates = [one for one in found.certificates if one.at + REACH > found.at]
        return found

    def _apply(self, entry: Entry, late: dict[str, bytes]) -> None:
        body = json.loads(entry.body)
        at = entry.time_ms // 1000
        match entry.kind:
            case "keeper.started" | "ca.rotated":
                known = str(body.get("to") or body.get("compared_with") or body.get("ca") or "")
                self.known_cas.add(known)
                if "public_key" in body:
                    blob = base64.b64decode(str(body["public_key"]).split()[1], validate=True)
                    late[fingerprint_of(blob)] = blob
                return
            case "certificates.revoked":
                revocation = read_revocation(body)
                if revocation.by == "key":
                    self.keys.add(revocation.name)
                elif revocation.by == "ca":
                    self.cas.add(revocation.name)
                else:
                    self.certificates.append(MadeRevocation(entry.seq, at, revocation))
            case "ledger.restored":
                self.offset = offset_after(entry)
                self.lost.append(LostRange(str(body["ca"] or ""), int(body["first_serial"]), int(body["last_serial"])))
        self.version, self.at = self.offset + entry.seq, at
        self.ca_keys |= late
        late.clear()


def offset_after(restored: Entry) -> int:
    """What is added to the `seq` of an event for the version of its list, from an event `ledger.restored` on.

    After a restore the numbers of lost events come again, and hosts refuse a version that is older than what they have.
    So it is the time of the restore in microseconds: no ledger grows by a million events a second.
    """
    return restored.time_ms * 1000


def revocation_body(revocation: Revocation, reason: str) -> dict[str, object]:
    """The body of a `certificates.revoked` event."""
    values: Mapping[str, dict[str, object]] = {
        "serial": {"first": str(revocation.first), "last": str(revocation.last)},
        "since": {"since": revocation.since},
    }
    value = values.get(revocation.by, {revocation.by: revocation.name})
    return {"by": revocation.by, **value, "reason": reason}


def read_revocation(body: Mapping[str, Any]) -> Revocation:
    """The revocation in the body of an event; raises `KeyError` or `ValueError`."""
    match body["by"]:
        case "serial":
            return Revocation("serial", first=int(body["first"]), last=int(body["last"]))
        case "since":
            return Revocation("since", since=int(body["since"]))
        case "identity" | "key" | "ca" as by:
            return Revocation(by, str(body[by]))
        case other:
            raise ValueError(f"{other} is not a way to revoke")


# --- certificates ------------------------------------------------------------------------------------------------


def find_hits(reader: EventReader, revoked: Revocations) -> Iterator[IssuedEvent]:
    """The certificates that `revoked.certificates` hit and that are valid at `revoked.at`, oldest first."""
    if not revoked.certificates:
        return
    matches = _Matches(revoked.certificates)
    first = max(reader.first_since((revoked.at - REACH) * 1000), matches.first(reader))
    identities = list(matches.identities) if matches.only_identities else None
    for issued in reader.issued_between(first, matches.last, identities):
        if issued.valid_before > revoked.at and matches.hits(issued.seq, issued.at, issued.identity, issued.serial):
            yield issued


def preview_hits(reader: EventReader, revocation: Revocation, head: int, now: int) -> list[IssuedEvent]:
    """The certificates valid at `now` (seconds) that a revocation after event `head` would hit, oldest first."""
    first = reader.first_since((now - REACH) * 1000)
    withheld = reader.withheld_since(first)
    if revocation.by in ("key", "ca"):
        found: Iterable[IssuedEvent] = (
            issued
            for issued in reader.issued_between(first, head + 1)
            if revocation.name == (issued.ca if revocation.by == "ca" else issued.fingerprint)
            and issued.valid_before > now
        )
    else:
        found = find_hits(reader, Revocations(at=now, certificates=[MadeRevocation(head + 1, now, revocation)]))
    return [issued for issued in found if issued.backend != "local" or issued.serial not in withheld]


def made_revocations(entries: Iterable[Entry]) -> list[MadeRevocation]:
    """The revocations among events, in their order; raises `LedgerBroken` for a malformed one."""
    found = []
    for entry in entries:
        if entry.kind == "certificates.revoked":
            try:
                body = json.loads(entry.body)
                at, revocation = entry.time_ms // 1000, read_revocation(body)
                made = MadeRevocation(entry.seq, at, revocation, entry.actor, str(body["reason"]))
            except (KeyError, ValueError, TypeError):
                raise broken_at(entry.seq, "it is not a valid certificates.revoked event") from None
            found.append(made)
    return found


def revoked_by(reader: EventReader, made: Sequence[MadeRevocation], row: Issued) -> MadeRevocation | None:
    """The first revocation that hit a certificate while it was valid; None if none did."""
    for one in made:
        revocation = one.revocation
        if one.at >= row.valid_before:
            return None
        is_later = one.seq > row.seq
        match revocation.by:
            case "serial":
                is_hit = is_later and revocation.first <= row.serial <= revocation.last
            case "identity":
                is_hit = is_later and revocation.name == row.identity
            case "since":
                is_hit = is_later and reader.entry(row.seq).time_ms // 1000 >= revocation.since
            case "key":
                is_hit = revocation.name == row.fingerprint
            case _:
                is_hit = revocation.name == json.loads(reader.entry(row.seq).body).get("ca")
        if is_hit:
            return one
    return None


class _Matches:
    """Many revocations as one test, which takes the logarithm of their number."""

    def __init__(self, revoked: Sequence[MadeRevocation]) -> None:
        self.last = max(one.seq for one in revoked)
        self.identities: dict[str, int] = {}  # the last revocation of each
        self._since: list[tuple[int, int]] = []  # time and revocation; both rise
        self._ranges: list[tuple[int, int, int]] = []  # first, last and the last revocation; sorted, disjoint
        for one in sorted(revoked, key=lambda one: -one.seq):
            revocation = one.revocation
            if revocation.by == "identity":
                self.identities.setdefault(revocation.name, one.seq)
            elif revocation.by == "serial":
                self._add_range(revocation.first, revocation.last, one.seq)
            elif not self._since or revocation.since < self._since[-1][0]:
                self._since.append((revocation.since, one.seq))
        self._since.reverse()
        self.only_identities = not self._since and not self._ranges

    def first(self, reader: EventReader) -> int:
        """The first event that can be hit."""
        if not self._since or self.identities or self._ranges:
            return 0
        return reader.first_since(self._since[0][0] * 1000)

    def _add_range(self, first: int, last: int, seq: int) -> None:
        """Adds what no later revocation has."""
        at = bisect_right(self._ranges, (first, 2**64, 0))
        if at and self._ranges[at - 1][1] >= first:
            first = self._ranges[at - 1][1] + 1
        while first <= last:
            after = self._ranges[at][0] if at < len(self._ranges) else last + 1
            if first < after:
                self._ranges.insert(at, (first, min(last, after - 1), seq))
                at += 1
            if after > last:
                return
            first = self._ranges[at][1] + 1
            at += 1

    def hits(self, seq: int, at: int, identity: str, serial: int) -> bool:
        """Whether one of them hits the certificate that event `seq` recorded at a time in seconds."""
        if self.identities.get(identity, 0) > seq:
            return True
        if self._ranges:
            found = self._ranges[bisect_right(self._ranges, (serial, 2**64, 0)) - 1]
            if found[0] <= serial <= found[1] and found[2] > seq:
                return True
        place = bisect_right(self._since, (at, 2**63))
        return bool(place) and self._since[place - 1][1] > seq


# --- the list ---------------------------------------------------------------------------------------------------------


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
