"""The core's state machine: commands and the time in; events, replies and certificates to sign out.

Performs no I/O: clock, randomness, ledger and key are passed in. Read `run` (a batch) and `_sign` (one sign request)
first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Protocol

import msgspec

from signer.authority import console_sessions, freezes, queries, requests
from signer.authority.approvals import (
    REMEMBERED,
    SIGNATURES,
    Approvals,
    Request,
    Signatures,
    Situation,
    Status,
    asked_again,
    check_approvers_not_frozen,
    check_as_approved,
    check_not_frozen,
    consent_events,
    needs_humans,
    unknown_request,
)
from signer.authority.certificates import (
    PendingSignature,
    certificate_line,
    issued_event,
    issued_reply,
    prepare_certificate,
)
from signer.authority.console_sessions import ConsoleSessions
from signer.authority.hosts import HostList
from signer.authority.incidents import OVERDUE_AFTER, check_break_glass
from signer.authority.limits import UNAUTHENTICATED, CertificateUsage, Refusals, RepeatSuppressor, refusal_event
from signer.authority.notices import NOTICED, Noticing, token_notices
from signer.authority.revocation import LIST_EVERY, RevokedLately, RevokedState
from signer.authority.shadow import Shadow
from signer.authority.vault_certificates import PendingCertificate, outside_grant, read_vault_certificate
from signer.errors import (
    BadPublicKey,
    BadRequest,
    BadSignature,
    CertificateMismatch,
    ForeignCertificate,
    LedgerBroken,
    NotAuthenticated,
    Refused,
    SignerError,
    Unavailable,
)
from signer.ledger.lookups import Lookup
from signer.ledger.reader import Recent
from signer.ledger.revoked import Revocations
from signer.ledger.schema import ISSUED
from signer.model import (
    ActiveFreeze,
    Caller,
    Consent,
    Entry,
    Event,
    Grant,
    Head,
    Identity,
    PublicKey,
    Returned,
    Role,
    SignRequest,
    Token,
)
from signer.policy.decide import Policy, decide, explain, preview
from signer.protocol.commands import (
    AboutHosts,
    AboutIdentities,
    AboutRequest,
    AddHostKeys,
    Claim,
    Command,
    Explain,
    Freeze,
    ListFreezes,
    Query,
    RecordOperation,
    RemoveHostKeys,
    Revoke,
    Sign,
    SignIn,
    SignOut,
    Unauthenticated,
    Unfreeze,
)
from signer.protocol.notices import Notice
from signer.protocol.operations import cut_over_at
from signer.protocol.replies import (
    Explanation,
    HostKeys,
    HostKeysPage,
    IncidentRow,
    Incidents,
    Reply,
    RequestDetails,
    RequestPage,
    SignedIn,
    SignedOut,
    Waivers,
)
from signer.ssh.certificate import NONCE_BYTES
from signer.ssh.publickey import parse_public_key, render_public_key
from signer.ssh.signing import CertifyInPool, Obtained, SignAtOnce, SigningKey, SigningOrder
from signer.units import timestamp

INTERNAL_ERROR: Final = "internal_error"
CLOCK_TOLERANCE: Final = 60  # seconds by which the clock may lag behind the ledger's newest event
ALL_REQUESTS: Final = ""  # among the changes: any request may have changed
# Kinds of events that later ones of the same batch may depend on, and replies that may show such an event.
_DEPENDENT: Final = ("freeze.lifted", "approval.", "waiver.", "incident.", "host.")
_SHOWS_EVENTS: Final = (RequestDetails, RequestPage, Waivers, IncidentRow, Incidents, HostKeys, HostKeysPage)
ReplyOrError = Reply | SignerError
Pending = PendingSignature | PendingCertificate
Answer = ReplyOrError | Pending | Lookup  # what is not a reply yet becomes one outside the core


def _internal_error() -> Unavailable:
    return Unavailable(INTERNAL_ERROR, "internal error", "see the service's log")


def _clock_behind(seconds: int, what: str) -> Unavailable:
    return Unavailable(
        "clock_behind",
        f"this host's clock is {seconds} s behind {what}",
        f"correct the clock; nothing is signed while it is more than {CLOCK_TOLERANCE} s behind",
    )


def _new_ca(key: PublicKey) -> dict[str, object]:
    return {"to": key.fingerprint, "public_key": render_public_key(key.kind, key.blob)}


class Ledger(queries.LedgerReader, Protocol):
    """The ledger as the core uses it."""

    def commit(self, events: Sequence[Event], now_ms: int) -> list[Entry]: ...
    def recent(self, since: int) -> list[Recent]: ...
    def last_serial(self) -> int: ...
    def last_ca(self) -> str | None: ...
    def has_vault_serial(self, serial: int) -> bool: ...
    def freezes(self) -> dict[str, ActiveFreeze]: ...
    def asked(self, since: int) -> list[Entry]: ...
    def revocation_events(self) -> list[Entry]: ...
    def host_events(self) -> list[Entry]: ...
    def operation_events(self) -> list[Entry]: ...


class Backend(Protocol):
    """Who signs, as the core uses it (`ca/backends.py`)."""

    @property
    def order(self) -> SigningOrder: ...
    def use_key(self, key: SigningKey) -> None: ...


class Decision(msgspec.Struct, frozen=True):
    """The result of one command: events to commit first, then the reply to send or what the reply waits for.

    `reply` is None if it is made from the committed event (`replies_with_entry`). A pending one is signed by `run` if
    the key signs at once; otherwise the keeper obtains what it waits for and calls `finish`.
    """

    reply: Answer | None
    events: tuple[Event, ...] = ()
    replies_with_entry: bool = False


@dataclass(frozen=True, slots=True)
class StateOverview:
    """What the core has in memory: the newest entry, certificates that are valid now by role, freezes by scope, and how
    many requests and incidents are open, and incidents for too long."""

    head: Head
    live: Mapping[str, int]
    freezes: Mapping[str, ActiveFreeze]
    requests: int = 0
    incidents: int = 0
    overdue: int = 0


@dataclass(slots=True)
class _State:
    """State derived from the ledger; discarded after a failed commit and read again."""

    head: Head
    certificates: CertificateUsage
    freezes: dict[str, ActiveFreeze] = field(default_factory=dict)
    approvals: Approvals = field(default_factory=Approvals)
    revoked: RevokedState = field(default_factory=lambda: RevokedState(Revocations()))
    hosts: HostList = field(default_factory=HostList)
    cut_over: int | None = None  # when the cutover that is in force was recorded, in seconds since 1970


class Core:
    """Decides on commands by one policy, records to one ledger and has one backend sign, in the order that it has."""

    def __init__(
        self,
        *,
        policy: Policy,
        backend: Backend,
        ledger: Ledger,
        clock: Callable[[], float],
        random: Callable[[int], bytes],
        report: Callable[[Exception], None],
        signatures: Signatures = SIGNATURES,
    ) -> None:
        self.policy = policy
        self._backend = backend
        self._ledger = ledger
        self._clock = clock
        self._random = random
        self._report = report  # logs internal errors
        self._signatures = signatures  # of humans who approve
        self.former_ca: str | None = None  # the fingerprint of the key that the ledger had before `begin`
        self._changed: set[str] = set()
        self._noticing: Noticing | None = None
        self._noticed: list[Entry] = []
        self.shadow = Shadow(report)
        self.sessions = ConsoleSessions()
        self._refusals = Refusals()
        self._state: _State | None = None
        self._pending: set[PendingCertificate] = set()  # count towards limits, but are not in the ledger
        self._revoked_lately = RevokedLately()
        self._last_serial = 0
        self._latest = 0  # seconds; of the newest batch

    # --- a batch ------------------------------------------------------------------------------------------------

    def run(self, commands: Sequence[Command]) -> Iterator[tuple[int, Answer]]:
        """Decides all commands, commits their events in one transaction, then signs and yields (index, reply).

        What has to be obtained from a slow signer is yielded instead of a reply, and `finish` makes the reply.

        If the transaction fails, each command with an event gets the failure as its reply. So does each whose reply
        may depend on an event of the same batch: `Unfreeze`, and what shows a request.
        """
        now = self._now()
        signs_at_once = isinstance(self._backend.order, SignAtOnce)
        decisions = [self._decide(command, now) for command in commands]
        recorded = self._commit_all([decision.events for decision in decisions], now)
        failure = next((entries for entries in recorded if isinstance(entries, SignerError)), None)
        for index, (decision, entries) in enumerate(zip(decisions, recorded, strict=True)):
            if isinstance(entries, SignerError):
                yield index, entries
            elif failure is not None and (
                isinstance(commands[index], Unfreeze) or isinstance(decision.reply, _SHOWS_EVENTS)
            ):
                yield index, failure
            elif signs_at_once and isinstance(decision.reply, PendingSignature):
                yield index, self._sign_at_once(decision.reply, now)
            elif decision.replies_with_entry:
                yield index, queries.recorded_reply(entries)
            elif decision.reply is not None:
                yield index, decision.reply

    def _now(self) -> float:
        """The time of a batch, in seconds. If the clock was set back, discards the state: entries may count again."""
        now = self._clock()
        if int(now) < self._latest:
            self._state = None
        self._latest = int(now)
        return now

    def record(self, events: list[Event], now: float | None = None) -> SignerError | None:
        """Commits events; returns the failure, if any, after which the state is read from the ledger again."""
        entries = self._commit(events, now)
        return entries if isinstance(entries, SignerError) else None

    def _commit_all(self, groups: Sequence[Sequence[Event]], now: float) -> list[list[Entry] | SignerError]:
        """Commits the events of all requests in one transaction; returns the entries or the failure of each request.

        If an event cannot be encoded, which is an internal error, each request gets a transaction of its own.
        """
        together = self._commit([event for group in groups for event in group], now)
        if not isinstance(together, SignerError):
            entries = iter(together)
            return [list(islice(entries, len(group))) for group in groups]
        if together.code != INTERNAL_ERROR or sum(map(bool, groups)) == 1:
            return [together if group else [] for group in groups]
        alone: list[list[Entry] | SignerError] = []
        failure: SignerError | None = None
        for group in groups:
            depends = failure is not None and any(event.kind.startswith(_DEPENDENT) for event in group)
            done = failure if failure is not None and depends else self._commit(list(group), now)
            failure = done if isinstance(done, SignerError) else failure
            alone.append(done)
        return alone

    def _commit(self, events: list[Event], now: float | None) -> list[Entry] | SignerError:
        if not events:
            return []
        try:
            entries = self._ledger.commit(events, int((self._clock() if now is None else now) * 1000))
        except (Unavailable, LedgerBroken) as failure:
            self._discard()
            return failure
        except Exception as error:  # noqa: BLE001 - an event that cannot be recorded must not end the keeper
            self._discard()
            asked = [str(event.body["request_id"]) for event in events if "request_id" in event.body]
            error.add_note(f"request {', '.join(asked[:3]) or 'unknown'}")
            self._report(error)
            return _internal_error()
        for repeats in self._suppressors():
            repeats.settle()
        if self._state is not None:
            self._state.head = Head(entries[-1].seq, entries[-1].hash, entries[-1].time_ms)
        if others := [entry for entry in entries if entry.kind != ISSUED]:
            self._note(others)
        return entries

    def _note(self, entries: list[Entry]) -> None:
        """Takes in recorded events; those of certificates, nearly all, change nothing here."""
        if self._noticing is not None:
            self._noticed += [entry for entry in entries if entry.kind in NOTICED]
        if self._state is not None:
            self._state.hosts.note(entries)
            self._state.revoked.note(entries)
            self._state.cut_over = cut_over_at(entries, self._state.cut_over)

    def _discard(self) -> None:
        """After a failed commit: the state is read again, and counts of repeats are as before the transaction."""
        self._state = None
        for repeats in self._suppressors():
            repeats.restore()

    def _suppressors(self) -> list[RepeatSuppressor]:
        return [self._refusals, self.shadow.repeats]

    def finish(self, results: Sequence[tuple[Pending, Obtained | SignerError]]) -> Iterator[tuple[int, ReplyOrError]]:
        """Checks what was obtained, commits its events in one transaction, then yields (index, reply)."""
        now, serials = self._now(), set[int]()
        decisions = [
            self._signed(pending, result, now)
            if isinstance(pending, PendingSignature)
            else self._certified(pending, result, now, serials)
            for pending, result in results
        ]
        recorded = self._commit_all([events for _, events in decisions], now)
        for pending, _ in results:  # only now: a state that is reread before the commit must still count it
            if isinstance(pending, PendingCertificate):
                self._pending.discard(pending)
        for index, ((reply, _), entries) in enumerate(zip(decisions, recorded, strict=True)):
            yield index, entries if isinstance(entries, SignerError) else reply

    def _signed(
        self, pending: PendingSignature, result: Obtained | SignerError, now: float
    ) -> tuple[ReplyOrError, tuple[Event, ...]]:
        """The reply for a recorded certificate; if it is not released, also the event that says so."""
        grant = pending.certificate.grant
        try:
            if not isinstance(result, bytes):
                raise result if isinstance(result, SignerError) else _internal_error()
            # A freeze or another policy may be newer than the record.
            in_force = self._ready(now).freezes
            freezes.refuse_frozen(in_force, grant.identity, grant.role)
            if pending.consent is not None:
                check_approvers_not_frozen(pending.consent, in_force)
            self._check_pinned(pending.key)
            fields = pending.certificate.fields
            self._check_not_revoked(grant, fields.valid_after + grant.backdate, fields.serial, pending.key.fingerprint)
        except SignerError as error:
            return error, (self._withheld(pending, error.code),)
        return self._released(pending, result, now), ()

    def _check_pinned(self, key: SigningKey) -> None:
        if key.fingerprint not in self.policy.ca.may_sign:
            raise Unavailable(
                "ca_key_replaced_meanwhile", "the CA key was replaced before it had signed", "send the request again"
            )

    def _check_not_revoked(self, grant: Grant, asked: int, serial: int | None, ca: str) -> None:
        """Raises `Refused` or `Unavailable` if a certificate was revoked while it was being signed."""
        if self._state is not None:
            self._state.revoked.check_ca(ca)
            self._state.revoked.check_key(grant.public_key.fingerprint)
        self._revoked_lately.check(grant.identity, asked, serial)

    def _certified(
        self, pending: PendingCertificate, result: Obtained | SignerError, now: float, serials: set[int]
    ) -> tuple[ReplyOrError, tuple[Event, ...]]:
        """The reply, and the events to commit before it is sent; `serials` are those of this batch so far."""
        grant = pending.grant
        try:
            if not isinstance(result, Returned):
                raise result if isinstance(result, SignerError) else _internal_error()
            made = read_vault_certificate(result, pending)
            state = self._ready(now)
            freezes.refuse_frozen(state.freezes, grant.identity, grant.role)  # a freeze may be newer than the grant
            self._check_not_revoked(grant, pending.asked_at, None, made.ca_fingerprint)
            if pending.consent is not None:
                state.approvals.check_consent(pending.consent, self._situation(state, now))
            if int(now) < pending.asked_at - CLOCK_TOLERANCE:  # then it would end later than a start looks for
                raise _clock_behind(pending.asked_at - int(now), "the grant")
            if made.fields.serial in serials or self._ledger.has_vault_serial(made.fields.serial):
                raise outside_grant("serial already used")
        except SignerError as error:
            if isinstance(error, ForeignCertificate):
                self._report(error)
            self._pending.remove(pending)
            self._uncount(grant, pending.asked_at, pending.asked_at + grant.ttl)
            compared = self.shadow.refused(pending, error, int(now))
            return error, (*self._refused(pending.command, error, now), *compared)
        serials.add(made.fields.serial)
        consent = pending.consent
        event = issued_event(made, pending.command.caller, pending.policy_digest, "vault", made.ca_fingerprint, consent)
        given = self._use_consent(consent, grant, str(made.fields.serial), state, now)
        expires_in = max(made.fields.valid_before - int(now), 0)
        compared = self.shadow.compare(made, pending, int(now))
        return issued_reply(made, made.line, made.ca_fingerprint, expires_in), (event, *given, *compared)

    def _sign_at_once(self, pending: PendingSignature, now: float) -> ReplyOrError:
        # 9 sign; a failure is recorded, as the serial was never released
        try:
            signature = pending.obtain()
        except Exception as error:  # noqa: BLE001 - after any failure the serial must be recorded as withheld
            self._report(error)
            self.record([self._withheld(pending, type(error).__name__)])
            return Unavailable("signing_failed", "the CA key failed to sign", "see the service's log")
        # 10 reply
        return self._released(pending, signature, now)

    def _released(self, pending: PendingSignature, signature: bytes, now: float) -> Reply:
        certificate = pending.certificate
        expires_in = max(certificate.fields.valid_before - int(now), 0)
        line = certificate_line(certificate, signature)
        return issued_reply(certificate, line, pending.key.fingerprint, expires_in)

    def _withheld(self, pending: PendingSignature, reason: str) -> Event:
        """The event of a recorded certificate that nobody gets; it no longer counts. `reason` is a code or a class."""
        grant, fields = pending.certificate.grant, pending.certificate.fields
        self._uncount(grant, fields.valid_after + grant.backdate, fields.valid_before)
        return Event("certificate.withheld", grant.identity, {"serial": str(fields.serial), "error": reason})

    def _uncount(self, grant: Grant, issued: int, valid_before: int) -> None:
        if self._state is not None:
            self._state.certificates.withhold(grant.identity, grant.role, issued, valid_before)

    def _decide(self, command: Command, now: float) -> Decision:
        """Calls `handle`; turns errors into replies, and refusals also into events (repeats are only counted)."""
        try:
            return self.handle(command, now)
        except (NotAuthenticated, Refused, BadRequest, BadPublicKey, BadSignature) as refusal:
            return Decision(refusal, self._refused(command, refusal, now))
        except CertificateMismatch as fault:
            self._report(fault)
            return Decision(fault)
        except SignerError as error:
            return Decision(error)
        except Exception as error:  # noqa: BLE001 - a failing command must not stop the others of its batch
            self._report(error)
            return Decision(_internal_error())

    def _refused(self, command: Command, refusal: SignerError, now: float) -> tuple[Event, ...]:
        """The events of a refusal; none if it repeats an earlier one."""
        local = command.caller.local_user
        try:
            actor = freezes.local_identity(local).name if local else self.authenticate(command.caller, int(now))[0].name
        except NotAuthenticated:
            actor = UNAUTHENTICATED
        role = command.role if isinstance(command, Sign | Explain | Unauthenticated) else ""
        return tuple(self._refusals.note(refusal_event(refusal, actor, role, command.caller), int(now)))

    # --- one command --------------------------------------------------------------------------------------------

    def authenticate(self, caller: Caller, now: int) -> tuple[Identity, Token]:
        """The identity of a token or a console session, and the token's entry; raises `NotAuthenticated`.

        A command of a session has to pass `console_sessions.check_command`, too.
        """
        if console_sessions.is_session(caller.token):
            return self.sessions.authenticate(caller, self.policy, now)
        return self.policy.authenticate(caller.token, now)

    def handle(self, command: Command, now: float) -> Decision:
        """Decides on `command` at `now` (seconds since 1970); raises `SignerError` if it is refused or fails."""
        if isinstance(command, Unauthenticated):
            raise command.fault
        if console_sessions.is_session(command.caller.token):
            console_sessions.check_command(command)
        if isinstance(command, Sign):
            return self._sign(command, now)
        if command.caller.local_user is not None:
            return self._handle_local(command, command.caller.local_user, now)
        identity, token = self.authenticate(command.caller, int(now))
        if isinstance(command, SignIn | SignOut):
            return self._sign_in_or_out(command, identity, token, now)
        if isinstance(command, Freeze | Unfreeze | Revoke):
            return self._stop(command, identity, now)
        if isinstance(command, RecordOperation):
            return Decision(None, (freezes.record(command, identity),), replies_with_entry=True)
        if isinstance(command, Claim):
            return self._claim(command, identity, now)
        if isinstance(command, AboutRequest | AboutHosts):
            return self._about(command, identity, now)
        return Decision(
            self._explain(command, identity, now)
            if isinstance(command, Explain)
            else self._answer(command, identity, token, now)
        )

    def _sign_in_or_out(self, command: SignIn | SignOut, identity: Identity, token: Token, now: float) -> Decision:
        caller = command.caller
        if isinstance(command, SignOut):
            return Decision(SignedOut(identity=identity.name), (self.sessions.end(caller.token or ""),))
        check_not_frozen(identity.name, self._ready(now).freezes)
        secret = self._random(console_sessions.SECRET_BYTES)
        credential, session, events = self.sessions.begin(secret, identity, token, caller, int(now))
        reply = SignedIn(credential=credential, identity=identity.name, expires=timestamp(session.ends))
        return Decision(reply, tuple(events))

    def _sign(self, command: Sign, now: float) -> Decision:
        """Decides on a sign request.

        1   authenticate the caller
        2   check the role, freezes and the clock
        3   parse the public key
        4   decide by policy
        5   if the role asks humans: a request, unless they have approved it already (`_ask`)
        6   allot the serial; the validity comes from the keeper's clock
        7   encode the certificate, decode it and compare it with the grant
        8   the event, which `run` commits with the rest of the batch
        9   sign   } after the commit: `_sign_at_once`, or the keeper's pool and `finish`
        10  reply  }

        If another CA signs, its certificate and `finish` (check, record, reply) replace steps 6 to 10.
        """
        # 1
        identity, _ = self.policy.authenticate(command.caller.token, int(now))
        # 2
        role, request = self._role(identity, command)
        state = self._ready(now)
        freezes.refuse_frozen(state.freezes, identity.name, role.name)
        # 5
        if needs_humans(role, identity.kind):
            return self._ask(command, identity, role, request, state, now)
        # 3
        key = parse_public_key(request.public_key)
        # 4
        usage = state.certificates.usage(identity.name, role.name, int(now))
        grant = decide(identity, role, request, key, command.caller.address, usage)
        return self._issue(command, grant, None, state, now)

    def _issue(
        self, command: Sign | Claim, grant: Grant, consent: Consent | None, state: _State, now: float
    ) -> Decision:
        """Steps 6 to 8 of `_sign`."""
        order = self._backend.order
        state.revoked.check_key(grant.public_key.fingerprint)
        self._check_ca(state)
        if isinstance(order, CertifyInPool):
            state.certificates.add(grant.identity, grant.role, int(now), int(now) + grant.ttl)
            pending = PendingCertificate(command, grant, int(now), self.policy.digest, order, consent)
            self._pending.add(pending)
            return Decision(pending)
        # 6 and 7
        ca = order.key
        self._last_serial += 1
        certificate = prepare_certificate(grant, self._last_serial, self._random(NONCE_BYTES), int(now), ca.blob)
        # 8
        state.certificates.add(grant.identity, grant.role, int(now), certificate.fields.valid_before)
        event = issued_event(certificate, command.caller, self.policy.digest, "local", ca.fingerprint, consent)
        given = self._use_consent(consent, grant, str(certificate.fields.serial), state, now)
        return Decision(PendingSignature(certificate, ca, consent), (event, *given))

    # --- humans -------------------------------------------------------------------------------------------------

    def _ask(
        self, command: Sign, identity: Identity, role: Role, request: SignRequest, state: _State, now: float
    ) -> Decision:
        """Issues what humans have approved; otherwise asks them, and the reply is the request.

        Only a request that is bound to the caller's own key is claimed here: the secret of another is for `Claim`.
        """
        address = command.caller.address
        is_keyless = not request.public_key and request.claim_sha256 is not None
        key = None if is_keyless else parse_public_key(request.public_key)
        terms = preview(identity, role, request, key, address)
        if role.break_glass:
            check_break_glass(terms)
        approvals, situation = state.approvals, self._situation(state, now)
        if key is not None:
            state.revoked.check_key(key.fingerprint)
        frozen = approvals.freeze(terms, key, request.claim_sha256, situation, self._random)
        asked = approvals.known(frozen, situation)
        status = None if asked is None else approvals.status(asked, situation)
        is_approved = status is not None and status.state == "approved"
        if (
            asked is not None
            and status is not None
            and is_approved
            and key is not None
            and frozen.public_key is not None
        ):
            return self._issue_approved(command, asked, key, status, state, now)
        if key is not None and (waiver := approvals.covering(terms, situation)) is not None:
            usage = state.certificates.usage(identity.name, role.name, int(now))
            grant = decide(identity, role, request, key, address, usage)
            return self._issue(command, grant, Consent(None, waiver.by, waiver.id), state, now)
        if asked is not None and status is not None:
            if status.state == "denied":
                raise approvals.why_not(asked, status)
            return Decision(requests.details(asked, approvals, situation, identity))
        event = approvals.ask(frozen, situation)
        approvals.apply(event, situation.now)
        return Decision(requests.details(approvals.open[frozen.id], approvals, situation, identity), (event,))

    def _claim(self, command: Claim, identity: Identity, now: float) -> Decision:
        """Issues the certificate of an approved request; the reply to a pending one is the request."""
        state = self._ready(now)
        approvals, situation = state.approvals, self._situation(state, now)
        asked = approvals.get(command.request)
        if asked is None or asked.frozen.identity != identity.name:
            raise unknown_request(command.request)
        role = self.policy.role_for(identity, asked.frozen.role)
        if role is None:
            raise Refused("unknown_role", f"there is no role {asked.frozen.role}", "ask for another role")
        freezes.refuse_frozen(state.freezes, identity.name, role.name)
        key = parse_public_key(command.public_key or asked.frozen.public_key or "")
        approvals.check_claim(asked, key, command.secret)
        status = approvals.status(asked, situation)
        if status.state == "pending":
            return Decision(requests.details(asked, approvals, situation, identity))
        if status.state != "approved":
            raise approvals.why_not(asked, status)
        return self._issue_approved(command, asked, key, status, state, now)

    def _issue_approved(
        self,
        command: Sign | Claim,
        asked: Request,
        key: PublicKey,
        status: Status,
        state: _State,
        now: float,
    ) -> Decision:
        """Decides again, by the policy now in force, and issues nothing but what humans approved."""
        frozen, situation = asked.frozen, self._situation(state, now)
        identity, role = self.policy.identities[frozen.identity], self.policy.roles[frozen.role]
        usage = state.certificates.usage(identity.name, role.name, int(now))
        grant = decide(identity, role, asked_again(frozen, role), key, command.caller.address, usage)
        if role.break_glass:
            check_break_glass(frozen)
        check_as_approved(grant, frozen)
        return self._issue(command, grant, state.approvals.consent(asked, status, situation), state, now)

    def _use_consent(
        self, consent: Consent | None, grant: Grant, serial: str, state: _State, now: float
    ) -> tuple[Event, ...]:
        """The events of a consent that a certificate uses up; it is recorded with it."""
        if consent is None:
            return ()
        events = consent_events(consent, grant, serial)
        at = self._situation(state, now).now
        for event in events:
            state.approvals.apply(event, at)
        return tuple(events)

    def _situation(self, state: _State, now: float) -> Situation:
        """By what requests are judged. Their time never goes back: neither a clock that is set back revives one."""
        in_flight = tuple(pending.consent for pending in self._pending if pending.consent is not None)
        return Situation(self.policy, state.freezes, max(int(now), state.head.time_ms // 1000), in_flight)

    def take_changes(self) -> set[str]:
        """The ids of requests that may have changed since the last call; `ALL_REQUESTS` for any."""
        if self._state is not None and self._state.approvals.changed:
            self._changed |= self._state.approvals.changed
            self._state.approvals.changed.clear()
        changed, self._changed = self._changed, set()
        return changed

    # --- notices ------------------------------------------------------------------------------------------------

    def keep_noticed(self) -> None:
        """From now on, recorded events that humans may have to know are kept for `take_noticed`."""
        self._noticing = Noticing()

    def take_noticed(self) -> list[Entry]:
        """The recorded events since the last call that humans may have to know."""
        noticed, self._noticed = self._noticed, []
        return noticed

    def notice_of(self, entry: Entry) -> Notice | None:
        """What humans are told of an event; raises `Unavailable` or `LedgerBroken`."""
        if self._noticing is None:
            return None
        now = self._clock()
        state = self._ready(now)
        return self._noticing.of(entry, state.approvals, self._situation(state, now))

    def token_notices(self) -> list[Notice]:
        """What humans are told of tokens that end soon."""
        return token_notices(self.policy, int(self._clock()))

    # --- for whoever looks --------------------------------------------------------------------------------------

    def hosts_version(self) -> int | None:
        """The version of the list of host keys; None while the ledger could not be read."""
        return None if self._state is None else self._state.hosts.version

    def host_names(self) -> Collection[str]:
        """The names of listed hosts; none while the ledger could not be read."""
        return () if self._state is None else self._state.hosts.hosts.keys()

    def known_hosts(self, as_of: int) -> bytes:
        """The list of host keys, as of a time in seconds since 1970; raises `Unavailable` or `LedgerBroken`."""
        return self._ready(self._clock()).hosts.render(as_of)

    def open_requests(self) -> int:
        """How many requests wait for humans, or to be claimed."""
        return 0 if self._state is None else len(self._state.approvals.open)

    def warnings(self) -> list[str]:
        """What should not stay as it is, for whoever looks whether the service is ready; names nobody."""
        _, overdue = self.incidents()
        if not overdue:
            return []
        hours = OVERDUE_AFTER // 3600
        text = f"{overdue} of the incidents that break-glass opened not closed within {hours} hours"
        return [f"{text}: see `signer incidents list`"]

    def cut_over(self) -> int | None:
        """When the cutover that is in force was recorded, in seconds since 1970; None if there is none, and while the
        ledger could not be read."""
        return None if self._state is None else self._state.cut_over

    def list_version(self) -> int | None:
        """The version of the revocation list that the ledger asks for; None while the ledger could not be read."""
        return None if self._state is None else self._state.revoked.version

    def incidents(self) -> tuple[int, int]:
        """How many incidents are open, and how many of them for too long."""
        if self._state is None:
            return 0, 0
        known = self._state.approvals.incidents
        return len(known.open()), len(known.overdue(int(self._clock())))

    def _role(self, identity: Identity, command: Sign | Explain) -> tuple[Role, SignRequest]:
        """The role and the request. Errors in Vault's order: role not granted, malformed field, unknown role."""
        role = self.policy.role_for(identity, command.role)
        if isinstance(command.request, BadRequest):
            raise command.request
        if role is None:
            raise Refused(
                "unknown_role",
                f"there is no role {command.role[:64]}",
                f"{identity.name} may ask for {', '.join(sorted(identity.roles)) or 'none'}",
                {"role": command.role},
            )
        return role, command.request

    def _ready(self, now: float) -> _State:
        """The current state; raises `Unavailable` while nothing may be signed."""
        if self._state is None:
            self._state = self._read_state(int(now))
        behind = self._state.head.time_ms // 1000 - int(now)
        if behind > CLOCK_TOLERANCE:
            raise _clock_behind(behind, "the ledger's newest event")
        return self._state

    def _read_state(self, now: int) -> _State:
        self._latest = max(self._latest, now)  # what is left out now may count again if the clock is set back
        recent = self._ledger.recent(now - CLOCK_TOLERANCE)
        rows = [(row.identity, row.role, row.issued, row.valid_before) for row in recent]
        rows += [(f.grant.identity, f.grant.role, f.asked_at, f.asked_at + f.grant.ttl) for f in self._pending]
        self._last_serial = max(self._last_serial, self._ledger.last_serial())
        head = self._ledger.head()
        approvals = Approvals.from_entries(self._ledger.asked(max(now, head.time_ms // 1000) - REMEMBERED))
        approvals.forget(now)
        self._changed.add(ALL_REQUESTS)
        hosts = HostList.from_entries(self._ledger.host_events())
        revoked = RevokedState(Revocations.from_entries(self._ledger.revocation_events()))
        cut_over = cut_over_at(self._ledger.operation_events())
        return _State(head, CertificateUsage(rows), self._ledger.freezes(), approvals, revoked, hosts, cut_over)

    # --- everything else ----------------------------------------------------------------------------------------

    def _explain(self, command: Explain, identity: Identity, now: float) -> Explanation:
        role, request = self._role(identity, command)
        state = self._ready(now)
        key, fault = None, "no key was given"
        if request.public_key:
            try:
                key = parse_public_key(request.public_key)
            except BadPublicKey as bad:
                fault = bad.text
        usage = state.certificates.usage(identity.name, role.name, int(now))
        findings = list(explain(identity, role, request, key, command.caller.address, usage, fault))
        frozen = freezes.explain_freezes(state.freezes, identity.name, role.name)
        revoked = [] if key is None else state.revoked.explain(key.fingerprint)
        return queries.explained(identity, role, [frozen, *revoked, *findings])

    def _handle_local(self, command: Command, user: str, now: float) -> Decision:
        """What root or the keeper's user on this host may do without a token: stop access, and see what is stopped."""
        identity = freezes.local_identity(user)
        if isinstance(command, Freeze):
            return self._freeze(command, identity, now)
        if isinstance(command, ListFreezes):
            return Decision(queries.freezes_in_force(identity, self._ledger))
        raise Refused("token_needed", f"{user} needs a token for this", "give --token-file; only a freeze needs none")

    def _freeze(self, command: Freeze | Unfreeze, identity: Identity, now: float) -> Decision:
        state = self._ready(now)
        if isinstance(command, Unfreeze):
            reply, event = freezes.unfreeze(command, identity, state.freezes)
        else:
            reply, event = freezes.freeze(command, identity, self.policy, state.freezes, int(now))
        state.approvals.apply(event, self._situation(state, now).now)
        self._changed.add(ALL_REQUESTS)
        ended = self.sessions.end_frozen(command.scope) if isinstance(command, Freeze) else []
        return Decision(reply, (event, *ended))

    def _about(self, command: AboutRequest | AboutHosts, identity: Identity, now: float) -> Decision:
        state = self._ready(now)
        if not isinstance(command, AboutHosts):
            situation = self._situation(state, now)
            return Decision(*requests.handle(command, identity, state.approvals, situation, self._signatures))
        if isinstance(command, AddHostKeys):
            return Decision(*state.hosts.add(command, identity, state.freezes, int(now)))
        if isinstance(command, RemoveHostKeys):
            removed, event = state.hosts.remove(command, identity, state.freezes)
            return Decision(removed, (event,))
        return Decision(state.hosts.page(command, identity))

    def _stop(self, command: Freeze | Unfreeze | Revoke, identity: Identity, now: float) -> Decision:
        return (
            self._revoke(command, identity, now)
            if isinstance(command, Revoke)
            else self._freeze(command, identity, now)
        )

    def _revoke(self, command: Revoke, identity: Identity, now: float) -> Decision:
        state, revocation = self._ready(now), command.revocation
        is_known = revocation.by == "identity" and state.certificates.holds_any(revocation.name, int(now))
        events = state.revoked.revoke(command, identity, self.policy, state.freezes, int(now), is_known=is_known)
        self._revoked_lately.add(revocation, int(now), self._last_serial)
        for event in events[1:]:  # the freeze
            state.approvals.apply(event, self._situation(state, now).now)
        ended = [item for event in events[1:] for item in self.sessions.end_frozen(str(event.body["scope"]))]
        self._changed.add(ALL_REQUESTS)
        return Decision(None, (*events, *ended), replies_with_entry=True)

    def _check_ca(self, state: _State) -> None:
        """Raises `Unavailable` if the key that would sign now is revoked; Vault's keys are those that policy pins."""
        order = self._backend.order
        if not isinstance(order, CertifyInPool):
            state.revoked.check_ca(order.key.fingerprint)
        elif all(fingerprint in state.revoked.cas for fingerprint in self.policy.ca.may_sign):
            state.revoked.check_ca(self.policy.ca.fingerprint)

    def _answer(self, query: Query, identity: Identity, token: Token, now: float) -> Reply | Lookup:
        if isinstance(query, AboutIdentities):
            state = self._ready(now)
            return queries.answer_about_identities(
                query, identity, self.policy, state.certificates, state.freezes, int(now)
            )
        return queries.answer(query, identity, token, self.policy, self._ledger, int(now))

    # --- calls of the keeper between batches -------------------------------------------------------------------

    def begin(self, facts: dict[str, object]) -> SignerError | None:
        """Reads the state and records the start, and before it a CA key that is not the ledger's last one."""
        own = self._backend.order.local_key
        try:
            self.former_ca = None if own is None else self._ledger.last_ca()
            self._state = self._read_state(int(self._clock()))
        except (Unavailable, LedgerBroken) as failure:
            return failure
        rotated = []
        if own is not None and self.former_ca not in (None, own.fingerprint):
            rotated = [Event("ca.rotated", "keeper", {"from": self.former_ca, **_new_ca(own)})]
        public = {} if own is None else {"public_key": render_public_key(own.kind, own.blob)}
        started = Event("keeper.started", "keeper", {**facts, **public, "policy": self.policy.digest})
        return self.record([*rotated, started, *self._lost_waivers()])

    def _lost_waivers(self) -> list[Event]:
        """The events of waivers that the policy in force has ended."""
        if self._state is None:
            return []
        situation = self._situation(self._state, self._clock())
        events = self._state.approvals.lost_waivers(situation)
        for event in events:
            self._state.approvals.apply(event, situation.now)
        return events

    def use_policy(self, policy: Policy) -> SignerError | None:
        """Uses a new policy from the next command on; raises `BadFile` if it does not pin the key in use."""
        if (own := self._backend.order.local_key) is not None:
            policy.check_key(own.fingerprint)
        changed = policy.digest != self.policy.digest
        events = [Event("policy.loaded", "keeper", {"policy": policy.digest, "changed": changed})]
        self.policy = policy
        events += self._lost_waivers()
        events += self.sessions.end_over(policy, int(self._clock()))
        self._changed.add(ALL_REQUESTS)
        return self.record(events)

    def use_key(self, key: SigningKey) -> SignerError | None:
        """Records the new key, then signs or compares with it from the next command on.

        The caller has checked that the policy pins the key.
        """
        own = self._backend.order.local_key
        body: dict[str, object] = {"from": own.fingerprint if own else "", **_new_ca(key.public)}
        failure = self.record([Event("ca.rotated", "keeper", body)])
        if failure is None:
            self._backend.use_key(key)
        return failure

    def check_ready(self) -> None:
        """Raises `Unavailable` or `LedgerBroken` if nothing can be signed now."""
        self._check_ca(self._ready(self._clock()))

    def overview(self) -> StateOverview | None:
        """What is in memory; None while the ledger could not be read. Reads nothing, and counts what is valid now."""
        if (state := self._state) is None:
            return None
        live = state.certificates.live_by_role(int(self._clock()))
        return StateOverview(state.head, live, dict(state.freezes), self.open_requests(), *self.incidents())

    def tick(self, built: tuple[int, int | None] = (0, None)) -> None:
        """Records ends of freezes, counts of repeats and a new list that are due; the keeper calls it about once a
        second.

        `built` is the version of the list that was built last, and when the first certificate on it expires (seconds
        since 1970; None: never).
        """
        now = int(self._clock())
        ended = [] if self._state is None else freezes.ended(self._state.freezes, now)
        due = [event for repeats in self._suppressors() for event in repeats.due(now)]
        due += [*self._over(now), *self._shorter_list(*built, now)]
        failure = self.record([*ended, *due, *self.sessions.end_over(self.policy, now)])
        if failure is None and self._state is not None:
            for event in ended:
                self._state.freezes.pop(str(event.body["scope"]))
                self._changed.add(ALL_REQUESTS)

    def _shorter_list(self, version: int, changes_at: int | None, now: int) -> list[Event]:
        """The event of a list that lacks certificates which have expired, at most hourly."""
        if self._state is None or changes_at is None or version != self._state.revoked.version:
            return []
        if now < max(changes_at, self._state.revoked.version_at + LIST_EVERY):
            return []
        return [Event("list.published", "keeper", {"reason": "expired"})]

    def _over(self, now: int) -> list[Event]:
        """The events of requests whose time is over."""
        state = self._state
        if state is None:
            return []
        situation = self._situation(state, now)
        events = state.approvals.due(situation)
        for event in events:
            state.approvals.apply(event, situation.now)
        state.approvals.forget(situation.now)
        return events

    def end(self) -> None:
        """Records all counts of repeats and the end."""
        counts = [event for repeats in self._suppressors() for event in repeats.flush()]
        self.record([*counts, Event("keeper.stopped", "keeper", {})])
