"""`signer whoami`: asks the running service whose a token is."""

from __future__ import annotations

from pathlib import Path

from signer.cli import output
from signer.cli.connection import connection_options, open_api
from signer.cli.parser import verb


@verb("whoami", "signer whoami --token-file operator.token")
@connection_options
def whoami(address: str | None, token_file: Path | None, as_json: bool) -> None:
    """Shows the identity of the token, its roles, groups and rights, and when the token ends. Times are UTC."""
    with open_api(address, token_file) as client:
        caller = client.whoami()
    if as_json:
        output.show_json(caller)
        return
    token = caller.get("token")
    ends = token.get("expires") if isinstance(token, dict) else None
    rows = [("identity", caller.get("identity")), ("kind", caller.get("kind"))]
    rows += [(name, _listed(caller.get(name))) for name in ("roles", "groups", "may")]
    output.show_table([*rows, ("token ends", ends or "never")])


def _listed(values: object) -> str:
    return ", ".join(map(str, values)) if isinstance(values, list) and values else "none"
