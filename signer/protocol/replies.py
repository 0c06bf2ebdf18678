"""The keeper's replies: one frozen type for each shape, an encoder and a decoder.

A message is the name of the shape, a newline, and the fields as JSON; an error has the shape `Error`. The native API
passes most replies on unchanged, so its OpenAPI document is generated from these types. Unset fields are omitted. Times
have the form `2026-11-22T14:02:11Z`. Pure.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from signer.errors import SignerError, Unavailable
from signer.model import RequestState, RevokedBy


class Reply(BaseModel):
    """The base of all shapes; encoder and decoder refuse unknown and mistyped fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)

    def as_json(self) -> bytes:
        """The fields that were set, as a JSON object."""
        # As `model_dump_json(exclude_unset=True)`, without its defaults and its way over text.
        return self.__pydantic_serializer__.to_json(self, exclude_unset=True)


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
    """A certificate for a Vault client that sent unused fields."""

    certificate: Certificate
    warnings: list[str]


class Rule(Reply):
    """The result of one policy rule."""

    rule: str
    outcome: Literal["ok", "refused", "skipped"]
    detail: str


class Explanation(Reply):
    """The decision of the policy, with all rules in order; `code`, `text` and `hint` are of the first refusal."""

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
    status: Literal["active", "expired", "revoked", "withheld"]


class CertificatePage(Reply):
    """Certificates, newest first; `before` requests the next page, null after the last. A page may be short."""

    certificates: list[CertificateRow]
    before: str | None


class Recorded(Reply):
    """The position of an entry in the ledger."""

    seq: int
    hash: str
    time: str


class RevocationRow(Reply):
    """A revocation; it cannot be taken back."""

    seq: Annotated[int, Field(description="of its event, and of the revocation list that reflects it first")]
    time: str
    actor: str
    by: RevokedBy
    value: str
    reason: str


class LedgerEntry(Reply):
    """An event of the ledger; `hash` is the SHA-256 of the RFC 8785 form of all other fields."""

    seq: int
    time: Annotated[int, Field(description="milliseconds since 1970 UTC")]
    kind: str
    actor: str
    body: dict[str, Any]
    prev: Annotated[str, Field(description="hash of the event before, 64 zeros for the first one")]
    hash: str


class LedgerPage(Reply):
    """Events in their order; `after` requests the next page, null after the last. A page may be short."""

    entries: list[LedgerEntry]
    after: str | None


class EventPage(Reply):
    """Events, newest first; `before` requests the next page, null after the last. A page may be short."""

    entries: list[LedgerEntry]
    before: str | None


class ActivityRow(Reply):
    """What happened from `start` on."""

    start: str
    signatures: Annotated[int, Field(description="certificates that were issued and released")]
    refusals: Annotated[int, Field(description="refused requests, also those that were only counted")]


class Activity(Reply):
    """What happened in equal spans of time, oldest first; the last one is not over."""

    step: Annotated[int, Field(description="seconds of one span")]
    rows: list[ActivityRow]


class LiveOfIdentity(Reply):
    """The certificates of an identity that are valid now."""

    identity: str
    count: int


class LiveByIdentity(Reply):
    """The identities with the most certificates that are valid now, and the sums of all."""

    identities: list[LiveOfIdentity]
    holders: Annotated[int, Field(description="identities that have one")]
    certificates: int


class CertificateDetails(CertificateRow):
    """A certificate with its complete record."""

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
    request: Annotated[str | None, Field(description="the request that humans approved")] = None
    approved_by: Annotated[list[str] | None, Field(description="who approved it, or its waiver")] = None
    waiver: Annotated[str | None, Field(description="the waiver that it was issued under")] = None
    revoked: Annotated[RevocationRow | None, Field(description="the revocation that hit it while it was valid")] = None


class OperationRow(Recorded):
    """A recorded operation on the platform."""

    actor: Annotated[str, Field(description="the identity that recorded it")]
    operation: str
    outcome: str
    plan: Annotated[str, Field(description="sha256:… of the plan, or empty")]
    evidence: Annotated[str, Field(description="sha256:… of the evidence, or empty")]
    reason: str


class OperationPage(Reply):
    """Operations, newest first; `before` requests the next page, null after the last. A page may be short."""

    operations: list[OperationRow]
    before: str | None


class OperationDetails(OperationRow):
    """An operation with its complete record."""

    address: Annotated[str, Field(description="of the recording client, empty if unknown")]
    request_id: str


class FreezeState(Reply):
    """Whether a scope is frozen now."""

    scope: str
    frozen: bool
    until: str | None = None


class FreezeRow(Reply):
    """A freeze in force."""

    scope: str
    reason: str
    by: str
    since: str
    until: str | None = None


class Freezes(Reply):
    """All freezes in force."""

    freezes: list[FreezeRow]


class Revoked(RevocationRow):
    """What was revoked, and whether the identity is frozen with it."""

    frozen: bool


class RevocationPage(Reply):
    """Revocations, newest first; `before` asks for the next page, null after the last one."""

    revocations: list[RevocationRow]
    before: str | None


class HitCount(Reply):
    """How many certificates have a name."""

    name: str
    certificates: int


class HitRow(Reply):
    """A certificate that a revocation would hit."""

    serial: str
    identity: str
    role: str
    principals: list[str]
    valid_before: str


class RevocationPreview(Reply):
    """What a revocation would hit now: `identities` and `principals` are the most frequent ones, `principals` of the
    newest 1,000 certificates."""

    certificates: Annotated[int, Field(description="valid now")]
    identities: list[HitCount]
    principals: list[HitCount]
    newest: list[HitRow]


class Binding(Reply):
    """What claims a certificate: the key that was asked for, or the secret with this digest."""

    public_key: str | None = None
    claim_sha256: str | None = None


class FrozenFields(Reply):
    """What humans approve, exactly; `digest` of a request is the SHA-256 over the RFC 8785 form of this object."""

    id: str
    nonce: str
    asked: str
    expires: str
    policy: Annotated[str, Field(description="digest of the policy in force when it was asked")]
    identity: str
    kind: Literal["human", "agent", "workload"]
    role: str
    key_id: str
    principals: list[str]
    critical_options: dict[str, str]
    extensions: dict[str, str]
    ttl: Annotated[int, Field(description="seconds from the claim")]
    reason: str | None
    address: Annotated[str | None, Field(description="of the caller")]
    binding: Binding


class WaiverTerms(Reply):
    """How long a waiver lasts and how many certificates it covers."""

    until: str
    uses: int


class ApprovalRow(Reply):
    """One human's signature; `counts` is false if they have lost the right or the key since."""

    by: str
    at: str
    key: Annotated[str, Field(description="fingerprint")]
    software: Annotated[bool, Field(description="not a FIDO key: a program can sign with it unseen")]
    waiver: WaiverTerms | None
    counts: bool


class Denial(Reply):
    """Who denied a request, and why."""

    by: str
    why: str


class NextSteps(Reply):
    """The two ways on for the asker."""

    wait: str
    claim: str


class PasskeyRow(Reply):
    """A passkey that a browser may be asked for."""

    id: Annotated[str, Field(description="of the credential, base64url")]
    rp: Annotated[str, Field(description="the relying party's id")]


class ToldRow(Reply):
    """What became of one notice of a request in one channel."""

    channel: str
    kind: Annotated[str, Field(description="webhook, ntfy, slack or mattermost")]
    people: Annotated[list[str], Field(description="who reads the channel; empty: not said")]
    of: Annotated[str, Field(description="the event that is told, such as approval.requested")]
    state: Literal["sending", "sent", "failed", "dropped"]
    at: str
    error: Annotated[str | None, Field(description="why the last attempt failed")]


class RequestDetails(Reply):
    """A request that waits for humans, or that they have decided."""

    request: str
    state: RequestState
    digest: str
    frozen: FrozenFields
    expires: Annotated[str, Field(description="while pending: for approval; while approved: to be claimed")]
    claim_by: str | None
    may_approve: Annotated[list[str], Field(description="who may still approve, the asker excepted")]
    needs: Annotated[int, Field(description="approvals of others that it needs in all")]
    presence: Annotated[
        Literal["missing", "given"] | None, Field(description="the asker's own signature, if it needs one")
    ]
    approvals: list[ApprovalRow]
    denied: Denial | None
    waiver: Annotated[str | None, Field(description="the waiver that covers it now")]
    serial: Annotated[str | None, Field(description="of the issued certificate")]
    waivers: Annotated[bool, Field(description="an approval may also give a waiver")] = False
    asked_today: Annotated[int, Field(description="requests of this identity in the last 24 hours")]
    retry_after_s: int
    next: NextSteps
    presence_keys: Annotated[
        list[str] | None, Field(description="to the asker, while presence is missing: keys that may give it")
    ] = None
    passkeys: Annotated[
        list[PasskeyRow] | None, Field(description="to whose signature it waits for: their passkeys that it takes")
    ] = None
    told: Annotated[
        list[ToldRow] | None, Field(description="who was told, and how; absent where no channel is configured")
    ] = None


class RequestPage(Reply):
    """Requests, newest first; `before` requests the next page, null after the last. A page may be short."""

    requests: list[RequestDetails]
    before: str | None


class WaiverRow(Reply):
    """A waiver in force."""

    waiver: str
    identity: str
    role: str
    principals: list[str]
    force_command: str | None
    source_address: str | None
    address: str | None
    by: list[str]
    until: str
    uses: int
    used: int
    request: str


class Waivers(Reply):
    """The waivers in force, oldest first."""

    waivers: list[WaiverRow]


class WaiverEnded(Reply):
    """A waiver that is no longer in force."""

    waiver: str
    ended: Literal[True]


class Closing(Reply):
    """Who closed an incident, when, and with which commit."""

    by: str
    at: str
    reference: str


class IncidentRow(Reply):
    """One use of break-glass."""

    incident: str
    identity: str
    role: str
    serial: str
    reason: str
    opened: str
    overdue: bool
    closed: Closing | None


class Incidents(Reply):
    """Incidents, newest first."""

    incidents: list[IncidentRow]


class Changes(Reply):
    """What a `watch` connection receives: ids of requests that may have changed; empty for all of them."""

    requests: list[str]


class Roles(Reply):
    """The names of the caller's roles."""

    roles: list[str]


class Extensions(Reply):
    """The extensions of a role: those that a caller may request, those granted by default, and the pinned values of
    those that are not flags."""

    allowed: list[str]
    default: list[str]
    values: dict[str, str]


class RoleDetails(Reply):
    """A role, with the caller's principals; times to live and `backdate` are in seconds."""

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
    backdate: int


class TokenEnd(Reply):
    """When a token of the policy in force ends; `id` is the beginning of its SHA-256."""

    id: str
    identity: str
    expires: str


class ApprovalTerms(Reply):
    """Which kinds of identity need how many humans of which groups, and for how long an approval is good."""

    kinds: list[str]
    by: list[str]
    count: int
    valid_for: Annotated[int, Field(description="seconds")]
    waivers: bool
    key_kinds: Annotated[list[str], Field(description="approval keys that it takes")]


class GrantedRole(RoleDetails):
    """A role as one identity has it."""

    approval: ApprovalTerms | None
    presence: Annotated[bool, Field(description="a human also signs for themself")]
    break_glass: bool
    per_minute: Annotated[int | None, Field(description="certificates in any 60 s")]
    live: Annotated[int | None, Field(description="certificates that are valid at once")]
    holds: Annotated[int, Field(description="certificates of it that are valid now")]
    any_key: Annotated[bool, Field(description="false if role or identity names the public keys that it takes")]


class ApprovalKeyRow(Reply):
    """A key whose signature approves; `software` is true for a key that a program can sign with unseen."""

    kind: str
    fingerprint: str
    software: bool


class IdentityRow(Reply):
    """An identity of the policy; its last token ends at `expires`, null without a token."""

    name: str
    kind: Literal["human", "agent", "workload"]
    groups: list[str]
    roles: list[str]
    may: list[str]
    expires: str | None
    approval_keys: int
    frozen: Annotated[bool, Field(description="the identity itself, or everything")]
    live: Annotated[int, Field(description="certificates that are valid now")]


class IdentityPage(Reply):
    """Identities by name; `after` requests the next page, null after the last."""

    identities: list[IdentityRow]
    after: str | None


class IdentityDetails(Reply):
    """An identity with its roles, its tokens' ends, its approval keys, and the freezes that stop it."""

    identity: IdentityRow
    roles: list[GrantedRole]
    tokens: list[TokenEnd]
    approval_keys: list[ApprovalKeyRow]
    freezes: list[FreezeRow]


class CallerDetails(Reply):
    """The caller's identity, and the remaining validity of its token (`expires_in`, seconds)."""

    identity: str
    kind: Literal["human", "agent", "workload"]
    roles: list[str]
    groups: list[str]
    may: list[str]
    expires: str
    expires_in: int
    accessor: str


class SignedIn(Reply):
    """A console session that has begun: its credential, and when it ends at the latest."""

    credential: Annotated[str, Field(repr=False)]
    identity: str
    expires: str


class SignedOut(Reply):
    """A console session that has ended."""

    identity: str


class CaKey(Reply):
    """The CA key that signs, and the lines of every CA key that hosts must trust."""

    fingerprint: str
    public_key: str
    bundle: str


class SignedCheckpoint(Reply):
    """The newest checkpoint of the ledger."""

    note: Annotated[str, Field(description="a signed note, c2sp.org/tlog-checkpoint")]


class ConsistencyProof(Reply):
    """The proof that the ledger of `to_size` events begins with that of `from_size` (RFC 6962 section 2.1.2)."""

    from_size: int
    to_size: int
    hashes: Annotated[list[str], Field(description="base64")]


class HostKeyRow(Reply):
    """A public key of a host."""

    kind: str
    bits: int
    fingerprint: str


class HostKeys(Reply):
    """A host of the signed list, its other names, its keys, and who listed it when."""

    name: str
    addresses: list[str]
    keys: list[HostKeyRow]
    by: str
    since: str
    principals: Annotated[list[str] | None, Field(description="that it lets in; null: not recorded")] = None


class HostKeysPage(Reply):
    """Hosts by name, and the `seq` of the newest event about them; `after` asks for the next page."""

    version: int
    hosts: list[HostKeys]
    after: Annotated[str | None, Field(description="the last name, if there are more")] = None


class HostRemoved(Reply):
    """A host that is no longer listed."""

    name: str


class MetricsText(Reply):
    """The keeper's metrics, in Prometheus' text format."""

    text: str


class HostRow(Reply):
    """A host, and the revocation list that it fetched last, as far as the keeper knows."""

    name: str
    version: int | None
    seen: Annotated[str | None, Field(description="when it fetched it")]
    current: Annotated[bool, Field(description="it has everything that was revoked")]


class Hosts(Reply):
    """Hosts by name. Their names are what they say of themselves: nothing is decided by them."""

    version: Annotated[int | None, Field(description="of the revocation list that is published")]
    wanted: Annotated[int | None, Field(description="the version that the ledger asks for; null if unknown")]
    as_of: Annotated[str | None, Field(description="when that was last known to be the current list")]
    hosts: list[HostRow]


class Noted(Reply):
    """The number of fetches that were taken in."""

    noted: int


class Ready(Reply):
    """Certificates can be issued: the keeper answers, has the key, and can write the ledger."""

    ready: Literal[True]
    ca_fingerprint: str
    local_ca_fingerprint: str | None = None  # mode shadow: of the local CA key
    policy: str
    mode: str
    list_version: Annotated[int | None, Field(description="of the revocation list that is published")] = None
    list_age: Annotated[int | None, Field(description="seconds since that was last known to be current")] = None
    warnings: Annotated[list[str], Field(description="what should not stay as it is")] = []


class NotReady(Reply):
    """No certificate can be issued now; the fields give the reason."""

    ready: Literal[False]
    code: str
    text: str
    hint: str


class Error(Reply):
    """A refusal or a failure. `facts` are the safe values that `text` mentions."""

    code: str
    text: str
    hint: str
    facts: dict[str, Any]


class MarkRow(Reply):
    """Up to how many events something was done, and when; `late` if that is longer ago than it should be."""

    events: int
    since: str
    late: bool = False


class LedgerState(Reply):
    """The ledger: its newest event, and the size of its file; what was verified, and cosigned by witnesses, last."""

    events: int
    head: str
    time: str | None
    bytes: int
    verified: MarkRow | None = None
    cosigned: MarkRow | None = None


class LiveCertificates(Reply):
    """The certificates of a role that are valid now."""

    role: str
    count: int


class ListStatus(Reply):
    """The published revocation list, and how many of the hosts that were seen lately have it."""

    version: int | None
    as_of: Annotated[str | None, Field(description="when it was last known to be the current list")]
    wanted: Annotated[int | None, Field(description="the version that the ledger asks for; null if unknown")]
    behind: Annotated[bool, Field(description="whether it is not the version that the ledger asks for")] = False
    publisher: Annotated[str, Field(description="fingerprint of the publishing key, which hosts pin")]
    hosts: int
    hosts_current: int


class Status(Reply):
    """What the keeper knows of itself, for the operator; `fault` is null while certificates can be issued.

    `ledger` is null while it cannot be read. `tokens` ends within 30 days, or has ended.
    """

    version: str
    mode: str
    time: Annotated[str, Field(description="the keeper's clock")]
    started: str
    ca_fingerprint: str | None
    key_since: str
    policy: str
    policy_since: str
    fault: Error | None
    ledger: LedgerState | None
    requests: Annotated[int, Field(description="that wait for humans, or to be claimed")]
    incidents: Annotated[int, Field(description="that break-glass opened and nobody has closed")]
    incidents_overdue: int
    warnings: Annotated[list[str], Field(description="what else should not stay as it is")] = []
    live: list[LiveCertificates]
    freezes: list[FreezeRow]
    tokens: list[TokenEnd]
    revocation_list: ListStatus


_Shape = TypeVar("_Shape", bound=Reply)
_SHAPES: Final[dict[bytes, type[Reply]]] = {
    shape.__name__.encode(): shape
    for shape in (
        Certificate, CertificateWithWarnings, Explanation, CertificatePage, CertificateDetails, Recorded, LedgerPage,
        EventPage, Activity, LiveByIdentity, IdentityPage, IdentityDetails,
        OperationPage, OperationDetails, FreezeState, Freezes, Revoked, RevocationPage, RevocationPreview,
        RequestDetails, RequestPage, Waivers, WaiverEnded, IncidentRow, Incidents, Changes, HostKeys, HostKeysPage,
        HostRemoved, Hosts, Noted, Roles, RoleDetails, CallerDetails, SignedIn, SignedOut, CaKey, SignedCheckpoint,
        ConsistencyProof, MetricsText, Ready, NotReady, Status, Error,
    )
}  # fmt: skip


def encode_reply(reply: Reply | SignerError) -> bytes:
    """Encodes a reply or an error as a message."""
    try:
        if isinstance(reply, SignerError):
            reply = Error(code=reply.code, text=reply.text, hint=reply.hint, facts=dict(reply.facts))
        return type(reply).__name__.encode() + b"\n" + reply.as_json()
    except ValueError:  # text that is not UTF-8, or a value that JSON lacks: it must not end the keeper
        return encode_reply(Unavailable("internal_error", "internal error", "see the service's log"))


def decode_reply(message: bytes) -> Reply:
    """Decodes a message.

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
    """Returns `reply` if it has the shape; raises `Unavailable` with `reply_malformed` otherwise."""
    if not isinstance(reply, shape):
        raise _malformed()
    return reply


def keeper_gone() -> Unavailable:
    """The error for a keeper that does not run or did not answer."""
    return Unavailable("keeper_gone", "the keeper does not answer", "retry in a second")


def _malformed() -> Unavailable:
    return Unavailable(
        "reply_malformed",
        "the keeper's reply is malformed",
        "restart the service: api and keeper must have the same version",
    )
