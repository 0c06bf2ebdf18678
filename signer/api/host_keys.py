"""The routes below /api/host-keys in Flask: who changes the list of host keys, and who sees it."""

from __future__ import annotations

from flask import Flask, Response, request

from signer.api.native import json_response, make_ask, read_query, read_word
from signer.api.sign import read_body
from signer.protocol.client import KeeperClient
from signer.protocol.host_request import MAX_HOST_NAME
from signer.settings import Settings


def register(app: Flask, keeper: KeeperClient, settings: Settings) -> None:
    """Adds the routes to `app`."""
    ask = make_ask(keeper, settings)

    def remove(host: str) -> Response:
        return json_response(ask("remove_host_keys", {"host": read_word("host", host, MAX_HOST_NAME)}))

    for method, path, view in (
        ("GET", "/api/host-keys", lambda: json_response(ask("host_keys", read_query(("after",))))),
        ("POST", "/api/host-keys", lambda: json_response(ask("add_host_keys", {}, read_body(request.environ)), 201)),
        ("DELETE", "/api/host-keys/<host>", remove),
    ):
        app.add_url_rule(path, f"host keys {method} {path}", view, methods=[method])
