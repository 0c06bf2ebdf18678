"""What a run of an operation needs beside its steps: a ledger to record it, and a reporter that is silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from signer.errors import Unavailable


class Ledger:
    """Holds what is recorded; `is_down` and `loses_answers` as a service may."""

    def __init__(self) -> None:
        self.held: list[dict[str, Any]] = []
        self.is_down = False
        self.loses_answers = False

    def record(
        self, operation: str, outcome: str, plan: str = "", evidence: str = "", reason: str = ""
    ) -> dict[str, Any]:
        self._meet()
        entry = {"seq": len(self.held) + 1, "hash": "ab" * 32, "time": "2027-01-15T08:00:00Z", "operation": operation}
        self.held.append({**entry, "outcome": outcome, "plan": plan, "evidence": evidence, "reason": reason})
        if self.loses_answers:
            self.loses_answers = False
            raise Unavailable("service_closed", "closed without an answer", "look")
        return self.held[-1]

    def operations(self, evidence: str | None = None) -> list[dict[str, Any]]:
        self._meet()
        return [entry for entry in self.held if evidence in (None, entry["evidence"])]

    def _meet(self) -> None:
        if self.is_down:
            raise Unavailable("service_down", "nobody answers", "start it")


class SilentReporter:
    """Takes every report and prints nothing."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_args, **_rest: None
