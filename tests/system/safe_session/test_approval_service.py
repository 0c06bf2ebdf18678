"""An agent that asks and a human who approves, as two processes, by the real service, to a login at a real sshd."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.keys import Key, KeyRing
from tests.parts.service import STANDARD_POLICY, Service
from tests.parts.sshd import Sshd
from tests.parts.standin import ROOT

pytestmark = missing.needs_sshd

ROLE = """
[roles.{name}]
principals = ["llmops"]
default_principals = ["llmops"]
default_ttl = "5m"
max_ttl = "15m"
key_types = ["ssh-ed25519"]
extensions = {{ allowed = ["permit-pty"], default = ["permit-pty"] }}
critical_options = {{ allowed = ["force-command"] }}
{more}
"""
POLICY = (
    STANDARD_POLICY.replace('roles = ["llmops"]', 'roles = ["llmops", "production"]').replace(
        'roles = ["llmops", "production"]\nmay =', 'roles = ["llmops", "production", "glass"]\nmay ='
    )
    + ROLE.format(
        name="production",
        more='approval = { for = ["agent"], by = ["operators"], valid_for = "10m" }\npresence = true',
    )
    + ROLE.format(name="glass", more="break_glass = true")
)

# The human's process: sees the request, signs the statement with `ssh-keygen -Y sign`, and sends the signature.
APPROVE = """
import json, os, subprocess, sys, urllib.request
from signer.ssh.statement import APPROVAL_NAMESPACE, approval_statement, request_digest

address, key, request = sys.argv[1:]
token = open(os.environ["TOKEN_FILE"]).read().strip()
headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

def call(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address + path, data, headers)) as response:
        return json.load(response)

shown = call(f"/api/requests/{request}")
statement = approval_statement(request, request_digest(shown["frozen"]), "operator", None)
signature = subprocess.run(
    ["ssh-keygen", "-q", "-Y", "sign", "-n", APPROVAL_NAMESPACE, "-f", key],
    input=statement, stdout=subprocess.PIPE, check=True,
).stdout.decode()
print(call(f"/api/requests/{request}/approve", {"signature": signature, "waiver": None})["state"])
"""


@dataclass
class World:
    """The service, a host that trusts it, and the operator's key. `runtime` is a private folder in memory."""

    service: Service
    sshd: Sshd
    key: Key
    runtime: Path
    folder: Path

    def environment(self, identity: str, role: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "XDG_RUNTIME_DIR": str(self.runtime),
            **self.service.client_environment(identity, role),
        }

    def start(self, identity: str, role: str, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "signer.safe_session", *words],
            env=self.environment(identity, role),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, identity: str, role: str, *words: str) -> subprocess.CompletedProcess[str]:
        process = self.start(identity, role, *words)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def ssh(self, *words: str) -> tuple[str, ...]:
        """The words for `safe-session ssh` to the host."""
        return ("ssh", *self.sshd.ssh_options(), "127.0.0.1", *words)

    def approve(self, request: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", APPROVE, self.service.address, self.key.private, request],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT),
                 "TOKEN_FILE": str(self.service.token_file("operator"))},
            check=True, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.stdout.strip()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, keyring: KeyRing) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("asking")
    runtime = Path(tempfile.mkdtemp(prefix="xdg-", dir="/dev/shm"))
    key = keyring("ed25519", "approver")
    line = " ".join(key.public_line.split()[:2])
    policy = POLICY.replace(
        '{ kind = "ssh", key = "{fido:operator}" }', f'{{ kind = "ssh", key = "{line}", software = true }}'
    )
    service = Service(folder / "service", keyring("ed25519", "ca"), policy)
    with service, Sshd(folder / "sshd", service.ca.public_line) as sshd:
        yield World(service, sshd, key, runtime, folder)
    shutil.rmtree(runtime)


def test_an_agent_asks_a_human_approves_and_the_same_command_logs_in(world: World) -> None:
    words = ("--reason", "restart the queue, ticket 812", *world.ssh("echo in"))
    asked = world.run("deploy-agent", "production", *words)
    assert (asked.returncode, asked.stdout) == (75, ""), asked.stderr
    said = json.loads(asked.stderr)
    assert said["may_approve"] == ["operator"]
    again = world.run("deploy-agent", "production", *words)
    assert json.loads(again.stderr)["request"] == said["request"]
    assert world.approve(said["request"]) == "approved"
    done = world.run("deploy-agent", "production", *words)
    assert (done.returncode, done.stdout) == (0, "in\n"), done.stderr
    other = world.run("deploy-agent", "production", *words)
    assert other.returncode == 75, "one approval is good for one certificate"
    assert json.loads(other.stderr)["request"] != said["request"]


def test_a_waiting_agent_goes_on_with_the_approval(world: World) -> None:
    waiting = world.start("deploy-agent", "production", "--wait", "50s", *world.ssh("echo in"))
    listed = world.run("deploy-agent", "production", "requests", "--json")
    while not (pending := [one for one in json.loads(listed.stdout)["requests"] if one["frozen"]["reason"] is None]):
        listed = world.run("deploy-agent", "production", "requests", "--json")
    assert world.approve(pending[0]["request"]) == "approved"
    out, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, out) == (0, "in\n"), err


def test_a_denial_ends_it(world: World) -> None:
    words = ("--reason", "drop the database", "exec", "--", "true")
    asked = json.loads(world.run("deploy-agent", "production", *words).stdout)
    answer = world.service.ask(
        "POST", f"/api/requests/{asked['request']}/deny", {"reason": "never"}, identity="operator"
    )
    assert answer.status == 200
    for _ in range(2):
        done = world.run("deploy-agent", "production", *words)
        said = json.loads(done.stdout)
        assert (done.returncode, said["state"], said["by"], said["why"], said["may_retry"]) == (
            77, "denied", "operator", "never", False,
        )  # fmt: skip


def test_exact_gets_a_certificate_for_one_command(world: World) -> None:
    """The human approves a command: with the certificate in hand the agent still runs nothing else."""
    line = ("--exact", *world.sshd.ssh_options(), "127.0.0.1", "echo exactly")
    asked = json.loads(world.run("deploy-agent", "production", "ssh", *line).stderr)
    shown = world.service.ask("GET", f"/api/requests/{asked['request']}", identity="operator").json()
    assert shown["frozen"]["critical_options"] == {"force-command": "echo exactly"}
    assert world.approve(asked["request"]) == "approved"
    done = world.run("deploy-agent", "production", "ssh", *line)
    assert (done.returncode, done.stdout) == (0, "exactly\n"), done.stderr


def test_a_human_gives_their_own_signature_where_the_role_wants_it(world: World) -> None:
    words = ("--sign-key", str(world.key.private), *world.ssh("echo in"))
    done = world.run("operator", "production", *words)
    assert (done.returncode, done.stdout) == (0, "in\n"), done.stderr


def test_break_glass_waits_for_nobody_and_signs(world: World) -> None:
    reason = ("--reason", "the database does not answer, ticket 4711")
    short = world.run("operator", "glass", "--reason", "down", "--sign-key", str(world.key.private), *world.ssh("true"))
    assert short.returncode == 77, short.stderr
    done = world.run("operator", "glass", *reason, "--sign-key", str(world.key.private), *world.ssh("echo in"))
    assert (done.returncode, done.stdout) == (0, "in\n"), done.stderr
    incidents = world.service.ask("GET", "/api/incidents", identity="operator").json()["incidents"]
    assert [one["reason"] for one in incidents] == [reason[1]]
    agent = world.run("deploy-agent", "glass", *reason, *world.ssh("true"))
    assert agent.returncode == 77


def test_whoami_says_who_asks(world: World) -> None:
    done = world.run("deploy-agent", "production", "whoami", "--json")
    said = json.loads(done.stdout)
    assert (said["identity"], said["kind"], said["token"]["expires"]) == (
        "deploy-agent", "agent", "2099-01-01T00:00:00Z",
    )  # fmt: skip
