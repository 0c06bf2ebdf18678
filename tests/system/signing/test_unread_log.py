"""A service whose log nobody reads."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parts.eventually import eventually
from tests.parts.keys import KeyRing
from tests.parts.service import STANDARD_POLICY, Service


@pytest.fixture
def full_pipe() -> Iterator[int]:
    """The writing end of a pipe that is full and stays so."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writer, True)
    yield writer
    os.close(writer)
    os.close(reader)


@pytest.mark.timeout(60)
def test_audit_a_log_that_nobody_reads_stops_nothing(tmp_path: Path, keyring: KeyRing, full_pipe: int) -> None:
    line = keyring("ed25519", "user").public_line
    service = Service(tmp_path / "service", keyring("ed25519", "ca"))
    try:
        service.stderr = full_pipe
        service.start()
        assert service.sign(line, identity="operator").status == 201
        service.write_policy("nonsense")
        os.kill(service.pid, signal.SIGHUP)  # a line of the keeper's
        first = service.keeper_pid()
        assert first is not None
        os.kill(first, signal.SIGKILL)  # a line of the launcher's
        service.write_policy(STANDARD_POLICY)
        eventually(lambda: service.keeper_pid() not in (None, first) and service.is_ready(), "the keeper is back")
        assert service.sign(line, identity="operator").status == 201
    finally:
        service.stop()
