"""The bodies of the routes below /api/requests, /api/waivers and /api/incidents. Pure."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from signer.model import MAX_PUBLIC_KEY
from signer.protocol.bodies import Printable, Reason

MAX_SIGNATURE: Final = 16_384  # characters of an armored signature
MAX_REFERENCE: Final = 200  # characters
_HEX: Final = "^[0-9a-f]{64}$"
UNTIL: Final = "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ClaimBody(_Body):
    """The key to certify, and the secret if the request is bound to one."""

    public_key: Annotated[str, Field(max_length=MAX_PUBLIC_KEY, description="the line of an OpenSSH .pub file")] = ""
    claim_secret: Annotated[str | None, Field(pattern=_HEX, description="32 bytes in hex")] = None


class WaiverBody(_Body):
    """How long a waiver lasts and how many certificates it covers, exactly as signed."""

    until: Annotated[str, Field(pattern=UNTIL, description="at most 4 hours from now")]
    uses: Annotated[int, Field(description="1 to 20")]


class ApproveBody(_Body):
    """A signature over the statement of an approval, as `ssh-keygen -Y sign` makes it, and the waiver in it."""

    signature: Annotated[str, Field(max_length=MAX_SIGNATURE, description="armored, -----BEGIN SSH SIGNATURE-----")]
    waiver: WaiverBody | None = None


class DenyBody(_Body):
    """Why a request is denied; the asker reads it."""

    reason: Reason = ""


class WithdrawBody(_Body):
    """Nothing."""


class EndBody(_Body):
    """Why a waiver is ended."""

    reason: Reason = ""


class CloseBody(_Body):
    """The commit that brings the change back into the repository."""

    reference: Annotated[
        Printable, Field(min_length=1, max_length=MAX_REFERENCE, description="a commit, or a link to it")
    ]
