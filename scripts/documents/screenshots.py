"""Pictures of every page of the console, in both colour schemes and two widths, of a service with something to show."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from scripts.bench.filling import fill_ledger
from signer.ssh.statement import approval_statement, request_digest
from signer.units import timestamp
from tests.parts import missing
from tests.parts.browser import SIZES, Browser, Scheme, Visit
from tests.parts.console_world import ConsoleWorld, console_world
from tests.parts.fido import FidoKey, sign_by_hand
from tests.parts.keys import KeyRing
from tests.parts.passkeys import body_of

SCHEMES: tuple[Scheme, ...] = ("light", "dark")
CERTIFICATES, ACTIVE = 4_000, 40
KEPT = {
    ("request", "desktop", "light"),
    ("overview", "desktop", "dark"),
}  # in runbooks/operate/images, their first screen
OUTAGE = "the database does not answer, ticket 4711"


def fill(world: ConsoleWorld) -> str:
    """Gives every page something to show; the id of the request that waits for anna."""
    key = {"public_key": world.user.public_line}
    for identity in ("deploy-agent", "ci", "anna"):
        for _ in range(3):
            world.send("/api/sign/llmops", key, identity=identity, status=201)
    for _ in range(4):
        world.send("/api/sign/production", key, identity="ci", status=403)
    done = world.ask("rotate the logs")
    _approve(world, done, {"until": timestamp(int(time.time()) + 7_200), "uses": 5})
    world.send(f"/api/requests/{done}/claim", key, identity="deploy-agent", status=201)
    denied = world.ask("drop the database", critical_options={"force-command": "dropdb production"})
    world.send(f"/api/requests/{denied}/deny", {"reason": "never on a Friday"}, identity="anna", status=200)
    world.ask("read the kernel's log", role="root", critical_options={"force-command": "journalctl -k -n 200"})
    command = {"force-command": "systemctl restart queue"}
    waits = world.ask("restart the queue, ticket 812", critical_options=command, ttl=300)
    _break_glass(world)
    freeze = {"scope": "identity:ci", "reason": "its runner was replaced, ticket 815"}
    world.send("/api/freezes", freeze, identity="anna", status=201)
    for outcome in ("rolled_back", "applied"):
        body = {
            "operation": "cutover", "outcome": outcome, "plan": "sha256:" + "3f" * 32,
            "evidence": "sha256:" + "a7" * 32, "reason": "the planned move, change 2026-118",
        }  # fmt: skip
        world.send("/api/operations", body, identity="anna", status=201)
    return waits


def _approve(world: ConsoleWorld, request: str, waiver: dict[str, object]) -> None:
    shown = world.service.ask("GET", f"/api/requests/{request}", identity="anna").json()
    statement = approval_statement(request, request_digest(shown["frozen"]), "anna", waiver)
    body = body_of(world.passkey.approve(statement), waiver)
    world.send(f"/api/requests/{request}/approve", body, identity="anna", status=200)


def _break_glass(world: ConsoleWorld) -> None:
    """ben opens the role for emergencies by his own signature, which leaves an incident."""
    body = {"public_key": world.user.public_line, "reason": OUTAGE}
    asked = world.send("/api/sign/glass", body, identity="ben", status=202)
    statement = approval_statement(asked["request"], request_digest(asked["frozen"]), "ben", None)
    signature = sign_by_hand(FidoKey(name="ben"), statement)
    place = f"/api/requests/{asked['request']}"
    world.send(f"{place}/approve", {"signature": signature}, identity="ben", status=200)
    world.send(f"{place}/claim", {"public_key": world.user.public_line}, identity="ben", status=201)


def pages(visit: Visit, waits: str) -> Iterator[tuple[str, str]]:
    """Name and path of each page: those of the navigation, and one of each kind that they link to."""
    found = {"request": f"/console/requests/{waits}"}
    for path in visit.page.eval_on_selector_all("nav a", "links => links.map(link => link.getAttribute('href'))"):
        yield path.removeprefix("/console").strip("/") or "overview", path
        visit.go(path)
        for link in visit.page.eval_on_selector_all("main a", "links => links.map(link => link.getAttribute('href'))"):
            if kind := re.fullmatch(r"/console/(people|certificates|operations|incidents|ledger)/[^?]+", link):
                found.setdefault(f"{kind[1]}-one", link)
    yield from found.items()


def take(browser: Browser, world: ConsoleWorld, waits: str, folder: Path) -> None:
    """Writes `PAGE-SIZE-SCHEME.png` for each page."""
    with browser.visit(world.origin) as visit:
        world.sign_in(visit)
        listed = list(pages(visit, waits))
    for size in SIZES:
        for scheme in SCHEMES:
            with browser.visit(world.origin, size=size, scheme=scheme) as visit:
                visit.go("/console/sign-in")
                _take(visit, folder / f"sign-in-{size}-{scheme}.png")
                world.sign_in(visit)
                for name, path in listed:
                    visit.go(path)
                    _take(visit, folder / f"{name.replace('/', '-')}-{size}-{scheme}.png")
                    if (name, size, scheme) in KEPT:
                        visit.page.screenshot(path=folder / f"console-{name}.png")
                visit.go("/console/enrol")
                visit.authenticator()
                visit.page.get_by_role("button", name="Make a passkey").click()
                visit.page.get_by_role("heading", name="The passkey is made").wait_for()
                _take(visit, folder / f"enrolled-{size}-{scheme}.png")


def _take(visit: Visit, path: Path) -> None:
    visit.page.screenshot(path=path, full_page=True)


def main(arguments: list[str]) -> int:
    """The command line; the exit status."""
    if reason := missing.chromium() or missing.sshd():
        print(f"console-screenshots: error: {reason}", file=sys.stderr)
        return 1
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="signer-screenshots-") as name:
        place = Path(name)
        (place / "service" / "data").mkdir(mode=0o700, parents=True)
        fill_ledger(place / "service" / "data", CERTIFICATES, ACTIVE, int(time.time()), lambda *_: None)
        (place / "keys").mkdir()
        with console_world(place, KeyRing(place / "keys")) as world, Browser() as browser:
            take(browser, world, fill(world), folder)
    print(f"the pictures are in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
