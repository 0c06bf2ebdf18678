"""The state machine: a command and the time in; events, a reply and perhaps a draft to sign out.

No I/O of its own: clock, randomness, ledger and signing are passed in, so a test can drive it through a million steps.
`run` is the whole life of a batch, `_sign` the one function that matters; read those two first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from signer.authority import freezes as orders
from signer.authority import queries
from signer.authority.certificates import (
    Signing,
    UnsignedCertificate,
    certificate_line,
    issued_event,
    issued_reply,
    prepare_certificate,
)
from signer.authority.limits import CertificateUsage, Refusals, refusal_event
from signer.authority.shadow import Shadow
from signer.authority.vault_certificates import PendingSignature, outside_grant, read_foreign
from signer.errors import (
    BadPublicKey,
    BadRequest,
    CertificateMismatch,
    LedgerBroken,
    NotAuthenticated,
    Refused,
    SignerError,
    Unavailable,
)
from signer.ledger.reader import Recent
from signer.model import Entry, Event, Grant, Head, Identity, PublicKey, Returned, Role, SignRequest, Token
from signer.policy.decide import Policy, decide, explain
from signer.protocol.commands import Command, Explain, Freeze, Query, Record, Sign, Unauthenticated, Unfreeze
from signer.protocol.replies import Explanation, Reply
from signer.ssh.certificate import NONCE_BYTES
from signer.ssh.publickey import parse_public_key

CLOCK_TOLERANCE: Final = 60  # seconds that the wall clock may be behind the ledger's newest event
Answer = Reply | SignerError


def _internal_error() -> Unavailable:
    return Unavailable("internal_error", "something went wrong here", "look at the service's log")


class Ledger(queries.LedgerReader, Protocol):
    """What the core needs of a ledger."""

    def commit(self, events: Sequence[Event], now_ms: int) -> list[Entry]: ...
    def recent(self, since: int) -> list[Recent]: ...
    def last_serial(self) -> int: ...
    def freezes(self) -> dict[str, str]: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What handling one command comes to: events to record first, then the draft to sign or the reply as it is.

    `reply` is None where the draft, or the one event as the ledger holds it (`tells_entry`), makes the reply.
    Where Vault signs, the reply to a grant is a `PendingSignature`: the keeper sends it out and comes back to `finish`.
    """

    reply: Answer | PendingSignature | None
    events: tuple[Event, ...] = ()
    draft: UnsignedCertificate | None = None
    tells_entry: bool = False


@dataclass(slots=True)
class _State:
    """What is true according to the ledger; thrown away after any failed commit and read again."""

    head: Head
    certificates: CertificateUsage
    freezes: dict[str, str] = field(default_factory=dict)


class Core:
    """One authority: a policy, a key, a ledger, and what follows from them.

    Without a key Vault signs its grants, and `shadow` compares what comes back with what our key would have signed.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        key: Signing | None,
        ledger: Ledger,
        clock: Callable[[], float],
        random: Callable[[int], bytes],
        report: Callable[[Exception], None],
        shadow: Shadow | None = None,
    ) -> None:
        self.policy = policy
        self.key = key
        self._ledger = ledger
        self._clock = clock
        self._random = random
        self._report = report  # told of faults that are ours, for the log
        self.shadow = shadow
        self._refusals = Refusals()
        self._state: _State | None = None
        self._out: set[PendingSignature] = set()  # they count towards limits, and the ledger does not know them
        self._last_serial = 0
        self._latest = 0  # seconds; of the newest batch

    # --- a batch ------------------------------------------------------------------------------------------------

    def run(self, commands: Sequence[Command]) -> Iterator[tuple[int, Answer | PendingSignature]]:
        """Decides every command, records all in one transaction, then signs and yields (index, reply) one by one.

        If the transaction fails, every command that had something to record gets the failure as its reply, and so
        does one that may have been answered by what the others wanted to record.
        """
        now = self._now()
        outcomes = [self._outcome(command, now) for command in commands]
        key = self.key  # each draft names this one as its CA, and another may come before the last is signed
        entries = self._commit([event for outcome in outcomes for event in outcome.events], now)
        failure = entries if isinstance(entries, SignerError) else None
        for index, outcome in enumerate(outcomes):
            if failure is not None and (outcome.events or isinstance(commands[index], Unfreeze)):
                yield index, failure
            elif outcome.draft is not None and key is not None:
                yield index, self._release(outcome.draft, key)
            elif outcome.tells_entry and not isinstance(entries, SignerError):
                place = sum(len(before.events) for before in outcomes[:index])
                yield index, queries.recorded_operation(entries[place])
            elif outcome.reply is not None:
                yield index, outcome.reply

    def _now(self) -> float:
        """One time for a whole batch. If the clock was set back, what had run out may count again: read it anew."""
        now = self._clock()
        if int(now) < self._latest:
            self._state = None
        self._latest = int(now)
        return now

    def record(self, events: list[Event], now: float | None = None) -> SignerError | None:
        """Commits events, or says why not; after a failure all state is read from the ledger again."""
        entries = self._commit(events, now)
        return entries if isinstance(entries, SignerError) else None

    def _commit(self, events: list[Event], now: float | None) -> list[Entry] | SignerError:
        if not events:
            return []
        try:
            entries = self._ledger.commit(events, int((self._clock() if now is None else now) * 1000))
        except (Unavailable, LedgerBroken) as failure:
            self._state = None
            return failure
        except Exception as error:  # noqa: BLE001 - an event that cannot be written must not end the keeper
            self._state = None
            self._report(error)
            return _internal_error()
        if self._state is not None:
            self._state.head = Head(entries[-1].seq, entries[-1].hash, entries[-1].time_ms)
        return entries

    def finish(
        self, results: Sequence[tuple[PendingSignature, Returned | SignerError]]
    ) -> Iterator[tuple[int, Answer]]:
        """What Vault made of grants that `run` gave out: checks and records all, then yields (index, reply)."""
        now, serials = self._now(), set[int]()
        outcomes = [self._finished(forward, result, now, serials) for forward, result in results]
        failure = self.record([event for _, events in outcomes for event in events], now)
        for forward, _ in results:  # only now: until it is recorded, a state that is read anew must count it
            self._out.discard(forward)
        for index, (reply, events) in enumerate(outcomes):
            yield index, failure if failure is not None and events else reply

    def _finished(
        self, forward: PendingSignature, result: Returned | SignerError, now: float, serials: set[int]
    ) -> tuple[Answer, tuple[Event, ...]]:
        """The reply and what must be recorded before it is given; `serials` are those of this batch so far."""
        grant = forward.grant
        try:
            if isinstance(result, SignerError):
                raise result
            made = read_foreign(result, forward)
            state = self._ready(now)
            orders.refuse_frozen(state.freezes, grant.identity, grant.role)  # it may be since the grant was made
            known = self._ledger.certificate(made.fields.serial)
            if made.fields.serial in serials or (known is not None and known[0].backend == "vault"):
                raise outside_grant("a serial that it used before")
        except SignerError as error:
            if isinstance(error, CertificateMismatch):
                self._report(error)
            self._out.remove(forward)
            self._take_back(grant, forward.asked_at, forward.asked_at + grant.ttl)
            told = self.shadow.refused(forward, error, int(now)) if self.shadow else ()
            return error, (*self._refused(forward.command, error, now), *told)
        serials.add(made.fields.serial)
        event = issued_event(made, forward.command.caller, forward.policy_digest, "vault", made.ca_fingerprint)
        expires_in = max(made.fields.valid_before - int(now), 0)
        compared = self.shadow.compare(made, forward, int(now)) if self.shadow else ()
        return issued_reply(made, made.line, made.ca_fingerprint, expires_in), (event, *compared)

    def _release(self, draft: UnsignedCertificate, key: Signing) -> Answer:
        # 9 sign; on failure record that this serial was never released
        try:
            signature = key.sign(draft.unsigned)
        except Exception as error:  # noqa: BLE001 - whatever a backend raises, the serial must not stay open
            self._report(error)
            body: dict[str, object] = {"serial": str(draft.fields.serial), "error": type(error).__name__}
            self._take_back(draft.grant, draft.fields.valid_after + draft.grant.backdate, draft.fields.valid_before)
            self.record([Event("certificate.withheld", draft.grant.identity, body)])
            return Unavailable("signing_failed", "the certificate could not be signed", "look at the service's log")
        # 10 reply
        return issued_reply(draft, certificate_line(draft, signature), key.fingerprint, draft.grant.ttl)

    def _take_back(self, grant: Grant, issued: int, valid_before: int) -> None:
        if self._state is not None:
            self._state.certificates.withhold(grant.identity, grant.role, issued, valid_before)

    def _outcome(self, command: Command, now: float) -> Outcome:
        """`handle`, with its refusals as replies and, folded, as events."""
        try:
            return self.handle(command, now)
        except (NotAuthenticated, Refused, BadRequest, BadPublicKey) as refusal:
            return Outcome(refusal, self._refused(command, refusal, now))
        except CertificateMismatch as fault:
            self._report(fault)
            return Outcome(fault)
        except SignerError as error:
            return Outcome(error)
        except Exception as error:  # noqa: BLE001 - one command's fault must not stop the others in its batch
            self._report(error)
            return Outcome(_internal_error())

    def _refused(self, command: Command, refusal: SignerError, now: float) -> tuple[Event, ...]:
        """What is recorded of a refusal: nothing if it only adds to a count."""
        try:
            actor = self.policy.authenticate(command.caller.token, int(now))[0].name
        except NotAuthenticated:
            actor = "unauthenticated"
        role = command.role if isinstance(command, Sign | Explain | Unauthenticated) else ""
        return tuple(self._refusals.note(refusal_event(refusal, actor, role, command.caller), int(now)))

    # --- one command --------------------------------------------------------------------------------------------

    def handle(self, command: Command, now: float) -> Outcome:
        """What `command` comes to at `now` (seconds since 1970); raises `SignerError` for every kind of no."""
        if isinstance(command, Sign):
            return self._sign(command, now)
        if isinstance(command, Unauthenticated):
            raise command.fault
        identity, token = self.policy.authenticate(command.caller.token, int(now))
        if isinstance(command, Explain):
            return Outcome(self._explain(command, identity, now))
        if isinstance(command, Freeze | Unfreeze):
            return self._freeze(command, identity, now)
        if isinstance(command, Record):
            return Outcome(None, (orders.record(command, identity),), tells_entry=True)
        return Outcome(self._answer(command, identity, token, now))

    def _sign(self, command: Sign, now: float) -> Outcome:
        """A sign request.

        1  authenticate the credential
        2  refuse if the role is not the caller's, or identity, role or all is frozen, or the clock is behind
        3  parse and vet the public key
        4  decide by policy
        5  a grant that needs a human: not built yet, so policy refuses it
        6  allot the serial, the validity from our clock
        7  build the bytes to be signed, read them back, compare them with the grant
        8  events, which `run` commits with everything else in the batch
        9  and 10, sign and reply: `_release`, after the commit

        Where Vault signs, 6 to 10 are its signature, then `finish`: compare, record, reply.
        """
        # 1
        identity, _ = self.policy.authenticate(command.caller.token, int(now))
        # 2
        role, ask = self._role(identity, command)
        state = self._ready(now)
        orders.refuse_frozen(state.freezes, identity.name, role.name)
        # 3
        key = parse_public_key(ask.public_key)
        # 4 and 5
        usage = state.certificates.usage(identity.name, role.name, int(now))
        grant = decide(identity, role, ask, key, command.caller.address, usage)
        if self.key is None:
            state.certificates.add(identity.name, role.name, int(now), int(now) + grant.ttl)
            forward = PendingSignature(command, grant, int(now), self.policy.digest)
            self._out.add(forward)
            return Outcome(forward)
        # 6 and 7
        self._last_serial += 1
        draft = prepare_certificate(grant, self._last_serial, self._random(NONCE_BYTES), int(now), self.key.blob)
        # 8
        state.certificates.add(identity.name, role.name, int(now), draft.fields.valid_before)
        event = issued_event(draft, command.caller, self.policy.digest, "local", self.key.fingerprint)
        return Outcome(None, (event,), draft)

    def _role(self, identity: Identity, command: Sign | Explain) -> tuple[Role, SignRequest]:
        """The role asked for, and the ask. Vault's order: not yours, then a field's fault, then no such role."""
        role = self.policy.role_for(identity, command.role)
        if isinstance(command.ask, BadRequest):
            raise command.ask
        if role is None:
            raise Refused(
                "unknown_role",
                f"there is no role {command.role[:64]}",
                f"{identity.name} may ask for {', '.join(sorted(identity.roles)) or 'none'}",
                {"role": command.role},
            )
        return role, command.ask

    def _ready(self, now: float) -> _State:
        """The state, read from the ledger if need be; raises `Unavailable` while nothing may be signed."""
        if self._state is None:
            self._state = self._read_state(int(now))
        behind = self._state.head.time_ms // 1000 - int(now)
        if behind > CLOCK_TOLERANCE:
            raise Unavailable(
                "clock_behind",
                f"this host's clock is {behind} s behind the ledger's newest event",
                "set the clock right; nothing is signed while it is more than 60 s behind",
            )
        return self._state

    def _read_state(self, now: int) -> _State:
        recent = self._ledger.recent(now - CLOCK_TOLERANCE)
        rows = [(row.identity, row.role, row.issued, row.valid_before) for row in recent]
        rows += [(f.grant.identity, f.grant.role, f.asked_at, f.asked_at + f.grant.ttl) for f in self._out]
        self._last_serial = max(self._last_serial, self._ledger.last_serial())
        return _State(self._ledger.head(), CertificateUsage(rows), self._ledger.freezes())

    # --- everything else ----------------------------------------------------------------------------------------

    def _explain(self, command: Explain, identity: Identity, now: float) -> Explanation:
        role, ask = self._role(identity, command)
        state = self._ready(now)
        key, fault = None, "no key was given"
        if ask.public_key:
            try:
                key = parse_public_key(ask.public_key)
            except BadPublicKey as bad:
                fault = bad.text
        usage = state.certificates.usage(identity.name, role.name, int(now))
        findings = list(explain(identity, role, ask, key, command.caller.address, usage, fault))
        frozen = orders.explain_freezes(state.freezes, identity.name, role.name)
        return queries.explained(identity, role, [frozen, *findings])

    def _freeze(self, command: Freeze | Unfreeze, identity: Identity, now: float) -> Outcome:
        queries.require(identity, "freeze")
        reply, event = orders.freeze(command, identity, self.policy, self._ready(now).freezes)
        return Outcome(reply, (event,))

    def _answer(self, query: Query, identity: Identity, token: Token, now: float) -> Reply:
        return queries.answer(query, identity, token, self.policy, self._ledger, int(now))

    # --- what the keeper does between batches -------------------------------------------------------------------

    def begin(self, facts: dict[str, object]) -> SignerError | None:
        """Reads the state and records the start."""
        try:
            self._state = self._read_state(int(self._clock()))
        except (Unavailable, LedgerBroken) as failure:
            return failure
        return self.record([Event("keeper.started", "keeper", {**facts, "policy": self.policy.digest})])

    def use_policy(self, policy: Policy) -> SignerError | None:
        """Takes a new policy from the next command on; raises `BadFile` if it names the key in use nowhere."""
        if (own := self.own_key) is not None:
            policy.check_key(own.fingerprint)
        changed = policy.digest != self.policy.digest
        self.policy = policy
        return self.record([Event("policy.loaded", "keeper", {"policy": policy.digest, "changed": changed})])

    def use_key(self, key: Signing) -> SignerError | None:
        """Signs, or compares, with another key from the next command on, once that is recorded.

        Whether the key may sign at all is checked by whoever read it.
        """
        own = self.own_key
        body: dict[str, object] = {"from": own.fingerprint if own else "", "to": key.fingerprint}
        failure = self.record([Event("ca.rotated", "keeper", body)])
        if failure is None and self.shadow is not None:
            self.shadow.take(key)
        elif failure is None:
            self.key = key
        return failure

    @property
    def own_key(self) -> Signing | PublicKey | None:
        """Our CA key: it signs, or is compared with; None where Vault signs and nothing is compared."""
        return self.shadow.key if self.shadow is not None else self.key

    def check_ready(self) -> None:
        """Raises `Unavailable` or `LedgerBroken` while nothing could be signed."""
        self._ready(self._clock())

    def tick(self) -> None:
        """Records what was counted; the keeper calls it about once a second."""
        now = int(self._clock())
        self.record([*self._refusals.due(now), *(self.shadow.due(now) if self.shadow else ())])

    def end(self) -> None:
        """Records what is left and the end."""
        repeats = self.shadow.rest() if self.shadow else []
        self.record([*self._refusals.rest(), *repeats, Event("keeper.stopped", "keeper", {})])
