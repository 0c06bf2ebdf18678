"""Requests that wait for humans, their approvals and waivers: a state machine over the ledger's events. Pure.

`Approvals` holds what the events say; `apply` is the only way to change it, when a command is decided and at a start.
Whether an approval counts is decided again each time, by the policy and the freezes then in force (`Situation`): no
right is remembered. `incidents.py` holds what break-glass leaves behind, `requests.py` the commands.
"""

from __future__ import annotations

import base64
import hmac
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from typing import Any, Final

from signer.authority import webauthn
from signer.authority.incidents import Incidents
from signer.authority.webauthn import MAX_CLIENT_DATA, VerifiedAssertion
from signer.errors import BadRequest, BadSignature, NotFound, Refused, SignerError
from signer.model import (
    APPROVAL_KEY_KINDS,
    MAX_VALID_FOR,
    WAIVER_SECONDS,
    WAIVER_USES,
    ActiveFreeze,
    ApprovalKey,
    ApprovalKeyKind,
    Assertion,
    Consent,
    Entry,
    Event,
    Grant,
    Identity,
    IdentityKind,
    Passkey,
    PublicKey,
    RequestState,
    Role,
    SignRequest,
    SshApprovalKey,
    Terms,
    hide_tokens,
)
from signer.policy.decide import Policy
from signer.policy.passkeys import decode_base64url
from signer.ssh import sshsig
from signer.ssh.publickey import render_public_key
from signer.ssh.sshsig import SshSignature
from signer.ssh.statement import APPROVAL_NAMESPACE, approval_statement, request_digest
from signer.units import parse_timestamp, timestamp

PENDING_FOR: Final = 3_600  # seconds that a request waits for humans
VALID_FOR: Final = 600  # seconds that an approval is good where the role says nothing
KEPT_FOR: Final = 24 * 3_600  # seconds for which ended requests are shown
REMEMBERED: Final = KEPT_FOR + PENDING_FOR + MAX_VALID_FOR  # seconds; older events say nothing of what is shown
MAX_PENDING: Final = 1_000  # requests that wait at once
MAX_PENDING_OF_IDENTITY: Final = 20  # of them, of one identity
MAX_KEPT: Final = 2_000  # ended requests that are shown
MAX_FROZEN: Final = 8_192  # bytes of JSON that a human has to read
NONCE_BYTES: Final = 16
_ID_LETTERS: Final = 10
_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"
_SECRET_DIGITS: Final = 64

# The event that ends a request, and the state after it.
ENDS: Final[Mapping[str, RequestState]] = {
    "approval.denied": "denied",
    "approval.withdrawn": "withdrawn",
    "approval.expired": "expired",
    "approval.lapsed": "lapsed",
    "approval.issued": "issued",
}


@dataclass(frozen=True, slots=True)
class Situation:
    """By what a request is judged: the policy and the freezes in force, and the time in seconds since 1970.

    `in_flight` are the consents of certificates that another CA is making, which are not in the ledger yet.
    """

    policy: Policy
    freezes: Mapping[str, ActiveFreeze]
    now: int
    in_flight: tuple[Consent, ...] = ()


@dataclass(frozen=True, slots=True)
class FrozenRequest(Terms):
    """What humans approve, exactly: the certificate, who asks for it and why, and what may claim it.

    One of `public_key` (`type base64`) and `claim_sha256` is set. `id` is `r-` and 10 base32 letters of randomness.
    """

    id: str
    nonce: str
    asked: int
    expires: int
    policy: str
    public_key: str | None
    claim_sha256: str | None

    def as_json(self) -> dict[str, object]:
        """The object that is shown, recorded, and signed by its digest."""
        shown: dict[str, object] = {item.name: getattr(self, item.name) for item in fields(self)}
        public_key, claim = shown.pop("public_key"), shown.pop("claim_sha256")
        return {
            **shown,
            "asked": timestamp(self.asked),
            "expires": timestamp(self.expires),
            "principals": list(self.principals),
            "critical_options": dict(self.critical_options),
            "extensions": dict(self.extensions),
            "binding": {"public_key": public_key} if public_key is not None else {"claim_sha256": claim},
        }

    @classmethod
    def from_json(cls, shown: Mapping[str, Any]) -> FrozenRequest:
        """The request of a recorded event."""
        known = {item.name: shown[item.name] for item in fields(cls) if item.name in shown}
        return cls(
            **{
                **known,
                "asked": parse_timestamp(shown["asked"]),
                "expires": parse_timestamp(shown["expires"]),
                "principals": tuple(shown["principals"]),
                "critical_options": tuple(sorted(shown["critical_options"].items())),
                "extensions": tuple(sorted(shown["extensions"].items())),
                "public_key": shown["binding"].get("public_key"),
                "claim_sha256": shown["binding"].get("claim_sha256"),
            }
        )

    def ask(self) -> tuple[object, ...]:
        """What two requests have in common that ask for the same.

        The caller's address is not part of it: where the role pins it, it is among the critical options.
        """
        return (
            self.identity, self.kind, self.role, self.key_id, self.principals, self.critical_options, self.extensions,
            self.ttl, self.reason, self.public_key, self.claim_sha256,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class WaiverTerms:
    """How long a waiver lasts, and how many certificates it covers; `until` is in seconds since 1970."""

    until: int
    uses: int

    def as_json(self) -> dict[str, object]:
        """The object of the signed statement."""
        return {"until": timestamp(self.until), "uses": self.uses}


@dataclass(frozen=True, slots=True)
class GivenApproval:
    """One human's signature over a request. `role_digest` is that of the role that the human saw."""

    by: str
    at: int
    key: str
    software: bool
    user_present: bool
    user_verified: bool
    waiver: WaiverTerms | None
    role_digest: str


@dataclass(frozen=True, slots=True)
class End:
    """How and when a request ended; `why` is the reason of a denial."""

    state: RequestState
    at: int
    by: str
    why: str
    serial: str | None


@dataclass(slots=True, eq=False)
class Request:
    """A request and what the events say of it."""

    frozen: FrozenRequest
    digest: str
    approvals: dict[str, GivenApproval] = field(default_factory=dict)  # by name, without those of the frozen
    end: End | None = None
    seen: set[str] = field(default_factory=set)  # what tells signatures apart that were recorded, see `signature_mark`
    waiver_used: int = 0
    waiver_ended: bool = False

    @property
    def waiver_id(self) -> str:
        """The name of the waiver that its approvals may give."""
        return "w-" + self.frozen.id.removeprefix("r-")


@dataclass(frozen=True, slots=True)
class Requirement:
    """Whose signatures a request needs: of `count` other humans in one of `groups` (None: any with the right), and of
    the asker's own if `presence`, by keys of `key_kinds`. They are good for `valid_for` seconds."""

    count: int
    groups: frozenset[str] | None
    presence: bool
    valid_for: int
    waivers: bool
    key_kinds: frozenset[ApprovalKeyKind] = frozenset(APPROVAL_KEY_KINDS)


@dataclass(frozen=True, slots=True)
class Waiver:
    """A waiver in force, and the request whose approvals gave it."""

    request: Request
    by: tuple[str, ...]
    until: int
    uses: int
    used: int

    @property
    def id(self) -> str:
        """`w-…`, after its request."""
        return self.request.waiver_id


@dataclass(frozen=True, slots=True)
class Status:
    """What a request is worth in a situation. `claim_by` is set if it is approved, `waiver` if one covers it."""

    state: RequestState
    requirement: Requirement
    counting: tuple[GivenApproval, ...]
    has_presence: bool
    claim_by: int | None
    waiver: Waiver | None

    @property
    def approvers(self) -> tuple[str, ...]:
        """The other humans whose signatures count."""
        return tuple(given.by for given in self.counting)


# --- what approves ----------------------------------------------------------------------------------------------------


class Signatures:
    """Signatures as `ssh-keygen -Y sign` makes them, and assertions of passkeys as browsers return them."""

    def key(self, armored: str) -> PublicKey:
        """The key that a signature names; raises `BadSignature`."""
        return sshsig.signature_key(armored)

    def verify(self, armored: str, statement: bytes, key: PublicKey) -> sshsig.SshSignature:
        """Checks a signature over a statement by a key; raises `BadSignature`."""
        return sshsig.verify(armored, statement, APPROVAL_NAMESPACE, key)

    def verify_assertion(self, assertion: Assertion, statement: bytes, passkey: Passkey) -> webauthn.VerifiedAssertion:
        """Checks an assertion for a statement by a passkey; raises `BadSignature`."""
        return webauthn.verify_assertion(assertion, statement, passkey)


SIGNATURES: Final = Signatures()


# --- what a role requires --------------------------------------------------------------------------------------------


def requirement_of(role: Role | None, kind: IdentityKind, *, needs_second_human: bool = False) -> Requirement:
    """Whose signatures an identity of this kind needs; nobody can give those for a role that is gone.

    `needs_second_human` is true for break-glass by somebody whose last incident is still open.
    """
    if role is None:
        return Requirement(1, frozenset(), False, VALID_FOR, False)
    approval = role.approval
    groups = None if approval is None else frozenset(approval.by)
    valid_for = VALID_FOR if approval is None else min(approval.valid_for, MAX_VALID_FOR)
    if role.break_glass:
        return Requirement(int(needs_second_human), groups, True, valid_for, False, role.key_kinds)
    count = approval.count if approval is not None and kind in approval.kinds else 0
    presence = role.presence and kind == "human"
    waivers = count > 0 and not presence and bool(approval and approval.waivers)
    return Requirement(count, groups, presence, valid_for, waivers, role.key_kinds)


def needs_humans(role: Role, kind: IdentityKind) -> bool:
    """True if no certificate of the role is issued to this kind of identity without a human's signature."""
    if role.approval is None and not role.presence and not role.break_glass:  # asked for every certificate
        return False
    wanted = requirement_of(role, kind)
    return wanted.count > 0 or wanted.presence


def role_digest(role: Role | None) -> str:
    """The SHA-256 of everything that a role says; a waiver ends when it changes."""
    return sha256(json.dumps(None if role is None else _plain(asdict(role)), sort_keys=True).encode()).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(map(str, value))
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def check_approver(
    identity: Identity, request: FrozenRequest, wanted: Requirement, freezes: Mapping[str, ActiveFreeze]
) -> None:
    """Raises `Refused` unless the identity may approve the request now. No policy switches the first two rules off."""
    if identity.kind != "human":
        raise Refused("approver_not_human", f"{identity.name} is not a human and never approves", "ask a human")
    if identity.name == request.identity:
        raise Refused("own_request", "nobody approves their own request", "ask another approver")
    if "approve" not in identity.may or (wanted.groups is not None and not wanted.groups & identity.groups):
        raise Refused(
            "not_an_approver",
            f"{identity.name} may not approve requests for role {request.role}",
            f"see `may_approve` of the request, or roles.{request.role}.approval in policy.toml",
        )
    check_not_frozen(identity.name, freezes)


def check_not_frozen(name: str, freezes: Mapping[str, ActiveFreeze]) -> None:
    """Raises `Refused` if the identity is frozen by name."""
    if (found := freezes.get(f"identity:{name}")) is not None:
        raise Refused("frozen", f"identity:{name} is frozen: {found.reason}", "ask the operator who froze it")


def _is_hardware(key: PublicKey) -> bool:
    return key.kind.startswith("sk-")


def check_flags(line: ApprovalKey, *, present: bool, verified: bool) -> None:
    """Raises `Refused` unless a signature with these flags by the key of a line of policy.toml counts."""
    if isinstance(line, Passkey):
        _check_passkey_flags(present=present, verified=verified)
        return
    if not _is_hardware(line.key):
        if not line.software:
            raise Refused(
                "software_key_not_allowed",
                f"the key {line.key.fingerprint} is not a FIDO key, so a program can sign with it unseen",
                "use an sk- key, or set software = true in its line of approval_keys",
            )
        if line.verify:
            raise Refused(
                "signature_without_verification",
                f"the key {line.key.fingerprint} cannot verify its user, which its line requires",
                "use an sk- key made with `-O verify-required`",
            )
        return
    if not present:
        raise Refused(
            "signature_without_presence",
            "the signature was made without a touch of the key",
            "sign again and touch the key; do not use a key made with `-O no-touch-required`",
        )
    if line.verify and not verified:
        raise Refused(
            "signature_without_verification",
            "the signature was made without the PIN or fingerprint that the key's line requires",
            "sign again with a key made with `-O verify-required`",
        )


def _check_passkey_flags(*, present: bool, verified: bool) -> None:
    if not present:
        raise Refused(
            "signature_without_presence", "the assertion was made without a human's touch", "approve again and touch"
        )
    if not verified:
        raise Refused(
            "signature_without_verification",
            "the assertion was made without PIN, fingerprint or face",
            "approve again; the page must ask for userVerification required",
        )


def check_key_kind(line: ApprovalKey, wanted: Requirement, role: str) -> None:
    """Raises `Refused` for a key of a kind that the role does not take."""
    if line.kind not in wanted.key_kinds:
        raise Refused(
            "approval_key_kind_refused",
            f"role {role} takes no approval by a key of kind {line.kind}",
            f"sign with a key of kind {' or '.join(sorted(wanted.key_kinds))}: `signer requests approve`",
        )


# --- the state machine -----------------------------------------------------------------------------------------------


class Approvals:
    """All requests that are open or ended lately, and the incidents; changed by events only."""

    def __init__(self) -> None:
        self.incidents = Incidents()
        self.changed: set[str] = set()  # ids of requests that changed since the keeper looked
        self.open: dict[str, Request] = {}  # by id; those that have not ended
        self._requests: dict[str, Request] = {}  # oldest first
        self._of_ask: dict[tuple[object, ...], Request] = {}  # the newest one of each ask
        self._pending_of: Counter[str] = Counter()  # open requests by identity
        self._counters: dict[str, int] = {}  # the highest of each passkey, by fingerprint
        self._keyholders: tuple[Policy | None, list[Identity]] = None, []  # who has approval_keys in a policy

    @classmethod
    def from_entries(cls, entries: Iterable[Entry]) -> Approvals:
        """The state that recorded events say, oldest first."""
        found = cls()
        for entry in entries:
            found.apply(Event(entry.kind, entry.actor, json.loads(entry.body)), entry.time_ms // 1000)
        found.changed.clear()
        return found

    def apply(self, event: Event, at: int) -> None:
        """Takes one event that was, or is about to be, recorded at `at` (seconds)."""
        body: dict[str, Any] = event.body
        match event.kind:
            case "approval.requested":
                self._add(Request(FrozenRequest.from_json(body["frozen"]), str(body["digest"])))
            case "approval.given":
                self._give(body, at)
            case "waiver.used" | "waiver.ended":
                self._count_waiver(event.kind, str(body["waiver"]))
            case "freeze.set":
                self._freeze(str(body["scope"]))
            case "incident.opened" | "incident.closed":
                self.incidents.apply(event, at)
            case kind if kind in ENDS and (request := self.open.get(str(body["request"]))) is not None:
                serial = None if body.get("serial") is None else str(body["serial"])
                self._end(request, End(ENDS[kind], at, event.actor, str(body.get("reason", "")), serial))

    def _add(self, request: Request) -> None:
        frozen = request.frozen
        self._requests[frozen.id] = self.open[frozen.id] = self._of_ask[frozen.ask()] = request
        self._pending_of[frozen.identity] += 1
        self.changed.add(frozen.id)

    def _give(self, body: Mapping[str, Any], at: int) -> None:
        if "assertion" in body:
            key, counter = str(body["key"]), int(body["counter"])
            self._counters[key] = max(counter, self._counters.get(key, 0))
        if (request := self.open.get(str(body["request"]))) is None:
            return
        if (mark := signature_mark(body)) is not None:
            request.seen.add(mark)
        waiver = body["waiver"]
        request.approvals[str(body["approver"])] = GivenApproval(
            by=str(body["approver"]),
            at=at,
            key=str(body["key"]),
            software=bool(body["software"]),
            user_present=bool(body["user_present"]),
            user_verified=bool(body["user_verified"]),
            waiver=None if waiver is None else WaiverTerms(parse_timestamp(waiver["until"]), int(waiver["uses"])),
            role_digest=str(body["role_digest"]),
        )
        self.changed.add(request.frozen.id)
        if waiver is not None:  # it may cover other requests of the same identity
            self.changed |= {
                other.frozen.id for other in self.open.values() if other.frozen.identity == request.frozen.identity
            }

    def _end(self, request: Request, end: End) -> None:
        request.end = end
        del self.open[request.frozen.id]
        self._pending_of[request.frozen.identity] -= 1
        self.changed.add(request.frozen.id)

    def _count_waiver(self, kind: str, waiver: str) -> None:
        request = self._requests.get(request_of_waiver(waiver))
        if request is not None and kind == "waiver.used":
            request.waiver_used += 1
        elif request is not None:
            request.waiver_ended = True

    def _freeze(self, scope: str) -> None:
        """A freeze voids the approvals of an identity, and ends the waivers of everybody concerned, for good."""
        kind, _, name = scope.partition(":")
        for request in self._requests.values():
            concerned = {"identity": {request.frozen.identity, *request.approvals}, "role": {request.frozen.role}}
            if kind == "all" or name in concerned.get(kind, ()):
                request.waiver_ended = True
            if kind == "identity":
                request.approvals.pop(name, None)

    # --- looking --------------------------------------------------------------------------------------------------

    def get(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    def newest(self) -> Iterator[Request]:
        """All requests, newest first."""
        return reversed(self._requests.values())

    def asked_since(self, since: int) -> Counter[str]:
        """How many requests each identity has made since then."""
        return Counter(request.frozen.identity for request in self._requests.values() if request.frozen.asked > since)

    def status(self, request: Request, situation: Situation) -> Status:
        """What a request is worth now."""
        frozen, now = request.frozen, situation.now
        wanted = self.requirement(frozen, situation)
        counting = self._counting(request, wanted, situation)
        has_presence = self._has_presence(request, wanted, situation)
        state: RequestState
        claim_by: int | None = None
        waiver: Waiver | None = None
        if request.end is not None:
            state = request.end.state
        elif len(counting) >= wanted.count and (has_presence or not wanted.presence):
            own = [request.approvals[frozen.identity].at] if wanted.presence else []
            times = [given.at for given in counting] + own if wanted.count else own
            claim_by = max(times) + wanted.valid_for if times else frozen.expires
            state = "approved" if now < claim_by else "lapsed"
        elif now >= frozen.expires:
            state = "expired"
        elif (waiver := self.covering(frozen, situation)) is not None:
            state, claim_by = "approved", min(frozen.expires, waiver.until)
        else:
            state = "pending"
        return Status(state, wanted, counting, has_presence, claim_by if state == "approved" else None, waiver)

    def requirement(self, frozen: FrozenRequest, situation: Situation) -> Requirement:
        """Whose signatures a request needs now."""
        role = situation.policy.roles.get(frozen.role)
        second = self.incidents.is_overdue(frozen.identity, situation.now)
        return requirement_of(role, frozen.kind, needs_second_human=second)

    @staticmethod
    def _counting(request: Request, wanted: Requirement, situation: Situation) -> tuple[GivenApproval, ...]:
        """The approvals of other humans that count now."""
        found = []
        for given in request.approvals.values():
            identity = situation.policy.identities.get(given.by)
            if identity is not None and _holds_key(identity, given, wanted):
                with suppress(Refused):
                    check_approver(identity, request.frozen, wanted, situation.freezes)
                    found.append(given)
        return tuple(found)

    @staticmethod
    def _has_presence(request: Request, wanted: Requirement, situation: Situation) -> bool:
        """Whether the asker has signed, too, with a key that counts now."""
        given = request.approvals.get(request.frozen.identity)
        identity = situation.policy.identities.get(request.frozen.identity)
        if given is None or identity is None or identity.kind != "human":
            return False
        return _holds_key(identity, given, wanted)

    def may_approve(self, request: Request, status: Status, situation: Situation) -> list[str]:
        """The names of those who may still approve a request, the asker excepted."""
        names = self._approvers(request.frozen, status.requirement, situation)
        return [name for name in names if name not in status.approvers]

    def approvers(self, request: Request, situation: Situation) -> list[str]:
        """The names of everybody who may approve a request now, also of those who have; the asker excepted."""
        return self._approvers(request.frozen, self.requirement(request.frozen, situation), situation)

    def _approvers(self, frozen: FrozenRequest, wanted: Requirement, situation: Situation) -> list[str]:
        """The names of everybody who may approve a request now and has a key for it."""
        policy = situation.policy
        if self._keyholders[0] is not policy:
            self._keyholders = policy, [found for found in policy.identities.values() if found.approval_keys]
        found = []
        for identity in self._keyholders[1]:
            if not identity.holds_key_of(wanted.key_kinds):
                continue
            with suppress(Refused):
                check_approver(identity, frozen, wanted, situation.freezes)
                found.append(identity.name)
        return found

    # --- waivers --------------------------------------------------------------------------------------------------

    def waiver_of(self, request: Request, situation: Situation) -> Waiver | None:
        """The waiver that the approvals of a request give, if it is in force now."""
        role = situation.policy.roles.get(request.frozen.role)
        is_refused = request.end is not None and request.end.state in ("denied", "withdrawn")
        if request.waiver_ended or role is None or is_refused:
            return None
        wanted = self.requirement(request.frozen, situation)
        if not wanted.waivers or not any(given.waiver for given in request.approvals.values()):
            return None
        digest = role_digest(role)
        good = [given for given in self._counting(request, wanted, situation) if given.role_digest == digest]
        terms = [given.waiver for given in good if given.waiver is not None]
        names = [given.by for given in good if given.waiver is not None]
        if len(terms) < wanted.count:
            return None
        until, uses = min(term.until for term in terms), min(term.uses for term in terms)
        used = request.waiver_used + sum(consent.waiver == request.waiver_id for consent in situation.in_flight)
        if situation.now >= until or used >= uses:
            return None
        return Waiver(request, tuple(sorted(names)), until, uses, used)

    def waivers(self, situation: Situation) -> list[Waiver]:
        """All waivers in force, oldest first."""
        found = (self.waiver_of(request, situation) for request in self._requests.values() if request.approvals)
        return [waiver for waiver in found if waiver is not None]

    def covering(self, ask: Terms, situation: Situation) -> Waiver | None:
        """A waiver that covers what is asked: the same certificate or a narrower one, from the same address."""
        for request in self._requests.values():
            if request.approvals and _is_within(ask, request.frozen):
                waiver = self.waiver_of(request, situation)
                if waiver is not None:
                    return waiver
        return None

    def lost_waivers(self, situation: Situation) -> list[Event]:
        """The events of waivers that the policy has ended: an approver lost right or key, or the role changed."""
        events = []
        for request in self._requests.values():
            given = [one for one in request.approvals.values() if one.waiver is not None]
            if not given or request.waiver_ended or all(_has_ended(one.waiver, situation.now) for one in given):
                continue
            wanted = self.requirement(request.frozen, situation)
            digest = role_digest(situation.policy.roles.get(request.frozen.role))
            counting = self._counting(request, wanted, situation)
            if not wanted.waivers or any(one not in counting or one.role_digest != digest for one in given):
                body: dict[str, object] = {"waiver": request.waiver_id, "reason": "the policy changed"}
                events.append(Event("waiver.ended", "keeper", body))
        return events

    # --- decisions: each returns the event to record -----------------------------------------------------------------

    def freeze(
        self,
        terms: Terms,
        key: PublicKey | None,
        claim_sha256: str | None,
        situation: Situation,
        random: Callable[[int], bytes],
    ) -> FrozenRequest:
        """What humans would approve, bound to the digest of a claim secret, else to `key`."""
        asked = {item.name: getattr(terms, item.name) for item in fields(terms)}
        asked["reason"] = None if terms.reason is None else hide_tokens(terms.reason)  # as the ledger will have it
        return FrozenRequest(
            **asked,
            id=self._new_id(random),
            nonce=random(NONCE_BYTES).hex(),
            asked=situation.now,
            expires=situation.now + PENDING_FOR,
            policy=situation.policy.digest,
            public_key=None if claim_sha256 is not None or key is None else render_public_key(key.kind, key.blob),
            claim_sha256=claim_sha256,
        )

    def known(self, frozen: FrozenRequest, situation: Situation) -> Request | None:
        """The open request for the same ask, or the one that was denied lately."""
        known = self._of_ask.get(frozen.ask())
        if known is None:
            return None
        state = self.status(known, situation).state
        is_denied = state == "denied" and situation.now < known.frozen.expires
        return known if is_denied or state in ("pending", "approved") else None

    def ask(self, frozen: FrozenRequest, situation: Situation) -> Event:
        """The event of a new request; raises `Refused`."""
        self._check_room(frozen.identity)
        self._check_askable(frozen, situation)
        shown = frozen.as_json()
        body: dict[str, object] = {"request": frozen.id, "digest": request_digest(shown), "frozen": shown}
        return Event("approval.requested", frozen.identity, body)

    def _new_id(self, random: Callable[[int], bytes]) -> str:
        while True:
            number = int.from_bytes(random(8), "big")
            name = "r-" + "".join(_ALPHABET[number >> 5 * place & 31] for place in range(_ID_LETTERS))
            if name not in self._requests:
                return name

    def _check_room(self, identity: str) -> None:
        own = self._pending_of[identity]
        if own >= MAX_PENDING_OF_IDENTITY:
            raise Refused(
                "too_many_pending",
                f"{own} requests of {identity} are open; at most {MAX_PENDING_OF_IDENTITY} may be",
                "claim or withdraw one, or wait until one expires",
            )
        if len(self.open) >= MAX_PENDING:
            raise Refused(
                "too_many_pending",
                f"{len(self.open)} requests are open; at most {MAX_PENDING} may be",
                "wait until some are decided, or have the operator freeze the identity that floods the list",
            )

    def _check_askable(self, frozen: FrozenRequest, situation: Situation) -> None:
        """Raises `Refused` for a request that nobody could read, or nobody could approve."""
        size = len(json.dumps(frozen.as_json()))
        if size > MAX_FROZEN:
            raise Refused(
                "request_too_long",
                f"the request has {size} bytes for a human to read; at most {MAX_FROZEN} are allowed",
                "ask for fewer principals, or a shorter command",
            )
        wanted = self.requirement(frozen, situation)
        asker = situation.policy.identities.get(frozen.identity)
        if wanted.presence and (asker is None or not asker.holds_key_of(wanted.key_kinds)):
            raise Refused(
                "approval_key_missing",
                f"role {frozen.role} requires {frozen.identity}'s own signature, and the policy has no key of theirs",
                f"add identities.{frozen.identity}.approval_keys to policy.toml",
            )
        if len(self._approvers(frozen, wanted, situation)) < wanted.count:
            raise Refused(
                "no_approver",
                f"role {frozen.role} requires {wanted.count} to approve, and fewer can now",
                "ask the operator: approvers need the right approve, a group of the role and approval_keys",
            )

    def approve(
        self,
        request: Request,
        approver: Identity,
        signature: str | Assertion,
        waiver: WaiverTerms | None,
        situation: Situation,
        signatures: Signatures,
    ) -> Event:
        """Records a human's signature over a request.

        1   the approver: a human, with the right, not the asker (whose own signature a role may require in addition)
        2   the request waits for it
        3   the waiver is one that the role allows
        4   the statement is made here, from what is recorded; the signature over it is by a key of the approver's, and
            of a kind that the role takes
        5   the key's kind and the signature's flags are those that its line in policy.toml requires
        6   the signature was not seen before, as far as counters and the request's past show

        Raises `Refused`, `BadRequest` or `BadSignature`.
        """
        frozen, status = request.frozen, self.status(request, situation)
        # 1
        is_own = approver.name == frozen.identity and status.requirement.presence and approver.kind == "human"
        if is_own:
            check_not_frozen(approver.name, situation.freezes)
        else:
            check_approver(approver, frozen, status.requirement, situation.freezes)
        # 2
        self._check_waits_for(approver.name, request, status, is_own=is_own)
        # 3
        if waiver is not None:
            _check_waiver(waiver, status.requirement, frozen, situation.now, is_own=is_own)
        # 4
        terms = None if waiver is None else waiver.as_json()
        statement = approval_statement(frozen.id, request.digest, approver.name, terms)
        line = _line_of(approver, signature, signatures)
        check_key_kind(line, status.requirement, frozen.role)
        flags, evidence = _verify(line, signature, statement, signatures)
        # 5
        check_flags(line, present=flags.user_present, verified=flags.user_verified)
        body: dict[str, object] = {
            "request": frozen.id,
            "digest": request.digest,
            "approver": approver.name,
            "waiver": terms,
            **evidence,
            "key": line.fingerprint,
            "software": isinstance(line, SshApprovalKey) and not _is_hardware(line.key),
            "user_present": flags.user_present,
            "user_verified": flags.user_verified,
            "role_digest": role_digest(situation.policy.roles.get(frozen.role)),
        }
        # 6
        self._check_fresh(body, request)
        return Event("approval.given", approver.name, body)

    def _check_fresh(self, body: Mapping[str, Any], request: Request) -> None:
        """Raises `BadSignature` for a signature that was recorded before, or an assertion older than a recorded one.

        Who has an approver's token and an old signature of theirs could otherwise renew what a freeze has ended. The
        counter is step 24 of WebAuthn Level 3 section 7.2; a passkey that counts nothing always says 0.
        """
        if signature_mark(body) in request.seen:
            raise BadSignature(
                "signature_replayed",
                "this signature was recorded before, and a freeze has ended what it approved",
                "sign again with the key; if that gives the same signature, have the request asked again",
            )
        if "assertion" not in body:
            return
        known, counter = self._counters.get(str(body["key"]), 0), body["counter"]
        if (known or counter) and counter <= known:
            raise BadSignature(
                "assertion_counter_behind",
                f"the passkey's counter is {counter}, and was {known} before: it may have been copied",
                "approve again; if that fails, remove the passkey from policy.toml and enrol another",
            )

    def _check_waits_for(self, name: str, request: Request, status: Status, *, is_own: bool) -> None:
        """Raises the error for a signature that a request does not wait for."""
        is_open = status.state in ("pending", "approved")
        if is_open and (name in status.approvers or (is_own and status.has_presence)):
            text = f"{name} has already approved {request.frozen.id}"
            raise Refused("already_approved", text, "wait for the others, if it needs more")
        if status.state != "pending":
            raise self.why_not(request, status)
        if not is_own and len(status.counting) >= status.requirement.count:
            text = f"{request.frozen.id} waits for {request.frozen.identity}'s own signature only"
            raise Refused("request_approved", text, "to stop it, deny it")

    def deny(self, request: Request, approver: Identity, reason: str, situation: Situation) -> Event:
        """Denies a request; needs the right to approve it, and no signature. Raises `Refused`."""
        status = self.status(request, situation)
        check_approver(approver, request.frozen, status.requirement, situation.freezes)
        if status.state != "pending":
            raise self.why_not(request, status)
        return Event("approval.denied", approver.name, {"request": request.frozen.id, "reason": hide_tokens(reason)})

    def withdraw(self, request: Request, identity: Identity, situation: Situation) -> Event:
        """Withdraws the identity's own request, also an approved one; raises `Refused`."""
        status = self.status(request, situation)
        if status.state not in ("pending", "approved"):
            raise self.why_not(request, status)
        return Event("approval.withdrawn", identity.name, {"request": request.frozen.id})

    def end_waiver(self, waiver: Waiver, identity: Identity, reason: str, situation: Situation) -> Event:
        """Ends a waiver at once; whoever may approve its request may, the asker, and the right `freeze`."""
        frozen = waiver.request.frozen
        if identity.name != frozen.identity and "freeze" not in identity.may:
            check_approver(identity, frozen, self.requirement(frozen, situation), situation.freezes)
        return Event("waiver.ended", identity.name, {"waiver": waiver.id, "reason": hide_tokens(reason)})

    @staticmethod
    def check_claim(request: Request, key: PublicKey, secret: str | None) -> None:
        """Raises `Refused` unless the claim has what the request is bound to."""
        frozen = request.frozen
        if frozen.claim_sha256 is None:
            if render_public_key(key.kind, key.blob) != frozen.public_key:
                raise Refused(
                    "claim_key_differs",
                    f"{frozen.id} is bound to another public key",
                    "claim it with the key that it was asked for",
                )
        elif not _opens(secret, frozen.claim_sha256):
            raise Refused(
                "claim_secret_wrong",
                f"{frozen.id} is claimed with a secret, which is missing or wrong",
                "claim it from the session that asked; or ask again",
            )

    @staticmethod
    def consent(request: Request, status: Status, situation: Situation) -> Consent:
        """Which humans let the certificate of an approved request be issued; raises `Refused` if it is being made."""
        if any(consent.request == request.frozen.id for consent in situation.in_flight):
            text = f"the certificate of {request.frozen.id} is being issued"
            raise Refused("request_issued", text, "ask again if it is lost")
        role = situation.policy.roles[request.frozen.role]
        waiver = status.waiver
        own = (request.frozen.identity,) if status.requirement.presence else ()
        return Consent(
            request=request.frozen.id,
            approvers=(*(status.approvers if waiver is None else waiver.by), *own),
            waiver=None if waiver is None else waiver.id,
            break_glass=role.break_glass,
        )

    def check_consent(self, consent: Consent, situation: Situation) -> None:
        """Raises `Refused` if what a certificate in flight was granted by no longer holds."""
        others = Situation(situation.policy, situation.freezes, situation.now)  # without what is in flight
        if consent.request is not None:
            request = self._requests.get(consent.request)
            if request is None:
                raise unknown_request(consent.request)
            status = self.status(request, others)
            if status.state == "pending":
                raise Refused(
                    "approval_lost", f"the approval of {consent.request} no longer counts", "wait for another"
                )
            if status.state != "approved":
                raise self.why_not(request, status)
        elif consent.waiver is not None:
            request = self._requests.get(request_of_waiver(consent.waiver))
            if request is None or self.waiver_of(request, others) is None:
                raise Refused("waiver_ended", f"the waiver {consent.waiver} has ended", "send the request again")

    def due(self, situation: Situation) -> list[Event]:
        """The events of requests whose time is over."""
        events = []
        for request in self.open.values():
            if request.approvals or situation.now >= request.frozen.expires:
                state = self.status(request, situation).state
                if state in ("expired", "lapsed"):
                    body: dict[str, object] = {"request": request.frozen.id}
                    is_expired = state == "expired"
                    events.append(Event("approval.expired" if is_expired else "approval.lapsed", "keeper", body))
        return events

    def forget(self, now: int) -> None:
        """Drops ended requests that are shown no longer and gave no waiver."""
        excess = len(self._requests) - len(self.open) - MAX_KEPT
        for request in list(self._requests.values()):
            end = request.end
            if end is None or any(
                given.waiver is not None and given.waiver.until > now for given in request.approvals.values()
            ):
                continue
            if end.at > now - KEPT_FOR and excess <= 0:
                continue
            excess -= 1
            del self._requests[request.frozen.id]
            if self._of_ask.get(request.frozen.ask()) is request:
                del self._of_ask[request.frozen.ask()]

    def why_not(self, request: Request, status: Status) -> SignerError:
        """The error for a request that is not pending any more."""
        name, end = request.frozen.id, request.end
        match status.state:
            case "denied" if end is not None:
                facts: dict[str, object] = {"request": name, "by": end.by, "why": end.why}
                why = f": {end.why}" if end.why else ""
                return Refused("request_denied", f"{name} was denied by {end.by}{why}", "do not ask again", facts)
            case "expired":
                return Refused("request_expired", f"{name} expired before it was approved", "ask again")
            case "withdrawn":
                return Refused("request_withdrawn", f"{name} was withdrawn", "ask again")
            case "lapsed":
                return Refused("request_lapsed", f"{name} was approved and not claimed in time", "ask again")
            case "issued":
                return Refused("request_issued", f"the certificate of {name} was already issued", "ask again")
        by = ", ".join(status.approvers) or (status.waiver.id if status.waiver is not None else "the policy")
        return Refused("request_approved", f"{name} is already approved by {by}", "to stop it, freeze its identity")


# --- parts of decisions ----------------------------------------------------------------------------------------------


def may_see(identity: Identity, request: Request, wanted: Requirement) -> bool:
    """The asker, whoever may approve the request (also without a key, or frozen), and the right `ledger.read`."""
    if identity.name == request.frozen.identity or "ledger.read" in identity.may:
        return True
    try:
        check_approver(identity, request.frozen, wanted, {})
    except Refused:
        return False
    return True


def request_of_waiver(waiver: str) -> str:
    """The id of the request whose approvals gave a waiver, see `Request.waiver_id`."""
    return "r-" + waiver.removeprefix("w-")


def unknown_request(name: str) -> NotFound:
    """The error for a request that does not exist, or that the caller may not see."""
    return NotFound("unknown_request", f"there is no request {name[:64]!a} that you may see", "see GET /api/requests")


def _holds_key(identity: Identity, given: GivenApproval, wanted: Requirement) -> bool:
    """Whether a signature's key is still one of the identity's, of a kind that the role takes, with flags that its line
    accepts."""
    for line in identity.approval_keys:
        if line.fingerprint == given.key:
            if line.kind not in wanted.key_kinds:
                return False
            try:
                check_flags(line, present=given.user_present, verified=given.user_verified)
            except Refused:
                return False
            return True
    return False


def _has_ended(terms: WaiverTerms | None, now: int) -> bool:
    return terms is None or now >= terms.until


def _line_of(approver: Identity, signature: str | Assertion, signatures: Signatures) -> ApprovalKey:
    """The line of policy.toml for the key that a signature or an assertion names.

    Raises `Refused` if the approver has none, and `BadSignature`.
    """
    lines: dict[str, ApprovalKey]
    if isinstance(signature, Assertion):
        name, lines = signature.id, {line.id: line for line in approver.approval_keys if isinstance(line, Passkey)}
        by, hint = "the assertion is by a passkey that", "approve with a passkey that policy.toml lists"
    else:
        name = signatures.key(signature).fingerprint
        lines = {line.fingerprint: line for line in approver.approval_keys if isinstance(line, SshApprovalKey)}
        by, hint = f"the signature is by {name}, which", "sign with a key that policy.toml lists"
    if name not in lines:
        raise Refused("approval_key_unknown", f"{by} is not among {approver.name}'s approval_keys", hint)
    return lines[name]


def signature_mark(body: Mapping[str, Any]) -> str | None:
    """What tells a recorded signature from each other one over the same statement; None for a key that counts nothing.

    Not the signature itself: of one by ECDSA everybody can make a second one.
    """
    if "assertion" in body:
        return str(body["content"])
    if "counter" not in body:
        return None
    return f"{body['key']} {body['counter']} {body['user_present']} {body['user_verified']}"


def _verify(
    line: ApprovalKey, signature: str | Assertion, statement: bytes, signatures: Signatures
) -> tuple[SshSignature | VerifiedAssertion, dict[str, object]]:
    """The flags of a signature that verifies, and what an event records of it; raises `BadSignature`.

    From what is recorded it is verified again, by the event alone. The bytes of an assertion are in base64, in which
    nothing has the form of a token, which the ledger would hide.
    """
    if isinstance(signature, str) and isinstance(line, SshApprovalKey):
        flags = signatures.verify(signature, statement, line.key)
        recorded: dict[str, object] = {
            "signature": signature,
            "public_key": render_public_key(line.key.kind, line.key.blob),
        }
        return flags, recorded if flags.counter is None else {**recorded, "counter": flags.counter}
    if not isinstance(signature, Assertion) or not isinstance(line, Passkey):
        raise TypeError("a line of another kind than the signature")
    asserted = signatures.verify_assertion(signature, statement, line)
    return asserted, _assertion_evidence(signature, line, asserted)


def _assertion_evidence(assertion: Assertion, passkey: Passkey, asserted: VerifiedAssertion) -> dict[str, object]:
    return {
        "assertion": {
            "authenticator_data": _in_base64(assertion.authenticator_data),
            "client_data": _in_base64(assertion.client_data),
            "signature": _in_base64(assertion.signature),
        },
        "passkey": {
            "id": _in_base64(passkey.id),
            "public_key": _in_base64(passkey.public_key),
            "rp": passkey.rp,
            "origins": list(passkey.origins),
        },
        "counter": asserted.counter,
        "content": asserted.content,
    }


def _in_base64(text: str) -> str:
    return base64.b64encode(decode_base64url(text, MAX_CLIENT_DATA)).decode()


def _check_waiver(waiver: WaiverTerms, wanted: Requirement, frozen: FrozenRequest, now: int, *, is_own: bool) -> None:
    """Raises `Refused` or `BadRequest` for a waiver that may not be given."""
    if not wanted.waivers or is_own:
        raise Refused(
            "waiver_not_allowed",
            f"role {frozen.role} takes no waivers",
            "approve this request alone: send waiver null",
        )
    if not 0 < waiver.uses <= WAIVER_USES:
        raise BadRequest(
            "waiver_malformed", f"a waiver covers 1 to {WAIVER_USES} certificates, not {waiver.uses}", "correct uses"
        )
    if not 0 < waiver.until - now <= WAIVER_SECONDS:
        raise BadRequest(
            "waiver_malformed",
            f"a waiver ends within {WAIVER_SECONDS // 3600} hours from now, not {waiver.until - now} s from now",
            "correct until",
        )


def _is_within(ask: Terms, approved: FrozenRequest) -> bool:
    """Whether a waiver's request covers another ask: nothing wider, and from the same address."""
    return (
        ask.identity == approved.identity
        and ask.kind == approved.kind
        and ask.role == approved.role
        and ask.key_id == approved.key_id
        and ask.principals == approved.principals
        and ask.critical_options == approved.critical_options
        and set(ask.extensions) <= set(approved.extensions)
        and ask.ttl <= approved.ttl
        and ask.address == approved.address
    )


def _opens(secret: str | None, digest: str) -> bool:
    """Whether a claim secret, in hex, is the one with this digest."""
    try:
        raw = bytes.fromhex(secret or "")
    except ValueError:
        return False
    return len(raw) * 2 == _SECRET_DIGITS and hmac.compare_digest(sha256(raw).hexdigest(), digest)


def asked_again(frozen: FrozenRequest, role: Role) -> SignRequest:
    """The sign request that asks a policy for exactly what was approved, without a key; what a role pins is not asked
    for."""
    return SignRequest(
        role=frozen.role,
        public_key="",
        principals=frozen.principals,
        ttl=frozen.ttl,
        key_id=None if frozen.key_id == f"{frozen.identity}:{frozen.role}" else frozen.key_id,
        critical_options=tuple(
            option for option in frozen.critical_options if option[0] in role.allowed_critical_options
        ),
        extensions=tuple(extension for extension in frozen.extensions if extension[0] != "no-touch-required"),
        reason=frozen.reason,
    )


def check_as_approved(grant: Grant, frozen: FrozenRequest) -> None:
    """Raises `Refused` unless what policy grants at a claim is exactly what humans approved."""
    for what, granted, approved in (
        ("identity", (grant.identity, grant.kind), (frozen.identity, frozen.kind)),
        ("role", grant.role, frozen.role),
        ("key id", grant.key_id, frozen.key_id),
        ("principals", grant.principals, frozen.principals),
        ("critical options", grant.critical_options, frozen.critical_options),
        ("extensions", grant.extension_fields, frozen.extensions),
        ("ttl", grant.ttl, frozen.ttl),
    ):
        if granted != approved:
            raise Refused(
                "approved_request_differs",
                f"{frozen.id} was approved with other {what} than would be issued now",
                "ask again; the policy has changed since, or the claim comes from another address",
            )


def check_approvers_not_frozen(consent: Consent, freezes: Mapping[str, ActiveFreeze]) -> None:
    """Raises `Refused` if an approver was frozen since the certificate was recorded."""
    for name in consent.approvers:
        if f"identity:{name}" in freezes:
            raise Refused("approval_lost", f"{name}, who approved, was frozen meanwhile", "wait for another approval")


def consent_events(consent: Consent, grant: Grant, serial: str) -> list[Event]:
    """What is recorded in the same transaction as a certificate that humans let be issued."""
    events: list[Event] = []
    if consent.request is not None:
        body: dict[str, object] = {"request": consent.request, "serial": serial, "waiver": consent.waiver}
        events.append(Event("approval.issued", grant.identity, body))
    if consent.waiver is not None:
        events.append(Event("waiver.used", grant.identity, {"waiver": consent.waiver, "serial": serial}))
    if consent.break_glass and consent.request is not None:
        body = {
            "incident": "i-" + consent.request.removeprefix("r-"),
            "request": consent.request,
            "identity": grant.identity,
            "role": grant.role,
            "serial": serial,
            "reason": grant.reason,
        }
        events.append(Event("incident.opened", grant.identity, body))
    return events
