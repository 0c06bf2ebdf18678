"""A browser without a screen in front of the console, and a core in the keeper's place. Nothing listens."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Final

from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from signer.api.app import make_flask
from signer.authority.certificates import PendingSignature
from signer.errors import SignerError
from signer.ledger.lookups import Lookup
from signer.ledger.marks import Mark
from signer.protocol.client import KeeperClient
from signer.protocol.commands import read_command
from signer.protocol.replies import Ready, Reply, SignedCheckpoint, Status, decode_reply, encode_reply
from signer.service.overview import Overview
from signer.service.publisher import ListState
from signer.settings import load_settings
from tests.parts.builders import Bench, token

ORIGIN = "http://localhost"
Replies = dict[str, Reply]


class CoreClient(KeeperClient):
    """Answers as a keeper with the core of `bench`; `direct` are replies to what a keeper answers outside a batch."""

    def __init__(self, bench: Bench, direct: Replies | None = None) -> None:
        super().__init__(Path("/nowhere"))
        self.bench = bench
        self.direct = direct or {}
        self.asked: list[tuple[dict[str, Any], bytes]] = []

    def ask(self, header: dict[str, object], body: bytes = b"") -> Reply:
        self.asked.append((header, body))
        op = str(header["op"])
        if op in self.direct:
            return self.direct[op]
        if op == "status":
            return keeper_status(self.bench)
        if op in _DIRECT:
            return _DIRECT[op]
        core = self.bench.core
        command = read_command(header, body, lambda caller: _authenticate(self.bench, caller))
        ((_, found),) = core.run([command])
        assert not isinstance(found, PendingSignature)
        if isinstance(found, Lookup):
            return decode_reply(found.answer(self.bench.store))
        assert isinstance(found, Reply | SignerError)
        return decode_reply(encode_reply(found))


def _authenticate(bench: Bench, caller: Any) -> None:
    bench.core.authenticate(caller, int(bench.now))


def keeper_status(bench: Bench, fault: SignerError | None = None, **changes: Any) -> Status:
    """What a keeper that is well says of itself, with the state of the core; `changes` are to its `Overview`."""
    now = int(bench.now)
    known: dict[str, Any] = {
        "now": now,
        "started": now - 3600,
        "policy_since": now - 60,
        "key_since": now - 3600,
        "connections": 1,
        "mode": "local",
        "policy": bench.core.policy,
        "state": bench.core.overview(),
        "ledger_bytes": 5 << 20,
        "publisher": "SHA256:p",
        "published": ListState(4, now - 30, 4),
        "verified": Mark(9, now - 7200),
        "cosigned": Mark(8, now - 300),
        **changes,
    }
    return Overview(**known).status("SHA256:ca", fault)


_DIRECT: Final[Replies] = {
    "health": Ready(ready=True, ca_fingerprint="SHA256:ca", policy="p", mode="local"),
    "checkpoint": SignedCheckpoint(note="signer.example.org/ledger\n12\nCROOT=\n\n— sig"),
}


def console_app(bench: Bench, direct: Replies | None = None, **settings: str) -> Flask:
    """The Flask application in front of the core of `bench`."""
    flask = make_flask(CoreClient(bench, direct), load_settings(settings))
    flask.testing = True
    return flask


@dataclass
class Form:
    """A form of a page: where it goes, and its fields."""

    action: str
    method: str
    fields: dict[str, str] = field(default_factory=dict)


class Page(HTMLParser):
    """What a test looks for in a page."""

    def __init__(self, response: TestResponse) -> None:
        super().__init__()
        self.status, self.text, self.headers = response.status_code, response.text, response.headers
        self.forms: list[Form] = []
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag == "form":
            self.forms.append(Form(found["action"], found.get("method", "get")))
        elif tag in ("input", "textarea", "select") and "name" in found and self.forms:
            self.forms[-1].fields[found["name"]] = found.get("value", "")
        elif tag == "a":
            self.links.append(found["href"])

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def shown(self) -> str:
        """The text of the page with single spaces."""
        return " ".join(" ".join(self.words).split())

    def form(self, action: str) -> Form:
        """The form that goes to `action`."""
        return next(form for form in self.forms if form.action == action)


class Browser:
    """A browser with a cookie jar that follows redirects; sends what browsers send with forms."""

    def __init__(self, app: Flask, origin: str = ORIGIN) -> None:
        self.app = app
        self.origin = origin
        self.client: FlaskClient = app.test_client()
        self.slowest = 0.0

    def get(self, path: str, **headers: str) -> Page:
        return self._open("GET", path, headers)

    def post(self, path: str, fields: dict[str, str], **headers: str) -> Page:
        """Sends fields as a form of a page of ours; a header that is empty is left out."""
        return self._open("POST", path, {"Origin": self.origin, **headers}, fields)

    def submit(self, page: Page, action: str, /, **fields: str) -> Page:
        """Fills a form of a page, and sends it."""
        form = page.form(action)
        assert set(fields) <= set(form.fields), (fields, form.fields)
        return self.post(action, {**form.fields, **fields})

    def sign_in(self, who: str = "operator") -> Page:
        return self.submit(self.get("/console/sign-in"), "/console/sign-in", token=token(who))

    def cookie(self) -> str | None:
        """The credential that the browser holds."""
        for name, path in (("signer_console", "/console"), ("__Host-signer_console", "/")):
            found = self.client.get_cookie(name, path=path)
            if found is not None:
                return str(found.value)
        return None

    def _open(self, method: str, path: str, headers: dict[str, str], fields: dict[str, str] | None = None) -> Page:
        began = time.perf_counter()
        kept = {name.replace("_", "-"): value for name, value in headers.items() if value}
        response = self.client.open(
            path, method=method, data=fields, headers=kept, base_url=self.origin, follow_redirects=True
        )
        self.slowest = max(self.slowest, time.perf_counter() - began)
        return Page(response)
