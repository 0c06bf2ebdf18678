"""The hash chain as pure functions: canonical JSON as RFC 8785 has it, and hashes that anybody can make again."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from signer.ledger.chain import GENESIS, MAX_SAFE_INTEGER, canonical_json, chain, entry_hash
from signer.model import Event, Head

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
KEYS = st.text(st.characters(max_codepoint=127))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-MAX_SAFE_INTEGER, MAX_SAFE_INTEGER) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
    max_leaves=8,
)
BODIES = st.dictionaries(KEYS, VALUES)


@given(BODIES)
def test_canonical_json_is_that_of_rfc_8785(body: dict[str, Any]) -> None:
    assert canonical_json(body).encode() == rfc8785.dumps(body)


@given(BODIES)
def test_canonical_json_reads_back_as_what_it_was(body: dict[str, Any]) -> None:
    assert json.loads(canonical_json(body)) == body


@pytest.mark.parametrize(
    "body",
    [
        {"a": 0.5},
        {"a": float("nan")},
        {"a": MAX_SAFE_INTEGER + 1},
        {"a": [-MAX_SAFE_INTEGER - 1]},
        {"a": b"bytes"},
        {"a": {1: "a key that is no text"}},
        {"ä": "a key beyond ASCII"},
        {"a": [{"b": {"ä": 1}}]},
        {"a": {"b"}},
    ],
)
def test_what_json_libraries_write_in_different_ways_is_no_event(body: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"an event|stored as text"):
        canonical_json(body)


@given(st.integers(1, 2**53), st.integers(0, 2**53), TEXT, TEXT, BODIES, st.one_of(st.just(GENESIS), TEXT))
def test_an_entrys_hash_is_made_with_any_json_library_and_sha256(
    seq: int, time_ms: int, kind: str, actor: str, body: dict[str, Any], prev: str
) -> None:
    whole = {"actor": actor, "body": body, "kind": kind, "prev": prev, "seq": seq, "time": time_ms}
    by_hand = json.dumps(whole, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    assert entry_hash(seq, time_ms, kind, actor, canonical_json(body), prev) == sha256(by_hand.encode()).hexdigest()


def test_entries_follow_each_other_from_the_head_on() -> None:
    head = Head(7, "ab" * 32, 1_000)
    first, second = chain([Event("a", "x", {}), Event("b", "y", {"n": 1})], head, 2_000)
    assert (first.seq, first.prev, first.time_ms) == (8, head.hash, 2_000)
    assert (second.seq, second.prev, second.time_ms) == (9, first.hash, 2_000)


def test_an_entrys_time_never_runs_backwards() -> None:
    (entry,) = chain([Event("a", "x", {})], Head(7, GENESIS, 5_000), 4_000)
    assert entry.time_ms == 5_000


@pytest.mark.parametrize(
    "token",
    [
        "sgn_0123456789abcdefghijABCDEFGHIJ0123456789abcdefghi",
        "hvs.CAESIAbcdefghijklmnop",
        "hvb.AAAAAQJabcdefgh-_x",
        "s.0123456789abcdefghijABCD",
        "s.0123456789abcdefghijABCD.ns1",
        "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJjaSJ9.c2lnbmF0dXJl",
    ],
)
def test_audit_f1_no_event_holds_a_token_wherever_a_caller_put_it(token: str) -> None:
    body: dict[str, object] = {
        "reason": f"used {token} here",
        "key_id": token,
        "principals": ["llmops", token],
        "critical_options": {"force-command": f'curl -H "X-Vault-Token: {token}"'},
    }
    (entry,) = chain([Event("freeze.set", "operator", body)], Head(0, GENESIS, 0), 1)
    assert token not in entry.body
    read = json.loads(entry.body)
    assert read["reason"] == "used [hidden] here"
    assert canonical_json(read) == entry.body
    assert entry.hash == entry_hash(1, 1, "freeze.set", "operator", entry.body, GENESIS)


def test_words_that_only_look_a_little_like_tokens_stay() -> None:
    body: dict[str, object] = {"reason": "sgn_short, hvs.x, server.hvs.example.org/abcdefgh, eyJ.a.b, SHA256:eyJ0"}
    (entry,) = chain([Event("a", "x", body)], Head(0, GENESIS, 0), 1)
    assert json.loads(entry.body) == body
