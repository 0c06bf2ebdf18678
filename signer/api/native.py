"""The native API in Flask: JSON in and out, problems as RFC 9457. Signing itself is in `sign.py`."""

from __future__ import annotations

from flask import Flask, Response, jsonify

from signer.errors import SignerError
from signer.link import Link
from signer.settings import Settings


def register(app: Flask, link: Link, settings: Settings) -> None:
    """Adds the native routes to `app`."""

    @app.get("/healthz")
    def healthz() -> Response:
        return jsonify(status="ok")

    @app.get("/readyz")
    def readyz() -> tuple[Response, int]:
        try:
            health = link.ask({"op": "health"})
        except SignerError as error:
            health = {"ready": False, "code": error.code, "text": error.text, "hint": error.hint}
        return jsonify(health), 200 if health["ready"] else 503
