"""What an HTTP request says of its sender: token, address, and the number we give the request. Pure."""

from __future__ import annotations

import ipaddress
import uuid
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from signer.settings import Network

Environ = Mapping[str, Any]
MAX_TOKEN: Final = 256  # characters; ours have 53
MAX_ADDRESS: Final = 64  # characters; an IPv6 address has 45 at most
UNREADABLE: Final = "?"  # in the place of text that cannot be one, and might not fit into a message


def read_token(environ: Environ) -> str | None:
    """The token of `X-Vault-Token`, else of `Authorization: Bearer` (the word is case-sensitive, as Vault has it)."""
    token = str(environ.get("HTTP_X_VAULT_TOKEN", ""))
    authorization = str(environ.get("HTTP_AUTHORIZATION", ""))
    if not token and authorization.startswith("Bearer "):
        token = authorization.removeprefix("Bearer ").strip()
    if len(token) > MAX_TOKEN or not token.isascii():
        return UNREADABLE
    return token or None


def read_address(environ: Environ, proxies: tuple[Network, ...]) -> str | None:
    """The caller's IP address: the peer's, or the last one in X-Forwarded-For that no trusted proxy has.

    None when it is not known: a unix socket, or a proxy that does not say. A wrong entry ends the search, because
    what stands before it was written by somebody we do not know.
    """
    peer = str(environ.get("REMOTE_ADDR", ""))
    if not proxies:
        return _known(peer)
    forwarded = [part.strip() for part in str(environ.get("HTTP_X_FORWARDED_FOR", "")).split(",")]
    hops = [*forwarded, peer] if peer else forwarded
    for hop in reversed(hops):
        address = _known(hop)
        if address is None:
            return None
        if not any(ipaddress.ip_address(address) in network for network in proxies):
            return address
    return None


def _known(text: str) -> str | None:
    return _read_ip(text) if len(text) < MAX_ADDRESS else None  # or long texts of a caller's would stay in memory


@lru_cache(maxsize=1024)
def _read_ip(text: str) -> str | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:  # names a network card of whoever wrote it: no address to pin
            return None
        return str(address.ipv4_mapped or address)
    return str(address)


def new_request_id() -> str:
    """A random number for one request; it is in the answer, in the log and in the ledger."""
    return str(uuid.uuid4())


def message_header(op: str, environ: Environ, proxies: tuple[Network, ...], request_id: str) -> dict[str, object]:
    """What every command to the keeper says of its sender."""
    return {
        "op": op,
        "token": read_token(environ),
        "address": read_address(environ, proxies),
        "request_id": request_id,
    }
