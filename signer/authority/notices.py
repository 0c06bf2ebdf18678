"""What humans are told, and when: notices made from recorded events and from the state of the service. Pure.

Texts of callers (reasons, commands) are in them: printable, shortened, without tokens, and with every `://` broken, so
that the only address that a reader can follow is the console's. Nothing in a notice decides anything.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from signer.authority.approvals import Approvals, Request, Situation
from signer.model import Entry, hide_tokens
from signer.policy.decide import Policy
from signer.policy.tokens import token_id
from signer.protocol.notices import Notice, Topic, Urgency, state_notice
from signer.units import cut, listed, parse_timestamp, plain, render_duration, render_span, timestamp

# The kinds of events that notices are made from; every other one costs a commit one look-up here.
NOTICED: Final = frozenset(
    {
        "approval.requested", "approval.given", "approval.denied", "approval.withdrawn", "approval.expired",
        "approval.lapsed", "certificates.revoked", "freeze.lifted", "freeze.set", "incident.closed", "incident.opened",
        "refusals.repeated",
    }
)  # fmt: skip
REPEATED: Final = 10  # repeats of one refusal within its minute that humans are told of
REPEATED_EVERY: Final = 3_600  # seconds between two notices of the same refusals
TOKEN_STAGES: Final = ((86_400, "1d"), (7 * 86_400, "7d"))  # seconds before the end of a token; shortest first
MAX_TITLE: Final = 120  # characters
MAX_DETAIL: Final = 300
MAX_NAMES: Final = 12  # of approvers in a text
_MAX_REFUSALS: Final = 1_000  # kinds whose last notice is remembered


def shown(text: object, limit: int = MAX_DETAIL) -> str:
    """A caller's text for a message: one printable line, without tokens and addresses to follow."""
    return cut(plain(hide_tokens(str(text))).replace("://", "[:]//"), limit)


class Noticing:
    """Makes notices of events, the same for the same event; remembers only which refusals were told lately."""

    def __init__(self) -> None:
        self._refusals: OrderedDict[tuple[str, str], tuple[int, int]] = OrderedDict()  # event and time of the last

    def of(self, entry: Entry, approvals: Approvals, situation: Situation) -> Notice | None:
        """The notice of an event; None if nobody has to know, or nothing is known of its request any more."""
        if entry.kind not in NOTICED:
            return None
        body: dict[str, Any] = json.loads(entry.body)
        if entry.kind.startswith("approval."):
            request = approvals.get(str(body["request"]))
            return None if request is None else _of_request(entry, body, request, approvals, situation)
        if entry.kind.startswith("incident."):
            return _of_incident(entry, body)
        if entry.kind == "refusals.repeated":
            return self._of_refusals(entry, body)
        return _of_freeze(entry, body)

    def _of_refusals(self, entry: Entry, body: Mapping[str, Any]) -> Notice | None:
        if int(body["count"]) < REPEATED:
            return None
        key, at = (entry.actor, str(body["code"])), entry.time_ms // 1000
        seq, last = self._refusals.get(key, (entry.seq, at))
        if seq != entry.seq and at < last + REPEATED_EVERY:
            return None
        self._refusals[key] = entry.seq, at
        self._refusals.move_to_end(key)
        if len(self._refusals) > _MAX_REFUSALS:
            self._refusals.popitem(last=False)
        details = [f"{name}: {shown(body[name])}" for name in ("role", "address") if body.get(name)]
        title = f"{entry.actor} was refused {body['count']} times within a minute: {body['code']}"
        return _notice(entry, "refusals", title, [*details, "see `signer events list --kind refusals`"])


def _notice(
    entry: Entry,
    topic: Topic,
    title: str,
    details: Iterable[str] = (),
    *,
    urgency: Urgency = "normal",
    request: str | None = None,
    concerns: Iterable[str] = (),
    tells_age: bool = False,
) -> Notice:
    return Notice(
        id=f"n-{entry.seq}-{entry.hash[:8]}",  # a restored ledger gives numbers again
        seq=entry.seq,
        at=entry.time_ms // 1000,
        topic=topic,
        kind=entry.kind,
        title=shown(title, MAX_TITLE),
        details=tuple(shown(line) for line in details),
        urgency=urgency,
        request=request,
        concerns=tuple(concerns),
        tells_age=tells_age,
    )


# --- requests --------------------------------------------------------------------------------------------------------


def _of_request(
    entry: Entry, body: Mapping[str, Any], request: Request, approvals: Approvals, situation: Situation
) -> Notice | None:
    """The notice of a request or of what became of it; none for one that needs nobody but the asker."""
    frozen, wanted = request.frozen, approvals.requirement(request.frozen, situation)
    if wanted.count == 0 or (entry.kind == "approval.given" and body["approver"] == frozen.identity):
        return None
    approvers = approvals.approvers(request, situation)
    names = listed(approvers, MAX_NAMES, "nobody")
    concerns = sorted({frozen.identity, *approvers, *request.approvals})
    subject = f"{frozen.role} for {frozen.identity}"
    if entry.kind == "approval.requested":
        needed = "" if wanted.count == 1 else f", {wanted.count} of them"
        title = f"{frozen.identity} asks for role {frozen.role}"
        details = [*_certificate(request), f"may approve: {names}{needed}"]
        details.append(f"until {timestamp(frozen.expires)}: `signer requests approve {frozen.id}`, or the console")
        return _notice(
            entry, "requests", title, details, urgency="high", request=frozen.id, concerns=concerns, tells_age=True
        )
    details = [f"asked by {frozen.identity}, may approve: {names}", f"request {frozen.id}"]
    return _notice(
        entry,
        "requests",
        f"{subject}: {_outcome(entry, body, request, wanted.count)}",
        details + _waiver(body),
        request=frozen.id,
        concerns=concerns,
        tells_age=True,
    )


def _certificate(request: Request) -> Iterator[str]:
    """What the request would open, in lines."""
    frozen = request.frozen
    where = f", from {frozen.address}" if frozen.address else ""
    yield f"certificate for {listed(frozen.principals, MAX_NAMES)}, {render_duration(frozen.ttl)}{where}"
    if (command := dict(frozen.critical_options).get("force-command")) is not None:
        yield f"only command: {command}"
    yield f"reason: {frozen.reason}" if frozen.reason else "no reason given"


def _outcome(entry: Entry, body: Mapping[str, Any], request: Request, needed: int) -> str:
    match entry.kind:
        case "approval.given":
            # As of this event: a later one may have come before the notice is made.
            at, asker = entry.time_ms // 1000, request.frozen.identity
            given = [one.by for one in request.approvals.values() if one.by != asker and one.at <= at]
            names = list(dict.fromkeys([*given, str(body["approver"])]))
            if len(names) >= needed:
                return f"approved by {listed(names, MAX_NAMES)}"
            return f"{len(names)} of {needed} approvals, by {listed(names, MAX_NAMES)}"
        case "approval.denied":
            return f"denied by {entry.actor}" + (f": {body['reason']}" if body.get("reason") else "")
        case "approval.withdrawn":
            return f"withdrawn by {entry.actor}"
        case "approval.expired":
            return "expired, not approved in time"
    return "lapsed, approved and not claimed in time"


def _waiver(body: Mapping[str, Any]) -> list[str]:
    terms = body.get("waiver")
    if not isinstance(terms, dict):
        return []
    return [f"and the same ask until {timestamp(parse_timestamp(terms['until']))}, {terms['uses']} times"]


# --- incidents and freezes -------------------------------------------------------------------------------------------


def _of_incident(entry: Entry, body: Mapping[str, Any]) -> Notice:
    name = str(body["incident"])
    if entry.kind == "incident.closed":
        return _notice(entry, "incidents", f"{name} closed by {entry.actor}", [f"commit {body['reference']}"])
    title = f"break-glass: {body['identity']} has a certificate for role {body['role']}"
    details = [f"reason: {body['reason']}", f"serial {body['serial']}, incident {name}"]
    return _notice(entry, "incidents", title, details, urgency="urgent", tells_age=True)


def _of_freeze(entry: Entry, body: Mapping[str, Any]) -> Notice:
    if entry.kind == "certificates.revoked":
        what = " ".join(f"{name} {shown(value)}" for name, value in body.items() if name != "reason")
        title = f"certificates revoked by {entry.actor}"
        return _notice(entry, "freezes", title, [what, f"reason: {body.get('reason', '')}"], urgency="high")
    scope, until = str(body["scope"]), body.get("until")
    if entry.kind == "freeze.lifted":
        how = "its time is over" if until is not None else f"lifted by {entry.actor}"
        return _notice(entry, "freezes", f"{scope} is no longer frozen: {how}")
    details = [f"reason: {body['reason']}", f"until {timestamp(int(until))}" if until is not None else "until lifted"]
    return _notice(entry, "freezes", f"{scope} is frozen by {entry.actor}", details, urgency="high")


# --- the state of the service ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that should not stay as it is, while it lasts; `hint` is the next action."""

    text: str
    hint: str = ""
    urgency: Urgency = "high"


class LastingFaults:
    """Tells when a fault of the service begins and when it ends."""

    def __init__(self) -> None:
        self._lasting: dict[str, tuple[int, Fault]] = {}  # by name, with the time when it was first seen

    def begun(self, now: int) -> list[Notice]:
        """Of the faults that last at `now`, in the order in which they began; with the id of the first notice."""
        return [_of_fault(name, since, fault, now) for name, (since, fault) in self._lasting.items()]

    def update(self, current: Mapping[str, Fault], now: int) -> list[Notice]:
        """The notices of what is new among the faults, and of what is over; `now` in seconds since 1970."""
        over = [name for name in self._lasting if name not in current]
        notices = [_of_end(name, *self._lasting.pop(name), now) for name in over]
        for name, fault in current.items():
            if name not in self._lasting:
                self._lasting[name] = now, fault
                notices.append(_of_fault(name, now, fault, now))
        return notices


def _of_fault(name: str, since: int, fault: Fault, now: int) -> Notice:
    details = [shown(fault.hint)] if fault.hint else []
    if since != now:
        details.append(f"since {timestamp(since)}")
    title = shown(fault.text, MAX_DETAIL)
    name = f"f-{name}-{since}"
    return state_notice(name, now, "health", "fault.begun", title, tuple(details), urgency=fault.urgency)


def _of_end(name: str, since: int, fault: Fault, now: int) -> Notice:
    title = shown(f"over after {render_span(max(now - since, 0))}: {fault.text}", MAX_DETAIL)
    return state_notice(f"f-{name}-{since}-over", now, "health", "fault.over", title)


def token_notices(policy: Policy, now: int) -> list[Notice]:
    """A notice for each identity whose last token ends within days; the same one until the next stage."""
    last: dict[str, tuple[int, str]] = {}
    for token in policy.tokens.values():
        last[token.identity] = max(last.get(token.identity, (0, "")), (token.expires, token_id(token)))
    found = []
    for identity, (expires, name) in sorted(last.items()):
        stage = next((word for seconds, word in TOKEN_STAGES if 0 < expires - now <= seconds), None)
        if stage is not None:
            title = shown(f"the last token of {identity} ends in {render_span(expires - now)}", MAX_TITLE)
            detail = f"on {timestamp(expires)}; `signer token renew {name}` or `signer token new {identity}`"
            found.append(state_notice(f"t-{name}-{stage}", now, "tokens", "token.ends", title, (detail,)))
    return found
