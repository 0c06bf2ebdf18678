"""Sockets in front of the real service: who is slow, half open, oversized or gone stops nobody else."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from signer.protocol.sign_request import MAX_BODY
from tests.parts import ports
from tests.parts.eventually import eventually
from tests.parts.keys import KeyRing
from tests.parts.processes import children
from tests.parts.selfsigned import write_certificate
from tests.parts.service import STANDARD_POLICY, Answer, Service, StartService

HEAD = b"POST /api/sign/llmops HTTP/1.1\r\nHost: x\r\n"
MANY = 200  # clients; the api has 16 threads


class Connected(http.client.HTTPConnection):
    """An HTTP client on a socket that somebody else opened."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__("signer")
        self.sock = sock


class ElsewhereService(Service):
    """The service behind another kind of socket; `dial` opens one."""

    def __init__(
        self, folder: Path, keyring: KeyRing, environ: Mapping[str, str], dial: Callable[[Service], socket.socket]
    ) -> None:
        super().__init__(folder, keyring("ed25519", "ca"), environ=environ)
        self._dial = dial

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        identity: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 10,
    ) -> Answer:
        with contextlib.closing(Connected(self._dial(self))) as client:
            client.sock.settimeout(timeout)
            token = {} if identity is None else {"X-Vault-Token": self.tokens[identity]}
            client.request(method, path, None if body is None else json.dumps(body), {**token, **(headers or {})})
            answer = client.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, keyring: KeyRing) -> Iterator[Service]:
    """One for all tests that leave it as it was; at its end it is still the same keeper."""
    with Service(tmp_path_factory.mktemp("transport"), keyring("ed25519", "ca")) as started:
        keeper = started.keeper_pid()
        yield started
        assert started.keeper_pid() == keeper, started.log()
        assert "Traceback" not in started.log(), started.log()


@pytest.fixture
def crowd() -> Iterator[Callable[[socket.socket], socket.socket]]:
    """Keeps sockets open until the test ends."""
    with ExitStack() as sockets:
        yield sockets.enter_context


def dial(service: Service) -> socket.socket:
    return socket.create_connection((ports.LOOPBACK, service.port), timeout=30)


def read_answer(client: socket.socket) -> tuple[int, bytes]:
    """Status and body of the next answer."""
    answer = http.client.HTTPResponse(client)
    answer.fp = client.makefile("rb", buffering=0)  # type: ignore[assignment]  # the answer after it stays in the socket
    answer.begin()
    return answer.status, answer.read()


def is_ended(client: socket.socket, *, unless: bytes = b"\0") -> bool:
    """Waits for the service to close the connection; false if it sends `unless` before."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(65536):
            said += data
    return unless not in said


@contextlib.contextmanager
def trickling(clients: list[socket.socket]) -> Iterator[None]:
    """Sends one more byte for each client again and again."""
    stopped = threading.Event()

    def trickle() -> None:
        while not stopped.wait(0.1):
            for client in clients:
                with contextlib.suppress(OSError):
                    client.send(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


# --- one kind of bad client each, 200 of them, and a good one --------------------------------------------------------


def silent(client: socket.socket, token: str) -> None:
    """Connects and says nothing."""


def half_a_head(client: socket.socket, token: str) -> None:
    client.sendall(HEAD + b"X-Slow: ")


def half_a_body(client: socket.socket, token: str) -> None:
    client.sendall(HEAD + f"X-Vault-Token: {token}\r\nContent-Length: 60000\r\n\r\n".encode() + b'{"public_key": "')


def half_a_chunk(client: socket.socket, token: str) -> None:
    client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\nFFF0\r\n{")


def oversized(client: socket.socket, token: str) -> None:
    client.sendall(HEAD + b"Content-Length: 10000000\r\n\r\n{")


def slow_reader(client: socket.socket, token: str) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):  # it stops taking requests when nobody takes its answers
        for _ in range(2000):
            client.send(b"GET /api/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")


@pytest.mark.parametrize(
    "behave", [silent, half_a_head, half_a_body, half_a_chunk, oversized, slow_reader], ids=lambda f: f.__name__
)
def test_slow_clients_stop_nobody_else(
    behave: Callable[[socket.socket, str], None],
    service: Service,
    keyring: KeyRing,
    crowd: Callable[[socket.socket], socket.socket],
) -> None:
    key = keyring("ed25519", "user").public_line
    clients = [crowd(dial(service)) for _ in range(MANY if behave is not slow_reader else 24)]
    for client in clients:
        behave(client, service.tokens["ci"])
    with trickling(clients if behave is not silent else []):
        assert [service.sign(key).status for _ in range(10)] == [201] * 10
    assert service.ask("GET", "/healthz").status == 200


def test_who_keeps_a_connection_half_open_too_long_is_told_and_ended(service: Service) -> None:
    with dial(service) as silent_one, dial(service) as slow:
        half_a_body(slow, service.tokens["ci"])
        status, body = read_answer(slow)
        assert (status, json.loads(body)["code"]) == (408, "request_too_slow")
        assert is_ended(slow)
        assert is_ended(silent_one)


def test_at_the_limit_of_connections_the_longest_waiting_one_makes_room(
    start_service: StartService, crowd: Callable[[socket.socket], socket.socket]
) -> None:
    service = start_service()
    first = crowd(dial(service))
    idle = [crowd(dial(service)) for _ in range(1010)]
    assert service.ask("GET", "/healthz").status == 200
    assert is_ended(first)
    last = idle[-1]
    last.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert read_answer(last)[0] == 200


# --- requests in unusual pieces --------------------------------------------------------------------------------------


def test_requests_sent_in_one_go_are_answered_in_order(service: Service) -> None:
    with dial(service) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
        assert [read_answer(client)[0], read_answer(client)[0]] == [200, 404]


def test_a_request_sent_byte_by_byte_is_answered(service: Service, keyring: KeyRing) -> None:
    body = json.dumps({"public_key": keyring("ed25519", "user").public_line}).encode()
    fields = f"X-Vault-Token: {service.tokens['ci']}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with dial(service) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in HEAD + fields + body:
            client.send(bytes([byte]))
        assert read_answer(client)[0] == 201


def test_a_chunked_body_is_read_and_the_connection_kept(service: Service, keyring: KeyRing) -> None:
    body = json.dumps({"public_key": keyring("ed25519", "user").public_line}).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:20], body[20:])) + b"0\r\n\r\n"
    head = HEAD + f"X-Vault-Token: {service.tokens['ci']}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with dial(service) as client:
        for _ in range(2):
            client.sendall(head + chunks)
            assert read_answer(client)[0] == 201


def test_a_client_that_waits_for_a_word_before_its_body_gets_it(service: Service) -> None:
    with dial(service) as client:
        client.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"{}")
        assert read_answer(client)[0] == 401


@pytest.mark.parametrize(
    "fields, path, status",
    [
        (b"Content-Length: %d\r\n\r\n" % (MAX_BODY + 1), b"/api/sign/llmops", 413),
        (b"Content-Length: %d\r\n\r\n" % (MAX_BODY + 1), b"/api/freezes", 413),
        (b"Content-Length: %d\r\n\r\n" % (MAX_BODY + 1), b"/v1/ssh/sign/llmops", 413),
        (b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % (MAX_BODY + 1), b"/api/sign/llmops", 413),
        (b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % (MAX_BODY + 1), b"/v1/ssh/sign/llmops", 413),
        (b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx", b"/api/sign/llmops", 400),
        (b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"/api/sign/llmops", 400),
        (b"X: " + b"y" * 40_000 + b"\r\n\r\n", b"/api/sign/llmops", 431),
        (b"X: y\r\n" * 100 + b"\r\n", b"/api/sign/llmops", 431),
        (b"bad header\r\n\r\n", b"/api/sign/llmops", 400),
        (b"\r\n", b"/" + b"x" * 5000, 414),
    ],
)
def test_what_is_too_large_or_no_http_is_refused_in_our_words_and_the_connection_ends(
    service: Service, fields: bytes, path: bytes, status: int
) -> None:
    with dial(service) as client:
        client.sendall(HEAD.replace(b"/api/sign/llmops", path) + b"X-Vault-Token: sgn_secret\r\n" + fields)
        found, body = read_answer(client)
        assert found == status
        refusal = json.loads(body)
        assert refusal.get("errors") or (refusal["code"] and refusal["hint"])
        assert is_ended(client)
    assert b"sgn_secret" not in body
    assert "sgn_secret" not in service.log()


def test_a_refused_client_that_is_still_sending_can_read_the_refusal(service: Service) -> None:
    with dial(service) as client:
        client.sendall(HEAD + b"Content-Length: 2000000\r\n\r\n")
        for _ in range(5):
            client.sendall(b" " * 100_000)
            time.sleep(0.05)
        assert read_answer(client)[0] == 413


def test_a_body_of_exactly_the_limit_is_read(service: Service) -> None:
    answer = service.ask("POST", "/api/sign/llmops", b" " * MAX_BODY, identity="ci")
    assert (answer.status, answer.json()["code"]) == (400, "public_key_missing")


def test_a_client_that_hangs_up_while_it_is_answered_harms_nobody(service: Service, keyring: KeyRing) -> None:
    body = json.dumps({"public_key": keyring("ed25519", "user").public_line}).encode()
    fields = f"X-Vault-Token: {service.tokens['ci']}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(50):
        with dial(service) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset at close
            client.sendall(HEAD + fields + body)
    last = service.sign(keyring("ed25519", "user").public_line)
    assert last.status == 201
    assert "Traceback" not in service.log()


# --- other sockets ---------------------------------------------------------------------------------------------------


def test_a_unix_socket_serves_and_slow_clients_stop_nobody_there(
    tmp_path: Path, keyring: KeyRing, crowd: Callable[[socket.socket], socket.socket]
) -> None:
    path = tmp_path / "api.sock"

    def dial_unix(_: Service) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(30)
        try:
            client.connect(str(path))
        except OSError:
            client.close()
            raise
        return client

    with ElsewhereService(tmp_path / "service", keyring, {"SIGNER_LISTEN": f"unix:{path}"}, dial_unix) as service:
        for _ in range(20):
            half_a_head(crowd(dial_unix(service)), "")
            slow_reader(crowd(dial_unix(service)), "")
        assert service.sign(keyring("ed25519", "user").public_line).status == 201


def test_tls_serves_and_slow_clients_stop_nobody_there(
    tmp_path: Path, keyring: KeyRing, crowd: Callable[[socket.socket], socket.socket]
) -> None:
    certificate, private = write_certificate(tmp_path)
    trusting = ssl.create_default_context(cafile=str(certificate))
    environ = {"SIGNER_TLS_CERT_FILE": str(certificate), "SIGNER_TLS_KEY_FILE": str(private)}

    def dial_tls(service: Service) -> socket.socket:
        return trusting.wrap_socket(dial(service), server_hostname="localhost")

    with ElsewhereService(tmp_path / "service", keyring, environ, dial_tls) as service:
        for _ in range(20):
            crowd(dial(service)).sendall(b"\x16\x03\x01")  # half a handshake
            half_a_head(crowd(dial_tls(service)), "")
            slow_reader(crowd(dial_tls(service)), "")
        answer = service.sign(keyring("ed25519", "user").public_line)
        assert answer.status == 201
        assert service.ask("GET", "/api/openapi.json").json()["openapi"].startswith("3.1")
        with dial(service) as plain:
            plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert is_ended(plain, unless=b"HTTP/1.1 200")


# --- whose address it is ---------------------------------------------------------------------------------------------

PINNED = STANDARD_POLICY.replace(
    "[identities.deploy-agent]", 'source_address = "caller"\n\n[identities.deploy-agent]', 1
)


def pinned_address(service: Service, keyring: KeyRing, forwarded: str) -> str:
    """The source address in the certificate, as the ledger has it; or the refusal's code."""
    line = keyring("ed25519", "user").public_line
    body = {"public_key": line}
    answer = service.ask(
        "POST", "/api/sign/llmops", body, identity="deploy-agent", headers={"X-Forwarded-For": forwarded}
    )
    if answer.status != 201:
        return str(answer.json()["code"])
    serial = answer.json()["serial"]
    found = service.ask("GET", f"/api/certificates/{serial}", identity="deploy-agent").json()
    return str(found["critical_options"]["source-address"])


def test_a_caller_cannot_choose_its_address(start_service: StartService, keyring: KeyRing) -> None:
    service = start_service(PINNED)
    assert pinned_address(service, keyring, "203.0.113.9").startswith("127.0.0.1")


def test_behind_a_trusted_proxy_the_last_untrusted_hop_is_the_caller(
    start_service: StartService, keyring: KeyRing
) -> None:
    service = start_service(PINNED, environ={"SIGNER_TRUSTED_PROXIES": "127.0.0.0/8, 10.0.0.0/8"})
    assert pinned_address(service, keyring, "198.51.100.7").startswith("198.51.100.7")
    assert pinned_address(service, keyring, "203.0.113.9, 198.51.100.7, 10.1.1.1").startswith("198.51.100.7")
    assert pinned_address(service, keyring, "203.0.113.9, 198.51.100.7:1234").startswith("198.51.100.7")
    assert pinned_address(service, keyring, "203.0.113.9, nonsense") == "caller_address_unknown"
    assert pinned_address(service, keyring, "") == "caller_address_unknown"


# --- unusual but valid clients ---------------------------------------------------------------------------------------


def sign_request(service: Service, keyring: KeyRing, *fields: str, identity: str = "ci") -> bytes:
    """A whole native sign request with additional header fields."""
    body = json.dumps({"public_key": keyring("ed25519", "user").public_line})
    lines = [f"X-Vault-Token: {service.tokens[identity]}", f"Content-Length: {len(body)}", *fields]
    return HEAD + "\r\n".join(lines).encode() + b"\r\n\r\n" + body.encode()


def test_a_post_that_offers_http_2_keeps_its_body(service: Service, keyring: KeyRing) -> None:
    """`curl --http2` and Java's client send this; a server may ignore the offer (RFC 9110, 7.8)."""
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")
    with dial(service) as client:
        for fields in (offer, ("Connection: Upgrade", "Upgrade: websocket"), ()):
            client.sendall(sign_request(service, keyring, *fields))
            assert read_answer(client)[0] == 201


def test_a_client_that_ends_its_side_is_answered(service: Service, keyring: KeyRing) -> None:
    for request in (sign_request(service, keyring), b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"):
        with dial(service) as client:
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            assert read_answer(client)[0] in (200, 201)
            started = time.monotonic()
            assert is_ended(client)
            assert time.monotonic() - started < 20


@pytest.mark.parametrize("whole", [True, False], ids=["a request", "half a request"])
def test_audit_7_an_end_that_comes_with_the_last_bytes_is_seen(whole: bool, service: Service, keyring: KeyRing) -> None:
    request = sign_request(service, keyring)
    with dial(service) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)  # the end then travels in the same packet
        client.sendall(request if whole else request[:-1])
        client.shutdown(socket.SHUT_WR)
        started = time.monotonic()
        assert is_ended(client, unless=b"\0" if whole else b"201")
        assert time.monotonic() - started < 20


def test_many_requests_in_one_go_are_answered_in_order(service: Service, keyring: KeyRing) -> None:
    sign, health = sign_request(service, keyring), b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with dial(service) as client:
        client.sendall((sign + health + health) * 10)
        answers = [read_answer(client) for _ in range(30)]
        assert [status for status, _ in answers] == [201, 200, 200] * 10
        serials = [int(json.loads(body)["serial"]) for status, body in answers if status == 201]
        assert serials == sorted(serials)


@pytest.mark.parametrize("path", [b"/api/sign/llmops", b"/api/explain/llmops"], ids=["sign", "Flask"])
def test_a_chunked_body_may_wait_for_a_word_too(path: bytes, service: Service) -> None:
    with dial(service) as client:
        head = HEAD.replace(b"/api/sign/llmops", path)
        client.sendall(head + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"2\r\n{}\r\n0\r\n\r\n")
        assert read_answer(client)[0] == 401


def test_a_body_that_waits_for_a_word_and_is_too_large_gets_the_refusal(service: Service) -> None:
    with dial(service) as client:
        client.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY + 1))
        assert read_answer(client)[0] == 413
        assert is_ended(client)


def test_http_1_0_is_answered_and_its_connection_ends(service: Service) -> None:
    with dial(service) as client:
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert read_answer(client)[0] == 200
        assert is_ended(client)


def test_head_has_no_body_and_its_connection_is_kept(service: Service) -> None:
    with dial(service) as client:
        client.sendall(b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        text = b""
        while not text.endswith(b"}\n"):
            text += client.recv(65536)
        assert text.count(b"HTTP/1.1 200 OK\r\n") == 2
        assert text.count(b'"status"') == 1


def test_a_thousand_connections_that_wait_for_their_next_request_stop_nobody(
    start_service: StartService, keyring: KeyRing, crowd: Callable[[socket.socket], socket.socket]
) -> None:
    service = start_service()
    key = keyring("ed25519", "user").public_line
    assert service.sign(key).status == 201
    request = f"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Vault-Token: {service.tokens['deploy-agent']}\r\n\r\n".encode()
    idle = []
    for _ in range(1000):
        idle.append(crowd(dial(service)))
        idle[-1].sendall(request)
        assert read_answer(idle[-1])[0] == 200
    assert [service.sign(key).status for _ in range(20)] == [201] * 20
    for client in idle[-500:]:  # the oldest may have made room
        client.sendall(request)
        assert read_answer(client)[0] == 200


# --- clients that take or give their time ----------------------------------------------------------------------------


def test_a_client_that_reads_a_byte_a_second_is_ended_and_stops_nobody(
    start_service: StartService, keyring: KeyRing
) -> None:
    service = start_service()
    key = keyring("ed25519", "user").public_line
    assert service.sign(key, identity="ci").status == 201
    request = f"GET /api/openapi.json HTTP/1.1\r\nHost: x\r\nX-Vault-Token: {service.tokens['ci']}\r\n\r\n".encode()
    with dial(service) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(500):
                client.send(request)
        eventually(lambda: is_held(service, client), "it is connected")
        deadline = time.monotonic() + 60
        while is_held(service, client):
            assert time.monotonic() < deadline, "it is still connected"
            time.sleep(1)
            with contextlib.suppress(OSError):
                client.recv(1)
            assert service.sign(key, identity="ci").status == 201


def is_held(service: Service, client: socket.socket) -> bool:
    """Whether a process of the service still has its side of the client's connection open."""
    ends = [f"{ports.LOOPBACK_HEX}:{port:04X}" for port in (service.port, client.getsockname()[1])]
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[1:3] == ends and row[9] != "0" for row in rows)  # no inode: the kernel alone sends the rest


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01"], ids=["silent", "half a handshake"])
def test_a_tls_client_that_does_not_shake_hands_is_ended(sent: bytes, tmp_path: Path, keyring: KeyRing) -> None:
    certificate, private = write_certificate(tmp_path)
    environ = {"SIGNER_TLS_CERT_FILE": str(certificate), "SIGNER_TLS_KEY_FILE": str(private)}
    trusting = ssl.create_default_context(cafile=str(certificate))

    def dial_tls(service: Service) -> socket.socket:
        return trusting.wrap_socket(dial(service), server_hostname="localhost")

    with ElsewhereService(tmp_path / "service", keyring, environ, dial_tls) as service, dial(service) as client:
        client.sendall(sent)
        started = time.monotonic()
        assert is_ended(client)
        assert time.monotonic() - started < 20


def test_a_request_that_waits_long_does_not_hold_up_the_end(start_service: StartService, keyring: KeyRing) -> None:
    service = start_service()
    keeper = service.keeper_pid()
    assert keeper is not None
    (api,) = {*children(service.pid)} - {keeper}
    with dial(service) as signing, dial(service) as asking:
        os.kill(keeper, signal.SIGSTOP)
        try:
            signing.sendall(sign_request(service, keyring))
            asking.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(0.5)
            os.kill(api, signal.SIGTERM)
            started = time.monotonic()
            assert is_ended(signing, unless=b"201")
            assert is_ended(asking, unless=b"HTTP/1.1 200")
            assert time.monotonic() - started < 20
        finally:
            os.kill(keeper, signal.SIGCONT)


# --- what no two readers may read in two ways ------------------------------------------------------------------------

HIDDEN = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /healthz HTTP/1.1\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\n\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\nY: b\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\rb\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\r\n\rGET",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX : a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n Host: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\x01b\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\x7fb\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX\x0b: a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n: a\r\n\r\n",
        b"GET /health\x01z HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health z HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET  /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /healthz  HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET\t/healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1 \r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.2\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/2.0\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/11\r\nHost: x\r\n\r\n",
        b"GET /healthz\r\nHost: x\r\n\r\n",
        b"get /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n0\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1, 1\r\n\r\nx",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\nx",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 0x1\r\n\r\nx",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1 1\r\n\r\nx",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length:\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding:\r\n\r\n0\r\n\r\n",
        b"PUT /healthz HTTP/1.1\r\nHost: x\r\n" + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n",
        b"POST /healthz HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\n\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\nx\r\n0\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nxy\r\n0\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\nx\r\n0\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nx\r\n0\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;a\nb\r\nx\r\n0\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\n0\r\n\r\n",
    ],
    ids=lambda request: repr(request)[2:-1].replace("HTTP/1.1\\r\\nHost: x", "…")[:90],
)
def test_audit_c1_what_readers_could_read_in_two_ways_is_refused_and_ends_the_connection(
    request_: bytes, service: Service
) -> None:
    with dial(service) as client:
        client.sendall(request_ + HIDDEN)
        answers = b""
        with contextlib.suppress(ConnectionResetError):
            while data := client.recv(65536):
                answers += data
    statuses = re.findall(rb"HTTP/1\.[01] (\d{3}) ", answers)
    assert statuses == [b"400"]


def test_two_megabytes_of_head_are_not_taken(service: Service) -> None:
    for piece in (b"X: " + b"y" * 1000 + b"\r\n", b"y"):
        with dial(service) as client:
            client.sendall(HEAD)
            sent = 0
            with contextlib.suppress(OSError):
                while sent < 2_000_000:
                    sent += client.send(piece * (65536 // len(piece)))
            with contextlib.suppress(ConnectionResetError):
                assert read_answer(client)[0] == 431
        assert service.ask("GET", "/healthz").status == 200
