"""The HTTP edge: uvicorn's HTTP protocol with the bounds that a public port needs, for gunicorn's arbiter.

uvicorn (httptools, uvloop) parses and writes HTTP, and holds slow clients without a thread each. It has no deadline for
a request or for a reader, no bound on a head, and no rule for a full house; this module adds them. `Connections` knows
what each connection waits for, until when, and whose it is; `ClientConnection` is one of them.

The parser gets one request at a time: exactly the head up to its empty line, then exactly the body. A parser that finds
the end of a message elsewhere than this module is refused, so that no request can hide in another.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import resource
import socket
import ssl
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from email.utils import formatdate
from enum import StrEnum
from typing import Any, Final, Protocol, cast

import httptools
from gunicorn.arbiter import Arbiter
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

from signer.api.admission import KNOWN_FOR, Peer, peer_of
from signer.api.problems import render_for_both
from signer.api.request import new_request_id
from signer.api.vault.responses import HttpResponse, render_error
from signer.errors import BadRequest, SignerError, Unavailable
from signer.hardening import peer_process
from signer.protocol.log_limit import LogLimit
from signer.protocol.sign_request import MAX_BODY, body_too_large

ARRIVES_WITHIN: Final = 10.0  # seconds from a request's first byte (a connection's start) to its last
TAKEN_WITHIN: Final = 10.0  # seconds for a client to read a response
LINGERS: Final = 1.0  # seconds in which a refused client may still send, so that it can read the refusal
STOPPING_KEEPS: Final = 0.3  # seconds that a stopping worker keeps idle connections, for requests in transit
STOPS_WITHIN: Final = 1.0  # seconds until a stopping worker refuses the requests that still wait; gunicorn kills at 2
CHORES_EVERY: Final = 0.1  # seconds between two checks of the deadlines
MAX_CONNECTIONS: Final = 1000  # of a worker
MAX_OF_PEER: Final = 3 / 4  # of them that one address or local user may have, trusted proxies excepted
MAX_EVICTED: Final = 16  # connections closed at once when there is no room, because the search costs 0.1 ms
ACCEPTED_AT_ONCE: Final = 64  # so that the bytes of newcomers are read before the next ones are accepted
SPARE_DESCRIPTORS: Final = 64  # in addition to clients, threads and connections to the keeper
SEND_BUFFER: Final = 128 * 1024  # bytes; fits most responses, where the kernel would buffer megabytes for a slow reader
RECEIVE_BUFFER: Final = 64 * 1024  # bytes
MAX_HEAD: Final = 32 * 1024  # bytes of request line and fields
MAX_LINE: Final = 4_094  # bytes of a request line
MAX_FIELD: Final = 8_190  # bytes of one field
MAX_FIELDS: Final = 64  # header fields of one request; more are refused with 431
MAX_CHUNKED: Final = 2 * MAX_BODY  # bytes of a chunked body with its chunk lines and trailers
MAX_DISCARDED: Final = 4 * 1024 * 1024  # bytes that a refused client may send before it is cut off
_END_OF_HEAD: Final = b"\r\n\r\n"
_TLS_HANDSHAKE: Final = b"\x16"  # TLSPlaintext.type of RFC 8446 section 5.1; no method begins with it
_REQUEST_LINE: Final = re.compile(rb"([A-Z][A-Z-]{0,19}) ([!-~]+) HTTP/1\.[01]")
_UPGRADE: Final = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_MAX_DIGITS: Final = 18  # of a length


class Phase(StrEnum):  # as keys of a dict, texts are three times as fast as a plain Enum
    """What a connection waits for."""

    ARRIVING = "a whole request"
    IDLE = "the next request"
    BUSY = "the response"
    LEAVING = "the client to read the response"
    LINGERING = "the client to read the last response"


class _Refusal(Exception):
    def __init__(self, error: SignerError) -> None:
        self.error = error


def render_response(response: HttpResponse, default_headers: Iterable[tuple[bytes, bytes]], *, is_last: bool) -> bytes:
    """The bytes of a response that has a body; `is_last` if the connection ends with it. The fields are not checked."""
    fields = [b"%s: %s\r\n" % field for field in default_headers]
    fields += [f"{name.lower()}: {value}\r\n".encode("latin-1") for name, value in response.headers]
    fields.append(b"content-length: %d\r\n" % len(response.body))
    if is_last:
        fields.append(b"connection: close\r\n")
    return b"%s%s\r\n%s" % (STATUS_LINE[response.status], b"".join(fields), response.body)


def render_refusal(error: SignerError, request_id: str, *, is_vaults: bool = False) -> bytes:
    """The response for a request that no application sees, in Vault's shape if its path is known to be Vault's."""
    response = render_error(error) if is_vaults else HttpResponse(*render_for_both(error, request_id))
    return render_response(response, [(b"date", formatdate(time.time(), usegmt=True).encode())], is_last=True)


class Connections:
    """The connections of a worker: what each waits for, until when, and whose it is."""

    def __init__(self, most: int, idle_seconds: float, lines: LogLimit) -> None:
        self.lines = lines
        self._most = most
        self._most_of_peer = max(1, int(most * MAX_OF_PEER))
        self._of_peer: Counter[Peer] = Counter()
        self.phases: dict[Phase, OrderedDict[ClientConnection, None]] = {phase: OrderedDict() for phase in Phase}
        self.seconds = {
            Phase.ARRIVING: ARRIVES_WITHIN,
            Phase.IDLE: idle_seconds,
            Phase.BUSY: math.inf,
            Phase.LEAVING: TAKEN_WITHIN,
            Phase.LINGERING: LINGERS,
        }

    def __len__(self) -> int:
        return sum(map(len, self.phases.values()))

    def add(self, connection: ClientConnection) -> None:
        """Adds a new connection; makes room if there is none, or if its peer has more than its share."""
        peer = connection.peer
        self._of_peer[peer] += 1
        connection.since = time.monotonic()
        connection.deadline = connection.since + self.seconds[connection.phase]
        self.phases[connection.phase][connection] = None
        if peer is not None and self._of_peer[peer] > self._most_of_peer:
            self.make_room(lambda other: other.peer == peer)
        elif len(self) > self._most:
            self.make_room()

    def await_phase(self, connection: ClientConnection, phase: Phase) -> None:
        """Moves a connection to a phase; its deadline begins now."""
        del self.phases[connection.phase][connection]
        connection.phase = phase
        connection.since = time.monotonic()
        connection.deadline = connection.since + self.seconds[phase]
        self.phases[phase][connection] = None

    def remove(self, connection: ClientConnection) -> None:
        """Removes a connection; does nothing if it was removed before."""
        if connection not in self.phases[connection.phase]:
            return
        del self.phases[connection.phase][connection]
        self._of_peer[connection.peer] -= 1
        if not self._of_peer[connection.peer]:
            del self._of_peer[connection.peer]

    def make_room(self, among: Callable[[ClientConnection], bool] = lambda _: True) -> None:
        """Closes those that have waited longest, whatever for; first the ones without an accepted token.

        A quarter of the room stays with them, so that a newcomer is not closed before its bytes were looked at.
        """
        waiting = [
            connection
            for phase in Phase
            if phase is not Phase.BUSY
            for connection in self.phases[phase]
            if among(connection)
        ]
        lately = time.monotonic() - KNOWN_FOR
        strangers = [connection for connection in waiting if connection.accepted_at < lately]
        if len(strangers) > self._most // 4:
            waiting = strangers
        waiting.sort(key=lambda connection: connection.since)
        for connection in waiting[: max(1, min(MAX_EVICTED, len(waiting) // 8))]:
            connection.cut_off()

    def expire(self) -> None:
        """Ends the connections past their deadline; each phase is sorted by deadline."""
        now = time.monotonic()
        for connections in self.phases.values():
            for connection in list(connections):
                if connection.deadline > now:
                    break
                connection.expire()

    def stop_idle(self) -> None:
        """Shortens the deadline of idle connections, because the worker is stopping."""
        for connection in self.phases[Phase.IDLE]:
            connection.deadline = min(connection.deadline, time.monotonic() + STOPPING_KEEPS)
        self.seconds[Phase.IDLE] = STOPPING_KEEPS


class _Response:
    """The transport that uvicorn's response is written to: collects its parts, to be sent at once."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self.parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.parts.append(data)

    def close(self) -> None:
        self._connection.is_last = True

    def is_closing(self) -> bool:
        return self._connection.transport.is_closing()


class ClientConnection(HttpToolsProtocol):
    """One client; see the module's docstring."""

    def __init__(
        self,
        config: Config,
        server: EdgeServer,
        client_sock: socket.socket,
        client: tuple[str, int] | None,
        peer: Peer,
        user: int | None,
    ) -> None:
        super().__init__(config, server.server_state, {}, asyncio.get_running_loop())
        self.registry = server.clients
        self.api = server.api
        self.client_sock = client_sock
        self.client_address = client
        self.peer, self.user = peer, user
        self.accepted_at = -math.inf  # monotonic seconds when its token was last accepted; set by the application
        self.phase = Phase.ARRIVING
        self.since = self.deadline = 0.0
        self.inbox = bytearray()
        self.is_last = False  # no request may follow the current one
        self.has_ended = False  # the client will send nothing more
        self.requests_as_stranger = 0  # without an accepted token; set by the application
        self.is_connected = False  # False during the handshake of TLS
        self._response = _Response(self)
        self._searched = 0  # bytes of the inbox that contain no end of a head
        self._discarded = 0
        self._reset()

    def _reset(self) -> None:
        """Prepares for the next request."""
        self.url = b""
        self.headers = []
        self.body = bytearray()
        self.cycle = None  # type: ignore[assignment]  # as in uvicorn; there is one while the ASGI callable works
        self._has_head = self._is_whole = False
        self._method = b""
        self._length = 0  # bytes to wait for: the body, or a chunk with its line end
        self._chunked = 0  # bytes of a chunked body until now, with everything around the chunks
        self._is_chunked = self._is_size = False
        self._head_size = 0

    # --- the transport ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called when the client is connected, with TLS after the handshake."""
        self.connections.add(self)
        self.is_connected = True
        self.transport = cast(asyncio.Transport, transport)
        self.flow = FlowControl(self.transport)
        self.server = None
        self.client = self.client_address
        self.scheme = "https" if transport.get_extra_info("sslcontext") else "http"
        # `pause_writing` then says that the client has not taken everything; with TLS it says so from this size on.
        self.transport.set_write_buffer_limits(1 if self.scheme == "https" else 0, 0)
        if self.phase is Phase.LINGERING:  # cut off during the handshake
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.registry.remove(self)

    def data_received(self, data: bytes) -> None:
        if self.phase is Phase.LINGERING:
            self._discarded += len(data)
            if self._discarded > MAX_DISCARDED:
                self.transport.abort()
            return
        self.inbox += data
        if self.phase is Phase.ARRIVING or self.phase is Phase.IDLE:
            self._look()
        elif len(self.inbox) >= RECEIVE_BUFFER:
            self.flow.pause_reading()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Called at the end of the client's side: a request that has arrived is answered before the close."""
        self.has_ended = True
        if self.scheme == "https" or self.phase in (Phase.ARRIVING, Phase.IDLE, Phase.LINGERING):
            return None
        return True

    def resume_writing(self) -> None:
        """Called when the client has taken everything."""
        super().resume_writing()
        if self.phase is Phase.LEAVING:
            self._after_response()

    # --- requests -----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Passes a request to the parser as far as it has arrived."""
        try:
            if not self._has_head:
                self._take_head()
            if self._has_head and not self._is_whole:
                self._take_body()
        except _Refusal as refusal:
            self._refuse(refusal.error)
            return
        if self._is_whole:
            self._begin()
        elif self.inbox and self.phase is Phase.IDLE:
            self.registry.await_phase(self, Phase.ARRIVING)

    def _take_head(self) -> None:
        """Parses the head if it is complete; raises `_Refusal`."""
        inbox = self.inbox
        while inbox.startswith(b"\r\n"):  # RFC 9112, 2.2: empty lines before a request are ignored
            del inbox[:2]
        if inbox.startswith(_TLS_HANDSHAKE):  # https to plain http: the client must not wait for the deadline
            raise _Refusal(_MALFORMED)
        end = inbox.find(_END_OF_HEAD, max(0, self._searched - len(_END_OF_HEAD) + 1))
        if (end if end >= 0 else len(inbox)) > MAX_HEAD:
            raise _Refusal(_HEAD_TOO_LARGE)
        self._searched = 0 if end >= 0 else len(inbox)
        if end < 0:
            return
        line_end = inbox.index(b"\r\n")
        if line_end > MAX_LINE:
            raise _Refusal(_LINE_TOO_LONG)
        match = _REQUEST_LINE.fullmatch(inbox, 0, line_end)
        if match is None:
            raise _Refusal(_MALFORMED)
        self._method = match[1]
        # llhttp knows no LIST and treats CONNECT as the end of HTTP, so it gets the same method for each request.
        head = b"POST" + bytes(inbox[len(self._method) : end + len(_END_OF_HEAD)])
        del match  # a bytearray with a match on it cannot be resized
        del inbox[: end + len(_END_OF_HEAD)]
        # An offer of another protocol, which a server may ignore (RFC 9110, 7.8), would cost the request its body.
        self._feed(_UPGRADE.sub(b"\r\nx-upgrade:", head))
        if not self._has_head:
            raise _Refusal(_MALFORMED)

    def _take_body(self) -> None:
        """Parses the body as far as it has arrived; raises `_Refusal`."""
        if self._is_chunked:
            self._take_chunks()
        elif len(self.inbox) >= self._length:
            self._feed(self._take(self._length))
            if not self._is_whole:
                raise _Refusal(_MALFORMED)

    def _take_chunks(self) -> None:
        """Parses each chunk, and each line between and after them, as far as they have arrived; raises `_Refusal`."""
        while not self._is_whole:
            if self._length:
                if len(self.inbox) < self._length:
                    return
                self._feed(self._take(self._length))
                self._length = 0
                continue
            end = self.inbox.find(b"\n", self._searched)
            if (end if end >= 0 else len(self.inbox)) > MAX_LINE:
                raise _Refusal(_MALFORMED)
            self._searched = 0 if end >= 0 else len(self.inbox)
            if end < 0:
                return
            self._is_size = False
            line = self._take(end + 1)
            self._feed(line)
            if self._is_size and (size := int(line.partition(b";")[0], 16)):
                if size > MAX_BODY:
                    raise _Refusal(body_too_large())
                self._length = size + 2  # with its line end

    def _take(self, size: int) -> bytes:
        """The first bytes of the inbox, which are removed."""
        taken = bytes(self.inbox[:size])
        del self.inbox[:size]
        if self._is_chunked:
            self._chunked += size
            if self._chunked > MAX_CHUNKED:
                raise _Refusal(body_too_large())
        return taken

    def _feed(self, data: bytes) -> None:
        """Gives bytes of one request to the parser; raises `_Refusal`."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            cause = error.__context__
            raise _Refusal(cause.error if isinstance(cause, _Refusal) else _MALFORMED) from None

    # --- callbacks of the parser --------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._is_whole:
            raise _Refusal(_MALFORMED)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called with each field, also of trailers, which are dropped (RFC 9110, 6.5.1)."""
        self._head_size += 1
        if len(name) + len(value) > MAX_FIELD or self._head_size > MAX_FIELDS:
            raise _Refusal(_HEAD_TOO_LARGE)
        if not self._has_head:
            self.headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        version = self.parser.get_http_version()
        framing: dict[bytes, bytes] = {}
        for name, value in self.headers:
            if name in _SINGLE:
                if name in framing:
                    raise _Refusal(_MALFORMED)
                framing[name] = value
        if version == "1.1" and b"host" not in framing:
            raise _Refusal(_MALFORMED)
        if (coding := framing.get(b"transfer-encoding")) is not None:
            if coding.lower() != b"chunked" or b"content-length" in framing or version != "1.1":
                raise _Refusal(_MALFORMED)
            self._is_chunked = True
        elif (length := framing.get(b"content-length")) is not None:
            if not length.isdigit():
                raise _Refusal(_MALFORMED)
            if len(length) > _MAX_DIGITS or int(length) > MAX_BODY:
                raise _Refusal(body_too_large())
            self._length = int(length)
        if (expected := framing.get(b"expect")) is not None and expected.lower() != b"100-continue":
            raise _Refusal(_MALFORMED)
        self._fill_scope(version)
        self._has_head = True
        if version != "1.1" or not self.parser.should_keep_alive():
            self.is_last = True
        if expected is not None and version == "1.1" and not self.inbox and (self._length or self._is_chunked):
            self.transport.write(_CONTINUE)

    def _fill_scope(self, version: str) -> None:
        """Makes the scope of the request (see the ASGI specification); raises `_Refusal`."""
        target = self.url
        if target.startswith(b"/") or target == b"*":
            path, _, query = target.partition(b"?")
        else:  # RFC 9112, 3.2.2: a whole address
            address = httptools.parse_url(target)
            if address.schema not in (b"http", b"https"):
                raise _Refusal(_MALFORMED)
            path, query = address.path or b"/", address.query or b""
        if b"#" in target:
            raise _Refusal(_MALFORMED)
        self.scope = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": version,
            "server": None,
            "client": self.client,
            "scheme": self.scheme or "http",
            "root_path": "",
            "headers": self.headers,
            "method": self._method.decode(),
            "raw_path": path,
            "path": path.decode(),  # with its escapes: this application decodes them itself
            "query_string": query,
            "extensions": {"signer": {"connection": self}},
        }

    def on_chunk_header(self) -> None:
        """Called at the end of the line with a chunk's size."""
        self._is_size = True

    def on_body(self, body: bytes) -> None:
        self.body += body
        if len(self.body) > MAX_BODY:
            raise _Refusal(body_too_large())

    def on_message_complete(self) -> None:
        self._is_whole = True

    # --- responses ----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Passes the whole request to the application."""
        self.registry.await_phase(self, Phase.BUSY)
        if self.api.sign_at_once(self.scope, bytes(self.body), self):
            return
        self.cycle = RequestResponseCycle(
            scope=self.scope,
            transport=cast(asyncio.Transport, self._response),
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=not self.is_last,
            on_response=self.on_response_complete,
        )
        self.cycle.body = self.body
        self.cycle.more_body = False
        self.cycle.message_event.set()
        self._start_asgi_task(self.cycle, self.app)

    def respond(self, scope: Mapping[str, Any], response: HttpResponse) -> None:
        """Sends the response to a request that `sign_at_once` took; does nothing if that request has ended."""
        if scope is self.scope and not self.transport.is_closing() and self.phase is Phase.BUSY:
            self._send(render_response(response, self.server_state.default_headers, is_last=self.is_last))

    def on_response_complete(self) -> None:
        """Called when the ASGI callable has given the last part of its response."""
        if not self.transport.is_closing() and self.phase is Phase.BUSY:
            data = b"".join(self._response.parts)
            self._response.parts.clear()
            self._send(data)

    def _send(self, data: bytes) -> None:
        """Sends the whole response."""
        self.transport.write(data)
        if self.flow.write_paused:
            self.registry.await_phase(self, Phase.LEAVING)
        else:
            self._after_response()

    def _after_response(self) -> None:
        """The client has the response: waits for the next request, or ends the connection."""
        if self.is_last or (self.has_ended and not self.inbox):
            self._linger()
            return
        self._reset()
        self.registry.await_phase(self, Phase.IDLE)
        self.flow.resume_reading()
        if self.inbox:
            self._look()
            if self.has_ended and self.phase in (Phase.ARRIVING, Phase.IDLE):
                self.transport.close()

    def _refuse(self, error: SignerError) -> None:
        """Sends the refusal as the last response."""
        self.is_last = True
        if self.cycle is not None:
            self.cycle.disconnected = True  # an application that still works on its response stops
            self.cycle.message_event.set()
        self._response.parts.clear()
        request_id = new_request_id()
        self.registry.lines.warn(error.code, f"request {request_id} was refused: {error.code}")
        is_vaults = self.url.startswith(b"/v1/")
        self.transport.write(render_refusal(error, request_id, is_vaults=is_vaults))
        if self.flow.write_paused:
            self.registry.await_phase(self, Phase.LEAVING)
        else:
            self._linger()

    def _linger(self) -> None:
        """Lets the client read the response: a close with unread bytes resets the connection (RFC 9112, 9.6)."""
        self.inbox.clear()
        if self.has_ended:
            self.transport.close()
            return
        self.registry.await_phase(self, Phase.LINGERING)
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    # --- the end ------------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """Ends the connection, because its deadline is over; a client that has begun a request is told."""
        if self.phase is Phase.ARRIVING and self.is_connected and (self.inbox or self._has_head):
            self._refuse(_TOO_SLOW)
        else:
            self.cut_off()

    def cut_off(self) -> None:
        """Closes the connection now, whatever is still to be sent."""
        self.registry.remove(self)
        self.phase = Phase.LINGERING
        if self.is_connected:
            self.transport.abort()
            return
        with contextlib.suppress(OSError):  # already reset
            self.client_sock.shutdown(socket.SHUT_RDWR)  # ends the handshake of TLS

    def shutdown(self) -> None:
        """Called when the worker stops: no request may follow the current one."""
        if self.phase is Phase.BUSY:
            self.is_last = True
            if self.cycle is not None:
                self.cycle.keep_alive = False
        elif self.phase is Phase.ARRIVING:
            self.is_last = True

    def give_up(self) -> None:
        """Called when a stopping worker waits no longer."""
        if self.phase is Phase.BUSY:
            self._refuse(_STOPPING)
        else:
            self.cut_off()


class Api(Protocol):
    """What the server asks of the application, besides to answer requests."""

    lines: LogLimit

    def sign_at_once(self, scope: Mapping[str, Any], body: bytes, connection: Any) -> bool: ...
    def is_proxy(self, address: str) -> bool: ...
    def is_proxy_user(self, user: int) -> bool: ...
    def chores(self) -> None: ...


class EdgeServer(Server):
    """uvicorn's server with its own way to accept, to check deadlines and to stop."""

    def __init__(
        self, config: Config, clients: Connections, api: Api, note_started: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(config)
        self._note_started = note_started
        self.clients = clients
        self.api = api
        self._handshakes: set[asyncio.Task[None]] = set()
        self._parent = os.getppid()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens on the sockets of the arbiter."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._report)
        for listener in sockets or []:
            loop.add_reader(listener.fileno(), self._accept, listener)
        self.started = True
        self._note_started()

    def _report(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Exception) and not isinstance(error, OSError):
            self.clients.lines.fault("internal error in the event loop", error)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                client_sock, client = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # already closed, or out of descriptors
                self.clients.lines.warn("connection not accepted", f"a connection was not accepted: {error.strerror}")
                self.clients.make_room()
                return
            self._adopt(client_sock, client)

    def _adopt(self, client_sock: socket.socket, client: Any) -> None:
        client_sock.setblocking(False)
        client_sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        client_sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        user: int | None = None
        address: tuple[str, int] | None = None
        peer: Peer
        if client_sock.family == socket.AF_UNIX:
            user = peer_process(client_sock).uid
            peer = None if self.api.is_proxy_user(user) else user
        else:
            client_sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            address = (str(client[0]), int(client[1]))
            peer = None if self.api.is_proxy(address[0]) else peer_of(address[0])
        connection = ClientConnection(self.config, self, client_sock, address, peer, user)
        self.clients.add(connection)
        task = asyncio.get_running_loop().create_task(self._connect(connection))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _connect(self, connection: ClientConnection) -> None:
        # A client of a unix socket has no name to look for in a certificate, and speaks no TLS.
        context = None if connection.client_sock.family == socket.AF_UNIX else self.config.ssl
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                connection.client_sock,
                ssl=context,
                ssl_handshake_timeout=None if context is None else ARRIVES_WITHIN,
                ssl_shutdown_timeout=None if context is None else LINGERS,
            )
        except OSError:  # the client is gone, or its handshake failed
            connection.client_sock.close()
            self.clients.remove(connection)

    async def on_tick(self, counter: int) -> bool:
        """Called every `CHORES_EVERY` seconds."""
        self.chores()
        if os.getppid() != self._parent:  # the arbiter was killed
            self.should_exit = True
        return await super().on_tick(counter)

    def chores(self) -> None:
        self.clients.expire()
        self.api.chores()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers the requests in transit, refuses those that wait too long, and ends."""
        for listener in sockets or []:
            asyncio.get_running_loop().remove_reader(listener.fileno())
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        self.clients.stop_idle()
        deadline = time.monotonic() + STOPS_WITHIN
        while len(self.clients) and time.monotonic() < deadline:
            await asyncio.sleep(CHORES_EVERY / 5)
            self.chores()
        for phase in self.clients.phases.values():
            for client in list(phase):
                client.give_up()
        await asyncio.sleep(CHORES_EVERY / 5)  # for the refusals


def make_config(app: Any, **more: Any) -> Config:
    """uvicorn's configuration for the callable `app`."""
    return Config(
        app,
        interface="asgi3",
        loop="uvloop",
        http=ClientConnection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        **more,
    )


class EdgeWorker(UvicornWorker):  # type: ignore[misc]
    """gunicorn's worker with `EdgeServer`."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.config = make_config(
            None,  # the arbiter loads it later
            timeout_notify=int(self.timeout),
            callback_notify=self.callback_notify,
            ssl_context_factory=None if self.app.tls is None else self._tls,
        )

    def _tls(self, _config: Config, _default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        """The context that the arbiter made: a worker reads no file, which may be half of a renewal."""
        context: ssl.SSLContext = self.app.tls
        return context

    def _note_started(self) -> None:
        self.app.supervisor.ready()
        self.app.supervisor.leave()

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        most = _connections(self.cfg.worker_connections, self.cfg.threads)
        clients = Connections(most, self.cfg.keepalive, self.wsgi.lines)
        server = EdgeServer(self.config, clients, self.wsgi, self._note_started)
        self._install_sigquit_handler()
        await server.serve(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)


def _connections(wanted: int, threads: int) -> int:
    """Maximum number of clients: as configured, or fewer if the descriptor limit is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + threads + SPARE_DESCRIPTORS
    if soft < needed:
        soft = min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(min(wanted, soft - threads - SPARE_DESCRIPTORS), threads + 1)


_SINGLE: Final = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect"})
_TOO_SLOW: Final = BadRequest(
    "request_too_slow", f"the request did not arrive within {ARRIVES_WITHIN:.0f} s", "send the whole request at once"
)
_HEAD_TOO_LARGE: Final = BadRequest("head_too_large", "the request's head is too large", "send fewer or shorter fields")
_LINE_TOO_LONG: Final = BadRequest("line_too_long", "the request line is too long", "send a shorter path or query")
_MALFORMED: Final = BadRequest("request_malformed", "the request is not valid HTTP/1.1 (RFC 9112)", "fix the client")
_STOPPING: Final = Unavailable("keeper_gone", "the service stops", "retry in a second")
