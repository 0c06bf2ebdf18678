"""Freezes, waivers and incidents in the console: who sees what, and what a session may stop."""

from __future__ import annotations

import pytest
from flask import Flask

from signer.units import timestamp
from tests.parts.asking import Asking
from tests.parts.builders import NOW
from tests.parts.console import Browser, Page, console_app

SCRIPT = "<script>alert(1)</script>"
GLASS = "the database is down and nobody else answers"


@pytest.fixture
def bench() -> Asking:
    return Asking()


@pytest.fixture
def app(bench: Asking) -> Flask:
    return console_app(bench)


def signed_in(app: Flask, who: str) -> Browser:
    browser = Browser(app)
    assert browser.sign_in(who).status == 200
    return browser


def freeze(browser: Browser, **fields: str) -> Page:
    page = browser.get("/console/freezes")
    return browser.submit(page, "/console/freezes", **{"lasts": "", "reason": "drill", **fields})


# --- freezes ---------------------------------------------------------------------------------------------------------


def test_anna_freezes_an_agent_and_it_gets_nothing_more(bench: Asking, app: Flask) -> None:
    anna = signed_in(app, "anna")
    page = freeze(anna, kind="identity", name="agent-7", reason=SCRIPT, lasts="1h")
    assert page.status == 200
    for text in ("identity:agent-7", SCRIPT, "anna", "signer unfreeze identity agent-7"):
        assert text in page.shown
    assert SCRIPT not in page.text
    body = bench.store.bodies("freeze.set")[0]
    assert (body["scope"], body["until"]) == ("identity:agent-7", NOW + 3600)
    assert bench.request("agent-7").code == "frozen"


@pytest.mark.parametrize(
    "fields, code",
    [
        ({"kind": "identity", "name": "nobody"}, "unknown_scope"),
        ({"kind": "role", "name": "agent-7"}, "unknown_scope"),
        ({"kind": "all", "name": "agent-7"}, "query_malformed"),
        ({"kind": "all", "name": ""}, "query_malformed"),
        ({"kind": "planet", "name": "x"}, "query_malformed"),
        ({"kind": "identity", "name": "agent-7", "reason": ""}, "field_malformed"),
        ({"kind": "identity", "name": "agent-7", "lasts": "10y"}, "field_malformed"),
        ({"kind": "identity", "name": "agent-7", "reason": "two\nlines"}, "field_malformed"),
    ],
)
def test_a_form_that_does_not_fit_freezes_nothing(bench: Asking, app: Flask, fields: dict[str, str], code: str) -> None:
    page = freeze(signed_in(app, "anna"), **fields)
    assert code in page.shown
    assert "freeze.set" not in bench.store.kinds()


def test_everything_is_frozen_by_its_name(bench: Asking, app: Flask) -> None:
    page = freeze(signed_in(app, "anna"), kind="all", name="all")
    assert bench.store.bodies("freeze.set")[0]["scope"] == "all"
    assert "signer unfreeze all" in page.shown


def test_who_lacks_the_right_gets_no_form_and_no_freeze(bench: Asking, app: Flask) -> None:
    ben = signed_in(app, "ben")
    page = ben.get("/console/freezes")
    assert [form.action for form in page.forms] == ["/console/sign-out"]
    csrf = page.form("/console/sign-out").fields["csrf"]
    fields = {"csrf": csrf, "kind": "role", "name": "prod", "reason": "drill", "lasts": ""}
    answer = ben.post("/console/freezes", fields)
    assert (answer.status, "not_permitted" in answer.shown) == (403, True)
    assert "freeze.set" not in bench.store.kinds()


def test_who_freezes_themselves_is_signed_out(bench: Asking, app: Flask) -> None:
    anna = signed_in(app, "anna")
    assert "Your token" in freeze(anna, kind="identity", name="anna").shown
    assert len(bench.core.sessions) == 0


def test_a_link_fills_the_form_and_freezes_nothing(bench: Asking, app: Flask) -> None:
    anna = signed_in(app, "anna")
    page = anna.get("/console/freezes?scope=identity:agent-7&reason=x&kind=all")
    assert page.form("/console/freezes").fields["name"] == "agent-7"
    assert "freeze.set" not in bench.store.kinds()
    assert anna.post("/console/freezes", {"kind": "all", "name": "all", "reason": "drill"}).status == 403
    assert "freeze.set" not in bench.store.kinds()


# --- waivers ---------------------------------------------------------------------------------------------------------


def waived(bench: Asking) -> str:
    shown = bench.request()
    bench.approve(shown, waiver={"until": timestamp(NOW + 3600), "uses": 5})
    return str(bench.waivers()[0]["waiver"])


@pytest.mark.parametrize("who", ["anna", "ben"])
def test_who_might_have_approved_sees_a_waiver_and_ends_it(bench: Asking, app: Flask, who: str) -> None:
    name = waived(bench)
    browser = signed_in(app, who)
    page = browser.get("/console/waivers")
    assert "agent-7, role prod" in page.shown
    assert "0 of 5" in page.shown
    page = browser.submit(page, f"/console/waivers/{name}/end", reason=SCRIPT)
    assert "No waiver is in force" in page.shown
    body = bench.store.bodies("waiver.ended")[0]
    assert (body["waiver"], body["reason"]) == (name, SCRIPT)
    bench.request()  # the approved one
    assert bench.request(ttl=300)["state"] == "pending"


def test_a_waiver_of_others_is_not_shown_and_not_ended(bench: Asking, app: Flask) -> None:
    name = waived(bench)
    dora = signed_in(app, "dora")
    page = dora.get("/console/waivers")
    assert "No waiver is in force" in page.shown
    csrf = page.form("/console/sign-out").fields["csrf"]
    answer = dora.post(f"/console/waivers/{name}/end", {"csrf": csrf, "reason": ""})
    assert (answer.status, "unknown_waiver" in answer.shown) == (404, True)
    auditor = signed_in(app, "auditor")
    csrf = auditor.get("/console/waivers").form("/console/sign-out").fields["csrf"]
    assert auditor.post(f"/console/waivers/{name}/end", {"csrf": csrf, "reason": ""}).status == 403
    assert auditor.post(f"/console/waivers/{name}/end", {"reason": ""}).status == 403
    assert len(bench.waivers()) == 1


# --- incidents -------------------------------------------------------------------------------------------------------


def test_an_incident_is_shown_until_it_is_closed_at_the_command_line(bench: Asking, app: Flask) -> None:
    shown = bench.request("carl", "glass", reason=GLASS)
    bench.approve(shown, "carl")
    bench.request("carl", "glass", reason=GLASS)
    name = bench.incidents()[0]["incident"]
    anna = signed_in(app, "anna")
    page = anna.get("/console/incidents")
    assert name in page.shown
    assert GLASS in page.shown
    assert [form.action for form in page.forms] == ["/console/sign-out"]
    bench.close(name)
    assert name not in anna.get("/console/incidents").shown
    page = anna.get("/console/incidents?state=all")
    assert name in page.shown
    assert "4a1f09c" in page.shown


def test_empty_pages_say_so(app: Flask) -> None:
    anna = signed_in(app, "anna")
    assert "Nothing is frozen" in anna.get("/console/freezes").shown
    assert "No incident is open." in anna.get("/console/incidents").shown
    assert "No waiver is in force" in anna.get("/console/waivers").shown
