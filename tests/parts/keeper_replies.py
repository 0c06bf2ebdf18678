"""What a keeper answers to `signer status`, made by the code that makes it in the service."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from signer.authority.core import StateOverview
from signer.errors import SignerError, Unavailable
from signer.model import ActiveFreeze, CaKeys, Head, Token
from signer.policy.decide import Policy
from signer.service.hosts_seen import Fetch
from signer.service.overview import Overview
from signer.service.publisher import ListState
from signer.settings import Settings

BEGAN = 1_740_000_000
TOKENS = (Token("deploy-agent", "4a" * 32, BEGAN + 86_400), Token("operator", "5b" * 32, BEGAN + 90 * 86_400))


def overview(*, frozen: bool = False, has_state: bool = True, live: int = 3) -> Overview:
    """A keeper of 640 s of age."""
    freezes = {"role:deploy": ActiveFreeze("incident 7", "operator", BEGAN + 60)} if frozen else {}
    state = StateOverview(Head(4711, "ab" * 32, (BEGAN + 600) * 1000), {"llmops": live, "gone": 1}, freezes)
    return Overview(
        now=BEGAN + 640,
        started=BEGAN,
        policy_since=BEGAN + 10,
        key_since=BEGAN,
        connections=2,
        mode="local",
        policy=Policy(
            "4f" * 32,
            CaKeys("SHA256:" + "C" * 43),
            MappingProxyType({"llmops": None, "deploy": None}),  # type: ignore[dict-item]  # only the names are read
            MappingProxyType({}),
            MappingProxyType({token.sha256: token for token in TOKENS}),
        ),
        state=state if has_state else None,
        ledger_bytes=123_456,
        publisher="SHA256:" + "P" * 43,
        published=ListState(12, BEGAN + 600, 12),
        fetches=(Fetch("edge1", 12, BEGAN + 610, "192.0.2.1"), Fetch("edge2", 11, BEGAN + 550, "192.0.2.2")),
    )


def reply(*, fault: SignerError | None = None, **changes: Any) -> dict[str, Any]:
    """The fields of the keeper's reply."""
    fingerprint = "SHA256:" + "C" * 43 if fault is None else None
    return overview(**changes).status(fingerprint, fault).model_dump()


REPLIES = {
    "well": reply(),
    "frozen": reply(frozen=True),
    "broken": reply(
        has_state=False, fault=Unavailable("clock_behind", "this host's clock is 99 s behind", "correct the clock")
    ),
}


def play_status(environ: pytest.MonkeyPatch, _folder: Path, case: str) -> None:
    """A keeper that gives one of the replies, or is down, and an api that answers if the service is well."""

    def converse(_settings: Settings) -> dict[str, Any]:
        if case == "down":
            raise Unavailable("keeper_gone", "the keeper does not answer", "start the service, or see its log")
        return REPLIES[case]

    environ.setattr("signer.service.status._converse", converse)
    answer = "does not answer: connection refused" if case in ("broken", "down") else "answers"
    environ.setattr("signer.service.status.answer_of", lambda _listen, has_tls: answer)
