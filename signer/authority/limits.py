"""What the core remembers between requests: certificates that count towards limits, and events to fold.

Everything is bounded and can be discarded: `CertificateUsage` is read again from the ledger, and a `RepeatSuppressor`
loses at most a count. Pure; the time is passed in, in seconds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

from signer.errors import SignerError
from signer.model import Caller, Event, Usage, hide_tokens

WINDOW: Final = 60  # seconds; of a rate, and of refusals that are told once
MAX_FOLDED: Final = 1_000  # kinds of event remembered at once; noise beyond shares one line
MANY: Final = "many"  # the actor of that line


class CertificateUsage:
    """Certificates by (identity, role): how many in the last 60 s, how many still valid."""

    def __init__(self, recent: Iterable[tuple[str, str, int, int]] = ()) -> None:
        self._issued: dict[tuple[str, str], deque[int]] = {}
        self._ends: dict[tuple[str, str], list[int]] = {}
        for identity, role, issued, valid_before in sorted(recent, key=lambda row: row[2]):
            self.add(identity, role, issued, valid_before)

    def add(self, identity: str, role: str, issued: int, valid_before: int) -> None:
        """Counts one more certificate; `issued` must not fall."""
        key = (identity, role)
        self._issued.setdefault(key, deque()).append(issued)
        heappush(self._ends.setdefault(key, []), valid_before)

    def usage(self, identity: str, role: str, now: int) -> Usage:
        """What counts at `now`."""
        key = (identity, role)
        issued, ends = self._issued.get(key), self._ends.get(key)
        if issued is None or ends is None:
            return Usage()
        while issued and issued[0] <= now - WINDOW:
            issued.popleft()
        while ends and ends[0] <= now:
            heappop(ends)
        return Usage(len(issued), len(ends))

    def withhold(self, identity: str, role: str, issued: int, valid_before: int) -> None:
        """Takes back a certificate that was counted and never released; nothing if it is not counted any more."""
        key = (identity, role)
        if issued in self._issued.get(key, ()):
            self._issued[key].remove(issued)
        if valid_before in self._ends.get(key, ()):
            self._ends[key].remove(valid_before)
            self._ends[key].sort()


def refusal_event(refusal: SignerError, actor: str, role: str, caller: Caller) -> Event:
    """The record of one refusal; a token that stands in the wrong place is not in it."""
    body: dict[str, object] = {
        "code": refusal.code,
        "text": hide_tokens(refusal.text),
        "role": hide_tokens(role),
        "address": caller.address or "",
        "request_id": caller.request_id,
    }
    return Event("request.refused", actor, body)


@dataclass(slots=True)
class _Folded:
    since: int
    count: int
    kind: tuple[str, ...]


class RepeatSuppressor(ABC):
    """Tells the first of a kind at once and the rest as a count, so that one loud caller cannot fill the ledger.

    What a kind is, for how many seconds it is folded, and the words of its count are a subclass's.
    """

    window = WINDOW
    others: tuple[str, ...] = ()  # the kind of all that are too many to be told apart

    def __init__(self) -> None:
        self._folded: dict[tuple[str, ...], _Folded] = {}

    @abstractmethod
    def kind(self, event: Event) -> tuple[str, ...]:
        """What an event must have in common with another to be a repetition of it."""

    @abstractmethod
    def repeated(self, folded: _Folded) -> Event:
        """The record of repetitions."""

    def note(self, event: Event, now: int) -> Iterator[Event]:
        """The event itself if it is the first of its kind within `window`, else nothing; it is counted then."""
        kind = self.kind(event)
        folded = self._folded.get(kind)
        if folded is None and len(self._folded) >= MAX_FOLDED:
            kind = self.others
            folded = self._folded.get(kind)
        if folded is not None and now < folded.since + self.window:
            folded.count += 1
            return
        if folded is not None and folded.count:
            yield self.repeated(folded)
        self._folded[kind] = _Folded(now, 0, kind)
        yield event

    def due(self, now: int) -> list[Event]:
        """Counts whose time is over; they are forgotten here, so record them."""
        over = [kind for kind, folded in self._folded.items() if now >= folded.since + self.window]
        return [self.repeated(folded) for kind in over if (folded := self._folded.pop(kind)).count]

    def rest(self) -> list[Event]:
        """All counts, for the end."""
        return self.due(2**62)


class Refusals(RepeatSuppressor):
    """Refusals, folded by caller, code, role and address."""

    others = (MANY, "various", "", "")

    def kind(self, event: Event) -> tuple[str, ...]:
        """Who was refused what, from where."""
        return event.actor, str(event.body["code"]), str(event.body["role"]), str(event.body["address"])

    def repeated(self, folded: _Folded) -> Event:
        """How often the same refusal came again."""
        actor, code, role, address = folded.kind
        body: dict[str, object] = {"code": code, "role": role, "address": address}
        return Event("refusals.repeated", actor, {**body, "count": folded.count, "since": folded.since})


class Differences(RepeatSuppressor):
    """Differences between Vault's certificates and ours: by role and field whoever asked, errors by value, too."""

    window = 3_600  # seconds; where logins are rare, a minute would make an event of each
    others = ("", "various", "", "", "")

    def kind(self, event: Event) -> tuple[str, ...]:
        """Where it is and how bad; a note's values may differ from login to login, as a key id's do."""
        body = event.body
        values = (str(body["ours"]), str(body["vault"])) if body["severity"] == "error" else ("", "")
        return str(body["role"]), str(body["field"]), str(body["severity"]), *values

    def repeated(self, folded: _Folded) -> Event:
        """How often the same difference came again."""
        role, name, severity, *_ = folded.kind
        body: dict[str, object] = {"role": role, "field": name, "severity": severity}
        return Event("shadow.repeated", MANY, {**body, "count": folded.count, "since": folded.since})
