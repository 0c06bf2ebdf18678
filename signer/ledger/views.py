"""Certificates and operations as JSON objects, for the API and `signer certs`. Pure.

Separate from `queries.py`, so that reading a ledger loads neither policy nor cryptography.
"""

from __future__ import annotations

import json

from signer.ledger.revoked import MadeRevocation
from signer.model import Entry, Issued
from signer.units import timestamp


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
