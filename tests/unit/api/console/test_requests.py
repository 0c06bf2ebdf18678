"""Requests in the console: what a human sees, what they may decide, and who attacks them through the page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from flask import Flask

from signer.api.app import make_flask
from signer.authority.requests import details
from signer.protocol.replies import RequestDetails
from signer.settings import load_settings
from signer.ssh.statement import approval_statement, request_digest
from signer.units import parse_timestamp, timestamp
from tests.parts.asking import REASON, Asking, approval_key, asking_policy, change_identity
from tests.parts.builders import token
from tests.parts.console import Browser, CoreClient, Page, console_app
from tests.parts.passkeys import SoftPasskey, body_of

SCRIPT = "<script>alert(1)</script>\"'&amp;{{7*7}}"


@pytest.fixture
def key() -> SoftPasskey:
    """Anna's."""
    return SoftPasskey()


@pytest.fixture
def bench(key: SoftPasskey) -> Asking:
    policy = change_identity(asking_policy(), "anna", approval_keys=(approval_key("anna"), key.line))
    return Asking(change_identity(policy, "dora", approval_keys=(SoftPasskey("dora").line,)))


@pytest.fixture
def app(bench: Asking) -> Flask:
    return console_app(bench)


def signed_in(app: Flask, who: str) -> Browser:
    browser = Browser(app)
    assert browser.sign_in(who).status == 200
    return browser


@pytest.fixture
def anna(app: Flask) -> Browser:
    return signed_in(app, "anna")


def page_of(browser: Browser, shown: Any) -> Page:
    page = browser.get(f"/console/requests/{shown['request']}")
    assert page.status == 200
    return page


def actions(page: Page) -> set[str]:
    return {form.action.rpartition("/")[2] for form in page.forms} - {"sign-out", "requests"}


def assertion_of(page: Page, key: SoftPasskey, waiver: dict[str, Any] | None = None) -> dict[str, str]:
    """What the script fills in: the assertion for the statement of the page."""
    (form,) = [attributes for tag, attributes in page.tags if tag == "form" and "data-passkey" in attributes]
    statement = form["data-statement"]
    if waiver is not None:  # as `statementOf` of console.js does
        text = json.dumps(waiver, separators=(",", ":"))
        statement = re.sub(r'"waiver":null\}$', lambda _: f'"waiver":{text}}}', statement)
    fields: dict[str, str] = body_of(key.approve(statement.encode()))["assertion"]
    return fields


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_the_list_shows_what_waits_and_what_was_decided(bench: Asking, anna: Browser) -> None:
    assert "No request waits." in anna.get("/console/requests").shown
    first, second = bench.request("agent-7"), bench.request("agent-8", principals=("backup",))
    bench.deny(second)
    page = anna.get("/console/requests")
    assert first["request"] in page.shown
    assert second["request"] not in page.shown
    assert "opens every host that accepts principal llmops, for any command" in page.shown
    page = anna.get("/console/requests?state=all")
    assert page.shown.index(second["request"]) < page.shown.index(first["request"])
    assert "agent-8" not in anna.get("/console/requests?state=all&identity=agent-7").shown
    assert anna.get("/console/requests?state=nonsense").status == 400


def test_a_list_of_very_many_requests_has_pages_of_less_than_50_kb(bench: Asking, anna: Browser) -> None:
    for number in range(20):
        for who in ("agent-7", "agent-8", "ci"):
            bench.request(who, ttl=300 + number, reason=f"{number} " + "r" * 480)
    for number in range(15):
        bench.request("dora", "pair", ttl=300 + number, reason=f"{number} " + "r" * 480)
    seen: list[str] = []
    path = "/console/requests"
    while True:
        page = anna.get(path)
        assert len(page.text.encode()) < 50_000
        seen += [link.rpartition("/")[2] for link in page.links if link.startswith("/console/requests/r-")]
        following = [attributes["href"] for tag, attributes in page.tags if attributes.get("rel") == "next"]
        if not following:
            break
        (path,) = following
    assert len(seen) == len(set(seen)) == 75


def test_a_request_is_shown_with_everything_that_is_signed(bench: Asking, anna: Browser) -> None:
    shown = bench.request(critical_options=(("force-command", "/usr/bin/uptime"),))
    page = page_of(anna, shown)
    for text in (
        "runs only `/usr/bin/uptime` on every host that accepts principal llmops",
        REASON,
        "192.0.2.7",
        'Key ID: "agent-7:prod"',
        "Valid: 10m from when it is claimed",
        "1 request of agent-7 in 24 hours",
        "anna, ben, carl",
        request_digest(shown["frozen"]),
        shown["frozen"]["nonce"],
        shown["frozen"]["policy"],
        f"signer requests approve {shown['request']}",
    ):
        assert text in page.shown, text
    assert len(page.text.encode()) < 50_000


def test_what_differs_from_the_last_certificate_is_shown_as_far_as_the_reader_may_see_it(
    bench: Asking, app: Flask, anna: Browser
) -> None:
    shown = bench.request()
    assert "Compared with nothing" in page_of(anna, shown).shown
    bench.approve(shown)
    bench.request()  # is issued
    again = bench.request(principals=("backup",), ttl=300)
    for who, last in (
        ("anna", f"request {shown['request']} of agent-7"),
        ("auditor", "the last certificate of agent-7, serial 1"),
    ):
        page = page_of(signed_in(app, who), again)
        assert f"Compared with {last}" in page.shown
        assert "principals backup llmops" in page.shown
        assert "ttl 5m 10m" in page.shown


def test_a_request_that_another_may_see_is_not_there(bench: Asking, app: Flask) -> None:
    shown = bench.request("agent-7")
    page = signed_in(app, "dora").get(f"/console/requests/{shown['request']}")
    assert (page.status, "unknown_request" in page.shown) == (404, True)
    assert signed_in(app, "anna").get("/console/requests/r-doesnotxst").status == 404


def test_script_in_a_reason_an_identity_and_a_principal_stays_text(bench: Asking, key: SoftPasskey) -> None:
    """Names cannot have it by policy.toml; the console does not rely on that."""
    shown = bench.request(reason=SCRIPT)
    record = details(
        bench.core._state.approvals.get(shown["request"]),  # type: ignore[arg-type, union-attr]
        bench.core._state.approvals,  # type: ignore[union-attr]
        bench.core._situation(bench.core._state, bench.now),  # type: ignore[arg-type]
        bench.policy.identities["anna"],
    )
    frozen = record.frozen.model_copy(
        update={
            "identity": SCRIPT,
            "role": SCRIPT,
            "principals": [SCRIPT],
            "key_id": SCRIPT,
            "critical_options": {"force-command": SCRIPT},
            "address": SCRIPT,
        }
    )
    hostile = record.model_copy(
        update={
            "frozen": frozen,
            "digest": request_digest(json.loads(frozen.as_json())),
            "may_approve": ["anna", SCRIPT],
        }
    )
    app = console_app(bench, {"request": RequestDetails.model_validate_json(hostile.as_json())})
    page = signed_in(app, "anna").get(f"/console/requests/{shown['request']}")
    assert page.status == 200
    assert SCRIPT in page.shown.replace("&amp;", "&amp;")
    assert "<script>alert" not in page.text
    assert [attributes["src"] for tag, attributes in page.tags if tag == "script"] == ["/console/static/console.js"]
    assert "49" not in page.text.replace(frozen.nonce, "").replace(hostile.digest, "").replace(frozen.policy, "")[:400]


def test_a_page_whose_digest_is_not_that_of_its_fields_is_not_shown(bench: Asking) -> None:
    shown = bench.request()
    reply = RequestDetails.model_validate_json(json.dumps(shown))
    for changes in (
        {"digest": "sha256:" + "0" * 64},
        {"frozen": reply.frozen.model_copy(update={"principals": ["root"]})},
    ):
        app = console_app(bench, {"request": reply.model_copy(update=changes)})
        page = signed_in(app, "anna").get(f"/console/requests/{shown['request']}")
        assert page.status == 500
        assert "do not approve" in page.shown


def test_who_was_told_and_how_is_shown_where_notices_are_configured(bench: Asking, anna: Browser) -> None:
    shown = bench.request()
    assert "Told" not in page_of(anna, shown).shown
    rows: list[dict[str, Any]] = [
        {"channel": "night", "kind": "ntfy", "people": ["anna", "ben"], "state": "sent", "error": None},
        {"channel": "chat", "kind": "slack", "people": [], "state": "failed", "error": f"HTTP 500 {SCRIPT}"},
    ]
    more = {"of": "approval.requested", "at": "2027-01-15T08:00:00Z"}
    reply = RequestDetails.model_validate_json(json.dumps({**shown, "told": [{**row, **more} for row in rows]}))
    page = page_of(signed_in(console_app(bench, {"request": reply}), "anna"), shown)
    assert "night (ntfy), read by anna, ben: approval.requested sent 2027-01-15 08:00:00 UTC" in page.shown
    assert "chat (slack): approval.requested failed 2027-01-15 08:00:00 UTC" in page.shown
    assert f"HTTP 500 {SCRIPT}" in page.shown
    assert SCRIPT not in page.text


# --- decisions -------------------------------------------------------------------------------------------------------


def test_only_what_a_human_may_do_is_offered(bench: Asking, app: Flask) -> None:
    shown = bench.request("agent-7")
    assert actions(page_of(signed_in(app, "anna"), shown)) == {"approve", "deny"}
    assert actions(page_of(signed_in(app, "ben"), shown)) == {"deny"}  # has no passkey, and gets the command
    assert actions(page_of(signed_in(app, "auditor"), shown)) == set()
    own = bench.request("anna", "pair")
    assert actions(page_of(signed_in(app, "anna"), own)) == {"withdraw"}


def test_anna_denies_and_the_agent_reads_why(bench: Asking, anna: Browser) -> None:
    shown = bench.request()
    page = anna.submit(page_of(anna, shown), f"/console/requests/{shown['request']}/deny", reason=SCRIPT)
    assert "Denied by anna" in page.shown
    assert actions(page) == set()
    assert bench.show(shown["request"])["denied"] == {"by": "anna", "why": SCRIPT}
    assert bench.store.bodies("approval.denied")[0]["reason"] == SCRIPT


def test_an_asker_withdraws(bench: Asking, app: Flask) -> None:
    shown = bench.request("dora", "pair")
    dora = signed_in(app, "dora")
    page = dora.submit(page_of(dora, shown), f"/console/requests/{shown['request']}/withdraw")
    assert "withdrawn" in page.shown
    assert bench.show(shown["request"])["state"] == "withdrawn"


def approve(browser: Browser, shown: Any, fields: dict[str, str], **more: str) -> Page:
    page = page_of(browser, shown)
    csrf = page.form("/console/sign-out").fields["csrf"]
    return browser.post(f"/console/requests/{shown['request']}/approve", {"csrf": csrf, **fields, **more})


def test_anna_approves_by_the_passkey_that_the_page_asks_for(bench: Asking, anna: Browser, key: SoftPasskey) -> None:
    shown = bench.request()
    page = page_of(anna, shown)
    (form,) = [attributes for tag, attributes in page.tags if tag == "form" and "data-passkey" in attributes]
    assert form["data-keys"] == f"{key.rp} {key.line.id}"
    assert form["data-statement"].encode() == approval_statement(
        shown["request"], request_digest(shown["frozen"]), "anna", None
    )
    after = approve(anna, shown, assertion_of(page, key))
    assert (after.status, "Approved by anna" in after.shown) == (200, True)
    assert bench.request()["principals"] == ["llmops"]  # the certificate
    assert bench.issued()[0]["approved_by"] == ["anna"]


def test_anna_approves_and_waives_exactly_what_she_signed(bench: Asking, anna: Browser, key: SoftPasskey) -> None:
    shown = bench.request()
    page = page_of(anna, shown)
    untils = [attributes["value"] for tag, attributes in page.tags if tag == "option" and "Z" in attributes["value"]]
    assert [parse_timestamp(until) > 0 for until in untils] == [True] * 4
    until = _in(bench, 3600)
    waiver = {"until": until, "uses": 3}
    fields = assertion_of(page, key, waiver)
    other = approve(anna, shown, fields, until=_in(bench, 7200), uses="3")
    assert (other.status, "assertion_for_another_statement" in other.shown) == (403, True)
    assert approve(anna, shown, fields, until=until, uses="x").status == 400
    after = approve(anna, shown, fields, until=until, uses="3")
    assert "also a waiver until" in after.shown
    assert bench.waivers()[0]["uses"] == 3


def _in(bench: Asking, seconds: int) -> str:
    return timestamp(int(bench.now) + seconds)


def test_no_waiver_is_offered_where_the_role_has_none(bench: Asking, anna: Browser) -> None:
    assert "A waiver:" in page_of(anna, bench.request()).shown
    assert "A waiver:" not in page_of(anna, bench.request(role="strict")).shown


def test_a_human_who_asks_gives_their_presence_by_passkey(bench: Asking, app: Flask) -> None:
    shown = bench.request("dora", "touch")
    dora = signed_in(app, "dora")
    page = page_of(dora, shown)
    assert "Confirm that it is you" in page.shown
    after = approve(dora, shown, assertion_of(page, SoftPasskey("dora")))
    assert bench.show(shown["request"])["state"] == "approved", after.shown


# --- attackers -------------------------------------------------------------------------------------------------------


def test_a_stolen_cookie_approves_nothing(bench: Asking, app: Flask, anna: Browser, key: SoftPasskey) -> None:
    """With the cookie a thief reads and denies; without the passkey nothing that they send is an approval."""
    shown, other = bench.request("agent-7"), bench.request("agent-8")
    thief = Browser(app)
    thief.client.set_cookie("signer_console", anna.cookie() or "", path="/console", domain="localhost")
    page = page_of(thief, shown)
    own = SoftPasskey("thief")
    statement = approval_statement(shown["request"], request_digest(shown["frozen"]), "anna", None)
    attempts = {
        "by another passkey": assertion_of(page, own),
        "by another passkey, with anna's id": {**assertion_of(page, own), "id": key.line.id},
        "for another request": assertion_of(page_of(thief, other), key),
        "on another page": body_of(key.approve(statement, origin="https://evil.example"))["assertion"],
        "in a frame": body_of(key.approve(statement, crossOrigin=True))["assertion"],
        "nothing": dict.fromkeys(("id", "authenticator_data", "client_data", "signature"), ""),
        "as an SSH signature": {"signature": bench.signature(shown)},
    }
    for name, fields in attempts.items():
        answer = approve(thief, shown, fields)
        assert answer.status in (400, 403), name
        assert bench.show(shown["request"])["state"] == "pending", name
    key.flags = 0x01  # without user verification
    assert approve(thief, shown, body_of(key.approve(statement))["assertion"]).status == 403
    assert bench.issued() == []


def test_an_assertion_approves_once_and_not_with_a_key_that_is_gone(
    bench: Asking, anna: Browser, key: SoftPasskey
) -> None:
    shown = bench.request()
    fields = assertion_of(page_of(anna, shown), key)
    bench.use(change_identity(bench.policy, "anna", approval_keys=(approval_key("anna"),)))
    answer = approve(anna, shown, fields)
    assert (answer.status, bench.show(shown["request"])["state"]) == (403, "pending")
    bench.use(change_identity(bench.policy, "anna", approval_keys=(approval_key("anna"), key.line)))
    assert approve(anna, shown, fields).status == 200
    assert approve(anna, shown, fields).status in (403, 409)
    assert len(bench.store.bodies("approval.given")) == 1


@pytest.mark.parametrize("action", ["deny", "withdraw", "approve"])
def test_no_decision_by_a_link_or_by_a_form_of_another_page(
    bench: Asking, anna: Browser, key: SoftPasskey, action: str
) -> None:
    shown = bench.request()
    path = f"/console/requests/{shown['request']}/{action}"
    fields = assertion_of(page_of(anna, shown), key)
    csrf = page_of(anna, shown).form("/console/sign-out").fields["csrf"]
    before = bench.store.kinds()
    assert anna.get(path).status == 405
    query = "&".join(f"{name}={value}" for name, value in {**fields, "csrf": csrf}.items())
    assert anna.get(f"{path}?{query}").status == 405
    assert anna.post(path, fields).status == 403
    assert anna.post(path, {**fields, "csrf": csrf}, Origin="https://evil.example").status == 403
    assert anna.post(path + f"?csrf={csrf}", fields).status == 403
    assert bench.store.kinds() == before
    assert bench.show(shown["request"])["state"] == "pending"


def test_a_session_of_an_asker_does_not_decide_their_own_request(bench: Asking, app: Flask) -> None:
    shown = bench.request("anna", "pair")
    anna = signed_in(app, "anna")
    csrf = page_of(anna, shown).form("/console/sign-out").fields["csrf"]
    answer = anna.post(f"/console/requests/{shown['request']}/deny", {"csrf": csrf, "reason": ""})
    assert (answer.status, "own_request" in answer.shown) == (403, True)


def test_the_token_goes_to_the_keeper_once_and_then_only_the_session(bench: Asking, app: Flask) -> None:
    client = CoreClient(bench)
    browser = Browser(make_flask(client, load_settings({})))
    browser.sign_in("anna")
    page_of(browser, bench.request())
    assert [header["op"] for header, _ in client.asked if header["token"] == token("anna")] == ["sign_in"]
    assert {header["token"] for header, _ in client.asked} == {token("anna"), browser.cookie()}


# --- parts that stay up to date --------------------------------------------------------------------------------------


def test_a_live_part_says_what_it_is_and_is_the_same_until_something_changes(bench: Asking, anna: Browser) -> None:
    page = anna.get("/console/requests")
    (seen,) = [attributes["data-seen"] for tag, attributes in page.tags if "data-live" in attributes]
    part = anna.get("/console/requests?fragment=1&wait=5&seen=" + seen)
    assert part.headers["ETag"] == f'"{seen}"'
    assert "<html" not in part.text
    assert part.text in page.text
    bench.request()
    assert anna.get("/console/requests?fragment=1").headers["ETag"] != f'"{seen}"'


def test_a_live_part_asks_the_keeper_for_nothing_that_it_does_not_show(
    bench: Asking, anna: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, asked, ask = bench.request()["request"], [], CoreClient.ask

    def noted(client: CoreClient, header: dict[str, Any], body: bytes = b"") -> Any:
        asked.append(header["op"])
        return ask(client, header, body)

    monkeypatch.setattr(CoreClient, "ask", noted)
    assert anna.get(f"/console/requests/{name}?fragment=1").status == 200
    assert asked == ["whoami", "request"]
    assert anna.get(f"/console/requests/{name}").status == 200
    assert len(asked) > 4, "the page has what differs from the last certificate"


def test_a_page_that_asks_by_itself_does_not_keep_the_session_alive(bench: Asking, anna: Browser) -> None:
    for _ in range(14):
        bench.now += 60
        assert anna.get("/console/requests?fragment=1").status == 200
    bench.now += 60
    assert anna.get("/console/requests?fragment=1").status == 401
    assert "Your token" in anna.get("/console/requests").shown


def test_links_to_more_do_not_ask_for_a_part(bench: Asking, anna: Browser) -> None:
    for number in range(20):
        for who in ("agent-7", "agent-8", "ci", "dora"):
            bench.request(who, "pair" if who == "dora" else "prod", ttl=300 + number)
    part = anna.get("/console/requests?state=all&fragment=1&wait=1&seen=0123456789abcdef")
    (link,) = [attributes["href"] for tag, attributes in part.tags if attributes.get("rel") == "next"]
    assert re.fullmatch(r"/console/requests\?state=all&before=r-[a-z2-7]{10}", link)


def test_a_page_is_made_in_far_less_than_it_may_cost(bench: Asking, anna: Browser) -> None:
    """The number of questions to the keeper does not grow with the list."""
    shown = bench.request()
    client = anna.app.extensions["console"].keeper
    client.asked.clear()
    anna.get("/console/requests")
    assert [header["op"] for header, _ in client.asked] == ["whoami", "requests"]
    client.asked.clear()
    page_of(anna, shown)
    assert [header["op"] for header, _ in client.asked] == ["whoami", "request", "requests"]


def test_the_key_of_a_passkey_for_another_site_is_named_as_such(bench: Asking, app: Flask) -> None:
    other = replace(SoftPasskey("anna").line, rp="other.example", origins=("https://other.example",))
    bench.use(change_identity(bench.policy, "anna", approval_keys=(other,)))
    page = page_of(signed_in(app, "anna"), bench.request())
    assert [attributes["data-keys"] for _, attributes in page.tags if "data-keys" in attributes] == [
        f"other.example {other.id}"
    ]
