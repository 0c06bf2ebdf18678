"""The JSON bodies of commands, but for a sign request's: their models, and how a decoded body is validated. Pure.

A body is defined once: the keeper validates with the model that /api/openapi.json is made from.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from signer.errors import BadRequest
from signer.model import (
    MAX_HOST_PRINCIPALS,
    MAX_PUBLIC_KEY,
    MAX_REASON,
    PRINCIPAL,
    Assertion,
    Revocation,
    RevokedBy,
)
from signer.protocol.sign_request import DURATION, PRINTABLE, Number, malformed_field, read_number
from signer.units import parse_duration, parse_timestamp

MAX_SIGNATURE: Final = 16_384  # characters of an armored signature
MAX_REFERENCE: Final = 200  # characters
_HEX: Final = "^[0-9a-f]{64}$"
_BASE64URL: Final = "^[A-Za-z0-9_-]+$"
UNTIL: Final = "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$"
SHORTEST_FREEZE: Final = 60  # seconds
LONGEST_FREEZE: Final = 30 * 86_400  # seconds; without an end a freeze lasts until it is lifted
MAX_HOST_NAMES: Final = 8  # of one host, its addresses included
MAX_HOST_KEYS: Final = 8  # of one host
MAX_HOST_NAME: Final = 261  # characters: a name of 253, brackets and a port
MAX_SERIAL: Final = 2**64 - 1
_FINGERPRINT: Final = re.compile(r"SHA256:[A-Za-z0-9+/]{43}", re.ASCII)
_SERIALS: Final = re.compile(r"([0-9]{1,20})(?:-([0-9]{1,20}))?", re.ASCII)

_Model = TypeVar("_Model", bound=BaseModel)


class Body(BaseModel):
    """The base of all bodies but a sign request's: unknown and mistyped fields are refused.

    Its validator is made when the first body is read, as most processes read none.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)


def _printable(text: str) -> str:
    if not text.isprintable():
        raise PydanticCustomError("not_printable", "must be one printable line")
    return text


Printable = Annotated[str, AfterValidator(_printable), Field(json_schema_extra={"pattern": PRINTABLE})]
Reason = Annotated[Printable, Field(max_length=MAX_REASON, description="one printable line for the ledger")]


def read_body_as(model: type[_Model], fields: dict[str, Any]) -> _Model:
    """Validates a decoded body; raises `BadRequest` that names the first invalid field."""
    try:
        return model.model_validate(_with_numbers(fields))
    except ValidationError as error:
        raise malformed_field(error) from None


def _with_numbers(value: Any) -> Any:
    """A decoded body with its numbers as such; pydantic would take a `Number` for text."""
    if isinstance(value, Number):
        return read_number(value)
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    if isinstance(value, dict):
        return {name: _with_numbers(item) for name, item in value.items()}
    return value


# --- requests, waivers and incidents ----------------------------------------------------------------------------------


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


# --- freezes ----------------------------------------------------------------------------------------------------------


def _lasts(text: str) -> str:
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise PydanticCustomError("not_a_duration", "{why}", {"why": str(error)}) from None
    if not SHORTEST_FREEZE <= seconds <= LONGEST_FREEZE:
        raise PydanticCustomError("freeze_lasts", "must be between 1m and 30d")
    return text


class FreezeBody(Body):
    """The scope to freeze, the reason, and for how long; without `lasts` until it is lifted."""

    scope: Annotated[Printable, Field(min_length=1, max_length=256, description="all, identity:NAME or role:NAME")]
    reason: Annotated[Reason, Field(min_length=1)]
    lasts: Annotated[
        str | None,
        AfterValidator(lambda text: None if text is None else _lasts(text)),
        Field(description="from 1m to 30d, such as 90s, 15m or 1h30m", json_schema_extra={"pattern": DURATION}),
    ] = None

    def seconds(self) -> int | None:
        """How long the freeze lasts; None until it is lifted."""
        return None if self.lasts is None else parse_duration(self.lasts)


# --- hosts ------------------------------------------------------------------------------------------------------------


_Name = Annotated[Printable, Field(min_length=1, max_length=MAX_HOST_NAME)]
_Key = Annotated[Printable, Field(min_length=1, max_length=MAX_PUBLIC_KEY)]
# What no certificate can have, as openapi.json shows it; `parse_host_principals` refuses it with its own code.
_Principal = Annotated[str, Field(json_schema_extra={"pattern": f"^{PRINCIPAL.pattern}$"})]


class HostKeysBody(Body):
    """A host, its public keys and the principals that it lets in. `replace` must be true for a host that is listed
    already with other names or keys; other principals take the place of the recorded ones without it."""

    name: Annotated[_Name, Field(description="a host name or an address, [NAME]:PORT for another port than 22")]
    addresses: Annotated[list[_Name], Field(max_length=MAX_HOST_NAMES - 1, description="its other names")] = []
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


# --- revocations ------------------------------------------------------------------------------------------------------


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
