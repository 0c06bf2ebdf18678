"""A core in this process that answers `signer` commands in place of a keeper and its API, for transcripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from signer.api.native import who_am_i
from signer.api_client import ApiClient
from signer.errors import SignerError
from signer.protocol.client import KeeperClient
from signer.protocol.commands import read_command
from signer.protocol.replies import CallerDetails, Reply
from tests.parts.builders import Bench, token

_ROUTES = {
    ("POST", "/api/freezes"): "freeze",
    ("GET", "/api/freezes"): "freezes",
    ("GET", "/api/whoami"): "whoami",
    ("DELETE", ""): "unfreeze",
}


def answer_commands(environ: pytest.MonkeyPatch, folder: Path) -> None:
    """From now on the policy of `tests.parts.builders` decides; writes operator.token and deploy-agent.token."""
    bench = Bench()
    for name in ("operator", "deploy-agent"):
        (folder / f"{name}.token").write_text(token(name))
        (folder / f"{name}.token").chmod(0o600)

    def handle(header: dict[str, object], body: bytes, local_user: str | None) -> Reply:
        command = read_command({"request_id": "r-1", **header}, body, lambda _caller: None, local_user)
        ((_, reply),) = bench.core.run([command])
        if isinstance(reply, SignerError):
            raise reply
        assert isinstance(reply, Reply)
        return reply

    def ask_locally(_client: KeeperClient, header: dict[str, object], body: bytes = b"") -> Reply:
        return handle(header, body, "root" if header.get("local") is True else None)

    def ask_api(client: ApiClient, method: str, path: str, body: dict[str, object] | None = None) -> dict[str, Any]:
        scope = unquote(path.removeprefix("/api/freezes/")) if method == "DELETE" else None
        header: dict[str, object] = {
            "op": _ROUTES[method, path if scope is None else ""],
            "token": client._read_token(),
        }
        header |= {} if scope is None else {"scope": scope}
        reply = handle(header, json.dumps(body).encode(), None)
        if isinstance(reply, CallerDetails):
            return who_am_i(reply).model_dump()
        return reply.model_dump(exclude_unset=True)

    environ.setattr(KeeperClient, "ask", ask_locally)
    environ.setattr(ApiClient, "_ask", ask_api)
