"""gunicorn's threaded worker with a main loop that reads and writes: a thread never waits for a client.

gunicorn 27's own worker gives each new connection to a thread, and a slow client occupies that thread; as many slow
clients as threads block all others. Here the main loop reads requests and sends responses without blocking, for TCP,
unix sockets and TLS; a thread gets only complete requests. Deadlines end slow connections, and at the limit of
connections the one that has waited longest is closed.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import socket
import time
from collections import OrderedDict
from functools import cached_property, partial
from typing import Any, Final

from gunicorn import http, sock
from gunicorn.workers.gthread import ThreadWorker

from signer.api.connection import Connection, EventPoller, Mailbox, Phase, freeze_settings
from signer.api.framing import Arrival
from signer.api.lane import AsyncKeeperClient, Outcome
from signer.api.problems import render_problem
from signer.api.request import new_request_id
from signer.api.sign import SignCall, SignRoutes, read_environ, render_response
from signer.errors import BadRequest, SignerError, Unavailable
from signer.protocol.log_limit import LogLimit

ARRIVES_WITHIN: Final = 10.0  # seconds from a request's first byte (a connection's start) to its last
TAKEN_WITHIN: Final = 10.0  # seconds for a client to read a response
LINGERS: Final = 1.0  # seconds in which a refused client may still send, so that it can read the refusal
STOPPING_KEEPS: Final = 0.3  # seconds that a stopping worker keeps idle connections, for requests in transit
CHORES_EVERY: Final = 0.1  # seconds between two checks of the deadlines; the loop runs more often
SPARE_DESCRIPTORS: Final = 64  # in addition to clients and connections to the keeper
SEND_BUFFER: Final = 128 * 1024  # bytes; fits most responses, where the kernel would buffer megabytes for a slow reader
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


def render_refusal(error: SignerError, request_id: str = "") -> bytes:
    """The response for a request that no application sees: a problem that also has Vault's list of errors."""
    status, headers, body = render_problem(error, request_id or new_request_id())
    body = json.dumps(json.loads(body) | {"errors": [error.text]}).encode() + b"\n"
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class PatientWorker(ThreadWorker):  # type: ignore[misc]
    """See the module's docstring. Counting, accepting, stopping and the HTTP parser are gunicorn's."""

    poller: Any

    @cached_property
    def lines(self) -> LogLimit:
        """The rate-limited log of requests."""
        return LogLimit(self.log)

    def init_process(self) -> None:
        """Initialises the worker; called once, after the fork."""
        self.waiting: dict[Phase, OrderedDict[Connection, None]] = {phase: OrderedDict() for phase in Phase}
        self.server_names: dict[Any, Any] = {}
        self.settings = freeze_settings(self.cfg)
        self.next_sign_of_life = self.next_look = 0.0
        self.tls = sock.ssl_context(self.cfg) if self.cfg.is_ssl else None
        self.worker_connections = _connections(self.cfg.worker_connections, self.cfg.threads)
        self.max_keepalived = self.worker_connections
        self.seconds = {
            Phase.ARRIVING: ARRIVES_WITHIN,
            Phase.IDLE: self.cfg.keepalive,
            Phase.BUSY: math.inf,
            Phase.LEAVING: TAKEN_WITHIN,
            Phase.LINGERING: LINGERS,
        }
        super().init_process()

    def run(self) -> None:
        """Runs gunicorn's loop with `EventPoller`."""
        self.poller.close()
        self.poller = EventPoller()
        self.routes: SignRoutes = self.wsgi
        self.keeper = AsyncKeeperClient(self.routes.keeper.path, self.poller, self.method_queue.defer)
        super().run()
        for phase in Phase:
            for connection in list(self.waiting[phase]):
                connection.close()

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """Runs one round of the loop."""
        self.poller.dispatch(timeout if self.alive else min(timeout, STOPPING_KEEPS / 3))
        self.keeper.expire()

    # --- connections --------------------------------------------------------------------------------------------

    def accept(self, listener: Any) -> None:
        """Accepts a connection; at the limit, closes the one that has waited longest."""
        try:
            client_sock, client = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # already closed, or out of descriptors
            self.lines.warn("connection not accepted", f"a connection was not accepted: {error.strerror}")
            self._evict()
            return
        client_sock.setblocking(False)
        client_sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if self.tls is not None:
            try:
                client_sock = self.tls.wrap_socket(client_sock, server_side=True, do_handshake_on_connect=False)
            except OSError:  # already reset
                client_sock.close()
                return
        if listener not in self.server_names:
            self.server_names[listener] = listener.getsockname()
        connection = Connection(self.settings, client_sock, client, self.server_names[listener])
        self.nr_conns += 1
        self._await(connection, Phase.ARRIVING)
        self.poller.follow(connection, self._on_event)
        if self.nr_conns >= self.worker_connections:
            self._evict()

    def _evict(self) -> None:
        """Closes the connection that has waited longest among the idle or the arriving ones, whichever are more."""
        crowd = max((self.waiting[Phase.ARRIVING], self.waiting[Phase.IDLE]), key=len)
        if crowd:
            self._end(next(iter(crowd)))

    def _await(self, connection: Connection, phase: Phase) -> None:
        self.waiting[connection.phase].pop(connection, None)
        connection.phase = phase
        connection.deadline = time.monotonic() + self.seconds[phase]
        self.waiting[phase][connection] = None

    def _end(self, connection: Connection) -> None:
        self.waiting[connection.phase].pop(connection, None)
        self.poller.forget(connection)
        connection.close()
        self.nr_conns -= 1

    def notify(self) -> None:
        """Sends the heartbeat to the arbiter; not in each round, because it is a system call."""
        now = time.monotonic()
        if now >= self.next_sign_of_life:
            self.next_sign_of_life = now + CHORES_EVERY
            super().notify()

    def murder_pending(self) -> None:
        """Ends connections past their deadline; each phase is sorted by deadline."""
        now = time.monotonic()
        if now < self.next_look:
            return
        self.next_look = now + CHORES_EVERY
        self.lines.flush()
        self.routes.lines.flush()
        for phase in Phase:
            for connection in list(self.waiting[phase]):
                if connection.deadline > now:
                    break
                if phase is Phase.ARRIVING and connection.inbox:
                    self._refuse(connection, _TOO_SLOW)
                else:
                    self._end(connection)

    def _cap_keepalive(self, _deadline: float) -> None:
        """Shortens the deadline of idle connections, because the worker is stopping."""
        for connection in self.waiting[Phase.IDLE]:
            connection.deadline = min(connection.deadline, time.monotonic() + STOPPING_KEEPS)

    # --- requests and responses ---------------------------------------------------------------------------------

    def _on_event(self, connection: Connection) -> None:
        match connection.phase:
            case Phase.ARRIVING | Phase.IDLE:
                connection.gather()
                self._look(connection)
            case Phase.BUSY:
                connection.is_readable = True
            case Phase.LEAVING:
                connection.is_readable = True
                self._leave(connection)
            case Phase.LINGERING:
                if not connection.discard():
                    self._end(connection)

    def _look(self, connection: Connection) -> None:
        """Handles a complete request, waits for the rest of one, or ends the connection."""
        arrival = connection.framing.look(connection.inbox) if connection.inbox else Arrival.PART
        if arrival is Arrival.PART:
            if connection.has_ended:
                self._end(connection)
            elif connection.inbox and connection.phase is Phase.IDLE:
                self._await(connection, Phase.ARRIVING)
            if connection.framing.expects_continue and not connection.has_sent_continue:
                connection.has_sent_continue = True
                with contextlib.suppress(OSError):  # the client is gone; its deadline ends the connection
                    connection.channel.send(_CONTINUE)
        elif arrival is Arrival.HEAD_TOO_LARGE:
            self._refuse(connection, _HEAD_TOO_LARGE)
        elif arrival is Arrival.BROKEN:
            self._refuse(connection, _MALFORMED)
        else:
            connection.is_last = arrival is not Arrival.WHOLE
            connection.take_request()
            self._await(connection, Phase.BUSY)
            if self.routes.is_sign_request(connection.sock.request):
                self._sign(connection)
            else:
                self.tpool.submit(self._answer, connection)

    def _sign(self, connection: Connection) -> None:
        """Sends a sign request to the keeper without a thread, which would cost as much as everything else."""
        try:
            request = next(connection.parser)
            if connection.is_last or not self.alive:
                request.force_close()
            call = self.routes.sign_call(read_environ(request, connection.client))
            if call is None:
                raise http.errors.InvalidRequestLine(request.path)  # the two parsers disagree: refuse
        except Exception as error:  # noqa: BLE001 - as gunicorn's `handle`: the client gets a response for every error
            self._fail(connection, error)
            return
        if call.error is not None:
            self.method_queue.defer(self._signed, connection, request, call, call.error)
        else:
            self.keeper.ask(call.message(), partial(self._signed, connection, request, call))

    def _signed(self, connection: Connection, request: Any, call: SignCall, outcome: Outcome) -> None:
        try:
            keep = self._keepalive_after(connection, not request.should_close()) and not connection.has_leftovers()
            connection.sock.sendall(render_response(call.response(outcome), request.version, keep))
        except Exception as error:  # noqa: BLE001
            self._fail(connection, error)
            return
        self._on_answered(connection, keep)

    def _fail(self, connection: Connection, error: Exception) -> None:
        connection.sock.response.clear()
        self.handle_error(None, connection.sock, connection.client, error)
        self._on_answered(connection, keep=False)

    def _answer(self, connection: Connection) -> None:
        """In a thread: lets gunicorn and the application handle the request, sends what the client takes now."""
        keep = False
        try:
            keep = self.handle(connection) and not connection.is_last
            if not connection.sock.response:  # gunicorn found no request in the framed bytes
                self.handle_error(None, connection.sock, connection.client, http.errors.NoMoreData())
            keep = keep and not connection.has_leftovers()
            connection.deliver()
        except OSError:
            connection.sock.response.clear()
            keep = False
        finally:
            self.method_queue.defer(self._on_answered, connection, keep)

    def handle_request(self, req: Any, conn: Connection) -> Any:
        """As in gunicorn, with `Connection: close` in the response if no other request can follow."""
        if conn.is_last:
            req.force_close()
        try:
            return super().handle_request(req, conn)
        except OSError as error:  # from the application: a mailbox has no socket
            self.handle_error(req, conn.sock, conn.client, error)
            return False

    def handle_error(self, _req: Any, client: Mailbox, _addr: Any, exc: BaseException) -> None:
        """Responds to an invalid request. gunicorn's own version logs and echoes the client's bytes, with tokens."""
        request_id = new_request_id()
        if isinstance(exc, _CLIENT_ERRORS) and not isinstance(exc, _SERVER_ERRORS):
            self.lines.warn(type(exc).__name__, f"request {request_id} was refused: {type(exc).__name__}")
            error: SignerError = _MALFORMED
            if isinstance(exc, http.errors.LimitRequestLine):
                error = _LINE_TOO_LONG
            elif isinstance(exc, http.errors.LimitRequestHeaders):
                error = _HEAD_TOO_LARGE
        else:
            self.lines.fault(f"request {request_id} failed", exc)
            error = Unavailable("internal_error", "internal error", f"look for {request_id} in the service's log")
        client.response[:] = render_refusal(error, request_id)

    def _refuse(self, connection: Connection, error: SignerError) -> None:
        connection.sock.sendall(render_refusal(error))
        connection.is_last = True
        self._leave(connection)

    def _on_answered(self, connection: Connection, keep: bool) -> None:
        connection.is_last = not keep
        self._leave(connection)

    def _leave(self, connection: Connection) -> None:
        """Sends the rest of the response, then waits for the next request or ends the connection."""
        try:
            done = connection.deliver()
        except OSError:
            self._end(connection)
            return
        if not done:
            if connection.phase is not Phase.LEAVING:
                self._await(connection, Phase.LEAVING)
                self.poller.expect_room(connection)
        elif connection.is_last:
            self._linger(connection)
        else:
            self._await(connection, Phase.IDLE)
            if connection.is_readable:
                connection.gather()
            self._look(connection)

    def _linger(self, connection: Connection) -> None:
        """Lets the client read the response: a close with unread bytes resets the connection (RFC 9112, 9.6)."""
        try:
            connection.channel.shutdown(socket.SHUT_WR)
        except OSError:
            self._end(connection)
            return
        self._await(connection, Phase.LINGERING)
        self._on_event(connection)


def _connections(wanted: int, threads: int) -> int:
    """Maximum number of clients: as configured, or fewer if the descriptor limit is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + threads + SPARE_DESCRIPTORS
    if soft < needed:
        soft = min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(min(wanted, soft - threads - SPARE_DESCRIPTORS), threads + 1)


# Errors that a client's bytes can cause; the last two when the C parser finds no complete request.
_CLIENT_ERRORS: Final = (http.errors.ParseException, http.errors.NoMoreData, StopIteration)
_SERVER_ERRORS: Final = (http.errors.InvalidResponseHeader, http.errors.InvalidResponseHeaderName)
_TOO_SLOW: Final = BadRequest(
    "request_too_slow", f"the request did not arrive within {ARRIVES_WITHIN:.0f} s", "send the whole request at once"
)
_HEAD_TOO_LARGE: Final = BadRequest("head_too_large", "the request's head is too large", "send fewer or shorter fields")
_LINE_TOO_LONG: Final = BadRequest("line_too_long", "the request line is too long", "send a shorter path or query")
_MALFORMED: Final = BadRequest("request_malformed", "the request is not valid HTTP/1.1 (RFC 9112)", "fix the client")
