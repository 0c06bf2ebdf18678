"""Vault's system paths: health, seal status, leader, mounts and token lookup.

signer has no seal: "sealed" means that the keeper cannot sign now.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from signer import __version__
from signer.api.request import read_token
from signer.api.vault import responses
from signer.api.vault.responses import HEADERS, REFUSALS, HttpResponse
from signer.errors import SignerError
from signer.protocol.client import KeeperClient
from signer.protocol.replies import CallerDetails, Ready

UNAUTHENTICATED: Final = frozenset({"sys/health", "sys/seal-status", "sys/leader", "sys/init"})


def unauthenticated(environ: Mapping[str, Any], path: str, keeper: KeeperClient) -> HttpResponse:
    """The response for a path in `UNAUTHENTICATED`, used by monitors and `bao status`."""
    method = environ["REQUEST_METHOD"]
    if path == "sys/health" and str(environ.get("HTTP_X_VAULT_NAMESPACE") or "").strip("/") not in ("", "root"):
        return responses.failure(400, "operation unavailable in namespaces")
    if method != "GET" and not (method == "HEAD" and path == "sys/health"):
        return responses.failure(405)
    if path == "sys/leader":
        return _plain({"ha_enabled": False})
    if path == "sys/init":
        return _plain({"initialized": True})
    ready, cluster = _look(keeper)
    if path == "sys/health":
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return _plain(
            {
                "initialized": True,
                "sealed": not ready,
                "standby": False,
                "replication_performance_mode": "disabled",
                "replication_dr_mode": "disabled",
                "server_time_utc": int(time.time()),
                "version": __version__,
                **cluster,
            },
            status.value,
        )
    return _plain(
        {
            "type": "signer",
            "initialized": True,
            "sealed": not ready,
            "t": 0,
            "n": 0,
            "progress": 0,
            "nonce": "",
            "recovery_seal": False,
            "version": __version__,
            "migration": False,
            **cluster,
            "storage_type": "ledger",
        }
    )


def _look(keeper: KeeperClient) -> tuple[bool, dict[str, str]]:
    """Whether the keeper can sign now, and Vault's cluster fields."""
    cluster = {"cluster_name": "signer"}
    try:
        health = keeper.ask({"op": "health"})
    except SignerError:
        return False, cluster
    if not isinstance(health, Ready):
        return False, cluster
    return True, {**cluster, "cluster_id": responses.issuer_id(health.ca_fingerprint)}


def _plain(body: Mapping[str, object], status: int = 200) -> HttpResponse:
    return HttpResponse(status, HEADERS, (responses.go_json(body) + "\n").encode())


def route(
    path: str,
    operation: str,
    mounts: tuple[str, ...],
    whoami: CallerDetails,
    environ: Mapping[str, Any],
    request_id: str,
) -> HttpResponse:
    """The response for every other path outside the mounts; the caller is authenticated."""
    if path == "auth/token/lookup-self" and operation in ("read", "update"):
        return responses.success(_token(whoami, read_token(environ) or ""), request_id)
    if path == "auth/token/lookup-self":
        return responses.unsupported_operation()
    if path == "sys/mounts" and operation == "read":
        return _mounts(mounts, request_id)
    if path.startswith("sys/mounts/") and operation in ("update", "delete"):
        return responses.failure(405, REFUSALS["mounts"])
    if path.startswith(("auth/token/", "sys/")):
        return responses.unsupported_path()
    return responses.failure(404, f'no handler for route "{path}". route entry not found.')


def _token(whoami: CallerDetails, token: str) -> dict[str, Any]:
    """A token in Vault's terms: policies are its roles, unrecorded fields are 0."""
    return {
        "accessor": whoami.accessor,
        "creation_time": 0,
        "creation_ttl": 0,
        "display_name": whoami.identity,
        "entity_id": "",
        "expire_time": whoami.expires,
        "explicit_max_ttl": 0,
        "id": token,
        "issue_time": None,
        "meta": {"kind": whoami.kind},
        "num_uses": 0,
        "orphan": True,
        "path": "auth/token/create",
        "policies": whoami.roles,
        "renewable": False,
        "ttl": whoami.expires_in,
        "type": "service",
    }


def _mounts(mounts: tuple[str, ...], request_id: str) -> HttpResponse:
    """The mounts at top level and under `data`, as Vault returns them for old and new clients."""
    config = {"default_lease_ttl": 0, "force_no_cache": False, "max_lease_ttl": 0}
    table = {
        f"{mount}/": {
            "accessor": f"ssh_{index}",
            "config": config,
            "description": "SSH user certificates by signer",
            "external_entropy_access": False,
            "local": False,
            "options": None,
            "plugin_version": "",
            "running_plugin_version": __version__,
            "running_sha256": "",
            "seal_wrap": False,
            "type": "ssh",
            "uuid": "",
        }
        for index, mount in enumerate(sorted(mounts))
    }
    head = responses.go_json(table).removesuffix("}").encode()
    return HttpResponse(200, HEADERS, head + b"," + responses.envelope(table, request_id).removeprefix(b"{"))
