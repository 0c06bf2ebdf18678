"""A stand-in for the signing service, so that `safe-session` is tested against every answer a service can give, and the
tests of the stand-in itself. Certificates in it are made by `ssh-keygen -s`, not by our encoder."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from tests.parts import keys
from tests.parts.keys import KeyRing
from tests.parts.standin import Asked, Signer


def test_the_standin_issues_what_ssh_keygen_reads(tmp_path: Path, keyring: KeyRing) -> None:
    signer = Signer(tmp_path, keyring("ed25519", "ca"))
    body = json.dumps({"public_key": keyring("ed25519").public_line}).encode()
    issued = signer.issue(Asked("POST /api/sign/llmops HTTP/1.0", {}, body))
    (tmp_path / "c").write_text(str(issued["certificate"]))
    assert "Serial: 4711" in keys.ssh_keygen("-L", "-f", tmp_path / "c")
    assert base64.b64decode(str(issued["certificate"]).split()[1])
