"""What every page of the console has: the session in a cookie, the check of forms, the headers, the templates.

The cookie contains the credential of a session of the keeper's and nothing else; who it is and what it may, the keeper
says on each request. A GET changes nothing. A POST has to come from a page of the console (`check_form`).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

from flask import Flask, Response, current_app, g, request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from werkzeug.exceptions import HTTPException

from signer.api.console.words import time_left
from signer.api.native import request_id
from signer.api.problems import retry_after, status_of
from signer.api.request import COOKIE, SECURE_COOKIE, is_of_console, message_header, read_session
from signer.errors import TOKEN_CODES, BadRequest, NotFound, Refused, SignerError, Unavailable
from signer.protocol.client import KeeperClient
from signer.protocol.replies import CallerDetails, Reply, expect
from signer.protocol.sign_request import body_too_large
from signer.settings import Settings

_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
HEADERS: Final = (
    ("Content-Security-Policy", _POLICY),
    ("X-Frame-Options", "DENY"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "same-origin"),  # with `no-referrer`, browsers send `Origin: null` with forms
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
)
SIGN_IN: Final = "/console/sign-in"
CSRF_FIELD: Final = "csrf"
FORM: Final = "application/x-www-form-urlencoded"
FRAGMENT: Final = "fragment"
LIVE_PARAMETERS: Final = (FRAGMENT, "wait", "seen")
SEEN_DIGITS: Final = 16  # hexadecimal digits that name the content of a live part
LATEST: Final = 253_402_300_799  # seconds since 1970: the last second of the year 9999
_CSRF_PURPOSE: Final = b"signer console csrf"
_HERE: Final = Path(__file__).parent
_CONTENT_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_LOCAL_PATH: Final = re.compile(
    r"/console(?:/(?!\.+(?:[/?]|$))[A-Za-z0-9._@:~-]+)*(?:\?[A-Za-z0-9._@:~%=&+-]*)?", re.ASCII
)
_NO_SUCH_PAGE: Final = NotFound("unknown_route", "there is no such page", "go on by the links above")
_MALFORMED: Final = BadRequest("request_malformed", "the request cannot be read", "go back and try again")
_FAULTS: Final[Mapping[int, SignerError]] = {
    404: _NO_SUCH_PAGE,
    405: BadRequest("method_not_allowed", "this page takes no such request", "go on by the links above"),
    413: body_too_large(),
}


@dataclass(frozen=True, slots=True)
class Session:
    """Who looks at a page, as the keeper says; `ask` sends a command as them."""

    credential: str = field(repr=False)
    caller: CallerDetails
    ask: Callable[..., Reply] = field(repr=False)

    @property
    def name(self) -> str:
        return self.caller.identity

    @property
    def csrf(self) -> str:
        """The secret of this session's forms."""
        return csrf_token(self.credential)

    def may(self, right: str) -> bool:
        return right in self.caller.may


View = Callable[..., Response]


class Console:
    """The pages of one application."""

    def __init__(
        self, app: Flask, keeper: KeeperClient, settings: Settings, pages: tuple[tuple[str, str], ...]
    ) -> None:
        self.keeper = keeper
        self.has_tls = settings.tls_cert_file is not None
        self._app = app
        self._proxies = settings.proxies
        self._pages = pages
        self._templates = make_templates()
        self._static = {
            path.name: (path.read_bytes(), _CONTENT_TYPES[path.suffix]) for path in (_HERE / "static").iterdir()
        }
        app.extensions["console"] = self
        app.after_request(_add_headers)
        self.add("GET", "/console/static/<name>", self._static_file)

    def add(self, method: str, path: str, view: View) -> None:
        """Adds a route that needs no session."""
        self._app.add_url_rule(path, f"console {method} {path}", view, methods=[method])

    def get(self, path: str, view: View) -> None:
        """Adds a page: `view` gets the session, and the parts of the path by name. Without one, humans sign in."""

        def show(**parts: str) -> Response:
            session = self.session(is_unattended=FRAGMENT in request.args)
            if session is None:
                return self._ask_to_sign_in()
            g.console_session = session
            return view(session, **parts)

        self.add("GET", path, show)

    def post(self, path: str, view: View) -> None:
        """Adds the target of a form of the console; `view` is as that of `get`."""

        def act(**parts: str) -> Response:
            check_origin()
            session = self.session()
            if session is None:
                return redirect(SIGN_IN)
            g.console_session = session
            check_form(session)
            return view(session, **parts)

        self.add("POST", path, act)

    def session(self, *, is_unattended: bool = False) -> Session | None:
        """The session of this HTTP request; None if there is none, or it has ended."""
        credential = read_session(request.environ, only_secure=self.has_tls)
        if credential is None:
            return None

        def ask(op: str, fields: Mapping[str, object] | None = None, body: bytes = b"") -> Reply:
            more = {**(fields or {}), "unattended": is_unattended}
            return self.ask(op, credential, more, body)

        try:
            return Session(credential, expect(CallerDetails, ask("whoami")), ask)
        except SignerError as error:
            if error.code in TOKEN_CODES:
                return None
            raise

    def ask(self, op: str, token: str | None, fields: Mapping[str, object], body: bytes = b"") -> Reply:
        """Asks the keeper with a token or a credential; raises what it answers."""
        header = message_header(op, request.environ, self._proxies, request_id())
        return self.keeper.ask({**header, "token": token, **fields}, body)

    def page(self, template: str, status: int = 200, /, **values: Any) -> Response:
        return Response(self._render(template, values), status, {"Content-Type": "text/html; charset=utf-8"})

    def live_page(self, template: str, fragment: str, /, **values: Any) -> Response:
        """A page with a part that stays up to date: `{{ live }}`, made of the template `fragment`.

        With `?fragment=1` only that part, with an ETag of its content; `live.py` waits until it is another one.
        """
        content = Markup(self._render(fragment, values))  # noqa: S704 - made by the templates, which escape
        seen = hashlib.sha256(content.encode()).hexdigest()[:SEEN_DIGITS]
        if FRAGMENT in request.args:
            return Response(content, 200, {"Content-Type": "text/html; charset=utf-8", "ETag": f'"{seen}"'})
        return self.page(template, **values, live=content, seen=seen)

    def _render(self, template: str, values: Mapping[str, Any]) -> str:
        common = {"session": g.get("console_session"), "pages": self._pages, "path": request.path}
        return self._templates.get_template(template).render({**common, **values})

    def set_cookie(self, response: Response, credential: str) -> Response:
        """Gives the browser the credential. It is for this path and site alone, and no script can read it."""
        is_secure = self.has_tls or str(request.environ.get("HTTP_ORIGIN", "")).startswith("https://")
        response.set_cookie(
            SECURE_COOKIE if is_secure else COOKIE,
            credential,
            path="/" if is_secure else "/console",
            secure=is_secure,
            httponly=True,
            samesite="Strict",
        )
        return response

    def _ask_to_sign_in(self) -> Response:
        """The way to the sign-in page, and back.

        A link on another site's page comes without the cookie (`SameSite=Strict`): then a page of ours opens it again.
        """
        here = request.path + (f"?{request.query_string.decode('ascii', 'replace')}" if request.query_string else "")
        if FRAGMENT in request.args:
            return Response("", HTTPStatus.UNAUTHORIZED)
        came_from_elsewhere = request.environ.get("HTTP_SEC_FETCH_SITE") in ("cross-site", "same-site")
        if came_from_elsewhere and is_local(here) and read_session(request.environ) is None:
            return self.page("again.html", target=here)
        return redirect(f"{SIGN_IN}?{urlencode({'next': here})}" if is_local(here) else SIGN_IN)

    def _static_file(self, name: str) -> Response:
        if name not in self._static:
            raise _NO_SUCH_PAGE
        content, content_type = self._static[name]
        return Response(content, 200, {"Content-Type": content_type})


def make_templates() -> Environment:
    """The templates: everything in them is escaped, and a name that is missing is an error."""
    templates = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        auto_reload=False,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["when"] = show_time
    templates.filters["left"] = time_left
    return templates


def show_time(at: str | float) -> str:
    """A time for humans, such as `2026-11-29 09:00:00 UTC`, of a timestamp, or seconds or milliseconds since 1970."""
    if isinstance(at, str):
        return at.replace("T", " ").replace("Z", " UTC")
    seconds = at / 1000 if at > LATEST else at
    return f"{datetime.fromtimestamp(int(seconds), UTC):%Y-%m-%d %H:%M:%S} UTC"


def csrf_token(credential: str) -> str:
    """The secret of a session's forms; nothing leads from it back to the credential."""
    return hmac.new(credential.encode(), _CSRF_PURPOSE, hashlib.sha256).hexdigest()


def check_origin() -> None:
    """Raises `Refused` unless the browser says that the form is on a page of this site.

    `Sec-Fetch-Site` is set by the browser alone. Browsers leave it out for plain http; then `Origin` has to name the
    host that the request is for.
    """
    site, origin = request.environ.get("HTTP_SEC_FETCH_SITE"), str(request.environ.get("HTTP_ORIGIN", ""))
    try:
        host = urlsplit(origin).netloc
    except ValueError:
        host = ""
    is_same_host = bool(host) and host.lower() == str(request.environ.get("HTTP_HOST", "")).lower()
    # Behind a proxy that renames the host, only the browser knows.
    if not (site == "same-origin" or (site is None and is_same_host)):
        raise _form_refused("the form was not sent by a page of the console")
    if request.mimetype != FORM:
        raise _form_refused(f"the form is not {FORM}")


def check_form(session: Session) -> None:
    """Raises `Refused` unless the form contains the session's secret."""
    given = request.form.getlist(CSRF_FIELD)
    if len(given) != 1 or not hmac.compare_digest(given[0].encode(), session.csrf.encode()):
        raise _form_refused("the form lacks the secret of this session")


def _form_refused(text: str) -> Refused:
    return Refused("form_refused", text, "open the page again and send its form")


def is_local(path: str) -> bool:
    """Whether a path is one of the console's, so that a link or a redirect to it leads nowhere else."""
    return _LOCAL_PATH.fullmatch(path) is not None


def next_url(kept: Mapping[str, str], parameter: str, value: str | None) -> str | None:
    """The address of the next page of this list, which `value` of `parameter` begins; None after the last one."""
    return None if value is None else f"{request.path}?{urlencode({**kept, parameter: value})}"


def redirect(path: str) -> Response:
    """The way to another page of the console, by GET."""
    return Response("", HTTPStatus.SEE_OTHER, {"Location": path})


def render_fault(error: Exception) -> Response:
    """The page for an exception below `/console`; an error that is not a `SignerError` reveals no details."""
    console: Console = current_app.extensions["console"]
    if isinstance(error, SignerError) and error.code in TOKEN_CODES:  # the session has ended meanwhile
        return redirect(SIGN_IN)
    fault: SignerError
    if isinstance(error, HTTPException):
        fault = _FAULTS.get(error.code or 0, _MALFORMED)
    elif isinstance(error, SignerError):
        fault = error
    else:
        fault = Unavailable("internal_error", "internal error", f"look for {request_id()} in the service's log")
    status = status_of(fault)
    response = console.page("error.html", status, fault=fault, status=status, request_id=request_id())
    if seconds := retry_after(fault):
        response.headers["Retry-After"] = seconds
    return response


def _add_headers(response: Response) -> Response:
    if is_of_console(request.path):
        response.headers.update(HEADERS)
    return response
