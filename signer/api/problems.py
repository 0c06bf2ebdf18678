"""Errors of the native API: RFC 9457 problem details, with the HTTP status of the error catalogue. Pure."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Final

from signer.api.request import new_request_id
from signer.error_catalogue import CATALOGUE
from signer.errors import SignerError

CONTENT_TYPE: Final = "application/problem+json"
EDGE_BUSY: Final = "edge_busy"
RETRY_AFTER: Final = "1"  # seconds; the launcher restarts a dead keeper within two


def status_of(error: SignerError) -> HTTPStatus:
    """The HTTP status of an error, by its code; 500 for one that the catalogue does not send over HTTP."""
    entry = CATALOGUE.get(error.code)
    if entry is None or entry.status is None:
        return HTTPStatus.INTERNAL_SERVER_ERROR
    return HTTPStatus(entry.status)


def render_problem(error: SignerError, request_id: str) -> tuple[HTTPStatus, list[tuple[str, str]], bytes]:
    """Status, headers and body."""
    status = status_of(error)
    body = {
        "type": "about:blank",
        "title": status.phrase,
        "status": status.value,
        "detail": error.text,
        "code": error.code,
        "hint": error.hint,
        "request_id": request_id,
    }
    headers = [("Content-Type", CONTENT_TYPE), ("Cache-Control", "no-store")]
    if seconds := retry_after(error):
        headers.append(("Retry-After", seconds))
    if status == HTTPStatus.UNAUTHORIZED:
        headers.append(("WWW-Authenticate", "Bearer"))
    return status, headers, json.dumps(body).encode() + b"\n"


def retry_after(error: SignerError) -> str:
    """In how many seconds the same request may succeed, as `Retry-After` has it; "" if that is not known."""
    status, seconds = status_of(error), error.facts.get("retry_after_s")
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return RETRY_AFTER
    return str(seconds) if type(seconds) is int and status == HTTPStatus.TOO_MANY_REQUESTS else ""


def render_for_both(error: SignerError, request_id: str = "") -> tuple[HTTPStatus, list[tuple[str, str]], bytes]:
    """Status, headers and body where neither API sees the request: a problem that also has Vault's list of errors."""
    status, headers, body = render_problem(error, request_id or new_request_id())
    if error.code == EDGE_BUSY:
        headers.append(("Retry-After", RETRY_AFTER))
    return status, headers, json.dumps(json.loads(body) | {"errors": [error.text]}).encode() + b"\n"
