"""The body of `POST /api/freezes`. Pure."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from signer.protocol.bodies import Body, Printable, Reason
from signer.protocol.sign_request import DURATION
from signer.units import parse_duration

SHORTEST_FREEZE: Final = 60  # seconds
LONGEST_FREEZE: Final = 30 * 86_400  # seconds; without an end a freeze lasts until it is lifted


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
