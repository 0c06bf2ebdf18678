"""Which hosts have fetched which version of the revocation list lately: what `Signer-Host` headers say, in memory.

Hints for a human who waits until a revocation is in force everywhere. Anybody who reaches the API can send any name, so
nothing is decided by them. A flood of names cannot push out the hosts that the ledger knows, nor, from one address,
those of other addresses.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Final

MAX_HOSTS: Final = 1_000
MAX_OF_PEER: Final = 64  # unregistered names from one address
FORGOTTEN_AFTER: Final = 86_400  # seconds without a fetch


@dataclass(frozen=True, slots=True)
class Fetch:
    """A host has fetched that version at `at`, in seconds since 1970; `peer` is where it came from."""

    host: str
    version: int
    at: int
    peer: str


class HostsSeen:
    """The newest fetch of each host; `registered` returns the names that the ledger knows."""

    def __init__(self, registered: Callable[[], Collection[str]] = tuple) -> None:
        self._registered = registered
        self._fetches: OrderedDict[str, Fetch] = OrderedDict()  # oldest first

    def note(self, fetches: Iterable[Fetch]) -> None:
        """Takes fetches in; those for which there is no room are dropped."""
        registered = self._registered()
        of_peer = Counter(fetch.peer for name, fetch in self._fetches.items() if name not in registered)
        for fetch in fetches:
            known = self._fetches.get(fetch.host)
            if fetch.host not in registered and (known is None or known.peer != fetch.peer):
                if of_peer[fetch.peer] >= MAX_OF_PEER:
                    continue
                of_peer[fetch.peer] += 1
                if known is not None:
                    of_peer[known.peer] -= 1
            if known is None and len(self._fetches) >= MAX_HOSTS and not self._make_room(registered, of_peer):
                continue
            self._fetches[fetch.host] = fetch
            self._fetches.move_to_end(fetch.host)

    def _make_room(self, registered: Collection[str], of_peer: Counter[str]) -> bool:
        """Drops the unregistered host that was seen longest ago; false if there is none."""
        for name, fetch in self._fetches.items():
            if name not in registered:
                of_peer[fetch.peer] -= 1
                del self._fetches[name]
                return True
        return False

    def rows(self, now: int) -> list[Fetch]:
        """The newest fetch of each host, by name; hosts that have not fetched for a day are forgotten."""
        for name in [name for name, fetch in self._fetches.items() if fetch.at < now - FORGOTTEN_AFTER]:
            del self._fetches[name]
        return sorted(self._fetches.values(), key=lambda fetch: fetch.host)
