"""Pages that stay up to date: `GET …?fragment=1&wait=50&seen=…` waits until the live part of a page is another one.

The waiting is in the event loop and costs no thread; the part is made by Flask, as each other page. It is made again
when a request has changed, and what was seen is compared with it, so that nothing is missed between two waits.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qs

from signer.api.console.session import FRAGMENT, HEADERS, SEEN_DIGITS
from signer.api.request import is_of_console
from signer.api.vault.responses import HttpResponse
from signer.api.waiting import ANY_REQUEST, Receive, Waiters, wait_for
from signer.protocol.commands import MAX_WAIT

MAX_LIVE: Final = 6  # waiting pages of one session; the next one is told to come back
COME_BACK: Final = "30"  # seconds
SETTLE_SECONDS: Final = 0.2  # between a change and the look at it: many requests may change at once
_Make = Callable[[], Awaitable[HttpResponse]]


class LivePages:
    """The waiting pages of one worker. Belongs to its event loop."""

    def __init__(self, waiters: Waiters) -> None:
        self._waiters = waiters
        self._of_session: Counter[bytes] = Counter()

    async def wait(
        self, credential: str, seen: str, seconds: int, make: _Make, receive: Receive
    ) -> HttpResponse | None:
        """The live part as soon as it is another one than `seen`; 204 if it is not in time; None if the client is gone.

        `make` makes the part; whatever is not a part, such as the end of the session, is the response at once.
        """
        key = hashlib.sha256(credential.encode()).digest()
        if self._of_session[key] >= MAX_LIVE:
            return _nothing_new(("Retry-After", COME_BACK))
        self._of_session[key] += 1
        deadline = time.monotonic() + min(seconds, MAX_WAIT)
        try:
            with self._waiters.watch(ANY_REQUEST, receive) as (event, gone):
                while True:
                    event.clear()
                    response = await make()
                    if response.status != HTTPStatus.OK or ("ETag", f'"{seen}"') not in response.headers:
                        return response
                    if not await wait_for(event, gone, deadline - time.monotonic()):
                        return None
                    if deadline - time.monotonic() <= SETTLE_SECONDS:
                        return _nothing_new()
                    await asyncio.sleep(SETTLE_SECONDS)
        finally:
            self._of_session[key] -= 1
            if not self._of_session[key]:
                del self._of_session[key]


def _nothing_new(*headers: tuple[str, str]) -> HttpResponse:
    return HttpResponse(HTTPStatus.NO_CONTENT, [*HEADERS, *headers], b"")


def live_call(environ: Mapping[str, Any]) -> tuple[str, int] | None:
    """What a page has seen, and how many seconds it waits; None for every other request."""
    if environ["REQUEST_METHOD"] != "GET" or not is_of_console(environ["RAW_PATH"]):
        return None
    fields = parse_qs(environ["QUERY_STRING"]) if "wait=" in environ["QUERY_STRING"] else {}
    seen, wait = fields.get("seen", [""])[-1], fields.get("wait", [""])[-1]
    if FRAGMENT not in fields or not (wait.isascii() and wait.isdigit() and len(wait) <= 2):
        return None
    return (seen, int(wait)) if len(seen) == SEEN_DIGITS and seen.isalnum() else None
