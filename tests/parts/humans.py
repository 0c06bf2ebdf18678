"""A stand-in for a service whose role asks humans: requests, waits, claims and decisions, as the native API has them.

The tests decide in place of the humans; `Signer` certifies by `ssh-keygen -s`.
"""

from __future__ import annotations

import re
import secrets
import socket
import threading
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

from signer.ssh.statement import request_digest
from tests.parts.standin import Asked, Signer, Standin, http, problem

PLACE = re.compile(r"(GET|POST) (/api/[^ ?]*)(?:\?([^ ]*))? HTTP/1.1")
OVER = ("denied", "expired", "withdrawn", "lapsed", "issued")


class ThreadedStandin(Standin):
    """Each connection in a thread of its own, so that a decision can end somebody's wait."""

    def _answer(self, link: socket.socket) -> None:
        own = link.dup()
        threading.Thread(target=self._answer_alone, args=(own,), daemon=True).start()

    def _answer_alone(self, link: socket.socket) -> None:
        try:
            super()._answer(link)
        except OSError:
            self.broken_off += 1


class Humans:
    """The handler. `requests` are all of them by id; `identity` asks, `approvers` may decide."""

    def __init__(self, signer: Signer, *, presence_keys: list[str] | None = None) -> None:
        self.signer = signer
        self.identity, self.kind = "deploy-agent", "agent"
        self.approvers = ["anna", "ben"]
        self.presence_keys = presence_keys
        self.requests: dict[str, dict[str, Any]] = {}
        self.signatures: list[str] = []
        self._changed = threading.Condition()

    # --- what the humans do -------------------------------------------------------------------------------------

    def wait_for(self, count: int = 1, state: str = "pending", seconds: float = 60) -> dict[str, Any]:
        """The newest request in `state`, once there are `count`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = [request for request in list(self.requests.values()) if request["state"] == state]
            if len(found) >= count:
                return found[-1]
            time.sleep(0.01)
        raise AssertionError(f"no {count} requests {state}: {self.requests}")

    def decide(self, state: str, by: str = "anna", why: str = "") -> str:
        """Decides the newest pending request; returns its id."""
        asked = self.wait_for()
        with self._changed:
            asked["state"] = state
            if state == "denied":
                asked["denied"] = {"by": by, "why": why}
            elif state == "approved":
                asked["approvals"] = [{"by": by, "at": "2026-11-29T09:00:00Z"}]
            self._changed.notify_all()
        return str(asked["request"])

    # --- the API ------------------------------------------------------------------------------------------------

    def __call__(self, asked: Asked) -> bytes:
        if not asked.line:  # interrupted before it asked
            return b""
        match = PLACE.fullmatch(asked.line)
        assert match, asked.line
        method, path, query = match[1], match[2], match[3] or ""
        if path == "/api/whoami":
            return http(200, {"identity": self.identity, "kind": self.kind, "roles": ["llmops"], "groups": [],
                              "may": [], "token": {"expires": "2099-01-01T00:00:00Z"}})  # fmt: skip
        if path == "/api/requests":
            assert query == f"identity={self.identity}"
            return http(200, {"requests": list(self.requests.values())[::-1], "before": None})
        words = path.split("/")[2:]
        if words[0] == "sign":
            return self._sign(asked, words[1])
        request = self.requests.get(words[1])
        if request is None:
            return problem(404, f"there is no request {words[1]}", code="unknown_request")
        if method == "GET":
            with self._changed:
                if wait := re.search(r"wait=(\d+)", query):
                    self._changed.wait_for(lambda: request["state"] != "pending", int(wait[1]))
            return http(200, request)
        return getattr(self, f"_{words[2]}")(asked, request)  # type: ignore[no-any-return]

    def _sign(self, asked: Asked, role: str) -> bytes:
        body = asked.body
        assert set(body) >= {"public_key", "claim_sha256"}, body
        ask = {name: value for name, value in body.items() if name != "public_key"} | {"role": role}
        for request in list(self.requests.values()):
            is_same = request["ask"] == ask
            if is_same and request["state"] == "denied":
                return problem(403, f"{request['denied']['by']} denied it", code="request_denied")
            if is_same and request["state"] in ("pending", "approved"):
                return http(202, request)
        name = "r-" + "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz234567") for _ in range(10))
        frozen = {
            "id": name, "nonce": secrets.token_hex(16), "asked": "2026-11-29T09:00:00Z",
            "expires": "2026-11-29T10:00:00Z", "policy": "sha256:" + 64 * "0", "identity": self.identity,
            "kind": self.kind, "role": role, "key_id": f"{self.identity}:{role}", "principals": ["llmops"],
            "critical_options": body.get("critical_options", {}), "extensions": {"permit-pty": ""},
            "ttl": body.get("ttl", 900), "reason": body.get("reason"), "address": "127.0.0.1",
            "binding": {"claim_sha256": body["claim_sha256"]},
        }  # fmt: skip
        self.requests[name] = {
            "request": name, "state": "pending", "digest": request_digest(frozen), "frozen": frozen,
            "expires": frozen["expires"], "claim_by": None, "may_approve": self.approvers, "needs": 1,
            "presence": "missing" if self.presence_keys is not None else None, "approvals": [], "denied": None,
            "waiver": None, "serial": None, "asked_today": 1, "retry_after_s": 10, "presence_keys": self.presence_keys,
            "next": {"wait": f"/api/requests/{name}?wait=50", "claim": f"/api/requests/{name}/claim"}, "ask": ask,
        }  # fmt: skip
        return http(202, self.requests[name])

    def _claim(self, asked: Asked, request: dict[str, Any]) -> bytes:
        secret = bytes.fromhex(str(asked.body["claim_secret"]))
        if sha256(secret).hexdigest() != request["frozen"]["binding"]["claim_sha256"]:
            return problem(403, "the secret is wrong", code="claim_secret_wrong")
        if request["state"] == "pending":
            return http(202, request)
        if request["state"] != "approved":
            return problem(409, "it is over", code=f"request_{request['state']}")
        request["state"] = "issued"
        return http(201, self.signer.issue(asked))

    def _withdraw(self, _: Asked, request: dict[str, Any]) -> bytes:
        if request["state"] in OVER:
            return problem(409, "it is over", code=f"request_{request['state']}")
        request["state"] = "withdrawn"
        return http(200, request)

    def _approve(self, asked: Asked, request: dict[str, Any]) -> bytes:
        self.signatures.append(str(asked.body["signature"]))
        request["presence"] = "given"
        request["state"] = "approved"
        return http(200, request)


def kept_secrets(runtime: Path) -> list[Path]:
    """The files with claim secrets below a runtime folder."""
    return sorted((runtime / "safe-session-claims").glob("*"))
