"""gunicorn's threaded worker, made patient: a thread is given to whole requests only, and never waits for a client.

gunicorn 27's own gives a new connection to a thread at once, and a client that sends or reads slowly keeps that
thread; as many half-open clients as there are threads stop everybody. Here the main loop gathers requests and
delivers answers without blocking, for TCP, unix sockets and TLS alike; a thread sees bytes that are already there.
Deadlines end what takes too long, and at the limit of connections the longest waiting one makes room.
"""

from __future__ import annotations

import contextlib
import json
import resource
import select
import socket
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from http import HTTPStatus
from typing import Any, Final

from gunicorn import http, sock
from gunicorn.workers.gthread import ThreadWorker

from signer.api.framing import Arrival, Framing
from signer.api.problems import render_problem
from signer.errors import BadRequest, SignerError, Unavailable

ARRIVES_WITHIN: Final = 10.0  # seconds from a request's first byte (a connection's start) to its last
TAKEN_WITHIN: Final = 10.0  # seconds for a client to take an answer
LINGERS: Final = 1.0  # seconds in which a refused client may still be sending, so that it can read the refusal
STOPPING_KEEPS: Final = 0.3  # seconds that a stopping worker keeps idle connections: a request may be on its way
SPARE_DESCRIPTORS: Final = 64  # besides clients and the threads' connections to the keeper
_READ: Final = 64 * 1024
_EDGES: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_NOT_NOW: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Phase(Enum):
    """What a connection is waiting for, and for how many seconds at most (idle ones: gunicorn's keepalive)."""

    ARRIVING = ARRIVES_WITHIN
    IDLE = 75.0
    BUSY = float("inf")
    LEAVING = TAKEN_WITHIN
    LINGERING = LINGERS


class Mailbox:
    """What gunicorn takes for the client's socket: one request to read, and a place for the answer."""

    def __init__(self) -> None:
        self.request = b""
        self.answer = bytearray()

    def recv(self, size: int) -> bytes:
        """The next bytes of the request; empty when the request is over, which never blocks."""
        data, self.request = self.request[:size], self.request[size:]
        return data

    def sendall(self, data: bytes) -> None:
        """Keeps what the client is to get."""
        self.answer += data

    def send(self, data: bytes) -> int:
        """gunicorn sends only its `100 Continue` this way, which the main loop has done when it was due."""
        return len(data)

    def setblocking(self, flag: bool) -> None:
        """Nothing here blocks."""

    def gettimeout(self) -> float:
        """Nothing here blocks. There is no `settimeout`, so that gunicorn knows it for no real socket."""
        return 0.0


class Connection:
    """One client. The main loop owns it, except while a thread answers (`Phase.BUSY`)."""

    initialized = data_ready = True  # gunicorn's `handle` asks; both stay as they are
    is_http2 = False

    def __init__(self, cfg: Any, client_sock: socket.socket, client: Any, server: Any) -> None:
        self.cfg = cfg
        self.client, self.server = client, server
        self.channel = client_sock
        self.descriptor = client_sock.fileno()
        self.sock = Mailbox()
        self.parser = http.get_parser(cfg, self.sock, client)
        self.inbox = bytearray()
        self.framing = Framing()
        self.phase = Phase.ARRIVING
        self.deadline = 0.0
        self.is_shaken = not isinstance(client_sock, ssl.SSLSocket)
        self.is_readable = True
        self.has_ended = False  # the client sends no more
        self.is_last = False  # no request may follow the one in hand
        self.told_to_continue = False

    def init(self) -> None:
        """Everything was done in the constructor."""

    def gather(self) -> None:
        """Reads all that has come, without blocking. Sets `has_ended` at the client's end, or any fault of it."""
        self.is_readable = False
        try:
            if not self.is_shaken:
                self.channel.do_handshake()  # type: ignore[attr-defined]
                self.is_shaken = True
            while True:
                data = self.channel.recv(_READ)
                self.inbox += data
                if not data:
                    self.has_ended = True
                    return
                if len(data) < _READ and not isinstance(self.channel, ssl.SSLSocket):
                    return  # a short read has emptied the socket; TLS may hold more than it gave
                if len(self.inbox) > 4 * _READ:
                    self.is_readable = True  # enough for now: what follows is read when this much is answered
                    return
        except _NOT_NOW:
            return
        except OSError:
            self.has_ended = True

    def take_request(self) -> None:
        """Moves the request that has arrived from the inbox to where gunicorn reads it."""
        self.sock.request = bytes(self.inbox[: self.framing.end])
        del self.inbox[: self.framing.end]
        self.framing = Framing()
        self.told_to_continue = False

    def deliver(self) -> bool:
        """Sends what the client takes now; True when nothing is left. A fault of the connection raises `OSError`."""
        answer = self.sock.answer
        try:
            while answer:
                del answer[: self.channel.send(answer)]
        except _NOT_NOW:
            return False
        return True

    def refuse(self, error: SignerError, status: HTTPStatus) -> None:
        """Puts an answer of ours in place of the application's."""
        _, headers, body = render_problem(error, "")
        problem = json.loads(body) | {"title": status.phrase, "status": status.value, "errors": [error.text]}
        del problem["request_id"]
        body = json.dumps(problem).encode() + b"\n"
        lines = [f"HTTP/1.1 {status.value} {status.phrase}", "Connection: close", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers]
        self.sock.answer += "\r\n".join(lines).encode() + b"\r\n\r\n" + body
        self.is_last = True

    def close(self, graceful: bool = False) -> None:
        """At once: lingering is a phase, not a wait."""
        with contextlib.suppress(OSError):
            self.channel.close()


class Watch:
    """What gunicorn's main loop takes for a selector: listeners as usual, clients edge-triggered.

    A client is registered once, not twice for each request: at thousands of requests a second that is felt.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[Any], None]] = {}
        self._objects: dict[int, Any] = {}

    def register(self, fileobj: Any, _events: int, callback: Callable[[Any], None]) -> None:
        """Level-triggered, for what gunicorn registers itself."""
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        self._epoll.register(number, select.EPOLLIN)
        self._callbacks[number], self._objects[number] = callback, fileobj

    def unregister(self, fileobj: Any) -> None:
        """The reverse."""
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        self._epoll.unregister(number)
        del self._callbacks[number], self._objects[number]

    def follow(self, connection: Connection, callback: Callable[[Any], None]) -> None:
        """Reports each change of a client's socket until `forget`."""
        self._callbacks[connection.descriptor], self._objects[connection.descriptor] = callback, connection
        self._epoll.register(connection.descriptor, _EDGES)

    def expect_room(self, connection: Connection) -> None:
        """Reports, too, when the client has taken some of its answer."""
        self._epoll.modify(connection.descriptor, _EDGES | select.EPOLLOUT)

    def forget(self, connection: Connection) -> None:
        """Before its socket is closed."""
        del self._callbacks[connection.descriptor], self._objects[connection.descriptor]
        self._epoll.unregister(connection.descriptor)

    def dispatch(self, timeout: float) -> None:
        """Waits for events and calls back."""
        for number, _ in self._epoll.poll(timeout):
            if number in self._callbacks:  # an earlier callback may have closed it
                self._callbacks[number](self._objects[number])

    def close(self) -> None:
        """Gives back the descriptor."""
        self._epoll.close()


class PatientWorker(ThreadWorker):  # type: ignore[misc]
    """See the module's text. Counting, accepting, stopping and the HTTP parser are gunicorn's."""

    def init_process(self) -> None:
        """Once, after the fork."""
        self.waiting: dict[Phase, OrderedDict[Connection, None]] = {phase: OrderedDict() for phase in Phase}
        self.server_names: dict[Any, Any] = {}
        self.tls = sock.ssl_context(self.cfg) if self.cfg.is_ssl else None
        self.worker_connections = _connections(self.cfg.worker_connections, self.cfg.threads)
        self.max_keepalived = self.worker_connections
        self.poller = None
        super().init_process()

    def run(self) -> None:
        """gunicorn's loop, on our way of watching."""
        self.poller.close()
        self.poller = Watch()
        super().run()
        for phase in Phase:
            for connection in list(self.waiting[phase]):
                connection.close()

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """One round of the loop."""
        self.poller.dispatch(timeout if self.alive else min(timeout, STOPPING_KEEPS / 3))

    # --- connections come and go --------------------------------------------------------------------------------

    def accept(self, listener: Any) -> None:
        """Takes a new connection, at the limit in the place of the one that has waited longest."""
        try:
            client_sock, client = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # gone again, or descriptors are short: the others go on
            self.log.warning("a connection was not accepted: %s", error.strerror)
            self._evict()
            return
        client_sock.setblocking(False)
        if self.tls is not None:
            try:
                client_sock = self.tls.wrap_socket(client_sock, server_side=True, do_handshake_on_connect=False)
            except OSError:  # reset before it began
                client_sock.close()
                return
        if listener not in self.server_names:
            self.server_names[listener] = listener.getsockname()
        connection = Connection(self.cfg, client_sock, client, self.server_names[listener])
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
        seconds = self.cfg.keepalive if phase is Phase.IDLE else phase.value
        connection.deadline = time.monotonic() + seconds
        self.waiting[phase][connection] = None

    def _end(self, connection: Connection) -> None:
        self.waiting[connection.phase].pop(connection, None)
        self.poller.forget(connection)
        connection.close()
        self.nr_conns -= 1

    def murder_pending(self) -> None:
        """Ends what has waited too long; each phase is in the order of its deadlines."""
        now = time.monotonic()
        for phase in Phase:
            for connection in list(self.waiting[phase]):
                if connection.deadline > now:
                    break
                if phase is Phase.ARRIVING and connection.inbox:
                    connection.refuse(_TOO_SLOW, HTTPStatus.REQUEST_TIMEOUT)
                    self._leave(connection)
                else:
                    self._end(connection)

    def _cap_keepalive(self, deadline: float) -> None:
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
                connection.gather()
                connection.inbox.clear()
                if connection.has_ended:
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
            connection.refuse(_HEAD_TOO_LARGE, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            self._leave(connection)
        else:
            connection.is_last = arrival is not Arrival.WHOLE
            connection.take_request()
            self._await(connection, Phase.BUSY)
            self.tpool.submit(self._answer, connection)

    def _answer(self, connection: Connection) -> None:
        """In a thread: lets gunicorn and the application answer, sends what goes at once, reports back."""
        keep = False
        try:
            keep = self.handle(connection) and not connection.is_last
            # Bytes that the parser left over mean that it and our framing disagree: nothing after them is trusted.
            keep = keep and not connection.sock.request and not connection.parser.unreader.take_buffered()
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
        return super().handle_request(req, conn)

    def handle_error(self, req: Any, client: Mailbox, addr: Any, exc: BaseException) -> None:
        """A request that is no HTTP, in our words; gunicorn's would log and echo what the client sent, tokens too."""
        if isinstance(exc, _BROKEN):
            self.log.info("a request was refused: %s", type(exc).__name__)
            error, status = _MALFORMED, HTTPStatus.BAD_REQUEST
            if isinstance(exc, http.errors.LimitRequestLine):
                error, status = _LINE_TOO_LONG, HTTPStatus.REQUEST_URI_TOO_LONG
            elif isinstance(exc, http.errors.LimitRequestHeaders):
                error, status = _HEAD_TOO_LARGE, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        else:
            self.log.error("a fault of ours", exc_info=exc)
            error, status = _FAULT, HTTPStatus.INTERNAL_SERVER_ERROR
        refused = Connection.__new__(Connection)
        refused.sock = client
        refused.refuse(error, status)

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


_BROKEN: Final = (http.errors.ParseException, http.errors.ConfigurationProblem)
_TOO_SLOW: Final = BadRequest(
    "request_too_slow", f"the request did not arrive within {ARRIVES_WITHIN:.0f} s", "send it in one go"
)
_HEAD_TOO_LARGE: Final = BadRequest("head_too_large", "the request's head is too large", "send fewer or shorter fields")
_LINE_TOO_LONG: Final = BadRequest("line_too_long", "the request line is too long", "send a shorter path or query")
_MALFORMED: Final = BadRequest("request_malformed", "the request is not HTTP/1.1 as RFC 9112 has it", "mend the client")
_FAULT: Final = Unavailable("internal_error", "something went wrong here", "look at the service's log")
