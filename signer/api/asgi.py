"""The API as one ASGI callable: the sign routes in the event loop, everything else in Flask, in a pool of threads.

`signer api` serves it with `signer.api.edge`. It gives each request its answer, also where the application fails.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from flask import Flask

from signer.api.admission import Admission, Peer, busy, peer_of
from signer.api.app import make_flask
from signer.api.console.live import LivePages, live_call
from signer.api.console.session import HEADERS as CONSOLE_HEADERS
from signer.api.problems import EDGE_BUSY, render_for_both
from signer.api.published import FETCHES_PER_SECOND, FetchReports, PublishedFiles
from signer.api.request import is_of_console, new_request_id, read_address, read_session, read_token
from signer.api.sign import SIGN_METHODS, SignCall, SignRoutes
from signer.api.vault.responses import HttpResponse
from signer.api.waiting import Waiters, is_pending, wait_call
from signer.errors import SignerError, Unavailable
from signer.protocol.client import KeeperClient
from signer.protocol.log_limit import LogLimit
from signer.settings import Settings, load_settings

log = logging.getLogger("signer.api")

Environ = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
# The fields that the application reads, by their names in a WSGI environment (PEP 3333). No framework sees the others.
_FIELDS: Final = {
    b"authorization": "HTTP_AUTHORIZATION",
    b"content-type": "CONTENT_TYPE",
    b"if-none-match": "HTTP_IF_NONE_MATCH",
    b"signer-host": "HTTP_SIGNER_HOST",
    b"x-forwarded-for": "HTTP_X_FORWARDED_FOR",
    b"x-vault-namespace": "HTTP_X_VAULT_NAMESPACE",
    b"x-vault-token": "HTTP_X_VAULT_TOKEN",
    b"x-vault-wrap-ttl": "HTTP_X_VAULT_WRAP_TTL",
}
# What only the console reads, so that no cookie means anything elsewhere.
_FIELDS_OF_CONSOLE: Final = {
    b"content-type": "CONTENT_TYPE",
    b"cookie": "HTTP_COOKIE",
    b"host": "HTTP_HOST",
    b"origin": "HTTP_ORIGIN",
    b"sec-fetch-site": "HTTP_SEC_FETCH_SITE",
    b"x-forwarded-for": "HTTP_X_FORWARDED_FOR",
}
_WSGI: Final = {"wsgi.version": (1, 0), "wsgi.multithread": True, "wsgi.multiprocess": True, "wsgi.run_once": False}


def create_app(settings: Settings | None = None) -> Api:
    """The whole API for `settings`; default: the settings in the environment."""
    return Api(settings or load_settings(os.environ))


class Api:
    """The ASGI callable, and what the worker asks of it."""

    def __init__(self, settings: Settings) -> None:
        self.lines = LogLimit(log)
        self.admission = Admission()
        self.fetch_admission = Admission(strangers_per_second=FETCHES_PER_SECOND)
        self.keeper = KeeperClient(settings.socket, judged=self._judge)
        self.published = PublishedFiles(settings.published)
        self.reports = FetchReports(self.keeper)
        self.waiters = Waiters(settings.socket)
        self.live_pages = LivePages(self.waiters)
        self._proxies = settings.proxies
        self._routes = SignRoutes(settings.mounts, settings.proxies)
        self._flask = make_flask(self.keeper, settings, self.lines, self.published)
        self._pool = ThreadPoolExecutor(settings.threads, "flask")  # starts its threads when needed, after the fork

    def is_proxy(self, address: str) -> bool:
        """True if a peer's address is that of a trusted proxy."""
        return bool(self._proxies.networks) and read_address({"REMOTE_ADDR": address}, self._proxies) is None

    def is_proxy_user(self, user: int) -> bool:
        """True if a local user is a trusted proxy."""
        return user in self._proxies.users

    def chores(self) -> None:
        """Checks what is due; the worker calls it about ten times a second."""
        self.keeper.expire()
        self.waiters.chores()
        self.admission.admit()
        self.fetch_admission.admit()
        self.reports.chores()
        self.lines.flush()

    def sign_at_once(self, scope: Mapping[str, Any], body: bytes, connection: Any) -> bool:
        """Sends a known caller's sign request to the keeper at once, because a task would cost as much as all else.

        `connection` gets the response later. False for every other request, which `__call__` answers.
        """
        if scope["method"] not in SIGN_METHODS:
            return False
        try:
            environ = read_environ(scope, body, connection.user)
            if not self.admission.is_known(read_token(environ)):
                return False
            call = self._routes.sign_call(environ, body)
            if call is None:
                return False
            connection.accepted_at = time.monotonic()
            self.keeper.ask_soon(call.header, body, partial(self._finish_signing, call, scope, connection))
        except Exception as error:  # noqa: BLE001 - the client gets a response for every error
            asyncio.get_running_loop().call_soon(connection.respond, scope, self._fail(error))
        return True

    def _finish_signing(self, call: SignCall, scope: Mapping[str, Any], connection: Any, message: bytes | None) -> None:
        try:
            response = call.read_answer(self.keeper, message)
        except Exception as error:  # noqa: BLE001 - as above
            response = self._fail(error)
        connection.respond(scope, response)

    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Receive,
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        """Answers one request; see the ASGI specification. The worker has received the whole body before."""
        try:
            message = await receive()
            if message["type"] != "http.request":  # the client is gone
                return
            response = await self._respond(scope, message["body"], receive)
            if response is None:  # the client that waited is gone
                return
        except asyncio.CancelledError:  # the worker has stopped and told the client
            return
        except Exception as error:  # noqa: BLE001 - the client gets a response for every error
            response = self._fail(error)
        sent = list(response.headers)
        if is_of_console(scope["raw_path"].decode("ascii")):  # also on what the edge answers itself
            sent += [(name, value) for name, value in CONSOLE_HEADERS if name not in dict(sent)]
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in sent]
        # A 304 has the length of what it does not send, or none (RFC 9110 section 8.6).
        if response.status != HTTPStatus.NOT_MODIFIED and "Content-Length" not in (n for n, _ in response.headers):
            headers.append((b"content-length", b"%d" % len(response.body)))
        await send({"type": "http.response.start", "status": int(response.status), "headers": headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": False})

    async def _respond(self, scope: dict[str, Any], body: bytes, receive: Receive) -> HttpResponse | None:
        connection = scope["extensions"]["signer"]["connection"]
        environ = read_environ(scope, body, connection.user)
        if (name := self.published.name_of(environ)) is not None:
            return await self._fetch(name, environ, connection)
        token = read_session(environ) if is_of_console(environ["RAW_PATH"]) else read_token(environ)
        call = wait_call(environ, self._proxies)
        if self.admission.is_known(token):
            if call is not None:
                connection.accepted_at = time.monotonic()
                return await call.wait(self.keeper, self.waiters, receive)
            if token is not None and (live := live_call(environ)) is not None:
                connection.accepted_at = time.monotonic()
                make = partial(self._answer, environ, body, connection, token)
                return await self.live_pages.wait(token, *live, make, receive)
            return await self._answer(environ, body, connection, token)
        if (refusal := await self._enter(self.admission, environ, connection)) is not None:
            self.lines.warn(EDGE_BUSY, f"requests are refused: {busy().text}")
            return refusal
        try:
            if call is None:
                return await self._answer(environ, body, connection, token)
            outcome = await call.ask(self.keeper)  # who may not see it, and what is decided, does not wait
        finally:
            self.admission.leave()
        return await call.wait(self.keeper, self.waiters, receive) if is_pending(outcome) else call.response(outcome)

    async def _fetch(self, name: str, environ: Environ, connection: Any) -> HttpResponse:
        """A published file, which needs no token and no keeper; hosts take turns apart from everybody else."""
        if (refusal := await self._enter(self.fetch_admission, environ, connection)) is not None:
            return refusal
        try:
            response = self.published.response(name, environ)
        finally:
            self.fetch_admission.leave()
        self.reports.note(name, response, environ, self._peer(environ, connection.peer))
        return response

    async def _enter(self, admission: Admission, environ: Environ, connection: Any) -> HttpResponse | None:
        """Waits for the turn of a request; the refusal if too many wait, which ends the connection: a flood costs its
        sender a connection for each."""
        connection.requests_as_stranger += 1
        peer = self._peer(environ, connection.peer)
        try:
            await admission.enter(peer, connection.requests_as_stranger, connection.transport.is_closing)
        except SignerError as full:
            status, headers, content = render_for_both(full)
            return HttpResponse(status, [*headers, ("Connection", "close")], content)
        return None

    async def _answer(self, environ: Environ, body: bytes, connection: Any, token: str | None) -> HttpResponse:
        call = self._routes.sign_call(environ, body)
        if call is not None:
            response = await call.run_async(self.keeper)
        else:
            loop = asyncio.get_running_loop()
            response = await loop.run_in_executor(self._pool, run_flask, self._flask, dict(environ), body)
        if self.admission.is_known(token):
            connection.accepted_at = time.monotonic()
        return response

    def _peer(self, environ: Environ, peer: Peer) -> Peer:
        """The peer behind a trusted proxy, as far as it is known."""
        if peer is not None:
            return peer
        address = read_address(environ, self._proxies)
        return None if address is None else peer_of(address)

    def _judge(self, token: str, accepted: bool) -> None:
        if accepted:
            self.admission.accept(token)
        else:
            self.admission.forget(token)

    def _fail(self, error: Exception) -> HttpResponse:
        request_id = new_request_id()
        self.lines.fault(f"request {request_id} failed", error)
        fault = Unavailable("internal_error", "internal error", f"look for {request_id} in the service's log")
        return HttpResponse(*render_for_both(fault, request_id))


def read_environ(scope: Mapping[str, Any], body: bytes, user: int | None = None) -> Environ:
    """The WSGI environment (PEP 3333) of a request, as far as the application reads it.

    `user` is the id of the local user at the other end of a unix socket.
    """
    client = scope["client"]
    path: bytes = scope["raw_path"]
    environ: Environ = {
        "REQUEST_METHOD": scope["method"],
        "RAW_PATH": path.decode("ascii"),
        "REMOTE_ADDR": "" if client is None else client[0],
    }
    fields = _FIELDS_OF_CONSOLE if is_of_console(environ["RAW_PATH"]) else _FIELDS
    for name, value in scope["headers"]:
        key = fields.get(name)
        if key is not None:
            text = value.decode("latin-1")
            environ[key] = f"{environ[key]},{text}" if key in environ else text
    if user is not None:
        environ["REMOTE_UID"] = user
    environ["QUERY_STRING"] = scope["query_string"].decode("ascii")
    if body:
        environ["CONTENT_LENGTH"] = str(len(body))
    return environ


def run_flask(flask: Flask, environ: Environ, body: bytes) -> HttpResponse:
    """Flask's response, whole, as PEP 3333 asks of a server; runs in a thread."""
    raw = environ["RAW_PATH"]
    query = environ["QUERY_STRING"]
    environ |= {
        **_WSGI,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(raw).decode("latin-1"),
        "RAW_URI": f"{raw}?{query}" if query else raw,
        "SERVER_NAME": "signer",
        "SERVER_PORT": "0",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
    }
    head: tuple[str, list[tuple[str, str]]] | None = None
    parts: list[bytes] = []

    def start_response(
        status: str, headers: list[tuple[str, str]], _error: object = None, /
    ) -> Callable[[bytes], object]:
        nonlocal head
        head = status, headers  # nothing is sent yet, so that of an error takes the place of an earlier one
        return parts.append

    answer = flask.wsgi_app(environ, start_response)
    try:
        parts.extend(answer)
    finally:
        if hasattr(answer, "close"):
            answer.close()
    if head is None:
        raise ValueError("the application did not call start_response")
    return HttpResponse(HTTPStatus(int(head[0][:3])), head[1], b"".join(parts))
