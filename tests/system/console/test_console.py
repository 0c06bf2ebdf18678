"""The console in a real browser: what humans see, and what becomes of it at the service and at a real sshd."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.browser import Browser
from tests.parts.console_world import ConsoleWorld, console_world
from tests.parts.keys import KeyRing
from tests.parts.passkeys import ALGORITHMS, unb64url

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
