"""What is read of a request, and what of a sign request goes to the keeper."""

from __future__ import annotations

from typing import Any

import pytest

from signer.api.asgi import read_environ
from signer.api.sign import SignCall, SignRoutes
from signer.protocol.client import make_message
from signer.protocol.commands import split_message
from signer.settings import Proxies


def environ(*fields: tuple[bytes, bytes], client: Any = ("192.0.2.7", 4711), **scope: Any) -> dict[str, Any]:
    """The environment of a sign request with those fields."""
    asked = {"method": "POST", "raw_path": b"/v1/ssh/sign/llmops", "query_string": b"", "client": client, **scope}
    return read_environ({**asked, "headers": list(fields)}, b"{}")


def test_only_known_fields_are_read_and_repeated_ones_joined() -> None:
    read = environ(
        (b"x-vault-token", b"one"),
        (b"x-vault-token", b"two"),
        (b"x_vault_token", b"three"),
        (b"x-forwarded-for", b"198.51.100.1"),
        (b"x-forwarded-for", b"203.0.113.9"),
        (b"content-type", b"text/\xe9"),
        (b"content-length", b"99"),
        (b"host", b"x"),
        (b"cookie", b"x"),
        (b"remote-addr", b"203.0.113.9"),
    )
    assert read == {
        "REQUEST_METHOD": "POST",
        "RAW_PATH": "/v1/ssh/sign/llmops",
        "QUERY_STRING": "",
        "REMOTE_ADDR": "192.0.2.7",
        "CONTENT_LENGTH": "2",
        "CONTENT_TYPE": "text/\xe9",
        "HTTP_X_VAULT_TOKEN": "one,two",
        "HTTP_X_FORWARDED_FOR": "198.51.100.1,203.0.113.9",
    }


def test_only_the_console_gets_cookies_and_no_token_of_a_header() -> None:
    fields = (
        (b"cookie", b"signer_console=a"),
        (b"cookie", b"signer_console=b"),
        (b"host", b"signer.example.org"),
        (b"origin", b"https://signer.example.org"),
        (b"sec-fetch-site", b"same-origin"),
        (b"x-vault-token", b"t"),
        (b"authorization", b"Bearer t"),
    )
    seen = {
        "HTTP_COOKIE": "signer_console=a,signer_console=b",
        "HTTP_HOST": "signer.example.org",
        "HTTP_ORIGIN": "https://signer.example.org",
        "HTTP_SEC_FETCH_SITE": "same-origin",
    }
    for path in ("/console", "/console/requests"):
        read = environ(*fields, raw_path=path.encode())
        assert {name: value for name, value in read.items() if name.startswith("HTTP_")} == seen
    for path in ("/api/whoami", "/v1/auth/token/lookup-self", "/consoles", "/%63onsole", "//console"):
        read = environ(*fields, raw_path=path.encode())
        assert {name for name in read if name.startswith("HTTP_")} == {"HTTP_X_VAULT_TOKEN", "HTTP_AUTHORIZATION"}


def test_a_client_of_a_unix_socket_has_no_address() -> None:
    assert environ(client=None)["REMOTE_ADDR"] == ""


ROUTES = SignRoutes(("ssh", "team/ssh"), Proxies())


@pytest.mark.parametrize(
    "method, path, role",
    [
        ("POST", b"/v1/ssh/sign/llmops", "llmops"),
        ("PUT", b"/v1/team/ssh/sign/a.b@c-d", "a.b@c-d"),
        ("POST", b"/api/sign/llmops", "llmops"),
        ("PUT", b"/api/sign/llmops", None),
        ("GET", b"/v1/ssh/sign/llmops", None),
        ("POST", b"/v1/other/sign/llmops", None),
        ("POST", b"/v1/ssh/sign/ll%6dops", None),
        ("POST", b"/v1/ssh/sign/llmops/", None),
        ("POST", b"//v1/ssh/sign/llmops", None),
        ("POST", b"/v1/ssh/sign/.llmops", None),
        ("POST", b"/v1/ssh/sign/" + b"a" * 257, None),
    ],
)
def test_sign_requests_are_recognised_by_method_and_path(method: str, path: bytes, role: str | None) -> None:
    call = ROUTES.sign_call(environ(method=method, raw_path=path), b"{}")
    assert (None if call is None else call.header["role"]) == role


@pytest.mark.parametrize("field", [b"x-vault-namespace", b"x-vault-wrap-ttl"])
def test_a_namespace_or_wrapping_is_for_the_rest_of_vaults_api(field: bytes) -> None:
    assert ROUTES.sign_call(environ((field, b"x")), b"{}") is None


@pytest.mark.parametrize("content_type", ["\xe9" * 3_000, "a" * 30_000, "text/plain; a=\xe9"])
def test_a_content_type_that_no_form_has_is_left_out_of_the_message(content_type: str) -> None:
    asked = environ((b"content-type", content_type.encode("latin-1")))
    call = SignCall(asked, Proxies(), "llmops", for_vault=True, body=b"{}")
    assert call.header["content_type"] == ""
    split_message(make_message(call.header, call.body))
