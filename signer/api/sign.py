"""The sign routes, which stand in front of Flask, because Flask costs more time than a signature.

They send the body and a few headers to the keeper. They decide nothing: the keeper repeats each check.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from signer.api.problems import render_problem
from signer.api.request import message_header, new_request_id
from signer.api.vault import responses
from signer.errors import SignerError
from signer.protocol.client import KeeperClient
from signer.protocol.replies import Reply, RequestDetails
from signer.protocol.sign_request import MAX_BODY, body_too_large
from signer.settings import Proxies

ROLE_NAME: Final = r"(?![.@-])[\w.@-]{1,256}+(?<![.@-])"  # ASCII; the keeper refuses longer names too
_CREATED: Final = (("Content-Type", "application/json"), ("Cache-Control", "no-store"))
SIGN_METHODS: Final = ("POST", "PUT")  # PUT on Vault's paths only
MAX_CONTENT_TYPE: Final = 1_024  # characters


class SignCall:
    """One sign request: its message to the keeper and the HTTP response for the outcome."""

    __slots__ = ("body", "for_vault", "header", "request_id")

    def __init__(
        self, environ: Mapping[str, Any], proxies: Proxies, role: str, *, for_vault: bool, body: bytes
    ) -> None:
        self.request_id = new_request_id()
        self.for_vault = for_vault
        self.body = body
        self.header = message_header("sign", environ, proxies, self.request_id)
        self.header["role"] = role
        if for_vault:
            content_type = environ.get("CONTENT_TYPE", "")
            if len(content_type) > MAX_CONTENT_TYPE or not content_type.isascii():
                content_type = ""  # no form has such a type, and a message to the keeper may be too small for it
            self.header |= {"shape": "vault", "content_type": content_type}

    def run(self, keeper: KeeperClient) -> responses.HttpResponse:
        """Sends the command to the keeper and waits for the response."""
        try:
            return self.response(keeper.ask(self.header, self.body))
        except SignerError as error:
            return self.response(error)

    async def run_async(self, keeper: KeeperClient) -> responses.HttpResponse:
        """As `run`, in the event loop."""
        try:
            return self.response(await keeper.ask_async(self.header, self.body))
        except SignerError as error:
            return self.response(error)

    def read_answer(self, keeper: KeeperClient, message: bytes | None) -> responses.HttpResponse:
        """The HTTP response for the message that `KeeperClient.ask_soon` got."""
        try:
            return self.response(keeper.read_answer(self.header, message))
        except SignerError as error:
            return self.response(error)

    def response(self, outcome: Reply | SignerError) -> responses.HttpResponse:
        """The HTTP response for the keeper's reply or an error."""
        if isinstance(outcome, SignerError):
            if self.for_vault:
                return responses.render_error(outcome)
            return responses.HttpResponse(*render_problem(outcome, self.request_id))
        if isinstance(outcome, RequestDetails):
            return _asked(outcome, for_vault=self.for_vault)
        if self.for_vault:
            return responses.HttpResponse(200, responses.HEADERS, responses.signed(outcome, self.request_id))
        return responses.HttpResponse(201, _CREATED, outcome.as_json() + b"\n")


def _asked(request: RequestDetails, *, for_vault: bool) -> responses.HttpResponse:
    """The response while humans have not approved yet; Vault has none, and a client of Vault's shows a 400."""
    if for_vault:
        return responses.failure(HTTPStatus.BAD_REQUEST, waiting_sentence(request))
    return responses.HttpResponse(HTTPStatus.ACCEPTED, _CREATED, request.as_json() + b"\n")


def waiting_sentence(request: RequestDetails) -> str:
    """What a Vault client is told to do about a request that waits for humans."""
    who = [f"{request.needs} of {', '.join(request.may_approve)}"] if request.needs else []
    if request.presence == "missing":
        who.append(f"{request.frozen.identity}'s own signature")
    return (
        f"request {request.request} waits for approval by {' and '.join(who) or 'nobody'} until {request.expires};"
        f" repeat the same call after approval (`signer requests approve {request.request}`)"
    )


class SignRoutes:
    """Recognises `/v1/<mount>/sign/<role>` and `/api/sign/<role>`."""

    def __init__(self, mounts: tuple[str, ...], proxies: Proxies) -> None:
        self._proxies = proxies
        names = "|".join(re.escape(mount) for mount in mounts)
        self._vault = re.compile(rf"/v1/(?:{names})/sign/({ROLE_NAME})", re.ASCII)
        self._native = re.compile(rf"/api/sign/({ROLE_NAME})", re.ASCII)

    def sign_call(self, environ: Mapping[str, Any], body: bytes) -> SignCall | None:
        """The sign call in a request, whose `RAW_PATH` still has its escapes; None for every other request."""
        path, method = environ["RAW_PATH"], environ["REQUEST_METHOD"]
        if method in SIGN_METHODS and (match := self._vault.fullmatch(path)) and not _has_vault_extras(environ):
            return SignCall(environ, self._proxies, match[1], for_vault=True, body=body)
        if method == "POST" and (match := self._native.fullmatch(path)):
            return SignCall(environ, self._proxies, match[1], for_vault=False, body=body)
        return None


def _has_vault_extras(environ: Mapping[str, Any]) -> bool:
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
