"""`signer hosts install` without `--ca`: what the host gets is what the service publishes."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

from tests.parts.keys import KeyRing
from tests.parts.service import Service

SSH = """\
#!/bin/sh
cat > "{folder}/sent"
exit 1
"""


def test_a_host_gets_the_ca_lines_that_the_service_publishes(tmp_path: Path, keyring: KeyRing) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(SSH.format(folder=tmp_path))
    ssh.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    with Service(tmp_path / "s", keyring("ed25519", "ca"), environ={"PATH": path}) as service:
        command = ("hosts", "install", "edge1", "--principals", "llmops=llmops", "--address", service.address)
        done = service.command(*command)
        assert "edge1 was left as it was" in done.stderr
        with tarfile.open(fileobj=io.BytesIO((tmp_path / "sent").read_bytes())) as sent:
            member = sent.extractfile("ca.pub")
            assert member is not None
            assert member.read() == service.ask("GET", "/api/ca").body
        service.stop()
        (tmp_path / "sent").unlink()
        done = service.command(*command)
        assert done.returncode == 1
        assert "cannot reach the signing service" in done.stderr
        assert not (tmp_path / "sent").exists(), "nothing was sent to the host"
