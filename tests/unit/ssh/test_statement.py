"""What an approver signs: the bytes are RFC 8785's, and each field of the request and of the statement changes them."""

from __future__ import annotations

from hashlib import sha256
from types import MappingProxyType
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from signer.errors import BadFormat
from signer.ssh.statement import APPROVAL_NAMESPACE, approval_statement, request_digest

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=6,
).filter(lambda value: _depth(value) < 8)
REQUESTS = st.dictionaries(TEXT, VALUES)
DIGEST = "sha256:" + "ab" * 32


def _depth(value: object) -> int:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    return 1 if inner is None else 1 + max(map(_depth, inner), default=0)


@given(REQUESTS)
def test_a_digest_is_sha_256_over_rfc_8785(frozen: dict[str, Any]) -> None:
    assert request_digest(frozen) == "sha256:" + sha256(rfc8785.dumps(frozen)).hexdigest()


@given(REQUESTS)
def test_the_order_of_keys_does_not_matter(frozen: dict[str, Any]) -> None:
    assert request_digest(dict(reversed(frozen.items()))) == request_digest(frozen)


def test_keys_are_sorted_by_utf_16_code_units() -> None:
    frozen = {"\ufb33": 1, "\U0001f600": 2}  # by code points the other way round
    assert request_digest(frozen) == "sha256:" + sha256(rfc8785.dumps(frozen)).hexdigest()


@given(TEXT, TEXT, TEXT, st.none() | st.fixed_dictionaries({"until": TEXT, "uses": st.integers(1, 20)}))
def test_a_statement_is_rfc_8785(request_id: str, digest: str, approver: str, waiver: dict[str, Any] | None) -> None:
    assert approval_statement(request_id, digest, approver, waiver) == rfc8785.dumps(
        {
            "v": 1,
            "purpose": "signer-approval",
            "request": request_id,
            "digest": digest,
            "decision": "approve",
            "approver": approver,
            "waiver": waiver,
        }
    )


def test_a_statement_reads_as_what_was_approved() -> None:
    waiver = {"uses": 5, "until": "2026-11-29T12:00:00Z"}
    assert approval_statement("r-abcdefghij", DIGEST, "anna", waiver).decode() == (
        '{"approver":"anna","decision":"approve","digest":"' + DIGEST + '","purpose":"signer-approval",'
        '"request":"r-abcdefghij","v":1,"waiver":{"until":"2026-11-29T12:00:00Z","uses":5}}'
    )
    assert APPROVAL_NAMESPACE == "approval.v1@signer"


@pytest.mark.parametrize(
    "fields",
    [
        ("r-other", DIGEST, "anna", None),
        ("r-abcdefghij", "sha256:" + "cd" * 32, "anna", None),
        ("r-abcdefghij", DIGEST, "ben", None),
        ("r-abcdefghij", DIGEST, "anna", {"until": "2026-11-29T12:00:00Z", "uses": 5}),
    ],
)
def test_each_field_changes_the_statement(fields: tuple[str, str, str, Any]) -> None:
    assert approval_statement(*fields) != approval_statement("r-abcdefghij", DIGEST, "anna", None)


def _nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "frozen",
    [
        {"ttl": 0.5},
        {"ttl": 900.0},
        {"ttl": float("nan")},
        {"ttl": 2**53},
        {"ttl": -(2**53)},
        {"reason": b"bytes"},
        {"reason": "\ud800"},
        {"\udfff": 1},
        {"options": {1: "a key that is not text"}},
        {"principals": {"a set"}},
        _nested(8),
        _nested(5000),
    ],
)
def test_what_json_libraries_write_differently_has_no_digest(frozen: dict[str, Any]) -> None:
    with pytest.raises(BadFormat, match="the request"):
        request_digest(frozen)


def test_a_read_only_mapping_has_the_digest_of_its_fields() -> None:
    assert request_digest(MappingProxyType({"id": "r-1"})) == request_digest({"id": "r-1"})
