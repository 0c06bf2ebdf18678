"""Records of operations on the platform: the body of `POST /api/operations` and its event. Pure.

The names of operations and outcomes are part of the versioned API. Digests are `sha256:` and 64 hex digits, or empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Annotated, Final, Literal

from pydantic import Field

from signer.errors import BadRequest
from signer.model import Caller, Entry, Event, Identity
from signer.protocol.bodies import Body, Reason
from signer.units import timestamp

KIND: Final = "operation.recorded"
DIGEST: Final = r"sha256:[0-9a-f]{64}"

OperationName = Literal["cutover", "rollback", "decommission"]
OutcomeName = Literal["applied", "rolled_back", "failed", "stopped", "rollback_failed", "approval_refused"]
_Digest = Annotated[str, Field(pattern=rf"^({DIGEST})?$")]


class OperationBody(Body):
    """An operation, its outcome, plan and evidence, and the reason."""

    operation: OperationName
    outcome: OutcomeName
    plan: Annotated[_Digest, Field(description="digest of the plan that was approved")] = ""
    evidence: Annotated[_Digest, Field(description="digest of the file SHA256SUMS of the evidence")] = ""
    reason: Reason = ""


def read_digest(text: str) -> str:
    """Validates the digest of a query; raises `BadRequest`."""
    if re.fullmatch(DIGEST, text) is None:
        raise BadRequest("query_malformed", "evidence must be sha256: and 64 hex digits", "copy it from the ledger")
    return text


def operation_event(body: OperationBody, identity: Identity, caller: Caller) -> Event:
    sender = {"address": caller.address or "", "request_id": caller.request_id}
    return Event("operation.recorded", identity.name, {**body.model_dump(), **sender})


def cut_over_at(entries: Iterable[Entry], before: int | None = None) -> int | None:
    """When the cutover was recorded that is in force after these events, in seconds since 1970; None if there is none.

    `before` is the answer for the events before them. A rollback ends it, and so does a cutover that was rolled back; a
    run that failed changes nothing.
    """
    at = before
    for entry in entries:
        if entry.kind == KIND:
            body = json.loads(entry.body)
            if (body["operation"], body["outcome"]) == ("cutover", "applied"):
                at = entry.time_ms // 1000
            elif (body["operation"], body["outcome"]) in (("rollback", "applied"), ("cutover", "rolled_back")):
                at = None
    return at


def still_vault(mode: str, cut_over: int | None) -> list[str]:
    """A warning, if Vault signs although a cutover is in force; a rollback starts the service before it can record."""
    if mode == "local" or cut_over is None:
        return []
    text = f"mode is {mode}, but the cutover of {timestamp(cut_over)} is in force"
    back = "`signer cutover rollback --config FILE --reason TEXT` records the way back"
    return [f"{text}: start the service with the local CA's files; {back}"]
