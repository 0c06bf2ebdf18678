"""Which server gets the token: also one that only speaks HTTP/1.1, and none that another user put in its place."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from signer import api_client
from signer.address import Address, NoListener, listener_uid, parse_address
from signer.api_client import ApiClient
from signer.errors import BadSettings, Refused, Unavailable
from signer.safe_session import http as client_http
from signer.safe_session.settings import DEFAULT_ADDR
from signer.vault.admin import VaultAdmin
from signer.vault.signing import VaultClient
from tests.parts import missing
from tests.parts.keys import Key
from tests.parts.ports import free_port
from tests.parts.standin import TOKEN, Asked, Client, Signer, Standin, http

NOBODY = 65534
# Prints its port, then everything that it receives.
LISTENER = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("127.0.0.1", int(sys.argv[1])))
listener.listen()
print(listener.getsockname()[1], flush=True)
while True:
    link, _ = listener.accept()
    print("connected", flush=True)
    print(link.recv(65536), flush=True)
    link.sendall(b"HTTP/1.1 403 X\\r\\nContent-Length: 30\\r\\n\\r\\n" + b'{"detail":"no","code":"other"}')
    link.close()
"""


def server(address: str, *uids: int) -> client_http.Server:
    return client_http.Server(parse_address(address), TOKEN, frozenset(uids))


@contextmanager
def others_listener(port: int = 0) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A process of another user that listens on loopback: its port, and itself."""
    process = subprocess.Popen(
        [sys.executable, "-Ic", LISTENER, str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, process.stderr and process.stderr.read()
            yield int(line), process
        finally:
            process.kill()


def received(process: subprocess.Popen[str]) -> str:
    process.kill()
    return process.communicate()[0]


# --- F8: HTTP/1.1 ----------------------------------------------------------------------------------------------------


def only_http_1_1(signer: Signer, asked: Asked) -> bytes:
    """As Envoy and Istio answer."""
    if not asked.line.endswith(" HTTP/1.1"):
        return b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    return signer(asked)


def test_audit_f8_a_proxy_that_wants_http_1_1_is_served(client: Client, ca: Key) -> None:
    signer = Signer(client.folder, ca)
    with Standin(lambda asked: only_http_1_1(signer, asked)) as api:
        done = client.run(api.address, "exec", "--", "true")
    assert (done.returncode, done.stderr) == (0, "")
    assert api.asked[0].headers["host"] == api.address.removeprefix("http://")
    assert api.asked[0].headers["connection"] == "close"
    assert api.asked[0].headers["accept-encoding"] == "identity"


def test_audit_f8_a_chunked_answer_after_an_interim_one_is_read(client: Client, ca: Key) -> None:
    signer = Signer(client.folder, ca)

    def in_chunks(asked: Asked) -> bytes:
        body = signer(asked).partition(b"\r\n\r\n")[2]
        pieces = [body[at : at + 100] for at in range(0, len(body), 100)]
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        head = (
            b"HTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\nHTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        return head + chunks + b"0\r\nServer-Timing: a\r\n\r\n"

    with Standin(in_chunks) as api:
        done = client.run(api.address, "exec", "--", "true")
    assert (done.returncode, done.stderr) == (0, "")


def test_audit_f8_the_end_of_a_chunked_answer_is_seen_on_an_open_connection(client: Client, ca: Key) -> None:
    """A proxy may ignore `Connection: close`."""
    hold = [0.0]

    def answer(_: Asked) -> bytes:
        hold[0] = time.monotonic()
        return b'HTTP/1.1 403 X\r\nTransfer-Encoding: chunked\r\n\r\n1e\r\n{"detail":"no","code":"other"}\r\n0\r\n\r\n'

    class Holding(Standin):
        def _answer(self, link: socket.socket) -> None:
            asked = self._read(link)
            self.asked.append(asked)
            link.sendall(self.handler(asked))
            assert link.recv(1) == b""  # the client closes first

    with Holding(answer) as api:
        done = client.run(api.address, "exec", "--", "true")
    assert (done.returncode, done.stderr) == (77, "safe-session: error: no\n")
    assert time.monotonic() - hold[0] < 30


# --- D2: who listens -------------------------------------------------------------------------------------------------


@missing.needs_root
def test_audit_d2_another_users_listener_gets_neither_connection_nor_token(client: Client) -> None:
    with others_listener() as (port, process):
        done = client.run(f"http://127.0.0.1:{port}", "exec", "--", "true")
        seen = received(process)
    assert done.returncode == 69
    assert f"the process that listens at 127.0.0.1 port {port} belongs to uid {NOBODY}" in done.stderr
    assert f"set SAFE_SESSION_SERVER_UID={NOBODY}" in done.stderr
    assert seen == ""


@missing.needs_root
def test_audit_d2_the_uid_of_the_setting_is_trusted_and_no_other(client: Client) -> None:
    with others_listener() as (port, process):
        address = f"http://127.0.0.1:{port}"
        refused = client.run(address, "exec", "--", "true", SAFE_SESSION_SERVER_UID="65533")
        done = client.run(address, "exec", "--", "true", SAFE_SESSION_SERVER_UID=str(NOBODY))
        seen = received(process)
    assert "belongs to uid 65534" in refused.stderr
    assert done.stderr == "safe-session: error: no\n"
    assert seen.count("connected") == 1
    assert TOKEN in seen


@missing.needs_root
def test_audit_d2_a_listener_that_is_replaced_after_the_connection_gets_no_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The service ends between the two checks, and another user takes its port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        accepted: list[socket.socket] = []
        connect = client_http._connect

        def then_replaced(address: Address, deadline: float, trusted: frozenset[int]) -> object:
            link = connect(address, deadline, trusted)
            accepted.append(listener.accept()[0])
            listener.close()
            replaced.append(stack.__enter__())
            return link

        stack = others_listener(port)
        replaced: list[object] = []
        monkeypatch.setattr(client_http, "_connect", then_replaced)
        try:
            with pytest.raises(Unavailable) as caught:
                client_http.send(server(f"http://127.0.0.1:{port}", 0), "POST", "/", b"{}")
            assert caught.value.code == "listener_not_trusted"
            assert accepted[0].recv(100) == b""
        finally:
            accepted[0].close()
            if replaced:
                stack.__exit__(None, None, None)


@missing.needs_root
def test_audit_d2_the_listener_of_exactly_the_address_counts() -> None:
    with others_listener() as (port, _), socket.socket() as mine:
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        mine.bind(("127.0.0.2", port))
        mine.listen()
        assert listener_uid(socket.AF_INET, "127.0.0.1", port) == NOBODY
        assert listener_uid(socket.AF_INET, "127.0.0.2", port) == 0
        with pytest.raises(NoListener):
            listener_uid(socket.AF_INET, "127.0.0.3", port)


@pytest.mark.parametrize("family,number", [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
@pytest.mark.parametrize("place", ["0.0.0.0", "::", "itself"])
def test_audit_d2_a_listener_on_all_addresses_is_found(family: socket.AddressFamily, number: str, place: str) -> None:
    bound = number if place == "itself" else place
    with socket.socket(socket.AF_INET6 if ":" in bound else socket.AF_INET) as mine:
        try:
            mine.bind((bound, 0))
        except OSError:
            pytest.skip("this host has no IPv6")
        mine.listen()
        port = mine.getsockname()[1]
        if bound == "0.0.0.0" and family == socket.AF_INET6:
            with pytest.raises(NoListener):
                listener_uid(family, number, port)
        else:
            assert listener_uid(family, number, port) == os.geteuid()


def test_audit_d2_without_sock_diag_the_check_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 13, 22, 93, 95, 97):

        def refuse(number: int = number) -> int:
            raise OSError(number, "refused")

        monkeypatch.setattr("signer.address._netlink", refuse)
        assert listener_uid(socket.AF_INET, "127.0.0.1", 1) is None

    def lack() -> int:
        raise OSError(24, "too many open files")

    monkeypatch.setattr("signer.address._netlink", lack)
    with pytest.raises(OSError, match="too many"):
        listener_uid(socket.AF_INET, "127.0.0.1", 1)


def test_audit_d2_a_kernel_without_the_module_is_told_from_no_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both answer ENOENT to the question for one address."""
    with pytest.raises(NoListener):
        listener_uid(socket.AF_INET, "127.0.0.1", 1)
    monkeypatch.setattr("signer.address._TCP", 250)  # a protocol that no module of sock_diag handles
    assert listener_uid(socket.AF_INET, "127.0.0.1", 1) is None


@missing.needs_root
def test_audit_d2_the_default_address_is_the_socket_in_roots_folder(client: Client) -> None:
    """Without that folder it is loopback, where the listener is checked."""
    folder = Path(DEFAULT_ADDR.removeprefix("unix:")).parent
    if folder.exists():
        pytest.skip(f"{folder} is in use")
    done = client.run("", "exec", "--", "true")
    assert "http://127.0.0.1:8222" in done.stderr
    folder.mkdir(mode=0o755)
    try:
        done = client.run("", "exec", "--", "true")
        assert f"cannot reach the signing service at {DEFAULT_ADDR}" in done.stderr
        with Standin(lambda _: http(403, {"detail": "no", "code": "x"}), unix=folder / "api.sock") as api:
            done = client.run("", "exec", "--", "true")
        assert done.stderr == "safe-session: error: no\n"
        assert api.asked[0].headers["authorization"] == f"Bearer {TOKEN}"
    finally:
        (folder / "api.sock").unlink(missing_ok=True)
        folder.rmdir()


@pytest.mark.parametrize("uid", ["signer-api", "-1", "8222 ", "1e3", "\u0661"])
def test_audit_d2_a_malformed_uid_is_refused_before_anything_is_sent(client: Client, uid: str) -> None:
    with Standin(lambda _: b"") as api:
        done = client.run(api.address, "exec", "--", "true", SAFE_SESSION_SERVER_UID=uid)
    assert (done.returncode, api.asked) == (78, [])
    assert "SAFE_SESSION_SERVER_UID is not a user id" in done.stderr


# --- D2: the operator's commands -------------------------------------------------------------------------------------


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_text(TOKEN)
    return path


@missing.needs_root
def test_audit_3d2_a_command_of_the_operator_sends_nothing_to_another_users_listener(token_file: Path) -> None:
    with others_listener() as (port, process), ApiClient(f"http://127.0.0.1:{port}", token_file) as api:
        calls: list[Callable[[], object]] = [api.head, api.ready, lambda: api.sign("llmops", {"public_key": "x"})]
        for call in calls:
            with pytest.raises(Unavailable) as caught:
                call()
            assert caught.value.code == "listener_not_trusted"
            assert "uid 65534" in caught.value.text
        assert received(process) == ""


@missing.needs_root
def test_audit_3d2_the_operator_may_name_the_listeners_user(token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFE_SESSION_SERVER_UID", str(NOBODY))
    with others_listener() as (port, process), ApiClient(f"http://127.0.0.1:{port}", token_file) as api:
        with pytest.raises(Refused):
            api.head()
        assert TOKEN in received(process)
    monkeypatch.setenv("SAFE_SESSION_SERVER_UID", "nobody")
    with pytest.raises(BadSettings) as caught:
        ApiClient("http://127.0.0.1:1", token_file)
    assert caught.value.code == "server_uid_malformed"


@missing.needs_root
def test_audit_3d2_a_listener_that_is_replaced_after_the_connection_gets_no_byte_of_a_command(
    token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service ends between the two checks, and another user takes its port."""
    with socket.socket() as listener, ExitStack() as stack:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        accepted: list[socket.socket] = []

        def then_replaced(family: int, place: Any, within: float) -> socket.socket:
            link = connected(family, place, within)
            accepted.append(stack.enter_context(listener.accept()[0]))
            listener.close()
            stack.enter_context(others_listener(port))
            return link

        connected = api_client._connected
        monkeypatch.setattr(api_client, "_connected", then_replaced)
        with ApiClient(f"http://127.0.0.1:{port}", token_file) as api, pytest.raises(Unavailable) as caught:
            api.head()
        assert caught.value.code == "listener_not_trusted"
        assert accepted[0].recv(100) == b""


def test_audit_3d2_nobody_listens_is_what_a_command_says(token_file: Path) -> None:
    with ApiClient(f"http://127.0.0.1:{free_port()}", token_file) as api, pytest.raises(Unavailable) as caught:
        api.head()
    assert caught.value.code == "service_down"


# --- C4: another machine ---------------------------------------------------------------------------------------------


def test_audit_c4_the_other_side_is_checked_before_a_token_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when `localhost` resolves to another machine: each client checks the address that it reached."""
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(TOKEN)
    monkeypatch.setattr("signer.address.is_this_machine", lambda number: False)
    with Standin(lambda _: http(200, {})) as api:
        address = api.address.replace("127.0.0.1", "localhost")
        with (
            ApiClient(address, token) as api_client,
            VaultAdmin(address, token) as admin,
            closing(VaultClient(address, token, "ssh")) as vault,
        ):
            calls: list[Callable[[], object]] = [
                lambda: client_http.send(server(address, 0, os.geteuid()), "POST", "/", b"{}"),
                api_client.head,
                admin.check_ready,
                vault.ask_ca,
            ]
            for call in calls:
                with pytest.raises(Unavailable) as caught:
                    call()
                assert caught.value.code == "token_in_clear"
        assert {asked.line for asked in api.asked} <= {""}, "connections, and nothing on them"
