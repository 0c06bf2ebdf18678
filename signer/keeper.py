"""The keeper: the one process with the CA key and the ledger's write handle.

A single-threaded loop over a socket of type SEQPACKET, one message a command: take every command that is waiting, let
the core run them as one batch, send each reply as it is ready. Who connects is not trusted with anything: what a
command may do depends on the credential inside it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import resource
import selectors
import signal
import socket
import stat
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

from signer import __version__
from signer.cakey import CaKey, load_ca_key
from signer.commands import MAX_MESSAGE, MAX_REPLY, Command, Sign, read_command, split_message
from signer.core import Core, Reply
from signer.errors import BadFile, BadKeyFile, BadRequest, BadSettings, SignerError, Unavailable
from signer.harden import become, forbid_dumps, take_descriptors
from signer.ledgeraudit import check_recent
from signer.metrics import Metrics, Stopwatch, TimedLedger
from signer.policyfile import load_policy
from signer.settings import Settings
from signer.ssh.publickey import render_public_key

log = logging.getLogger("signer.keeper")

MAX_PER_PROCESS: Final = 300  # connections; an api process has one a thread, at most 256
MAX_CONNECTIONS: Final = 8192  # of all processes
SPARE_DESCRIPTORS: Final = 64  # for the ledger, the policy file and whatever else is opened now and then
ACCEPTED_AT_ONCE: Final = 64
BACKLOG: Final = 512
_SEND_BUFFER: Final = 1024 * 1024
_UCRED: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


@dataclass(slots=True, eq=False)
class _Peer:
    """One connection, and the process at its other end."""

    sock: socket.socket
    pid: int
    heard: float  # when it last said something, on the monotonic clock


@dataclass(slots=True)
class _Waiting:
    """A command that was read and not yet answered."""

    peer: _Peer
    command: Command
    watch: Stopwatch = field(default_factory=Stopwatch)


class Keeper:
    """Serves `listener` until told to stop. `reload` is called on SIGHUP and says if the policy was taken."""

    def __init__(
        self, core: Core, key: CaKey, ledger: TimedLedger, listener: socket.socket, reload: Callable[[], bool]
    ) -> None:
        self._core = core
        self._key = key
        self._ledger = ledger
        self._listener = listener
        self._reload = reload
        self._selector = selectors.DefaultSelector()
        self._peers: dict[int, OrderedDict[_Peer, None]] = {}  # by process, longest silent first
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = max(1, min(MAX_CONNECTIONS, descriptors - SPARE_DESCRIPTORS))
        self._signals: set[int] = set()
        self._started = time.time()
        self._policy_since = self._started
        self._probed = 0.0
        self._probe_failure: SignerError | None = None
        self.metrics = Metrics(self._facts, lambda: core.policy.roles, ledger.commit_seconds)

    # --- the loop -----------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Runs until SIGTERM or SIGINT; every command taken is answered and every count recorded before it returns."""
        wake, woken = socket.socketpair()
        for end in (wake, woken):
            end.setblocking(False)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(woken, selectors.EVENT_READ)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note_signal)
        ticked = time.monotonic()
        while not self._signals & {signal.SIGTERM, signal.SIGINT}:
            self._round(woken)
            if signal.SIGHUP in self._signals:
                self._signals.discard(signal.SIGHUP)
                if self._reload():
                    self._policy_since = time.time()
            if time.monotonic() - ticked >= 1:
                self._core.tick()
                ticked = time.monotonic()
        self._core.end()

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.add(number)

    def _round(self, woken: socket.socket) -> None:
        """One look at all connections. New ones come last: they may push out old ones, but none that just spoke."""
        waiting: list[_Waiting] = []
        somebody_knocks = False
        for key, _ in self._selector.select(1.0):
            if key.fileobj is self._listener:
                somebody_knocks = True
            elif key.fileobj is woken:
                woken.recv(4096)
            else:
                self._take(key.data, waiting)
        if waiting:
            self._answer(waiting)
        if somebody_knocks:
            self._accept()

    def _answer(self, waiting: list[_Waiting]) -> None:
        for index, reply in self._core.run([item.command for item in waiting]):
            item = waiting[index]
            self._send(item.peer, render_reply(item.command, reply))
            self._count(item, reply)
        self.metrics.batch.observe(len(waiting))

    def _count(self, item: _Waiting, reply: Reply) -> None:
        self.metrics.latency.observe(item.watch.seconds())
        if isinstance(reply, SignerError):
            self.metrics.refusals[reply.code] += 1
        elif isinstance(item.command, Sign):
            self.metrics.signatures[item.command.role] += 1

    # --- connections --------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # the peer is gone again, or descriptors are short: the others go on
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    log.warning("a connection was not accepted: %s", error.strerror)
                elif not self._drop_longest_silent():
                    time.sleep(0.05)  # nothing of ours can be freed, and the knocking would not let us rest
                return
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        """Takes a connection in; its process, or all together, lose their longest silent one if they have too many."""
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        pid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
        mine = self._peers.get(pid, ())
        if len(mine) >= MAX_PER_PROCESS:
            self._drop(next(iter(mine)))
        elif sum(map(len, self._peers.values())) >= self._most:
            self._drop_longest_silent()
        peer = _Peer(sock, pid, time.monotonic())
        self._peers.setdefault(pid, OrderedDict())[peer] = None
        self._selector.register(sock, selectors.EVENT_READ, peer)

    def _drop_longest_silent(self) -> bool:
        """Ends the connection that said nothing for the longest time; False if there is none."""
        candidates = [next(iter(mine)) for mine in self._peers.values()]
        if not candidates:
            return False
        self._drop(min(candidates, key=lambda peer: peer.heard))
        return True

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.sock)
        peer.sock.close()
        mine = self._peers[peer.pid]
        del mine[peer]
        if not mine:
            del self._peers[peer.pid]

    def _take(self, peer: _Peer, waiting: list[_Waiting]) -> None:
        """Reads one message; a command waits for the batch, anything else is answered now."""
        try:
            message = peer.sock.recv(MAX_MESSAGE + 1)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._drop(peer)
            return
        peer.heard = time.monotonic()
        self._peers[peer.pid].move_to_end(peer)
        try:
            if len(message) > MAX_MESSAGE:
                raise BadRequest("message_too_large", f"a message has {MAX_MESSAGE} bytes at most", "send less")
            header, body = split_message(message)
            direct = self._direct(header)
            if direct is None:
                waiting.append(_Waiting(peer, read_command(header, body)))
                return
            reply = json.dumps({"reply": direct}).encode()
        except SignerError as error:
            self.metrics.refusals[error.code] += 1
            reply = render_error(error)
        except Exception:  # a message that finds a fault of ours costs its sender the answer, nobody else
            log.exception("a message could not be read")
            reply = render_error(Unavailable("internal_error", "something went wrong here", "look at the log"))
        self._send(peer, reply)

    def _send(self, peer: _Peer, reply: bytes) -> None:
        """A peer that does not take its reply loses the connection; what was recorded stays recorded."""
        if len(reply) > MAX_REPLY:
            reply = render_error(
                Unavailable("reply_too_large", "the answer is too large for one message", "ask for less")
            )
        try:
            peer.sock.send(reply)
        except OSError:
            if peer in self._peers.get(peer.pid, ()):
                self._drop(peer)

    # --- what needs no credential -------------------------------------------------------------------------------

    def _direct(self, header: dict[str, Any]) -> dict[str, object] | None:
        match header.get("op"):
            case "health":
                return self._health()
            case "metrics":
                return {"text": self.metrics.render()}
            case "ca":
                key = self._key
                return {"fingerprint": key.fingerprint, "public_key": render_public_key(key.kind, key.blob)}
        return None

    def _health(self) -> dict[str, object]:
        """Ready means: state read, clock right, and a write reached the disk within the last second."""
        try:
            if time.monotonic() - self._probed >= 1:
                self._probe_failure = None
                self._probed = time.monotonic()
                self._ledger.probe(int(time.time() * 1000))
            elif self._probe_failure is not None:
                raise self._probe_failure
            self._core.check_ready()
        except SignerError as failure:
            if failure.code == "ledger_unavailable":
                self._probe_failure = failure
            return {"ready": False, "code": failure.code, "text": failure.text, "hint": failure.hint}
        return {
            "ready": True,
            "ca_fingerprint": self._key.fingerprint,
            "policy": self._core.policy.digest,
            "mode": "local",
        }

    def _facts(self) -> dict[str, tuple[str, float]]:
        now = time.time()
        return {
            "signer_key_age_seconds": ("since the CA key was loaded", now - self._started),
            "signer_policy_age_seconds": ("since the policy in force was loaded", now - self._policy_since),
            "signer_connections": ("connections to the keeper", sum(map(len, self._peers.values()))),
        }


def render_reply(command: Command, reply: Reply) -> bytes:
    """A reply as a message."""
    if isinstance(reply, SignerError):
        return render_error(reply)
    if isinstance(command, Sign) and command.warnings:
        reply = {**reply, "warnings": list(command.warnings)}
    return json.dumps({"reply": reply}).encode()


def render_error(error: SignerError) -> bytes:
    """An error as a message; `kind` is its branch of the tree, from which an edge takes its status."""
    return json.dumps(
        {
            "error": {
                "kind": type(error).__name__,
                "code": error.code,
                "text": error.text,
                "hint": error.hint,
                "facts": dict(error.facts),
            }
        }
    ).encode()


def claim_run_dir(run_dir: Path) -> int:
    """A lock on the directory for as long as the descriptor is open; raises `Unavailable` if another keeper has it.

    Another keeper may have another ledger, and its api must not be talked away from it.
    """
    descriptor = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Unavailable(
            "run_dir_in_use", "another keeper listens in SIGNER_RUN_DIR", "stop it, or give this one its own"
        ) from None
    return descriptor


def bind_socket(path: str, mode: int) -> socket.socket:
    """A listening socket at `path`; one that a dead keeper left is replaced, which `claim_run_dir` makes safe."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    if os.path.lexists(path):
        os.unlink(path)  # noqa: PTH108 - a socket path is text
    listener.bind(path)
    os.chmod(path, mode)  # noqa: PTH101
    listener.listen(BACKLOG)
    return listener


def run_keeper(settings: Settings) -> None:
    """The keeper's whole life, in a process of its own; raises `SignerError` if it may not start.

    Started as root it reads the key first and gives root up before it opens anything else.
    """
    forbid_dumps()
    take_descriptors()
    os.umask(0o077)
    policy = load_policy(settings.policy_file)
    try:
        key = load_ca_key(settings.ca_key_file, settings.ca_key_owner, policy.ca_fingerprint)
    except BadKeyFile as error:
        log.error("the CA key is refused: %s", error.code)  # noqa: TRY400 - the code for machines, the rest is printed
        raise
    if settings.keeper_user is not None and os.geteuid() == 0:
        become(settings.keeper_user)
    check_run_dir(settings.run_dir)
    ledger = TimedLedger(settings.data_dir)
    claim = claim_run_dir(settings.run_dir)
    check_recent(ledger)
    core = Core(
        policy=policy,
        key=key,
        ledger=ledger,
        clock=time.time,
        random=os.urandom,
        report=lambda error: log.error("a fault of ours", exc_info=error),
    )
    failure = core.begin({"version": __version__, "ca": key.fingerprint, "mode": settings.mode})
    if failure is not None:
        raise failure
    shared = settings.run_dir.stat().st_mode & 0o070  # a group of its own: the api runs as another user
    listener = bind_socket(str(settings.socket), 0o660 if shared else 0o600)
    Keeper(core, key, ledger, listener, lambda: reload_policy(core, settings.policy_file)).serve()
    ledger.close()
    os.close(claim)


def reload_policy(core: Core, path: Path) -> bool:
    """Takes the policy file as it is now, True; a bad one is refused whole, said in the log and recorded, False."""
    taken = False
    try:
        failure = core.use_policy(load_policy(path))
        taken = True
    except BadFile as error:
        log.exception("%s (%s); the old policy stays\n%s", error.text, error.code, "\n".join(error.problems))
        failure = core.refuse_policy(error)
    if failure is not None:
        log.error("the reload could not be recorded: %s", failure.text)
    return taken


def check_run_dir(run_dir: Path) -> None:
    """Raises `BadSettings` unless only the keeper and the api's group can reach the socket."""
    try:
        facts = run_dir.stat()
    except OSError as error:
        raise BadSettings(
            "run_dir_missing", f"SIGNER_RUN_DIR cannot be used: {error.strerror}", "make it, or start `signer serve`"
        ) from None
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o027:
        raise BadSettings(
            "run_dir_not_private",
            f"SIGNER_RUN_DIR has mode {stat.S_IMODE(facts.st_mode):04o} and owner {facts.st_uid}",
            "it must be the keeper's own, 0700, or 02750 with the api's group",
        )
