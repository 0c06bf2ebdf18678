"""The native API in Flask: JSON bodies, RFC 9457 problems, its routes from the table in `openapi.py`.

In front of it, `sign.py` signs, `waiting.py` waits for a decision, and `asgi.py` answers what hosts fetch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final
from urllib.parse import urlencode

from flask import Flask, Response, g, request
from pydantic import BaseModel
from werkzeug.exceptions import HTTPException

from signer.api import openapi
from signer.api.openapi import Query, Route
from signer.api.problems import render_problem
from signer.api.published import FILES, PublishedFiles
from signer.api.request import message_header, new_request_id
from signer.api.schemas import Alive, CallerToken, WhoAmI
from signer.api.sign import read_body
from signer.errors import BadRequest, NotFound, SignerError, Unavailable
from signer.protocol import replies
from signer.protocol.client import KeeperClient
from signer.protocol.commands import MAX_WAIT
from signer.protocol.sign_request import body_too_large
from signer.settings import Settings

_PLAIN: Final = "text/plain; charset=utf-8"
_METRICS: Final = "text/plain; version=1.0.0; charset=utf-8"  # Prometheus' text format
# Pages whose header Link names the next one.
_PAGES: Final = replies.CertificatePage | replies.OperationPage | replies.RequestPage | replies.RevocationPage
Asker = Callable[[Route, Mapping[str, object]], replies.Reply]


def register(app: Flask, keeper: KeeperClient, settings: Settings, published: PublishedFiles) -> None:
    def ask(route: Route, fields: Mapping[str, object]) -> replies.Reply:
        """Asks the keeper for the sender of the current HTTP request."""
        header = message_header(route.op, request.environ, settings.proxies, request_id())
        body = b"" if route.body is None else read_body(request.environ)
        return keeper.ask({**header, **fields}, body)

    def readyz() -> Response:
        health = keeper.ask({"op": "health"})
        if isinstance(health, replies.NotReady):
            raise Unavailable(health.code, health.text, health.hint)
        return json_response(replies.expect(replies.Ready, health))

    def checkpoint() -> Response:
        return _text(replies.expect(replies.SignedCheckpoint, keeper.ask({"op": "checkpoint"})).note, _PLAIN)

    def metrics() -> Response:
        header = message_header("metrics", request.environ, settings.proxies, request_id())
        return _text(replies.expect(replies.MetricsText, keeper.ask(header)).text, _METRICS)

    def file() -> Response:
        status, headers, body = published.response(request.path.removeprefix("/api/"), request.environ)
        return Response(body, status, list(headers))

    # What needs no token, or is no JSON.
    views: dict[str, Callable[[], Response]] = {
        "/api/ca": lambda: _text(replies.expect(replies.CaKey, keeper.ask({"op": "ca"})).bundle, _PLAIN),
        "/api/ledger/checkpoint": checkpoint,
        "/api/ledger/proof": lambda: json_response(keeper.ask({"op": "proof", **read_query(openapi.PROOF)})),
        "/api/openapi.json": lambda: _text(openapi.text(), "application/json"),
        "/healthz": lambda: json_response(Alive(status="ok")),
        "/readyz": readyz,
        "/metrics": metrics,
        **{f"/api/{name}": file for name in FILES},
    }
    for route in openapi.ROUTES:
        path = route.path.replace("{role}", "<role:role>").replace("{", "<").replace("}", ">")
        view = views.get(route.path) or partial(_answer, ask, route)
        app.add_url_rule(path, f"native {route.method} {path}", view, methods=[route.method])


def _answer(ask: Asker, route: Route, **named: str) -> Response:
    """The response to a request for a route of the table; `named` is the name in its path."""
    fields = read_query(route.queries) if route.queries else {}
    fields.pop("wait", None)  # 0, or there is nothing to wait for
    if route.path == "/api/revocations/preview" and (missing := {"by", "value"} - fields.keys()):
        raise bad_query(f"{min(missing)} is missing", "give by and value, as for POST /api/revocations")
    for name, value in named.items():
        fields[route.named or name] = _read_name(name, value)
    reply = ask(route, fields)
    if route.op == "whoami":
        return json_response(who_am_i(reply))
    if route.accepted is not None and isinstance(reply, replies.RequestDetails):
        return json_response(reply, 202)
    response = json_response(reply, route.status)
    if isinstance(reply, _PAGES) and reply.before is not None:
        query = urlencode({**request.args.to_dict(), "before": reply.before})
        response.headers["Link"] = f'<{request.path}?{query}>; rel="next"'
    return response


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


def who_am_i(reply: replies.Reply) -> WhoAmI:
    caller = replies.expect(replies.CallerDetails, reply)
    known = caller.model_dump(include=WhoAmI.model_fields.keys() & replies.CallerDetails.model_fields.keys())
    return WhoAmI(**known, token=CallerToken(expires=caller.expires))


def _text(text: str, content_type: str, status: int = 200) -> Response:
    return Response(text, status, {"Content-Type": content_type, "Cache-Control": "no-store"})


# --- requests --------------------------------------------------------------------------------------------------------


def read_query(queries: tuple[Query, ...]) -> dict[str, object]:
    """The parameters of a route; raises `BadRequest` for an unknown or repeated one: ignored it changes a list."""
    schemas = {query.name: query.schema for query in queries}
    fields: dict[str, object] = {}
    for name, values in request.args.lists():
        if name not in schemas:
            raise bad_query(f"unknown parameter {name[:64]!a}", f"use {', '.join(schemas)}")
        if len(values) > 1:
            raise bad_query(f"{name} is given more than once", f"give {name} once")
        value = values[0]
        if schemas[name]["type"] == "boolean":
            if value not in ("true", "false"):
                raise bad_query(f"{name} must be true or false", f"correct {name}")
            fields[name] = value == "true"
        elif schemas[name]["type"] == "integer":
            fields[name] = read_whole(name, value, MAX_WAIT if name == "wait" else 2**63 - 1)
        else:
            fields[name] = read_word(name, value, schemas[name].get("maxLength", 256))
    for name in ("backend", "state"):
        choices = schemas.get(name, {}).get("enum", ())
        if name in fields and fields[name] not in choices:
            raise bad_query(f"{name} must be one of {', '.join(choices)}", f"correct {name}")
    if fields.get("limit") == 0:
        raise bad_query("limit must be at least 1", "correct limit")
    return fields


def _read_name(name: str, value: str) -> str | int:
    """A name or number in a path; raises `BadRequest`."""
    schema = openapi.path_schema(name)
    if schema["type"] == "integer":
        return read_whole(name, value, schema["maximum"])
    return read_word("id" if name == "name" else name, value, schema["maxLength"])


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
