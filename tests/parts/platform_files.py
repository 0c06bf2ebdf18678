"""What the files of a `Platform` say: policy.toml, rights in Vault, ssh_config, cutover.toml."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.parts import hosts
from tests.parts.container import API
from tests.parts.ports import LOOPBACK

if TYPE_CHECKING:
    from tests.parts.platform import Platform

POLICY: Final = """\
[ca]
fingerprint = "{ca}"

[roles.llmops]
principals = ["llmops"]
default_principals = ["llmops"]
default_ttl = "{ttl}"
max_ttl = "{max_ttl}"
key_types = ["ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa", "sk-ssh-ed25519@openssh.com"]
extensions = { allowed = ["permit-pty"], default = ["permit-pty"] }

[identities.deploy-agent]
kind = "agent"
roles = ["llmops"]
tokens = [{ sha256 = "{token:deploy-agent}", expires = 2099-01-01T00:00:00Z }]

[identities.operator]
kind = "human"
groups = ["operators"]
roles = ["llmops"]
may = ["operate", "ledger.read"]
tokens = [{ sha256 = "{token:operator}", expires = 2099-01-01T00:00:00Z }]
"""
SERVICE_MAY: Final = """
path "ssh/sign/*"             { capabilities = ["update"] }
path "ssh/config/ca"          { capabilities = ["read"] }
path "auth/token/lookup-self" { capabilities = ["read"] }
path "auth/token/renew-self"  { capabilities = ["update"] }
"""
CUTOVER_MAY: Final = """
path "ssh/roles"              { capabilities = ["list"] }
path "ssh/roles/*"            { capabilities = ["read"] }
path "ssh/config/ca"          { capabilities = ["read"] }
path "ssh/sign/*"             { capabilities = ["update"] }
path "auth/token/lookup-self" { capabilities = ["read"] }
"""
SSH_HOST: Final = """\
Host {name}
    HostName {host}
    Port {port}
    User {user}
    UserKnownHostsFile {known_hosts}
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    UpdateHostKeys no
    BatchMode yes
    IdentityFile none
    LogLevel ERROR
"""

Tables = dict[str, dict[str, object]]


def facts(platform: Platform, changes: Mapping[str, object]) -> tuple[Tables, list[dict[str, object]]]:
    """Tables and targets of cutover.toml.

    `changes` by table and name with `__` between, such as `decommission__soak="1s"`; of a target `smoke_edge1__port`.
    None leaves out.
    """
    service = platform.service
    program, *words = service.engine.compose_command
    tables: dict[str, dict[str, object]] = {
        "": {"evidence_dir": str(platform.evidence_dir)},
        "compose": {
            "command": [Path(program).name, *words],
            "engine": service.engine.program,
            "project": service.project,
            "base": str(platform.base),
            "overlay": str(platform.overlay),
            "service": API,
            "environment": dict(service.variables),
        },
        "preflight": {"script": str(hosts.SCRIPT), "arguments": ["--sshd-elsewhere"]},
        "signer": {
            "address": service.address,
            "token_file": str(service.token_file("operator")),
            "policy_file": str(service.policy_file),
            "role": "llmops",
        },
        "vault": {
            "address": platform.bao.address,
            "token_file": str(platform.tokens["cutover"]),
            "mount": "ssh",
            "roles": ["llmops"],
        },
        "decommission": {
            "soak": "72h",
            "admin_token_file": str(platform.tokens["admin"]),
            "audit_log": str(platform.bao.audit_file),
            "stop_command": list(platform.bao.stop_command),
        },
    }
    targets: list[dict[str, object]] = [
        {
            "name": name,
            "host": LOOPBACK,
            "port": sshd.port,
            "user": sshd.user,
            "known_hosts": str(sshd.known_hosts),
            "trusted_ca_file": str(sshd.folder / "trusted_ca"),
        }
        for name, sshd in platform.targets.items()
    ]
    for place, value in changes.items():
        table, _, name = place.rpartition("__")
        if table.startswith("smoke_"):  # smoke_edge1__trusted_ca_file
            (found,) = [target for target in targets if target["name"] == table.removeprefix("smoke_")]
        else:
            found = tables[table]
        found[name] = value
    return tables, targets


def render_toml(tables: Mapping[str, Mapping[str, object]], targets: Sequence[Mapping[str, object]]) -> str:
    lines = []
    for head, table in [
        *((f"[{name}]" if name else "", table) for name, table in tables.items()),
        *(("[[smoke]]", target) for target in targets),
    ]:
        lines += [head, *(f"{name} = {_render_value(value)}" for name, value in table.items() if value is not None), ""]
    return "\n".join(lines).lstrip()


def _render_value(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_render_value(one)}" for name, one in value.items()) + " }"
    return json.dumps(value)  # TOML's texts, numbers and lists of them are written as JSON's are
