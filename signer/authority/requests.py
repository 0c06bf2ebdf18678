"""Commands about requests, waivers and incidents: who may send them, their replies, and the events to record. Pure.

The rules on requests are in `approvals.py`. Claims are in `core.py`, because they issue a certificate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

from signer.authority import incidents
from signer.authority.approvals import (
    Approvals,
    GivenApproval,
    Request,
    Signatures,
    Situation,
    Status,
    Waiver,
    WaiverTerms,
    may_see,
    unknown_request,
)
from signer.authority.incidents import Incident
from signer.authority.queries import require
from signer.errors import BadRequest, NotFound
from signer.ledger.lookups import fitting
from signer.model import Event, Identity, Passkey, SshApprovalKey
from signer.protocol import commands, replies
from signer.ssh.publickey import render_public_key
from signer.units import parse_timestamp, timestamp

RETRY_AFTER: Final = 10  # seconds between two looks of a client that cannot wait
DAY: Final = 24 * 3_600  # seconds
_ROOM: Final = commands.MAX_REPLY // 2  # bytes of a list


def handle(
    command: commands.AboutRequest,
    identity: Identity,
    approvals: Approvals,
    situation: Situation,
    signatures: Signatures,
) -> tuple[replies.Reply, tuple[Event, ...]]:
    """The reply to a command, and the events to record first, which `approvals` already has.

    Raises `Refused`, `NotFound`, `BadRequest` or `BadSignature`.
    """
    match command:
        case commands.ShowRequest():
            return details(find(command.request, identity, approvals, situation), approvals, situation, identity), ()
        case commands.ListRequests():
            return _page(command, identity, approvals, situation), ()
        case commands.Approve() | commands.Deny() | commands.Withdraw():
            request = find(command.request, identity, approvals, situation)
            event = _decide(command, request, identity, approvals, situation, signatures)
            approvals.apply(event, situation.now)
            return details(request, approvals, situation, identity), (event,)
        case commands.ListWaivers():
            waivers = [_waiver_row(found) for found in _visible_waivers(identity, approvals, situation)]
            return replies.Waivers(waivers=waivers), ()
        case commands.EndWaiver():
            return _end_waiver(command, identity, approvals, situation)
        case commands.ListIncidents():
            known = approvals.incidents.all() if command.also_closed else approvals.incidents.open()
            rows = [_incident_row(item, situation.now) for item in known if incidents.may_see(identity, item)]
            return replies.Incidents(incidents=fitting(rows, _size_of, _ROOM)), ()
        case commands.CloseIncident():
            event = approvals.incidents.close(command.incident, identity, command.reference)
            approvals.apply(event, situation.now)
            closed = next(item for item in approvals.incidents.all() if item.id == command.incident)
            return _incident_row(closed, situation.now), (event,)


def find(name: str, identity: Identity, approvals: Approvals, situation: Situation) -> Request:
    """A request that the identity may see; raises `NotFound`, which does not say whether another has it."""
    request = approvals.get(name)
    if request is None or not may_see(identity, request, approvals.requirement(request.frozen, situation)):
        raise unknown_request(name)
    return request


def _decide(
    command: commands.Approve | commands.Deny | commands.Withdraw,
    request: Request,
    identity: Identity,
    approvals: Approvals,
    situation: Situation,
    signatures: Signatures,
) -> Event:
    match command:
        case commands.Approve():
            waiver = None if command.waiver is None else _read_waiver(*command.waiver)
            return approvals.approve(request, identity, command.signature, waiver, situation, signatures)
        case commands.Deny():
            return approvals.deny(request, identity, command.reason, situation)
        case commands.Withdraw():
            if identity.name != request.frozen.identity:
                raise unknown_request(request.frozen.id)
            return approvals.withdraw(request, identity, situation)


def _read_waiver(until: str, uses: int) -> WaiverTerms:
    """The terms of a waiver; raises `BadRequest` for a time that reads differently than it is signed."""
    try:
        seconds = parse_timestamp(until)
    except ValueError:
        seconds = -1
    if seconds < 0 or timestamp(seconds) != until:
        raise BadRequest("waiver_malformed", "until is not a time such as 2026-11-29T12:00:00Z", "correct until")
    return WaiverTerms(seconds, uses)


# --- requests --------------------------------------------------------------------------------------------------------


def _page(
    command: commands.ListRequests, identity: Identity, approvals: Approvals, situation: Situation
) -> replies.RequestPage:
    if command.identity not in (None, identity.name) and not {"approve", "ledger.read"} & identity.may:
        require(identity, "ledger.read")
    asked = approvals.asked_since(situation.now - DAY)
    rows: list[replies.RequestDetails] = []
    room = _ROOM
    is_before = command.before is None
    for request in approvals.newest():
        if not is_before:
            is_before = request.frozen.id == command.before
            continue
        if command.identity not in (None, request.frozen.identity):
            continue
        if not may_see(identity, request, approvals.requirement(request.frozen, situation)):
            continue
        row = details(request, approvals, situation, identity, asked[request.frozen.identity])
        if command.state not in (None, row.state):
            continue
        room -= len(row.as_json())
        if rows and room < 0:
            return replies.RequestPage(requests=rows, before=rows[-1].request)
        rows.append(row)
    return replies.RequestPage(requests=rows, before=None)


def details(
    request: Request,
    approvals: Approvals,
    situation: Situation,
    reader: Identity,
    asked_today: int | None = None,
) -> replies.RequestDetails:
    """The reply that shows a request to `reader`."""
    frozen, end = request.frozen, request.end
    status = approvals.status(request, situation)
    if asked_today is None:
        asked_today = approvals.asked_since(situation.now - DAY)[frozen.identity]
    is_open = status.state in ("pending", "approved")
    presence: Literal["given", "missing"] | None = "given" if status.has_presence else "missing"
    if not status.requirement.presence:
        presence = None
    shown = replies.RequestDetails(
        request=frozen.id,
        state=status.state,
        digest=request.digest,
        frozen=replies.FrozenFields.model_validate(frozen.as_json()),
        expires=timestamp(frozen.expires if status.claim_by is None else status.claim_by),
        claim_by=None if status.claim_by is None else timestamp(status.claim_by),
        may_approve=approvals.may_approve(request, status, situation) if is_open else [],
        needs=status.requirement.count,
        presence=presence,
        approvals=[_approval_row(given, status) for given in request.approvals.values()],
        denied=replies.Denial(by=end.by, why=end.why) if end is not None and end.state == "denied" else None,
        waiver=None if status.waiver is None else status.waiver.id,
        serial=None if end is None else end.serial,
        waivers=status.requirement.waivers,
        asked_today=asked_today,
        retry_after_s=RETRY_AFTER if status.state == "pending" else 0,
        next=replies.NextSteps(wait=f"/api/requests/{frozen.id}?wait=50", claim=f"/api/requests/{frozen.id}/claim"),
    )
    if not is_open:
        return shown
    more: dict[str, object] = {}
    is_asker = reader.name == frozen.identity
    if presence == "missing" and is_asker:
        more["presence_keys"] = [
            render_public_key(line.key.kind, line.key.blob)
            for line in reader.approval_keys
            if isinstance(line, SshApprovalKey)
        ]
    if (presence == "missing" and is_asker) or reader.name in shown.may_approve:
        kinds = status.requirement.key_kinds
        own = [line for line in reader.approval_keys if isinstance(line, Passkey) and line.kind in kinds]
        if own:
            more["passkeys"] = [replies.PasskeyRow(id=line.id, rp=line.rp) for line in own]
    return shown.model_copy(update=more)


def _size_of(row: replies.Reply) -> int:
    return len(row.as_json())


def _approval_row(given: GivenApproval, status: Status) -> replies.ApprovalRow:
    is_own = given not in status.counting
    return replies.ApprovalRow(
        by=given.by,
        at=timestamp(given.at),
        key=given.key,
        software=given.software,
        waiver=None if given.waiver is None else replies.WaiverTerms.model_validate(given.waiver.as_json()),
        counts=not is_own or (status.has_presence and status.requirement.presence),
    )


# --- waivers ---------------------------------------------------------------------------------------------------------


def _visible_waivers(identity: Identity, approvals: Approvals, situation: Situation) -> Iterable[Waiver]:
    for waiver in approvals.waivers(situation):
        wanted = approvals.requirement(waiver.request.frozen, situation)
        if "freeze" in identity.may or may_see(identity, waiver.request, wanted):
            yield waiver


def _end_waiver(
    command: commands.EndWaiver, identity: Identity, approvals: Approvals, situation: Situation
) -> tuple[replies.WaiverEnded, tuple[Event, ...]]:
    visible = _visible_waivers(identity, approvals, situation)
    waiver = next((found for found in visible if found.id == command.waiver), None)
    if waiver is None:
        text = f"there is no waiver {command.waiver[:64]!a} in force that you may see"
        raise NotFound("unknown_waiver", text, "see GET /api/waivers")
    event = approvals.end_waiver(waiver, identity, command.reason, situation)
    approvals.apply(event, situation.now)
    return replies.WaiverEnded(waiver=waiver.id, ended=True), (event,)


def _waiver_row(waiver: Waiver) -> replies.WaiverRow:
    frozen = waiver.request.frozen
    options = dict(frozen.critical_options)
    return replies.WaiverRow(
        waiver=waiver.id,
        identity=frozen.identity,
        role=frozen.role,
        principals=list(frozen.principals),
        force_command=options.get("force-command"),
        source_address=options.get("source-address"),
        address=frozen.address,
        by=list(waiver.by),
        until=timestamp(waiver.until),
        uses=waiver.uses,
        used=waiver.used,
        request=frozen.id,
    )


# --- incidents -------------------------------------------------------------------------------------------------------


def _incident_row(incident: Incident, now: int) -> replies.IncidentRow:
    closed = incident.closed
    return replies.IncidentRow(
        incident=incident.id,
        identity=incident.identity,
        role=incident.role,
        serial=incident.serial,
        reason=incident.reason,
        opened=timestamp(incident.opened),
        overdue=incident.is_overdue(now),
        closed=None
        if closed is None
        else replies.Closing(by=closed.by, at=timestamp(closed.at), reference=closed.reference),
    )
