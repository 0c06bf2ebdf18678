"""The query reader: a process that answers lookups with a read-only handle of the ledger, and the keeper's end of it.

Pages are not made in the keeper, where they would take time from signing. The process holds no key and no policy. Each
identity has a share of its time, so that nobody who pages without pause slows down others or the signing.

`python -m signer.service.query_reader DESCRIPTOR DATA_DIR` is the process.
"""

from __future__ import annotations

import selectors
import socket
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Generic, TypeVar

from signer.errors import LedgerBroken, Refused, SignerError, Unavailable
from signer.hardening import serve_parent_only
from signer.ledger.lookups import Lookup, Reader, decode_lookup, encode_lookup, error_message
from signer.ledger.pages import CertificateReader
from signer.service.helper_process import BUFFER, HelperProcess

SHARE: Final = 0.1  # of the process's time, for one identity that asks without pause
BURST: Final = 0.5  # seconds of its time that an identity may use at once after a pause
MAX_WAITING: Final = 16  # lookups of one identity
DEADLINE: Final = 5.0  # seconds for one lookup; the api waits 10 s for a reply
_ENDS_WITHIN: Final = 0.5  # seconds for a process that was killed
_K = TypeVar("_K")


@dataclass(slots=True)
class _Asker(Generic[_K]):
    """The waiting lookups of one identity, and the seconds that it may still use as of `at` (monotonic)."""

    waiting: deque[tuple[_K, Lookup]] = field(default_factory=deque)
    budget: float = BURST
    at: float = 0.0

    def refill(self, now: float) -> float:
        self.budget = min(BURST, self.budget + SHARE * (now - self.at))
        self.at = now
        return self.budget


class QueryReader(Generic[_K]):
    """Has lookups answered by a process of its own, one at a time; `_K` is what the keeper knows a lookup by."""

    def __init__(self, data_dir: Path, selector: selectors.BaseSelector, processors: Collection[int] = ()) -> None:
        self._askers: OrderedDict[str, _Asker[_K]] = OrderedDict()  # the next one first
        self._current: tuple[_K, Lookup, float] | None = None  # with the time when it was sent
        self._helper = HelperProcess("signer.service.query_reader", data_dir, selector, self, processors)

    def start(self) -> None:
        """Starts the process; it is started again when it has ended and a lookup waits, also if it cannot be now."""
        self._helper.start()

    def submit(self, key: _K, lookup: Lookup) -> None:
        """Queues a lookup; raises `Refused` if too many of the same identity wait."""
        asker = self._askers.setdefault(lookup.asker, _Asker(at=time.monotonic()))
        if len(asker.waiting) >= MAX_WAITING:
            raise Refused(
                "too_many_lookups",
                f"{len(asker.waiting)} lookups of {lookup.asker} are already waiting",
                "wait for their replies, then retry",
            )
        asker.waiting.append((key, lookup))

    def collect(self) -> list[tuple[_K, bytes]]:
        """The replies since the last call; sends the next lookup. Never blocks."""
        if not self._askers:
            return []
        replies = self._receive() if self._current is not None else []
        if self._current is None:
            self._send_next()
        return replies

    def due(self) -> float | None:
        """Seconds until `collect` has something to do without a reply; None if no lookup waits."""
        if not self._askers:
            return None
        if self._current is not None:
            return max(self._current[2] + DEADLINE - time.monotonic(), 0.0)
        now = time.monotonic()
        waits = [max(-asker.refill(now), 0.0) / SHARE for asker in self._askers.values() if asker.waiting]
        if not waits:
            return None
        return max(min(waits), self._helper.startable_in(), 0.001)

    def close(self) -> list[_K]:
        """Ends the process; returns the keys of the lookups without a reply."""
        left = [self._current[0]] if self._current is not None else []
        left += [key for asker in self._askers.values() for key, _ in asker.waiting]
        self._current = None
        self._askers.clear()
        self._helper.stop()
        self._helper.close(_ENDS_WITHIN)
        return left

    def _receive(self) -> list[tuple[_K, bytes]]:
        """The reply to the current lookup, if it is there; an error if the process has ended or hangs."""
        assert self._current is not None, "only a lookup that was sent has a reply"  # noqa: S101
        key, lookup, sent = self._current
        now = time.monotonic()
        reply = self._helper.receive()
        if reply is None and now < sent + DEADLINE:
            return []
        self._current = None
        asker = self._askers[lookup.asker]
        asker.refill(now)
        asker.budget -= now - sent
        if not reply:
            self._helper.stop()
            text = "the process that reads the ledger did not answer"
            reply = error_message(Unavailable("reader_gone", text, "retry in a second"))
        return [(key, reply)]

    def _send_next(self) -> None:
        """Sends the lookup of the next identity that has time left; identities take turns."""
        now = time.monotonic()
        for name, asker in list(self._askers.items()):
            if asker.waiting and asker.refill(now) > 0:
                if not self._helper.ensure():
                    return
                key, lookup = asker.waiting.popleft()
                self._askers.move_to_end(name)
                self._current = (key, lookup, now)
                self._helper.send(encode_lookup(lookup))
                return
            if not asker.waiting and asker.budget >= BURST:
                del self._askers[name]


def answer_lookup(message: bytes, reader: Reader) -> bytes:
    """The reply to a lookup; never raises, so that one that fails does not end the process."""
    try:
        return decode_lookup(message).answer(reader)
    except SignerError as error:
        return error_message(error)
    except Exception as error:  # noqa: BLE001 - a row that no signer wrote must not end the process
        text = f"the ledger holds a row that cannot be shown: {type(error).__name__}"
        return error_message(
            LedgerBroken("ledger_tables_differ", text, "stop the keeper and run `signer ledger rebuild`")
        )


def serve(connection: socket.socket, data_dir: Path) -> None:
    """Answers lookups until the keeper closes its end."""
    reader = CertificateReader(data_dir)
    while message := connection.recv(BUFFER):
        connection.send(answer_lookup(message, reader))
        reader.release()
    reader.close()


def main(descriptor: int, data_dir: Path) -> None:
    """The process. It ends with the keeper, not by the signals that a terminal or systemd sends to both."""
    serve_parent_only()
    with socket.socket(fileno=descriptor) as connection:
        connection.setblocking(True)
        serve(connection, data_dir)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
