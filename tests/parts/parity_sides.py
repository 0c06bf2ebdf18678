"""Vault and our service, each played by our own rules, where a test wants both sides and neither server.

`play` puts them in the place of the real ones in `signer policy import-vault` and `signer cutover parity`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from signer.authority.certificates import prepare_certificate
from signer.cli import parity as verbs_parity
from signer.migration.config import CutoverFile
from signer.migration.parity import SignLocally
from signer.model import Identity, PublicKey, Role, UsageCounts
from signer.policy.decide import decide
from signer.policy.file import load_policy
from signer.protocol.sign_request import read_native_sign
from signer.ssh.certificate import append_signature
from signer.ssh.publickey import certificate_kind, parse_public_key, render_public_key
from signer.vault.role import DEFAULTS, MountTtls

NOW = 1_800_000_000
WHO = Identity("deploy-agent", "agent", frozenset(), frozenset(), frozenset())
CUTOVER = """\
evidence_dir = "/var/lib/safe-session/evidence"
compose = { command = ["podman-compose"], engine = "podman", project = "safe-session", base = "/opt/signer/a.yaml", overlay = "/opt/signer/b.yaml", environment = { PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_FILE = "/run/ca" } }
preflight = { script = "/opt/signer/preflight.sh" }
signer = { address = "http://127.0.0.1:8222", token_file = "/root/token", policy_file = "POLICY", role = "ROLE" }
vault = { address = "http://127.0.0.1:8200", token_file = "/root/vault-token", mount = "ssh", roles = ["ROLE"] }
smoke = [{ name = "edge1", host = "edge1.example", user = "llmops", known_hosts = "/root/.ssh/known_hosts" }]
"""  # noqa: E501 - TOML's inline tables have no line ends
ROLES: Mapping[str, Mapping[str, object]] = {
    "llmops": {
        "allowed_users": "llmops,deploy",
        "default_user": "llmops",
        "allowed_extensions": "permit-pty,permit-port-forwarding",
        "default_extensions": {"permit-pty": ""},
        "allowed_user_key_lengths": {"ed25519": [0], "rsa": [3072]},
        "ttl": 900,
        "max_ttl": 1800,
        "key_id_format": "{{role_name}}-{{public_key_hash}}",
    },
    "deploy": {
        "allowed_users": "deploy",
        "default_user": "deploy",
        "default_critical_options": {"force-command": "/usr/bin/deploy"},
        "allowed_critical_options": "source-address",
        "allowed_user_key_lengths": {"rsa": [3072]},
        "ttl": 900,
        "max_ttl": 3600,
        "allow_host_certificates": True,
    },
    "hosts": {"allow_user_certificates": False, "allow_host_certificates": True, "allowed_domains": "example"},
}


def issue(role: Role, body: dict[str, Any]) -> str:
    """What a server that follows `role` to the letter makes of a native body."""
    ask = read_native_sign(role.name, body)
    grant = decide(WHO, role, ask, parse_public_key(ask.public_key), "192.0.2.1", UsageCounts())
    draft = prepare_certificate(grant, 7, b"n" * 32, NOW, b"ca")
    blob = append_signature(draft.unsigned, b"signature")
    return render_public_key(certificate_kind(grant.public_key.kind), blob)


def native_body(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A body of Vault's sign endpoint as our own API has it."""
    body = {name: value for name, value in fields.items() if name not in ("cert_type", "valid_principals")}
    if "valid_principals" in fields:
        body["principals"] = fields["valid_principals"].split(",")
    if "extensions" in fields:
        body["extensions"] = list(fields["extensions"])
    return body


class PlayedVault:
    """Tells `ROLES`, and signs by the roles of a policy file of ours."""

    def __init__(self, policy_file: Path) -> None:
        self._policy_file = policy_file

    def __enter__(self) -> PlayedVault:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """There is nothing to close."""

    def check_ready(self) -> None:
        """It always is."""

    def roles(self, mount: str) -> tuple[str, ...]:
        return tuple(sorted(ROLES)) if mount == "ssh" else ()

    def role(self, mount: str, name: str) -> dict[str, Any]:
        assert mount == "ssh"
        return {**DEFAULTS, "allow_user_certificates": True, **ROLES[name]}

    def mount_ttls(self, mount: str) -> MountTtls:
        assert mount in ("ssh", "empty")
        return MountTtls()

    def ca_public_key(self, mount: str) -> PublicKey:
        assert mount in ("ssh", "empty")
        return PublicKey("ssh-ed25519", b"", 256, "SHA256:" + "V" * 43)

    def sign(self, mount: str, role: str, fields: Mapping[str, Any]) -> str:
        assert mount == "ssh"
        ours = load_policy(self._policy_file).roles[role]
        return issue(replace(ours, reason_required=False, source_address=None), native_body(fields))


def play(environ: pytest.MonkeyPatch, folder: Path, role: str) -> None:
    """Both sides played for the verbs; `cutover.toml` in the folder names the role."""
    policy_file = folder / "policy.toml"

    @contextmanager
    def local_side(file: CutoverFile) -> Iterator[tuple[SignLocally, str]]:
        yield lambda name, body: issue(load_policy(file.signer.policy_file).roles[name], body), "the running service"

    environ.setattr("signer.vault.admin.VaultAdmin", lambda *_: PlayedVault(policy_file))
    environ.setattr(verbs_parity, "local_side", local_side)
    (folder / "cutover.toml").write_text(CUTOVER.replace("POLICY", str(policy_file)).replace("ROLE", role))
