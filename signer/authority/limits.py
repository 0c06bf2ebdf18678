"""Bounded state between requests: certificates that count towards limits, and counts of repeated events.

All of it can be discarded: `CertificateUsage` is rebuilt from the ledger, and a `RepeatSuppressor` loses only counts.
Pure; times are in seconds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

from signer.errors import SignerError
from signer.model import Caller, Event, UsageCounts

WINDOW: Final = 60  # seconds; of the rate limit, and of refusals that are recorded once
MAX_KINDS: Final = 64  # kinds of refusal tracked at once for an identity; the rest share one count
MAX_STRANGER_KINDS: Final = 32  # the same for all callers without a good token together
MAX_DIFFERENCE_KINDS: Final = 1_000  # kinds of difference tracked at once
UNAUTHENTICATED: Final = "unauthenticated"  # the actor of a caller without a good token
MANY: Final = "many"  # the actor of counts of differences


class _Ends:
    """Counts what ends at a time, in whole seconds: as large as the seconds are many, however much ends in each."""

    __slots__ = ("_at", "_first", "total")

    def __init__(self) -> None:
        self.total = 0
        self._at: dict[int, int] = {}
        self._first: list[int] = []  # a heap of the seconds

    def add(self, second: int) -> None:
        if second in self._at:
            self._at[second] += 1
        else:
            self._at[second] = 1
            heappush(self._first, second)
        self.total += 1

    def remove(self, second: int) -> None:
        """Uncounts one; does nothing if there is none."""
        if self._at.get(second):
            self._at[second] -= 1  # a second with none stays until it is over
            self.total -= 1

    def expire(self, now: int) -> int | None:
        """Uncounts what has ended; returns when the next one ends, None if there is none."""
        while self._first and (self._first[0] <= now or not self._at[self._first[0]]):
            self.total -= self._at.pop(heappop(self._first))
        return self._first[0] if self._first else None


class _Held:
    """What an identity has of a role: certificates that count for a minute, and those that are valid."""

    __slots__ = ("lately", "live")

    def __init__(self) -> None:
        self.lately, self.live = _Ends(), _Ends()


class CertificateUsage:
    """Counts of certificates by (identity, role): issued in the last 60 s, and still valid."""

    def __init__(self, recent: Iterable[tuple[str, str, int, int]] = ()) -> None:
        self._held: dict[tuple[str, str], _Held] = {}
        for row in recent:
            self.add(*row)

    def add(self, identity: str, role: str, issued: int, valid_before: int) -> None:
        held = self._held.get((identity, role))
        if held is None:
            held = self._held[identity, role] = _Held()
        held.lately.add(issued + WINDOW)
        held.live.add(valid_before)

    def usage(self, identity: str, role: str, now: int) -> UsageCounts:
        held = self._held.get((identity, role))
        if held is None:
            return UsageCounts()
        lately_ends, live_ends = held.lately.expire(now), held.live.expire(now)
        return UsageCounts(
            last_minute=held.lately.total,
            live=held.live.total,
            minute_frees_in=0 if lately_ends is None else lately_ends - now,
            live_frees_in=0 if live_ends is None else live_ends - now,
        )

    def holds_any(self, identity: str, now: int) -> bool:
        """Whether the identity has a certificate that is valid at `now`."""
        return any(self.usage(name, role, now).live for name, role in list(self._held) if name == identity)

    def live_by_role(self, now: int) -> dict[str, int]:
        """The certificates of each role that are valid at `now`, of all identities together."""
        return self._live(now, lambda _identity, role: role)

    def live_by_identity(self, now: int) -> dict[str, int]:
        """The certificates of each identity that are valid at `now`, of all roles together."""
        return self._live(now, lambda identity, _role: identity)

    def _live(self, now: int, group: Callable[[str, str], str]) -> dict[str, int]:
        found: Counter[str] = Counter()
        for identity, role in self._held:
            found[group(identity, role)] += self.usage(identity, role, now).live
        return dict(found)

    def withhold(self, identity: str, role: str, issued: int, valid_before: int) -> None:
        """Uncounts a certificate that was not released; does nothing if it no longer counts."""
        held = self._held.get((identity, role))
        if held is not None:
            held.lately.remove(issued + WINDOW)
            held.live.remove(valid_before)


def refusal_event(refusal: SignerError, actor: str, role: str, caller: Caller) -> Event:
    body: dict[str, object] = {
        "code": refusal.code,
        "text": refusal.text,
        "role": role,
        "address": caller.address or "",
        "request_id": caller.request_id,
    }
    return Event("request.refused", actor, body)


@dataclass(slots=True)
class _Repeats:
    since: int
    count: int
    kind: tuple[str, ...]
    is_recorded: bool = True  # the first event; False if its transaction failed


class RepeatSuppressor(ABC):
    """Passes the first event of a kind and counts its repeats, so that no caller can fill the ledger.

    A subclass defines the kind of an event, the window in seconds, the event of a count, and the budgets: how many
    kinds are tracked at once for a group of events before the rest of the group shares one count.

    Events that `note`, `due` and `flush` hand out belong to the next transaction: `settle` says that it is on the
    disk, `restore` that it failed. After `restore` the next event of such a kind is passed, and no count is lost.
    """

    window = WINDOW

    def __init__(self) -> None:
        self._repeats: dict[tuple[str, ...], _Repeats] = {}
        self._tracked: Counter[tuple[str, ...]] = Counter()  # kinds of each group, by its shared kind
        self._before: dict[tuple[str, ...], _Repeats | None] = {}  # what the open transaction replaced

    @abstractmethod
    def kind(self, event: Event) -> tuple[str, ...]:
        """The key that an event shares with its repeats."""

    @abstractmethod
    def budget(self, kind: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
        """The kind that the group of `kind` shares once it has more kinds than the number returned."""

    @abstractmethod
    def repeated(self, repeats: _Repeats) -> Event:
        """The event that holds a count of repeats."""

    def note(self, event: Event, now: int) -> Iterator[Event]:
        """Yields the event if it is the first of its kind within `window`; otherwise counts it."""
        kind = self.kind(event)
        repeats = self._repeats.get(kind)
        if repeats is None:
            shared, most = self.budget(kind)
            if self._tracked[shared] >= most:
                kind = shared
                repeats = self._repeats.get(kind)
        if repeats is not None and repeats.is_recorded and now < repeats.since + self.window:
            repeats.count += 1
            return
        if repeats is not None and repeats.count:
            yield self.repeated(repeats)
        self._put(kind, _Repeats(now, 0, kind))
        yield event

    def due(self, now: int) -> list[Event]:
        """Removes and returns the counts whose window has ended."""
        over = [repeats for repeats in self._repeats.values() if now >= repeats.since + self.window]
        for repeats in over:
            self._put(repeats.kind, None)
        return [self.repeated(repeats) for repeats in over if repeats.count]

    def _put(self, kind: tuple[str, ...], repeats: _Repeats | None) -> None:
        """Replaces or removes the entry of a kind, and notes what it was before the transaction."""
        self._before.setdefault(kind, self._repeats.get(kind))
        self._replace(kind, repeats)

    def _replace(self, kind: tuple[str, ...], repeats: _Repeats | None) -> None:
        shared, _ = self.budget(kind)
        if kind != shared:  # the shared kind is in addition to the budget
            self._tracked[shared] += (repeats is not None) - (kind in self._repeats)
        if repeats is None:
            self._repeats.pop(kind, None)
        else:
            self._repeats[kind] = repeats

    def settle(self) -> None:
        """The events handed out so far are on the disk."""
        self._before.clear()

    def restore(self) -> None:
        """The events handed out since `settle` are not on the disk: their counts stand, and each kind is new again."""
        for kind, before in self._before.items():
            after = self._repeats.get(kind)
            counted = after.count if after is not None else 0  # answered, without an event in the failed transaction
            if before is not None:
                before.count += counted
                self._replace(kind, before)
            elif after is not None and counted:
                after.is_recorded = False
            else:
                self._replace(kind, None)
        self._before.clear()

    def flush(self) -> list[Event]:
        """Removes and returns all counts."""
        return self.due(2**62)


class Refusals(RepeatSuppressor):
    """Refusals: of an identity by code, role and address; of callers without a good token by code and address."""

    def kind(self, event: Event) -> tuple[str, ...]:
        """Actor, code, role and address. The role of a caller without a good token is free text and not part of it."""
        role = "" if event.actor == UNAUTHENTICATED else str(event.body["role"])
        return event.actor, str(event.body["code"]), role, str(event.body["address"])

    def budget(self, kind: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
        """One for each identity, and one for all callers without a good token."""
        return (kind[0], "various", "", ""), MAX_STRANGER_KINDS if kind[0] == UNAUTHENTICATED else MAX_KINDS

    def repeated(self, repeats: _Repeats) -> Event:
        actor, code, role, address = repeats.kind
        body: dict[str, object] = {"code": code, "role": role, "address": address}
        return Event("refusals.repeated", actor, {**body, "count": repeats.count, "since": repeats.since})


class Differences(RepeatSuppressor):
    """Differences between Vault's and local certificates, by role and field; errors also by value."""

    window = 3_600  # seconds; with rare logins, a minute would record each of them

    def budget(self, _kind: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
        """One for all."""
        return ("", "various", "", "", ""), MAX_DIFFERENCE_KINDS

    def kind(self, event: Event) -> tuple[str, ...]:
        """Role, field, severity and, of an error, values: those of a note may vary by login, as key ids do."""
        body = event.body
        values = (str(body["ours"]), str(body["vault"])) if body["severity"] == "error" else ("", "")
        return str(body["role"]), str(body["field"]), str(body["severity"]), *values

    def repeated(self, repeats: _Repeats) -> Event:
        role, name, severity, *_ = repeats.kind
        body: dict[str, object] = {"role": role, "field": name, "severity": severity}
        return Event("shadow.repeated", MANY, {**body, "count": repeats.count, "since": repeats.since})
