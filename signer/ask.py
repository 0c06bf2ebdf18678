"""Bodies of sign requests to an `Ask`: JSON, Vault's field coercions, our native body.

Follows `../shared/contract/vault-ssh.md` sections 1 and 3 ("Input coercion", "Exact errors") word for word where both
servers have the fault; `facts["vault"]` of an error holds Vault's own sentence. Pure.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Final
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from signer.duration import parse_duration
from signer.errors import BadRequest
from signer.model import Ask

MAX_BODY: Final = 64 * 1024  # bytes
MAX_TTL_SECONDS: Final = 2**31
FORM: Final = "application/x-www-form-urlencoded"


class Number(str):
    """A JSON number as it was written; Vault's coercions look at its text."""

    __slots__ = ()


def decode_body(body: bytes, content_type: str = "") -> dict[str, Any]:
    """A body as an object, whatever the Content-Type says, unless it is a form by type and look; nothing is `{}`.

    Raises `BadRequest`.
    """
    if len(body) > MAX_BODY:
        raise body_too_large()
    text = body.decode("utf-8", "replace")
    looks_like_json = text.lstrip()[:1] in ("{", "[")  # curl -d says form whatever it sends, and Vault looks, too
    if content_type.split(";", 1)[0].strip().lower() == FORM and not looks_like_json:
        return dict(parse_qsl(text, keep_blank_values=True))
    if not text.strip(" \t\r\n"):
        return {}
    try:
        # raw_decode, because Vault's decoder stops after the first value and never looks at what follows.
        value, _ = _DECODER.raw_decode(text.lstrip(" \t\r\n"))
    except json.JSONDecodeError as error:
        raise _bad_json(_go_sentence(error)) from None
    except RecursionError:
        raise _bad_json("exceeded max depth") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _bad_json(f"json: cannot unmarshal {_go_kind(value)} into Go value of type map[string]interface {{}}")
    return value


def body_too_large() -> BadRequest:
    """The refusal of a body over the limit; it has its own HTTP status at every edge."""
    return BadRequest(
        "body_too_large",
        f"the body is larger than {MAX_BODY} bytes",
        "send less",
        {"vault": "http: request body too large"},
    )


def _reject_constant(name: str) -> object:
    raise json.JSONDecodeError("Expecting value", name, 0)


_DECODER: Final = json.JSONDecoder(parse_float=Number, parse_int=Number, parse_constant=_reject_constant, strict=True)


def _bad_json(sentence: str) -> BadRequest:
    return BadRequest(
        "json_malformed",
        f"the body is not a JSON object: {sentence}",
        "send a JSON object",
        {"vault": f"failed to decode JSON input: {sentence}"},
    )


_GO_SAYS: Final = (
    ("Expecting value", "looking for beginning of value"),
    ("Expecting property name", "looking for beginning of object key string"),
    ("Expecting ':'", "after object key"),
    ("Invalid control character", "in string literal"),
    ("Invalid \\escape", "in string escape code"),
    ("Invalid \\uXXXX", "in \\u hexadecimal character escape"),
    ("Illegal trailing comma before end of object", "looking for beginning of object key string"),
    ("Illegal trailing comma before end of array", "looking for beginning of value"),
)


def _go_sentence(error: json.JSONDecodeError) -> str:
    """What Go's decoder says where Python's decoder stopped."""
    at = error.pos
    if error.msg.startswith("Invalid \\escape"):
        at += 1
    if error.msg.startswith("Unterminated string") or at >= len(error.doc.rstrip(" \t\r\n")):
        return "unexpected EOF"
    where = next((go for python, go in _GO_SAYS if error.msg.startswith(python)), None)
    if where is None:  # "Expecting ',' delimiter": in an object or in an array
        opened = error.doc[:at].count("[") - error.doc[:at].count("]")
        where = "after array element" if opened > 0 else "after object key:value pair"
    return f"invalid character {_go_quote(error.doc[at])} {where}"


def _go_quote(char: str) -> str:
    if char == "'":
        return "'\\''"
    if char == '"':
        return "'\"'"
    return f"'{char}'" if char.isprintable() else "'" + char.encode("unicode_escape").decode() + "'"


def _go_kind(value: object) -> str:
    if isinstance(value, list):
        return "array"
    if isinstance(value, bool):
        return "bool"
    return "number" if isinstance(value, Number) else "string"


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


def read_vault_sign(role: str, fields: dict[str, Any]) -> Ask:
    """Vault's `sign/<role>` body, coerced as Vault does; raises `BadRequest` for a field of the wrong type.

    `""` for ttl, valid_principals and key_id counts as unset (hvac always sends it), which is ours on purpose.
    """
    principals = _vault_text(fields, "valid_principals")
    return Ask(
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


def vault_sign_warnings(fields: dict[str, Any]) -> list[str]:
    """What Vault adds to an answer when a body holds fields that the path does not know."""
    warnings = []
    if unknown := sorted(_clean(name) for name in fields.keys() - _SIGN_FIELDS - {"role"}):
        warnings.append(f"Endpoint ignored these unrecognized parameters: [{' '.join(unknown)}]")
    if "role" in fields:
        warnings.append(
            "Endpoint replaced the value of these parameters with the values captured from the endpoint's path: [role]"
        )
    return warnings


def _split(text: str) -> tuple[str, ...]:
    return tuple(name for name in (piece.strip() for piece in text.split(",")) if name)


def _clean(text: str) -> str:
    """Text that can be written as UTF-8: a lone surrogate from a `\\ud800` escape becomes `?`."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _field_fault(field: str, problem: str) -> BadRequest:
    return BadRequest(
        "field_malformed",
        f"field {field}: {problem}",
        "see the field's type in README, Vault clients",
        {"vault": f'Field validation failed: error converting input for field "{field}": {problem}'},
    )


def _unconvertible(field: str, wanted: str, value: object) -> BadRequest:
    kind = {dict: "map[string]interface {}", list: "[]interface {}", bool: "bool", str: "string"}.get(
        type(value), "json.Number"
    )
    return _field_fault(field, f"'' expected type '{wanted}', got unconvertible type '{kind}'")


def _vault_text(fields: dict[str, Any], field: str) -> str:
    value = fields.get(field)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, str):
        return _clean(value)
    raise _unconvertible(field, "string", value)


def _vault_map(fields: dict[str, Any], field: str) -> tuple[tuple[str, str], ...]:
    value = fields.get(field)
    if value is None:
        return ()
    parts = value if isinstance(value, list) else [value]
    merged: dict[str, str] = {}
    for part in parts:
        if not isinstance(part, dict):
            raise _unconvertible(field, "map[string]interface {}", part)
        merged.update({_clean(name): _go_text(item) for name, item in part.items()})
    return tuple(sorted(merged.items()))


def _go_text(value: object) -> str:
    """A map's value as Go's `%v` prints it."""
    if value is None:
        return "<nil>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "map[" + " ".join(f"{_clean(k)}:{_go_text(v)}" for k, v in sorted(value.items())) + "]"
    if isinstance(value, list):
        return "[" + " ".join(map(_go_text, value)) + "]"
    return _clean(str(value))


_GO_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
_GO_PART: Final = re.compile(r"(\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_WHOLE: Final = re.compile(r"[+-]?\d{1,18}", re.ASCII)


def _vault_duration(fields: dict[str, Any], field: str) -> int | None:
    """Seconds, truncated. Int seconds, `60`, `60s`, `1h30m`, `1.5h`, `1d`; null and "" are unset."""
    value = fields.get(field)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise _unconvertible(field, "time.Duration", value)
    if _WHOLE.fullmatch(value):
        seconds = int(value)
    elif value[-1:] == "d" and _WHOLE.fullmatch(value[:-1]):
        seconds = int(value[:-1]) * 86_400
    else:
        seconds = _go_duration(field, value)
    if seconds < 0:
        raise _field_fault(field, f"cannot provide negative value '{seconds}'")
    return min(seconds, MAX_TTL_SECONDS)


def _go_duration(field: str, text: str) -> int:
    sign, rest = (-1, text[1:]) if text[:1] == "-" else (1, text.removeprefix("+"))
    total, at = 0.0, 0
    while at < len(rest) and (part := _GO_PART.match(rest, at)):
        total += float(part[1]) * _GO_UNITS[part[2]]
        at = part.end()
    if not rest or at != len(rest):
        shown = json.dumps(_clean(text[:200]))
        missing_unit = re.fullmatch(r"[+-]?(?:\d+\.?\d*|\.\d+)", text, re.ASCII)
        fault = "missing unit in duration" if missing_unit else "invalid duration"
        raise _field_fault(field, f"time: {fault} {shown}")
    return sign * int(total)


# --- The native shape ------------------------------------------------------------------------------------------------


class SignBody(BaseModel):
    """`POST /api/sign/<role>` and `/api/explain/<role>`; what is left out gets the role's default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    public_key: Annotated[str, Field(description="the line of an OpenSSH .pub file")] = ""
    principals: Annotated[list[str] | None, Field(description="exact names")] = None
    ttl: Annotated[str | int | None, Field(description='"15m" or seconds')] = None
    key_id: Annotated[str | None, Field(description="only if the role lets the caller choose it")] = None
    critical_options: dict[str, str] | None = None
    extensions: Annotated[list[str] | None, Field(description="added to the role's defaults")] = None
    reason: Annotated[str | None, Field(description="one line for the ledger")] = None


def read_native_sign(role: str, fields: dict[str, Any]) -> Ask:
    """The native body; unlike Vault's, an unknown or mistyped field is refused. Raises `BadRequest`."""
    numbers = {name: _whole_number(value) for name, value in fields.items()}
    try:
        body = SignBody.model_validate(numbers)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = _clean(".".join(str(part) for part in first["loc"][:1]))[:64]
        raise BadRequest(
            "field_malformed",
            f"field {where!a}: {first['msg'][:1].lower()}{first['msg'][1:]}",
            "see /api/openapi.json",
        ) from None
    return Ask(
        role=role,
        public_key=_clean(body.public_key),
        principals=None if body.principals is None else tuple(map(_clean, body.principals)),
        ttl=_native_ttl(body.ttl),
        key_id=None if body.key_id is None else _clean(body.key_id),
        critical_options=tuple(sorted((_clean(k), _clean(v)) for k, v in (body.critical_options or {}).items())),
        extensions=tuple(sorted((_clean(name), "") for name in body.extensions or ())),
        reason=None if body.reason is None else _clean(body.reason),
    )


def _whole_number(value: object) -> object:
    if isinstance(value, Number):
        return int(value) if _WHOLE.fullmatch(value) else float(value)
    return value


def _native_ttl(ttl: str | int | None) -> int | None:
    if ttl is None or isinstance(ttl, int):
        return None if ttl is None else max(min(ttl, MAX_TTL_SECONDS), 0)
    try:
        return min(parse_duration(ttl), MAX_TTL_SECONDS)
    except ValueError as error:
        raise BadRequest("field_malformed", f"field ttl: {error}", 'send "15m" or a number of seconds') from None
