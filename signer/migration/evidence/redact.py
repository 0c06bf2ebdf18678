"""Redaction of secrets: every text of the evidence passes through one guard. Pure.

The guard replaces two kinds by `[removed]`: text with the form of a secret (tokens of signer and Vault, private keys,
JSON web tokens), and the exact values that callers register.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Final
from urllib.parse import quote

from signer.model import TOKEN_SHAPES

REMOVED: Final = "[removed]"
SHORTEST: Final = 8  # characters: removing shorter values would garble other text
_SHORTEST_LINE: Final = 16  # characters of a line of a multi-line secret
_DEEPEST: Final = 40

_BEGIN: Final = r"-----? ?BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)? ?-----?"
_END: Final = r"-----? ?END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)? ?-----?"
_KEY_BEGINS, _KEY_ENDS = re.compile(_BEGIN), re.compile(_END)
_SHAPES: Final = tuple(
    re.compile(shape, re.DOTALL)
    for shape in (
        # a private key with PEM armour, or up to the end of the text if incomplete
        f"{_BEGIN}.*?(?:{_END}|\\Z)",
        r"b3BlbnNzaC1rZXktdjE[A-Za-z0-9+/=_\\\s-]*",  # OpenSSH's: `openssh-key-v1` in base64
        r"PuTTY-User-Key-File-.*",
        *TOKEN_SHAPES,
        r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",  # a JSON web token
    )
)
# The value after a name that only secrets have; the name is kept.
_NAMED: Final = re.compile(
    r"((?:X-Vault-Token|VAULT_TOKEN|BAO_TOKEN|Authorization|(?:Unseal|Recovery) Key \d+)[\"']?\s*[:=]\s*"
    r"[\"']?(?:Bearer\s+)?)[^\s\"',;}\[\]]+",
    re.IGNORECASE,
)
_KEY_SHARES: Final = r"(?:unseal|recovery)_keys?(?:_b64|_base64|_hex)?|keys?_(?:b64|base64|hex)"
_LISTED: Final = re.compile(rf"([\"'](?:{_KEY_SHARES})[\"']\s*:\s*\[)[^\]]+", re.IGNORECASE)
# In snake case, and perhaps after other words: `tls_private_key`.
_SECRET_NAME: Final = re.compile(
    rf"(?:\w+_)?(?:{_KEY_SHARES}|(?:client|root|access|refresh|wrapping|vault|id)_token|token|api_key|private_key"
    r"|(?:client|shared)_secret|secret_(?:id|key|value)|secret|password|passwd|passphrase)"
)
_SHARES_NAME: Final = re.compile(_KEY_SHARES)
_CAPITAL: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def _secret_names(names: Iterable[str]) -> set[str]:
    """Those of the names of one object whose values are secrets. `keys` is one beside another form of key shares."""
    found = {name: _CAPITAL.sub("_", name).replace("-", "_").lower() for name in names}  # in snake case
    has_shares = any(_SHARES_NAME.fullmatch(name) for name in found.values())
    return {name for name, snake in found.items() if _SECRET_NAME.fullmatch(snake) or (has_shares and snake == "keys")}


class Guard:
    """Removes secrets from text; `never` registers the value of a secret."""

    def __init__(self) -> None:
        self._values: set[str] = set()
        self._known: re.Pattern[str] | None = None

    def __repr__(self) -> str:
        return f"Guard({len(self._values)} values)"

    def never(self, value: str) -> bool:
        """Registers a secret in all its encoded forms; False if it is shorter than `SHORTEST`."""
        whole = value.strip()
        if len(whole) < SHORTEST:
            return False
        self._values.update(form for form in _forms(whole) if len(form) >= SHORTEST)
        longest_first = sorted(self._values, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest_first)))
        return True

    def clean(self, text: str) -> str:
        """The text without registered secrets and text of their form."""
        if self._known is not None:
            text = self._known.sub(REMOVED, text)
        for shape in _SHAPES:
            text = shape.sub(REMOVED, text)
        text = _LISTED.sub(rf"\1{REMOVED}", text)
        return _NAMED.sub(rf"\1{REMOVED}", text)

    def clean_value(self, value: object) -> object:
        """The same for a JSON value, including keys. A value that JSON lacks becomes the name of its type."""
        return self._value(value, _DEEPEST)

    def _value(self, value: object, depth: int) -> object:
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, int):
            return value if self.clean(str(value)) == str(value) else REMOVED
        if isinstance(value, float):
            return value if value - value == 0 else str(value)  # JSON has no infinity
        if isinstance(value, str | PurePath):
            return self.clean(str(value))
        if depth and isinstance(value, Mapping):
            secret = _secret_names(map(str, value))
            return {
                self.clean(str(name)): REMOVED
                if item and str(name) in secret and not isinstance(item, bool | Mapping)
                else self._value(item, depth - 1)
                for name, item in value.items()
            }
        if depth and isinstance(value, list | tuple | set | frozenset):
            return list(self._items(value, depth - 1))
        return f"[a {type(value).__name__}, not shown]"

    def _items(self, items: Iterable[object], depth: int) -> Iterator[object]:
        """The items; removes a private key that is split over several items, from its first line to its last."""
        is_inside = False
        for item in items:
            text = item if isinstance(item, str) else ""
            begins = [found.end() for found in _KEY_BEGINS.finditer(text)]
            ends = [found.end() for found in _KEY_ENDS.finditer(text)]
            if is_inside:
                yield REMOVED
                is_inside = not ends or (bool(begins) and begins[-1] > ends[-1])
            else:
                yield self._value(item, depth)
                is_inside = bool(begins) and (not ends or begins[-1] > ends[-1])


def _forms(whole: str) -> Iterator[str]:
    """The encoded forms of a value in logs, addresses, JSON or headers; also of each long line of several."""
    lines = [line.strip() for line in whole.splitlines()]
    for value in (whole, *(line for line in lines if len(lines) > 1 and len(line) >= _SHORTEST_LINE)):
        raw = value.encode(errors="surrogateescape")
        yield value
        yield json.dumps(value)[1:-1]
        yield json.dumps(value, ensure_ascii=False)[1:-1]
        yield repr(value)[1:-1]
        yield quote(raw, safe="")
        yield raw.hex()
        yield base64.b64encode(raw).decode().rstrip("=")
        yield base64.urlsafe_b64encode(raw).decode().rstrip("=")
