"""The hash chain: canonical JSON and the hash of an entry. Pure.

The hash of an entry is SHA-256 over the RFC 8785 form of `{actor, body, kind, prev, seq, time}`: a JSON library and a
hash function are enough to verify an exported ledger.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import sha256
from typing import Final

import msgspec

from signer.model import Entry, Event, Head, hide_tokens

GENESIS: Final = "0" * 64
MAX_SAFE_INTEGER: Final = 2**53 - 1  # RFC 8785 section 3.2.2.3: larger numbers are stored as text

_LISTS: Final = (list, tuple)
_ENCODER: Final = msgspec.json.Encoder(order="deterministic")  # sorts keys; tests hold it against `rfc8785`


def canonical_json(body: dict[str, object]) -> str:
    """RFC 8785 for the values of events: text, integers within 2**53, booleans, null, lists, objects with ASCII keys.

    Raises `ValueError` for all others, such as floats, so that no hash depends on number formatting.
    """
    _check_object(body)
    return _ENCODER.encode(body).decode()


def _check_object(value: dict[str, object]) -> None:
    try:
        is_text = "".join(value).isascii()
    except TypeError:
        is_text = False
    if not is_text:
        raise ValueError("the keys of an event must be ASCII text")
    for item in value.values():
        kind = type(item)
        if kind is not str and item is not None and not (kind is int and -MAX_SAFE_INTEGER <= item <= MAX_SAFE_INTEGER):  # type: ignore[operator]
            _check_value(item)


def _check_value(value: object) -> None:
    if isinstance(value, _LISTS):  # first, as each certificate has two
        for item in value:
            if type(item) is not str:
                _check_value(item)
    elif isinstance(value, dict):
        _check_object(value)
    elif isinstance(value, int):
        if abs(value) > MAX_SAFE_INTEGER:
            raise ValueError("an integer over 2**53 must be stored as text")
    elif not isinstance(value, str | None):
        raise ValueError(f"an event cannot hold a {type(value).__name__}")  # noqa: TRY004 - one error for callers


def entry_hash(seq: int, time_ms: int, kind: str, actor: str, body: str, prev: str) -> str:
    """Hex SHA-256 over the canonical JSON of an entry without its hash; `body` is canonical JSON."""
    return linked_hash(seq, time_ms, kind, actor, body, quote(prev))


def linked_hash(seq: int, time_ms: int, kind: str, actor: str, body: str, link: str) -> str:
    """As `entry_hash`, with the JSON text of the hash before it: a hash that was just computed needs only quotes."""
    text = (
        f'{{"actor":{_quote_name(actor)},"body":{body},"kind":{_quote_name(kind)},"prev":{link},'
        f'"seq":{seq},"time":{time_ms}}}'
    )
    return sha256(text.encode()).hexdigest()


def quote(text: str) -> str:
    """A string as canonical JSON."""
    return msgspec.json.encode(text).decode()


_quote_name: Final = lru_cache(maxsize=1024)(quote)  # kinds, and identities of policy.toml


def chain(events: Iterable[Event], head: Head, now_ms: int) -> Iterator[Entry]:
    """Yields the entries of `events` that follow `head`; times in milliseconds never decrease."""
    seq, prev, link = head.seq, head.hash, quote(head.hash)
    time_ms = max(now_ms, head.time_ms)
    for event in events:
        seq += 1
        body = hide_tokens(canonical_json(event.body))  # callers send tokens in the wrong field
        digest = linked_hash(seq, time_ms, event.kind, event.actor, body, link)
        yield Entry(seq, time_ms, event.kind, event.actor, body, prev, digest)
        prev, link = digest, f'"{digest}"'
