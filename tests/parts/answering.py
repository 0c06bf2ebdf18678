"""A core in this process that answers `signer` commands in place of a keeper and its API, for transcripts."""

from __future__ import annotations

import json
import re
import time
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from signer.api.native import who_am_i
from signer.api.openapi import ROUTES
from signer.api_client import ApiClient
from signer.ca.service_key import ServiceKey
from signer.errors import NotFound, SignerError
from signer.ledger.checkpoint import NOTE_KIND, Checkpoint, Note, VerifierKey, sign_note
from signer.ledger.lookups import FindEntries
from signer.protocol.client import KeeperClient
from signer.protocol.commands import read_command
from signer.protocol.replies import CallerDetails, Reply, decode_reply
from signer.service.hosts_seen import Fetch
from signer.service.list_builder import Built
from signer.service.overview import hosts_reply
from signer.service.publisher import LIST_NAMESPACE, STATEMENT_NAMESPACE, ListState, render_statement
from signer.ssh.krl import RevocationList, encode_krl
from signer.ssh.sshsig import sign_armored
from tests.parts.builders import Bench, looked_up, token
from tests.parts.witnessed import LOG


def _header_of(method: str, target: str) -> dict[str, object]:
    """The fields of the keeper's command for a request of the native API."""
    path, _, query = target.partition("?")
    for route in ROUTES:
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", route.path)
        if method == route.method and (found := re.fullmatch(pattern, path)) is not None:
            fields = {key: int(value) if key in ("after", "limit") else value for key, value in parse_qsl(query)}
            return {
                "op": route.op,
                **fields,
                **{route.named or name: unquote(value) for name, value in found.groupdict().items()},
            }
    raise AssertionError(f"no such route: {method} {target}")


def answer_commands(environ: pytest.MonkeyPatch, folder: Path) -> None:
    """From now on the policy of `tests.parts.builders` decides; writes operator.token and deploy-agent.token."""
    bench = Bench()
    for name in ("operator", "deploy-agent"):
        (folder / f"{name}.token").write_text(token(name))
        (folder / f"{name}.token").chmod(0o600)

    def handle(header: dict[str, object], body: bytes, local_user: str | None) -> Reply:
        command = read_command({"request_id": "r-1", **header}, body, lambda _caller: None, local_user)
        ((_, found),) = bench.core.run([command])
        reply = looked_up(found, bench.store)
        if isinstance(reply, SignerError):
            raise reply
        if isinstance(reply, FindEntries):  # the query reader's work
            reply = decode_reply(reply.answer(bench.store))
        assert isinstance(reply, Reply)
        return reply

    def ask_locally(_client: KeeperClient, header: dict[str, object], body: bytes = b"") -> Reply:
        return handle(header, body, "root" if header.get("local") is True else None)

    def ask_api(client: ApiClient, method: str, path: str, body: dict[str, object] | None = None) -> dict[str, Any]:
        if path == "/api/hosts":
            return fetched_hosts()
        header = {**_header_of(method, path), "token": client._read_token()}
        reply = handle(header, json.dumps(body).encode(), None)
        if isinstance(reply, CallerDetails):
            return who_am_i(reply).model_dump()
        return reply.model_dump(exclude_unset=True)

    environ.setattr(KeeperClient, "ask", ask_locally)
    files = published_files()

    def fetch(_client: ApiClient, name: str, _most: int) -> bytes:
        if name not in files:
            raise NotFound("unknown_route", "no such path", "see GET /api/openapi.json")
        return files[name]

    environ.setattr(ApiClient, "_ask", ask_api)
    environ.setattr(ApiClient, "file", fetch)


def fetched_hosts() -> dict[str, Any]:
    """What the API says of three hosts: one is up to date, one behind, and one was not seen for hours."""
    now = int(time.time())
    seen = (("edge1", 12, now - 20), ("edge2", 11, now - 40), ("old", 7, now - 7200))
    published = ListState(12, now - 10, 12)
    return hosts_reply(published, [Fetch(name, version, at, "") for name, version, at in seen]).model_dump()


def published_files(version: int = 12, as_of: int = 1_740_000_600) -> dict[str, bytes]:
    """What the API shows to hosts, signed by a key that is the same in every run."""
    secret = Ed25519PrivateKey.from_private_bytes(sha256(b"publishing").digest())
    key = ServiceKey(secret, "signer-publishing", is_new=False)
    krl = encode_krl(RevocationList(version, as_of - 60))
    statement = render_statement(Built(version, sha256(krl).hexdigest()), as_of)
    signatures = {
        f"{name}.sig": sign_armored(content, namespace, key.raw_public, key.sign).encode()
        for name, content, namespace in (
            ("krl", krl, LIST_NAMESPACE),
            ("krl.statement", statement, STATEMENT_NAMESPACE),
        )
    }
    line = f"{key.line}\n".encode()
    checkpoint = Checkpoint("signer.example.org/ledger", 4711, sha256(b"root").digest())
    log_key = VerifierKey(checkpoint.origin, NOTE_KIND, LOG.raw_public)
    note = Note(checkpoint.text, (sign_note(checkpoint.text, log_key, LOG.sign),)).render()
    return {
        "ca": b"ssh-ed25519 AAAA\n",
        "krl": krl,
        "krl.statement": statement,
        "krl.publisher": line,
        "ledger/checkpoint": note,
        **signatures,
    }
