"""The routes of requests, waivers and incidents in Flask. A client that waits for a decision is in `waiting.py`."""

from __future__ import annotations

from functools import partial
from typing import Final

from flask import Flask, Response, request

from signer.api.native import issued_response, json_response, make_ask, page_response, read_query, read_word
from signer.api.sign import read_body
from signer.protocol.client import KeeperClient
from signer.protocol.replies import RequestPage, expect
from signer.settings import Settings

FILTERS: Final = ("state", "identity", "before")


def register(app: Flask, keeper: KeeperClient, settings: Settings) -> None:
    """Adds the routes to `app`."""
    ask = make_ask(keeper, settings)

    def requests() -> Response:
        return page_response(expect(RequestPage, ask("requests", read_query(FILTERS))))

    def show(name: str) -> Response:
        read_query(("wait",))  # 0, or there is nothing to wait for
        return json_response(ask("request", {"request": read_word("id", name)}))

    def claim(name: str) -> Response:
        return issued_response(ask("claim", {"request": read_word("id", name)}, read_body(request.environ)))

    def decide(op: str, key: str, name: str) -> Response:
        return json_response(ask(op, {key: read_word("id", name)}, read_body(request.environ)))

    def incidents() -> Response:
        return json_response(ask("incidents", read_query(("state",))))

    for method, path, view in (
        ("GET", "/api/requests", requests),
        ("GET", "/api/requests/<name>", show),
        ("POST", "/api/requests/<name>/claim", claim),
        ("POST", "/api/requests/<name>/approve", partial(decide, "approve", "request")),
        ("POST", "/api/requests/<name>/deny", partial(decide, "deny", "request")),
        ("POST", "/api/requests/<name>/withdraw", partial(decide, "withdraw", "request")),
        ("GET", "/api/waivers", lambda: json_response(ask("waivers", {}))),
        ("POST", "/api/waivers/<name>/end", partial(decide, "end_waiver", "waiver")),
        ("GET", "/api/incidents", incidents),
        ("POST", "/api/incidents/<name>/close", partial(decide, "close_incident", "incident")),
    ):
        app.add_url_rule(path, f"native {method} {path}", view, methods=[method])
