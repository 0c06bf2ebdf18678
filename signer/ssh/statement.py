"""The statement that an approver signs, and the digest of the frozen request in it.

Both are RFC 8785 JSON, so that the approver's side, the keeper and a later `signer ledger verify` build the same bytes
from the same fields. Pure. Imports `signer.errors` only, because `safe-session` imports it.
"""

from __future__ import annotations

import json
from hashlib import sha256

from signer.errors import BadFormat

TYPE_CHECKING = False  # type checkers know the name; importing it from typing costs 20 ms
if TYPE_CHECKING:
    from collections.abc import Mapping

APPROVAL_NAMESPACE = "approval.v1@signer"  # `ssh-keygen -Y sign -n`; nothing else is signed in it
_MAX_SAFE_INTEGER = 2**53 - 1  # RFC 8785 section 3.2.2.3
_MAX_DEPTH = 8  # a frozen request has three levels


def request_digest(frozen: Mapping[str, object]) -> str:
    """`sha256:` and the hex SHA-256 of the RFC 8785 JSON of all fields of a frozen request.

    Raises `BadFormat` for a value that RFC 8785 writes in a way that JSON libraries do not share (see `_canonical`).
    """
    return "sha256:" + sha256(_canonical(frozen)).hexdigest()


def approval_statement(request: str, digest: str, approver: str, waiver: Mapping[str, object] | None) -> bytes:
    """The bytes that `approver` signs in `APPROVAL_NAMESPACE` to approve the request with this id and digest.

    `digest` is what `request_digest` returns for the fields that the approver has seen, never one that was sent along.
    `waiver` is None or `{"until": "2026-11-29T12:00:00Z", "uses": 5}`. Raises `BadFormat` as `request_digest` does.
    """
    return _canonical(
        {
            "v": 1,
            "purpose": "signer-approval",
            "request": request,
            "digest": digest,
            "decision": "approve",
            "approver": approver,
            "waiver": waiver,
        }
    )


def _canonical(value: Mapping[str, object]) -> bytes:
    """RFC 8785 for text, integers within 2**53, booleans, null, lists and objects, at most `_MAX_DEPTH` deep.

    Raises `BadFormat` for all others, such as floats, whose digits libraries write differently, and half surrogates.
    """
    text = json.dumps(_sorted(dict(value), 1), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise BadFormat("bad_statement", "a text in the request has half of a surrogate pair") from None


def _sorted(value: object, depth: int) -> object:
    """The value with the keys of its objects in the order of their UTF-16 code units (RFC 8785 section 3.2.3)."""
    if depth > _MAX_DEPTH:
        raise BadFormat("bad_statement", f"the request is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise BadFormat("bad_statement", "a key in the request is not text")
        in_order = sorted(value, key=lambda key: key.encode("utf-16-be", "surrogatepass"))
        return {key: _sorted(value[key], depth + 1) for key in in_order}
    if isinstance(value, list | tuple):
        return [_sorted(item, depth + 1) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int) and abs(value) <= _MAX_SAFE_INTEGER:
        return value
    raise BadFormat("bad_statement", "a value of the request is not text, an integer below 2**53, a boolean or null")
