"""runbooks/preflight.md shows what the preflight prints on a host that is ready and on one that is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.hosts import Host, Told

ROOT = Path(__file__).parents[3]
RUNBOOK = (ROOT / "runbooks" / "preflight.md").read_text()
RUN = re.compile(r"^```text\n\$ .*?preflight\.sh\n(.*?)\$ echo \$\?\n(\d)\n```$", re.MULTILINE | re.DOTALL)
FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")


@pytest.fixture
def documented_host(host: Host) -> Host:
    """The host of the runbook: this repository's compose files, podman, the base file's capabilities."""
    host.arguments.clear()
    host.change("merged.yaml", "    - SETUID\n    - SETGID\n", "    - CHOWN\n    - SETGID\n    - SETUID\n    - KILL\n")
    host.change("merged.yaml", "localhost/signer:test", "localhost/signer:latest")
    host.write("image", "localhost/signer:latest")
    host.change("container.txt", "CAP_SETGID CAP_SETUID", "CAP_CHOWN CAP_KILL CAP_SETGID CAP_SETUID")
    return host


def steady(text: str, host: Host) -> str:
    """What was printed, with the runbook's paths for this host's."""
    moved = {str(host.key.parent): "/run/signer-ca", f"{host.folder}/etc": "/etc/ssh", str(ROOT): "/opt/signer"}
    for here, there in moved.items():
        text = text.replace(here, there)
    return FINGERPRINT.sub("<fingerprint>", text)


def shown(told: Told, host: Host) -> tuple[str, str]:
    return steady(told.stdout, host), str(told.returncode)


@missing.needs_root
def test_the_runbook_shows_what_the_preflight_prints(documented_host: Host) -> None:
    expected = [(FINGERPRINT.sub("<fingerprint>", text), status) for text, status in RUN.findall(RUNBOOK)]
    found = [shown(documented_host.run(), documented_host)]
    documented_host.key.chmod(0o700)
    mount = f"read_only: true\n      source: {documented_host.key.parent}"
    documented_host.change("merged.yaml", mount, mount.replace("true", "false"))
    (documented_host.folder / "container.txt").unlink()
    found.append(shown(documented_host.run(), documented_host))
    assert found == expected
