"""The keeper's end of notices: hands them to the process that sends them, and remembers what it reports.

Nothing here waits. The keeper connects to that process's socket; a notice that finds no room there is made again from
the ledger later, from the newest event that the process had. Without a connection nothing is kept: the process says
what it had when it connects. Notices change no decision, and a failure here affects nobody but their readers.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from signer.authority.notices import Fault, LastingFaults
from signer.errors import BadFormat, LedgerBroken, Unavailable
from signer.hardening import peer_process
from signer.model import Entry, Head
from signer.protocol import notices
from signer.protocol.log_limit import LogLimit
from signer.protocol.replies import RequestDetails, ToldRow
from signer.service.supervisor import waiting
from signer.units import parse_timestamp, timestamp

CONNECT_EVERY: Final = 0.2  # seconds between two attempts; a notice leaves within a second, also after a start
FAULTS_EVERY: Final = 10.0  # seconds between two looks at the state of the service
TOKENS_EVERY: Final = 600.0  # seconds between two looks at the ends of tokens
RETRY_AFTER: Final = 0.1  # seconds for a socket without room
HANDED_OVER_WITHIN: Final = 5.0  # seconds from a request to its notice
MAX_REQUESTS: Final = 2_000  # of which it is remembered who was told
MAX_OF_REQUEST: Final = 64  # rows of a request
MAX_ERROR: Final = 200  # characters
MAX_NAME: Final = 100  # characters of a request, a kind or a notice that the process names
_AT_ONCE: Final = 64  # messages read, or events read from the ledger, in one round
_MAX_COUNT: Final = 2**31  # of notices in a report


class Events(Protocol):
    """The ledger as it is used here."""

    def noticed_after(self, after: int, limit: int) -> list[Entry]: ...
    def first_since(self, time_ms: int) -> int: ...
    def head(self) -> Head: ...


@dataclass(frozen=True, slots=True)
class SenderPlace:
    """Where the process that sends notices listens, and the user that it must have."""

    socket: Path
    uid: int


@dataclass(frozen=True, slots=True)
class Sources:
    """What notices are made from: an event, the faults of the service by name, and the notices of tokens that end."""

    of_event: Callable[[Entry], notices.Notice | None]
    faults: Callable[[], Mapping[str, Fault]]
    tokens: Callable[[], Sequence[notices.Notice]]


@dataclass(slots=True)
class Counts:
    """Of one channel, since the keeper started; `queued` and `error` are as of the last report."""

    totals: Counter[str] = field(default_factory=Counter)
    queued: int = 0
    error: str = ""


class Notifier:
    """Never raises, and never blocks. `begun_at` is the newest event when the keeper started: who was never told
    anything is told what is newer."""

    def __init__(
        self,
        place: SenderPlace,
        selector: selectors.BaseSelector,
        ledger: Events,
        sources: Sources,
        lines: LogLimit,
        *,
        begun_at: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._place = place
        self._selector = selector
        self._ledger = ledger
        self._sources = sources
        self._lines = lines
        self._clock = clock  # seconds since 1970
        self._sock: socket.socket | None = None
        self._channels: tuple[notices.ChannelFacts, ...] | None = None  # None before its first message
        self._begun_at = begun_at
        self._position = 0  # the newest event that the process has, or that needs no notice
        self._is_behind = False  # events after the position may need notices
        self._faults = LastingFaults()
        self._unsent: deque[notices.Notice] = deque()  # of faults, which the ledger cannot give again
        self._ending: deque[notices.Notice] = deque()  # of tokens, that were not handed over yet
        self._handed_over: set[str] = set()  # ids of notices of tokens, in this connection
        self._told: OrderedDict[str, dict[tuple[str, str], ToldRow]] = OrderedDict()  # by request
        self._changed: set[str] = set()
        self._counts: dict[str, Counts] = {}
        self._tried = self._looked_at_faults = self._looked_at_tokens = -TOKENS_EVERY
        self._fault = ""  # why there are no channels, as the process says

    # --- one round of the keeper's loop ---------------------------------------------------------------------------

    def turn(self, entries: Iterable[Entry], *, has_reports: bool = True) -> None:
        """Reads reports, then hands over the notices of newly recorded events and of those that are missing.

        `has_reports` is false if nothing waits at the socket: to find that out costs a system call a signature.
        """
        now = time.monotonic()
        if self._sock is None and now - self._tried >= CONNECT_EVERY:
            self._tried = now
            self._connect()
        if has_reports:
            self._receive()
        if self._channels is None:
            return  # what was recorded meanwhile comes from the ledger, after the process has said what it has
        for entry in entries:
            if not self._is_behind and not self._offer(entry):
                self._is_behind = True
        if self._is_behind:
            self._catch_up()
        self._tell_state(now)

    def due(self) -> float | None:
        """Seconds until `turn` has something to do; None if only another event gives it something."""
        if self._sock is None:
            return CONNECT_EVERY
        return RETRY_AFTER if self._is_behind and self._channels is not None else None

    def close(self) -> None:
        if self._sock is not None:
            self._selector.unregister(self._sock)
            self._sock.close()
        self._sock = self._channels = None

    def _connect(self) -> None:
        """Connects if a process of the right user listens."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            sock.connect(str(self._place.socket))
            if (uid := peer_process(sock).uid) != self._place.uid:
                text = f"no notices are sent: user {uid} listens at SIGNER_NOTICES_DIR, not user {self._place.uid}"
                self._lines.warn("a foreign process listens for notices", text)
                raise PermissionError
        except OSError:  # it is not running: the launcher or systemd starts it
            sock.close()
            return
        self._sock, self._channels = sock, None
        self._selector.register(sock, selectors.EVENT_READ, self)

    def _receive(self) -> None:
        if (sock := self._sock) is None:
            return
        for data in waiting(sock, notices.MAX_MESSAGE, _AT_ONCE):
            if not data:
                self.close()
                return
            try:
                message = notices.read_for_keeper(data)
            except BadFormat as bad:
                self._lines.warn("a report about notices is malformed", f"the sender of notices is dropped: {bad.text}")
                self.close()
                return
            if isinstance(message, notices.Hello):
                self._begin(message)
                if self._sock is not sock:  # nothing could be begun
                    return
            elif isinstance(message, notices.Told):
                self._note_again(message)
            else:
                self._note(message)

    # --- events ---------------------------------------------------------------------------------------------------

    def _begin(self, hello: notices.Hello) -> None:
        """Starts from what the process had; events that are too old to be told are left out."""
        is_first = self._channels is None
        self._channels, self._fault = hello.channels, hello.fault[:MAX_ERROR]
        for name in [name for name in self._counts if name not in {channel.name for channel in hello.channels}]:
            del self._counts[name]
        for channel in hello.channels:
            self._counts.setdefault(channel.name, Counts())
        if not is_first:
            return
        try:
            oldest = self._ledger.first_since(int(self._clock() - notices.KEPT_FOR) * 1000) - 1
            cursor = hello.cursor
            if cursor is None or cursor > self._ledger.head().seq:  # a restored ledger gives numbers again
                cursor = self._begun_at
                self._send(notices.Start(seq=cursor))
            self._position, self._is_behind = max(cursor, oldest, 0), True
        except (Unavailable, LedgerBroken):
            self.close()  # the process tries again to say what it has
            return
        self._unsent = deque(self._faults.begun(int(self._clock())))
        self._ending.clear()
        self._handed_over.clear()
        self._looked_at_tokens = -TOKENS_EVERY

    def _offer(self, entry: Entry) -> bool:
        """Sends the notice of an event, if it has one; False if there was no room, or it cannot be made now."""
        try:
            notice = self._make(entry)
        except (Unavailable, LedgerBroken):
            return False
        if notice is not None and not self._send(notice):
            return False
        self._position = entry.seq
        return True

    def _make(self, entry: Entry) -> notices.Notice | None:
        try:
            return self._sources.of_event(entry)
        except (Unavailable, LedgerBroken):
            raise
        except Exception as error:  # noqa: BLE001 - a notice that cannot be made must not end the keeper
            self._lines.fault("internal error while a notice was made", error)
            return None

    def _catch_up(self) -> None:
        """Hands over a slice of what is missing."""
        try:
            entries = self._ledger.noticed_after(self._position, _AT_ONCE)
        except (Unavailable, LedgerBroken):
            return
        for entry in entries:
            if not self._offer(entry):
                return
        self._is_behind = len(entries) == _AT_ONCE

    def _send(self, message: notices.Notice | notices.Start) -> bool:
        """False if there is no room; what cannot be sent at all is left out."""
        if self._sock is None:
            return False
        data = notices.encode(message)
        if len(data) > notices.MAX_MESSAGE:
            text = f"it takes {len(data):,} bytes, and at most {notices.MAX_MESSAGE:,} may be"
            self._lines.warn("a notice is too large", f"the notice of event {message.seq} is not sent: {text}")
            return True
        try:
            self._sock.send(data)
        except BlockingIOError:
            return False
        except OSError:
            self.close()
            return False
        if isinstance(message, notices.Notice) and message.request is not None:
            self._note_handed_over(message, message.request)
        return True

    # --- the state of the service ---------------------------------------------------------------------------------

    def _tell_state(self, now: float) -> None:
        try:
            self._look_at_state(now)
        except Exception as error:  # noqa: BLE001 - what humans are told must not end the keeper
            self._lines.fault("internal error while the state was looked at for notices", error)
        while self._unsent and self._send(self._unsent[0]):
            self._unsent.popleft()
        while self._ending and not self._unsent and self._send(self._ending[0]):
            self._handed_over.add(self._ending.popleft().id)
        if len(self._unsent) > _AT_ONCE:  # too many began and ended while there was no room: what lasts is told
            self._unsent = deque(self._faults.begun(int(self._clock())))

    def _look_at_state(self, now: float) -> None:
        if now - self._looked_at_faults >= FAULTS_EVERY:
            self._looked_at_faults = now
            self._unsent += self._faults.update(self._sources.faults(), int(self._clock()))
        if now - self._looked_at_tokens >= TOKENS_EVERY:
            self._looked_at_tokens = now
            ending = self._sources.tokens()
            self._handed_over &= {notice.id for notice in ending}
            self._ending = deque(notice for notice in ending if notice.id not in self._handed_over)

    # --- who was told ---------------------------------------------------------------------------------------------

    def _note_handed_over(self, notice: notices.Notice, request: str) -> None:
        """Every channel that takes the notice is sending it now, unless it has reported more than that."""
        for channel in self._channels or ():
            if channel.takes(notice.topic, notice.concerns):
                rows = self._rows_of(request)
                if (key := (channel.name, notice.id)) not in rows:
                    rows[key] = _row(channel, notice.kind, "sending", int(self._clock()), "")

    def _note(self, report: notices.Report) -> None:
        channel = next((one for one in self._channels or () if one.name == report.channel), None)
        if channel is None:
            return
        counts = self._counts.setdefault(channel.name, Counts())
        counts.queued = min(max(report.queued, 0), _MAX_COUNT)
        counts.error = report.error[:MAX_ERROR] if report.state == "failed" else ""
        counts.totals[report.state] += 1
        if report.request is None or report.request not in self._told:  # no other request was ever handed over
            return
        rows = self._rows_of(report.request)
        if (key := (channel.name, report.notice)) in rows:
            at = min(max(report.at, 0), 2**35)
            rows[key] = _row(channel, rows[key].of, report.state, at, report.error)
            self._changed.add(report.request)

    def _note_again(self, told: notices.Told) -> None:
        """What a former keeper knew of a request, or this one before the connection broke."""
        channel = next((one for one in self._channels or () if one.name == told.channel), None)
        if channel is None:
            return
        request, at = told.request[:MAX_NAME], min(max(told.at, 0), 2**35)
        row = _row(channel, told.of[:MAX_NAME], told.state, at, told.error)
        self._rows_of(request)[channel.name, told.notice[:MAX_NAME]] = row
        self._changed.add(request)

    def _rows_of(self, request: str) -> dict[tuple[str, str], ToldRow]:
        rows = self._told.setdefault(request, {})
        self._told.move_to_end(request)
        if len(self._told) > MAX_REQUESTS:
            self._told.popitem(last=False)
        while len(rows) >= MAX_OF_REQUEST:
            del rows[next(iter(rows))]
        return rows

    def told(self, shown: RequestDetails) -> RequestDetails:
        """The reply with who was told of the request, how, and the sending error."""
        rows = list(self._told.get(shown.request, {}).values())
        is_new = parse_timestamp(shown.frozen.asked) > self._clock() - HANDED_OVER_WITHIN
        if not rows and is_new and shown.needs and shown.state == "pending":  # handed over after this reply
            concerns = {shown.frozen.identity, *shown.may_approve}
            now = int(self._clock())
            rows = [
                _row(channel, "approval.requested", "sending", now, "")
                for channel in self._channels or ()
                if channel.takes("requests", concerns)
            ]
        return shown.model_copy(update={"told": [self._with_error(row) for row in rows]})

    def _with_error(self, row: ToldRow) -> ToldRow:
        """A notice that waits behind one that fails fails for the same reason."""
        counts = self._counts.get(row.channel)
        if row.state != "sending" or counts is None or not counts.error:
            return row
        return row.model_copy(update={"state": "failed", "error": counts.error})

    def take_changes(self) -> set[str]:
        """The requests of which something was reported since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def warnings(self) -> list[str]:
        """What should not stay as it is, for whoever looks whether the service is ready; names nobody."""
        if self._channels is None:
            return ["the notices process is not connected, so no notices are sent: see its log"]
        if not self._channels:
            return [f"no notices are sent: {self._fault or 'no channel is configured'}"]
        failing = sum(bool(counts.error) for counts in self._counts.values())
        if not failing:
            return []
        return [f"{failing} of {len(self._channels)} channels do not take notices: run `signer notices test`"]

    @property
    def is_up(self) -> bool:
        """Whether the process that sends notices is there and has channels."""
        return bool(self._channels)

    def gauges(self) -> Iterator[Metric]:
        return render_metrics(self._counts, is_up=self.is_up)


def render_metrics(counts: Mapping[str, Counts], *, is_up: bool) -> Iterator[Metric]:
    """The metrics of notices, by channel."""
    text = "1 while the process that sends notices is connected and has channels"
    yield GaugeMetricFamily("signer_notices_up", text, value=int(is_up))
    for state, name, text in (
        ("sent", "signer_notices_sent", "notices that a channel took"),
        ("failed", "signer_notices_failed", "attempts to send a notice that failed"),
        ("dropped", "signer_notices_dropped", "notices that were given up"),
    ):
        family = CounterMetricFamily(name, text, labels=["channel"])
        for channel, found in sorted(counts.items()):
            family.add_metric([channel], found.totals[state])
        yield family
    queued = GaugeMetricFamily("signer_notices_queued", "notices that wait to be sent", labels=["channel"])
    for channel, found in sorted(counts.items()):
        queued.add_metric([channel], found.queued)
    yield queued


def _row(channel: notices.ChannelFacts, of: str, state: str, at: int, error: str) -> ToldRow:
    return ToldRow.model_validate(
        {
            "channel": channel.name,
            "kind": channel.kind,
            "people": list(channel.people),
            "of": of,
            "state": state,
            "at": timestamp(at),
            "error": error[:MAX_ERROR] or None,
        }
    )
