"""Lookups: questions to a ledger that do not decide anything, and their replies as messages.

The core makes a `Lookup` after it has authorized the caller; a process of its own answers it
(`service/query_reader.py`). Kept free of policy, cryptography and pydantic, so that this process is small; the shapes
are those of `protocol/replies.py`.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final, Protocol, TypeVar

import msgspec

from signer.errors import NotFound, SignerError
from signer.ledger.reader import events_archived
from signer.ledger.revoked import EventReader, MadeRevocation, made_revocations, preview_hits, revoked_by
from signer.model import Activity, Entry, EventFilter, Filter, Head, Issued, Revocation
from signer.units import timestamp

PREVIEWED: Final = 1_000  # of the newest certificates that a revocation hits, whose principals its preview counts
PREVIEW_ROWS: Final = 5
MOST: Final = 10  # names in a preview
_DETAILS: Final = (
    "serial", "backend", "identity", "role", "principals", "key_id", "fingerprint", "valid_after", "valid_before",
    "status", "kind", "key_type", "critical_options", "extensions", "reason", "address", "request_id", "policy", "ca",
    "to_be_signed_sha256", "recorded", "request", "approved_by", "waiver", "revoked",
)  # fmt: skip


_Row = TypeVar("_Row")


class Reader(EventReader, Protocol):
    """The read access that lookups need."""

    @property
    def base(self) -> int: ...
    def head(self) -> Head: ...
    def page(self, wanted: Filter) -> tuple[list[Issued], int | None]: ...
    def certificate(self, serial: int) -> tuple[Issued, Entry] | None: ...
    def operations(self, evidence: str | None, before: int | None, limit: int) -> list[Entry]: ...
    def consistency(self, old: int, new: int) -> list[bytes]: ...
    def events_after(self, after: int, limit: int) -> list[Entry]: ...
    def matching_events(self, wanted: EventFilter) -> list[Entry]: ...
    def activity(self, bounds: Sequence[int]) -> list[Activity]: ...


def fitting(rows: Iterable[_Row], size: Callable[[_Row], int], room: int) -> list[_Row]:
    """The first rows, at least one, whose sizes together are at most `room`."""
    found: list[_Row] = []
    for row in rows:
        room -= size(row)
        if found and room < 0:
            break
        found.append(row)
    return found


class Lookup(msgspec.Struct, frozen=True, tag=True):
    """A question of `asker`, who may see its answer; `room` is the length of a reply in bytes that must suffice."""

    asker: str
    room: int

    def answer(self, reader: Reader) -> bytes:
        """The reply as a message; raises `NotFound` or the ledger's errors."""
        raise NotImplementedError


class FindCertificates(Lookup, frozen=True):
    """A page of certificates, newest first, with their status at `now` (seconds)."""

    wanted: Filter
    now: int

    def answer(self, reader: Reader) -> bytes:
        found, next_before = reader.page(replace(self.wanted, limit=self.wanted.limit + 1))
        page = fitting(found[: self.wanted.limit], _size_of, self.room // 4)  # JSON may double each character
        more = page[-1].seq if len(found) > len(page) else next_before
        made = made_revocations(reader.revocation_events())
        rows = [certificate_row(row, self.now, revoked_by(reader, made, row)) for row in page]
        if self.wanted.active_at is not None:  # a page of these may hold fewer rows than another
            rows = [row for row in rows if row["status"] != "revoked"]
        return _message("CertificatePage", {"certificates": rows, "before": None if more is None else str(more)})


def _size_of(row: Issued) -> int:
    return len(row.key_id) + sum(map(len, row.principals)) + 4 * len(row.principals) + 300


class FindCertificate(Lookup, frozen=True):
    """One certificate with its complete record; of the identity `only`, if it is given."""

    serial: int
    only: str | None
    now: int

    def answer(self, reader: Reader) -> bytes:
        found = reader.certificate(self.serial)
        if found is None or self.only not in (None, found[0].identity):
            raise NotFound(
                "unknown_serial",
                f"no certificate {self.serial} is visible to you",
                "list certificates with GET /api/certificates",
            )
        revoked = revoked_by(reader, made_revocations(reader.revocation_events()), found[0])
        details = certificate_details(*found, self.now, revoked)  # a later release may have recorded more
        return _message("CertificateDetails", {name: details[name] for name in _DETAILS if name in details})


class FindOperations(Lookup, frozen=True):
    """A page of recorded operations, newest first; `evidence` restricts it to those with that digest."""

    evidence: str | None
    before: int | None
    limit: int

    def answer(self, reader: Reader) -> bytes:
        found = reader.operations(self.evidence, self.before, self.limit + 1)
        rows = map(operation_row, found[: self.limit])
        page = fitting(rows, lambda row: len(json.dumps(row)), self.room // 2)
        more = str(page[-1]["seq"]) if len(found) > len(page) else None
        return _message("OperationPage", {"operations": page, "before": more})


class ProveConsistency(Lookup, frozen=True):
    """The proof that the tree of `new` events begins with that of `old`; anybody may see it."""

    old: int
    new: int

    def answer(self, reader: Reader) -> bytes:
        hashes = [base64.b64encode(digest).decode() for digest in reader.consistency(self.old, self.new)]
        return _message("ConsistencyProof", {"from_size": self.old, "to_size": self.new, "hashes": hashes})


class FindRevocations(Lookup, frozen=True):
    """A page of revocations, newest first, before event `before`."""

    before: int | None
    limit: int

    def answer(self, reader: Reader) -> bytes:
        made = made_revocations(reader.revocation_events())
        found = [revocation_row(one) for one in reversed(made) if self.before is None or one.seq < self.before]
        page = found[: self.limit]
        more = str(page[-1]["seq"]) if len(found) > len(page) else None
        return _message("RevocationPage", {"revocations": page, "before": more})


class PreviewHits(Lookup, frozen=True):
    """What a revocation would hit at `now` (seconds): how many certificates, whose, which principals, the newest."""

    revocation: Revocation
    now: int

    def answer(self, reader: Reader) -> bytes:
        head = reader.head().seq
        hits = preview_hits(reader, self.revocation, head, self.now)
        identities = Counter(hit.identity for hit in hits)
        newest = [json.loads(reader.entry(hit.seq).body) for hit in hits[: -PREVIEWED - 1 : -1]]
        principals = Counter(name for body in newest for name in body["principals"])
        rows = [
            {
                "serial": body["serial"],
                "identity": body["identity"],
                "role": body["role"],
                "principals": body["principals"],
                "valid_before": timestamp(body["valid_before"]),
            }
            for body in newest[:PREVIEW_ROWS]
        ]
        fields = {"certificates": len(hits), "identities": _most(identities), "principals": _most(principals)}
        return _message("RevocationPreview", {**fields, "newest": rows})


def _most(counts: Counter[str]) -> list[dict[str, object]]:
    return [{"name": name, "certificates": count} for name, count in counts.most_common(MOST)]


class FindEntries(Lookup, frozen=True):
    """A page of events in their order, after event `after`."""

    after: int
    limit: int

    def answer(self, reader: Reader) -> bytes:
        if self.after < reader.base:
            raise events_archived(self.after + 1, reader.base)
        found = reader.events_after(self.after, self.limit + 1)
        page, more = _fitting(found, self.limit, self.room)
        return _message("LedgerPage", {"entries": page, "after": more})


def _fitting(found: Sequence[Entry], limit: int, room: int) -> tuple[list[dict[str, object]], str | None]:
    """The first events, at least one and at most `limit`, that take half of `room` (bytes): JSON may double each
    character. And the number of the last of them if there are more."""
    page = fitting(found[:limit], lambda one: len(one.body.encode()) + len(one.kind) + len(one.actor) + 300, room // 2)
    return list(map(_entry_row, page)), str(page[-1].seq) if len(found) > len(page) else None


def _entry_row(entry: Entry) -> dict[str, object]:
    row = msgspec.structs.asdict(entry)
    time_ms = row.pop("time_ms")
    return {**row, "time": time_ms, "body": msgspec.Raw(entry.body.encode())}


class FindEvents(Lookup, frozen=True):
    """A page of events, newest first."""

    events: EventFilter

    def answer(self, reader: Reader) -> bytes:
        found = reader.matching_events(replace(self.events, limit=self.events.limit + 1))
        page, more = _fitting(found, self.events.limit, self.room)
        return _message("EventPage", {"entries": page, "before": more})


class CountActivity(Lookup, frozen=True):
    """Certificates and refusals in each of `spans` spans of `step` seconds; the last one ends after `now` (seconds)."""

    step: int
    spans: int
    now: int

    def answer(self, reader: Reader) -> bytes:
        end = (self.now // self.step + 1) * self.step
        bounds = [end - number * self.step for number in range(self.spans, -1, -1)]
        counted = reader.activity([bound * 1000 for bound in bounds])
        rows = [
            {"start": timestamp(start), "signatures": found.issued, "refusals": found.refused}
            for start, found in zip(bounds, counted, strict=False)
        ]
        return _message("Activity", {"step": self.step, "rows": rows})


_DECODER: Final = msgspec.json.Decoder(
    FindCertificates | FindCertificate | FindEntries | FindEvents | FindOperations | FindRevocations | PreviewHits
    | ProveConsistency | CountActivity
)  # fmt: skip


def encode_lookup(lookup: Lookup) -> bytes:
    """A lookup as a message, for `answer_lookup` in another process."""
    return msgspec.json.encode(lookup)


def decode_lookup(message: bytes) -> Lookup:
    """The lookup of a message from `encode_lookup`."""
    found: Lookup = _DECODER.decode(message)
    return found


def error_message(error: SignerError) -> bytes:
    return _message("Error", {**error.as_json(), "facts": dict(error.facts)})


def _message(shape: str, fields: dict[str, object]) -> bytes:
    return shape.encode() + b"\n" + msgspec.json.encode(fields)


# --- rows of replies, also for `signer certs` -------------------------------------------------------------------------


def certificate_row(row: Issued, now: int, revoked: MadeRevocation | None = None) -> dict[str, object]:
    """One certificate in a list, with the revocation that hit it, if any; `now` is in seconds."""
    if row.withheld:
        status = "withheld"
    elif revoked is not None:
        status = "revoked"
    else:
        status = "active" if row.valid_before > now else "expired"
    return {
        "serial": str(row.serial),
        "backend": row.backend,
        "identity": row.identity,
        "role": row.role,
        "principals": list(row.principals),
        "key_id": row.key_id,
        "fingerprint": row.fingerprint,
        "valid_after": timestamp(row.valid_after),
        "valid_before": timestamp(row.valid_before),
        "status": status,
    }


def certificate_details(
    row: Issued, entry: Entry, now: int, revoked: MadeRevocation | None = None
) -> dict[str, object]:
    """A certificate with its complete record, its position in the ledger, and the revocation that hit it, if any."""
    body = json.loads(entry.body)
    recorded = {"seq": entry.seq, "hash": entry.hash, "time": timestamp(entry.time_ms // 1000)}
    by = {} if revoked is None else {"revoked": revocation_row(revoked)}
    return {**body, **certificate_row(row, now, revoked), "recorded": recorded, **by}


def revocation_row(made: MadeRevocation) -> dict[str, object]:
    """One revocation; its `value` is as `POST /api/revocations` takes it."""
    what = made.revocation
    serials = str(what.first) if what.first == what.last else f"{what.first}-{what.last}"
    value = {"serial": serials, "since": timestamp(what.since)}.get(what.by, what.name)
    facts = {"seq": made.seq, "time": timestamp(made.at), "actor": made.by, "by": what.by, "value": value}
    return {**facts, "reason": made.reason}


def operation_row(entry: Entry) -> dict[str, object]:
    body = json.loads(entry.body)
    fields = {name: body[name] for name in ("operation", "outcome", "plan", "evidence", "reason")}
    at = timestamp(entry.time_ms // 1000)
    return {"seq": entry.seq, "hash": entry.hash, "time": at, "actor": entry.actor, **fields}


def operation_details(entry: Entry) -> dict[str, object]:
    return {**operation_row(entry), **json.loads(entry.body)}
