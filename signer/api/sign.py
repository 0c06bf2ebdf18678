"""The sign routes as a plain WSGI callable in front of Flask, because Flask costs more time than a signature.

It sends the body and a few headers to the keeper and passes every other request to Flask. It decides nothing: the
keeper repeats each check.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final

from signer.api.problems import render_problem
from signer.api.request import message_header, new_request_id
from signer.api.vault import responses
from signer.errors import SignerError
from signer.protocol.client import KeeperClient, make_message
from signer.protocol.log_limit import LogLimit
from signer.protocol.replies import Reply
from signer.protocol.sign_request import MAX_BODY, body_too_large
from signer.settings import Network

StartResponse = Callable[[str, list[tuple[str, str]]], object]
Wsgi = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]
ROLE_NAME: Final = r"(?![.@-])[\w.@-]{1,256}+(?<![.@-])"  # ASCII; the keeper refuses longer names too
_STATUS_LINES: Final = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}
_CREATED: Final = (("Content-Type", "application/json"), ("Cache-Control", "no-store"))
MAX_CONTENT_TYPE: Final = 1_024  # characters
_MORE: Final = re.compile(rb"\nx-vault-(?:namespace|wrap-ttl)", re.IGNORECASE)


class SignCall:
    """One sign request: its message to the keeper and the HTTP response for the outcome.

    `error` is set if the body cannot be read. The body is read from `environ` unless it is given.
    """

    __slots__ = ("body", "error", "for_vault", "header", "request_id")

    def __init__(
        self,
        environ: Mapping[str, Any],
        proxies: tuple[Network, ...],
        role: str,
        *,
        for_vault: bool,
        body: bytes | None = None,
    ) -> None:
        self.request_id = new_request_id()
        self.for_vault = for_vault
        self.header = message_header("sign", environ, proxies, self.request_id)
        self.header["role"] = role
        if for_vault:
            content_type = environ.get("CONTENT_TYPE", "")
            if len(content_type) > MAX_CONTENT_TYPE or not content_type.isascii():
                content_type = ""  # no form has such a type, and a message to the keeper may be too small for it
            self.header |= {"shape": "vault", "content_type": content_type}
        self.body = body or b""
        self.error: SignerError | None = None
        if body is None:
            try:
                self.body = read_body(environ)
            except SignerError as error:
                self.error = error

    def message(self) -> bytes:
        """The message to the keeper."""
        return make_message(self.header, self.body)

    def run(self, keeper: KeeperClient) -> responses.HttpResponse:
        """Sends the command to the keeper and waits for the response."""
        try:
            return self.response(self.error or keeper.ask(self.header, self.body))
        except SignerError as error:
            return self.response(error)

    def response(self, outcome: Reply | SignerError) -> responses.HttpResponse:
        """The HTTP response for the keeper's reply or an error."""
        if isinstance(outcome, SignerError):
            if self.for_vault:
                return responses.render_error(outcome)
            return responses.HttpResponse(*render_problem(outcome, self.request_id))
        if self.for_vault:
            return responses.HttpResponse(200, responses.HEADERS, responses.signed(outcome, self.request_id))
        return responses.HttpResponse(201, _CREATED, outcome.as_json() + b"\n")


class SignRoutes:
    """Handles `/v1/<mount>/sign/<role>` and `/api/sign/<role>`; passes every other request to `fallback`."""

    def __init__(
        self,
        keeper: KeeperClient,
        mounts: tuple[str, ...],
        proxies: tuple[Network, ...],
        fallback: Wsgi,
        lines: LogLimit,
    ) -> None:
        self.keeper = keeper
        self.lines = lines  # log lines of `fallback`
        self._proxies = proxies
        self._fallback = fallback
        names = "|".join(re.escape(mount) for mount in mounts)
        self._vault = re.compile(rf"/v1/(?:{names})/sign/({ROLE_NAME})", re.ASCII)
        self._native = re.compile(rf"/api/sign/({ROLE_NAME})", re.ASCII)
        self._first_line = re.compile(
            rf"(?:(?:POST|PUT) /v1/(?:{names})|POST /api)/sign/{ROLE_NAME} ".encode(), re.ASCII
        )

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """WSGI (PEP 3333)."""
        call = self.sign_call(environ)
        if call is None:
            return self._fallback(environ, start_response)
        return (begin_response(call.run(self.keeper), start_response),)

    def sign_call(self, environ: dict[str, Any]) -> SignCall | None:
        """The sign call in a request; None for every other request."""
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if method in ("POST", "PUT") and (match := self._vault.fullmatch(path)) and not _has_vault_extras(environ):
            return SignCall(environ, self._proxies, match[1], for_vault=True)
        if method == "POST" and (match := self._native.fullmatch(path)):
            return SignCall(environ, self._proxies, match[1], for_vault=False)
        return None

    def is_sign_request(self, request: bytes) -> bool:
        """True if `sign_call` will accept this request, judged by its first line and header names."""
        return self._first_line.match(request) is not None and _MORE.search(request) is None


def begin_response(response: responses.HttpResponse, start_response: StartResponse) -> bytes:
    """Starts the WSGI response; returns its body."""
    status, headers, body = response
    start_response(_STATUS_LINES[status], [*headers, ("Content-Length", str(len(body)))])
    return body


def read_environ(request: Any, client: Any) -> dict[str, Any]:
    """The part of the WSGI environ (PEP 3333) that `SignCall` reads, from gunicorn's parsed request.

    gunicorn's own adds thirty entries and a response object: a quarter of the API's CPU time for a signature.
    """
    environ: dict[str, Any] = {
        "REQUEST_METHOD": request.method,
        "PATH_INFO": request.path,  # `is_sign_request` accepts no %
        "REMOTE_ADDR": client[0] if isinstance(client, tuple) else str(client),
        "wsgi.input": request.body,
    }
    for name, value in request.headers:
        if name in ("CONTENT-TYPE", "CONTENT-LENGTH"):
            environ[name.replace("-", "_")] = value
        else:
            key = "HTTP_" + name.replace("-", "_")
            environ[key] = f"{environ[key]},{value}" if key in environ else value
    return environ


def render_response(response: responses.HttpResponse, version: tuple[int, int], keep: bool) -> bytes:
    """The whole HTTP response as bytes, with the header fields that gunicorn adds to others."""
    status, headers, body = response
    fields = "".join([f"{name}: {value}\r\n" for name, value in headers])
    head = (
        f"HTTP/{version[0]}.{version[1]} {_STATUS_LINES[status]}\r\nServer: gunicorn\r\n"
        f"Date: {_http_date(int(time.time()))}\r\nConnection: {'keep-alive' if keep else 'close'}\r\n"
        f"{fields}Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("latin-1") + body


@lru_cache(maxsize=2)
def _http_date(now: int) -> str:
    return formatdate(now, usegmt=True)


def _has_vault_extras(environ: dict[str, Any]) -> bool:
    """True if the request has a namespace or response wrapping, which Flask's side handles."""
    return "HTTP_X_VAULT_NAMESPACE" in environ or "HTTP_X_VAULT_WRAP_TTL" in environ


def read_body(environ: Mapping[str, Any]) -> bytes:
    """The request's body; raises `BadRequest` if it is over the limit, before reading it where possible."""
    length = environ.get("CONTENT_LENGTH") or ""
    if length.isdecimal() and int(length) > MAX_BODY:
        raise body_too_large()
    body: bytes = environ["wsgi.input"].read(int(length) if length.isdecimal() else MAX_BODY + 1)
    if len(body) > MAX_BODY:
        raise body_too_large()
    return body
