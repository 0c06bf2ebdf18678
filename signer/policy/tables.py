"""What policy.toml may hold, table by table, before any of it is believed; and the list of what is wrong with it.

The pydantic models say names, types and "not empty"; what depends on more than one key is checked in `policy/file.py`.
Nothing is required here, so that one fault does not hide the next: what must be there is checked there too. Pure.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from signer.model import IdentityKind
from signer.units import parse_duration


def _duration(raw: object) -> int:
    if not isinstance(raw, str):
        raise ValueError('a duration is text such as "15m"')  # noqa: TRY004 - pydantic collects ValueError
    return parse_duration(raw)


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Duration = Annotated[int, BeforeValidator(_duration)]
Names = Annotated[list[str], Field(min_length=1)]


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


class RawAllowed(Table):
    allowed: Names


class RawApproval(Table):
    for_: Annotated[list[IdentityKind], Field(alias="for", min_length=1)]
    by: Names
    valid_for: Duration


class RawLimits(Table):
    per_minute: Annotated[int, Field(ge=1)] | None = None
    live: Annotated[int, Field(ge=1)] | None = None


class RawRole(Table):
    principals: Names | None = None
    default_principals: Names | None = None
    default_ttl: Duration | None = None
    max_ttl: Duration | None = None
    key_types: Names | None = None
    rsa_min_bits: int = 3072
    extensions: RawChoice | None = None
    critical_options: RawAllowed | None = None
    force_command: str | None = None
    source_address: Literal["caller"] | Names | None = None
    verify_required: bool = False
    no_touch_required: bool = False
    allow_key_id: bool = False
    reason_required: bool = False
    approval: RawApproval | None = None
    limits: RawLimits = RawLimits()


class RawToken(Table):
    sha256: str | None = None
    expires: datetime | None = None


class RawIdentity(Table):
    kind: IdentityKind | None = None
    groups: Names | None = None
    roles: Names | None = None
    may: Names | None = None
    tokens: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None


Place = tuple[str | int, ...]
_T = TypeVar("_T", bound=Table)


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One fault of the file: its line (0 when it has none), the key's dotted path, a sentence."""

    line: int
    where: str
    text: str

    def __str__(self) -> str:
        return f"line {self.line:<4} {self.where:<36} {self.text}"


class Faults:
    """Collects problems with their place in the file."""

    def __init__(self, places: dict[Place, int]) -> None:
        self._places = places
        self.found: list[Problem] = []

    def add(self, place: Place, text: str) -> None:
        known = next((place[:n] for n in range(len(place), 0, -1) if place[:n] in self._places), ())
        where = ".".join(str(part) for part in place)
        self.found.append(Problem(self._places.get(known, 0), where, text))

    def table(self, kind: type[_T], place: Place, data: object) -> _T:
        """The table as its type; every fault of it is noted, and the keys that have one are left unset."""
        if not isinstance(data, dict):
            self.add(place, "is not a table")
            return kind()
        try:
            return kind.model_validate(data)
        except ValidationError as error:
            faults = error.errors(include_url=False, include_input=False, include_context=False)
        sentences: dict[Place, list[str]] = {}
        for fault in faults:  # a key that may be one of two things has a fault for each of them
            sentence = _sentence(kind, fault["type"], fault["loc"], fault["msg"])
            sentences.setdefault(_inside(fault["loc"], data), []).append(sentence)
        for at, told in sentences.items():
            self.add(place + at, " or ".join(dict.fromkeys(told)))
        bad = {fault["loc"][0] for fault in faults}
        return kind.model_validate({key: value for key, value in data.items() if key not in bad})

    def require(self, place: Place, data: object, *keys: str) -> None:
        """Notes each of `keys` that the file does not have."""
        for key in keys:
            if isinstance(data, dict) and key not in data:
                self.add((*place, key), "is missing")


def _inside(loc: tuple[int | str, ...], data: object) -> Place:
    """pydantic's location without the parts that name a union's branch instead of a key."""
    place: list[str | int] = []
    for part in loc:
        if isinstance(data, dict) and part in data:
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif part is not loc[-1] or not isinstance(data, dict):
            continue
        place.append(part)
    return tuple(place)


def _sentence(kind: type[Table], fault: str, loc: tuple[int | str, ...], message: str) -> str:
    if fault == "extra_forbidden":
        names = [info.alias or name for name, info in kind.model_fields.items()]
        near = difflib.get_close_matches(str(loc[-1]), names, 1)
        return "unknown key" + (f", did you mean {near[0]}" if near else "")
    if fault == "missing":
        return "is missing"
    if fault == "too_short":
        return "is empty, and empty means nobody: name at least one, or leave the key out"
    return message.removeprefix("Value error, ").replace("Input should be", "must be").rstrip(".")
