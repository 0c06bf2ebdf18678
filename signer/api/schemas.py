"""The bodies of the native API except the keeper's replies, which are in `protocol/replies.py`.

/api/openapi.json is generated from both. Only request bodies are validated here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_Text = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Problem(_Strict):
    """RFC 9457. `code` is stable, `hint` the next action, the ledger and the log contain `request_id`."""

    type: Literal["about:blank"]
    title: str
    status: int
    detail: str
    code: str
    hint: str
    request_id: str


class FreezeBody(_Strict):
    """The scope to freeze and the reason."""

    scope: Annotated[_Text, Field(description="all, identity:NAME or role:NAME")]
    reason: Annotated[str, Field(min_length=1, max_length=500, description="one line for the ledger")]


class Alive(_Strict):
    """The API process responds."""

    status: Literal["ok"]
