"""The body of `POST /api/host-keys`. Pure."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from signer.model import MAX_HOST_PRINCIPALS, MAX_PUBLIC_KEY, PRINCIPAL
from signer.protocol.bodies import Body, Printable

MAX_HOST_NAMES: Final = 8  # of one host, its addresses included
MAX_HOST_KEYS: Final = 8  # of one host
MAX_HOST_NAME: Final = 261  # characters: a name of 253, brackets and a port

_Name = Annotated[Printable, Field(min_length=1, max_length=MAX_HOST_NAME)]
_Key = Annotated[Printable, Field(min_length=1, max_length=MAX_PUBLIC_KEY)]
# What no certificate can have, as openapi.json shows it; `parse_host_principals` refuses it with its own code.
_Principal = Annotated[str, Field(json_schema_extra={"pattern": f"^{PRINCIPAL.pattern}$"})]


class HostKeysBody(Body):
    """A host, its public keys and the principals that it lets in. `replace` must be true for a host that is listed
    already with other names or keys; other principals take the place of the recorded ones without it."""

    name: Annotated[_Name, Field(description="a host name or an address, [NAME]:PORT for another port than 22")]
    addresses: Annotated[list[_Name], Field(max_length=MAX_HOST_NAMES - 1, description="its other names")] = []  # noqa: RUF012
    keys: Annotated[
        list[_Key], Field(min_length=1, max_length=MAX_HOST_KEYS, description="lines of ssh_host_*_key.pub")
    ]
    replace: Annotated[bool, Field(description="true: take the place of the keys that are listed")] = False
    principals: Annotated[
        list[_Principal] | None,
        Field(
            json_schema_extra={"minItems": 1, "maxItems": MAX_HOST_PRINCIPALS},
            description="the names in its principals files; null: those that are recorded stay",
        ),
    ] = None
