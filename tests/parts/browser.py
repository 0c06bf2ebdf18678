"""Debian's Chromium, driven by playwright: one browser, a fresh profile for each visit, and what a page did wrong.

A visit fails at its end for each violation of the Content-Security-Policy, error on the console, exception in a
script and request to another origin. Passkeys are made and used by Chromium's own virtual authenticator (Chrome
DevTools Protocol, domain WebAuthn). Playwright's loop stays with the thread until the browser is closed, so that no
`asyncio.run` works meanwhile: keep the browser to the tests of one module.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext, ConsoleMessage, Page, Request, WebError, sync_playwright

from tests.parts.missing import CHROMIUM
from tests.parts.passkeys import SoftPasskey

ARGUMENTS = ("--no-sandbox", "--headless", "--disable-background-networking")
WAIT = 30_000  # milliseconds for what a page is expected to show; the machine may be busy
# WCAG 2.2 up to AA, and what axe-core knows of good practice.
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
SIZES = {"desktop": (1280, 900), "phone": (360, 740)}  # CSS pixels

Scheme = Literal["light", "dark"]


# The beginnings of what is in a table and beyond the window's right edge.
_CUT_OFF = """[...document.querySelectorAll('caption, tbody th, td')]
    .filter(one => one.getClientRects().length && one.getBoundingClientRect().right > window.innerWidth)
    .map(one => one.textContent.trim().slice(0, 40))"""


class Authenticator:
    """A platform authenticator of one page that verifies its user, as a fingerprint does, unless told otherwise."""

    def __init__(self, context: BrowserContext, page: Page) -> None:
        self._session = context.new_cdp_session(page)
        self._session.send("WebAuthn.enable")
        options = {
            "protocol": "ctap2",
            "transport": "internal",
            "hasResidentKey": True,
            "hasUserVerification": True,
            "isUserVerified": True,
            "automaticPresenceSimulation": True,
        }
        self._id = self._session.send("WebAuthn.addVirtualAuthenticator", {"options": options})["authenticatorId"]

    def add(self, passkey: SoftPasskey) -> None:
        """Puts a passkey in, which its line in policy.toml may already name.

        Its counter is above those of the authenticators that were given it before: a copy, which one behind gives away.
        """
        passkey.counter += 100
        credential = {
            "credentialId": base64.b64encode(passkey.id).decode(),
            "isResidentCredential": True,
            "rpId": passkey.rp,
            "privateKey": base64.b64encode(passkey.pkcs8).decode(),
            "userHandle": base64.b64encode(b"anna").decode(),
            "signCount": passkey.counter,
        }
        self._session.send("WebAuthn.addCredential", {"authenticatorId": self._id, "credential": credential})

    def verifies(self, yes: bool) -> None:
        """Whether the next user is recognised."""
        self._session.send("WebAuthn.setUserVerified", {"authenticatorId": self._id, "isUserVerified": yes})

    def credentials(self) -> list[dict[str, Any]]:
        """What it holds, as the protocol has it: `credentialId` in base64url, `rpId`, `signCount` and more."""
        found = self._session.send("WebAuthn.getCredentials", {"authenticatorId": self._id})["credentials"]
        for one in found:
            one["credentialId"] = base64.urlsafe_b64encode(base64.b64decode(one["credentialId"])).decode().rstrip("=")
        return list(found)


class Visit:
    """One profile with one page, at `origin`; `faults` is what its pages did wrong so far."""

    def __init__(self, context: BrowserContext, origin: str) -> None:
        self.context = context
        self.origin = origin
        self.faults: list[str] = []
        self._allowed: list[str] = []
        context.set_default_timeout(WAIT)
        context.on("console", self._on_console)
        context.on("weberror", self._on_error)
        context.on("request", self._on_request)
        self.page = context.new_page()

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.faults.append(f"console: {message.text} ({message.location.get('url', '')})")

    def _on_error(self, error: WebError) -> None:
        self.faults.append(f"exception: {error.error}")

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith(f"{self.origin}/"):
            self.faults.append(f"another origin: {request.method} {request.url}")

    def allow(self, pattern: str) -> None:
        """Takes out the faults that this regular expression finds, now and later."""
        self._allowed.append(pattern)

    def check(self) -> None:
        """Raises `AssertionError` with all faults that were not allowed."""
        left = [fault for fault in self.faults if not any(re.search(pattern, fault) for pattern in self._allowed)]
        assert not left, "\n".join(left)

    def go(self, path: str) -> int:
        """Opens a path of the origin; the status of the answer."""
        answer = self.page.goto(self.origin + path)
        assert answer is not None
        return answer.status

    def authenticator(self) -> Authenticator:
        return Authenticator(self.context, self.page)

    def check_accessible(self) -> None:
        """Raises `AssertionError` with all that axe-core finds wrong with the page as it is shown."""
        found = Axe().run(self.page, options={"runOnly": RULES, "resultTypes": ["violations"]})
        assert found.response["passes"], "axe-core found nothing to look at"
        assert found.violations_count == 0, f"{self.page.url}\n{found.generate_report()}"

    def check_narrow(self) -> None:
        """Raises `AssertionError` if the page as a whole scrolls sideways, or on a phone any table."""
        needed, has = self.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert needed <= has, f"{self.page.url} is {needed} pixels wide in a window of {has}"
        if has == SIZES["phone"][0]:
            cut = self.page.evaluate(_CUT_OFF)
            assert not cut, f"{self.page.url} cuts off in a table: {cut}"


class Browser:
    """Chromium without a window. Use as a context manager."""

    def __enter__(self) -> Browser:
        self._playwright = sync_playwright().start()
        try:
            self._chromium = self._playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        except BaseException:
            self._playwright.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self._chromium.close()
        finally:
            self._playwright.stop()

    @contextmanager
    def visit(
        self, origin: str, *, size: str = "desktop", scheme: Scheme = "light", script: bool = True
    ) -> Iterator[Visit]:
        """A fresh profile; raises `AssertionError` at its end if its pages did something wrong."""
        width, height = SIZES[size]
        context = self._chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, java_script_enabled=script
        )
        try:
            visit = Visit(context, origin)
            yield visit
            visit.check()
        finally:
            context.close()
