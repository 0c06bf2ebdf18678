"""The bodies of the native API that are not a reply of the keeper's; those are in `protocol/replies.py`.

/api/openapi.json is made from both. Only the bodies that callers send are validated here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_Text = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Problem(_Strict):
    """RFC 9457. `code` is stable, `hint` the next action, `request_id` is in the ledger and the log, too."""

    type: Literal["about:blank"]
    title: str
    status: int
    detail: str
    code: str
    hint: str
    request_id: str


class FreezeBody(_Strict):
    """What to freeze, and why."""

    scope: Annotated[_Text, Field(description="all, identity:NAME or role:NAME")]
    reason: Annotated[str, Field(min_length=1, max_length=500, description="one line for the ledger")]


class Alive(_Strict):
    """The api's process answers."""

    status: Literal["ok"]
