"""A service whose roles ask humans, and the humans: each has a token, a FIDO key in one agent, and `signer`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.parts.agents import FidoAgent
from tests.parts.fido import FidoKey
from tests.parts.keys import Key, KeyRing
from tests.parts.service import ROOT, Answer, Service

POLICY = """\
[ca]
fingerprint = "{ca}"

[roles.prod]
principals = ["llmops", "backup"]
default_principals = ["llmops"]
default_ttl = "15m"
max_ttl = "30m"
key_types = ["ssh-ed25519"]
extensions = { allowed = ["permit-pty"], default = ["permit-pty"] }
critical_options = { allowed = ["force-command"] }
reason_required = true
approval = { for = ["agent", "human"], by = ["operators"], valid_for = "10m" }

[roles.glass]
principals = ["root"]
default_principals = ["root"]
default_ttl = "10m"
max_ttl = "15m"
key_types = ["ssh-ed25519"]
break_glass = true

[identities.deploy-agent]
kind = "agent"
roles = ["prod"]
tokens = [{ sha256 = "{token:deploy-agent}", expires = 2099-01-01T00:00:00Z }]

[identities.anna]
kind = "human"
groups = ["operators"]
roles = ["prod", "glass"]
may = ["approve", "ledger.read"]
approval_keys = [{ kind = "ssh", key = "{fido:anna}" }]
tokens = [{ sha256 = "{token:anna}", expires = 2099-01-01T00:00:00Z }]

[identities.ben]
kind = "human"
groups = ["operators"]
may = ["approve"]
approval_keys = [{ kind = "ssh", key = "{fido:ben}" }]
tokens = [{ sha256 = "{token:ben}", expires = 2099-01-01T00:00:00Z }]

[identities.stranger]
kind = "agent"
tokens = [{ sha256 = "{token:stranger}", expires = 2099-01-01T00:00:00Z }]
"""


class Deciders:
    """The running service, and who asks and decides. `keys` are the FIDO keys by name; a test sets their flags."""

    def __init__(self, service: Service, user: Key) -> None:
        self.service = service
        self.user = user
        self.keys = {name: FidoKey(name=name) for name in ("anna", "ben")}
        self.agents = {name: FidoAgent(key) for name, key in self.keys.items()}

    def ask(self, who: str = "deploy-agent", role: str = "prod", **fields: object) -> Answer:
        """A native sign request, bound to the user's key."""
        body = {"public_key": self.user.public_line, "reason": "restart the queue, ticket 812", **fields}
        return self.service.ask("POST", f"/api/sign/{role}", body, identity=who)

    def request(self, **fields: Any) -> str:
        """The id of a new request."""
        answer = self.ask(**fields)
        assert answer.status == 202, answer.body
        return str(answer.json()["request"])

    def environment(self, who: str) -> dict[str, str]:
        """What `signer` needs on the machine of that person."""
        return {
            **self.service.environment(),
            **self.service.client_environment(who, "prod"),
            "SSH_AUTH_SOCK": str(self.agents[who].socket) if who in self.agents else "",
        }

    def signer(self, who: str, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """`signer WORDS` as that person."""
        return subprocess.run(
            [sys.executable, "-P", "-m", "signer", *words],
            cwd=ROOT,
            env=self.environment(who),
            stdin=subprocess.DEVNULL if stdin is None else None,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def json(self, who: str, *words: str) -> Any:
        """What `signer WORDS --json` prints, which must succeed."""
        done = self.signer(who, *words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def approve(self, who: str, request: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self.signer(who, "requests", "approve", request, "--yes", *options)


@contextmanager
def deciders(folder: Path, keyring: KeyRing, environ: Mapping[str, str] | None = None) -> Iterator[Deciders]:
    """A running service with agents for the FIDO keys of its humans."""
    folder.mkdir(exist_ok=True)
    with Service(folder / "service", keyring("ed25519", "ca"), POLICY, environ=environ) as service:
        people = Deciders(service, keyring("ed25519"))
        with people.agents["anna"], people.agents["ben"]:
            os.chmod(service.folder, 0o700)  # noqa: PTH101 - tokens lie in it
            yield people
