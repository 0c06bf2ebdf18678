"""A sign request is read, and its answer written, as gunicorn does it for every other one."""

from __future__ import annotations

import io
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.http import wsgi

from signer.api.connection import Connection, Mailbox, freeze_settings
from signer.api.sign import SignCall, begin_response, read_environ, render_response
from signer.api.vault.responses import failure
from signer.protocol.commands import split_message


class Channel:
    """A socket that only has a number."""

    def fileno(self) -> int:
        return 0


def connect(client: Any) -> Connection:
    """A connection as the worker makes it."""
    return Connection(freeze_settings(Config()), Channel(), client, ("127.0.0.1", 8222))  # type: ignore[arg-type]


def send(connection: Connection, *fields: str, version: str = "1.1", body: str = "{}") -> Any:
    """gunicorn's reading of a sign request with those fields."""
    lines = [f"POST /v1/ssh/sign/llmops HTTP/{version}", f"Content-Length: {len(body)}", *fields]
    connection.sock.request = ("\r\n".join(lines) + "\r\n\r\n" + body).encode()
    return next(connection.parser)


@pytest.mark.parametrize(
    "client", [("192.0.2.7", 4711), ("2001:db8::7", 4711, 0, 0), ""], ids=["IPv4", "IPv6", "unix socket"]
)
@pytest.mark.parametrize(
    "fields",
    [
        (),
        ("X-Vault-Token: one", "X-Forwarded-For: 198.51.100.1", "Content-Type: application/json"),
        ("X-Vault-Token: one", "x-vault-token: two"),
        ("X-Forwarded-For: 198.51.100.1", "X-Forwarded-For: 203.0.113.9", "X-Forwarded-For:"),
        ("Authorization: Bearer one", "X_Vault_Token: two", "Content_Type: text/plain", "Remote-Addr: 203.0.113.9"),
    ],
    ids=["none", "some", "a token twice", "a field three times", "underscores"],
)
def test_what_is_read_of_a_request_is_what_gunicorn_reads(client: Any, fields: tuple[str, ...]) -> None:
    connection = connect(client)
    request = send(connection, *fields)
    _, whole = wsgi.create(request, Mailbox(), client, connection.server, connection.cfg)
    ours = read_environ(request, client)
    theirs = {name: value for name, value in whole.items() if name in ours or name.startswith(("HTTP_", "CONTENT_"))}
    assert ours == theirs
    assert ours["wsgi.input"].read() == b"{}"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "closed"])
def test_an_answer_is_written_as_gunicorn_writes_it(version: str, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_789_000_000.9)
    connection = connect(("192.0.2.7", 4711))
    request = send(connection, f"Connection: {'keep-alive' if keep else 'close'}", version=version)
    answer = failure(403, "permission denied")
    box = Mailbox()
    response, _ = wsgi.create(request, box, connection.client, connection.server, connection.cfg)
    response.write(begin_response(answer, response.start_response))
    response.close()
    assert render_response(answer, request.version, keep) == bytes(box.response)


def test_settings_that_are_frozen_are_gunicorns() -> None:
    settings = Config()
    settings.set("limit_request_fields", 64)
    frozen = freeze_settings(settings)
    assert {name: getattr(frozen, name) for name in settings.settings} == {
        name: getattr(settings, name) for name in settings.settings
    }
    assert frozen.is_ssl == settings.is_ssl
    assert frozen.forwarded_allow_networks() == settings.forwarded_allow_networks()


@pytest.mark.parametrize("content_type", ["\xe9" * 3_000, "a" * 30_000, "text/plain; a=\xe9"])
def test_a_content_type_that_no_form_has_is_left_out_of_the_message(content_type: str) -> None:
    environ = {"CONTENT_TYPE": content_type, "REMOTE_ADDR": "192.0.2.7", "wsgi.input": io.BytesIO(b"{}")}
    call = SignCall(environ, (), "llmops", for_vault=True)
    assert call.header["content_type"] == ""
    split_message(call.message())
