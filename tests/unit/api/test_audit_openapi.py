"""openapi.json is as strict as the service: what its models refuse is refused, and the other way round."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any, Final

import pytest

from signer.api import openapi
from signer.errors import SignerError
from signer.model import LONGEST_VALIDITY, MAX_KEY_ID, MAX_PUBLIC_KEY, MAX_REASON, OPTION_NAMES, PRINCIPAL
from signer.policy.decide import decide
from signer.protocol.bodies import FreezeBody, read_body_as
from signer.protocol.operations import OperationBody
from signer.protocol.sign_request import Number, read_native_sign
from signer.ssh.publickey import parse_public_key
from tests.parts.builders import NO_USAGE, identity, public_key, role

KEY: Final = public_key()
LINE: Final = "ssh-ed25519 " + base64.b64encode(KEY.blob).decode()
TEXTS: Final = (
    "", "a", "A9._@=:+/-", "a b", "a,b", " a", "a\n", "a\nb", "\ta", "\x00", "\x7f", "\x85", "\u2028", "\u00ad",
    "\ufeff", "é", "日本", "*", "{identity}", "a\\b~$", "0", "0s", "00m", "1", "1s", "15m", "1h30m", "1d", "24h", "m15",
    "15 m", "-1s", "1.5h", "1s1m", "1234567890s", "x" * 256, "x" * 257, "x" * 500, "x" * 501, "x y " * 125,
    "x y " * 126,
)  # fmt: skip
NUMBERS: Final = (-1, 0, 1, 60, LONGEST_VALIDITY, LONGEST_VALIDITY + 1, 2**31, 2**53)
VALUES: Final[tuple[Any, ...]] = (
    None, True, 1.5, {}, [], [""], ["a"], ["a", "a"], ["a b"], ["a,b"], ["*"], ["x" * 256], ["x" * 257], ["a\n"], ["é"],
    [1], [None], "text", {"force-command": "/bin/true"}, {"source-address": "192.0.2.0/24"}, {"verify-required": ""},
    {"no-such-option": ""}, {"verify-required": "", "x": "y"}, {"force-command": 1},
)  # fmt: skip


def accepts(schema: dict[str, Any], value: object) -> bool:
    """Whether a value is valid by the keywords that our schemas have (JSON Schema 2020-12)."""
    if "anyOf" in schema:
        return any(accepts(one, value) for one in schema["anyOf"])
    if "enum" in schema:
        return any(value == one for one in schema["enum"])
    kinds: dict[str, tuple[type, ...]] = {
        "string": (str,), "integer": (int,), "array": (list,), "object": (dict,), "null": (type(None),),
    }  # fmt: skip
    if not isinstance(value, kinds[schema["type"]]) or isinstance(value, bool):
        return False
    if isinstance(value, str):
        pattern = schema.get("pattern", "")
        if pattern.endswith("$"):  # ECMA 262: the end of the text, and not also before a last line end, as in Python
            pattern = pattern[:-1] + r"\Z"
        matches = re.search(pattern, value)
        return bool(matches) and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
    if isinstance(value, int):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    if isinstance(value, list):
        return len(value) >= schema.get("minItems", 0) and all(accepts(schema["items"], item) for item in value)
    if isinstance(value, dict):
        names = all(accepts(schema.get("propertyNames", {"type": "string"}), name) for name in value)
        return names and all(accepts(schema["additionalProperties"], item) for item in value.values())
    return True


def sample_values() -> Iterator[Any]:
    yield from TEXTS
    yield from NUMBERS
    yield from VALUES


def serves(fields: dict[str, Any]) -> bool:
    """Whether the service would issue for a role that allows all that a policy file can allow."""
    names = {text for text in (*TEXTS, "a") if PRINCIPAL.fullmatch(text)}
    allowed = role(
        principals=tuple(sorted(names)), default_principals=("a",), max_ttl=LONGEST_VALIDITY, allow_key_id=True,
        allowed_critical_options=frozenset(OPTION_NAMES), reason_required=False, force_command=None,
        unlisted_extensions="drop",
    )  # fmt: skip
    numbered = {name: Number(value) if type(value) in (int, float) else value for name, value in fields.items()}
    try:
        asked = read_native_sign("llmops", {"public_key": LINE, **numbered})
        decide(identity(), allowed, asked, parse_public_key(asked.public_key), "192.0.2.7", NO_USAGE)
    except SignerError:
        return False
    return True


SCHEMA: Final = openapi.document()["components"]["schemas"]
# The service knows more about these than a schema can say.
LOOSE: Final = {"public_key": "a schema cannot parse a key", "critical_options": "nor a list of networks"}


@pytest.mark.parametrize("field", [name for name in SCHEMA["SignBody"]["properties"] if name != "claim_sha256"])
def test_audit_7_openapi_takes_of_a_sign_request_what_the_service_takes(field: str) -> None:
    schema = SCHEMA["SignBody"]["properties"][field]
    checked = 0
    for value in sample_values():
        taken, served = accepts(schema, value), serves({field: value})
        if field in LOOSE:
            assert taken or not served, value
        elif isinstance(value, str) and not value.isprintable():
            assert not served, value
        else:
            assert taken == served, (value, taken, served)
        checked += 1
    assert checked > 60
    beyond: dict[str, object] = {
        "public_key": f"{LINE} {'c' * MAX_PUBLIC_KEY}", "key_id": "x" * (MAX_KEY_ID + 1),
        "reason": "x" * (MAX_REASON + 1), "ttl": LONGEST_VALIDITY + 1,
        "principals": [], "critical_options": {"x": ""}, "extensions": "permit-pty",
    }  # fmt: skip
    assert not accepts(schema, beyond[field])
    assert not serves({field: beyond[field]})


def test_audit_7_openapi_wants_a_key_where_one_is_to_be_certified() -> None:
    paths = openapi.document()["paths"]
    sign = paths["/api/sign/{role}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    explain = paths["/api/explain/{role}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert sign["required"] == ["public_key"]
    assert "required" not in explain


@pytest.mark.parametrize("field", ["scope", "reason", "lasts"])
def test_audit_7_openapi_takes_of_a_freeze_what_the_keeper_takes(field: str) -> None:
    base: dict[str, Any] = {"scope": "all", "reason": "because"}
    schema = SCHEMA["FreezeBody"]["properties"][field]
    for text in TEXTS:
        try:
            read_body_as(FreezeBody, {**base, field: text})
            kept = True
        except SignerError:
            kept = False
        if field == "lasts":  # a schema cannot add minutes
            assert accepts(schema, text) or not kept, text
        elif text.isprintable():
            assert accepts(schema, text) == kept, text
        else:
            assert not kept, text


@pytest.mark.parametrize("field", ["plan", "evidence", "operation", "outcome", "reason"])
def test_audit_7_openapi_takes_of_an_operation_what_the_keeper_takes(field: str) -> None:
    base: dict[str, Any] = {"operation": "cutover", "outcome": "applied"}
    schema = SCHEMA["OperationBody"]["properties"][field]
    for text in (*TEXTS, f"sha256:{'0' * 64}", f"sha256:{'0' * 63}", f"sha256:{'0' * 64}\n", "rollback", "failed"):
        try:
            read_body_as(OperationBody, {**base, field: text})
            kept = True
        except SignerError:
            kept = False
        if text.isprintable():
            assert accepts(schema, text) == kept, text
        else:
            assert not kept, text


def test_audit_7_numbers_in_paths_and_queries_have_the_bounds_of_the_service() -> None:
    paths = openapi.document()["paths"]
    (serial,) = paths["/api/certificates/{serial}"]["get"]["parameters"]
    assert (serial["schema"]["minimum"], serial["schema"]["maximum"]) == (0, 2**64 - 1)
    before = [one for one in paths["/api/certificates"]["get"]["parameters"] if one["name"] == "before"]
    assert before[0]["schema"]["maximum"] == 2**63 - 1
