"""The process that sends notices: it talks to the Internet, and holds no CA key, no ledger and no policy.

The keeper connects to its socket and hands it notices. Each channel has a queue and a thread, so one that hangs delays
no other. A channel gets its notices in their order, and each at least once: the cursor file says what it has, and is
written after it took a notice. After a crash in between it gets that notice again, with the same id.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Final, Protocol

import msgspec

from signer.errors import BadFormat, BadSettings, SignerError, Unavailable
from signer.files import append_line, claim, held, identity_of, open_or_create, read_bounded, write_atomically
from signer.hardening import become, forbid_dumps, look_up_user, peer_process
from signer.http import Watch
from signer.protocol import notices
from signer.protocol.log_limit import LogLimit
from signer.service.channels import Channel, Result, Sender, load_channels
from signer.service.supervisor import Supervisor, adopt_channel, waiting
from signer.settings import Settings

log = logging.getLogger("signer.notices")

MAX_QUEUED: Final = 10_000  # notices of one channel
MAX_REPORTS: Final = 2_000  # that wait for the keeper
MAX_DONE: Final = 10_000  # notices without an event whose ids a channel remembers; as many tokens may end at once
MAX_TOLD: Final = 1_000  # notices of requests of which a channel remembers what became
BACK_OFF: Final = (1.0, 2.0, 5.0, 15.0, 60.0)  # seconds before the next attempt, by the number of failures in a row
ENDS_WITHIN: Final = 1.0  # seconds for a request that is under way at the end
MAX_FAULT: Final = 500  # characters of a reason why there are no channels
CURSOR: Final = "cursor.json"
TOLD: Final = "told.jsonl"
LOCK: Final = "sender.lock"
_MAX_CURSOR: Final = 16 * 1024 * 1024  # bytes; 16 channels with `MAX_DONE` ids of 50 bytes
_MAX_TOLD_FILE: Final = 64 * 1024 * 1024  # bytes
_MAX_LINES: Final = 4 * 16 * MAX_TOLD  # of the file; it is written again above
_LOOK_EVERY: Final = 0.3  # seconds between two signs of life
_BACKLOG: Final = 8
_RESOLVER: Final = "timeout:2 attempts:1"  # of resolv.conf(5): a look-up cannot be interrupted


# --- what a channel has -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Cursor:
    """What a channel has: the events up to `seq` (None: it was never told one), and notices without an event."""

    seq: int | None = None
    done: dict[str, None] = field(default_factory=dict)  # ids, the oldest first

    def add(self, notice: str) -> None:
        """Remembers a notice without an event."""
        self.done.pop(notice, None)
        self.done[notice] = None
        if len(self.done) > MAX_DONE:
            del self.done[next(iter(self.done))]


class _Kept(msgspec.Struct):
    """A cursor as the file has it."""

    seq: Annotated[int, msgspec.Meta(ge=0, lt=2**62)] | None
    done: list[str]


class CursorFile:
    """The cursors of all channels by name, in one file. Safe to share between threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._cursors = _read_cursors(path)

    def of(self, name: str) -> Cursor:
        """The cursor of a channel, which `note` changes."""
        with self._lock:
            return self._cursors.setdefault(name, Cursor())

    def keep(self, names: set[str]) -> None:
        """Forgets all other channels: one that comes back starts again."""
        with self._lock:
            self._cursors = {name: cursor for name, cursor in self._cursors.items() if name in names}
            self._write()

    def note(self, cursor: Cursor, seq: int, notice: str | None = None) -> None:
        """Records that a channel has the event `seq`, or a notice without one."""
        with self._lock:
            if notice is not None:
                cursor.add(notice)
            else:
                cursor.seq = seq
            self._write()

    def _write(self) -> None:
        """Replaces the file; not synced, as fsyncs would delay those of the ledger. A power cut repeats notices."""
        shown = {name: _Kept(cursor.seq, list(cursor.done)) for name, cursor in self._cursors.items()}
        try:
            write_atomically(self._path, msgspec.json.encode(shown) + b"\n", 0o600, is_synced=False)
        except OSError as error:
            log.warning("what was sent cannot be noted, so notices may come twice: %s", error.strerror)


def _read_cursors(path: Path) -> dict[str, Cursor]:
    """The cursors of a file; none if it cannot be read as such: then every channel starts again."""
    try:
        kept = msgspec.json.decode(read_bounded(path, _MAX_CURSOR), type=dict[str, _Kept])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, RecursionError):
        log.warning("%s cannot be read: channels begin with what happens from now on", path.name)
        return {}
    return {name: Cursor(cursor.seq, dict.fromkeys(cursor.done[-MAX_DONE:])) for name, cursor in kept.items()}


class ToldFile:
    """What became of the notices of requests, in a file with a line each of which the last one counts.

    A keeper that has just connected is told it, also after both processes were restarted. Not synced, as the cursor.
    Safe to share between threads.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._rows: dict[str, OrderedDict[tuple[str, str], notices.Told]] = {}  # by channel, then by request and notice
        self._file: int | None = None
        self._lines = _MAX_LINES  # an unknown number
        for told in _read_told(path):
            self._set(told)

    def all(self) -> list[notices.Told]:
        """Of all channels, the oldest of each first."""
        with self._lock:
            return [told for rows in self._rows.values() for told in rows.values()]

    def keep(self, names: set[str]) -> None:
        """Forgets all other channels."""
        with self._lock:
            self._rows = {name: rows for name, rows in self._rows.items() if name in names}
            self._write_all()

    def note(self, told: notices.Told) -> None:
        """Remembers it; writes it if it is another outcome than before. A notice that waits is handed over again."""
        with self._lock:
            former = self._set(told)
            is_known = former is not None and (former.state, former.error) == (told.state, told.error)
            if told.state != "sending" and not is_known:
                self._write(told)

    def _set(self, told: notices.Told) -> notices.Told | None:
        rows, key = self._rows.setdefault(told.channel, OrderedDict()), (told.request, told.notice)
        former = rows.pop(key, None)
        rows[key] = told
        if len(rows) > MAX_TOLD:
            rows.popitem(last=False)
        return former

    def _write(self, told: notices.Told) -> None:
        """Appends a line; after a failure the next one brings all of them."""
        self._lines += 1
        if self._file is None or self._lines > _MAX_LINES:
            self._write_all()
            return
        try:
            append_line(self._file, notices.encode(told) + b"\n", is_synced=False)
        except OSError as error:
            self._lines = _MAX_LINES
            log.warning("what was sent cannot be noted: %s", error.strerror)

    def _write_all(self) -> None:
        """Replaces the file by one without the lines that do not count any more."""
        lines = [notices.encode(told) + b"\n" for rows in self._rows.values() for told in rows.values()]
        try:
            write_atomically(self._path, b"".join(lines), 0o600, is_synced=False)
            if self._file is not None:
                os.close(self._file)
                self._file = None
            self._file, self._lines = open_or_create(self._path, append=True), len(lines)
        except OSError as error:
            log.warning("what was sent cannot be noted: %s", error.strerror)


def _read_told(path: Path) -> list[notices.Told]:
    """The lines of a file; one that is not whole is left out: it was cut off by a kill."""
    found = []
    try:
        lines = read_bounded(path, _MAX_TOLD_FILE).split(b"\n")
    except FileNotFoundError:
        return []
    except (OSError, SignerError):
        log.warning("%s cannot be read: nobody is shown who was told before", path.name)
        return []
    for line in lines:
        with suppress(BadFormat):
            message = notices.read_for_keeper(line)
            if isinstance(message, notices.Told):
                found.append(message)
    return found


# --- one channel ------------------------------------------------------------------------------------------------------


class Sends(Protocol):
    """What sends a notice, once."""

    def send(self, notice: notices.Notice, now: int) -> Result: ...
    def close(self) -> None: ...


class Outbox:
    """The queue of one channel and what became of its notices. `put` and `state` belong to the main thread."""

    def __init__(
        self,
        channel: Channel,
        sender: Sends,
        cursors: CursorFile,
        told: ToldFile,
        report: Callable[[notices.Report], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.channel = channel
        self._sender = sender
        self._cursors = cursors
        self._cursor = cursors.of(channel.name)
        self._told = told
        self._report = report
        self._clock = clock  # seconds since 1970
        self._changed = threading.Condition()
        self._queue: deque[notices.Notice] = deque()
        self._waiting_ids: set[str] = set()  # of notices without an event
        self._missed = 0  # notices that were given up and that no message has said
        self._said = 0  # of them, those that the message says which waits
        self._failures = 0
        self._is_stopping = False
        self.received = self._cursor.seq  # the newest event that has arrived here; None if it was never told one
        self._thread = threading.Thread(target=self._run, name=f"notices-{channel.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def begin(self, seq: int) -> None:
        """Begins after event `seq`, whatever the channel had: the ledger is another one, or the channel is new."""
        with self._changed:
            self.received = seq
            self._cursors.note(self._cursor, seq)

    def put(self, notice: notices.Notice) -> None:
        """Queues a notice, unless the channel has it or does not take it; the oldest makes room for it."""
        with self._changed:
            if notice.seq:
                if self.received is not None and notice.seq <= self.received:
                    return
                self.received = notice.seq
            elif notice.id in self._cursor.done or notice.id in self._waiting_ids:
                return
            if not self.channel.facts.takes(notice.topic, notice.concerns):
                if notice.seq and not self._queue:
                    self._cursors.note(self._cursor, notice.seq)
                return
            if len(self._queue) >= MAX_QUEUED:
                self._give_up(self._queue.popleft(), f"{MAX_QUEUED:,} newer ones wait")
            self._queue.append(notice)
            self._remember(notice, "sending", "")
            if not notice.seq:
                self._waiting_ids.add(notice.id)
            self._changed.notify()

    def stop(self, within: float) -> None:
        """Ends the thread after the request that is under way, for which `within` seconds are left."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(within)

    def adopt(self, former: Outbox) -> None:
        """Takes over the queue of a stopped one, whose channel was reconfigured."""
        with former._changed:
            self._queue.extend(former._queue)
            self._waiting_ids |= former._waiting_ids
            self.received = former.received
            self._missed, self._said = former._missed, former._said

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (notice := self._wait_for_next()) is not None:
            try:
                result = self._sender.send(notice, int(self._clock()))
            except Exception as error:
                log.error("internal error while a notice was sent", exc_info=error)  # noqa: TRY400
                result = Result("internal error")
            self._finish(notice, result)
        self._sender.close()

    def _wait_for_next(self) -> notices.Notice | None:
        """The next notice to try, after the pause that failures need; None at the end."""
        with self._changed:
            pause = BACK_OFF[min(self._failures, len(BACK_OFF)) - 1] if self._failures else 0.0
            until = time.monotonic() + pause
            while not self._is_stopping:
                left = until - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                self._drop_old()
                if self._missed and not (self._queue and self._queue[0].id.startswith("m-")):
                    self._queue.appendleft(self._say_missed())
                if self._queue:
                    return self._queue[0]
                self._changed.wait()
        return None

    def _drop_old(self) -> None:
        oldest = self._clock() - notices.KEPT_FOR
        while self._queue and self._queue[0].at < oldest and not self._queue[0].id.startswith("m-"):
            self._give_up(self._queue.popleft(), "it is older than an hour")

    def _give_up(self, notice: notices.Notice, why: str) -> None:
        self._waiting_ids.discard(notice.id)
        if notice.id.startswith("m-"):
            return
        self._missed += 1
        self._tell(notice, "dropped", why)
        if notice.seq:
            self._cursors.note(self._cursor, notice.seq)

    def _say_missed(self) -> notices.Notice:
        """One notice for all that were given up; its count is that of the moment."""
        self._said = self._missed
        count = f"{self._missed:,} notice{'s' if self._missed > 1 else ''}"
        name, title = f"m-{self._cursor.seq or 0}-{self._missed}", f"{count} before this one could not be sent in time"
        hint = "see `signer requests list` and `signer events list`"
        return notices.state_notice(name, int(self._clock()), "health", "notices.missed", title, (hint,))

    def _finish(self, notice: notices.Notice, result: Result) -> None:
        with self._changed:
            if not self._queue or self._queue[0] is not notice:  # it had to make room meanwhile
                if not result.error:
                    self._failures = 0
                return
            if result.error and not result.is_final:
                self._failures += 1
                self._tell(notice, "failed", result.error)
                if self._failures == 1:
                    log.warning("channel %s: a notice was not sent: %s; trying again", self.channel.name, result.error)
                return
            self._queue.popleft()
            self._waiting_ids.discard(notice.id)
            if result.error:
                log.warning("channel %s: a notice was given up: %s", self.channel.name, result.error)
            elif self._failures:
                log.warning("channel %s: notices are sent again", self.channel.name)
            self._failures = 0
            if notice.id.startswith("m-"):
                self._missed -= self._said
                return
            self._cursors.note(self._cursor, notice.seq, None if notice.seq else notice.id)
            self._tell(notice, "dropped" if result.error else "sent", result.error)

    def _remember(self, notice: notices.Notice, state: notices.State, error: str) -> None:
        if notice.request is not None:
            at = int(self._clock())
            self._told.note(notices.Told(self.channel.name, state, notice.id, at, notice.request, notice.kind, error))

    def _tell(self, notice: notices.Notice, state: notices.State, error: str) -> None:
        self._remember(notice, state, error)
        self._report(
            notices.Report(
                channel=self.channel.name,
                state=state,
                notice=notice.id,
                at=int(self._clock()),
                queued=len(self._queue),
                request=notice.request,
                error=error,
            )
        )


# --- the process ------------------------------------------------------------------------------------------------------


class Process:
    """The main thread: the keeper's connection, signals and signs of life."""

    def __init__(self, settings: Settings, supervisor: Supervisor, keeper_uid: int) -> None:
        self._settings = settings
        self._supervisor = supervisor
        self._keeper_uid = keeper_uid
        self._path = settings.notices_socket
        self._lines = LogLimit(log)
        self._watch = Watch()
        self._cursors = CursorFile(settings.notices_dir / CURSOR)
        self._told = ToldFile(settings.notices_dir / TOLD)
        self._outboxes: dict[str, Outbox] = {}
        self._fault = ""
        self._reports: deque[notices.Report] = deque(maxlen=MAX_REPORTS)
        self._again: deque[notices.Told] = deque()  # what a keeper that has just connected does not know
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._identity: tuple[int, int] | None = None
        self._keeper: socket.socket | None = None
        self._signals: set[int] = set()

    def serve(self) -> None:
        """Runs until SIGTERM or SIGINT."""
        for end in (self._wake, self._woken):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note_signal)
        self._load()
        self._listen()
        self._supervisor.ready()
        while not self._signals & {signal.SIGTERM, signal.SIGINT}:
            self._supervisor.alive()
            self._lines.flush()
            self._serve_once()
            if signal.SIGHUP in self._signals:
                self._signals.discard(signal.SIGHUP)
                self._reload()
        self._close()

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.add(number)

    def _serve_once(self) -> None:
        if self._identity != identity_of(self._path):
            self._listen()
        for key, _ in self._selector.select(_LOOK_EVERY):
            if key.fileobj is self._woken:
                self._woken.recv(4096)
            elif key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._keeper:
                self._receive()
        self._send_reports()

    # --- the keeper -----------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Listens under the socket's name, also if it was removed or replaced; the lock makes a stale one ours."""
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            listener.setblocking(False)
            self._path.unlink(missing_ok=True)
            listener.bind(str(self._path))
            self._path.chmod(0o666)  # the keeper is another user; who connects is asked of the kernel
            listener.listen(_BACKLOG)
            self._identity = identity_of(self._path)
        except OSError as error:
            listener.close()
            self._lines.warn("not listening", f"the socket for the keeper cannot be made: {error.strerror}")
            return
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ)

    def _accept(self) -> None:
        assert self._listener is not None, "it has a connection"  # noqa: S101
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if peer_process(connection).uid != self._keeper_uid:
            self._lines.warn("a foreign connection", "a connection of another user than the keeper's was closed")
            connection.close()
            return
        self._drop_keeper()  # a new keeper has taken the place of the former one
        connection.setblocking(False)
        self._keeper = connection
        self._selector.register(connection, selectors.EVENT_READ)
        self._say_hello()
        self._again = deque(self._told.all())

    def _drop_keeper(self) -> None:
        if self._keeper is not None:
            self._selector.unregister(self._keeper)
            self._keeper.close()
            self._keeper = None

    def _say_hello(self) -> None:
        received = [box.received for box in self._outboxes.values() if box.received is not None]
        channels = tuple(box.channel.facts for box in self._outboxes.values())
        self._send(notices.Hello(cursor=min(received) if received else None, channels=channels, fault=self._fault))

    def _send(self, message: notices.Hello | notices.Report | notices.Told) -> bool:
        """False if there is no room, or no keeper."""
        if self._keeper is None:
            return False
        try:
            self._keeper.send(notices.encode(message))
        except BlockingIOError:
            return False
        except OSError:
            self._drop_keeper()
            return False
        return True

    def _receive(self) -> None:
        assert self._keeper is not None, "it has sent something"  # noqa: S101
        for data in waiting(self._keeper, notices.MAX_MESSAGE, 64):
            if not data:
                self._drop_keeper()
                return
            try:
                message = notices.read_for_sender(data)
            except BadFormat as bad:
                self._lines.warn("a malformed message", f"a message of the keeper is left out: {bad.text}")
                continue
            for box in self._outboxes.values():
                if isinstance(message, notices.Notice):
                    box.put(message)
                else:
                    box.begin(message.seq)

    def _report(self, report: notices.Report) -> None:
        """Called by the threads of the channels."""
        self._reports.append(report)
        with suppress(BlockingIOError):  # the buffer is full, so a wake-up is already due
            self._wake.send(b"\0")

    def _send_reports(self) -> None:
        """What was reported to a former keeper comes first: reports of now are newer."""
        while self._again and self._send(self._again[0]):
            self._again.popleft()
        while not self._again and self._reports and self._send(self._reports[0]):
            self._reports.popleft()

    # --- channels ---------------------------------------------------------------------------------------------------

    def _load(self) -> SignerError | None:
        """Takes the channels of the file; the current ones stay if it is not good, and the reason is returned."""
        assert self._settings.notices_file is not None, "checked by `run_notices`"  # noqa: S101
        try:
            channels = load_channels(self._settings.notices_file)
        except SignerError as error:
            problems = "; ".join(" ".join(problem.split()) for problem in getattr(error, "problems", ()))
            log.error("%s (%s): %s %s", error.text, error.code, problems, error.hint)  # noqa: TRY400
            if not self._outboxes:
                self._fault = f"{error.text[:MAX_FAULT]} ({error.code})"
            return error
        self._fault = ""
        self._use(channels)
        return None

    def _use(self, channels: tuple[Channel, ...]) -> None:
        former, self._outboxes = self._outboxes, {}
        names = {channel.name for channel in channels}
        self._cursors.keep(names)
        self._told.keep(names)
        newest = max((box.received or 0 for box in former.values()), default=0)
        for channel in channels:
            old = former.pop(channel.name, None)
            if old is not None and old.channel == channel:
                self._outboxes[channel.name] = old
                continue
            if old is not None:
                old.stop(ENDS_WITHIN)
            sender = Sender(channel, self._watch, self._settings.console_url)
            box = Outbox(channel, sender, self._cursors, self._told, self._report)
            if old is not None:
                box.adopt(old)
            elif box.received is None and newest:
                box.begin(newest)
            self._outboxes[channel.name] = box
            box.start()
        for box in former.values():
            box.stop(0)

    def _reload(self) -> None:
        began = time.monotonic()
        failure = self._load()
        self._say_hello()
        report: dict[str, object] = {"channels": sorted(self._outboxes)}
        if failure is not None:
            report["error"] = {**failure.as_json(), "problems": list(getattr(failure, "problems", ()))}
        self._supervisor.reloaded(began, report)

    def _close(self) -> None:
        deadline = time.monotonic() + ENDS_WITHIN
        for box in self._outboxes.values():
            box.stop(max(deadline - time.monotonic(), 0))
        self._send_reports()
        self._watch.close()


def run_notices(settings: Settings, channel_number: int | None = None) -> None:
    """Sends notices until SIGTERM or SIGINT; raises `SignerError` if it cannot start.

    As root it becomes SIGNER_NOTICES_USER first. A file of channels that is not good ends nothing: the process says so,
    and takes it at a reload.
    """
    supervisor = Supervisor(adopt_channel(channel_number), os.environ)
    if settings.notices_file is None:
        raise BadSettings("notices_off", "SIGNER_NOTICES_FILE is not set", "set it to a file of channels")
    become_sender(settings)
    forbid_dumps()
    os.umask(0o077)
    os.environ.setdefault("RES_OPTIONS", _RESOLVER)
    with held(claim_directory(settings.notices_dir)):
        keeper = None if settings.keeper_user is None else look_up_user(settings.keeper_user).pw_uid
        Process(settings, supervisor, os.geteuid() if keeper is None else keeper).serve()


def become_sender(settings: Settings) -> None:
    """Root becomes the user of the process that sends notices; raises `BadSettings`."""
    if os.geteuid() != 0:
        return
    if settings.notices_user is None:
        raise BadSettings(
            "users_missing", "started as root without SIGNER_NOTICES_USER", "set it to an unprivileged user"
        )
    if look_up_user(settings.notices_user).pw_uid != 0:
        become(settings.notices_user)


def claim_directory(directory: Path) -> int:
    """Locks SIGNER_NOTICES_DIR while the descriptor is open; raises `BadSettings` or `Unavailable`."""
    text = "another process sends notices from SIGNER_NOTICES_DIR"
    try:
        return claim(directory / LOCK, Unavailable("notices_dir_in_use", text, "stop it, or set another one"))
    except OSError as error:
        raise BadSettings(
            "notices_dir_unusable",
            f"SIGNER_NOTICES_DIR cannot be used: {error.strerror}",
            "make it, owned by the user of SIGNER_NOTICES_USER, mode 0711",
        ) from None
