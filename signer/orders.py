"""What changes the ledger besides signing: a freeze, its end, and what an operator did to the platform. Pure.

Each needs a right of policy.toml, and is an event that `core.py` commits before anybody is told.
"""

from __future__ import annotations

from signer.commands import Freeze, Record, Unfreeze
from signer.errors import BadRequest, NotFound
from signer.model import Event, Identity
from signer.operations import operation_event
from signer.policy import Policy
from signer.queries import Answer, check_scope, require


def freeze(
    command: Freeze | Unfreeze, identity: Identity, policy: Policy, freezes: dict[str, str]
) -> tuple[Answer, Event]:
    """Changes `freezes`; the reply and the record of it. Raises `Refused` or `NotFound`."""
    scope = command.scope
    if isinstance(command, Freeze):
        check_scope(scope, policy)
        freezes[scope] = command.reason
        body: dict[str, object] = {"scope": scope, "reason": command.reason}
        return {"scope": scope, "frozen": True}, Event("freeze.set", identity.name, body)
    if scope not in freezes:
        raise NotFound("not_frozen", f"{scope[:80]} is not frozen", "see GET /api/freezes")
    del freezes[scope]
    return {"scope": scope, "frozen": False}, Event("freeze.lifted", identity.name, {"scope": scope})


def record(command: Record, identity: Identity) -> Event:
    """The record of an operation; raises `Refused` or `BadRequest`.

    Neither a freeze nor a clock that is behind stops it: what was done has happened already.
    """
    require(identity, "operate")
    if isinstance(command.operation, BadRequest):
        raise command.operation
    return operation_event(command.operation, identity, command.caller)
