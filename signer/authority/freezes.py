"""Commands that change the ledger without signing: freeze, unfreeze, and the record of an operation. Pure.

Each becomes one event, which `core.py` commits before the reply. To freeze is the safe direction: it needs less than to
lift a freeze.
"""

from __future__ import annotations

from collections.abc import Mapping

from signer.authority.queries import check_scope, require
from signer.errors import BadRequest, NotFound, Refused
from signer.model import ActiveFreeze, Event, Finding, Identity, hide_tokens
from signer.policy.decide import Policy
from signer.protocol.commands import Freeze, RecordOperation, Unfreeze
from signer.protocol.operations import operation_event
from signer.protocol.replies import FreezeState
from signer.units import timestamp

Freezes = dict[str, ActiveFreeze]  # by scope


def local_identity(user: str) -> Identity:
    """Root or the keeper's user on this host, who needs no token: may freeze, and see what is frozen."""
    none = frozenset[str]()
    return Identity(f"local:{user}", "human", none, none, frozenset({"freeze"}))


def freeze(
    command: Freeze, identity: Identity, policy: Policy, freezes: Freezes, now: int
) -> tuple[FreezeState, Event]:
    """Adds to `freezes`; returns the reply and the event. Raises `Refused`.

    A scope that is frozen stays so at least as long as before.
    """
    scope = command.scope
    if identity.kind != "agent":
        require(identity, "freeze")
    elif scope != f"identity:{identity.name}":  # which it may without the right
        raise Refused("freeze_only_itself", f"{identity.name} is an agent and freezes only itself", "ask a human")
    check_scope(scope, policy)
    until = None if command.seconds is None else now + command.seconds
    earlier = freezes.get(scope)
    if earlier is not None and until is not None:
        until = None if earlier.until is None else max(until, earlier.until)
    reason = hide_tokens(command.reason)  # everybody whom it stops is told
    freezes[scope] = ActiveFreeze(reason, identity.name, now, until)
    body: dict[str, object] = {"scope": scope, "reason": reason}
    if until is None:
        return FreezeState(scope=scope, frozen=True), Event("freeze.set", identity.name, body)
    state = FreezeState(scope=scope, frozen=True, until=timestamp(until))
    return state, Event("freeze.set", identity.name, {**body, "until": until})


def unfreeze(command: Unfreeze, identity: Identity, freezes: Freezes) -> tuple[FreezeState, Event]:
    """Removes from `freezes`; returns the reply and the event. Raises `Refused` or `NotFound`.

    Nobody lifts what stops themselves by name, agents lift nothing, and a local user needs a token like all others.
    """
    scope, own = command.scope, f"identity:{identity.name}"
    if identity.kind == "agent":
        raise Refused("unfreeze_needs_human", f"{identity.name} is an agent and lifts no freeze", "ask a human")
    require(identity, "freeze")
    if own in freezes:
        raise Refused(
            "frozen_by_name",
            f"{identity.name} is frozen and lifts no freeze: {freezes[own].reason}",
            "ask another human with the right freeze",
        )
    if scope not in freezes:
        raise NotFound("not_frozen", f"{scope[:80]} is not frozen", "see `signer freezes`, or GET /api/freezes")
    del freezes[scope]
    return FreezeState(scope=scope, frozen=False), Event("freeze.lifted", identity.name, {"scope": scope})


def ended(freezes: Freezes, now: int) -> list[Event]:
    """The events of freezes whose time is over."""
    return [
        Event("freeze.lifted", "keeper", {"scope": scope, "until": freeze.until})
        for scope, freeze in freezes.items()
        if freeze.until is not None and freeze.until <= now
    ]


def refuse_frozen(freezes: Mapping[str, ActiveFreeze], identity: str, role: str) -> None:
    """Raises `Refused` if the identity, the role or everything is frozen."""
    if not freezes:
        return
    for scope in ("all", f"identity:{identity}", f"role:{role}"):
        found = freezes.get(scope)
        if found is not None:
            end = "" if found.until is None else f" until {timestamp(found.until)}"
            raise Refused("frozen", f"{scope} is frozen{end}: {found.reason}", "ask the operator who froze it")


def explain_freezes(freezes: Mapping[str, ActiveFreeze], identity: str, role: str) -> tuple[Finding, Refused | None]:
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
