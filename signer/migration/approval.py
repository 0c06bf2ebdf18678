"""The approval phrases of the operations, requested after the plan was shown; never read from a file or a variable.

The typed text is only compared: no error, event or file contains it.
"""

from __future__ import annotations

import hmac
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from signer.errors import ApprovalRefused
from signer.files import user_name
from signer.migration.plan import Operation, Plan
from signer.units import timestamp

PHRASES: Final[Mapping[Operation, str]] = {
    "cutover": "m04-vault-runtime-cutover-approved",
    "decommission": "m04-vault-destructive-cleanup-approved",
}
_RUNBOOKS: Final[Mapping[Operation, str]] = {
    "cutover": "runbooks/safe-session-local-ca-cutover.md, section 4",
    "decommission": "runbooks/vault-decommission.md, section 4",
}


@dataclass(frozen=True, slots=True)
class Approval:
    operation: Operation
    plan: str
    who: str
    where: str
    at: str
    way: str


def ask_approval(plan: Plan, given: str | None, ask: Callable[[], str] | None, now: int) -> Approval:
    """The approval of exactly this plan; raises `ApprovalRefused`.

    `given` is the value of `--approve`. Without it `ask` shows the plan at a terminal and returns the typed text; it is
    None without a terminal, as input from a pipe is not an approval.
    """
    way = "--approve"
    if given is None:
        if ask is None:
            raise ApprovalRefused(
                "approval_missing", "no approval was given, and there is no terminal to ask at", *_where(plan)
            )
        way, given = "terminal", ask()
    if not _is_phrase(given, plan.operation):
        if any(_is_phrase(given, other) for other in PHRASES if other != plan.operation):
            raise ApprovalRefused(
                "approval_for_another_operation", f"that phrase does not approve a {plan.operation}", *_where(plan)
            )
        raise ApprovalRefused("approval_wrong", "that is not the approval phrase", *_where(plan))
    return Approval(plan.operation, plan.digest, current_operator(), socket.gethostname(), timestamp(now), way)


def _is_phrase(typed: str, operation: Operation) -> bool:
    return hmac.compare_digest(typed.encode(errors="replace"), PHRASES[operation].encode())


def _where(plan: Plan) -> tuple[str, dict[str, object]]:
    """Hint and facts of a refusal."""
    return f"nothing was changed; the phrase is in {_RUNBOOKS[plan.operation]}", {"plan": plan.digest}


def current_operator() -> str:
    """The operator as known to the system: the `sudo` user, if any, and the user of this process."""
    user = user_name(os.geteuid())
    behind = os.environ.get("SUDO_USER", "")
    return f"{behind} as {user}" if behind and behind != user and behind.isprintable() else user
