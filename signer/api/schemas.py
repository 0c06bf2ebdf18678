"""The bodies that the API makes itself; those of commands and replies are in `protocol`.

/api/openapi.json is generated from all of them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)


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


class CallerToken(_Strict):
    """The credential of a request."""

    expires: Annotated[str | None, Field(description="when it ends; null if it does not end")]


class WhoAmI(_Strict):
    """The caller, as policy.toml knows it: roles it may ask for, groups, and rights (`may`)."""

    identity: str
    kind: Literal["human", "agent", "workload"]
    roles: list[str]
    groups: list[str]
    may: list[str]
    token: CallerToken
