"""The operator's client against services that are wrong: every end is one of our errors, in time and without the token.

What answers is a socket of the test's; the real service is in tests/system/ledger/test_operations_ledger.py.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from signer import api_client
from signer.api_client import ApiClient, Readiness
from signer.errors import BadFormat, BadSettings, NotFound, Refused, SignerError, Unavailable

pytestmark = pytest.mark.unix_socket
TOKEN = "sgn_" + "T" * 49
Talk = Callable[[socket.socket, str], None]


class Service:
    """Listens on a unix socket; each connection gets the request's head and body, and says what the test wants."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "api.sock"
        self.asked: list[str] = []
        self.talk: Talk = lambda link, _request: link.close()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            request = link.recv(65536).decode()
            if "Content-Length" in request and request.endswith("\r\n\r\n"):
                request += link.recv(65536).decode()
            self.asked.append(request)
            try:
                self.talk(link, request)
            except OSError:
                self.asked.append("the client went away")
            link.close()

    def answers(self, *bodies: object, status: int = 200) -> None:
        """The next answers, each once, the last again and again."""
        left = list(bodies)

        def talk(link: socket.socket, _request: str) -> None:
            body = left.pop(0) if len(left) > 1 else left[0]
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            link.sendall(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

        self.talk = talk

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    yield service
    service.stop()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_text(TOKEN + "\n")
    return path


@pytest.fixture
def client(service: Service, token_file: Path) -> Iterator[ApiClient]:
    with ApiClient(f"unix:{service.path}", token_file) as client:
        yield client


def fault(act: Callable[[], Any]) -> SignerError:
    with pytest.raises(SignerError) as caught:
        act()
    shown = f"{caught.value!r} {caught.value.text} {caught.value.hint} {caught.value.facts}"
    assert TOKEN not in shown
    return caught.value


BUSY = {"type": "about:blank", "code": "edge_busy", "detail": "too many", "hint": "retry"}


def busy_at_first(times: int, then: object) -> Talk:
    left = [BUSY] * times

    def talk(link: socket.socket, _request: str) -> None:
        status, body = (429, left.pop()) if left else (200, then)
        data = json.dumps(body).encode()
        link.sendall(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    return talk


def test_a_request_that_the_edge_did_not_pass_on_is_sent_again(client: ApiClient, service: Service) -> None:
    service.talk = busy_at_first(2, {"seq": 7})
    assert client.record("cutover", "applied") == {"seq": 7}
    assert len(service.asked) == 3


def test_a_limit_that_the_service_itself_sets_is_final(client: ApiClient, service: Service) -> None:
    service.answers({**BUSY, "code": "rate_limited"}, status=429)
    assert fault(client.head).code == "rate_limited"
    assert len(service.asked) == 1


def test_a_service_that_is_busy_with_others_is_not_ready_yet(
    client: ApiClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_client, "LOOKS_WITHIN", 0.8)
    ready = {"ready": True, "mode": "local", "ca_fingerprint": "SHA256:a", "policy": "p"}
    service.talk = busy_at_first(3, ready)
    assert client.wait_ready("local", "SHA256:a", 10).ready
    service.answers(BUSY, status=429)
    assert fault(lambda: client.wait_ready("local", None, 1)).code == "service_never_ready"


PROBLEM = {"type": "about:blank", "code": "not_permitted", "detail": "ci lacks the right operate", "hint": "add it"}


def test_a_request_carries_token_and_body_on_a_connection_of_its_own(client: ApiClient, service: Service) -> None:
    service.answers({"seq": 7})
    assert client.record("cutover", "applied", reason="ß") == {"seq": 7}
    assert client.head() == {"seq": 7}
    head, _, body = service.asked[0].partition("\r\n\r\n")
    assert head.startswith("POST /api/operations HTTP/1.1\r\n")
    assert f"Authorization: Bearer {TOKEN}" in head
    assert "Connection: close" in head
    assert json.loads(body) == {
        "operation": "cutover", "outcome": "applied", "plan": "", "evidence": "", "reason": "ß"
    }  # fmt: skip
    assert len(service.asked) == 2


def test_readiness_needs_no_token_and_no_yes(client: ApiClient, service: Service) -> None:
    service.answers({"ready": True, "mode": "vault", "ca_fingerprint": "SHA256:x", "policy": "ab"})
    assert client.ready() == Readiness(True, "vault", "SHA256:x", "ab")
    assert "Authorization" not in service.asked[0]
    service.answers({**PROBLEM, "code": "vault_sealed", "detail": "Vault is sealed"}, status=503)
    assert client.ready() == Readiness(False, code="vault_sealed", text="Vault is sealed")


def test_what_answers_for_a_service_that_is_replaced_is_waited_out(client: ApiClient, service: Service) -> None:
    """A proxy's page, or half an answer, while there is no service must not end the wait and roll a cutover back."""
    ready = {"ready": True, "mode": "local", "ca_fingerprint": "SHA256:x", "policy": "ab"}
    service.answers(b"<h1>502 Bad Gateway</h1>", [], ready)
    assert client.wait_ready("local", "SHA256:x", 30).mode == "local"
    service.answers(b"<h1>502 Bad Gateway</h1>")
    with pytest.raises(Unavailable) as refused:
        client.wait_ready("local", "SHA256:x", 0.2)
    assert (refused.value.code, refused.value.facts) == ("service_never_ready", {"code": "not_our_service"})


@pytest.mark.parametrize("status,kind", [(403, Refused), (404, NotFound), (503, Unavailable), (500, SignerError)])
def test_a_problem_keeps_its_code_and_hint(
    client: ApiClient, service: Service, status: int, kind: type[SignerError]
) -> None:
    service.answers(PROBLEM, status=status)
    error = fault(client.head)
    assert type(error) is kind
    assert (error.code, error.text, error.hint) == ("not_permitted", "ci lacks the right operate", "add it")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"[" * 5000,
        {},
        {**PROBLEM, "code": 5},
        {**PROBLEM, "code": "Not A Code"},
        {**PROBLEM, "detail": None},
    ],
    ids=range(8),
)
def test_what_is_no_problem_of_ours_is_told_as_another_service(
    client: ApiClient, service: Service, body: object
) -> None:
    service.answers(body, status=418)
    error = fault(client.head)
    assert isinstance(error, BadFormat)
    assert error.code == "not_our_service"


def test_a_service_that_tells_the_token_back_does_not_get_it_shown(client: ApiClient, service: Service) -> None:
    told = f"who is {TOKEN}\x1b[2J"
    service.answers({**PROBLEM, "detail": told, "hint": told}, status=403)
    error = fault(client.head)
    assert error.text == error.hint == "who is …?[2J"
    assert TOKEN not in repr(client)


def test_a_lost_answer_is_told_and_the_request_is_not_sent_again(client: ApiClient, service: Service) -> None:
    assert fault(lambda: client.record("cutover", "applied")).code == "service_closed"
    assert len(service.asked) == 1


def test_a_redirection_takes_the_token_nowhere(client: ApiClient, service: Service) -> None:
    service.talk = lambda link, _: link.sendall(
        b"HTTP/1.1 307 X\r\nLocation: http://localhost/elsewhere\r\nContent-Length: 2\r\n\r\n{}"
    )
    assert fault(client.head).code == "not_our_service"
    assert len(service.asked) == 1


def test_a_service_that_trickles_is_given_up(
    client: ApiClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_client, "ANSWERS_WITHIN", 0.5)

    def trickle(link: socket.socket, _request: str) -> None:
        link.sendall(b"HTTP/1.1 200 X\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(600):
            link.sendall(b" ")
            time.sleep(0.05)

    service.talk = trickle
    assert fault(client.head).code == "service_slow"


def test_pages_are_followed_as_they_are_taken(client: ApiClient, service: Service) -> None:
    service.answers(
        {"certificates": [{"serial": "2"}], "before": "9"},
        {"certificates": [], "before": "5"},
        {"certificates": [{"serial": "1"}], "before": None},
    )
    rows = client.certificates(backend="vault", active=True, limit=1)
    assert next(rows) == {"serial": "2"}
    assert len(service.asked) == 1
    assert list(rows) == [{"serial": "1"}]
    paths = [request.split(" ")[1] for request in service.asked]
    assert paths == [
        "/api/certificates?backend=vault&active=true&limit=1",
        "/api/certificates?backend=vault&active=true&limit=1&before=9",
        "/api/certificates?backend=vault&active=true&limit=1&before=5",
    ]


@pytest.mark.parametrize(
    "page",
    [
        {"operations": [], "before": "9"},
        {"operations": [], "before": "x"},
        {"operations": {}, "before": None},
        {"operations": [1], "before": None},
        {"before": None},
    ],
    ids=range(5),
)
def test_pages_that_cannot_be_are_refused(client: ApiClient, service: Service, page: object) -> None:
    service.answers({"operations": [], "before": "9"}, page)
    assert fault(client.operations).code == "not_our_service"


def test_a_role_cannot_lead_elsewhere(client: ApiClient, service: Service) -> None:
    service.answers({})
    client.sign("../../v1/x?y#z", {"public_key": "k"})
    assert service.asked[0].startswith("POST /api/sign/..%2F..%2Fv1%2Fx%3Fy%23z HTTP/1.1\r\n")


def test_nobody_there_is_told_as_such(tmp_path: Path, token_file: Path) -> None:
    with ApiClient(f"unix:{tmp_path}/none.sock", token_file, settings=("OTHER_ADDR", "OTHER_FILE")) as client:
        error = fault(client.head)
    assert error.code == "service_down"
    assert "OTHER_ADDR" in error.hint


def _missing(path: Path) -> None:
    path.unlink()


def _shared(path: Path) -> None:
    path.chmod(0o640)


def _two_words(path: Path) -> None:
    path.write_text(f"{TOKEN} {TOKEN}")


def _a_link(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to("real")


@pytest.mark.parametrize(
    "spoil,code",
    [
        (_missing, "signer_token_unreadable"),
        (_shared, "signer_token_not_private"),
        (_two_words, "signer_token_malformed"),
        (_a_link, "signer_token_unreadable"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_a_token_file_that_is_not_as_it_must_be_names_its_setting(
    token_file: Path, spoil: Callable[[Path], None], code: str
) -> None:
    spoil(token_file)
    error = fault(lambda: ApiClient("unix:/x", token_file))
    assert isinstance(error, BadSettings)
    assert error.code == code
    assert "signer.token_file" in error.text


def test_an_address_that_is_none_names_its_setting(token_file: Path) -> None:
    error = fault(lambda: ApiClient("127.0.0.1:8222", token_file))
    assert error.code == "address_malformed"
    assert "signer.address" in error.text
