"""The Flask application: every route but signing, which `asgi.py` answers in front of it."""

from __future__ import annotations

import logging
from functools import partial

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException
from werkzeug.routing import BaseConverter

from signer.api import console, native
from signer.api.published import PublishedFiles
from signer.api.request import is_of_console
from signer.api.sign import ROLE_NAME
from signer.api.vault import responses
from signer.api.vault import routes as vault
from signer.errors import SignerError
from signer.protocol.client import KeeperClient
from signer.protocol.log_limit import LogLimit
from signer.protocol.sign_request import MAX_BODY, body_too_large
from signer.settings import Settings

log = logging.getLogger("signer.api")


def make_flask(
    keeper: KeeperClient, settings: Settings, lines: LogLimit | None = None, published: PublishedFiles | None = None
) -> Flask:
    """The Flask application: every route but signing."""
    flask = Flask("signer", static_folder=None)
    flask.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    flask.url_map.merge_slashes = False
    flask.url_map.converters["role"] = _RoleName
    flask.before_request(_refuse_large_body)
    flask.register_error_handler(Exception, partial(_render_fault, lines or LogLimit(log)))
    native.register(flask, keeper, settings, published or PublishedFiles(settings.published))
    vault.register(flask, keeper, settings)
    console.register(flask, keeper, settings)
    return flask


class _RoleName(BaseConverter):
    """A role name in a path, with the pattern of `sign.py`."""

    regex = f"(?a:{ROLE_NAME})"


def _refuse_large_body() -> None:
    """Refuses a large body, also on routes that read none."""
    if (request.content_length or 0) > MAX_BODY:
        raise body_too_large()


def _render_fault(lines: LogLimit, error: Exception) -> Response:
    """The response for any exception: in Vault's format below /v1/, a page of the console below /console, otherwise a
    problem of the native API."""
    if not isinstance(error, SignerError | HTTPException):
        lines.fault(f"{request.endpoint or 'a path below /v1/'} failed, request {native.request_id()}", error)
    if is_of_console(request.path):
        return console.render_fault(error)
    # Not `request.path`, which has lost the second slash of `//v1/`.
    if not str(request.environ["PATH_INFO"]).startswith("/v1/"):
        return native.render_fault(error)
    if not isinstance(error, SignerError):  # vault/routes.py handles every path below /v1/, so this is a bug
        sentence = f"internal error; look for {native.request_id()} in the service's log"
        return Response(responses.errors(sentence), 500, list(responses.HEADERS))
    status, headers, body = responses.render_error(error)
    return Response(body, status, headers)
