"""Reads the token and the address of an HTTP request's sender, and generates request ids. Pure."""

from __future__ import annotations

import ipaddress
import re
import uuid
from collections.abc import Mapping
from typing import Any, Final

from signer.model import CONSOLE_PREFIX
from signer.protocol.commands import normalize_address
from signer.settings import Proxies

Environ = Mapping[str, Any]
MAX_TOKEN: Final = 256  # characters; a token has 53
MAX_COOKIES: Final = 4_096  # characters of a Cookie field; other services of the host may have set some
CONSOLE: Final = "/console"  # below which, and nowhere else, cookies are read
COOKIE: Final = "signer_console"
SECURE_COOKIE: Final = f"__Host-{COOKIE}"  # which only an answer by TLS can set
MAX_HOP: Final = 64  # characters of an address with its port
_WITH_PORT: Final = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?|([0-9.]+):[0-9]{1,5}", re.ASCII)
UNREADABLE: Final = "?"  # replaces text that cannot be a token and might not fit into a message


def read_token(environ: Environ) -> str | None:
    """The token of `X-Vault-Token`, else of `Authorization: Bearer` (case-sensitive, as in Vault).

    The credential of a console session is not one: it is good below `/console` only, as a cookie.
    """
    token = str(environ.get("HTTP_X_VAULT_TOKEN", ""))
    authorization = str(environ.get("HTTP_AUTHORIZATION", ""))
    if not token and authorization.startswith("Bearer "):
        token = authorization.removeprefix("Bearer ").strip()
    return UNREADABLE if token.startswith(CONSOLE_PREFIX) else bounded_token(token)


def bounded_token(token: str) -> str | None:
    """The text of a token, or `UNREADABLE` for one that cannot be; None if it is empty."""
    if len(token) > MAX_TOKEN or not token.isascii():
        return UNREADABLE
    return token or None


def is_of_console(path: str) -> bool:
    """Whether a path, as it was sent, is one of the console's."""
    return path == CONSOLE or path.startswith(f"{CONSOLE}/")


def read_session(environ: Environ, *, only_secure: bool = False) -> str | None:
    """The credential of the console session in the Cookie field (RFC 6265 section 4.2.1); None without one.

    A name that comes twice counts as none: the other cookie may be another site's. `only_secure` leaves out the cookie
    that plain http can set.
    """
    field = str(environ.get("HTTP_COOKIE", ""))
    if len(field) > MAX_COOKIES:
        return None
    pairs = [part.strip().partition("=") for part in field.split(";")]
    for wanted in (SECURE_COOKIE,) if only_secure else (SECURE_COOKIE, COOKIE):
        found = [value for name, _, value in pairs if name == wanted]
        if found:
            is_one = len(found) == 1 and found[0].startswith(CONSOLE_PREFIX)
            return bounded_token(found[0]) if is_one else None
    return None


def read_address(environ: Environ, proxies: Proxies) -> str | None:
    """The caller's IP address: the peer's, or the last one in X-Forwarded-For that is not a trusted proxy's.

    None if it is unknown: a unix socket of a user who is not a proxy, or a proxy without the header. An invalid entry
    ends the search, because the entries before it come from an untrusted sender.
    """
    peer = str(environ.get("REMOTE_ADDR", ""))
    if peer and not proxies.networks:
        return normalize_address(peer)
    if not peer and environ.get("REMOTE_UID") not in proxies.users:
        return None
    forwarded = [part.strip() for part in str(environ.get("HTTP_X_FORWARDED_FOR", "")).split(",")]
    for hop in reversed([*forwarded, peer] if peer else forwarded):
        address = normalize_address(_without_port(hop))
        if address is None:
            return None
        if not any(ipaddress.ip_address(address) in network for network in proxies.networks):
            return address
    return None


def _without_port(hop: str) -> str:
    """An entry of X-Forwarded-For without the port that some proxies add: `192.0.2.7:1`, `[2001:db8::7]:1`."""
    if len(hop) > MAX_HOP or (match := _WITH_PORT.fullmatch(hop)) is None:
        return hop
    return match[1] or match[2]


def new_request_id() -> str:
    """A random UUID (RFC 9562, version 4) for one request; the response, the log and the ledger contain it."""
    return str(uuid.uuid4())


def message_header(op: str, environ: Environ, proxies: Proxies, request_id: str) -> dict[str, object]:
    """The fields that every keeper command has about its sender."""
    return {
        "op": op,
        "token": read_token(environ),
        "address": read_address(environ, proxies),
        "request_id": request_id,
    }
