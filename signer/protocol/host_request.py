"""The body of `POST /api/host-keys`. Pure."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from signer.model import MAX_PUBLIC_KEY
from signer.protocol.bodies import Printable

MAX_HOST_NAMES: Final = 8  # of one host, its addresses included
MAX_HOST_KEYS: Final = 8  # of one host
MAX_HOST_NAME: Final = 261  # characters: a name of 253, brackets and a port

_Name = Annotated[Printable, Field(min_length=1, max_length=MAX_HOST_NAME)]
_Key = Annotated[Printable, Field(min_length=1, max_length=MAX_PUBLIC_KEY)]


class HostKeysBody(BaseModel):
    """A host and its public keys. `replace` must be true for a host that is listed already."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)

    name: Annotated[_Name, Field(description="a host name or an address, [NAME]:PORT for another port than 22")]
    addresses: Annotated[list[_Name], Field(max_length=MAX_HOST_NAMES - 1, description="its other names")] = []
    keys: Annotated[
        list[_Key], Field(min_length=1, max_length=MAX_HOST_KEYS, description="lines of ssh_host_*_key.pub")
    ]
    replace: Annotated[bool, Field(description="true: take the place of the keys that are listed")] = False
