"""Freezes by the command line of a real service: with a token over HTTP, and on its host without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.parts.keys import KeyRing
from tests.parts.service import Service

_LOCAL = """
import os, sys, uuid
from pathlib import Path
from signer.errors import SignerError
from signer.protocol.client import KeeperClient
os.chdir(sys.argv[1])
os.setresuid(65534, 65534, 65534)
try:
    KeeperClient(Path("keeper.sock")).ask(
        {"op": "freeze", "local": True, "request_id": str(uuid.uuid4())}, b'{"scope":"all","reason":"x"}'
    )
except SignerError as error:
    print(error.code)
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, keyring: KeyRing) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("freezes"), keyring("ed25519", "ca")) as running:
        yield running


def as_identity(service: Service, identity: str) -> list[str]:
    return ["--address", service.address, "--token-file", str(service.token_file(identity))]


def test_root_freezes_everything_in_one_word_and_a_human_lifts_it(service: Service, keyring: KeyRing) -> None:
    line = keyring("ed25519").public_line
    frozen = service.command("freeze", "all")
    assert (frozen.returncode, frozen.stdout) == (0, "all is frozen: nothing is issued to it\n")
    refused = service.sign(line)
    assert (refused.status, refused.json()["code"]) == (403, "frozen")
    (row,) = json.loads(service.command("freezes", "--json").stdout)["freezes"]
    assert (row["scope"], row["by"], row["reason"]) == ("all", "local:root", "signer freeze all")
    assert "all" in service.command("freezes", *as_identity(service, "deploy-agent")).stdout
    assert service.command("unfreeze", "all").returncode == 1  # without a token nobody lifts anything
    agent = service.command("unfreeze", "all", *as_identity(service, "deploy-agent"))
    assert (agent.returncode, "lifts no freeze" in agent.stderr) == (1, True)
    assert service.command("unfreeze", "all", *as_identity(service, "operator")).returncode == 0
    assert service.sign(line).status == 201


def test_a_token_of_the_environment_does_not_keep_root_from_freezing(service: Service) -> None:
    agent = {"SAFE_SESSION_TOKEN_FILE": str(service.token_file("deploy-agent")), "SAFE_SESSION_ADDR": service.address}

    def run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-P", "-m", "signer", *words]
        return subprocess.run(argv, env=service.environment() | agent | environ, capture_output=True, text=True)

    asked = run("freeze", "all", "--token-file", agent["SAFE_SESSION_TOKEN_FILE"])
    assert (asked.returncode, asked.stdout) == (1, "")  # who names a token means it
    elsewhere = run("freeze", "all", SAFE_SESSION_ADDR="http://signer.example:8222")
    assert (elsewhere.returncode, elsewhere.stdout) == (1, "")
    assert json.loads(run("freezes", "--json").stdout) == {"freezes": []}
    frozen = run("freeze", "all")
    assert (frozen.returncode, frozen.stdout) == (0, "all is frozen: nothing is issued to it\n")
    assert "the token of SAFE_SESSION_TOKEN_FILE did not do it: " in frozen.stderr
    frozen = run("freeze", "role", "llmops", "--reason", "x")
    (row, other) = json.loads(run("freezes", "--json").stdout)["freezes"]
    assert [row["scope"], row["by"], other["scope"]] == ["all", "local:root", "role:llmops"]
    gone = run("freeze", "all", SAFE_SESSION_TOKEN_FILE="/nonexistent")
    assert gone.returncode == 0, gone.stderr
    for scope in (("all",), ("role", "llmops")):
        assert service.command("unfreeze", *scope, *as_identity(service, "operator")).returncode == 0
    mine = run("freeze", "all", SAFE_SESSION_TOKEN_FILE=str(service.token_file("operator")))
    assert mine.returncode == 0
    (row,) = json.loads(run("freezes", "--json").stdout)["freezes"]
    assert row["by"] == "operator"  # a token that may do it is used, so that the ledger names who it was
    assert service.command("unfreeze", "all", *as_identity(service, "operator")).returncode == 0


def test_a_freeze_by_token_ends_by_itself_and_the_ledger_says_so(service: Service, keyring: KeyRing) -> None:
    words = ("freeze", "identity", "deploy-agent", "--reason", "a drill", "--until", "1m", "--json")
    state = json.loads(service.command(*words, *as_identity(service, "operator")).stdout)
    assert state["frozen"] is True
    assert state["until"].endswith("Z")
    again = service.command(
        "freeze", "identity", "deploy-agent", *as_identity(service, "deploy-agent"), "--reason", "me"
    )
    assert again.returncode == 0  # an agent freezes itself, and makes it last
    (row,) = json.loads(service.command("freezes", "--json").stdout)["freezes"]
    assert "until" not in row
    assert row["by"] == "deploy-agent"
    assert service.sign(keyring("ed25519").public_line).status == 403
    assert service.command("unfreeze", "identity", "deploy-agent", *as_identity(service, "operator")).returncode == 0
    events = service.command("ledger", "export").stdout
    assert '"freeze.lifted"' in events


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_of_the_host_needs_a_token(service: Service) -> None:
    kept = service.run_dir.stat().st_mode
    service.socket.chmod(0o666)  # as if modes did not keep others out
    service.run_dir.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-P", "-c", _LOCAL, str(service.run_dir)],
        capture_output=True,
        text=True,
        env=service.environment(),
        check=False,
    )
    service.run_dir.chmod(kept & 0o7777)
    service.socket.chmod(0o660)
    assert done.stdout == "token_missing\n", done.stderr
    assert json.loads(service.command("freezes", "--json").stdout) == {"freezes": []}


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("freeze",), "missing: KIND"),
        (("freeze", "identity"), "the name of the identity is missing"),
        (("freeze", "all", "x"), "all takes no name"),
        (("freeze", "user", "x"), '"user" is not one of identity, role, all'),
        (("freeze", "role", "llmops"), "--reason is missing"),
        (("freeze", "role", "llmops", "--reason", "x", "--until", "soon"), "'soon' is not a duration"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(service: Service, words: tuple[str, ...], sentence: str) -> None:
    done = service.command(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr


def test_a_scope_that_the_policy_lacks_and_a_service_that_is_away_are_told(service: Service) -> None:
    unknown = service.command("freeze", "role", "llmop", "--reason", "x")
    assert unknown.returncode == 1
    assert "unknown scope 'role:llmop'" in unknown.stderr
    away = service.command("freezes", "--address", "http://127.0.0.1:1", *as_identity(service, "operator")[2:])
    assert away.returncode == 1
    assert "cannot reach the signing service" in away.stderr
