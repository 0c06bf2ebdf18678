"""The sign routes as one bare WSGI callable in front of Flask, which costs more than a signature (README, Figures).

It frames the body and a few headers for the keeper, and gives everything else to Flask. It decides nothing: each check
here is made again by the keeper.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from signer.api import vaultwords
from signer.api.caller import message_header, new_request_id
from signer.api.problems import render_problem
from signer.ask import MAX_BODY, body_too_large
from signer.errors import SignerError
from signer.link import Link
from signer.settings import Network

StartResponse = Callable[[str, list[tuple[str, str]]], object]
Wsgi = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]
ROLE_NAME: Final = r"\w(?:[\w.@-]{0,254}\w)?"  # ASCII; a longer one is no role to the keeper either
_STATUS_LINES: Final = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}
_CREATED: Final = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]


class SignRoutes:
    """`/v1/<mount>/sign/<role>` and `/api/sign/<role>`; all else goes to `fallback`."""

    def __init__(self, link: Link, mounts: tuple[str, ...], proxies: tuple[Network, ...], fallback: Wsgi) -> None:
        self._link = link
        self._proxies = proxies
        self._fallback = fallback
        names = "|".join(re.escape(mount) for mount in mounts)
        self._vault = re.compile(rf"/v1/(?:{names})/sign/({ROLE_NAME})", re.ASCII)
        self._native = re.compile(rf"/api/sign/({ROLE_NAME})", re.ASCII)

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """WSGI (PEP 3333)."""
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        headers: Sequence[tuple[str, str]]
        if method in ("POST", "PUT") and (match := self._vault.fullmatch(path)) and not _wants_more(environ):
            status, headers, body = sign_for_vault(self._link, self._proxies, environ, match[1])
        elif method == "POST" and (match := self._native.fullmatch(path)):
            status, headers, body = self._sign(environ, match[1])
        else:
            return self._fallback(environ, start_response)
        start_response(_STATUS_LINES[status], [*headers, ("Content-Length", str(len(body)))])
        return (body,)

    def _sign(self, environ: dict[str, Any], role: str) -> tuple[int, list[tuple[str, str]], bytes]:
        request_id = new_request_id()
        header = message_header("sign", environ, self._proxies, request_id)
        header["role"] = role
        try:
            reply = self._link.ask(header, read_body(environ))
        except SignerError as error:
            return render_problem(error, request_id)
        return 201, list(_CREATED), json.dumps(reply).encode() + b"\n"


def sign_for_vault(
    link: Link, proxies: tuple[Network, ...], environ: Mapping[str, Any], role: str, body: bytes | None = None
) -> vaultwords.Answer:
    """The answer of `/v1/<mount>/sign/<role>`; reads the request's body unless it is given."""
    request_id = new_request_id()
    header = message_header("sign", environ, proxies, request_id)
    header |= {"shape": "vault", "role": role, "content_type": environ.get("CONTENT_TYPE", "")}
    try:
        reply = link.ask(header, read_body(environ) if body is None else body)
    except SignerError as error:
        return vaultwords.render_error(error)
    return vaultwords.Answer(200, vaultwords.HEADERS, vaultwords.signed(reply, request_id))


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
