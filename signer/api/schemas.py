"""The bodies that the API makes itself; those of commands and replies are in `protocol`.

/api/openapi.json is generated from all of them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


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


class Alive(_Strict):
    """The API process responds."""

    status: Literal["ok"]
