"""Events as the core makes them, for tests of what keeps them."""

from __future__ import annotations

from typing import Any

from signer.model import Event


def issued(serial: int, **changes: Any) -> Event:
    """A certificate's record; `changes` are to its body."""
    body: dict[str, object] = {
        "serial": str(serial),
        "backend": "local",
        "identity": "deploy-agent",
        "kind": "agent",
        "role": "llmops",
        "principals": ["backup", "llmops"],
        "key_id": "deploy-agent:llmops",
        "key_type": "ssh-ed25519",
        "fingerprint": "SHA256:" + "A" * 43,
        "valid_after": 1_800_000_000 - 30,
        "valid_before": 1_800_000_000 + 900,
        "critical_options": {},
        "extensions": ["permit-pty"],
        "reason": None,
        "address": "192.0.2.7",
        "request_id": "r-1",
        "policy": "0" * 64,
        "ca": "SHA256:" + "B" * 43,
        "to_be_signed_sha256": "1" * 64,
        **changes,
    }
    return Event("certificate.issued", str(body["identity"]), body)


def withheld(serial: int) -> Event:
    return Event("certificate.withheld", "deploy-agent", {"serial": str(serial), "error": "RuntimeError"})


def freeze(scope: str, reason: str = "drill") -> Event:
    return Event("freeze.set", "operator", {"scope": scope, "reason": reason})


def thaw(scope: str) -> Event:
    return Event("freeze.lifted", "operator", {"scope": scope})


def refused(text: str = "role llmops does not allow principal root") -> Event:
    body: dict[str, object] = {"code": "principal_not_allowed", "text": text, "role": "llmops", "address": ""}
    return Event("request.refused", "deploy-agent", {**body, "request_id": "r-2"})
