"""How a verb reaches the service: over HTTP with a token, or, on its own host, the keeper's socket without one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from signer.cli.arguments import FILE
from signer.errors import BadSettings, SignerError

if TYPE_CHECKING:
    from signer.api_client import ApiClient

_ADDRESS, _TOKEN_FILE = "SAFE_SESSION_ADDR", "SAFE_SESSION_TOKEN_FILE"
address_option: Final = click.option(
    "--address", metavar="URL", help=f"the service; default: {_ADDRESS}, or the one on this host"
)
_token_option: Final = click.option(
    "--token-file", type=FILE, metavar="FILE", help=f"your token; default: {_TOKEN_FILE}"
)


@dataclass(frozen=True, slots=True)
class Service:
    """The service and the token that the command line names; None where it leaves them to the environment."""

    address: str | None = None
    token_file: Path | None = None

    @property
    def has_token(self) -> bool:
        """Whether the command line or the environment names a token."""
        return self.token_file is not None or bool(os.environ.get(_TOKEN_FILE))

    @property
    def is_local(self) -> bool:
        """Whether only the environment may say where the service is, and that is this host, or nothing says it."""
        from signer.address import is_this_machine, parse_address

        place = os.environ.get(_ADDRESS)
        if self.address is not None or not place:
            return self.address is None
        try:
            found = parse_address(place)
        except SignerError:
            return False
        return found.host == "localhost" or is_this_machine(found.host)

    def open(self) -> ApiClient:
        """A client with the token, for a `with` statement; raises `BadSettings`."""
        given_by, token_file = "--token-file", self.token_file
        if token_file is None:
            given_by, name = _TOKEN_FILE, os.environ.get(_TOKEN_FILE)
            if not name:
                hint = f"give --token-file, or set {_TOKEN_FILE}"
                raise BadSettings("token_file_missing", "no token was given", hint)
            token_file = Path(name)
        return self._client(token_file, (_ADDRESS if self.address is None else "--address", given_by))

    def open_public(self) -> ApiClient:
        """A client of what the service shows to all, for a `with` statement; raises `BadSettings`."""
        return self._client(None, (_ADDRESS, _TOKEN_FILE))

    def _client(self, token_file: Path | None, settings: tuple[str, str]) -> ApiClient:
        from signer.api_client import ApiClient
        from signer.safe_session.settings import default_address

        place = self.address or os.environ.get(_ADDRESS) or default_address()
        return ApiClient(place, token_file, settings=settings)


def service_options(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Adds `--address` and `--token-file`, which default to the settings of `safe-session`, as the value `service`."""

    @wraps(function)
    def call(*, address: str | None, token_file: Path | None, **values: Any) -> int | None:
        return function(service=Service(address, token_file), **values)

    return address_option(_token_option(call))
