"""The service in a container whose CA key is in an ssh-agent of the host: `overlays/safe-session-agent.yaml`."""

from __future__ import annotations

from pathlib import Path

import pytest

from signer.ssh.certificate import decode_certificate
from tests.parts import builders, missing
from tests.parts.agents import Agent
from tests.parts.container import BASE_FILE, FOLDER_VARIABLE, KEEPER_ID, Contained, Engine
from tests.parts.eventually import eventually
from tests.parts.keys import KeyRing

pytestmark = [missing.needs_podman, missing.needs_podman_compose, pytest.mark.slow, pytest.mark.timeout(900)]
AGENT_FILE = BASE_FILE.with_name("safe-session-agent.yaml")


def test_a_container_signs_with_the_hosts_agent_and_has_no_key(
    engine: Engine, tmp_path: Path, keyring: KeyRing
) -> None:
    ca, user = keyring("ed25519", "ca"), keyring("ed25519", "user")
    with Agent(user=KEEPER_ID) as agent:
        agent.add(ca)
        agent.socket.rename(agent.folder / "agent.sock")
        agent.socket = agent.folder / "agent.sock"
        service = Contained(engine, tmp_path / "service", ca, local=True)
        service.key_file.unlink()
        service.files = (BASE_FILE, AGENT_FILE)
        del service.variables[FOLDER_VARIABLE]
        service.variables["PLATFORM_RUNTIME_SAFE_SESSION_CA_AGENT_DIR"] = str(agent.folder)
        with service:
            assert service.ask("GET", "/readyz").json()["ca_fingerprint"] == ca.fingerprint
            answer = service.sign(user.public_line)
            assert answer.status == 201, answer.body
            assert decode_certificate(builders.certificate_of(answer.json()))[0].ca_key == ca.blob
            assert service.keeper().uid == KEEPER_ID
            assert service.inside("ls", "/run/signer-ca").out == ""
            written = service.inside("touch", "/run/signer-agent/x", user=str(KEEPER_ID))
            assert written.status != 0, "the folder of the socket can be written"
            agent.kill()
            agent.start()  # another socket in the same folder
            agent.add(ca)
            eventually(lambda: service.sign(user.public_line).status == 201, "it signs again")
