"""Many clients that log in without pause, while something happens to the platform; what they saw of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.parts.platform import Platform


@dataclass(frozen=True)
class Seen:
    """One login: when it began and ended (monotonic seconds), at which try it worked (0: at none), what was said."""

    began: float
    ended: float
    worked_at: int
    said: str


class Clients:
    """`count` clients, each logging in again as soon as it is through; a login that fails is tried once more, and then
    waits for a service that is away, as the first try's hint says.

    Use as a context manager. They run at the lowest priority: in production they have processors of their own, and
    here 30 of them would leave none to the platform that they look at.
    """

    def __init__(self, platform: Platform, count: int = 30) -> None:
        self.platform = platform
        self.count = count
        self.seen: list[Seen] = []
        self.quiet = (0.0, 0.0)
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Clients:
        names = list(self.platform.targets)
        assert self.platform.can_log_in()
        for number in range(self.count):
            thread = threading.Thread(target=self._log_in_again_and_again, args=(names[number % len(names)],))
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Returns when each has finished its last login."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _log_in_again_and_again(self, target: str) -> None:
        while not self._stop.is_set():
            began, said = time.monotonic(), ""
            for attempt, options in ((1, ()), (2, ("--wait", "60s"))):  # noqa: B007 - read after the loop
                done = self.platform.login(target, nice=True, options=options)
                if done.out == "logged-in\n":
                    break
                said += done.err
            else:
                attempt = 0
            self.seen.append(Seen(began, time.monotonic(), attempt, said))

    def wait_for(self, count: int) -> None:
        """Returns when so many more logins are over."""
        enough = len(self.seen) + count
        while len(self.seen) < enough:
            time.sleep(0.05)

    def rest(self) -> None:
        """Lets them log in for a while with nothing else happening; `quiet` is from when to when."""
        began = time.monotonic()
        self.wait_for(2 * self.count)
        self.quiet = began, time.monotonic()

    @property
    def lost(self) -> list[Seen]:
        """Logins that failed twice."""
        return [one for one in self.seen if one.worked_at == 0]

    @property
    def retried(self) -> list[Seen]:
        """Logins that worked at the second try."""
        return [one for one in self.seen if one.worked_at == 2]


def longest_gap(seen: Sequence[Seen], began: float, ended: float) -> float:
    """Seconds: the longest stretch between these two times in which nobody's login came through."""
    times = sorted(one.ended for one in seen if one.worked_at and began < one.ended < ended)
    return max(after - before for before, after in zip([began, *times], [*times, ended], strict=True))
