"""The body of `POST /api/revocations`, and what it may revoke. Pure."""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import Field

from signer.errors import BadRequest
from signer.model import Revocation, RevokedBy
from signer.protocol.bodies import Body, Printable, Reason
from signer.units import parse_timestamp

MAX_SERIAL: Final = 2**64 - 1
_FINGERPRINT: Final = re.compile(r"SHA256:[A-Za-z0-9+/]{43}", re.ASCII)
_SERIALS: Final = re.compile(r"([0-9]{1,20})(?:-([0-9]{1,20}))?", re.ASCII)
_VALUES: Final = {
    "serial": "a serial N, or a range N-M of 1 to 2**64 - 1",
    "identity": "the name of an identity",
    "since": "a time such as 2027-01-15T08:00:00Z",
    "key": "a fingerprint SHA256:… of 50 characters",
    "ca": "a fingerprint SHA256:… of 50 characters",
}


class RevokeBody(Body):
    """What to revoke, and why. It cannot be taken back."""

    by: Annotated[RevokedBy, Field(description="what `value` names")]
    value: Annotated[
        Printable,
        Field(
            min_length=1,
            max_length=256,
            description="serial: N or N-M; identity: a name; since: a time in RFC 3339; key and ca: SHA256:…",
        ),
    ]
    reason: Annotated[Reason, Field(min_length=1)]

    def revocation(self) -> Revocation:
        """What is revoked; raises `BadRequest`."""
        return read_revocation(self.by, self.value)


def read_revocation(by: str, value: str) -> Revocation:
    """What is revoked, from two texts; raises `BadRequest`."""
    found = None
    if by == "serial" and (match := _SERIALS.fullmatch(value)) is not None:
        first, last = int(match[1]), int(match[2] or match[1])
        found = Revocation("serial", first=first, last=last) if 0 < first <= last <= MAX_SERIAL else None
    elif by == "since":
        try:
            since = parse_timestamp(value) if value.endswith("Z") else -1
        except (ValueError, OverflowError):
            since = -1
        found = Revocation("since", since=since) if since >= 0 else None
    elif by in ("key", "ca") and _FINGERPRINT.fullmatch(value):
        found = Revocation("key" if by == "key" else "ca", value)
    elif by == "identity" and len(value) <= 64:
        found = Revocation("identity", value)
    if found is None:
        meant = _VALUES.get(by)
        text = f"{value[:80]!a} is not {meant}" if meant else f"by is not one of {', '.join(_VALUES)}"
        raise BadRequest("field_malformed", text, "see /api/openapi.json")
    return found
