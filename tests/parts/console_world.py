"""A service with its console, an agent that asks, humans who decide in a browser, and a host that trusts the CA."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.parts.browser import Visit
from tests.parts.eventually import eventually
from tests.parts.keys import KeyRing
from tests.parts.passkeys import SoftPasskey
from tests.parts.service import ROOT, Service
from tests.parts.sshd import Sshd

_ROLE = """
[roles.{name}]
principals = ["llmops"]
default_principals = ["llmops"]
default_ttl = "10m"
max_ttl = "15m"
key_types = ["ssh-ed25519"]
extensions = {{ allowed = ["permit-pty"], default = ["permit-pty"] }}
critical_options = {{ allowed = ["force-command"] }}
{more}
"""
# anna approves by passkey, ben with a FIDO key of OpenSSH, carl may look only.
_PEOPLE = """
[identities.deploy-agent]
kind = "agent"
roles = ["llmops", "production", "root"]
tokens = [{ sha256 = "{token:deploy-agent}", expires = 2099-01-01T00:00:00Z }]

[identities.ci]
kind = "workload"
roles = ["llmops"]
tokens = [{ sha256 = "{token:ci}", expires = 2099-01-01T00:00:00Z }]

[identities.anna]
kind = "human"
groups = ["operators"]
roles = ["llmops", "production", "glass"]
may = ["approve", "freeze", "ledger.read", "operate"]
approval_keys = [{passkey:anna}]
tokens = [{ sha256 = "{token:anna}", expires = 2099-01-01T00:00:00Z }]

[identities.ben]
kind = "human"
groups = ["operators"]
roles = ["llmops", "glass"]
may = ["approve", "ledger.read"]
approval_keys = [{ kind = "ssh", key = "{fido:ben}" }]
tokens = [{ sha256 = "{token:ben}", expires = 2099-01-01T00:00:00Z }]

[identities.carl]
kind = "human"
may = ["ledger.read"]
tokens = [{ sha256 = "{token:carl}", expires = 2099-01-01T00:00:00Z }]
"""
POLICY = (
    '[ca]\nfingerprint = "{ca}"\n'
    + _ROLE.format(name="llmops", more="")
    + _ROLE.format(name="production", more='approval = { for = ["agent"], by = ["operators"], valid_for = "10m" }')
    + _ROLE.format(
        name="root", more='approval = { for = ["agent"], by = ["operators"], valid_for = "10m", with = ["ssh"] }'
    )
    + _ROLE.format(name="glass", more="break_glass = true")
    + _PEOPLE
)


class ConsoleWorld:
    """Use through `console_world`. `passkey` is anna's, and policy.toml names it."""

    def __init__(self, folder: Path, runtime: Path, keyring: KeyRing) -> None:
        self.folder = folder
        self.runtime = runtime
        self.user = keyring("ed25519", "user")
        self.service = Service(folder / "service", keyring("ed25519", "ca"))
        self.origin = f"http://localhost:{self.service.port}"  # browsers offer no passkeys on pages of IP addresses
        self.passkey = SoftPasskey("anna", rp="localhost", origin=self.origin)
        self.service.write_policy(POLICY.replace("{passkey:anna}", self.passkey.entry))
        self.sshd = Sshd(folder / "sshd", self.service.ca.public_line, host_key=keyring("ed25519", "host").private)

    # --- the agent --------------------------------------------------------------------------------------------------

    def start_agent(self, reason: str, *words: str, role: str = "production") -> subprocess.Popen[str]:
        """`safe-session` of deploy-agent, which waits for a decision and then logs in and runs `words`."""
        return subprocess.Popen(
            [sys.executable, "-m", "signer.safe_session", "--role", role, "--reason", reason, "--wait", "100s",
             "ssh", *self.sshd.ssh_options(), "127.0.0.1", *words],
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.folder),
                "PYTHONPATH": str(ROOT),
                "XDG_RUNTIME_DIR": str(self.runtime),
                **self.service.client_environment("deploy-agent", role),
            },
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def send(self, path: str, body: object, *, identity: str, status: int) -> dict[str, Any]:
        """A POST to the API that must be answered by this status; the JSON of the answer."""
        answer = self.service.ask("POST", path, body, identity=identity)
        assert answer.status == status, answer.body
        found: dict[str, Any] = answer.json()
        return found

    def request(self, reason: str) -> dict[str, Any]:
        """The newest request with this reason, once it is there."""

        def look() -> dict[str, Any] | None:
            answer = self.service.ask("GET", "/api/requests", identity="anna")
            assert answer.status == 200, answer.body
            found = [one for one in answer.json()["requests"] if one["frozen"]["reason"] == reason]
            return found[0] if found else None

        found = eventually(look, f"a request with the reason {reason}")
        assert found is not None
        return found

    def ask(self, reason: str, *, role: str = "production", **fields: object) -> str:
        """A request of deploy-agent that nobody waits for; its id."""
        body = {"public_key": self.user.public_line, "reason": reason, **fields}
        return str(self.send(f"/api/sign/{role}", body, identity="deploy-agent", status=202)["request"])

    # --- a human in a browser ---------------------------------------------------------------------------------------

    def sign_in(self, visit: Visit, identity: str = "anna") -> None:
        """Signs in by the form; the visit ends on the first page."""
        visit.go("/console/sign-in")
        visit.page.get_by_label("Your token").fill(self.service.tokens[identity])
        visit.page.get_by_role("button", name="Sign in").click()
        visit.page.get_by_role("button", name="Sign out").first.wait_for()

    def approve(self, visit: Visit) -> None:
        """Approves the request whose page is open by the passkey of the page's authenticator."""
        visit.page.get_by_role("button", name="Approve with a passkey").click()
        visit.page.locator("[data-state=approved], [data-state=issued], main [role=alert]:not([hidden])").wait_for()
        assert visit.page.get_by_role("alert").count() == 0, visit.page.locator("main").inner_text()


@contextmanager
def console_world(folder: Path, keyring: KeyRing) -> Iterator[ConsoleWorld]:
    """One that runs. Claim secrets of `safe-session` are in memory, as it demands."""
    runtime = Path(tempfile.mkdtemp(prefix="xdg-", dir="/dev/shm"))
    try:
        world = ConsoleWorld(folder, runtime, keyring)
        with world.service, world.sshd:
            yield world
    finally:
        shutil.rmtree(runtime)
