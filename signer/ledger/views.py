"""Certificates and operations as JSON objects, for the API and `signer certs`. Pure.

Separate from `queries.py`, so that reading a ledger loads neither policy nor cryptography.
"""

from __future__ import annotations

import json

from signer.model import Entry, Issued
from signer.units import timestamp


def certificate_row(row: Issued, now: int) -> dict[str, object]:
    """One certificate in a list; `now` is in seconds."""
    if row.withheld:
        status = "withheld"
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


def certificate_details(row: Issued, entry: Entry, now: int) -> dict[str, object]:
    """A certificate with its complete record and its position in the ledger."""
    body = json.loads(entry.body)
    recorded = {"seq": entry.seq, "hash": entry.hash, "time": timestamp(entry.time_ms // 1000)}
    return {**body, **certificate_row(row, now), "recorded": recorded}


def operation_row(entry: Entry) -> dict[str, object]:
    """One operation in a list."""
    body = json.loads(entry.body)
    fields = {name: body[name] for name in ("operation", "outcome", "plan", "evidence", "reason")}
    at = timestamp(entry.time_ms // 1000)
    return {"seq": entry.seq, "hash": entry.hash, "time": at, "actor": entry.actor, **fields}


def operation_details(entry: Entry) -> dict[str, object]:
    """An operation with its complete record."""
    return {**operation_row(entry), **json.loads(entry.body)}
