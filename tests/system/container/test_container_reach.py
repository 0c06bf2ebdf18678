"""TLS, a proxy that is believed and a limit of memory reach the container by a compose file of the operator's."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.parts import missing, ports
from tests.parts.container import API_ID, Contained, Engine
from tests.parts.documents import blocks, document
from tests.parts.keys import KeyRing

pytestmark = [missing.needs_podman, missing.needs_podman_compose, pytest.mark.slow, pytest.mark.timeout(600)]
PAGE: Final = document("runbooks/install/reach.md")
CALLER: Final = "192.0.2.9"


class TlsContained(Contained):
    """It serves TLS, and the page's CA vouches for it."""

    vouching: Path

    def over_tls(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict[str, object]]:
        """Status and JSON of an answer over TLS, verified with the page's CA alone."""
        context = ssl.create_default_context(cafile=str(self.vouching))
        connection = http.client.HTTPSConnection(ports.LOOPBACK, self.port, timeout=10, context=context)
        connection.request(
            method, path, json.dumps(body), {"Authorization": f"Bearer {self.tokens['operator']}", **headers}
        )
        answer = connection.getresponse()
        found = answer.status, json.loads(answer.read())
        connection.close()
        return found

    def is_ready(self) -> bool:
        try:
            return self.over_tls("GET", "/readyz")[0] == 200
        except OSError:
            return False


def test_the_compose_file_of_the_page_brings_tls_a_proxy_and_a_limit(
    engine: Engine, keyring: KeyRing, tmp_path: Path
) -> None:
    (script,) = blocks(PAGE, "sh")
    (lines,) = blocks(PAGE, "yaml")
    made, mounted = tmp_path / "made", tmp_path / "tls"
    for folder in (made, mounted):
        folder.mkdir()
    script = script.replace("DNS:signer.example", f"DNS:signer.example,IP:{ports.LOOPBACK}")
    subprocess.run(["bash", "-euc", script], cwd=made, check=True, capture_output=True)
    for name in ("tls.crt", "tls.key"):
        shutil.copy(made / name, mounted)
    (mounted / "tls.key").chmod(0o400)
    os.chown(mounted / "tls.key", API_ID, API_ID)
    own = tmp_path / "reach.yaml"
    own.write_text(lines.replace("/etc/safe-session/tls", str(mounted)).replace("10.0.0.7/32", f"{ports.LOOPBACK}/32"))
    contained = TlsContained(engine, tmp_path / "service", keyring("ed25519", "ca"), local=True)
    contained.files, contained.vouching = (*contained.files, own), made / "ca.pem"
    with contained:
        asked = {"public_key": keyring("ed25519").public_line}
        status, answer = contained.over_tls("POST", "/api/sign/llmops", asked, **{"X-Forwarded-For": CALLER})
        assert status == 201, answer
        listed = contained.inside("signer", "events", "list", "--kind", "certificate.issued", "--json")
        assert f'"address": "{CALLER}"' in listed.out
        assert engine.control("inspect", "--format", "{{.HostConfig.Memory}}", contained.name).strip() == str(512 << 20)
        plain = http.client.HTTPConnection(ports.LOOPBACK, contained.port, timeout=10)
        plain.request("GET", "/readyz")
        with pytest.raises((OSError, http.client.HTTPException)):
            plain.getresponse()
