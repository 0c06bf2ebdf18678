"""What the JSON bodies of commands share: the validation of a decoded body, and the text of a reason. Pure.

A body is defined once: the keeper validates with the model that /api/openapi.json is made from.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from signer.errors import BadRequest
from signer.model import MAX_REASON
from signer.protocol.sign_request import PRINTABLE, Number, read_number

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
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:64]
        raise BadRequest(
            "field_malformed", f"field {where!a}: {first['msg'][:1].lower()}{first['msg'][1:]}", "see /api/openapi.json"
        ) from None


def _with_numbers(value: Any) -> Any:
    """A decoded body with its numbers as such; pydantic would take a `Number` for text."""
    if isinstance(value, Number):
        return read_number(value)
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    if isinstance(value, dict):
        return {name: _with_numbers(item) for name, item in value.items()}
    return value
