"""The keeper is killed again and again while clients ask: nothing that left it is missing from the record."""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import signal
import statistics
import threading
import time
from hashlib import sha256

import pytest

from signer.ledger.audit import verify
from signer.ledger.reader import LedgerReader
from signer.ssh.wire import Reader
from tests.parts import ports
from tests.parts.keys import KeyRing
from tests.parts.service import Service, StartService

CLIENTS = 8
KILLS = 25


def signed_part(certificate: str) -> tuple[int, str]:
    """Serial, and the SHA-256 of everything before the signature, of an ed25519 certificate's line."""
    blob = base64.b64decode(certificate.split()[1])
    reader = Reader(blob)
    for _ in ("kind", "nonce", "key"):
        reader.string()
    serial = reader.uint64()
    reader.uint32()
    for _ in ("key id", "principals"):
        reader.string()
    reader.uint64()
    reader.uint64()
    for _ in ("critical options", "extensions", "reserved", "CA key"):
        reader.string()
    signature = reader.string()
    assert reader.at_end()
    return serial, sha256(blob[: -4 - len(signature)]).hexdigest()


class Client:
    """Asks for one certificate after the other on one connection until told to stop, and keeps all it hears."""

    def __init__(self, service: Service, line: str, stop: threading.Event) -> None:
        self._service, self._stop = service, stop
        self._body = json.dumps({"public_key": line}).encode()
        self._headers = {"Authorization": f"Bearer {service.tokens['deploy-agent']}"}
        self.certificates: list[str] = []
        self.times: list[tuple[float, float]] = []  # when each was asked for, and when it came
        self.statuses: set[int] = set()
        self.told_to_wait = True
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        connection = http.client.HTTPConnection(ports.LOOPBACK, self._service.port, timeout=30)
        try:
            while not self._stop.is_set():
                asked = time.monotonic()
                connection.request("POST", "/api/sign/llmops", self._body, self._headers)
                response = connection.getresponse()
                body = response.read()
                self.statuses.add(response.status)
                if response.status == 201:
                    self.certificates.append(json.loads(body)["certificate"])
                    self.times.append((asked, time.monotonic()))
                else:
                    self.told_to_wait = self.told_to_wait and response.getheader("Retry-After") is not None
                    time.sleep(0.05)
        finally:
            connection.close()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_no_certificate_is_lost_or_doubled_when_the_keeper_is_killed_again_and_again(
    start_service: StartService, keyring: KeyRing
) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    service = start_service()
    stop = threading.Event()
    clients = [Client(service, keyring("ed25519").public_line, stop) for _ in range(CLIENTS)]
    gaps: list[float] = []
    try:
        for _ in range(KILLS):
            time.sleep(chance.uniform(0.02, 0.6))
            killed, dead = kill_keeper(service)
            gaps.append(wait_for_certificate(clients, dead) - killed)
    finally:
        stop.set()
        for client in clients:
            client.thread.join()
    print(f"back after median {statistics.median(gaps):.2f} s, at most {max(gaps):.2f} s")
    assert {status for client in clients for status in client.statuses} == {201, 503}
    assert all(client.told_to_wait for client in clients), "a 503 without Retry-After"
    assert service.stop() == 0

    received = [signed_part(text) for client in clients for text in client.certificates]
    assert len({serial for serial, _ in received}) == len(received), "a serial came twice"
    reader = LedgerReader(service.data_dir)
    try:
        head = verify(reader)
        recorded = {
            int(body["serial"]): body["to_be_signed_sha256"]
            for (text,) in reader.query("SELECT body FROM events WHERE kind = 'certificate.issued'")
            if (body := json.loads(text))
        }
        starts = reader.query("SELECT count(*) FROM events WHERE kind = 'keeper.started'")[0][0]
    finally:
        reader.close()
    print(f"{len(received)} certificates received, {len(recorded)} recorded, {head.seq} events")
    assert starts == KILLS + 1
    assert [serial for serial, digest in received if recorded.get(serial) != digest] == []
    assert sorted(recorded) == list(range(1, len(recorded) + 1)), "serials rise by one"


@pytest.mark.slow
def test_a_keeper_that_is_killed_while_it_starts_is_back_soon_too(
    start_service: StartService, keyring: KeyRing
) -> None:
    service = start_service()
    for _ in range(6):
        kill_keeper(service)
        time.sleep(0.05)
    line = keyring("ed25519").public_line
    deadline = time.monotonic() + 30
    while service.sign(line).status != 201:
        assert time.monotonic() < deadline, service.log()
        time.sleep(0.02)


def kill_keeper(service: Service) -> tuple[float, float]:
    """SIGKILL; when it was sent, and when the process was gone."""
    deadline = time.monotonic() + 30
    while (pid := service.keeper_pid()) is None:
        assert time.monotonic() < deadline, "no keeper was started"
        time.sleep(0.005)
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    while service.keeper_pid() == pid:
        time.sleep(0.001)
    return killed, time.monotonic()


def wait_for_certificate(clients: list[Client], after: float) -> float:
    """When the first of them got a certificate that it had asked for after that moment."""
    deadline = time.monotonic() + 30
    while not (came := [moment for client in clients for asked, moment in client.times[-9:] if asked > after]):
        assert time.monotonic() < deadline, "the service did not come back"
        time.sleep(0.005)
    return min(came)
