"""Sockets in front of the real service: who is slow, half open, oversized or gone stops nobody else."""

from __future__ import annotations

import contextlib
import http.client
import json
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
from tests.parts.keys import KeyRing
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
    start_service: StartService,
    keyring: KeyRing,
    crowd: Callable[[socket.socket], socket.socket],
) -> None:
    service = start_service()
    key = keyring("ed25519", "user").public_line
    clients = [crowd(dial(service)) for _ in range(MANY if behave is not slow_reader else 24)]
    for client in clients:
        behave(client, service.tokens["ci"])
    with trickling(clients if behave is not silent else []):
        assert [service.sign(key).status for _ in range(10)] == [201] * 10
    assert service.ask("GET", "/healthz").status == 200


def test_who_keeps_a_connection_half_open_too_long_is_told_and_ended(start_service: StartService) -> None:
    service = start_service()
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


def test_requests_sent_in_one_go_are_answered_in_order(start_service: StartService) -> None:
    service = start_service()
    with dial(service) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
        assert [read_answer(client)[0], read_answer(client)[0]] == [200, 404]


def test_a_request_sent_byte_by_byte_is_answered(start_service: StartService, keyring: KeyRing) -> None:
    service = start_service()
    body = json.dumps({"public_key": keyring("ed25519", "user").public_line}).encode()
    fields = f"X-Vault-Token: {service.tokens['ci']}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with dial(service) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in HEAD + fields + body:
            client.send(bytes([byte]))
        assert read_answer(client)[0] == 201


def test_a_chunked_body_is_read_and_the_connection_kept(start_service: StartService, keyring: KeyRing) -> None:
    service = start_service()
    body = json.dumps({"public_key": keyring("ed25519", "user").public_line}).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:20], body[20:])) + b"0\r\n\r\n"
    head = HEAD + f"X-Vault-Token: {service.tokens['ci']}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with dial(service) as client:
        for _ in range(2):
            client.sendall(head + chunks)
            assert read_answer(client)[0] == 201


def test_a_client_that_waits_for_a_word_before_its_body_gets_it(start_service: StartService) -> None:
    service = start_service()
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
    start_service: StartService, fields: bytes, path: bytes, status: int
) -> None:
    service = start_service()
    with dial(service) as client:
        client.sendall(HEAD.replace(b"/api/sign/llmops", path) + b"X-Vault-Token: sgn_secret\r\n" + fields)
        found, body = read_answer(client)
        assert found == status
        refusal = json.loads(body)
        assert refusal.get("errors") or (refusal["code"] and refusal["hint"])
        assert is_ended(client)
    assert b"sgn_secret" not in body
    assert "sgn_secret" not in service.log()


def test_a_refused_client_that_is_still_sending_can_read_the_refusal(start_service: StartService) -> None:
    service = start_service()
    with dial(service) as client:
        client.sendall(HEAD + b"Content-Length: 2000000\r\n\r\n")
        for _ in range(5):
            client.sendall(b" " * 100_000)
            time.sleep(0.05)
        assert read_answer(client)[0] == 413


def test_a_body_of_exactly_the_limit_is_read(start_service: StartService) -> None:
    service = start_service()
    answer = service.ask("POST", "/api/sign/llmops", b" " * MAX_BODY, identity="ci")
    assert (answer.status, answer.json()["code"]) == (400, "public_key_missing")


def test_a_client_that_hangs_up_while_it_is_answered_harms_nobody(
    start_service: StartService, keyring: KeyRing
) -> None:
    service = start_service()
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
    assert pinned_address(service, keyring, "203.0.113.9, 198.51.100.7:1234") == "caller_address_unknown"
    assert pinned_address(service, keyring, "") == "caller_address_unknown"
