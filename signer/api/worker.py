"""gunicorn's threaded worker, made patient: a thread is given to whole requests only, and never waits for a client.

gunicorn 27's own gives a new connection to a thread at once, and a client that sends or reads slowly keeps that
thread; as many half-open clients as there are threads stop everybody. Here the main loop gathers requests and
delivers answers without blocking, for TCP, unix sockets and TLS alike; a thread sees bytes that are already there.
Deadlines end what takes too long, and at the limit of connections the longest waiting one makes room.
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

from signer.api.connection import Connection, Mailbox, Phase, Watch, freeze_settings
from signer.api.framing import Arrival
from signer.api.lane import AsyncKeeperClient, Outcome
from signer.api.problems import render_problem
from signer.api.request import new_request_id
from signer.api.sign import SignQuestion, SignRoutes, read_environ, render_answer
from signer.errors import BadRequest, SignerError, Unavailable
from signer.protocol.log_limit import LogLimit

ARRIVES_WITHIN: Final = 10.0  # seconds from a request's first byte (a connection's start) to its last
TAKEN_WITHIN: Final = 10.0  # seconds for a client to take an answer
LINGERS: Final = 1.0  # seconds in which a refused client may still be sending, so that it can read the refusal
STOPPING_KEEPS: Final = 0.3  # seconds that a stopping worker keeps idle connections: a request may be on its way
CHORES_EVERY: Final = 0.1  # seconds from one look at the deadlines to the next; rounds of the loop may be many more
SPARE_DESCRIPTORS: Final = 64  # besides clients and the threads' connections to the keeper
SEND_BUFFER: Final = 128 * 1024  # bytes for most answers whole; the kernel would keep megabytes for a slow reader
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


def refusal(error: SignerError, request_id: str = "") -> bytes:
    """An answer of ours where no application sees the request: a problem, with Vault's list of errors beside it."""
    status, headers, body = render_problem(error, request_id or new_request_id())
    body = json.dumps(json.loads(body) | {"errors": [error.text]}).encode() + b"\n"
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class PatientWorker(ThreadWorker):  # type: ignore[misc]
    """See the module's text. Counting, accepting, stopping and the HTTP parser are gunicorn's."""

    poller: Any

    @cached_property
    def lines(self) -> LogLimit:
        """What is logged of requests."""
        return LogLimit(self.log)

    def init_process(self) -> None:
        """Once, after the fork."""
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
        """gunicorn's loop, on our way of watching."""
        self.poller.close()
        self.poller = Watch()
        self.routes: SignRoutes = self.wsgi
        self.lane = AsyncKeeperClient(self.routes.link.path, self.poller, self.method_queue.defer)
        super().run()
        for phase in Phase:
            for connection in list(self.waiting[phase]):
                connection.close()

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """One round of the loop."""
        self.poller.dispatch(timeout if self.alive else min(timeout, STOPPING_KEEPS / 3))
        self.lane.expire()

    # --- connections come and go --------------------------------------------------------------------------------

    def accept(self, listener: Any) -> None:
        """Takes a new connection, at the limit in the place of the one that has waited longest."""
        try:
            client_sock, client = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # gone again, or descriptors are short: the others go on
            self.lines.warn("connection not accepted", f"a connection was not accepted: {error.strerror}")
            self._evict()
            return
        client_sock.setblocking(False)
        client_sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if self.tls is not None:
            try:
                client_sock = self.tls.wrap_socket(client_sock, server_side=True, do_handshake_on_connect=False)
            except OSError:  # reset before it began
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
        """Ends the longest waiting connection of the more crowded kind: idle ones, or those half there."""
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
        """Tells the arbiter that we live: not in each round, because it is a system call."""
        now = time.monotonic()
        if now >= self.next_sign_of_life:
            self.next_sign_of_life = now + CHORES_EVERY
            super().notify()

    def murder_pending(self) -> None:
        """Ends what has waited too long; each phase is in the order of its deadlines."""
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
        """The worker is stopping: idle connections go soon."""
        for connection in self.waiting[Phase.IDLE]:
            connection.deadline = min(connection.deadline, time.monotonic() + STOPPING_KEEPS)

    # --- requests come, answers go ------------------------------------------------------------------------------

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
        """Hands a whole request to a thread, waits for the rest of one, or sees that there will be none."""
        arrival = connection.framing.look(connection.inbox) if connection.inbox else Arrival.PART
        if arrival is Arrival.PART:
            if connection.has_ended:
                self._end(connection)
            elif connection.inbox and connection.phase is Phase.IDLE:
                self._await(connection, Phase.ARRIVING)
            if connection.framing.expects_continue and not connection.told_to_continue:
                connection.told_to_continue = True
                with contextlib.suppress(OSError):  # the client is gone, or waits for nothing: its deadline knows
                    connection.channel.send(_CONTINUE)
        elif arrival is Arrival.HEAD_TOO_LARGE:
            self._refuse(connection, _HEAD_TOO_LARGE)
        elif arrival is Arrival.BROKEN:
            self._refuse(connection, _MALFORMED)
        else:
            connection.is_last = arrival is not Arrival.WHOLE
            connection.take_request()
            self._await(connection, Phase.BUSY)
            if self.routes.begins_like_one(connection.sock.request):
                self._sign(connection)
            else:
                self.tpool.submit(self._answer, connection)

    def _sign(self, connection: Connection) -> None:
        """Asks the keeper without a thread, which would cost as much as all the rest."""
        try:
            request = next(connection.parser)
            if connection.is_last or not self.alive:
                request.force_close()
            question = self.routes.question(read_environ(request, connection.client))
            if question is None:
                raise http.errors.InvalidRequestLine(request.path)  # two readings of one line: nobody is served
        except Exception as error:  # noqa: BLE001 - as gunicorn's `handle`: whatever it is, this client hears of it
            self._fail(connection, error)
            return
        if question.fault is not None:
            self.method_queue.defer(self._signed, connection, request, question, question.fault)
        else:
            self.lane.ask(question.message(), partial(self._signed, connection, request, question))

    def _signed(self, connection: Connection, request: Any, question: SignQuestion, outcome: Outcome) -> None:
        try:
            keep = self._keepalive_after(connection, not request.should_close()) and not connection.has_leftovers()
            connection.sock.sendall(render_answer(question.answer(outcome), request.version, keep))
        except Exception as error:  # noqa: BLE001
            self._fail(connection, error)
            return
        self._on_answered(connection, keep)

    def _fail(self, connection: Connection, error: Exception) -> None:
        connection.sock.answer.clear()
        self.handle_error(None, connection.sock, connection.client, error)
        self._on_answered(connection, keep=False)

    def _answer(self, connection: Connection) -> None:
        """In a thread: lets gunicorn and the application answer, sends what goes at once, reports back."""
        keep = False
        try:
            keep = self.handle(connection) and not connection.is_last
            if not connection.sock.answer:  # gunicorn found no request in what framing took for one
                self.handle_error(None, connection.sock, connection.client, http.errors.NoMoreData())
            keep = keep and not connection.has_leftovers()
            connection.deliver()
        except OSError:
            connection.sock.answer.clear()
            keep = False
        finally:
            self.method_queue.defer(self._on_answered, connection, keep)

    def handle_request(self, req: Any, conn: Connection) -> Any:
        """As gunicorn's, with `Connection: close` in the answer when no other request can follow."""
        if conn.is_last:
            req.force_close()
        try:
            return super().handle_request(req, conn)
        except OSError as error:  # the application's: no socket is behind a mailbox
            self.handle_error(req, conn.sock, conn.client, error)
            return False

    def handle_error(self, _req: Any, client: Mailbox, _addr: Any, exc: BaseException) -> None:
        """A request that is no HTTP, in our words; gunicorn's would log and echo what the client sent, tokens too."""
        request_id = new_request_id()
        if isinstance(exc, _THEIRS) and not isinstance(exc, _OURS):
            self.lines.warn(type(exc).__name__, f"request {request_id} was refused: {type(exc).__name__}")
            error: SignerError = _MALFORMED
            if isinstance(exc, http.errors.LimitRequestLine):
                error = _LINE_TOO_LONG
            elif isinstance(exc, http.errors.LimitRequestHeaders):
                error = _HEAD_TOO_LARGE
        else:
            self.lines.fault(f"request {request_id} failed", exc)
            error = Unavailable(
                "internal_error", "something went wrong here", f"look for {request_id} in the service's log"
            )
        client.answer[:] = refusal(error, request_id)

    def _refuse(self, connection: Connection, error: SignerError) -> None:
        connection.sock.sendall(refusal(error))
        connection.is_last = True
        self._leave(connection)

    def _on_answered(self, connection: Connection, keep: bool) -> None:
        connection.is_last = not keep
        self._leave(connection)

    def _leave(self, connection: Connection) -> None:
        """Delivers what is left of the answer; then the next request, or the end."""
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
        """RFC 9112, section 9.6: closing with bytes unread would reset the connection and take our answer with it."""
        try:
            connection.channel.shutdown(socket.SHUT_WR)
        except OSError:
            self._end(connection)
            return
        self._await(connection, Phase.LINGERING)
        self._on_event(connection)


def _connections(wanted: int, threads: int) -> int:
    """How many clients at once: as configured, or as many as the limit of descriptors allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + threads + SPARE_DESCRIPTORS
    if soft < needed:
        soft = min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(min(wanted, soft - threads - SPARE_DESCRIPTORS), threads + 1)


# What a client's bytes can cause; gunicorn's parser waits for more, or ends, where the C parser sees no request yet.
_THEIRS: Final = (http.errors.ParseException, http.errors.NoMoreData, StopIteration)
_OURS: Final = (http.errors.InvalidResponseHeader, http.errors.InvalidResponseHeaderName)
_TOO_SLOW: Final = BadRequest(
    "request_too_slow", f"the request did not arrive within {ARRIVES_WITHIN:.0f} s", "send it in one go"
)
_HEAD_TOO_LARGE: Final = BadRequest("head_too_large", "the request's head is too large", "send fewer or shorter fields")
_LINE_TOO_LONG: Final = BadRequest("line_too_long", "the request line is too long", "send a shorter path or query")
_MALFORMED: Final = BadRequest("request_malformed", "the request is not HTTP/1.1 as RFC 9112 has it", "mend the client")
