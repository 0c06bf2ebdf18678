"""cutover.toml as an operator writes it: the whole file, and the table that a decommission adds."""

from __future__ import annotations

from typing import Final

from signer.migration.config import KEY_VARIABLE

GOOD: Final = f"""
evidence_dir = "/var/lib/safe-session/evidence"

[compose]
command  = ["podman-compose"]
engine   = "podman"
project  = "safe-session"
base     = "/opt/signer/overlays/safe-session.yaml"
overlay  = "/opt/signer/overlays/safe-session-local-ca.yaml"
environment = {{ {KEY_VARIABLE} = "/run/signer-ca/ca" }}

[preflight]
script = "/opt/signer/scripts/cutover/safe-session-local-ca-preflight.sh"

[signer]
address     = "http://127.0.0.1:8222"
token_file  = "/root/token"
policy_file = "/etc/safe-session/policy/policy.toml"
role        = "llmops"

[vault]
address    = "http://127.0.0.1:8200"
token_file = "/root/vault-token"
roles      = ["llmops"]

[[smoke]]
name = "rs2000"
host = "rs2000.example"
user = "llmops"
known_hosts = "/root/.ssh/known_hosts"
"""
REMOVAL: Final = """
[decommission]
admin_token_file = "/root/admin"
stop_command = ["systemctl", "stop", "vault"]
"""
