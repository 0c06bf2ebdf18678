"""The browser itself fails a test whose pages do something wrong, so that a test that passes means something."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.parts.browser import Browser
from tests.parts.passkeys import ALGORITHMS, SoftPasskey, b64url

POLICY = "default-src 'none'; script-src 'self'; img-src http:"
GOOD = '<!doctype html><html lang="en"><link rel="icon" href="/icon"><title>a page</title><main><h1>A page</h1></main>'
PAGES = {
    "/good": GOOD,
    "/icon": "",
    "/script": GOOD + "<script>1</script>",
    "/style": GOOD + '<p style="color: red">red</p>',
    "/error": GOOD + '<script src="/error.js"></script>',
    "/exception": GOOD + '<script src="/exception.js"></script>',
    "/elsewhere": GOOD + '<img src="http://localhost:9/pixel" alt="">',
    "/faint": GOOD.replace("<h1>", '<p><a href="/"></a></p><h1>'),
    "/wide": GOOD + f"<p>{'w' * 400}",
    "/error.js": "console.error('said by a script')",
    "/exception.js": "missing.member",
}


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = PAGES.get(self.path)
        self.send_response(404 if found is None else 200)
        self.send_header("Content-Type", "text/javascript" if self.path.endswith(".js") else "text/html")
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(("no such page" if found is None else found).encode())

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


def test_a_visit_of_a_good_page_ends_well(browser: Browser, origin: str) -> None:
    with browser.visit(origin, size="phone") as visit:
        assert visit.go("/good") == 200
        visit.check_accessible()
        visit.check_narrow()


@pytest.mark.parametrize(
    "path, says",
    [
        ("/script", "Executing inline script violates the following Content Security Policy directive"),
        ("/style", "Applying inline style violates the following Content Security Policy directive"),
        ("/error", "console: said by a script"),
        ("/exception", "exception: .*missing is not defined"),
        ("/elsewhere", "another origin: GET http://localhost:9/pixel"),
        ("/nowhere", "console: .*status of 404"),
    ],
)
def test_a_visit_fails_for_what_a_page_does_wrong(browser: Browser, origin: str, path: str, says: str) -> None:
    with browser.visit(origin) as visit:
        visit.go(path)
        with pytest.raises(AssertionError, match=says):
            visit.check()
        visit.allow(f"{says}|ERR_CONNECTION_REFUSED|ERR_UNSAFE_PORT")


def test_nobody_has_to_ask_for_that_check(browser: Browser, origin: str) -> None:
    with pytest.raises(AssertionError, match="said by a script"), browser.visit(origin) as visit:
        visit.go("/error")


def test_what_a_screen_reader_or_a_phone_cannot_use_is_found(browser: Browser, origin: str) -> None:
    with browser.visit(origin, size="phone") as visit:
        visit.go("/faint")
        with pytest.raises(AssertionError, match="links have discernible text"):
            visit.check_accessible()
        visit.go("/wide")
        with pytest.raises(AssertionError, match="pixels wide in a window of 360"):
            visit.check_narrow()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_authenticator_uses_the_passkey_that_it_was_given(browser: Browser, origin: str, algorithm: str) -> None:
    passkey = SoftPasskey("anna", algorithm, rp="localhost", origin=origin)
    with browser.visit(origin) as visit:
        visit.go("/good")
        authenticator = visit.authenticator()
        authenticator.add(passkey)
        assert [one["credentialId"] for one in authenticator.credentials()] == [b64url(passkey.id)]
        used = visit.page.evaluate(
            """async () => (await navigator.credentials.get({publicKey: {challenge: new Uint8Array(32)}})).id"""
        )
        assert used == b64url(passkey.id)
        authenticator.verifies(False)
        refused = visit.page.evaluate(
            """() => navigator.credentials.get(
                {publicKey: {challenge: new Uint8Array(32), userVerification: "required"}}
            ).catch(error => error.name)"""
        )
        assert refused == "NotAllowedError"
