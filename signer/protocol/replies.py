"""What the keeper answers: one frozen type for each shape, its one encoder, and the one function that decodes.

A message is the name of the shape, a newline, and the fields as JSON; an error has the shape `Error`. The native API
sends most of them on as they are, so its OpenAPI document is made from these types. A field that was not set is left
out. Times are `2026-11-22T14:02:11Z`. Pure.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from signer.errors import SignerError, Unavailable
from signer.protocol.operations import OperationName, OutcomeName


class Reply(BaseModel):
    """A shape of reply. Unknown or mistyped fields are refused where it is made and where it is read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def as_json(self) -> bytes:
        """The fields that were set, as a JSON object."""
        return self.model_dump_json(exclude_unset=True).encode()


class Certificate(Reply):
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


class CertificateWithWarnings(Reply):
    """A certificate for a Vault client that sent fields which nobody looks at."""

    certificate: Certificate
    warnings: list[str]


class Rule(Reply):
    """One rule that policy looked at."""

    rule: str
    outcome: Literal["ok", "refused", "skipped"]
    detail: str


class Explanation(Reply):
    """What policy would decide, every rule in order; `code`, `text` and `hint` are of the first refusal."""

    identity: str
    role: str
    granted: bool
    rules: list[Rule]
    code: str | None = None
    text: str | None = None
    hint: str | None = None


class CertificateRow(Reply):
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


class CertificatePage(Reply):
    """Certificates, newest first; `before` asks for the next page, null when all was looked at. A page may be short."""

    certificates: list[CertificateRow]
    before: str | None


class Recorded(Reply):
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


class OperationPage(Reply):
    """Operations, newest first; `before` asks for the next page, null when there is none. A page may be short."""

    operations: list[OperationRow]
    before: str | None


class OperationDetails(OperationRow):
    """An operation with everything that was recorded of it."""

    address: Annotated[str, Field(description="of who recorded it, empty if not known")]
    request_id: str


class FreezeState(Reply):
    """What is so now."""

    scope: str
    frozen: bool


class FreezeRow(Reply):
    """A freeze in force."""

    scope: str
    reason: str


class Freezes(Reply):
    """All freezes in force."""

    freezes: list[FreezeRow]


class Roles(Reply):
    """The names of the roles that the caller may ask for."""

    roles: list[str]


class Extensions(Reply):
    """The extensions of a role: those that a caller may ask for, and those that it gets unasked."""

    allowed: list[str]
    default: list[str]


class RoleDetails(Reply):
    """A role as policy has it for the caller; times to live in seconds."""

    name: str
    principals: list[str]
    default_principals: list[str]
    default_ttl: int
    max_ttl: int
    key_types: list[str]
    rsa_min_bits: int
    extensions: Extensions
    critical_options: list[str]
    force_command: str | None
    source_address: list[str] | str | None
    verify_required: bool
    no_touch_required: bool
    allow_key_id: bool
    reason_required: bool


class CallerDetails(Reply):
    """Who the caller is, and how long its token is good (`expires_in`, seconds)."""

    identity: str
    kind: Literal["human", "agent", "workload"]
    roles: list[str]
    groups: list[str]
    may: list[str]
    expires: str
    expires_in: int
    accessor: str


class CaKey(Reply):
    """The CA key that signs, and the lines of every CA key that hosts must trust."""

    fingerprint: str
    public_key: str
    bundle: str


class MetricsText(Reply):
    """The keeper's figures, in Prometheus' text format."""

    text: str


class Ready(Reply):
    """Certificates can be issued: the keeper answers, has the key, and a write reached the ledger's disk."""

    ready: Literal[True]
    ca_fingerprint: str
    local_ca_fingerprint: str | None = None  # in mode shadow: of the key that is compared with
    policy: str
    mode: str


class NotReady(Reply):
    """Nothing can be issued now, and why."""

    ready: Literal[False]
    code: str
    text: str
    hint: str


class Error(Reply):
    """A refusal, or why there is no answer. `facts` are the safe values that `text` mentions."""

    code: str
    text: str
    hint: str
    facts: dict[str, Any]


_Shape = TypeVar("_Shape", bound=Reply)
_SHAPES: Final[dict[bytes, type[Reply]]] = {
    shape.__name__.encode(): shape
    for shape in (
        Certificate, CertificateWithWarnings, Explanation, CertificatePage, CertificateDetails, Recorded, OperationPage,
        OperationDetails, FreezeState, Freezes, Roles, RoleDetails, CallerDetails, CaKey, MetricsText, Ready, NotReady,
        Error,
    )
}  # fmt: skip


def encode_reply(reply: Reply | SignerError) -> bytes:
    """A reply or an error as a message."""
    if isinstance(reply, SignerError):
        reply = Error(code=reply.code, text=reply.text, hint=reply.hint, facts=dict(reply.facts))
    return type(reply).__name__.encode() + b"\n" + reply.as_json()


def decode_reply(message: bytes) -> Reply:
    """The reply in a message.

    Raises the `SignerError` that the keeper sent, or `Unavailable`: `keeper_gone` for an empty message,
    `reply_malformed` for an unknown shape or fields that do not fit it.
    """
    if not message:
        raise keeper_gone()
    name, _, fields = message.partition(b"\n")
    shape = _SHAPES.get(name)
    if shape is None:
        raise _malformed()
    try:
        reply = shape.model_validate_json(fields)
    except ValidationError:
        raise _malformed() from None
    if isinstance(reply, Error):
        raise SignerError(reply.code, reply.text, reply.hint, reply.facts)
    return reply


def expect(shape: type[_Shape], reply: Reply) -> _Shape:
    """`reply`, which must be of the shape; raises `Unavailable` with `reply_malformed`."""
    if not isinstance(reply, shape):
        raise _malformed()
    return reply


def keeper_gone() -> Unavailable:
    """The error of a keeper that is not there, or did not answer."""
    return Unavailable("keeper_gone", "the keeper does not answer", "try again in a second")


def _malformed() -> Unavailable:
    return Unavailable(
        "reply_malformed",
        "the keeper's reply is not one that this api knows",
        "restart the service: api and keeper must be of one version",
    )
