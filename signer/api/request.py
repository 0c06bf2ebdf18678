"""Reads the token and the address of an HTTP request's sender, and generates request ids. Pure."""

from __future__ import annotations

import ipaddress
import uuid
from collections.abc import Mapping
from typing import Any, Final

from signer.protocol.commands import normalize_address
from signer.settings import Network

Environ = Mapping[str, Any]
MAX_TOKEN: Final = 256  # characters; a token has 53
UNREADABLE: Final = "?"  # replaces text that cannot be a token and might not fit into a message


def read_token(environ: Environ) -> str | None:
    """The token of `X-Vault-Token`, else of `Authorization: Bearer` (case-sensitive, as in Vault)."""
    token = str(environ.get("HTTP_X_VAULT_TOKEN", ""))
    authorization = str(environ.get("HTTP_AUTHORIZATION", ""))
    if not token and authorization.startswith("Bearer "):
        token = authorization.removeprefix("Bearer ").strip()
    if len(token) > MAX_TOKEN or not token.isascii():
        return UNREADABLE
    return token or None


def read_address(environ: Environ, proxies: tuple[Network, ...]) -> str | None:
    """The caller's IP address: the peer's, or the last one in X-Forwarded-For that is not a trusted proxy's.

    None if it is unknown: a unix socket, or a proxy without the header. An invalid entry ends the search, because
    the entries before it come from an untrusted sender.
    """
    peer = str(environ.get("REMOTE_ADDR", ""))
    if not proxies:
        return normalize_address(peer)
    forwarded = [part.strip() for part in str(environ.get("HTTP_X_FORWARDED_FOR", "")).split(",")]
    hops = [*forwarded, peer] if peer else forwarded
    for hop in reversed(hops):
        address = normalize_address(hop)
        if address is None:
            return None
        if not any(ipaddress.ip_address(address) in network for network in proxies):
            return address
    return None


def new_request_id() -> str:
    """A random id for one request; the response, the log and the ledger contain it."""
    return str(uuid.uuid4())


def message_header(op: str, environ: Environ, proxies: tuple[Network, ...], request_id: str) -> dict[str, object]:
    """The fields that every keeper command has about its sender."""
    return {
        "op": op,
        "token": read_token(environ),
        "address": read_address(environ, proxies),
        "request_id": request_id,
    }
