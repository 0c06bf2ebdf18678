"""The bodies of the native API as models: what /api/openapi.json is made from, and tests compare real answers with.

Nothing is validated with them while serving, but for the bodies that callers send. Times are `2026-11-22T14:02:11Z`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from signer.protocol.operations import OperationName, OutcomeName

_Text = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Problem(_Strict):
    """RFC 9457. `code` is stable, `hint` the next action, `request_id` is in the ledger and the log, too."""

    type: Literal["about:blank"]
    title: str
    status: int
    detail: str
    code: str
    hint: str
    request_id: str


class Certificate(_Strict):
    """A certificate that was just issued."""

    certificate: Annotated[str, Field(description="one line, the content of a -cert.pub file")]
    serial: Annotated[str, Field(description="decimal")]
    key_id: str
    identity: str
    role: str
    principals: list[str]
    valid_after: str
    valid_before: str
    expires_in: Annotated[int, Field(description="seconds")]
    ca_fingerprint: str


class Rule(_Strict):
    """One rule that policy looked at."""

    rule: str
    outcome: Literal["ok", "refused", "skipped"]
    detail: str


class Explanation(_Strict):
    """What policy would decide, every rule in order; `code`, `text` and `hint` are of the first refusal."""

    identity: str
    role: str
    granted: bool
    rules: list[Rule]
    code: str | None = None
    text: str | None = None
    hint: str | None = None


class CertificateRow(_Strict):
    """A certificate in a list."""

    serial: str
    backend: str
    identity: str
    role: str
    principals: list[str]
    key_id: str
    fingerprint: Annotated[str, Field(description="of the public key")]
    valid_after: str
    valid_before: str
    status: Literal["active", "expired", "withheld"]


class CertificatePage(_Strict):
    """Certificates, newest first; `before` asks for the next page, null when all was looked at. A page may be short."""

    certificates: list[CertificateRow]
    before: str | None


class Recorded(_Strict):
    """Where in the ledger something stands."""

    seq: int
    hash: str
    time: str


class CertificateDetails(CertificateRow):
    """A certificate with everything that was recorded of it."""

    kind: Literal["human", "agent", "workload"]
    key_type: str
    critical_options: dict[str, str]
    extensions: list[str]
    reason: str | None
    address: str | None
    request_id: str
    policy: Annotated[str, Field(description="digest of the policy that granted it")]
    ca: Annotated[str, Field(description="fingerprint of the CA key")]
    to_be_signed_sha256: str
    recorded: Recorded


class OperationRow(Recorded):
    """What an operator did to the platform."""

    actor: Annotated[str, Field(description="the identity that recorded it")]
    operation: OperationName
    outcome: OutcomeName
    plan: Annotated[str, Field(description="sha256:… of the plan, or empty")]
    evidence: Annotated[str, Field(description="sha256:… of the evidence, or empty")]
    reason: str


class OperationPage(_Strict):
    """Operations, newest first; `before` asks for the next page, null when there is none. A page may be short."""

    operations: list[OperationRow]
    before: str | None


class OperationDetails(OperationRow):
    """An operation with everything that was recorded of it."""

    address: Annotated[str, Field(description="of who recorded it, empty if not known")]
    request_id: str


class FreezeBody(_Strict):
    """What to freeze, and why."""

    scope: Annotated[_Text, Field(description="all, identity:NAME or role:NAME")]
    reason: Annotated[str, Field(min_length=1, max_length=500, description="one line for the ledger")]


class FreezeState(_Strict):
    """What is so now."""

    scope: str
    frozen: bool


class FreezeRow(_Strict):
    """A freeze in force."""

    scope: str
    reason: str


class Freezes(_Strict):
    """All freezes in force."""

    freezes: list[FreezeRow]


class Alive(_Strict):
    """The api's process answers."""

    status: Literal["ok"]


class Ready(_Strict):
    """Certificates can be issued: the keeper answers, has the key, and a write reached the ledger's disk."""

    ready: Literal[True]
    ca_fingerprint: str
    local_ca_fingerprint: str | None = None  # in mode shadow: of the key that is compared with
    policy: str
    mode: str
