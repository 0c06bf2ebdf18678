"""The page that enrols a passkey, without a browser; tests/system/console/test_console.py makes passkeys in one."""

from __future__ import annotations

from tests.parts.builders import Bench
from tests.parts.console import Browser, console_app


def test_the_page_is_for_those_who_are_signed_in_and_sends_nothing() -> None:
    browser = Browser(console_app(Bench()))
    assert any(form.action == "/console/sign-in" for form in browser.get("/console/enrol").forms)
    browser.sign_in()
    page = browser.get("/console/enrol")
    assert ("script", {"src": "/console/static/enrol.js", "defer": ""}) in page.tags
    assert any(attributes.get("data-identity") == "operator" for _, attributes in page.tags)
    assert [form.action for form in page.forms] == ["/console/sign-out"]
    assert "scripts are off here" in page.shown
    script = browser.client.get("/console/static/enrol.js")
    assert script.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert not any(word in script.text for word in ("fetch(", "XMLHttpRequest", "sendBeacon", "innerHTML"))
