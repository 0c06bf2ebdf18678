"""Errors of the native API: RFC 9457 problem details. The one place that gives them their HTTP status. Pure."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Final

from signer.errors import (
    BadFormat,
    BadRequest,
    LedgerBroken,
    NotAuthenticated,
    NotFound,
    Refused,
    SignerError,
    Unavailable,
)

CONTENT_TYPE: Final = "application/problem+json"
RETRY_AFTER: Final = "1"  # seconds; the launcher has a dead keeper back within two
_BY_CODE: Final = {
    "body_too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "unknown_role": HTTPStatus.NOT_FOUND,
    "rate_limited": HTTPStatus.TOO_MANY_REQUESTS,
    "too_many_live": HTTPStatus.TOO_MANY_REQUESTS,
    "method_not_allowed": HTTPStatus.METHOD_NOT_ALLOWED,
}
_BY_KIND: Final[tuple[tuple[type[SignerError], HTTPStatus], ...]] = (
    (NotAuthenticated, HTTPStatus.UNAUTHORIZED),
    (Refused, HTTPStatus.FORBIDDEN),
    (BadRequest, HTTPStatus.BAD_REQUEST),
    (BadFormat, HTTPStatus.BAD_REQUEST),
    (NotFound, HTTPStatus.NOT_FOUND),
    (Unavailable, HTTPStatus.SERVICE_UNAVAILABLE),
    (LedgerBroken, HTTPStatus.SERVICE_UNAVAILABLE),
)


def status_of(error: SignerError) -> HTTPStatus:
    """The HTTP status of an error: by its code, else by its branch of the tree, else 500."""
    by_code = _BY_CODE.get(error.code)
    if by_code is not None:
        return by_code
    if error.code == "internal_error":
        return HTTPStatus.INTERNAL_SERVER_ERROR
    return next((status for kind, status in _BY_KIND if isinstance(error, kind)), HTTPStatus.INTERNAL_SERVER_ERROR)


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
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append(("Retry-After", RETRY_AFTER))
    if status == HTTPStatus.UNAUTHORIZED:
        headers.append(("WWW-Authenticate", "Bearer"))
    return status, headers, json.dumps(body).encode() + b"\n"
