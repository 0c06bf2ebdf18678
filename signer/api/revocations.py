"""The routes below /api/revocations in Flask: who revokes, what that would hit, and what was revoked."""

from __future__ import annotations

from flask import Flask, Response, request

from signer.api.native import bad_query, json_response, make_ask, page_response, read_query
from signer.api.sign import read_body
from signer.protocol.client import KeeperClient
from signer.protocol.replies import RevocationPage, expect
from signer.settings import Settings


def register(app: Flask, keeper: KeeperClient, settings: Settings) -> None:
    """Adds the routes to `app`."""
    ask = make_ask(keeper, settings)

    def preview() -> Response:
        asked = read_query(("by", "value"))
        if missing := {"by", "value"} - asked.keys():
            raise bad_query(f"{min(missing)} is missing", "give by and value, as for POST /api/revocations")
        return json_response(ask("preview_revocation", asked))

    def revocations() -> Response:
        return page_response(expect(RevocationPage, ask("revocations", read_query(("before", "limit")))))

    for method, path, view in (
        ("GET", "/api/revocations", revocations),
        ("GET", "/api/revocations/preview", preview),
        ("POST", "/api/revocations", lambda: json_response(ask("revoke", {}, read_body(request.environ)), 201)),
    ):
        app.add_url_rule(path, f"revocations {method} {path}", view, methods=[method])
