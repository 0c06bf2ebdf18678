"""Clients that wait for humans: `GET /api/requests/<id>?wait=50`, in the event loop, without a thread each.

One `watch` connection to the keeper tells a worker which requests may have changed; what they are now, each waiting
client's own token has to ask. Without that connection clients wait on, and all are woken once it is there again.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from signer.api.problems import render_problem
from signer.api.request import message_header, new_request_id
from signer.api.vault.responses import HttpResponse
from signer.errors import SignerError
from signer.protocol.client import KeeperClient
from signer.protocol.commands import MAX_REPLY, MAX_WAIT
from signer.protocol.replies import Changes, Reply, RequestDetails, decode_reply
from signer.settings import Proxies

RECONNECT_AFTER: Final = 1.0  # seconds
ANY_REQUEST: Final = ""  # in the place of a request: wait for a change of any
_NUMBER: Final = b"1"
_WATCH: Final = _NUMBER + b' {"op": "watch"}\n'
_PATH: Final = re.compile(r"/api/requests/(r-[a-z2-7]{10})", re.ASCII)
_QUERY: Final = re.compile(r"wait=([1-9][0-9]?)", re.ASCII)
_HEADERS: Final = (("Content-Type", "application/json"), ("Cache-Control", "no-store"))
Receive = Callable[[], Awaitable[Mapping[str, Any]]]


class Waiters:
    """The waiting clients of one worker, by request. Belongs to one event loop, which calls `chores` often."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = str(path)
        self._clock = clock
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._sock: socket.socket | None = None
        self._not_before = 0.0

    def add(self, request: str) -> asyncio.Event:
        """An event that is set when the request may have changed from now on; `remove` it afterwards."""
        event = asyncio.Event()
        self._waiting.setdefault(request, set()).add(event)
        self.chores()
        return event

    def remove(self, request: str, event: asyncio.Event) -> None:
        self._waiting[request].discard(event)
        if not self._waiting[request]:
            del self._waiting[request]

    @contextmanager
    def watch(self, request: str, receive: Receive) -> Iterator[tuple[asyncio.Event, asyncio.Future[Any]]]:
        """While a client waits: an event that is set when the request may have changed, and the client's end."""
        gone = asyncio.ensure_future(receive())
        event = self.add(request)
        try:
            yield event, gone
        finally:
            gone.cancel()
            self.remove(request, event)

    def chores(self) -> None:
        """Connects to the keeper if somebody waits and there is no connection."""
        if self._sock is not None or not self._waiting or self._clock() < self._not_before:
            return
        self._not_before = self._clock() + RECONNECT_AFTER
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.connect(self._path)
            sock.send(_WATCH)
        except OSError:  # the keeper is away, or has no room
            sock.close()
            return
        self._sock = sock
        asyncio.get_running_loop().add_reader(sock.fileno(), self._on_readable)

    def close(self) -> None:
        if self._sock is not None:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def _on_readable(self) -> None:
        assert self._sock is not None, "only an open connection is read"  # noqa: S101
        try:
            message = self._sock.recv(MAX_REPLY)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        number, _, reply = message.partition(b" ")
        try:
            changes = decode_reply(reply) if number == _NUMBER else None
        except SignerError:
            changes = None
        if isinstance(changes, Changes):
            self._wake(changes.requests or list(self._waiting))
        else:  # closed, or not a keeper of this version
            self.close()

    def _wake(self, requests: list[str]) -> None:
        for request in {*requests, ANY_REQUEST}:
            for event in self._waiting.get(request, ()):
                event.set()


class WaitCall:
    """One request of a client that waits for a decision."""

    __slots__ = ("_deadline", "_header", "_name", "_request_id")

    def __init__(self, environ: Mapping[str, Any], proxies: Proxies, name: str, seconds: int) -> None:
        self._name = name
        self._request_id = new_request_id()
        self._deadline = time.monotonic() + min(seconds, MAX_WAIT)
        self._header = {**message_header("request", environ, proxies, self._request_id), "request": name}

    async def ask(self, keeper: KeeperClient) -> Reply | SignerError:
        """The request as it is now."""
        try:
            return await keeper.ask_async(self._header)
        except SignerError as error:
            return error

    async def wait(self, keeper: KeeperClient, waiters: Waiters, receive: Receive) -> HttpResponse | None:
        """The response as soon as the request is decided or the time is over; None if the client is gone."""
        with waiters.watch(self._name, receive) as (event, gone):
            while True:
                event.clear()
                outcome = await self.ask(keeper)
                left = self._deadline - time.monotonic()
                if not is_pending(outcome) or left <= 0:
                    return self.response(outcome)
                if not await wait_for(event, gone, left):
                    return None

    def response(self, outcome: Reply | SignerError) -> HttpResponse:
        """The HTTP response for the keeper's reply or an error."""
        if isinstance(outcome, SignerError):
            return HttpResponse(*render_problem(outcome, self._request_id))
        return HttpResponse(200, _HEADERS, outcome.as_json() + b"\n")


async def wait_for(event: asyncio.Event, gone: asyncio.Future[Any], seconds: float) -> bool:
    """Waits until `event` is set or the time is over; False as soon as the client is gone."""
    changed = asyncio.ensure_future(event.wait())
    await asyncio.wait({changed, gone}, timeout=max(seconds, 0), return_when=asyncio.FIRST_COMPLETED)
    changed.cancel()
    return not gone.done()


def is_pending(outcome: Reply | SignerError) -> bool:
    """Whether there is something to wait for."""
    return isinstance(outcome, RequestDetails) and outcome.state == "pending"


def wait_call(environ: Mapping[str, Any], proxies: Proxies) -> WaitCall | None:
    """The call of a client that waits; None for every other request, which Flask answers or refuses."""
    if environ["REQUEST_METHOD"] != "GET" or (query := _QUERY.fullmatch(environ["QUERY_STRING"])) is None:
        return None
    path = _PATH.fullmatch(environ["RAW_PATH"])
    seconds = int(query[1])
    return None if path is None or seconds > MAX_WAIT else WaitCall(environ, proxies, path[1], seconds)
