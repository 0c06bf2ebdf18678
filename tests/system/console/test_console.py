"""The console in a real browser: what humans see, and what becomes of it at the service and at a real sshd."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.browser import Browser, Scheme, Visit
from tests.parts.console_world import ConsoleWorld, console_world
from tests.parts.keys import KeyRing
from tests.parts.passkeys import ALGORITHMS, SoftPasskey, unb64url

pytestmark = [missing.needs_chromium, missing.needs_sshd]

# Makes the browser ask for one algorithm alone, as an authenticator that has no other would.
ONLY = """
const create = navigator.credentials.create.bind(navigator.credentials);
navigator.credentials.create = (options) => {
  options.publicKey.pubKeyCredParams = options.publicKey.pubKeyCredParams.filter(({ alg }) => alg === ALGORITHM);
  return create(options);
};
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, keyring: KeyRing) -> Iterator[ConsoleWorld]:
    with console_world(tmp_path_factory.mktemp("console"), keyring) as running:
        yield running


def paths(visit: Visit) -> list[str]:
    """The pages that the navigation links to."""
    return list(
        visit.page.eval_on_selector_all("header nav a", "links => links.map(link => link.getAttribute('href'))")
    )


def is_signed_in(visit: Visit) -> bool:
    return visit.page.get_by_role("button", name="Sign out").count() > 0


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_request_arrives_live_a_passkey_approves_it_and_the_agent_that_waits_logs_in(
    browser: Browser, world: ConsoleWorld
) -> None:
    reason = "restart the queue, ticket 812"
    with browser.visit(world.origin) as visit:
        world.sign_in(visit)
        visit.authenticator().add(world.passkey)
        visit.go("/console/requests")
        visit.page.evaluate("window.isTheSamePage = true")
        agent = world.start_agent(reason, "echo in")
        row = visit.page.get_by_role("row").filter(has_text=reason)
        row.wait_for()
        assert visit.page.evaluate("window.isTheSamePage"), "it arrives without a reload"
        row.get_by_role("link").click()
        lead = visit.page.locator(".lead")
        lead.filter(has_text="deploy-agent").wait_for()
        assert "opens every host that accepts principal llmops, for any command" in lead.inner_text()
        clicked = time.monotonic()
        world.approve(visit)
        shown = time.monotonic()
        out, err = agent.communicate(timeout=60)
        print(
            f"from the click: {shown - clicked:.3f} s to the page, {time.monotonic() - clicked:.3f} s to a login's end"
        )
        assert (agent.returncode, out) == (0, "in\n"), err
        visit.page.locator("[data-state=issued]").wait_for()
        visit.check_accessible()
    request = world.request(reason)
    assert [given["by"] for given in request["approvals"]] == ["anna"]
    assert request["approvals"][0]["key"] == world.passkey.fingerprint


def test_keys_alone_lead_from_sign_in_to_a_denial_that_ends_the_agent(browser: Browser, world: ConsoleWorld) -> None:
    reason = "drop the database"
    agent = world.start_agent(reason, "true")
    name = str(world.request(reason)["request"])
    with browser.visit(world.origin) as visit:
        keyboard = visit.page.keyboard

        def tab_to(selector: str) -> None:
            for _ in range(80):
                keyboard.press("Tab")
                if visit.page.evaluate("selector => document.activeElement.matches(selector)", selector):
                    return
            raise AssertionError(f"{selector} cannot be reached by Tab on {visit.page.url}")

        visit.go("/console/sign-in")
        tab_to("#token")
        keyboard.type(world.service.tokens["anna"])
        keyboard.press("Enter")
        visit.page.wait_for_url("**/console")
        for selector, place in ((".skip", "**#main"), ("nav a[href='/console/requests']", "**/console/requests"),
                                (f"a[href='/console/requests/{name}']", f"**/{name}")):  # fmt: skip
            if selector == "nav a[href='/console/requests']":
                visit.page.reload()  # the skip link has led past the navigation
            tab_to(selector)
            keyboard.press("Enter")
            visit.page.wait_for_url(place)
        tab_to("#reason")
        keyboard.type("never on a Friday")
        keyboard.press("Tab")
        keyboard.press("Enter")
        visit.page.locator("[data-state=denied]").wait_for()
    _, err = agent.communicate(timeout=60)
    assert agent.returncode == 77
    assert "anna denied request" in err
    assert "never on a Friday" in err


def test_without_script_all_pages_read_and_a_denial_works(browser: Browser, world: ConsoleWorld) -> None:
    name = world.ask("read without script")
    with browser.visit(world.origin, script=False) as visit:
        world.sign_in(visit)
        for path in paths(visit):
            assert visit.go(path) == 200, path
            assert visit.page.get_by_role("heading", level=1).count() == 1
        visit.go("/console/requests")
        visit.page.get_by_role("link", name=name).click()
        assert "switched off in this browser" in visit.page.locator("main").inner_text()
        assert visit.page.get_by_role("button", name="Approve with a passkey").count() == 0
        visit.page.get_by_label("Reason, which deploy-agent reads").fill("not now")
        visit.page.get_by_role("button", name="Deny").click()
        visit.page.locator("[data-state=denied]").wait_for()
    assert world.request("read without script")["denied"] == {"by": "anna", "why": "not now"}


def test_a_waiver_that_is_signed_with_the_approval_covers_the_next_certificate(
    browser: Browser, world: ConsoleWorld
) -> None:
    command = {"critical_options": {"force-command": "systemctl restart queue"}}
    name = world.ask("restart twice", critical_options=command["critical_options"])
    with browser.visit(world.origin) as visit:
        world.sign_in(visit)
        visit.authenticator().add(world.passkey)
        visit.go(f"/console/requests/{name}")
        assert "systemctl restart queue" in visit.page.locator(".lead").inner_text()
        visit.page.get_by_label("For", exact=True).select_option(index=2)
        visit.page.get_by_label("At most so many certificates").fill("3")
        world.approve(visit)
        assert "also a waiver until" in visit.page.locator("main").inner_text()
    key = {"public_key": world.user.public_line}
    world.send(f"/api/requests/{name}/claim", key, identity="deploy-agent", status=201)
    body = {**key, **command, "reason": "again"}
    world.send("/api/sign/production", body, identity="deploy-agent", status=201)
    (waiver,) = world.service.ask("GET", "/api/waivers", identity="anna").json()["waivers"]
    assert (waiver["request"], waiver["uses"], waiver["used"], waiver["by"]) == (name, 3, 1, ["anna"])


@pytest.mark.parametrize("case", ["another passkey", "another user"])
def test_a_passkey_that_does_not_count_approves_nothing(browser: Browser, world: ConsoleWorld, case: str) -> None:
    name = world.ask(f"by {case}")
    with browser.visit(world.origin) as visit:
        world.sign_in(visit)
        authenticator = visit.authenticator()
        if case == "another passkey":
            authenticator.add(SoftPasskey("mallory", rp="localhost", origin=world.origin))
        else:
            authenticator.add(world.passkey)
            authenticator.verifies(False)
        visit.go(f"/console/requests/{name}")
        visit.page.get_by_role("button", name="Approve with a passkey").click()
        said = visit.page.locator("[data-passkey-error]")
        said.filter(has_text="Nothing was sent").wait_for()
    assert world.request(f"by {case}")["state"] == "pending"


def test_a_role_without_passkeys_shows_the_one_command(browser: Browser, world: ConsoleWorld) -> None:
    name = world.ask("read the kernel's log", role="root")
    with browser.visit(world.origin) as visit:
        world.sign_in(visit, "ben")
        visit.go(f"/console/requests/{name}")
        assert f"signer requests approve {name}" in visit.page.locator("main").inner_text()
        assert visit.page.locator("form[data-passkey]").count() == 0


# --- all pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, scheme", [("desktop", "light"), ("phone", "dark")])
def test_all_pages_are_accessible_and_fit(browser: Browser, world: ConsoleWorld, size: str, scheme: Scheme) -> None:
    """What an agent writes into a reason is shown as text, and no page scrolls sideways for it."""
    reason = f"<img src=x onerror=alert(1)><script>alert(2)</script>{size}" + "w" * 100
    name = world.ask(reason)
    with browser.visit(world.origin, size=size, scheme=scheme) as visit:
        visit.go("/console/sign-in")
        visit.check_accessible()
        world.sign_in(visit)
        for path in [
            *paths(visit),
            f"/console/requests/{name}",
            "/console/people/deploy-agent",
            "/console/no-such-page",
        ]:
            visit.go(path)
            visit.check_accessible()
            visit.check_narrow()
            if path.endswith(name):
                assert reason in visit.page.locator("main").inner_text()
        visit.allow("status of 404")


# --- attackers --------------------------------------------------------------------------------------------------------


def test_a_stolen_cookie_is_worth_nothing_after_sign_out(browser: Browser, world: ConsoleWorld) -> None:
    with browser.visit(world.origin) as owner, browser.visit(world.origin) as thief:
        world.sign_in(owner)
        cookies = owner.context.cookies()
        assert [(found["httpOnly"], found["sameSite"]) for found in cookies] == [(True, "Strict")]
        assert owner.page.evaluate("document.cookie") == ""
        thief.context.add_cookies([{"name": one["name"], "value": one["value"], "url": f"{world.origin}/console"}
                                   for one in cookies])  # fmt: skip
        thief.go("/console/requests")
        assert is_signed_in(thief), "while the owner is signed in, it is the session"
        owner.page.get_by_role("button", name="Sign out").first.click()
        owner.page.get_by_label("Your token").wait_for()
        thief.go("/console/requests")
        assert not is_signed_in(thief)
        assert thief.page.get_by_label("Your token").is_visible()


def test_a_page_of_another_site_neither_sends_a_form_nor_shows_a_frame(browser: Browser, world: ConsoleWorld) -> None:
    name = world.ask("denied by another site")
    evil = "http://evil.example"
    page = f"""<!doctype html><html lang="en"><title>evil</title>
        <form method="post" action="{world.origin}/console/requests/{name}/deny"><input name="reason" value="ha">
        <button>Win a prize</button></form><iframe src="{world.origin}/console/requests/{name}"></iframe>"""
    with browser.visit(world.origin) as visit:
        visit.allow(f"another origin: GET {evil}/")
        visit.allow("frame-ancestors|X-Frame-Options")
        visit.allow("status of (403|404)")
        visit.context.route(f"{evil}/**", lambda route: route.fulfill(body=page, content_type="text/html"))
        world.sign_in(visit)
        visit.page.goto(f"{evil}/")
        framed = [frame for frame in visit.page.frames if frame != visit.page.main_frame]
        assert all("deploy-agent" not in frame.content() for frame in framed)
        with visit.page.expect_response(lambda answer: answer.request.method == "POST") as sent:
            visit.page.get_by_role("button", name="Win a prize").click()
        assert sent.value.status == 403
    assert world.request("denied by another site")["state"] == "pending"


# --- enrolment --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_passkey_is_enrolled_by_the_line_that_the_command_would_write(
    browser: Browser, world: ConsoleWorld, algorithm: str, tmp_path: Path
) -> None:
    with browser.visit(world.origin) as visit:
        visit.context.add_init_script(ONLY.replace("ALGORITHM", {"ES256": "-7", "EdDSA": "-8"}[algorithm]))
        world.sign_in(visit, "ben")
        visit.go("/console/enrol")
        assert (visit.page.locator("#rp").inner_text(), visit.page.locator("#origin").inner_text()) == (
            "localhost", world.origin,
        )  # fmt: skip
        sent: list[str] = []
        visit.context.on("request", lambda request: sent.append(request.url))
        authenticator = visit.authenticator()
        visit.page.get_by_role("button", name="Make a passkey").click()
        visit.page.get_by_role("heading", name="The passkey is made").wait_for()
        assert sent == [], "the passkey stays in the browser"
        shown = {name: visit.page.locator(f"#{name}").inner_text() for name in ("enrolment", "line", "fingerprint")}
        (made,) = authenticator.credentials()
        visit.check_accessible()
    assert (made["rpId"], made["credentialId"]) == ("localhost", json.loads(shown["enrolment"])["id"])
    enrolment = tmp_path / "enrolment.json"
    enrolment.write_text(shown["enrolment"])
    done = world.service.command("approval-key", "add", "ben", "--webauthn", str(enrolment), "--json")
    said = json.loads(done.stdout)
    assert (said["policy_line"], said["fingerprint"]) == (shown["line"], shown["fingerprint"]), done.stderr
    (entry,) = tomllib.loads(shown["line"])["approval_keys"]
    assert len(unb64url(entry["public_key"])) == {"ES256": 91, "EdDSA": 44}[algorithm]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_enrolled_passkey_approves_once_its_line_is_in_policy_toml(
    browser: Browser, world: ConsoleWorld, algorithm: str, tmp_path: Path
) -> None:
    name = world.ask(f"by a new {algorithm} key")
    with browser.visit(world.origin) as visit:
        visit.context.add_init_script(ONLY.replace("ALGORITHM", {"ES256": "-7", "EdDSA": "-8"}[algorithm]))
        world.sign_in(visit, "ben")
        visit.authenticator()
        visit.go("/console/enrol")
        visit.page.get_by_role("button", name="Make a passkey").click()
        visit.page.get_by_role("heading", name="The passkey is made").wait_for()
        enrolment = tmp_path / "enrolment.json"
        enrolment.write_text(visit.page.locator("#enrolment").inner_text())
        for words in (("approval-key", "add", "ben", "--webauthn", str(enrolment), "--write"), ("reload",)):
            done = world.service.command(*words)
            assert done.returncode == 0, done.stderr
        visit.go(f"/console/requests/{name}")
        world.approve(visit)
    (given,) = world.request(f"by a new {algorithm} key")["approvals"]
    assert given["by"] == "ben"


def test_enrolment_says_why_no_passkey_can_be_made(browser: Browser, world: ConsoleWorld) -> None:
    with browser.visit(world.service.address) as visit:
        world.sign_in(visit, "ben")
        visit.go("/console/enrol")
        said = visit.page.get_by_role("alert").inner_text()
        assert f"no passkeys on pages of IP addresses. Open this page by its name: {world.origin}/console/enrol" in said
        assert visit.page.get_by_role("button", name="Make a passkey").is_disabled()
    with browser.visit(world.origin) as visit:
        world.sign_in(visit, "ben")
        visit.go("/console/enrol")
        visit.authenticator().verifies(False)
        visit.page.get_by_role("button", name="Make a passkey").click()
        visit.page.get_by_role("alert").wait_for()
        assert "No passkey was made" in visit.page.get_by_role("alert").inner_text()
        assert visit.page.locator("#made").is_hidden()
    with browser.visit(world.origin, script=False) as visit:
        world.sign_in(visit, "ben")
        visit.go("/console/enrol")
        assert "scripts are off here" in visit.page.locator("main").inner_text()
        assert visit.page.get_by_role("button", name="Make a passkey").count() == 0
