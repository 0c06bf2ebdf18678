"""Commands that change the ledger without signing: freeze, unfreeze, and the record of an operation. Pure.

Each requires a right of policy.toml and becomes one event, which `core.py` commits before the reply.
"""

from __future__ import annotations

from collections.abc import Mapping

from signer.authority.queries import check_scope, require
from signer.errors import BadRequest, NotFound, Refused
from signer.model import Event, Finding, Identity, hide_tokens
from signer.policy.decide import Policy
from signer.protocol.commands import Freeze, RecordOperation, Unfreeze
from signer.protocol.operations import operation_event
from signer.protocol.replies import FreezeState


def freeze(
    command: Freeze | Unfreeze, identity: Identity, policy: Policy, freezes: dict[str, str]
) -> tuple[FreezeState, Event]:
    """Changes `freezes`; returns the reply and the event. Raises `Refused` or `NotFound`."""
    scope = command.scope
    if isinstance(command, Freeze):
        check_scope(scope, policy)
        freezes[scope] = reason = hide_tokens(command.reason)  # everybody whom it stops is told
        body: dict[str, object] = {"scope": scope, "reason": reason}
        return FreezeState(scope=scope, frozen=True), Event("freeze.set", identity.name, body)
    if scope not in freezes:
        raise NotFound("not_frozen", f"{scope[:80]} is not frozen", "see GET /api/freezes")
    del freezes[scope]
    return FreezeState(scope=scope, frozen=False), Event("freeze.lifted", identity.name, {"scope": scope})


def refuse_frozen(freezes: Mapping[str, str], identity: str, role: str) -> None:
    """Raises `Refused` if the identity, the role or everything is frozen."""
    for scope in ("all", f"identity:{identity}", f"role:{role}"):
        if scope in freezes:
            raise Refused("frozen", f"{scope} is frozen: {freezes[scope]}", "ask the operator who froze it")


def explain_freezes(freezes: Mapping[str, str], identity: str, role: str) -> tuple[Finding, Refused | None]:
    """The finding, and the refusal, of `refuse_frozen`."""
    try:
        refuse_frozen(freezes, identity, role)
    except Refused as refusal:
        return Finding("freezes", refusal.text, "refused"), refusal
    return Finding("freezes", "none for this identity and role", "ok"), None


def record(command: RecordOperation, identity: Identity) -> Event:
    """The event of an operation; raises `Refused` or `BadRequest`.

    Neither a freeze nor a late clock prevents it: the operation has already happened.
    """
    require(identity, "operate")
    if isinstance(command.operation, BadRequest):
        raise command.operation
    return operation_event(command.operation, identity, command.caller)
