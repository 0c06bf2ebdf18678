"""The tables of policy.toml as raw models: names, types and non-empty lists.

`file.py` checks required keys and everything that depends on more than one key, so that one problem does not hide
another. Pure.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from signer.model import BACKDATE, ApprovalKeyKind, IdentityKind
from signer.toml import Duration, Names, Table


class RawPolicy(Table):
    ca: Any = None
    roles: Any = None
    identities: Any = None


class RawCaKey(Table):
    fingerprint: str
    public_key: str


class RawCa(Table):
    fingerprint: str | None = None
    public_key: str | None = None
    next: RawCaKey | None = None
    retired: Annotated[list[RawCaKey], Field(min_length=1)] | None = None


class RawChoice(Table):
    allowed: Names
    default: Names | None = None
    values: dict[str, str] | None = None
    unlisted: Literal["refuse", "drop"] = "refuse"


class RawAllowed(Table):
    allowed: Names


class RawApproval(Table):
    for_: Annotated[list[IdentityKind], Field(alias="for", min_length=1)]
    by: Names
    valid_for: Duration
    count: Annotated[int, Field(ge=1)] = 1
    waivers: bool = True
    with_: Annotated[list[ApprovalKeyKind] | None, Field(alias="with", min_length=1)] = None


class RawLimits(Table):
    per_minute: Annotated[int, Field(ge=1)] | None = None
    live: Annotated[int, Field(ge=1)] | None = None


class RawRole(Table):
    principals: Names | None = None
    default_principals: Names | None = None
    default_ttl: Duration | None = None
    max_ttl: Duration | None = None
    key_types: Names | None = None
    keys: Names | None = None
    rsa_min_bits: int = 3072
    extensions: RawChoice | None = None
    critical_options: RawAllowed | None = None
    force_command: str | None = None
    source_address: Literal["caller"] | Names | None = None
    verify_required: bool = False
    no_touch_required: bool = False
    allow_key_id: bool = False
    reason_required: bool = False
    backdate: Duration = BACKDATE
    approval: RawApproval | None = None
    presence: bool = False
    break_glass: bool = False
    limits: RawLimits = RawLimits()


class RawToken(Table):
    sha256: str | None = None
    expires: datetime | None = None


class RawApprovalKey(Table):
    kind: ApprovalKeyKind
    key: str | None = None
    software: bool = False
    verify: bool = False
    id: str | None = None
    public_key: str | None = None
    rp: str | None = None
    origins: Names | None = None


class RawIdentity(Table):
    kind: IdentityKind | None = None
    groups: Names | None = None
    roles: Names | None = None
    may: Names | None = None
    keys: Names | None = None
    approval_keys: Annotated[list[RawApprovalKey], Field(min_length=1)] | None = None
    tokens: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
