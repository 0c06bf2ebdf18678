"""The approval phrases of the operations: asked for after the plan was shown, never read from a file or a variable.

The typed text is compared and forgotten: no error, event or file repeats it.
"""

from __future__ import annotations

import hmac
import os
import pwd
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Final

from signer.errors import ApprovalRefused
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
    """Who approved which plan, where, when and in which way."""

    operation: Operation
    plan: str
    who: str
    where: str
    at: str
    way: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def ask_approval(plan: Plan, given: str | None, ask: Callable[[], str] | None, now: int) -> Approval:
    """The approval of exactly this plan; raises `ApprovalRefused`.

    `given` is the word after `--approve`. Without it `ask` shows the plan to a person at a terminal and returns what
    they type; it is None where there is no terminal, since what comes through a pipe is no approval.
    """
    way = "--approve"
    if given is None:
        if ask is None:
            raise ApprovalRefused(
                "approval_missing", "no approval was given, and this is no terminal to ask at", *_where(plan)
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
    """The person as far as the system knows: the user of `sudo` if there is one, with the user of this process."""
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        user = str(os.geteuid())
    behind = os.environ.get("SUDO_USER", "")
    return f"{behind} as {user}" if behind and behind != user and behind.isprintable() else user
