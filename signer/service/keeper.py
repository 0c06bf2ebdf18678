"""The keeper: the only process that holds the CA key and writes the ledger.

A single-threaded loop on a SEQPACKET socket, one command a message: it reads all waiting commands, runs them as one
batch and sends each reply when it is ready. Connections are not trusted: a command's rights depend on its credential.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import pwd
import resource
import selectors
import signal
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Final

import msgspec
from prometheus_client.core import Metric

from signer.authority.certificates import PendingSignature
from signer.authority.core import ALL_REQUESTS, Core, Pending, ReplyOrError
from signer.authority.hosts import LIST_NAMESPACE as HOSTS_NAMESPACE
from signer.authority.notices import Fault
from signer.authority.queries import require
from signer.authority.vault_certificates import PendingCertificate
from signer.ca.backends import Backend
from signer.ca.bundle import render_bundle
from signer.ca.service_key import ServiceKey
from signer.errors import BadRequest, Refused, SignerError, Unavailable
from signer.hardening import peer_process
from signer.ledger.lookups import Lookup, ProveConsistency
from signer.ledger.marks import COSIGNED, VERIFIED, cosigning_warnings, read_mark
from signer.model import Caller, Event, PublicKey
from signer.protocol.commands import (
    MAX_MESSAGE,
    MAX_REPLY,
    Claim,
    Command,
    Sign,
    Unauthenticated,
    read_caller,
    read_command,
    read_fetches,
    read_sizes,
    split_message,
    split_number,
)
from signer.protocol.log_limit import LogLimit
from signer.protocol.operations import still_vault
from signer.protocol.replies import (
    CaKey,
    Certificate,
    CertificateWithWarnings,
    Changes,
    Hosts,
    MetricsText,
    Noted,
    NotReady,
    Ready,
    Reply,
    RequestDetails,
    RequestPage,
    SignedCheckpoint,
    Status,
    encode_reply,
)
from signer.service.checkpoints import Checkpoints
from signer.service.hosts_seen import Fetch, HostsSeen
from signer.service.list_builder import ListBuilder
from signer.service.metrics import Metrics, TimedLedger
from signer.service.notifier import Notifier, SenderPlace, Sources
from signer.service.outage import Outage
from signer.service.overview import Overview, hosts_reply
from signer.service.publisher import CANDIDATE_NAME, HOSTS_NAME, LAST_NAME, Publisher, SignedFile
from signer.service.query_reader import QueryReader
from signer.service.reload import Reloader
from signer.service.signing_pool import MAX_OUTSTANDING, SigningPool
from signer.service.supervisor import Supervisor
from signer.service.view_writer import RETRY_AFTER, ViewWriter
from signer.ssh.publickey import render_public_key
from signer.ssh.signing import CertifyInPool, Obtained, SignAtOnce

log = logging.getLogger("signer.keeper")

MAX_PER_PROCESS: Final = 300  # connections; an api process has one for each thread, at most 256
MAX_CONNECTIONS: Final = 8192  # of all processes
MAX_STRANGERS: Final = 8  # messages without an accepted token in one round; more wait for the next
MAX_WATCHERS: Final = 4  # connections of a process that are told of changed requests; an api process has one
MAX_TOLD: Final = 200  # ids in one message of changes; with more, any request may have changed
SPARE_DESCRIPTORS: Final = 64  # for the ledger, the policy file and other files
ACCEPTED_AT_ONCE: Final = 64
BACKLOG: Final = 512
LOOKS_FOR: Final = 0.0001  # seconds without a pause before it sleeps, where the client has another processor
SIGNING_ENDS_WITHIN: Final = 1.0  # seconds at shutdown; the launcher waits for two
# Messages that are answered outside a batch; the last one by the query reader.
_DIRECT: Final = ("health", "metrics", "ca", "status", "hosts", "seen", "checkpoint", "proof")
_SEND_BUFFER: Final = 1024 * 1024
_ENDING: Final = frozenset({signal.SIGTERM, signal.SIGINT})
_PENDING: Final = (PendingSignature, PendingCertificate)


@dataclass(slots=True, eq=False)
class _Peer:
    """One connection and the process of its client."""

    sock: socket.socket
    pid: int
    uid: int
    last_message_at: float  # monotonic seconds
    is_postponed: bool = False  # nothing is read from it until its message has had its turn


@dataclass(frozen=True, slots=True)
class Publishing:
    """Where the lists for hosts are published, and the key that signs them."""

    folder: Path
    key: ServiceKey


class _Waiting(msgspec.Struct, eq=False):
    """A command without a reply yet."""

    peer: _Peer
    number: bytes  # of the message, which its reply repeats; empty if it has none
    command: Command | None  # None for a lookup that anybody may make
    began: float = msgspec.field(default_factory=time.perf_counter)  # seconds


@dataclass(frozen=True, slots=True)
class _Postponed:
    """A message without an accepted token that waits for a later round: a refusal, or a message without credential."""

    peer: _Peer
    number: bytes
    message: Unauthenticated | dict[str, Any]


def wait_for_events(
    selector: selectors.BaseSelector, timeout: float, looks_for: float
) -> list[tuple[selectors.SelectorKey, int]]:
    """What is ready, within `timeout` seconds; looks without a pause for `looks_for` of them before it sleeps.

    To sleep and to be woken takes as long as a client with one connection needs for its next request.
    """
    ready = selector.select(0)
    if not ready and timeout > looks_for:
        until = time.monotonic() + looks_for
        while not ready and time.monotonic() < until:
            ready = selector.select(0)
    return ready or selector.select(timeout)


class Keeper:
    """Serves `listener` until SIGTERM or SIGINT; reloads on SIGHUP."""

    _looks_for = LOOKS_FOR if len(os.sched_getaffinity(0)) > 1 else 0.0
    _probed = 0.0  # monotonic seconds; of the last probe of the ledger
    _probe_failure: SignerError | None = None  # how that ended
    # As of a round:
    _totals: MetricsText | None = None  # the metrics that its strangers share
    _has_folded = False  # the view writer has replied
    _has_reports = False  # of the process that sends notices

    def __init__(
        self,
        core: Core,
        backend: Backend,
        ledger: TimedLedger,
        listener: socket.socket,
        reloader: Reloader,
        max_when_slow: int = MAX_OUTSTANDING,
        *,
        publishing: Publishing,
        checkpoints: Checkpoints,
        sender: SenderPlace | None = None,
        supervisor: Supervisor | None = None,
        listen_again: Callable[[], socket.socket | None] = lambda: None,
        lines: LogLimit | None = None,
        helpers_on: Collection[int] = (),
    ) -> None:
        self._core = core
        self._backend = backend
        self._ledger = ledger
        self._listener = listener
        self._reloader = reloader
        self._max_when_slow = max_when_slow  # see `SigningPool`
        self._supervisor = supervisor or Supervisor(None, {})
        self._listen_again = listen_again
        self._lines = lines or LogLimit(log)
        self._outage = Outage(self._lines)
        self._selector = selectors.DefaultSelector()
        self._peers: dict[int, OrderedDict[_Peer, None]] = {}  # by process, most idle first
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_connections = max(1, min(MAX_CONNECTIONS, descriptors - SPARE_DESCRIPTORS))
        self._pool: SigningPool[tuple[_Waiting, Pending]] | None = None  # only for a signer that may be slow
        self._reader: QueryReader[_Waiting] = QueryReader(ledger.data_dir, self._selector, helpers_on)
        builder = ListBuilder(ledger.data_dir, publishing.folder / CANDIDATE_NAME, self._selector, helpers_on)
        self._publishing_key = publishing.key
        self._checkpoints = checkpoints
        self._publisher = Publisher(
            publishing.folder,
            publishing.key,
            builder,
            core.list_version,
            self._lines,
            [_known_hosts(core)],
            last=ledger.data_dir / LAST_NAME,
            renumber=lambda: core.record([Event("list.published", "keeper", {"reason": "format"})]),
        )
        self._hosts = HostsSeen(core.host_names)
        self._notifier = None if sender is None else self._make_notifier(sender)
        self._views = ViewWriter(ledger.data_dir, self._selector, helpers_on)
        self._fold_due = 0.0  # seconds until the view writer has something to do
        self._internal: tuple[object, ...] = (self._reader, builder)  # what they send is collected after the batch
        self._watchers: dict[_Peer, bytes] = {}  # with the number of the message that each watches by
        self._postponed: deque[_Postponed] = deque()
        self._strangers_left = MAX_STRANGERS
        self._buffer = memoryview(bytearray(MAX_MESSAGE + 1))
        self._signals: set[int] = set()
        self._started = self._policy_since = self._key_since = time.time()
        shadow = core.shadow if self._compared_key() is not None else None
        self.metrics = Metrics(self._gauges, lambda: core.policy.roles, ledger.commit_seconds, shadow)

    def _make_notifier(self, sender: SenderPlace) -> Notifier:
        self._core.keep_noticed()
        sources = Sources(self._core.notice_of, self._faults, self._core.token_notices)
        begun_at = self._ledger.head().seq
        return Notifier(sender, self._selector, self._ledger, sources, self._lines, begun_at=begun_at)

    # --- the loop -----------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Runs until SIGTERM or SIGINT; before it returns, it answers every command read and records every count.

        Raises `SignerError`, after the same, if nobody can reach its socket any more.
        """
        wake, woken = socket.socketpair()
        for end in (wake, woken):
            end.setblocking(False)
        if not isinstance(self._backend.order, SignAtOnce):
            self._pool = SigningPool(self._backend.order.slow, lambda: _wake(wake), self._max_when_slow)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(woken, selectors.EVENT_READ)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note_signal)
        self._reader.start()
        self._views.start()
        with suppress(SignerError):  # the ledger, the clock: each look at readiness says so
            self._core.check_ready()
        for warning in still_vault(self._backend.mode, self._core.cut_over()):
            log.warning("%s", warning)
        self._supervisor.ready()
        ticked = time.monotonic()
        failure: SignerError | None = None
        while failure is None and self._signals.isdisjoint(_ENDING):
            self._supervisor.alive()
            self._serve_once(woken)
            self._collect_signatures()
            self._collect_lookups()
            if self._notifier is not None:
                self._notifier.turn(self._core.take_noticed(), has_reports=self._has_reports)
            self._tell_watchers()
            self._publisher.turn()
            self._fold()
            self._reload()
            if time.monotonic() - ticked >= 1:
                self._core.tick(self._publisher.built())
                self._lines.flush()
                failure = self._check_listener()
                ticked = time.monotonic()
        self._views.disconnect()
        self._close_pool()
        self._close_reader()
        self._publisher.close()
        self._core.end()
        if self._notifier is not None:
            self._notifier.close()
        self._views.close()
        if failure is not None:
            raise failure

    def _check_listener(self) -> SignerError | None:
        """Listens again if the socket's name is gone; the failure if that is not possible."""
        try:
            fresh = self._listen_again()
        except SignerError as error:
            return error
        except OSError as error:  # such as no descriptors: the next look may find some
            self._lines.warn("not listening", f"the keeper's socket was removed, and is not back: {error.strerror}")
            return None
        if fresh is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = fresh
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ)
        return None

    def _reload(self) -> None:
        """Starts a reload after SIGHUP, one at a time, and uses what it read once it is there."""
        if signal.SIGHUP in self._signals and not self._reloader.is_busy:
            self._signals.discard(signal.SIGHUP)
            self._reloader.start()
        reloaded = self._reloader.collect()
        if reloaded is None:
            return
        if reloaded.policy:
            self._policy_since = time.time()
        if reloaded.key:
            self._key_since = time.time()
        self._supervisor.reloaded(reloaded.began, reloaded.report)

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.add(number)

    def _serve_once(self, woken: socket.socket) -> None:
        """Reads and answers all waiting messages, then accepts connections: new ones may replace the most idle ones."""
        waiting: list[_Waiting] = []
        has_new_connections = False
        self._strangers_left = MAX_STRANGERS
        self._has_reports = self._has_folded = False
        self._totals = None
        timeout = self._patience()
        self._resume_postponed(waiting)
        for key, _ in wait_for_events(self._selector, timeout, self._looks_for):
            if key.fileobj is self._listener:
                has_new_connections = True
            elif key.fileobj is woken:
                woken.recv(4096)
            elif key.data is self._views:
                self._has_folded = True
            elif key.data is self._notifier:
                self._has_reports = True
            elif key.data not in self._internal:
                self._take(key.data, waiting)
        if waiting:
            self._answer(waiting)
        if has_new_connections:
            self._accept()

    def _patience(self) -> float:
        """Seconds until the loop has something to do besides new messages."""
        is_pending = self._reloader.is_busy or (self._pool is not None and not self._pool.is_idle())
        wait = min(0.0 if self._postponed else 0.1 if is_pending else 1.0, self._fold_due)
        if (lookup := self._reader.due()) is not None:
            wait = min(wait, lookup)
        if self._notifier is not None and (notice := self._notifier.due()) is not None:
            wait = min(wait, notice)
        return wait

    def _answer(self, waiting: list[_Waiting]) -> None:
        commands = [item.command for item in waiting if item.command is not None]  # all: lookups of anybody wait apart
        for index, reply in self._core.run(commands):
            if isinstance(reply, _PENDING):
                self._submit(waiting[index], reply)
            elif isinstance(reply, Lookup):
                self._look_up(waiting[index], reply)
            else:
                self._reply(waiting[index], reply)
        self.metrics.batch.observe(len(waiting))

    def _reply(self, item: _Waiting, reply: ReplyOrError) -> None:
        if self._notifier is not None and isinstance(reply, RequestDetails | RequestPage):
            reply = _with_told(reply, self._notifier)
        self._send(item.peer, item.number, render_answer(item.command, reply))
        self._count(item, reply)

    def _submit(self, item: _Waiting, pending: Pending) -> None:
        """Submits to the signing pool; replies with the error at once if the pool is full."""
        assert self._pool is not None, "a key that signs at once leaves nothing pending"  # noqa: S101
        try:
            self._pool.submit((item, pending), pending.obtain)
        except Unavailable as busy:
            self._finish_signatures([((item, pending), busy)])

    def _collect_signatures(self) -> None:
        """Finishes the signatures that were obtained or that are overdue."""
        if self._pool is not None and (results := self._pool.collect()):
            self._finish_signatures(results)

    def _close_pool(self) -> None:
        """Waits up to `SIGNING_ENDS_WITHIN` for pending signatures, then abandons the rest."""
        if self._pool is not None:
            deadline = time.monotonic() + SIGNING_ENDS_WITHIN
            while not self._pool.is_idle() and time.monotonic() < deadline:
                time.sleep(0.02)
                self._collect_signatures()
            self._finish_signatures(self._pool.close())

    def _finish_signatures(self, results: list[tuple[tuple[_Waiting, Pending], Obtained | SignerError]]) -> None:
        for index, reply in self._core.finish([(pending, result) for (_, pending), result in results]):
            self._reply(results[index][0][0], reply)

    def _fold(self) -> None:
        """Has a slice of events folded into the views if it is due. A failure affects only readers."""
        try:
            self._fold_due = self._views.turn(self._ledger.newest(), has_reply=self._has_folded)
        except SignerError as error:
            self._lines.warn("views not folded", f"{error.text} ({error.code})")
            self._fold_due = RETRY_AFTER

    def _look_up(self, item: _Waiting, lookup: Lookup) -> None:
        """Submits a lookup to the query reader; replies with the error at once if too many wait."""
        try:
            self._reader.submit(item, lookup)
        except Refused as refusal:
            self._reply(item, refusal)

    def _collect_lookups(self) -> None:
        """Passes on the replies of the query reader."""
        for item, reply in self._reader.collect():
            self._send(item.peer, item.number, reply)
            self.metrics.latency.observe(time.perf_counter() - item.began)
            if reply.startswith(b"Error\n"):
                code = str(json.loads(reply.partition(b"\n")[2])["code"])
                self.metrics.count_refusal(code)
                if code in ("ledger_tables_differ", "views_behind") and self._views.is_idle:
                    self._views.recheck(is_damaged=code == "ledger_tables_differ")

    def _tell_watchers(self) -> None:
        """Sends each `watch` connection the ids of requests that changed; what is in them, it has to ask for."""
        changed = self._core.take_changes()
        if self._notifier is not None:
            changed |= self._notifier.take_changes()
        if not changed or not self._watchers:
            return
        is_any = ALL_REQUESTS in changed or len(changed) > MAX_TOLD
        message = encode_reply(Changes(requests=[] if is_any else sorted(changed)))
        for peer, number in list(self._watchers.items()):
            self._send(peer, number, message)

    def _close_reader(self) -> None:
        stopping = Unavailable("keeper_stopping", "the service is stopping", "retry")
        for item in self._reader.close():
            self._reply(item, stopping)

    def _count(self, item: _Waiting, reply: ReplyOrError) -> None:
        self.metrics.latency.observe(time.perf_counter() - item.began)
        if isinstance(reply, SignerError):
            self.metrics.count_refusal(reply.code)
            self._outage.note_failure(reply)
        elif isinstance(reply, Certificate) and isinstance(item.command, (Sign, Claim)):  # a union is made each time
            self.metrics.count_signature(reply.role)
            self._outage.note_signature()

    # --- connections --------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # the client disconnected, or descriptors ran out: keep serving the others
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    self._lines.warn("connection not accepted", f"connection not accepted: {error.strerror}")
                elif not self._drop_most_idle():
                    time.sleep(0.05)  # nothing to drop; avoids a busy loop while descriptors are short
                return
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        """Registers a connection; at the limit of its process, or of all, the most idle connection is dropped."""
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        pid, uid, _ = peer_process(sock)
        of_process = self._peers.get(pid, ())
        if len(of_process) >= MAX_PER_PROCESS:
            self._drop(next(iter(of_process)))
        elif sum(map(len, self._peers.values())) >= self._max_connections:
            self._drop_most_idle()
        peer = _Peer(sock, pid, uid, time.monotonic())
        self._peers.setdefault(pid, OrderedDict())[peer] = None
        self._selector.register(sock, selectors.EVENT_READ, peer)

    def _drop_most_idle(self) -> bool:
        """Drops the connection with the oldest last message; False if there is none."""
        candidates = [next(iter(of_process)) for of_process in self._peers.values()]
        if not candidates:
            return False
        self._drop(min(candidates, key=lambda peer: peer.last_message_at))
        return True

    def _drop(self, peer: _Peer) -> None:
        if not peer.is_postponed:
            self._selector.unregister(peer.sock)
        peer.sock.close()
        self._watchers.pop(peer, None)
        of_process = self._peers[peer.pid]
        del of_process[peer]
        if not of_process:
            del self._peers[peer.pid]

    def _take(self, peer: _Peer, waiting: list[_Waiting]) -> None:
        """Reads one message; commands are added to the batch, everything else is answered at once."""
        try:
            size = peer.sock.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            size = 0
        message = bytes(self._buffer[:size])
        if not message:
            self._drop(peer)
            return
        peer.last_message_at = time.monotonic()
        self._peers[peer.pid].move_to_end(peer)
        number, message = split_number(message)
        try:
            if len(message) > MAX_MESSAGE:
                raise BadRequest(
                    "message_too_large", f"the message is longer than {MAX_MESSAGE} bytes", "send a shorter request"
                )
            header, body = split_message(message)
            if header.get("op") == "watch":
                self._watch(peer, number)
                return
            if header.get("op") in _DIRECT:
                self._take_stranger(_Postponed(peer, number, header), waiting)
                return
            command = read_command(header, body, self._authenticate, _local_user(peer.uid, header))
            if isinstance(command, Unauthenticated):
                self._take_stranger(_Postponed(peer, number, command), waiting)
            else:
                waiting.append(_Waiting(peer, number, command))
        except SignerError as error:
            self.metrics.count_refusal(error.code)
            self._send(peer, number, encode_reply(error))
        except Exception as error:  # noqa: BLE001 - an internal error must fail only the request that caused it
            self._fail(peer, number, error)

    def _watch(self, peer: _Peer, number: bytes) -> None:
        """Keeps a connection that is told which requests change; the first reply says that any may have."""
        own = [other for other in self._watchers if other.pid == peer.pid and other is not peer]
        if len(own) >= MAX_WATCHERS:
            self._drop(own[0])
        self._watchers[peer] = number
        self._send(peer, number, encode_reply(Changes(requests=[])))

    def _take_stranger(self, postponed: _Postponed, waiting: list[_Waiting]) -> None:
        """Handles a message without an accepted token, or postpones it if there were many in this round."""
        if self._strangers_left <= 0:
            self._selector.unregister(postponed.peer.sock)
            postponed.peer.is_postponed = True
            self._postponed.append(postponed)
            return
        self._strangers_left -= 1
        peer, number, message = postponed.peer, postponed.number, postponed.message
        if isinstance(message, Unauthenticated):
            waiting.append(_Waiting(peer, number, message))
            return
        try:
            answer = self._answer_directly(message, peer)
            if isinstance(answer, Lookup):
                self._look_up(_Waiting(peer, number, None), answer)
                return
            reply = encode_reply(answer)
        except SignerError as error:
            self.metrics.count_refusal(error.code)
            reply = encode_reply(error)
        except Exception as error:  # noqa: BLE001 - an internal error must fail only the request that caused it
            self._fail(peer, number, error)
            return
        self._send(peer, number, reply)

    def _resume_postponed(self, waiting: list[_Waiting]) -> None:
        while self._postponed and self._strangers_left > 0:
            postponed = self._postponed.popleft()
            peer = postponed.peer
            if peer in self._peers.get(peer.pid, ()):
                peer.is_postponed = False
                self._selector.register(peer.sock, selectors.EVENT_READ, peer)
                self._take_stranger(postponed, waiting)

    def _fail(self, peer: _Peer, number: bytes, error: Exception) -> None:
        self._lines.fault("internal error while reading a message", error)
        self._send(peer, number, encode_reply(Unavailable("internal_error", "internal error", "see the service's log")))

    def _authenticate(self, caller: Caller) -> None:
        """Raises `NotAuthenticated` before the body is decoded. The core authenticates again, with its batch."""
        self._core.authenticate(caller, int(time.time()))

    def _send(self, peer: _Peer, number: bytes, reply: bytes) -> None:
        """Sends a reply; drops a connection that does not accept it. Recorded events stay recorded."""
        if len(reply) > MAX_REPLY:
            reply = encode_reply(
                Unavailable("reply_too_large", f"the reply is longer than {MAX_REPLY} bytes", "request a smaller page")
            )
        try:
            peer.sock.send(number + b" " + reply if number else reply)
        except OSError:
            if peer in self._peers.get(peer.pid, ()):
                self._drop(peer)

    # --- messages that are answered outside a batch -----------------------------------------------------------------

    def _answer_directly(self, header: dict[str, Any], peer: _Peer) -> Reply | Lookup:
        """The reply to a message whose `op` is in `_DIRECT`, or what the query reader must look up for it."""
        match header["op"]:
            case "status":
                return self._status(header, peer)
            case "health":
                return self._health()
            case "metrics":
                return self._metrics_text(header)
            case "checkpoint":
                return SignedCheckpoint(note=self._checkpoints.newest(self._views.head))
            case "proof":
                return ProveConsistency("", MAX_REPLY, *read_sizes(header))  # "": nobody's, all share one part
            case "hosts":
                return self._list_hosts(header, peer)
            case "seen":
                return self._note_fetches(header)
        key = self._backend.public_key()
        return CaKey(
            fingerprint=key.fingerprint,
            public_key=render_public_key(key.kind, key.blob),
            bundle=render_bundle(self._core.policy.ca, key, self._backend.order.local_key),
        )

    def _metrics_text(self, header: dict[str, Any]) -> MetricsText:
        """The metrics; the strangers of one round, in which nothing is counted before all are read, share theirs."""
        if self._may_read_ledger(header):
            return MetricsText(text=self.metrics.render(by_role=True))
        if self._totals is None:
            self._totals = MetricsText(text=self.metrics.render(by_role=False))
        return self._totals

    def _may_read_ledger(self, header: dict[str, Any]) -> bool:
        """False without a token; raises `NotAuthenticated` for a bad one."""
        if header.get("token") is None:
            return False
        identity, _ = self._core.authenticate(read_caller(header), int(time.time()))
        return "ledger.read" in identity.may

    def _check_ready(self) -> Ready | NotReady:
        """Ready: the state is read, the clock is not late, and a write reached the disk within the last second."""
        try:
            if time.monotonic() - self._probed >= 1:
                self._probe_failure = None
                self._probed = time.monotonic()
                self._ledger.probe(int(time.time() * 1000))
            elif self._probe_failure is not None:
                raise self._probe_failure
            self._core.check_ready()
            self._backend.check_ready()
            fingerprint = self._backend.public_key().fingerprint
        except SignerError as failure:
            if failure.code == "ledger_unavailable":
                self._probe_failure = failure
            self._outage.note_failure(failure)
            return NotReady(ready=False, code=failure.code, text=failure.text, hint=failure.hint)
        self._outage.note_ready()
        return Ready(ready=True, ca_fingerprint=fingerprint, policy=self._core.policy.digest, mode=self._backend.mode)

    def _health(self) -> Ready | NotReady:
        """Whether it is ready, with the published list and with what should not stay as it is."""
        ready = self._check_ready()
        if isinstance(ready, NotReady):
            return ready
        published, now = self._publisher.state(), int(time.time())
        if published.version is not None:
            age = max(now - published.as_of, 0)
            ready = ready.model_copy(update={"list_version": published.version, "list_age": age})
        if warnings := self._warnings(now):
            ready = ready.model_copy(update={"warnings": warnings})
        if (compared := self._compared_key()) is None:
            return ready
        return ready.model_copy(update={"local_ca_fingerprint": compared.fingerprint})

    def _warnings(self, now: int) -> list[str]:
        """What should not stay as it is, as readiness and `signer status` say it; `now` in seconds since 1970."""
        notices = self._notifier.warnings() if self._notifier is not None else []
        return [text for texts in self._concerns(now).values() for text in texts] + notices

    def _concerns(self, now: int) -> dict[str, list[str]]:
        """What should not stay as it is, by a stable name; `now` in seconds since 1970."""
        cosigning = cosigning_warnings(self._ledger.data_dir, now)
        return {
            "still_vault": still_vault(self._backend.mode, self._core.cut_over()),
            "incidents_overdue": self._core.warnings(),
            "list_late": self._publisher.state().warnings(now),
            **{name: [text] for name, text in cosigning.items()},
        }

    def _faults(self) -> dict[str, Fault]:
        """What humans are told of the service's state while it lasts, by a stable name."""
        health, found = self._check_ready(), {}
        if isinstance(health, NotReady):
            found[health.code] = Fault(f"no certificate is issued: {health.text}", health.hint, "urgent")
        elif (failure := self._outage.lasting) is not None:
            found[failure.code] = Fault(f"no certificate is issued: {failure.text}", failure.hint, "urgent")
        concerns = self._concerns(int(time.time()))
        return found | {name: Fault("; ".join(texts)) for name, texts in concerns.items() if texts}

    def _compared_key(self) -> PublicKey | None:
        """The local key that another CA's certificates are compared with (mode shadow)."""
        order = self._backend.order
        return order.local_key if isinstance(order, CertifyInPool) else None

    def _overview(self) -> Overview:
        return Overview(
            now=time.time(),
            started=self._started,
            policy_since=self._policy_since,
            key_since=self._key_since,
            connections=sum(map(len, self._peers.values())),
            mode=self._backend.mode,
            policy=self._core.policy,
            state=self._core.overview(),
            ledger_bytes=self._ledger.size(),
            publisher=self._publishing_key.fingerprint,
            published=self._publisher.state(),
            cosigned=read_mark(self._ledger.data_dir, COSIGNED),
            fetches=tuple(self._hosts.rows(int(time.time()))),
        )

    def _gauges(self) -> Iterator[Metric]:
        yield from self._overview().gauges()
        if self._notifier is not None:
            yield from self._notifier.gauges()

    def _status(self, header: dict[str, Any], peer: _Peer) -> Status:
        """What `signer status` shows; raises `NotAuthenticated` or `Refused`."""
        if _local_user(peer.uid, header) is None:
            identity, _ = self._core.authenticate(read_caller(header), int(time.time()))
            require(identity, "ledger.read")
        health = self._check_ready()
        fault = Unavailable(health.code, health.text, health.hint) if isinstance(health, NotReady) else None
        overview = replace(
            self._overview(),
            verified=read_mark(self._ledger.data_dir, VERIFIED),
            warnings=tuple(self._warnings(int(time.time()))),
        )
        return overview.status(health.ca_fingerprint if isinstance(health, Ready) else None, fault)

    def _list_hosts(self, header: dict[str, Any], peer: _Peer) -> Hosts:
        """Which hosts have which list; raises `NotAuthenticated` or `Refused`."""
        if _local_user(peer.uid, header) is None:
            identity, _ = self._core.authenticate(read_caller(header), int(time.time()))
            if "hosts" not in identity.may:
                require(identity, "ledger.read")
        return hosts_reply(self._publisher.state(), self._hosts.rows(int(time.time())))

    def _note_fetches(self, header: dict[str, Any]) -> Noted:
        """Takes in which hosts have fetched which list, as the api was told."""
        now = int(time.time())
        fetches = [Fetch(host, version, now, peer) for host, peer, version in read_fetches(header)]
        self._hosts.note(fetches)
        return Noted(noted=len(fetches))


def _known_hosts(core: Core) -> SignedFile:
    """The list of host keys, for clients."""
    return SignedFile(HOSTS_NAME, HOSTS_NAMESPACE, core.hosts_version, core.known_hosts)


def _with_told(reply: RequestDetails | RequestPage, notifier: Notifier) -> RequestDetails | RequestPage:
    """The reply with who was told of each request."""
    if isinstance(reply, RequestDetails):
        return notifier.told(reply)
    rows, room = [], MAX_REPLY // 4  # the rest of a page is bounded where it is made
    for row in reply.requests:
        told = notifier.told(row)
        room -= sum(len(one.as_json()) for one in told.told or ())
        rows.append(told if room >= 0 else row)
    return reply.model_copy(update={"requests": rows})


def _wake(end: socket.socket) -> None:
    with suppress(BlockingIOError):  # the buffer is full, so a wake-up is already due
        end.send(b"\0")


def _local_user(uid: int, header: dict[str, Any]) -> str | None:
    """The account of a command line on this host that says it needs no token; only root's and the keeper's need none.

    The api never says so: it would do it for whoever sends it a request.
    """
    if header.get("local") is not True or uid not in (0, os.geteuid()):
        return None
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def render_answer(command: Command | None, answer: ReplyOrError) -> bytes:
    """Encodes the reply to a command."""
    if isinstance(command, Sign) and command.warnings and isinstance(answer, Certificate):
        answer = CertificateWithWarnings(certificate=answer, warnings=list(command.warnings))
    return encode_reply(answer)
