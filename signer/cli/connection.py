"""How a verb reaches the service: over HTTP with a token, or, on its own host, the keeper's socket without one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from signer.cli.arguments import FILE
from signer.errors import BadSettings, SignerError

if TYPE_CHECKING:
    from signer.api_client import ApiClient

_Function = TypeVar("_Function", bound=Callable[..., Any])
_ADDRESS, _TOKEN_FILE = "SAFE_SESSION_ADDR", "SAFE_SESSION_TOKEN_FILE"


def connection_options(function: _Function) -> _Function:
    """Adds `--address` and `--token-file`, which default to the settings of `safe-session`."""
    address = click.option(
        "--address", metavar="URL", help=f"the service; default: {_ADDRESS}, or the one on this host"
    )
    token = click.option("--token-file", type=FILE, metavar="FILE", help=f"your token; default: {_TOKEN_FILE}")
    return address(token(function))


def has_token(token_file: Path | None) -> bool:
    """Whether the command line or the environment names a token."""
    return token_file is not None or bool(os.environ.get(_TOKEN_FILE))


def names_this_host(address: str | None) -> bool:
    """Whether only the environment may say where the service is, and that is this host, or nothing says it."""
    from signer.address import is_this_machine, parse_address

    if address is not None:
        return False
    place = os.environ.get(_ADDRESS)
    if not place:
        return True
    try:
        found = parse_address(place)
    except SignerError:
        return False
    return found.scheme == "unix" or found.host == "localhost" or is_this_machine(found.host)


def address_option(function: _Function) -> _Function:
    """Adds `--address` alone, for what needs no token."""
    text = f"the service; default: {_ADDRESS}, or the one on this host"
    return click.option("--address", metavar="URL", help=text)(function)


def open_public(address: str | None) -> ApiClient:
    """A client of what the service shows to all, for a `with` statement; raises `BadSettings`."""
    from signer.api_client import ApiClient
    from signer.safe_session.settings import default_address

    place = address or os.environ.get(_ADDRESS) or default_address()
    return ApiClient(place, None, settings=(_ADDRESS, _TOKEN_FILE))


def open_api(address: str | None, token_file: Path | None) -> ApiClient:
    """A client of the service, for a `with` statement; raises `BadSettings`."""
    from signer.api_client import ApiClient
    from signer.safe_session.settings import default_address

    given_by = "--token-file"
    if token_file is None:
        given_by = _TOKEN_FILE
        name = os.environ.get(_TOKEN_FILE)
        if not name:
            raise BadSettings("token_file_missing", "no token was given", f"give --token-file, or set {_TOKEN_FILE}")
        token_file = Path(name)
    place = address or os.environ.get(_ADDRESS) or default_address()
    return ApiClient(place, token_file, settings=(_ADDRESS if address is None else "--address", given_by))
