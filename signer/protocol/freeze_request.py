"""The body of `POST /api/freezes`. Pure."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from signer.protocol.bodies import Printable, Reason


class FreezeBody(BaseModel):
    """The scope to freeze and the reason."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    scope: Annotated[Printable, Field(min_length=1, max_length=256, description="all, identity:NAME or role:NAME")]
    reason: Annotated[Reason, Field(min_length=1)]
