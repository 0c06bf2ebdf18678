"""An api worker that lies: straight into the keeper's socket it gets what the credential in a message allows, and no
more, and it stops nobody else."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from signer.ledger.pages import CertificateReader
from signer.ledger.reader import LedgerReader
from signer.model import Filter
from signer.protocol.commands import MAX_REPLY
from tests.parts.keys import KeyRing
from tests.parts.lying_worker import LyingWorker, Noise, read_reply
from tests.parts.service import STANDARD_POLICY, Service, StartService

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJx5vBkkPC9GdKRcV8nDZ3cW0B3d5tT1m3g5C3v3hC0a"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, keyring: KeyRing) -> Iterator[Service]:
    """One for all tests that leave it as it was; at its end it is still the same keeper."""
    with Service(tmp_path_factory.mktemp("hostile"), keyring("ed25519", "ca")) as started:
        keeper = started.keeper_pid()
        yield started
        assert started.keeper_pid() == keeper, started.log()
        assert "Traceback" not in started.log(), started.log()


@pytest.fixture
def liar(service: Service) -> Iterator[LyingWorker]:
    with LyingWorker(service.socket) as worker:
        yield worker


def certificates(service: Service) -> int:
    reader = LedgerReader(service.data_dir)
    try:
        return reader.last_serial()
    finally:
        reader.close()


def header(**fields: object) -> bytes:
    return json.dumps({"op": "sign", "role": "llmops", "request_id": "liar", **fields}).encode() + b"\n"


def body(**fields: object) -> bytes:
    return json.dumps({"public_key": KEY, **fields}).encode()


DEEP = b"[" * 60_000
MESSAGES = {
    "one byte": b"\0",
    "a newline": b"\n",
    "zeros": b"\0" * 5000,
    "not UTF-8": b"\xff\xfe\xfd" * 100,
    "half a header": header()[:20],
    "half a body": header(token="x") + body()[:30],
    "no newline": header().strip(),
    "a list": b"[]\n",
    "a number": b"1\n",
    "a deep header": b"[" * 16_000,
    "a deep object": b'{"op":' * 2_700,
    "a deep body": header() + DEEP,
    "a deep body in Vault's shape": header(shape="vault") + b'{"a":' + DEEP,
    "a header over its limit": header(token="x" * 17_000),
    "a message over its limit": header() + b" " * 90_000,
    "a large message": header() + b" " * 190_000,
    "a huge number": b'{"op":"certificate","request_id":"a","serial":' + b"9" * 15_000 + b"}\n",
    "not a number": b'{"op":"certificate","request_id":"a","serial":NaN}\n',
    "no operation": header(op=None),
    "an unknown operation": header(op="reload"),
    "the core's own operation": header(op="record"),
    "an operation that is a list": header(op=["sign"]),
    "an operation that is an object": header(op={"sign": 1}),
    "a token that is a number": header(token=1),
    "a token that is a list": header(token=["x"]),
    "a token that is true": header(token=True),
    "a token with a lone surrogate": header(token="\ud800") + body(),
    "our prefix and a lone surrogate": header(token="sgn_\ud800") + body(),
    "an empty token": header(token="") + body(),
    "no token": header() + body(),
    "a wrong token": header(token="sgn_" + "0" * 49) + body(),
    "no request id": b'{"op":"sign","role":"llmops"}\n' + body(),
    "a request id with a newline": header(request_id="a\nb") + body(),
    "a request id that is a list": header(request_id=[]) + body(),
    "a role that is a number": header(role=1) + body(),
    "a role with a lone surrogate": header(role="\ud800") + body(),
    "a role with a newline": header(role="a\nb") + body(),
    "an empty role": header(role="") + body(),
    "a long role": header(role="r" * 300) + body(),
    "an address that is none": header(address="here") + body(),
    "an address that is long": header(address="1" * 10_000) + body(),
    "an address that is a list": header(address=[]) + body(),
    "an address with a zone": header(address="fe80::1%eth0") + body(),
    "a shape that is a list": header(shape=[]) + body(),
    "a content type that is a list": header(shape="vault", content_type=[1]) + body(),
    "a page limit that is true": header(op="certificates", limit=True),
    "a page limit that is text": header(op="certificates", limit="1; drop table events"),
    "a page limit that is negative": header(op="certificates", limit=-1),
    "a serial that is a fraction": header(op="certificate", serial=1.5),
    "a scope that is an object": header(op="freeze") + b'{"scope": {}, "reason": "x"}',
    "a freeze without a credential": header(op="freeze") + b'{"scope": "all", "reason": "x"}',
    "a lift without a credential": header(op="unfreeze", scope="all"),
    "the ledger's head without a credential": header(op="head"),
    "the roles without a credential": header(op="roles"),
}


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_a_message_without_a_good_credential_gets_an_error_and_nothing_else(
    message: bytes, service: Service, liar: LyingWorker
) -> None:
    before = certificates(service)
    answer = liar.say(message)
    assert answer is not None, "the keeper hung up"
    assert set(answer) == {"error"}
    assert answer["error"]["code"] != "internal_error"
    assert certificates(service) == before


def test_an_empty_message_is_a_hang_up_and_disturbs_nobody(service: Service, liar: LyingWorker) -> None:
    connection = liar.connect()
    connection.send(b"")
    assert read_reply(connection) is None
    assert service.is_ready()


FORGED: dict[str, object] = {
    "identity": "operator",
    "kind": "human",
    "groups": ["operators"],
    "may": ["freeze", "ledger.read"],
    "roles": ["llmops"],
    "grant": {"principals": ["root"]},
    "policy": {"roles": {}},
    "serial": 1,
    "now": 0,
    "principals": ["root"],
    "approved": True,
}


def test_an_identity_that_the_message_claims_is_not_believed(service: Service, liar: LyingWorker) -> None:
    answer = liar.ask(body(), op="sign", role="llmops", token=service.tokens["stranger"], **FORGED)
    assert answer["error"]["code"] == "role_not_granted"
    answer = liar.ask(op="head", token=service.tokens["ci"], **FORGED)
    assert answer["error"]["code"] == "not_permitted"
    answer = liar.ask(b'{"scope": "all", "reason": "mine"}', op="freeze", token=service.tokens["ci"], **FORGED)
    assert answer["error"]["code"] == "not_permitted"


def test_a_certificate_names_the_credentials_owner_whatever_the_message_claims(
    service: Service, liar: LyingWorker, keyring: KeyRing
) -> None:
    line = keyring("ed25519").public_line
    sent = json.dumps({"public_key": line}).encode()
    reply = liar.ask(sent, op="sign", role="llmops", token=service.tokens["ci"], **FORGED)["reply"]
    assert (reply["identity"], reply["principals"], reply["key_id"]) == ("ci", ["llmops"], "ci:llmops")
    reader = CertificateReader(service.data_dir)
    issued, entry = reader.certificate(int(reply["serial"])) or (None, None)
    assert issued is not None
    assert entry is not None
    assert (issued.identity, issued.principals, entry.actor) == ("ci", ("llmops",), "ci")
    reader.close()


@pytest.mark.parametrize("shape", ["native", "vault"])
def test_a_body_cannot_claim_more_than_the_credential_allows(
    shape: str, service: Service, liar: LyingWorker, keyring: KeyRing
) -> None:
    line = keyring("ed25519").public_line
    asks: list[dict[str, object]] = [
        {"principals": ["root"], "valid_principals": "root"},
        {"ttl": "720h"},
        {"critical_options": {"force-command": "id"}},
        {"key_id": "operator:llmops"},
        {"cert_type": "host"},
        {"public_key": "ssh-ed25519 AAAA\ud800"},
    ]
    before = certificates(service)
    for ask in asks:
        others_word = "valid_principals" if shape == "native" else "principals"
        fields = {name: value for name, value in ask.items() if name != others_word}
        sent = json.dumps({"public_key": line, **fields}).encode()
        answer = liar.ask(sent, op="sign", shape=shape, role="llmops", token=service.tokens["ci"])
        assert set(answer) == {"error"}, ask
        assert answer["error"]["code"] != "internal_error", answer
    assert certificates(service) == before


def test_a_liar_that_leaves_before_its_reply_costs_nobody_anything(
    service: Service, liar: LyingWorker, keyring: KeyRing
) -> None:
    before = certificates(service)
    sent = json.dumps({"public_key": keyring("ed25519").public_line}).encode()
    for _ in range(50):
        connection = liar.connect()
        connection.send(header(token=service.tokens["ci"]) + sent)
        connection.close()
    assert service.sign(keyring("ed25519").public_line).status == 201
    deadline = time.monotonic() + 30
    while certificates(service) < before + 51 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert certificates(service) == before + 51, "each was recorded, though nobody took it"


class Honest:
    """Somebody who keeps asking over HTTP; a context manager. `bad` holds every answer that was not a certificate."""

    def __init__(self, service: Service, line: str) -> None:
        self._service, self._line = service, line
        self._stop = threading.Event()
        self.good = 0
        self.bad: list[str] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(4)]

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                answer = self._service.sign(self._line, identity="deploy-agent")
            except OSError as error:
                self.bad.append(repr(error))
                continue
            if answer.status == 201:
                self.good += 1
            else:
                self.bad.append(answer.body.decode())
            time.sleep(0.01)

    def __enter__(self) -> Honest:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more: int) -> None:
        """Until that many more certificates came."""
        wanted, deadline = self.good + more, time.monotonic() + 60
        while self.good < wanted:
            assert time.monotonic() < deadline, f"only {self.good} of {wanted}; {self.bad[:3]}"
            time.sleep(0.02)


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - a count


def resident(pid: int) -> int:
    """KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def seconds_of_cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_noise_stops_nobody_and_fills_nothing(start_service: StartService, keyring: KeyRing) -> None:
    """Floods of connections, silent ones, and deaf ones that never take a reply, all at once."""
    service = start_service()
    keeper = service.keeper_pid()
    assert keeper is not None
    line = keyring("ed25519").public_line
    with Honest(service, line) as honest:
        honest.wait_for(20)
        before = resident(keeper)
        with (
            Noise(service.socket, "flood", 30_000) as one,
            Noise(service.socket, "flood", 30_000) as another,
            Noise(service.socket, "silent", 2_000),
            Noise(service.socket, "deaf", 50),
        ):
            honest.wait_for(100)
            assert descriptors(keeper) < 1_500
            one.wait()
            another.wait()
            honest.wait_for(20)
            assert descriptors(keeper) < 1_500
            assert resident(keeper) - before < 128 * 1024
        honest.wait_for(20)
    assert honest.bad == []
    assert service.keeper_pid() == keeper
    assert "Traceback" not in service.log()
    assert certificates(service) == honest.good, "no certificate but those that the honest one got"


def test_a_process_that_hoards_connections_loses_its_oldest(start_service: StartService, keyring: KeyRing) -> None:
    service = start_service()
    with LyingWorker(service.socket) as liar:
        oldest = liar.connect()
        newest = [liar.connect() for _ in range(400)][-1]
        assert read_reply(oldest) is None
        newest.send(b'{"op": "health"}')
        assert read_reply(newest)["reply"]["ready"]
    assert service.sign(keyring("ed25519").public_line).status == 201


def test_a_connection_that_is_closed_while_it_speaks_does_not_end_the_keeper(
    start_service: StartService, keyring: KeyRing
) -> None:
    """The keeper finds, in one look, messages on old connections and new connections that push the old ones out."""
    service = start_service()
    keeper = service.keeper_pid()
    assert keeper is not None
    with LyingWorker(service.socket) as liar:
        old = [liar.connect() for _ in range(300)]
        for connection in old:
            connection.send(b'{"op": "health"}')
            assert read_reply(connection) is not None
        os.kill(keeper, signal.SIGSTOP)
        for _ in range(100):
            liar.connect()
        for connection in old:
            connection.send(b'{"op": "health"}')
        os.kill(keeper, signal.SIGCONT)
        assert service.sign(keyring("ed25519").public_line).status == 201
    assert service.keeper_pid() == keeper, service.log()


def test_too_few_descriptors_neither_spin_the_keeper_nor_shut_others_out(
    start_service: StartService, keyring: KeyRing
) -> None:
    service = start_service()
    keeper = service.keeper_pid()
    assert keeper is not None
    line = keyring("ed25519").public_line
    resource.prlimit(keeper, resource.RLIMIT_NOFILE, (60, 60))
    with Noise(service.socket, "silent", 200):
        for _ in range(10):
            assert service.sign(line).status == 201
        before = seconds_of_cpu(keeper)
        time.sleep(2)
        assert seconds_of_cpu(keeper) - before < 1, "it is busy with nothing"
        assert len(service.log()) < 20_000
        assert service.sign(line).status == 201
    assert service.keeper_pid() == keeper


def test_a_full_queue_at_the_keepers_door_is_waited_for(start_service: StartService, keyring: KeyRing) -> None:
    service = start_service()
    keeper = service.keeper_pid()
    assert keeper is not None
    line = keyring("ed25519").public_line
    with LyingWorker(service.socket) as liar, ThreadPoolExecutor(8) as honest:
        os.kill(keeper, signal.SIGSTOP)
        while liar.can_connect():
            pass
        answers = [honest.submit(service.sign, line) for _ in range(8)]
        time.sleep(0.5)
        os.kill(keeper, signal.SIGCONT)
        assert [answer.result().status for answer in answers] == [201] * 8


def test_the_keeper_takes_all_the_descriptors_that_it_may(start_service: StartService) -> None:
    """The usual soft limit is 1,024, and one api process may hold 300."""
    ours = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, ours[1]))
    try:
        keeper = start_service().keeper_pid()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, ours)
    assert keeper is not None
    soft, hard = resource.prlimit(keeper, resource.RLIMIT_NOFILE)
    assert soft == hard


def test_a_page_too_large_for_one_message_is_cut_and_the_rest_is_the_next_page(
    start_service: StartService, keyring: KeyRing
) -> None:
    """200 certificates with 250 long principals each are some 10 MB."""
    names = [f"p{number:03}-{'x' * 200}" for number in range(250)]
    policy = STANDARD_POLICY.replace('principals = ["llmops"]', f"principals = {json.dumps(names)}", 1)
    policy = policy.replace('default_principals = ["llmops"]', f"default_principals = {json.dumps(names)}", 1)
    service = start_service(policy)
    for _ in range(30):
        assert service.sign(keyring("ed25519").public_line).status == 201
    seen: list[int] = []
    before: int | None = None
    with LyingWorker(service.socket) as worker:
        while len(seen) < 30:
            token = service.tokens["operator"]
            page = worker.ask(op="certificates", limit=200, before=before, token=token)["reply"]
            assert page["certificates"]
            assert len(json.dumps(page)) < MAX_REPLY
            seen += [int(row["serial"]) for row in page["certificates"]]
            before = None if page["before"] is None else int(page["before"])
            assert (before is None) == (len(seen) == 30)
    assert seen == list(range(30, 0, -1))


def test_refusals_of_a_liar_are_folded_and_do_not_fill_the_ledger(start_service: StartService) -> None:
    service = start_service()
    with LyingWorker(service.socket) as liar:
        connection = liar.connect()
        for number in range(5_000):
            connection.send(header(token="x", role=f"role-{number}", address=f"10.0.{number // 256}.{number % 256}"))
            assert "error" in read_reply(connection)
    reader = CertificateReader(service.data_dir)
    assert reader.head().seq < 1_200
    assert reader.certificates(Filter()) == []
    reader.close()
