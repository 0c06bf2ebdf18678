"""The routes of hosts in Flask: published files, which `asgi.py` answers in front of it, and who has fetched them."""

from __future__ import annotations

from flask import Flask, Response, request

from signer.api.native import json_response, make_ask
from signer.api.published import FILES, PublishedFiles
from signer.protocol.client import KeeperClient
from signer.settings import Settings


def register(app: Flask, keeper: KeeperClient, settings: Settings, published: PublishedFiles) -> None:
    """Adds the routes to `app`."""
    ask = make_ask(keeper, settings)

    def file() -> Response:
        status, headers, body = published.response(request.path.removeprefix("/api/"), request.environ)
        return Response(body, status, list(headers))

    for name in FILES:
        app.add_url_rule(f"/api/{name}", f"hosts {name}", file, methods=["GET"])
    app.add_url_rule("/api/hosts", "hosts", lambda: json_response(ask("hosts", {})), methods=["GET"])
