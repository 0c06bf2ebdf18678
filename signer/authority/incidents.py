"""What break-glass leaves behind: incidents, which only a commit closes. Pure.

A role with `break_glass` gives a human a certificate for their own signature alone. It opens an incident, which closes
with a reference to the commit that brings the change back into the repository. While one is open for longer than
`OVERDUE_AFTER`, the same person needs a second human for the next.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Final

from signer.errors import BadRequest, NotFound, Refused
from signer.model import BREAK_GLASS_TTL, Event, Identity, Terms

OVERDUE_AFTER: Final = 24 * 3_600  # seconds for which an incident may be open without a consequence
MIN_REASON: Final = 20  # characters of the reason of a break-glass request, without surrounding blanks
KEPT_CLOSED: Final = 500  # closed incidents that are shown
# A commit's id, alone or at the end of a link or of `repository@`.
_COMMIT: Final = re.compile(r"(?:\S*[/@#:])?(?:[0-9a-f]{7,40}|[0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Closed:
    """Who closed an incident, when, and the commit that did."""

    by: str
    at: int
    reference: str


@dataclass(frozen=True, slots=True)
class Incident:
    """One use of break-glass; `id` is `i-` and the letters of its request."""

    id: str
    request: str
    identity: str
    role: str
    serial: str
    reason: str
    opened: int
    closed: Closed | None = None

    def is_overdue(self, now: int) -> bool:
        return self.closed is None and now >= self.opened + OVERDUE_AFTER


class Incidents:
    """All incidents that are open, and those closed lately; changed by events only."""

    def __init__(self) -> None:
        self._incidents: dict[str, Incident] = {}  # oldest first

    def apply(self, event: Event, at: int) -> None:
        """Takes one event that was, or is about to be, recorded at `at` (seconds)."""
        body: dict[str, Any] = event.body
        name = str(body["incident"])
        if event.kind == "incident.opened":
            request, identity, role, serial, reason = (
                str(body[key]) for key in ("request", "identity", "role", "serial", "reason")
            )
            self._incidents[name] = Incident(name, request, identity, role, serial, reason, at)
        elif (incident := self._incidents.get(name)) is not None:
            self._incidents[name] = replace(incident, closed=Closed(event.actor, at, str(body["reference"])))
            closed = [known.id for known in self._incidents.values() if known.closed is not None]
            for old in closed[: max(len(closed) - KEPT_CLOSED, 0)]:
                del self._incidents[old]

    def all(self) -> list[Incident]:
        """All incidents, newest first."""
        return list(reversed(self._incidents.values()))

    def open(self) -> list[Incident]:
        """The open ones, newest first."""
        return [incident for incident in self.all() if incident.closed is None]

    def overdue(self, now: int) -> list[Incident]:
        return [incident for incident in self._incidents.values() if incident.is_overdue(now)]

    def is_overdue(self, identity: str, now: int) -> bool:
        """Whether an incident of the identity has been open for too long."""
        return any(incident.identity == identity for incident in self.overdue(now))

    def close(self, name: str, identity: Identity, reference: str) -> Event:
        """The event that closes an incident; raises `NotFound`, `Refused` or `BadRequest`."""
        incident = self._incidents.get(name)
        if incident is None or not may_see(identity, incident):
            text = f"there is no incident {name[:64]!a} that you may see"
            raise NotFound("unknown_incident", text, "see GET /api/incidents")
        if identity.kind != "human":
            raise Refused("approver_not_human", f"{identity.name} is not a human and closes no incident", "ask a human")
        if incident.closed is not None:
            raise Refused("incident_closed", f"{name} was closed by {incident.closed.by}", "nothing is left to do")
        if _COMMIT.fullmatch(reference) is None:
            raise BadRequest(
                "incident_reference_malformed",
                "the reference is not a commit: 7 to 64 hex digits, alone or at the end of a link",
                "name the commit that brings the change back into the repository",
            )
        return Event("incident.closed", identity.name, {"incident": name, "reference": reference})


def may_see(identity: Identity, incident: Incident) -> bool:
    """Whoever broke the glass, and the rights `approve`, `operate` and `ledger.read`."""
    return identity.name == incident.identity or bool({"approve", "operate", "ledger.read"} & identity.may)


def check_break_glass(terms: Terms) -> None:
    """Raises `Refused` for a break-glass request that no policy can allow."""
    if terms.kind != "human":
        raise Refused(
            "break_glass_humans_only",
            f"role {terms.role} is for humans only, and {terms.identity} is not one",
            "ask a human",
        )
    length = len((terms.reason or "").strip())
    if length < MIN_REASON:
        raise Refused(
            "break_glass_reason_too_short",
            f"break-glass requires a reason of at least {MIN_REASON} characters; this one has {length}",
            "pass `--reason TEXT` and say what is broken",
        )
    if terms.ttl > BREAK_GLASS_TTL:
        raise Refused(
            "break_glass_too_long",
            f"a break-glass certificate lives for at most {BREAK_GLASS_TTL} s, not {terms.ttl} s",
            f"request {BREAK_GLASS_TTL} s or less",
        )
