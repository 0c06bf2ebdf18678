"""The frozen types that cross modules: who asks, what for, what was granted, what was recorded.

Plain values only: no parsing, no checks, no I/O. Times are whole seconds since 1970 UTC unless a name says `_ms`.
Anyone may import it; it imports nothing of ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import ClassVar, Final, Literal, get_args

import msgspec

BACKENDS: Final = ("local", "vault")  # who signed a certificate
LONGEST_VALIDITY: Final = 24 * 3600  # seconds from now; no policy may grant more
BACKDATE: Final = 30  # seconds; hosts' clocks differ, and every peer back-dates by as much
MAX_REASON: Final = 500  # characters
MAX_HOST_PRINCIPALS: Final = 64  # that are recorded of one host
MAX_PUBLIC_KEY: Final = 16 * 1024  # characters; the line of an RSA-16384 key has 2,800
MAX_KEY_ID: Final = 256  # bytes; every host logs it at each login
# sshd passes the key id unsanitised to AuthorizedPrincipalsCommand and to its log.
KEY_ID: Final = re.compile(r"[A-Za-z0-9._@=:+/-]+")
# sshd splits at commas and spaces (CVE-2026-35414); `*` and `{` are unexpanded templates.
PRINCIPAL: Final = re.compile(r"[A-Za-z0-9._@:+=/$\\~-]{1,256}", re.ASCII)
OPTION_NAMES: Final = frozenset({"force-command", "source-address", "verify-required"})  # critical options
TOKEN_PREFIX: Final = "sgn_"  # noqa: S105 - how every token begins
CONSOLE_PREFIX: Final = "console_"  # how the credential of every console session begins
WAIVER_SECONDS: Final = 4 * 3600  # from its approval; no waiver lasts longer
WAIVER_USES: Final = 20  # certificates of one waiver
MAX_VALID_FOR: Final = 12 * 3600  # seconds between an approval and its certificate
BREAK_GLASS_TTL: Final = 15 * 60  # seconds; no certificate of a break-glass role lives longer
HIDDEN: Final = "[hidden]"
# The forms of bearer tokens, for regular expressions; each is searched in linear time.
TOKEN_SHAPES: Final = (
    TOKEN_PREFIX + r"[0-9A-Za-z]{12,}",  # signer's, also mistyped
    CONSOLE_PREFIX + r"[A-Za-z0-9_-]{40,}",  # of a console session; a name is shorter
    r"hv[sbr]\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9]+)?",  # Vault's since 1.10: service, batch, recovery
    r"(?<![\w.-])[sbr]\.[A-Za-z0-9_-]{24,}(?:\.[A-Za-z0-9]+)?",  # Vault's before 1.10, and OpenBao's
)
_TOKEN_LIKE: Final = re.compile("|".join((*TOKEN_SHAPES, r"(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*")), re.ASCII)

# What an identity may do besides asking for certificates, in the words of the console.
RIGHTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "approve": "approve and deny requests of others",
        "freeze": "freeze identities, roles and everything, and lift freezes",
        "hosts": "change the list of host keys",
        "ledger.read": "read the whole ledger, and see all identities",
        "operate": "record operations on the platform",
        "revoke": "revoke certificates and keys",
    }
)

IdentityKind = Literal["human", "agent", "workload"]
ApprovalKeyKind = Literal["ssh", "webauthn"]
APPROVAL_KEY_KINDS: Final[tuple[ApprovalKeyKind, ...]] = get_args(ApprovalKeyKind)
RevokedBy = Literal["serial", "identity", "key", "since", "ca"]
RequestState = Literal["pending", "approved", "denied", "expired", "withdrawn", "issued", "lapsed"]
REQUEST_STATES: Final[tuple[RequestState, ...]] = get_args(RequestState)


class RunOutcome(StrEnum):
    """How a run of a cutover, rollback or decommission ended; journals, evidence and ledger contain these words."""

    APPLIED = "applied"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"  # before anything was changed
    STOPPED = "stopped"  # after a step that has no undo; the run can be resumed
    ROLLBACK_FAILED = "rollback_failed"


class PublicKey(msgspec.Struct, frozen=True):
    """A vetted OpenSSH public key. `blob` is exactly what the caller sent, decoded; `fingerprint` is `SHA256:…`."""

    kind: str
    blob: bytes
    bits: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class SshApprovalKey:
    """A key of OpenSSH whose signature approves. `software` allows a key that is not a FIDO key, and so signs without a
    human; `verify` requires that the FIDO key verified its user (PIN or fingerprint)."""

    kind: ClassVar[ApprovalKeyKind] = "ssh"
    key: PublicKey
    software: bool = False
    verify: bool = False

    @property
    def fingerprint(self) -> str:
        return self.key.fingerprint


@dataclass(frozen=True, slots=True)
class Passkey:
    """A WebAuthn credential whose assertion approves, made for the relying party `rp` on a page of one of `origins`.

    `id` and `public_key` (DER of a SubjectPublicKeyInfo) are base64url; `fingerprint` is `SHA256:…` of that DER.
    """

    kind: ClassVar[ApprovalKeyKind] = "webauthn"
    id: str
    public_key: str
    rp: str
    origins: tuple[str, ...]
    fingerprint: str


ApprovalKey = SshApprovalKey | Passkey


@dataclass(frozen=True, slots=True)
class Assertion:
    """What a browser returns for a passkey (WebAuthn Level 3 section 5.2.2): nothing of it is checked.

    All four are base64url: the credential's id, authenticatorData, clientDataJSON and the signature.
    """

    id: str
    authenticator_data: str
    client_data: str
    signature: str


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks, as policy.toml names it."""

    name: str
    kind: IdentityKind
    groups: frozenset[str]
    roles: frozenset[str]
    may: frozenset[str]
    keys: frozenset[str] | None = None  # fingerprints; None takes any key
    known: frozenset[str] = field(default=frozenset(), repr=False)  # the names of all identities
    approval_keys: tuple[ApprovalKey, ...] = ()

    def holds_key_of(self, kinds: frozenset[ApprovalKeyKind]) -> bool:
        """Whether one of the identity's approval keys is of these kinds."""
        return any(line.kind in kinds for line in self.approval_keys)


class Caller(msgspec.Struct, frozen=True):
    """What one message claims about its sender; nothing of it is proven but the token, and that by the keeper.

    `address` is an IP address as text or None when the edge does not know it. `local_user` is the account of a process
    on this host that needs no token; only the keeper sets it, from what the kernel says of the connection.
    `is_unattended` marks what a page asks by itself: it does not keep a console session alive.
    """

    token: str | None
    address: str | None
    request_id: str
    local_user: str | None = None
    is_unattended: bool = False

    def __repr__(self) -> str:
        return f"Caller({self.address!r}, {self.request_id!r}, {self.local_user!r})"  # never the token


@dataclass(frozen=True, slots=True)
class ActiveFreeze:
    """A freeze in force: who set it, why and when; until when, None for ever. Times are in seconds since 1970."""

    reason: str
    by: str
    since: int
    until: int | None = None


@dataclass(frozen=True, slots=True)
class KnownHost:
    """A host of the signed list: its names as known_hosts has them, the first one its own; its public keys, each as
    `type base64`; who added it, and when in seconds since 1970; the principals that it lets in, None if they are not
    recorded."""

    names: tuple[str, ...]
    keys: tuple[str, ...]
    by: str
    since: int
    principals: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True, slots=True)
class Revocation:
    """Which certificates one revocation hits. `by` says which of the other fields counts.

    `serial` hits the serials `first` to `last`, `identity` the certificates of `name`, `since` those recorded at or
    after a time in seconds since 1970: of what is recorded before the revocation. `key` and `ca` hit all certificates,
    also later ones, of the user's or CA's key with the fingerprint `name`.
    """

    by: RevokedBy
    name: str = ""
    first: int = 0
    last: int = 0
    since: int = 0


class SignRequest(msgspec.Struct, frozen=True):
    """What a caller asks for, typed but not yet allowed. None means: not said, the role's default applies.

    If humans have to approve it, `claim_sha256` is the SHA-256 in hex of the secret that claims the certificate.
    """

    role: str
    public_key: str
    principals: tuple[str, ...] | None = None
    ttl: int | None = None
    key_id: str | None = None
    cert_type: str = "user"
    critical_options: tuple[tuple[str, str], ...] = ()
    extensions: tuple[tuple[str, str], ...] = ()
    reason: str | None = None
    claim_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class CaKeys:
    """The CA keys that policy.toml names. Only the pinned and the next one may sign; retired ones may have signed.

    `public` is the pinned key if the file has it; it has it whenever there is a `next`.
    """

    fingerprint: str
    public: PublicKey | None = None
    next: PublicKey | None = None
    retired: tuple[PublicKey, ...] = ()

    @property
    def may_sign(self) -> tuple[str, ...]:
        """Fingerprints of the keys that may be in use, the pinned one first."""
        return (self.fingerprint,) if self.next is None else (self.fingerprint, self.next.fingerprint)

    def names(self, fingerprint: str) -> bool:
        """True for a key that may sign or may have signed."""
        return fingerprint in self.may_sign or fingerprint in [key.fingerprint for key in self.retired]


class Grant(msgspec.Struct, frozen=True):
    """A decision to issue: everything the certificate may say, except serial, nonce and the clock's time.

    Options are sorted by name; `extension_values` has the extensions that are not flags. `ttl` is seconds from now;
    `backdate` seconds before now.
    """

    identity: str
    kind: IdentityKind
    role: str
    public_key: PublicKey
    key_id: str
    principals: tuple[str, ...]
    ttl: int
    backdate: int
    critical_options: tuple[tuple[str, str], ...]
    extensions: tuple[str, ...]
    reason: str | None
    address: str | None
    extension_values: tuple[tuple[str, str], ...] = ()

    @property
    def extension_fields(self) -> tuple[tuple[str, str], ...]:
        """Name and value of each extension, as the certificate has them."""
        return _with_values(self.extensions, self.extension_values)


@lru_cache(maxsize=64)  # the certificates of a role share them
def _with_values(names: tuple[str, ...], values: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    given = dict(values)
    return tuple((name, given.get(name, "")) for name in names)


@dataclass(frozen=True, slots=True)
class Terms:
    """A grant before humans have agreed: everything the certificate may say, except key, serial and time.

    `extensions` are names and values, sorted by name, as `critical_options`.
    """

    identity: str
    kind: IdentityKind
    role: str
    key_id: str
    principals: tuple[str, ...]
    ttl: int
    critical_options: tuple[tuple[str, str], ...]
    extensions: tuple[tuple[str, str], ...]
    reason: str | None
    address: str | None


@dataclass(frozen=True, slots=True)
class Consent:
    """The humans who let a certificate be issued: by their approvals of a request, or of a waiver that covers it."""

    request: str | None
    approvers: tuple[str, ...]
    waiver: str | None = None
    break_glass: bool = False


@dataclass(frozen=True, slots=True)
class Approval:
    """Which kinds of identity need `count` humans of which groups, and for how many seconds their approval is good.

    `waivers` allows an approval that also covers later requests; `key_kinds` are the approval keys that it takes.
    """

    kinds: frozenset[IdentityKind]
    by: tuple[str, ...]
    valid_for: int
    count: int = 1
    waivers: bool = True
    key_kinds: frozenset[ApprovalKeyKind] = frozenset(APPROVAL_KEY_KINDS)


@dataclass(frozen=True, slots=True)
class Limits:
    """Certificates per identity and role: issued in any 60 s, and not yet expired; None sets no limit."""

    per_minute: int | None = None
    live: int | None = None


@dataclass(frozen=True, slots=True)
class Role:
    """What may be asked for under one name. `principals` may hold `{identity}`; ttls are seconds."""

    name: str
    principals: tuple[str, ...]
    default_principals: tuple[str, ...]
    default_ttl: int
    max_ttl: int
    key_types: frozenset[str]
    rsa_min_bits: int
    allowed_extensions: frozenset[str]
    default_extensions: tuple[str, ...]
    allowed_critical_options: frozenset[str]
    force_command: str | None
    source_address: Literal["caller"] | tuple[str, ...] | None
    verify_required: bool
    no_touch_required: bool
    allow_key_id: bool
    reason_required: bool
    approval: Approval | None
    limits: Limits
    extension_values: tuple[tuple[str, str], ...] = ()  # pinned; a value may hold `{identity}`
    unlisted_extensions: Literal["refuse", "drop"] = "refuse"
    backdate: int = BACKDATE
    keys: frozenset[str] | None = None  # fingerprints; None takes any key
    presence: bool = False  # a human also signs for themself
    break_glass: bool = False  # humans only, with their own signature; opens an incident

    @property
    def key_kinds(self) -> frozenset[ApprovalKeyKind]:
        """The approval keys whose signatures the role takes; break-glass takes those of OpenSSH only."""
        if self.break_glass:
            return frozenset({"ssh"})
        return frozenset(APPROVAL_KEY_KINDS) if self.approval is None else self.approval.key_kinds


@dataclass(frozen=True, slots=True)
class Token:
    """One credential of one identity: hex SHA-256 of the token's text, and when it stops being good."""

    identity: str
    sha256: str
    expires: int


class UsageCounts(msgspec.Struct, frozen=True):
    """What an identity already holds of a role: certificates of the last 60 s, and those still valid; and in how many
    seconds the first of each ceases to count."""

    last_minute: int = 0
    live: int = 0
    minute_frees_in: int = 0
    live_frees_in: int = 0


@dataclass(frozen=True, slots=True)
class Returned:
    """What Vault made of a grant: the certificate's line, and the blob of the CA key that Vault publishes."""

    line: str
    ca_key: bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule that policy looked at: `outcome` is `ok`, `refused` or `skipped`; `detail` says what it saw."""

    rule: str
    detail: str
    outcome: Literal["ok", "refused", "skipped"]


class Event(msgspec.Struct, frozen=True):
    """One thing that happened, not yet in the ledger. `body` values are text, whole numbers, booleans or lists."""

    kind: str
    actor: str
    body: dict[str, object]


class Entry(msgspec.Struct, frozen=True):
    """One event as the ledger holds it: `time_ms` since 1970, `body` in canonical JSON, `prev` and `hash` in hex."""

    seq: int
    time_ms: int
    kind: str
    actor: str
    body: str
    prev: str
    hash: str


class Head(msgspec.Struct, frozen=True):
    """The newest entry of a ledger: what a third person writes down to notice a cut-off tail later."""

    seq: int
    hash: str
    time_ms: int


@dataclass(frozen=True, slots=True)
class Issued:
    """A row of the certificates table.

    `backend` names who signed (`local`: our CA key); `withheld` marks a serial that was recorded and never signed.
    """

    serial: int
    backend: str
    seq: int
    identity: str
    role: str
    principals: tuple[str, ...]
    fingerprint: str
    key_id: str
    valid_after: int
    valid_before: int
    withheld: bool


@dataclass(frozen=True, slots=True)
class Filter:
    """Which certificates a page holds; None does not restrict.

    `before` is the `seq` of the last row of the page before, `active_at` seconds since 1970; `since` too: recorded then
    or later. `any_of` are principals, one of which a certificate must have.
    """

    identity: str | None = None
    role: str | None = None
    principal: str | None = None
    fingerprint: str | None = None
    backend: str | None = None
    active_at: int | None = None
    before: int | None = None
    limit: int = 50
    since: int | None = None
    any_of: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Activity:
    """What happened in one span of time: certificates that were issued and not withheld, and refusals."""

    issued: int
    refused: int


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events a page holds, newest first; None does not restrict.

    `kind` is a kind, or what several kinds begin with, before a dot. `identity` made the event or is named in it.
    `since` is in milliseconds since 1970; `before` is the number of the last event of the page before.
    `only_others` leaves out the events of certificates that were issued.
    """

    kind: str | None = None
    identity: str | None = None
    since: int | None = None
    before: int | None = None
    only_others: bool = False
    limit: int = 50

    def takes(self, kind: str) -> bool:
        """Whether events of that kind match."""
        if self.only_others and kind == "certificate.issued":
            return False
        return self.kind is None or kind == self.kind or kind.startswith(f"{self.kind}.")


def hide_tokens(text: str) -> str:
    """The text without tokens of signer, also mistyped ones, tokens of Vault and JSON web tokens.

    JSON text stays JSON text with the same keys in the same order, unless a key has the form of a token.
    """
    return _TOKEN_LIKE.sub(HIDDEN, text) if may_have_token(text) else text


def may_have_token(text: str) -> bool:
    """False for a text without a token; the search for constants costs a twentieth of the expression's."""
    return (
        TOKEN_PREFIX in text or CONSOLE_PREFIX in text or "s." in text or "b." in text or "r." in text or "eyJ" in text
    )
