"""The log of the service never waits for its reader."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from signer.service.logs import LossyHandler


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("signer", logging.WARNING, __file__, 1, text, (), None)


class Ends:
    """A handler and the other end of its descriptor."""

    def __init__(self, kind: str) -> None:
        if kind == "pipe":
            self.reader, self.writer = os.pipe()
            os.set_blocking(self.writer, False)
        else:  # as journald's; both stay blocking, because the description is shared
            ours, theirs = socket.socketpair()
            self.reader, self.writer = ours.detach(), theirs.detach()
        self.handler = LossyHandler(self.writer)

    def read(self) -> str:
        os.set_blocking(self.reader, False)
        found = b""
        try:
            while piece := os.read(self.reader, 65536):
                found += piece
        except BlockingIOError:
            return found.decode()
        return found.decode()


@pytest.fixture(params=["pipe", "socket"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    made = Ends(request.param)
    yield made
    made.handler.close()
    os.close(made.reader)
    os.close(made.writer)


@pytest.mark.timeout(20)
def test_audit_lines_that_nobody_reads_are_lost_and_counted(ends: Ends) -> None:
    written = 3_000
    for number in range(written):
        ends.handler.emit(record(f"line {number} {'x' * 500}"))
    first = ends.read().splitlines()
    whole = [line for line in first if line.endswith("x" * 500)]
    assert 0 < len(whole) < written
    ends.handler.emit(record("after"))
    told, after = [line for line in ends.read().splitlines() if line]
    assert told == f"signer: {written - len(whole)} lines of this log found no room"
    assert after == "after"


@pytest.mark.timeout(20)
def test_a_long_line_that_is_cut_off_does_not_run_into_the_next_one(ends: Ends) -> None:
    ends.handler.emit(record("y" * 10_000_000))
    assert set(ends.read()) == {"y"}
    ends.handler.emit(record("after"))
    assert ends.read() == "\nsigner: 1 line of this log found no room\nafter\n"


def test_a_log_whose_reader_is_gone_raises_nothing() -> None:
    reader, writer = os.pipe()
    handler = LossyHandler(writer)
    os.close(reader)
    handler.emit(record("one"))
    os.close(writer)


def test_stderr_is_not_blocking_here_and_blocking_for_others(tmp_path: Path) -> None:
    script = (
        "import os, signer.service.logs as logs; logs.start_log(); import logging;"
        "logging.getLogger('x').warning('%s', 'said'); print(os.get_blocking(2))"
    )
    reader, writer = os.pipe()
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=writer, check=True, text=True)
    assert done.stdout == "False\n"
    assert os.get_blocking(writer)
    assert os.read(reader, 100) == b"signer: said\n"
    log = tmp_path / "log"
    with log.open("wb") as file:
        subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=file, check=True)
    assert log.read_bytes() == b"signer: said\n"
    os.close(reader)
    os.close(writer)
