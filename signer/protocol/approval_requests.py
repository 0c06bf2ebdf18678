"""The bodies of the routes below /api/requests, /api/waivers and /api/incidents. Pure."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from signer.errors import BadRequest
from signer.model import MAX_PUBLIC_KEY, Assertion
from signer.protocol.bodies import Body, Printable, Reason

MAX_SIGNATURE: Final = 16_384  # characters of an armored signature
MAX_REFERENCE: Final = 200  # characters
_HEX: Final = "^[0-9a-f]{64}$"
_BASE64URL: Final = "^[A-Za-z0-9_-]+$"
UNTIL: Final = "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$"


class ClaimBody(Body):
    """The key to certify, and the secret if the request is bound to one."""

    public_key: Annotated[str, Field(max_length=MAX_PUBLIC_KEY, description="the line of an OpenSSH .pub file")] = ""
    claim_secret: Annotated[str | None, Field(pattern=_HEX, description="32 bytes in hex")] = None


class WaiverBody(Body):
    """How long a waiver lasts and how many certificates it covers, exactly as signed."""

    until: Annotated[str, Field(pattern=UNTIL, description="at most 4 hours from now")]
    uses: Annotated[int, Field(description="1 to 20")]


class AssertionBody(Body):
    """A passkey's assertion; its challenge is the SHA-256 of the statement of the approval (WebAuthn Level 3)."""

    id: Annotated[str, Field(pattern=_BASE64URL, max_length=1_364, description="of the credential")]
    authenticator_data: Annotated[str, Field(pattern=_BASE64URL, max_length=128, description="authenticatorData")]
    client_data: Annotated[str, Field(pattern=_BASE64URL, max_length=2_731, description="clientDataJSON")]
    signature: Annotated[str, Field(pattern=_BASE64URL, max_length=128, description="signature")]


class ApproveBody(Body):
    """Either a signature over the statement of an approval, as `ssh-keygen -Y sign` makes it, or a passkey's assertion
    for it; and the waiver in the statement."""

    signature: Annotated[
        str | None, Field(max_length=MAX_SIGNATURE, description="armored, -----BEGIN SSH SIGNATURE-----")
    ] = None
    assertion: AssertionBody | None = None
    waiver: WaiverBody | None = None

    def evidence(self) -> str | Assertion:
        """The signature or the assertion; raises `BadRequest` for both or neither."""
        found = self.signature if self.assertion is None else self.assertion
        if found is None or (self.signature is not None and self.assertion is not None):
            text = "the body needs either a signature or an assertion"
            raise BadRequest("field_malformed", text, "see /api/openapi.json")
        return found if isinstance(found, str) else Assertion(**found.model_dump())


class DenyBody(Body):
    """Why a request is denied; the asker reads it."""

    reason: Reason = ""


class WithdrawBody(Body):
    """Nothing."""


class EndBody(Body):
    """Why a waiver is ended."""

    reason: Reason = ""


class CloseBody(Body):
    """The commit that brings the change back into the repository."""

    reference: Annotated[
        Printable, Field(min_length=1, max_length=MAX_REFERENCE, description="a commit, or a link to it")
    ]
