"""What the core remembers between requests: certificates that count towards limits, and refusals to fold.

Both are bounded and can be thrown away: `Holdings` is read back from the ledger, `Refusals` loses at most a count.
Pure; the time is passed in, in seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

from signer.errors import SignerError
from signer.model import Caller, Event, Usage
from signer.tokens import hide_tokens

WINDOW: Final = 60  # seconds; of a rate, and of refusals that are told once
MAX_FOLDED: Final = 1_000  # kinds of refusal remembered at once; noise beyond shares one line
MANY: Final = "many"  # the actor of that line


class Holdings:
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


class Refusals:
    """Tells the first of a kind at once and the rest as a count, so that one loud caller cannot fill the ledger."""

    def __init__(self) -> None:
        self._folded: dict[tuple[str, ...], _Folded] = {}

    def note(self, event: Event, now: int) -> Iterator[Event]:
        """The event itself if it is the first of its kind within a minute, else nothing; it is counted then."""
        kind = (event.kind, event.actor, str(event.body["code"]), str(event.body["role"]), str(event.body["address"]))
        folded = self._folded.get(kind)
        if folded is None and len(self._folded) >= MAX_FOLDED:
            kind = (event.kind, MANY, "various", "", "")
            folded = self._folded.get(kind)
        if folded is not None and now < folded.since + WINDOW:
            folded.count += 1
            return
        if folded is not None:
            yield from self._tell(folded)
        self._folded[kind] = _Folded(now, 0, kind)
        yield event

    def due(self, now: int) -> list[Event]:
        """Counts whose minute is over; they are forgotten here, so record them."""
        over = [kind for kind, folded in self._folded.items() if now >= folded.since + WINDOW]
        return [event for kind in over for event in self._tell(self._folded.pop(kind))]

    def rest(self) -> list[Event]:
        """All counts, for the end."""
        return self.due(2**62)

    @staticmethod
    def _tell(folded: _Folded) -> Iterator[Event]:
        if folded.count:
            _, actor, code, role, address = folded.kind
            body: dict[str, object] = {"code": code, "role": role, "address": address}
            yield Event("refusals.repeated", actor, {**body, "count": folded.count, "since": folded.since})
