"""Parsers of sign requests: JSON and form bodies, Vault's field coercions, and the native body.

Accepts and refuses what Vault does (`runbooks/develop/vault-contract.md`, sections 1 and 3); `facts["vault"]` of an
error is the sentence for a Vault client. Linear in the length of the body. Pure.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from itertools import chain
from typing import Annotated, Any, Final
from urllib.parse import parse_qs

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from signer.errors import BadRequest
from signer.model import (
    KEY_ID,
    LONGEST_VALIDITY,
    MAX_KEY_ID,
    MAX_PUBLIC_KEY,
    MAX_REASON,
    OPTION_NAMES,
    PRINCIPAL,
    SignRequest,
    hide_tokens,
    may_have_token,
)
from signer.protocol.go_duration import BadDuration, parse_go_duration
from signer.protocol.go_json import (
    MAX_STRINGS,
    has_too_many_strings,
    is_float64,
    is_too_deep,
    unverified_text,
    well_formed,
)
from signer.units import parse_duration

MAX_BODY: Final = 64 * 1024  # bytes
MAX_TTL_SECONDS: Final = 2**31
MAX_SHOWN_NAMES: Final = 64  # unknown fields that a warning names
MAX_SHOWN_NAME: Final = 64  # characters of each
MAX_VALUES: Final = 8  # JSON values in one body; the first one counts
MAX_NESTING: Final = 32  # levels of lists and objects in a map
_BLANK: Final = " \t\r\n"
_BLANKS: Final = re.compile(f"[{_BLANK}]*")
_FORM: Final = "application/x-www-form-urlencoded"
_SPACE: Final = " \t\n\v\f\r"
_PARAMETER: Final = re.compile(r";\s*+[\w.+-]++=(?:[\w.+-]++|\"[^\"]*+\")\s*+", re.ASCII)  # no backtracking
_MALFORMED: Final = "the body is not valid JSON"
_NOT_AN_OBJECT: Final = "the body is not a JSON object"
_TOO_DEEP: Final = "exceeded max depth"
_TOO_COMPLEX: Final = "refused JSON input due to high complexity: exceeded maximum number of strings"
_BAD_PERCENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
# The characters that Go's strings.TrimSpace removes; Python's strip() also removes U+001C to U+001F.
_GO_BLANK: Final = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


class Number(str):
    """A JSON number as text, which Vault's coercions depend on."""

    __slots__ = ()


def decode_body(body: bytes, content_type: str = "") -> dict[str, Any]:
    """Decodes a body: JSON with any Content-Type, or a form; an empty body is `{}`. Raises `BadRequest`."""
    if len(body) > MAX_BODY:
        raise body_too_large()
    if body[:1] == b"{" and body.count(b'"') <= 2 * MAX_STRINGS:
        with suppress(msgspec.DecodeError, UnicodeDecodeError):
            return _PLAIN.decode(body)
    return decode_any_body(body, content_type)


def decode_any_body(body: bytes, content_type: str = "") -> dict[str, Any]:
    """As `decode_body`, also for numbers, lists and what Vault takes besides JSON, in three times the time."""
    text = unverified_text(body).strip(_BLANK)
    if text[:1] not in ("{", "[") and is_form(content_type):  # curl -d sends JSON with the form type
        return _read_form(unverified_text(body).lstrip(_BLANK))
    if not text:
        return {}
    value = _first_value(text)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _bad_json(_NOT_AN_OBJECT)
    return value


def _first_value(text: str) -> object:
    """The first JSON value of a text; raises `BadRequest` if Vault refuses the text.

    The rest must be JSON, but may end between two tokens. Only then does Python's decoder report an error at the end of
    the text: it reports an incomplete token at its beginning.
    """
    if is_too_deep(text):
        raise _bad_json(_TOO_COMPLEX if has_too_many_strings(text) else _TOO_DEEP)
    values: list[object] = []
    at = 0
    try:
        while at < len(text) and len(values) <= MAX_VALUES:
            value, end = _DECODER.raw_decode(text, at)
            values.append(value)
            at = _after_blanks(text, end)
    except json.JSONDecodeError as fault:
        if values and has_too_many_strings(text):
            raise _bad_json(_TOO_COMPLEX) from None
        if not values or fault.pos != len(text):
            raise _bad_json(_MALFORMED) from None
    except RecursionError:
        raise _bad_json(_TOO_DEEP) from None
    if has_too_many_strings(text):
        raise _bad_json(_TOO_COMPLEX)
    if len(values) > MAX_VALUES:
        raise _bad_json(_MALFORMED)
    return values[0]


def _after_blanks(text: str, at: int) -> int:
    blanks = _BLANKS.match(text, at)
    return blanks.end() if blanks else at


def is_form(content_type: str) -> bool:
    """Whether a Content-Type is a form, with valid parameters (RFC 9110, section 8.3.1)."""
    media_type, _, _ = content_type.partition(";")
    if media_type.strip(_SPACE).lower() != _FORM:
        return False
    at = len(media_type)
    while parameter := _PARAMETER.match(content_type, at):
        at = parameter.end()
    return content_type[at:].strip(_SPACE) in ("", ";")


def _read_form(text: str) -> dict[str, Any]:
    """Decodes a form as Go's url.ParseQuery does; the values of a repeated field are joined with commas."""
    if ";" in text or _BAD_PERCENT.search(text):
        raise BadRequest(
            "form_malformed", "the form cannot be parsed", "send a JSON object", {"vault": "error parsing form data"}
        )
    fields = parse_qs(text, keep_blank_values=True, errors="surrogateescape")
    return {name: ",".join(values) for name, values in fields.items()}


def body_too_large() -> BadRequest:
    """The error for a body over the limit; each edge maps it to its own HTTP status."""
    return BadRequest(
        "body_too_large",
        f"the body is larger than {MAX_BODY} bytes",
        "send a smaller body",
        {"vault": "http: request body too large"},
    )


def _reject_constant(_name: str) -> object:
    raise _bad_json(_MALFORMED)


def _read_number(text: str) -> Number:
    if not is_float64(text):
        raise _bad_json(_MALFORMED)
    return Number(text)


_DECODER: Final = json.JSONDecoder(
    parse_float=_read_number, parse_int=_read_number, parse_constant=_reject_constant, strict=True
)


# Reads most bodies: an object of texts and of objects of texts. Where it does not fail, it returns what
# `decode_any_body` returns; a test compares both.
_PLAIN: Final = msgspec.json.Decoder(dict[str, str | bool | dict[str, str] | None])


def _bad_json(problem: str) -> BadRequest:
    vault = problem if problem is _TOO_COMPLEX else f"failed to decode JSON input: {problem}"
    text = problem if problem.startswith("the body") else f"the body cannot be read: {problem}"
    return BadRequest("json_malformed", text, "send a JSON object", {"vault": vault})


# --- Vault's shape ---------------------------------------------------------------------------------------------------

_SIGN_FIELDS: Final = frozenset(
    {
        "public_key",
        "ttl",
        "valid_principals",
        "cert_type",
        "key_id",
        "critical_options",
        "extensions",
        "reason",
    }
)


def read_vault_sign(role: str, fields: dict[str, Any]) -> SignRequest:
    """Vault's `sign/<role>` body, coerced as Vault does; raises `BadRequest` for a field of the wrong type.

    `""` for ttl, valid_principals and key_id counts as unset (hvac always sends it), a deliberate difference.
    """
    principals = _vault_text(fields, "valid_principals")
    asked = SignRequest(
        role=role,
        public_key=_vault_text(fields, "public_key"),
        principals=_split(principals) if principals else None,
        ttl=_vault_duration(fields, "ttl"),
        key_id=_vault_text(fields, "key_id") or None,
        cert_type=_vault_text(fields, "cert_type") if "cert_type" in fields else "user",
        critical_options=_vault_map(fields, "critical_options"),
        extensions=_vault_map(fields, "extensions"),
        reason=_vault_text(fields, "reason") or None,
    )
    _refuse_tokens(asked)
    return asked


def _refuse_tokens(asked: SignRequest) -> None:
    """Raises `BadRequest` for a token in a field of the certificate, which every host would log."""
    options = *asked.critical_options, *asked.extensions
    all_texts = asked.key_id or "", *(asked.principals or ()), *chain.from_iterable(options)
    if not may_have_token("\n".join(all_texts)):
        return
    for field, texts in (
        ("key_id", (asked.key_id or "",)),
        ("principals", asked.principals or ()),
        ("critical_options", [text for option in asked.critical_options for text in option]),
        ("extensions", [text for extension in asked.extensions for text in extension]),
    ):
        if any(hide_tokens(text) != text for text in texts):
            raise BadRequest(
                "token_in_request",
                f"field {field} has a token in it, which would be written into the certificate",
                f"replace that token, and send {field} without it",
                {"vault": f"field {field} has a token in it"},
            )


def vault_sign_warnings(fields: dict[str, Any]) -> list[str]:
    """Vault's warnings about fields that the path ignores."""
    warnings: list[str] = []
    if fields.keys() <= _SIGN_FIELDS:
        return warnings
    if unknown := sorted(well_formed(name) for name in fields.keys() - _SIGN_FIELDS - {"role"}):
        names = " ".join(name[:MAX_SHOWN_NAME] for name in unknown[:MAX_SHOWN_NAMES])
        warnings.append(f"Endpoint ignored these unrecognized parameters: [{names}]")
    if "role" in fields:
        warnings.append(
            "Endpoint replaced the value of these parameters with the values captured from the endpoint's path: [role]"
        )
    return warnings


def _split(text: str) -> tuple[str, ...]:
    return tuple(name for name in (piece.strip(_GO_BLANK) for piece in text.split(",")) if name)


def _field_fault(field: str, problem: str) -> BadRequest:
    return BadRequest(
        "field_malformed",
        f"field {field}: {problem}",
        "see the field's type in runbooks/develop/vault-contract.md, section 1",
        {"vault": f'Field validation failed: error converting input for field "{field}": {problem}'},
    )


def _unconvertible(field: str, wanted: str, value: object, where: str = "") -> BadRequest:
    kind = {dict: "map[string]interface {}", list: "[]interface {}", bool: "bool", str: "string"}.get(
        type(value), "json.Number"
    )
    return _field_fault(field, f"'{where}' expected type '{wanted}', got unconvertible type '{kind}'")


def _vault_text(fields: dict[str, Any], field: str) -> str:
    value = fields.get(field)
    if value is None:
        return ""
    if type(value) is str and value.isascii():
        return value
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, str):
        return str(well_formed(value))  # a `Number` is text from here on
    raise _unconvertible(field, "string", value)


def _vault_map(fields: dict[str, Any], field: str) -> tuple[tuple[str, str], ...]:
    value, merged = fields.get(field), dict[str, str]()
    if value is None:
        return ()
    _merge_maps(field, value, "", merged)
    return tuple(sorted(merged.items()))


def _merge_maps(field: str, value: object, where: str, merged: dict[str, str]) -> None:
    """Merges an object or nested lists of objects; later values win. `where` is the position in the lists."""
    if where.count("[") > MAX_NESTING:
        raise _bad_json(_TOO_DEEP)
    if isinstance(value, list):
        for index, part in enumerate(value):
            _merge_maps(field, part, f"{where}[{index}]", merged)
    elif isinstance(value, dict):
        merged.update({well_formed(name): _go_text(item) for name, item in value.items()})
    elif value is not None:
        raise _unconvertible(field, "map[string]interface {}", value, where)


def _go_text(value: object, level: int = 0) -> str:
    """A map's value as Go's `%v` prints it; raises `BadRequest` if it nests too deeply."""
    if level > MAX_NESTING:
        raise _bad_json(_TOO_DEEP)
    if value is None:
        return "<nil>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "map[" + " ".join(f"{well_formed(k)}:{_go_text(v, level + 1)}" for k, v in sorted(value.items())) + "]"
    if isinstance(value, list):
        return "[" + " ".join(_go_text(item, level + 1) for item in value) + "]"
    return well_formed(str(value))


def _vault_duration(fields: dict[str, Any], field: str) -> int | None:
    """Seconds; null and "" are unset."""
    value = fields.get(field)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise _field_fault(field, "could not parse duration from input")
    try:
        return min(parse_go_duration(well_formed(value)), MAX_TTL_SECONDS)
    except BadDuration as fault:
        raise _field_fault(field, str(fault)) from None


# --- The native shape ------------------------------------------------------------------------------------------------


# The part of `str.isprintable` that a regular expression of ECMA 262 can say.
PRINTABLE: Final = "^[^\\u0000-\\u001f\\u007f-\\u00a0\\u00ad\\u2028\\u2029]*$"
# What `parse_duration` reads, without a duration of 0.
DURATION: Final = "^(?=.*[1-9])([0-9]{1,9}d)?([0-9]{1,9}h)?([0-9]{1,9}m)?([0-9]{1,9}s)?$"
# What no role grants, as openapi.json shows it. The rules of the policy refuse it, each with its own code, so the model
# itself takes it; a test compares both.
_KeyLine = Annotated[str, Field(json_schema_extra={"maxLength": MAX_PUBLIC_KEY})]
_Principal = Annotated[str, Field(json_schema_extra={"pattern": f"^{PRINCIPAL.pattern}$"})]
_Principals = Annotated[list[_Principal], Field(json_schema_extra={"minItems": 1})]
_Duration = Annotated[str, Field(json_schema_extra={"pattern": DURATION})]
_Seconds = Annotated[int, Field(json_schema_extra={"minimum": 1, "maximum": LONGEST_VALIDITY})]
_KeyId = Annotated[str, Field(json_schema_extra={"pattern": f"^{KEY_ID.pattern}$", "maxLength": MAX_KEY_ID})]
_Options = Annotated[dict[str, str], Field(json_schema_extra={"propertyNames": {"enum": [*sorted(OPTION_NAMES)]}})]
_ReasonLine = Annotated[str, Field(json_schema_extra={"pattern": PRINTABLE, "maxLength": MAX_REASON})]


class SignBody(BaseModel):
    """The body of `POST /api/sign/<role>` and `/api/explain/<role>`; omitted fields get the role's defaults."""

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)

    public_key: Annotated[_KeyLine, Field(description="the line of an OpenSSH .pub file")] = ""
    principals: Annotated[_Principals | None, Field(fail_fast=True, description="exact names")] = None
    ttl: Annotated[_Duration | _Seconds | None, Field(description="15m, or seconds, up to the role's maximum")] = None
    key_id: Annotated[_KeyId | None, Field(description="only if the role lets the caller choose it")] = None
    critical_options: _Options | None = None
    extensions: Annotated[list[str] | None, Field(fail_fast=True, description="added to the role's defaults")] = None
    reason: Annotated[_ReasonLine | None, Field(description="one line for the ledger")] = None
    claim_sha256: Annotated[
        str | None,
        Field(pattern="^[0-9a-f]{64}$", description="if humans must approve: SHA-256 of the secret for /claim"),
    ] = None


def read_native_sign(role: str, fields: dict[str, Any]) -> SignRequest:
    """Validates the native body; unlike Vault, refuses unknown and mistyped fields. Raises `BadRequest`."""
    numbers = {name: _whole_number(value) for name, value in fields.items()}
    try:
        body = SignBody.model_validate(numbers)
    except ValidationError as error:
        raise malformed_field(error, 1) from None
    asked = SignRequest(
        role=role,
        public_key=well_formed(body.public_key),
        principals=None if body.principals is None else tuple(map(well_formed, body.principals)),
        ttl=_native_ttl(body.ttl),
        key_id=None if body.key_id is None else well_formed(body.key_id),
        critical_options=tuple(
            sorted((well_formed(k), well_formed(v)) for k, v in (body.critical_options or {}).items())
        ),
        extensions=tuple(sorted((well_formed(name), "") for name in body.extensions or ())),
        reason=None if body.reason is None else well_formed(body.reason),
        claim_sha256=body.claim_sha256,
    )
    _refuse_tokens(asked)
    return asked


def malformed_field(error: ValidationError, depth: int | None = None) -> BadRequest:
    """The error that names the first invalid field, by at most `depth` parts of its path."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = well_formed(".".join(str(part) for part in first["loc"][:depth]))[:64]
    text = f"field {where!a}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return BadRequest("field_malformed", text, "see /api/openapi.json")


_WHOLE: Final = re.compile(r"-?\d{1,18}", re.ASCII)


def read_number(text: Number) -> int | float:
    """A JSON number; whole ones of at most 18 digits as `int`."""
    return int(text) if _WHOLE.fullmatch(text) else float(text)


def _whole_number(value: object) -> object:
    if isinstance(value, Number):
        return read_number(value)
    # Fields nest one level at most; pydantic would take a `Number` for text.
    if isinstance(value, list):
        return [float(item) if isinstance(item, Number) else item for item in value]
    if isinstance(value, dict):
        return {name: float(item) if isinstance(item, Number) else item for name, item in value.items()}
    return value


def _native_ttl(ttl: str | int | None) -> int | None:
    if ttl is None or isinstance(ttl, int):
        return None if ttl is None else max(min(ttl, MAX_TTL_SECONDS), 0)
    try:
        return min(parse_duration(ttl), MAX_TTL_SECONDS)
    except ValueError as error:
        raise BadRequest("field_malformed", f"field ttl: {error}", 'send "15m" or a number of seconds') from None
