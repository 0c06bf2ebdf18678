"""The native API in Flask: JSON bodies, RFC 9457 problems. Signing is in `sign.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol
from urllib.parse import urlencode

from flask import Flask, Response, g, request
from pydantic import BaseModel
from werkzeug.exceptions import HTTPException

from signer.api import openapi
from signer.api.problems import render_problem
from signer.api.request import message_header, new_request_id
from signer.api.schemas import Alive, CallerToken, WhoAmI
from signer.api.sign import read_body
from signer.errors import BadRequest, NotFound, SignerError, Unavailable
from signer.model import BACKENDS, REQUEST_STATES
from signer.protocol.client import KeeperClient
from signer.protocol.commands import MAX_WAIT
from signer.protocol.host_request import MAX_HOST_NAME
from signer.protocol.replies import (
    CaKey,
    CallerDetails,
    CertificatePage,
    MetricsText,
    NotReady,
    OperationPage,
    Ready,
    Reply,
    RequestDetails,
    RequestPage,
    RevocationPage,
    expect,
)
from signer.protocol.sign_request import body_too_large
from signer.settings import Settings

FILTERS: Final = ("identity", "role", "principal", "fingerprint", "backend", "active", "before", "limit")
OPERATION_FILTERS: Final = ("evidence", "before", "limit")
WHOLE: Final = ("limit", "from", "to")  # parameters that are whole numbers
ENTRY_FILTERS: Final = ("after", "limit")
METRICS_TYPE: Final = "text/plain; version=1.0.0; charset=utf-8"  # Prometheus' text format


class Ask(Protocol):
    """Asks the keeper for the sender of the current HTTP request."""

    def __call__(self, op: str, fields: Mapping[str, object], body: bytes = b"") -> Reply: ...


def make_ask(keeper: KeeperClient, settings: Settings) -> Ask:
    """How the routes ask the keeper."""

    def ask(op: str, fields: Mapping[str, object], body: bytes = b"") -> Reply:
        header = message_header(op, request.environ, settings.proxies, request_id())
        return keeper.ask({**header, **fields}, body)

    return ask


def register(app: Flask, keeper: KeeperClient, settings: Settings) -> None:
    """Adds the native routes to `app`."""
    ask = make_ask(keeper, settings)

    def sign(role: str) -> Response:
        return issued_response(ask("sign", {"role": role}, read_body(request.environ)))

    def explain(role: str) -> Response:
        return json_response(ask("explain", {"role": role}, read_body(request.environ)))

    def certificates() -> Response:
        return page_response(expect(CertificatePage, ask("certificates", read_query(FILTERS))))

    def certificate(serial: str) -> Response:
        return json_response(ask("certificate", {"serial": read_whole("serial", serial, 2**64 - 1)}))

    def operations() -> Response:
        return page_response(expect(OperationPage, ask("operations", read_query(OPERATION_FILTERS))))

    def record() -> Response:
        return json_response(ask("record", {}, read_body(request.environ)), 201)

    def freeze() -> Response:
        return json_response(ask("freeze", {}, read_body(request.environ)), 201)

    def unfreeze(scope: str) -> Response:
        return json_response(ask("unfreeze", {"scope": read_word("scope", scope)}))

    def ca() -> Response:
        return _text(expect(CaKey, keeper.ask({"op": "ca"})).bundle, "text/plain; charset=utf-8")

    def readyz() -> Response:
        health = keeper.ask({"op": "health"})
        if isinstance(health, NotReady):
            raise Unavailable(health.code, health.text, health.hint)
        return json_response(expect(Ready, health))

    for method, path, view in (
        ("POST", "/api/sign/<role:role>", sign),  # reached only without `sign.py` in front
        ("POST", "/api/explain/<role:role>", explain),
        ("GET", "/api/certificates", certificates),
        ("GET", "/api/certificates/<serial>", certificate),
        ("GET", "/api/ledger/head", lambda: json_response(ask("head", {}))),
        ("GET", "/api/ledger/entries", lambda: json_response(ask("entries", read_query(ENTRY_FILTERS)))),
        ("GET", "/api/operations", operations),
        ("POST", "/api/operations", record),
        ("GET", "/api/freezes", lambda: json_response(ask("freezes", {}))),
        ("POST", "/api/freezes", freeze),
        ("DELETE", "/api/freezes/<scope>", unfreeze),
        ("GET", "/api/whoami", lambda: json_response(who_am_i(ask("whoami", {})))),
        ("GET", "/api/ca", ca),
        ("GET", "/api/openapi.json", lambda: _text(openapi.text(), "application/json")),
        ("GET", "/healthz", lambda: json_response(Alive(status="ok"))),
        ("GET", "/readyz", readyz),
        ("GET", "/metrics", lambda: _text(expect(MetricsText, ask("metrics", {})).text, METRICS_TYPE)),
    ):
        app.add_url_rule(path, f"native {method} {path}", view, methods=[method])


def render_fault(error: Exception) -> Response:
    """The problem for an exception outside `/v1/`; an error that is not a `SignerError` reveals no details."""
    headers: list[tuple[str, str]] = []
    if isinstance(error, HTTPException) and error.code is not None:
        headers = [(name, value) for name, value in error.get_headers() if name in ("Allow", "Location")]
        problem = _of_http(error)
    elif isinstance(error, SignerError):
        problem = error
    else:
        problem = Unavailable("internal_error", "internal error", f"look for {request_id()} in the service's log")
    status, problem_headers, body = render_problem(problem, request_id())
    return Response(body, status, [*problem_headers, *headers])


def request_id() -> str:
    """The id of the current request; the same on each call."""
    if "request_id" not in g:
        g.request_id = new_request_id()
    return str(g.request_id)


def _of_http(error: HTTPException) -> SignerError:
    match error.code:
        case 404:
            return NotFound("unknown_route", "no such path", "see GET /api/openapi.json")
        case 405:
            return BadRequest(
                "method_not_allowed", f"{request.method} is not allowed for this path", "see GET /api/openapi.json"
            )
        case 413:
            return body_too_large()
    return BadRequest("request_malformed", "the request cannot be read", "see GET /api/openapi.json")


def json_response(value: BaseModel, status: int = 200) -> Response:
    """The fields that were set, as JSON."""
    return _text(value.model_dump_json(exclude_unset=True) + "\n", "application/json", status)


def who_am_i(reply: Reply) -> WhoAmI:
    """The answer of `GET /api/whoami`."""
    caller = expect(CallerDetails, reply)
    return WhoAmI(
        identity=caller.identity,
        kind=caller.kind,
        roles=caller.roles,
        groups=caller.groups,
        may=caller.may,
        token=CallerToken(expires=caller.expires),
    )


def issued_response(answer: Reply) -> Response:
    """A certificate, or the request that humans have to approve first."""
    return json_response(answer, 202 if isinstance(answer, RequestDetails) else 201)


def page_response(page: CertificatePage | OperationPage | RequestPage | RevocationPage) -> Response:
    """A page, with a link to the next one."""
    answer = json_response(page)
    if page.before is not None:
        query = urlencode({**request.args.to_dict(), "before": page.before})
        answer.headers["Link"] = f'<{request.path}?{query}>; rel="next"'
    return answer


def _text(text: str, content_type: str, status: int = 200) -> Response:
    return Response(text, status, {"Content-Type": content_type, "Cache-Control": "no-store"})


# --- requests --------------------------------------------------------------------------------------------------------


def read_query(known: tuple[str, ...]) -> dict[str, object]:
    """The filters of a list; raises `BadRequest` for an unknown or repeated one: to ignore it would change the list."""
    fields: dict[str, object] = {}
    for name, values in request.args.lists():
        if name not in known:
            raise bad_query(f"unknown parameter {name[:64]!a}", f"use {', '.join(known)}")
        if len(values) > 1:
            raise bad_query(f"{name} is given more than once", f"give {name} once")
        value = values[0]
        if name == "active":
            if value not in ("true", "false"):
                raise bad_query("active must be true or false", "correct active")
            fields[name] = value == "true"
        elif name in WHOLE or (name == "before" and "state" not in known) or known is ENTRY_FILTERS:
            # `before` of requests is an id, and `after` of host keys a name
            fields[name] = read_whole(name, value)
        elif name == "wait":
            fields[name] = read_whole(name, value, MAX_WAIT)
        elif name == "after":
            fields[name] = read_word(name, value, MAX_HOST_NAME)
        else:
            fields[name] = read_word(name, value)
    if fields.get("backend", BACKENDS[0]) not in BACKENDS:
        raise bad_query(f"backend must be one of {', '.join(BACKENDS)}", "correct backend")
    states = REQUEST_STATES if "before" in known else ("all", "open")
    if "state" in known and fields.get("state", states[0]) not in states:
        raise bad_query(f"state must be one of {', '.join(states)}", "correct state")
    if fields.get("limit") == 0:
        raise bad_query("limit must be at least 1", "correct limit")
    return fields


def read_word(name: str, value: str, most: int = 256) -> str:
    """A short printable text of a path or a query; raises `BadRequest`."""
    if not 0 < len(value) <= most or not value.isprintable():
        raise bad_query(f"{name} must have 1 to {most} printable characters", f"correct {name}")
    return value


def read_whole(name: str, value: str, most: int = 2**63 - 1) -> int:
    """A whole number of a path or a query; raises `BadRequest`."""
    if not value.isascii() or not value.isdigit() or len(value) > 20 or int(value) > most:
        raise bad_query(f"{name} must be a whole number", f"correct {name}")
    return int(value)


def bad_query(text: str, hint: str) -> BadRequest:
    return BadRequest("query_malformed", text, hint)
