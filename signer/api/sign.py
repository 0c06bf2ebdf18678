"""The sign routes as one bare WSGI callable in front of Flask, which costs more than a signature.

It frames the body and a few headers for the keeper, and gives everything else to Flask. It decides nothing: each check
here is made again by the keeper.
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
ROLE_NAME: Final = r"(?![.@-])[\w.@-]{1,256}+(?<![.@-])"  # ASCII; a longer one is no role to the keeper either
_STATUS_LINES: Final = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}
_CREATED: Final = (("Content-Type", "application/json"), ("Cache-Control", "no-store"))
_MORE: Final = re.compile(rb"\nx-vault-(?:namespace|wrap-ttl)", re.IGNORECASE)


class SignQuestion:
    """One sign request, framed for the keeper, and how its outcome is told to the client.

    `fault` is what is wrong with it already. The body is read from `environ` unless it is given.
    """

    __slots__ = ("body", "fault", "for_vault", "header", "request_id")

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
            self.header |= {"shape": "vault", "content_type": environ.get("CONTENT_TYPE", "")}
        self.body = body or b""
        self.fault: SignerError | None = None
        if body is None:
            try:
                self.body = read_body(environ)
            except SignerError as error:
                self.fault = error

    def message(self) -> bytes:
        """What the keeper is asked."""
        return make_message(self.header, self.body)

    def ask(self, link: KeeperClient) -> responses.Answer:
        """Asks and waits for the answer."""
        try:
            return self.answer(self.fault or link.ask(self.header, self.body))
        except SignerError as error:
            return self.answer(error)

    def answer(self, outcome: Reply | SignerError) -> responses.Answer:
        """Status, headers and body of an outcome."""
        if isinstance(outcome, SignerError):
            if self.for_vault:
                return responses.render_error(outcome)
            return responses.Answer(*render_problem(outcome, self.request_id))
        if self.for_vault:
            return responses.Answer(200, responses.HEADERS, responses.signed(outcome, self.request_id))
        return responses.Answer(201, _CREATED, outcome.as_json() + b"\n")


class SignRoutes:
    """`/v1/<mount>/sign/<role>` and `/api/sign/<role>`; all else goes to `fallback`."""

    def __init__(
        self, link: KeeperClient, mounts: tuple[str, ...], proxies: tuple[Network, ...], fallback: Wsgi, lines: LogLimit
    ) -> None:
        self.link = link
        self.lines = lines  # what `fallback` logs
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
        question = self.question(environ)
        if question is None:
            return self._fallback(environ, start_response)
        return (begin_answer(question.ask(self.link), start_response),)

    def question(self, environ: dict[str, Any]) -> SignQuestion | None:
        """The sign request that this is; None for everything else."""
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if method in ("POST", "PUT") and (match := self._vault.fullmatch(path)) and not _wants_more(environ):
            return SignQuestion(environ, self._proxies, match[1], for_vault=True)
        if method == "POST" and (match := self._native.fullmatch(path)):
            return SignQuestion(environ, self._proxies, match[1], for_vault=False)
        return None

    def begins_like_one(self, request: bytes) -> bool:
        """Whether the bytes of a request begin as those do for which `question` has one."""
        return self._first_line.match(request) is not None and _MORE.search(request) is None


def begin_answer(answer: responses.Answer, start_response: StartResponse) -> bytes:
    """Starts the response; returns its body."""
    status, headers, body = answer
    start_response(_STATUS_LINES[status], [*headers, ("Content-Length", str(len(body)))])
    return body


def read_environ(request: Any, client: Any) -> dict[str, Any]:
    """What `SignQuestion` reads of gunicorn's parsed request, as PEP 3333 has it.

    gunicorn makes thirty more entries, and an object for the answer: a quarter of the api's CPU time for a signature.
    """
    environ: dict[str, Any] = {
        "REQUEST_METHOD": request.method,
        "PATH_INFO": request.path,  # `begins_like_one` lets no % through
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


def render_answer(answer: responses.Answer, version: tuple[int, int], keep: bool) -> bytes:
    """The whole HTTP answer, with the fields that gunicorn gives to every other one."""
    status, headers, body = answer
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


def _wants_more(environ: dict[str, Any]) -> bool:
    """A namespace or response wrapping, which Flask's side answers."""
    return "HTTP_X_VAULT_NAMESPACE" in environ or "HTTP_X_VAULT_WRAP_TTL" in environ


def read_body(environ: Mapping[str, Any]) -> bytes:
    """The request's body; raises `BadRequest` as soon as it is known to be over the limit."""
    length = environ.get("CONTENT_LENGTH") or ""
    if length.isdecimal() and int(length) > MAX_BODY:
        raise body_too_large()
    body: bytes = environ["wsgi.input"].read(int(length) if length.isdecimal() else MAX_BODY + 1)
    if len(body) > MAX_BODY:
        raise body_too_large()
    return body
