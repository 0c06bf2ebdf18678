"""What an operator did to the platform, as it is told to the ledger: the body of `POST /api/operations`. Pure.

The words are part of what is versioned. Digests are `sha256:` and 64 hex digits, or empty where there is none.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from signer.errors import BadRequest
from signer.model import MAX_REASON, Caller, Event, Identity, hide_tokens
from signer.protocol.sign_request import Number

KIND: Final = "operation.recorded"
DIGEST: Final = r"sha256:[0-9a-f]{64}"

OperationName = Literal["cutover", "rollback", "decommission"]
OutcomeName = Literal["applied", "rolled_back", "failed", "stopped", "rollback_failed", "approval_refused"]
_Digest = Annotated[str, Field(pattern=rf"^({DIGEST})?$")]


class OperationBody(BaseModel):
    """What was done, how it ended, by which plan, proven by which evidence, and why."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    operation: OperationName
    outcome: OutcomeName
    plan: Annotated[_Digest, Field(description="digest of the plan that was approved")] = ""
    evidence: Annotated[_Digest, Field(description="digest of the file SHA256SUMS of the evidence")] = ""
    reason: Annotated[str, Field(max_length=MAX_REASON, description="one printable line")] = ""


def read_operation(fields: dict[str, Any]) -> OperationBody:
    """A decoded body as what it says; raises `BadRequest` that names the first wrong field."""
    try:
        body = OperationBody.model_validate({k: float(v) if isinstance(v, Number) else v for k, v in fields.items()})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:64]
        raise _malformed(where, f"{first['msg'][:1].lower()}{first['msg'][1:]}") from None
    if body.reason and not body.reason.isprintable():
        raise _malformed("reason", "must be one printable line")
    return body


def read_digest(text: str) -> str:
    """A digest to look for; raises `BadRequest`."""
    if re.fullmatch(DIGEST, text) is None:
        raise BadRequest(
            "query_malformed", "evidence must be sha256: and 64 hex digits", "send it as the ledger holds it"
        )
    return text


def operation_event(body: OperationBody, identity: Identity, caller: Caller) -> Event:
    """The record of it."""
    return Event(
        "operation.recorded",
        identity.name,
        {
            "operation": body.operation,
            "outcome": body.outcome,
            "plan": body.plan,
            "evidence": body.evidence,
            "reason": hide_tokens(body.reason),
            "address": caller.address or "",
            "request_id": caller.request_id,
        },
    )


def _malformed(where: str, what: str) -> BadRequest:
    return BadRequest("field_malformed", f"field {where!a}: {what}", "see /api/openapi.json")
