"""The console's session in the browser: sign-in and sign-out, the cookie, forms, headers, and who attacks them."""

from __future__ import annotations

import re

import pytest
from flask import Flask

from signer.api.console.session import HEADERS, csrf_token, show_time
from signer.api.request import read_session, read_token
from signer.authority.console_sessions import IDLE, LONGEST, SIGN_INS
from tests.parts.builders import NOW, Bench, token
from tests.parts.console import Browser, CoreClient, Page, console_app

CREDENTIAL = "console_" + 43 * "x"


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def app(bench: Bench) -> Flask:
    return console_app(bench)


@pytest.fixture
def browser(app: Flask) -> Browser:
    return Browser(app)


def is_sign_in(page: Page) -> bool:
    return any(form.action == "/console/sign-in" for form in page.forms)


# --- sign-in and sign-out --------------------------------------------------------------------------------------------


def test_a_human_signs_in_looks_and_signs_out(bench: Bench, browser: Browser) -> None:
    assert is_sign_in(browser.get("/console/session"))
    page = browser.sign_in()
    assert page.status == 200
    assert "operator" in page.shown
    page = browser.get("/console/session")
    assert "approve, freeze, ledger.read" in page.shown
    left = browser.submit(page, "/console/sign-out")
    assert is_sign_in(left)
    assert browser.cookie() is None
    assert is_sign_in(browser.get("/console/session"))
    assert bench.store.kinds() == ["keeper.started", "console.signed_in", "console.signed_out"]


def test_the_cookie_is_the_credential_and_no_script_and_no_other_site_gets_it(app: Flask) -> None:
    answer = app.test_client().post(
        "/console/sign-in", data={"token": token("operator")}, headers={"Origin": "http://localhost"}
    )
    assert answer.status_code == 303
    value, *flags = answer.headers["Set-Cookie"].split("; ")
    assert value.startswith("signer_console=console_")
    assert len(value) == len("signer_console=console_") + 43
    assert set(flags) == {"HttpOnly", "Path=/console", "SameSite=Strict"}
    assert token("operator") not in answer.text + str(answer.headers)


def test_by_tls_only_tls_can_set_the_cookie(bench: Bench) -> None:
    browser = Browser(console_app(bench), "https://signer.example.org")
    answer = browser.client.post(
        "/console/sign-in",
        data={"token": token("operator")},
        headers={"Origin": "https://signer.example.org", "Host": "signer.example.org"},
    )
    name, *flags = answer.headers["Set-Cookie"].split("; ")
    assert name.startswith("__Host-signer_console=console_")
    assert set(flags) == {"HttpOnly", "Path=/", "SameSite=Strict", "Secure"}


def test_where_signer_serves_tls_a_cookie_of_plain_http_counts_for_nothing() -> None:
    plain = {"HTTP_COOKIE": f"signer_console={CREDENTIAL}"}
    assert read_session(plain) == CREDENTIAL
    assert read_session(plain, only_secure=True) is None
    both = {"HTTP_COOKIE": f"signer_console=console_other; __Host-signer_console={CREDENTIAL}"}
    assert read_session(both) == read_session(both, only_secure=True) == CREDENTIAL


@pytest.mark.parametrize(
    "field",
    [
        f"signer_console={CREDENTIAL}; signer_console={CREDENTIAL}",
        f"signer_console={CREDENTIAL}; signer_console=console_of_another_site",
        f"signer_console={CREDENTIAL},signer_console={CREDENTIAL}",
        "signer_console=sgn_0123456789",
        "signer_console=",
        f"signer_console=console_{'x' * 300}",
        f"other={'x' * 5000}; signer_console={CREDENTIAL}",
        "signer_console=console_é",
        "",
    ],
)
def test_a_cookie_that_is_not_one_session_is_none(field: str) -> None:
    assert read_session({"HTTP_COOKIE": field}) in (None, "?", f"{CREDENTIAL},signer_console={CREDENTIAL}")
    assert read_session({"HTTP_COOKIE": field}) != CREDENTIAL


def test_the_token_of_an_agent_and_a_wrong_one_open_nothing(bench: Bench, browser: Browser) -> None:
    for given, status, text in (
        (token("deploy-agent"), 403, "the console is for humans"),
        (token("nobody"), 401, "the token is unknown"),
        ("sgn_short", 401, "malformed"),
        ("", 401, "no token"),
        ("x" * 5000, 401, "unknown"),
    ):
        page = browser.submit(browser.get("/console/sign-in"), "/console/sign-in", token=given)
        assert (page.status, text in page.shown) == (status, True), page.shown
        assert browser.cookie() is None
        assert given == "" or given not in page.text


def test_sign_ins_by_the_dozen_are_refused_with_the_time_to_wait(browser: Browser) -> None:
    for _ in range(SIGN_INS):
        browser.client.delete_cookie("signer_console", path="/console")
        assert browser.sign_in().status == 200
    browser.client.delete_cookie("signer_console", path="/console")
    page = browser.sign_in()
    assert (page.status, page.headers["Retry-After"]) == (429, "60")


@pytest.mark.parametrize("target", ["/console/session", "/console/session?before=12&kind=a%20b"])
def test_a_human_who_signs_in_goes_on_to_the_page_that_was_asked_for(browser: Browser, target: str) -> None:
    page = browser.get(target)
    form = page.form("/console/sign-in")
    assert form.fields["next"] == target
    assert "Ends at the latest" in browser.submit(page, "/console/sign-in", token=token("operator")).shown


@pytest.mark.parametrize(
    "target",
    [
        "https://evil.example", "//evil.example", "/\\evil.example", "/console/../api", "/console//evil.example",
        "/api/requests", "javascript:alert(1)", "/console\r\nSet-Cookie: a=b", "/console?next=//x#y", "/consoles",
        "/console/session\n", "/console/\u2028x",
    ],
)  # fmt: skip
def test_a_sign_in_leads_nowhere_but_to_the_console(app: Flask, target: str) -> None:
    answer = app.test_client().post(
        "/console/sign-in", data={"token": token("operator"), "next": target}, headers={"Origin": "http://localhost"}
    )
    assert (answer.status_code, answer.headers["Location"]) == (303, "/console")
    page = app.test_client().get("/console/sign-in", query_string={"next": target})
    assert "evil" not in page.text


def test_a_link_on_another_site_opens_the_page_by_one_of_ours(browser: Browser) -> None:
    """Without the hop `SameSite=Strict` would show the sign-in page to a human who has a session."""
    browser.sign_in()
    credential = browser.cookie() or ""
    browser.client.delete_cookie("signer_console", path="/console")
    page = browser.get("/console/session?a=1", Sec_Fetch_Site="cross-site")
    assert ("meta", {"http-equiv": "refresh", "content": "0; url=/console/session?a=1"}) in page.tags
    browser.client.set_cookie("signer_console", credential, path="/console", domain="localhost")
    assert "Ends at the latest" in browser.get("/console/session?a=1", Sec_Fetch_Site="same-origin").shown


# --- a stolen cookie -------------------------------------------------------------------------------------------------


def thief_sees(app: Flask, credential: str) -> str:
    thief = Browser(app)
    thief.client.set_cookie("signer_console", credential, path="/console", domain="localhost")
    return "sign-in" if is_sign_in(thief.get("/console/session")) else "pages"


def test_a_stolen_cookie_is_worth_nothing_after_sign_out_restart_and_its_time(bench: Bench, app: Flask) -> None:
    browser = Browser(app)
    browser.sign_in()
    stolen = browser.cookie() or ""
    assert thief_sees(app, stolen) == "pages"
    browser.submit(browser.get("/console/session"), "/console/sign-out")
    assert thief_sees(app, stolen) == "sign-in"

    browser.sign_in()
    stolen = browser.cookie() or ""
    bench.now += IDLE
    assert thief_sees(app, stolen) == "sign-in"
    assert is_sign_in(browser.get("/console/session"))

    browser.sign_in()
    stolen = browser.cookie() or ""
    for _ in range(LONGEST // 800 - 1):
        bench.now += 800
        assert thief_sees(app, stolen) == "pages"
    bench.now += 800
    assert thief_sees(app, stolen) == "sign-in"

    browser.sign_in()
    stolen = browser.cookie() or ""
    bench.core = bench.restart()
    assert thief_sees(app, stolen) == "sign-in"


@pytest.mark.parametrize("header", ["X-Vault-Token", "Authorization", "Cookie"])
@pytest.mark.parametrize(
    "path",
    ["/api/whoami", "/api/certificates", "/api/requests", "/api/freezes", "/v1/auth/token/lookup-self"],
)
def test_a_credential_of_the_console_opens_no_other_route(app: Flask, header: str, path: str) -> None:
    browser = Browser(app)
    browser.sign_in()
    credential = browser.cookie() or ""
    values = {
        "X-Vault-Token": credential,
        "Authorization": f"Bearer {credential}",
        "Cookie": f"signer_console={credential}",
    }
    answer = app.test_client().get(path, headers={header: values[header]})
    assert answer.status_code in (401, 403)
    assert read_token({"HTTP_X_VAULT_TOKEN": credential}) == "?"


def test_a_token_in_a_header_opens_no_page(app: Flask) -> None:
    for header in ("X-Vault-Token", "Authorization"):
        value = token("operator") if header == "X-Vault-Token" else f"Bearer {token('operator')}"
        assert app.test_client().get("/console/session", headers={header: value}).status_code == 303


# --- forms of other pages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://localhost.evil.example"},
        {"Origin": "http://localhost:8000"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "same-origin, cross-site"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "multipart/form-data; boundary=x"},
    ],
)
@pytest.mark.parametrize("target", ["/console/sign-in", "/console/sign-out"])
def test_a_form_that_another_page_sends_changes_nothing(
    bench: Bench, browser: Browser, headers: dict[str, str], target: str
) -> None:
    page = browser.sign_in()
    before = bench.store.kinds()
    fields = {"token": token("operator"), **page.form("/console/sign-out").fields}
    answer = browser.post(target, fields, **headers)
    assert (answer.status, "form_refused" in answer.shown) == (403, True)
    assert bench.store.kinds() == before
    assert browser.get("/console/session").status == 200


@pytest.mark.parametrize(
    "fields",
    [{}, {"csrf": ""}, {"csrf": "0" * 64}, {"csrf": csrf_token(CREDENTIAL)}, {"csrf": "\u00e9"}],
)
def test_a_form_without_the_secret_of_the_session_changes_nothing(
    bench: Bench, browser: Browser, fields: dict[str, str]
) -> None:
    browser.sign_in()
    before = bench.store.kinds()
    assert browser.post("/console/sign-out", fields).status == 403
    assert bench.store.kinds() == before


def test_the_secret_of_a_form_is_not_the_credential_and_not_that_of_another_session(browser: Browser) -> None:
    page = browser.sign_in()
    credential = browser.cookie() or ""
    secret = page.form("/console/sign-out").fields["csrf"]
    assert secret == csrf_token(credential)
    assert credential not in page.text
    assert secret != csrf_token(CREDENTIAL)


def routes(app: Flask, method: str) -> list[str]:
    """The paths of the console that take a method, each with a name in the place of its parameters."""
    found = [rule for rule in app.url_map.iter_rules() if str(rule).startswith("/console")]
    return [re.sub(r"<[^>]+>", "1", str(rule)) for rule in found if method in (rule.methods or ())]


def test_no_page_changes_anything_when_it_is_only_looked_at(bench: Bench, app: Flask) -> None:
    """Every GET route, with and without a session: mail scanners and chat servers open links."""
    paths = routes(app, "GET") + routes(app, "POST")
    assert len(paths) >= 15
    browser = Browser(app)
    browser.sign_in()
    before = bench.store.kinds()
    for path in paths:
        for who in (browser, Browser(app)):
            for method in ("GET", "HEAD", "OPTIONS"):
                who.client.open(path, method=method)
    assert bench.store.kinds() == before
    assert browser.get("/console/session").status == 200


def test_every_form_needs_the_secret_of_the_session_and_a_page_of_ours(bench: Bench, app: Flask) -> None:
    browser = Browser(app)
    secret = browser.sign_in().form("/console/sign-out").fields["csrf"]
    before = bench.store.kinds()
    paths = [path for path in routes(app, "POST") if path != "/console/sign-in"]
    assert len(paths) >= 6
    for path in paths:
        assert browser.post(path, {}).status == 403, path
        assert browser.post(path, {"csrf": "0" * 64}).status == 403, path
        for headers in ({"Origin": "https://evil.example"}, {"Origin": ""}, {"Sec-Fetch-Site": "same-site"}):
            assert browser.post(path, {"csrf": secret}, **headers).status == 403, path
        assert is_sign_in(Browser(app).post(path, {"csrf": secret})), path
    assert bench.store.kinds() == before


# --- headers and errors ----------------------------------------------------------------------------------------------


def test_every_answer_forbids_frames_scripts_of_others_and_caches(app: Flask) -> None:
    signed = Browser(app)
    signed.sign_in()
    for rule in app.url_map.iter_rules():
        path = str(rule)
        if not path.startswith("/console"):
            continue
        for who in (signed, Browser(app)):
            for method in sorted((rule.methods or set()) | {"DELETE"}):
                answer = who.client.open(path.replace("<name>", "console.css"), method=method)
                for name, value in HEADERS:
                    assert answer.headers.getlist(name) == [value], (method, path)
    answer = app.test_client().get("/console/nothing")
    assert answer.status_code == 404
    assert dict(HEADERS).items() <= dict(answer.headers).items()
    assert "there is no such page" in answer.text


def test_the_policy_of_pages_allows_nothing_inline(browser: Browser) -> None:
    policy = dict(HEADERS)["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'")
    for page in (browser.get("/console/sign-in"), browser.sign_in(), browser.get("/console/session")):
        for tag, attributes in page.tags:
            assert tag != "style"
            assert "style" not in attributes
            assert not [name for name in attributes if name.startswith("on")]
            if tag == "script":
                assert attributes["src"].startswith("/console/static/")


def test_an_error_of_the_keeper_is_a_page(bench: Bench, browser: Browser) -> None:
    browser.sign_in()
    bench.store.fail = "read"
    page = browser.submit(browser.get("/console/session"), "/console/sign-out")
    assert (page.status, "ledger_unavailable" in page.shown) == (503, True)
    assert page.headers["Retry-After"] == "1"


def test_a_sign_in_that_the_keeper_cannot_answer_says_when_to_try_again(bench: Bench, browser: Browser) -> None:
    bench.store.fail = "read"
    page = browser.sign_in()
    assert (page.status, page.headers["Retry-After"]) == (503, "1")


def test_an_internal_error_reveals_nothing(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = Browser(app)
    browser.sign_in()

    def fail(*_: object) -> None:
        raise RuntimeError("sgn_secret")

    monkeypatch.setattr(CoreClient, "ask", fail)
    page = browser.get("/console/session")
    assert (page.status, "internal_error" in page.shown) == (500, True)
    assert "sgn_secret" not in page.text


def test_files_have_their_type_and_others_are_not_there(browser: Browser) -> None:
    assert browser.get("/console/static/console.css").headers["Content-Type"] == "text/css; charset=utf-8"
    assert browser.get("/console/static/console.js").headers["Content-Type"] == "text/javascript; charset=utf-8"
    for name in ("../session.py", "base.html", "%2e%2e/session.py", "console.css/"):
        assert browser.get(f"/console/static/{name}").status == 404


def test_a_time_is_shown_alike_from_all_its_forms() -> None:
    for at in ("2027-01-15T08:00:00Z", NOW, NOW * 1000, float(NOW)):
        assert show_time(at) == "2027-01-15 08:00:00 UTC"
