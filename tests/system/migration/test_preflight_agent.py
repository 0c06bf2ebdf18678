"""The preflight where the CA key is in an ssh-agent: no file is looked for, the agent is, and each fault is told."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.agents import Agent
from tests.parts.hosts import FOLDER_VARIABLE, KEY_VARIABLE, Host
from tests.parts.keys import KeyRing, make_key

AGENT_VARIABLE = "PLATFORM_RUNTIME_SAFE_SESSION_CA_AGENT_DIR"
PIN = "SAFE_SESSION_CA_FINGERPRINT"
KEEPER = 8221

pytestmark = missing.needs_root


class AgentHost:
    """A host that is ready, with an agent of root's in place of the key file."""

    def __init__(self, host: Host, agent: Agent) -> None:
        self.host, self.agent = host, agent
        host.key.unlink()
        host.key.parent.rmdir()
        del host.environ[KEY_VARIABLE]
        host.environ |= {AGENT_VARIABLE: str(agent.folder), PIN: host.ca.fingerprint}
        for name in ("merged.yaml", "container.txt"):
            host.change(name, str(host.key.parent), str(agent.folder))
        host.change("merged.yaml", "target: /run/signer-ca", "target: /run/signer-agent")
        host.change("merged.yaml", "SIGNER_CA_KEY_FILE: /run/signer-ca/ca", "SIGNER_CA_KEY_SOURCE: agent")
        host.change("compose-message", FOLDER_VARIABLE, AGENT_VARIABLE)
        compose = (host.folder / "bin" / "podman-compose").read_text()
        host.program("podman-compose", compose.replace(FOLDER_VARIABLE, AGENT_VARIABLE))

    def faults(self) -> set[str]:
        return self.host.run().codes("FAIL", "warn")


@pytest.fixture
def world(host: Host) -> Iterator[AgentHost]:
    folder = host.memory / "agent"
    folder.mkdir(mode=0o700)
    with Agent(folder=folder) as agent:
        agent.add(host.ca)
        yield AgentHost(host, agent)


def test_a_host_with_its_key_in_an_agent_is_ready_and_no_file_is_missed(world: AgentHost) -> None:
    told = world.host.run()
    assert told.codes("FAIL", "warn", "skip") == set()
    assert told.returncode == 0
    assert {"ca_agent_socket", "ca_agent_key", "ca_key_fingerprint", "sshd_trusts_ca"} <= told.codes("ok")
    assert not {"ca_key_present", "ca_key_owner", "ca_key_parses", "ca_key_in_memory"} & told.codes("ok", "skip")
    assert "there is no key file" in told.detail("ca_agent_socket")
    assert told.detail("ca_agent_key") == f"ED25519 {world.host.ca.fingerprint}, as pinned"


def test_of_several_keys_the_pin_chooses(world: AgentHost, keyring: KeyRing) -> None:
    world.agent.add(keyring("ed25519", "another"), keyring("rsa3072", "third"))
    assert world.faults() == set()
    world.host.environ[PIN] = keyring("ed25519", "another").fingerprint
    assert world.faults() == {"sshd_does_not_trust_ca"}


def test_an_agent_of_the_keepers_user_is_as_good_as_roots(world: AgentHost) -> None:
    shutil.chown(world.agent.folder, KEEPER)
    shutil.chown(world.agent.socket, KEEPER)
    assert world.faults() == set()


def _no_socket(world: AgentHost) -> None:
    world.agent.kill()
    world.agent.socket.unlink(missing_ok=True)


def _a_file_for_a_socket(world: AgentHost) -> None:
    _no_socket(world)
    world.agent.socket.touch()


def _another_user(world: AgentHost) -> None:
    for path in (world.agent.folder, world.agent.socket):
        shutil.chown(path, "nobody")


def _the_folder_of_another_user(world: AgentHost) -> None:
    shutil.chown(world.agent.folder, "nobody")


def _an_open_folder_above(world: AgentHost) -> None:
    world.agent.folder.parent.chmod(0o777)


def _nobody_listens(world: AgentHost) -> None:
    world.agent.kill()


def _no_pin(world: AgentHost) -> None:
    del world.host.environ[PIN]


def _locked(world: AgentHost) -> None:
    ask = world.host.folder / "ask"
    ask.write_text("#!/bin/sh\necho a passphrase\n")
    ask.chmod(0o700)
    locked = world.agent.ssh_add("-x", env={"SSH_ASKPASS": str(ask), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":0"})
    assert locked.returncode == 0, locked.stderr


def _a_small_rsa_key(world: AgentHost) -> None:
    small = make_key(world.host.folder, "rsa2048", "small")
    world.agent.add(small)
    world.host.environ[PIN] = small.fingerprint
    (world.host.folder / "etc" / "ca.pub").write_text(small.public_line + "\n")


def _a_login_key(world: AgentHost) -> None:
    world.host.authorize("llmops", world.host.ca.public_line)


def _another_source(world: AgentHost) -> None:
    world.host.change("merged.yaml", "SIGNER_CA_KEY_SOURCE: agent", "SIGNER_CA_KEY_SOURCE: file")


def _mounted_elsewhere(world: AgentHost) -> None:
    world.host.change("merged.yaml", "target: /run/signer-agent", "target: /run/agent")


def _mounted_writable(world: AgentHost) -> None:
    world.host.change("merged.yaml", "read_only: true\n      source: /var", "read_only: false\n      source: /var")


def _the_socket_mounted_as_well(world: AgentHost) -> None:
    mount = f"    - {world.agent.socket}:/run/other.sock:ro\n    - ledger:/var/lib/signer\n"
    world.host.change("merged.yaml", "    - ledger:/var/lib/signer\n", mount)


FAULTS: dict[str, Callable[[AgentHost], None]] = {
    "ca_agent_missing": _no_socket,
    "ca_agent_missing ": _a_file_for_a_socket,
    "ca_agent_user_differs": _another_user,
    "ca_agent_not_private": _the_folder_of_another_user,
    "ca_agent_not_private ": lambda world: world.agent.folder.chmod(0o755),
    "ca_agent_not_private  ": lambda world: world.agent.socket.chmod(0o660),
    "ca_key_parent_writable_by_others": _an_open_folder_above,
    "ca_agent_not_answering": _nobody_listens,
    "ca_agent_pin_not_set": _no_pin,
    "ca_agent_key_missing": lambda world: world.agent.remove(world.host.ca),
    "ca_agent_key_missing ": _locked,
    "ca_key_rsa_too_short": _a_small_rsa_key,
    "ca_key_is_a_login_key": _a_login_key,
    "overlay_key_source_differs": _another_source,
    "overlay_mount_target_differs": _mounted_elsewhere,
    "overlay_mount_not_read_only": _mounted_writable,
    "overlay_mount_twice": _the_socket_mounted_as_well,
}


@pytest.mark.parametrize("code", FAULTS)
def test_each_fault_is_told_alone(world: AgentHost, code: str) -> None:
    FAULTS[code](world)
    also = {"compose_not_allowed"} if code.startswith("overlay_mount_") else set()  # the allow-list has that mount only
    assert world.faults() == {code.strip()} | also


def test_audit_4e3_the_preflight_has_no_key_sign_anything(world: AgentHost) -> None:
    assert world.agent.ssh_add("-D").returncode == 0
    # Nobody answers the question that the agent asks before it signs, so a signature would fail.
    assert world.agent.ssh_add("-q", "-c", world.host.ca.private).returncode == 0
    assert world.faults() == set()


def test_an_overlay_with_an_agent_beside_a_key_file_is_found(host: Host) -> None:
    host.change("merged.yaml", "SIGNER_MODE: local\n", "SIGNER_MODE: local\n      SIGNER_CA_KEY_SOURCE: agent\n")
    assert host.run().codes("FAIL") == {"overlay_key_source_differs"}


def test_both_variables_are_wrong_use(world: AgentHost) -> None:
    world.host.environ[KEY_VARIABLE] = "/run/signer-ca/ca"
    told = world.host.run()
    assert (told.returncode, told.stdout) == (2, "")
    assert "are both set" in told.stderr


def test_the_overlay_of_the_agent_is_the_default(world: AgentHost, tmp_path: Path) -> None:
    at = world.host.arguments.index("--overlay")
    del world.host.arguments[at : at + 2]
    assert "overlays/safe-session-agent.yaml" in world.host.run().detail("compose_files")
