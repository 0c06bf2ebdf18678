"""What tests of the modes vault and shadow share: the token of the service, and what its ledger and log hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.parts.service import Service

RIGHTS = """
path "{mount}/sign/*" {{ capabilities = ["update"] }}
path "{mount}/config/ca" {{ capabilities = ["read"] }}
path "auth/token/lookup-self" {{ capabilities = ["read"] }}
path "auth/token/renew-self" {{ capabilities = ["update"] }}
"""


def write_token(path: Path, token: str) -> None:
    fresh = path.with_suffix(".fresh")
    fresh.touch(0o600)
    fresh.write_text(token + "\n")
    fresh.rename(path)


def recorded(service: Service) -> dict[str, dict[str, Any]]:
    """Every certificate in the ledger, by serial."""
    listed = service.command("certs", "list", "--limit", "500", "--json")
    return {row["serial"]: row for row in json.loads(listed.stdout)["certificates"]}


def no_secret_in(service: Service, *tokens: str) -> None:
    events = service.command("ledger", "export").stdout
    keeper = service.keeper_pid()
    shown = (
        Path(f"/proc/{keeper}/cmdline").read_bytes().decode() + Path(f"/proc/{keeper}/environ").read_bytes().decode()
    )
    for token in tokens:
        assert token not in service.log()
        assert token not in events
        assert token not in shown
