"""`signer witness serve` as a process: what it promises over kill -9, its bounds, and what it costs."""

from __future__ import annotations

import http.client
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from signer.ledger.checkpoint import check_cosignature, parse_note, parse_signatures, parse_vkey
from signer.witness.server import MAX_BODY, MAX_CONNECTIONS, MAX_OF_ADDRESS
from signer.witness.state import Log
from tests.parts import ports
from tests.parts.service import ROOT
from tests.parts.small_log import SmallLog
from tests.parts.witness_process import NAME, TYPE, WitnessProcess

LOG = SmallLog()


def add(witness: WitnessProcess, old: int, new: int, log: SmallLog = LOG) -> tuple[int, bytes]:
    return witness.ask("POST", "/add-checkpoint", log.request(old, new))


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[WitnessProcess]:
    process = WitnessProcess(tmp_path / "state", str(LOG.vkey))
    try:
        process.start()
        yield process
    finally:
        process.end(signal.SIGKILL)


def test_a_rewritten_log_is_refused_by_a_witness_that_was_killed_after_each_answer(witness: WitnessProcess) -> None:
    key = parse_vkey(witness.run("key", "--name", NAME).stdout.strip())
    old = 0
    for new in (3, 5, 8):
        status, body = add(witness, old, new)
        assert status == 200
        check_cosignature(LOG.note(new).with_signatures(parse_signatures(body.decode())), key)
        assert witness.end(signal.SIGKILL) == -signal.SIGKILL
        witness.start()
        assert add(witness, old, new) == (409, f"{new}\n".encode())
        old = new
    rewritten = SmallLog(fork_at=4)
    assert add(witness, 8, 8, rewritten)[0] == add(witness, 8, 9, rewritten)[0] == 422
    assert add(witness, 8, 7, rewritten)[0] == 400
    listed = witness.run("list")
    assert (listed.returncode, listed.stdout.splitlines()[1].split()[2:]) == (1, ["1", "1", LOG.origin])
    status, newest = witness.ask("GET", f"/{Log(LOG.origin, ()).origin_hash}/checkpoint")
    assert (status, parse_note(newest).text) == (200, LOG.note(8).text)
    check_cosignature(parse_note(newest), key)
    assert b"REFUSED" in witness.log_file.read_bytes()


def test_a_request_that_is_cut_off_by_kill_changes_nothing(witness: WitnessProcess) -> None:
    add(witness, 0, 3)
    with witness.connect() as half:
        body = LOG.request(3, 5)
        half.sendall(b"POST /add-checkpoint HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:-1])
        witness.end(signal.SIGKILL)
    witness.start()
    assert add(witness, 0, 5) == (409, b"3\n")


def test_one_state_is_not_shared_and_a_signal_ends_it(witness: WitnessProcess) -> None:
    second = witness.run("serve", "--name", NAME, "--log", str(LOG.vkey), "--listen", f"{ports.LOOPBACK}:1")
    assert (second.returncode, "another witness uses this state" in second.stderr) == (1, True)
    assert witness.end(signal.SIGTERM) == 0
    witness.start()


def test_requests_that_are_too_large_or_not_http(witness: WitnessProcess) -> None:
    assert witness.ask("POST", "/add-checkpoint", b"x" * (MAX_BODY + 1))[0] == 413
    for junk, status in ((b"\x16\x03\x01\x02\x00", b"400"), (b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000, b"413")):
        with witness.connect() as stranger:
            stranger.sendall(junk)
            assert stranger.recv(100).split()[1] == status
    assert add(witness, 0, 3)[0] == 200


def test_a_connection_serves_one_request_after_another_and_none_that_is_pipelined(witness: WitnessProcess) -> None:
    connection = http.client.HTTPConnection(ports.LOOPBACK, witness.port, timeout=60)
    for old, new in ((0, 2), (2, 4)):
        connection.request("POST", "/add-checkpoint", LOG.request(old, new), TYPE)
        response = connection.getresponse()
        assert (response.status, bool(response.read())) == (200, True)
    connection.close()
    with witness.connect() as stranger:
        stranger.sendall(b"GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\n\r\n")
        received = b""
        while piece := stranger.recv(4096):
            received += piece
        assert received.count(b"HTTP/1.1 404") == 1


def test_silent_strangers_keep_nobody_out(witness: WitnessProcess) -> None:
    strangers = [witness.connect() for _ in range(2 * MAX_CONNECTIONS)]
    try:
        assert add(witness, 0, 3)[0] == 200
        opened = len(list(Path(f"/proc/{witness.pid}/fd").iterdir()))
        assert opened < MAX_OF_ADDRESS + 16
    finally:
        for stranger in strangers:
            stranger.close()


def test_a_witness_that_has_answered_takes_at_most_30_megabytes(witness: WitnessProcess) -> None:
    assert add(witness, 0, 64)[0] == 200
    facts = Path(f"/proc/{witness.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    kept = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in facts if line.endswith(" kB")}
    assert kept["Rss"] <= 30_000_000, kept


def test_it_loads_no_parser_of_other_keys() -> None:
    """`sshpubkeys`, and `cryptography`'s loaders of all kinds of keys, would take 3 of the 30 megabytes."""
    code = "import sys, signer.cli.witness_process; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {
        "sshpubkeys", "ecdsa", "requests", "click", "asyncio", "sqlite3", "signer.ca.key", "signer.ssh.publickey",
        "cryptography.hazmat.primitives.serialization",
    } & set(done.stdout.split())  # fmt: skip
    assert loaded == set()
