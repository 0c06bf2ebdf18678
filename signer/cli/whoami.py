"""`signer whoami`: asks the running service whose a token is."""

from __future__ import annotations

from signer.cli import output
from signer.cli.connection import Service, service_options
from signer.cli.parser import verb


@verb("whoami", "signer whoami --token-file operator.token")
@service_options
def whoami(service: Service, as_json: bool) -> None:
    """Shows the identity of the token, its roles, groups and rights, and when the token ends. Times are UTC."""
    with service.open() as client:
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
