"""Who passes the edge first: callers whose token the keeper accepted lately; the others wait, or are refused.

A caller without an accepted token costs the keeper as much as one with a token, so each worker lets only a few of them
through. They take turns by peer, an address or a local user, and within a peer the connection with the fewest requests
goes first: neither one peer nor a few busy connections keep a newcomer out.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import itertools
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from signer.errors import Unavailable

KNOWN_FOR: Final = 60.0  # seconds for which an accepted token passes first
MAX_KNOWN: Final = 4_096  # tokens, and peers
MAX_INSIDE: Final = 8  # requests of strangers that are answered at once
MAX_WAITING: Final = 16  # requests of strangers that wait for it
STRANGERS_PER_SECOND: Final = 50
Peer = str | int | None  # an address, the uid of a local process, or None for a trusted proxy


@lru_cache(maxsize=1024)
def peer_of(address: str) -> str:
    """The peer of an IP address: itself, or for IPv6 its network of 64 bits, which one sender may have for itself."""
    number = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(number, ipaddress.IPv6Address) and number.ipv4_mapped is None:
        return str(ipaddress.IPv6Network((int(number) >> 64 << 64, 64)))
    return str(getattr(number, "ipv4_mapped", None) or number)


@dataclass(frozen=True, slots=True, eq=False)
class _Stranger:
    """A request that waits for its turn: true when it may enter, false when it is refused."""

    peer: Peer
    requests: int
    is_gone: Callable[[], bool]
    turn: asyncio.Future[bool]


class Admission:
    """The admission of one worker. `accept` and `forget` are safe to call in any thread, the rest in the event loop."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, strangers_per_second: int = STRANGERS_PER_SECOND
    ) -> None:
        self._clock = clock
        self._per_second = strangers_per_second
        self._secret = os.urandom(32)
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, float] = OrderedDict()  # digest of a token: when it was last accepted
        self._waiting: list[_Stranger] = []  # at most `MAX_WAITING`
        self._turns: OrderedDict[Peer, int] = OrderedDict()  # the last turn that each peer had
        self._turn = itertools.count(1)
        self._inside = 0  # strangers whose request is being answered
        self._credit = float(strangers_per_second)
        self._credited = clock()

    # --- tokens -------------------------------------------------------------------------------------------------

    def is_known(self, token: str | None) -> bool:
        """True if the keeper accepted the token within `KNOWN_FOR`."""
        return token is not None and self._clock() < self._known.get(self._digest(token), -KNOWN_FOR) + KNOWN_FOR

    def accept(self, token: str) -> None:
        """Notes that the keeper accepted the token."""
        digest = self._digest(token)
        with self._lock:
            self._known[digest] = self._clock()
            self._known.move_to_end(digest)
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)

    def forget(self, token: str) -> None:
        """Notes that the keeper no longer accepts the token."""
        with self._lock:
            self._known.pop(self._digest(token), None)

    def _digest(self, token: str) -> bytes:
        return hashlib.blake2b(token.encode(errors="replace"), key=self._secret, digest_size=16).digest()

    # --- strangers ----------------------------------------------------------------------------------------------

    async def enter(self, peer: Peer, requests: int, is_gone: Callable[[], bool] = lambda: False) -> None:
        """Waits for the turn of a stranger, who must `leave` afterwards; raises `Unavailable` if too many wait.

        `requests` is the number of requests that the stranger's connection has made before; `is_gone` becomes true
        when it is closed.
        """
        if not self._waiting and self._may_enter():
            return
        stranger = _Stranger(peer, requests, is_gone, asyncio.get_running_loop().create_future())
        if len(self._waiting) >= MAX_WAITING:
            await asyncio.sleep(0)  # the loop reads the ends of connections that it has not seen yet
            self._drop_gone()
        if len(self._waiting) >= MAX_WAITING and not self._displace(stranger):
            raise busy()
        self._waiting.append(stranger)
        self.admit()
        try:
            if not await stranger.turn:
                raise busy()
        except asyncio.CancelledError:
            if stranger in self._waiting:
                self._waiting.remove(stranger)
            raise

    def leave(self) -> None:
        """Ends the request of a stranger."""
        self._inside -= 1
        self.admit()

    def admit(self) -> None:
        """Lets those in who may enter now; call it often."""
        self._drop_gone()
        while self._waiting and self._may_enter():
            stranger = min(self._waiting, key=lambda waiting: (self._turns.get(waiting.peer, 0), waiting.requests))
            self._waiting.remove(stranger)
            self._turns[stranger.peer] = next(self._turn)
            self._turns.move_to_end(stranger.peer)
            if len(self._turns) > MAX_KNOWN:
                self._turns.popitem(last=False)
            if stranger.turn.done():  # the client is gone
                self._inside -= 1
            else:
                stranger.turn.set_result(True)

    def _drop_gone(self) -> None:
        for stranger in [stranger for stranger in self._waiting if stranger.is_gone()]:
            self._refuse(stranger)

    def _refuse(self, stranger: _Stranger) -> None:
        self._waiting.remove(stranger)
        if not stranger.turn.done():
            stranger.turn.set_result(False)

    def _may_enter(self) -> bool:
        now = self._clock()
        self._credit = min(self._credit + (now - self._credited) * self._per_second, self._per_second)
        self._credited = now
        if self._credit < 1 or self._inside >= MAX_INSIDE:
            return False
        self._credit -= 1
        self._inside += 1
        return True

    def _displace(self, newcomer: _Stranger) -> bool:
        """Refuses one who waits, of the peer with most, in favour of a newcomer of a smaller or the same peer."""
        if not self._waiting:
            return False
        sizes = Counter(stranger.peer for stranger in self._waiting)
        victim = max(self._waiting, key=lambda waiting: (sizes[waiting.peer], waiting.requests))
        is_smaller = sizes[newcomer.peer] + 1 < sizes[victim.peer]
        if not is_smaller and (victim.peer != newcomer.peer or victim.requests <= newcomer.requests):
            return False
        self._refuse(victim)
        return True


def busy() -> Unavailable:
    """The refusal of a stranger for whom there is no room."""
    return Unavailable("edge_busy", "too many requests without a known token wait at once", "retry in a second")
