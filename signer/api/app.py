"""The WSGI application: sign routes first, Flask behind them. `gunicorn 'signer.api.app:create_app()'`."""

from __future__ import annotations

import os
from typing import cast

from flask import Flask

from signer.api import native, vault
from signer.api.sign import SignRoutes, Wsgi
from signer.ask import MAX_BODY
from signer.link import Link
from signer.settings import Settings, load_settings


def create_app(settings: Settings | None = None) -> SignRoutes:
    """The whole API for `settings` (the environment's by default)."""
    settings = settings or load_settings(os.environ)
    link = Link(settings.socket)
    flask = Flask("signer", static_folder=None)
    flask.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    flask.url_map.merge_slashes = False
    native.register(flask, link, settings)
    vault.register(flask, link, settings)
    return SignRoutes(link, settings.mounts, settings.trusted_proxies, cast(Wsgi, flask.wsgi_app))
