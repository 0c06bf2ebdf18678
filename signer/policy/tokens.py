"""Bearer tokens: their format, creation and digest.

A token is `sgn_`, 43 base62 digits of 256 random bits, and 6 base62 digits of a CRC-32 over the text before them, which
detects typing errors. policy.toml holds only the SHA-256 of the whole text. Pure; the random bytes are passed in.
"""

from __future__ import annotations

import zlib
from hashlib import sha256
from typing import Final

from signer.model import TOKEN_PREFIX, Token

_DIGITS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_BODY: Final = 43  # 62**43 > 2**256
_CHECK: Final = 6  # 62**6 > 2**32
SECRET_BYTES: Final = 32
ENDS_SOON: Final = 30 * 86_400  # seconds; a token that ends within them is shown
ID_DIGITS: Final = 12  # hexadecimal digits of the digest that name a token


def render_token(secret: bytes) -> str:
    """The token for `secret`, 32 random bytes."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a token has exactly {SECRET_BYTES} bytes")
    body = TOKEN_PREFIX + _base62(int.from_bytes(secret, "big"), _BODY)
    return body + _checksum(body)


def token_digest(token: str) -> str:
    """The digest of a token in policy.toml: the hex SHA-256 of its whole text."""
    return sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def token_id(token: Token) -> str:
    """The name of a token in lists and commands: the beginning of its digest."""
    return token.sha256[:ID_DIGITS]


def is_mistyped(token: str) -> bool:
    """True for a text that resembles a token but has a wrong length, digit or checksum."""
    right_length = len(token) == len(TOKEN_PREFIX) + _BODY + _CHECK
    if not token.startswith(TOKEN_PREFIX):  # the prefix may be mistyped: one wrong character, or two swapped
        wrong = sum(one != other for one, other in zip(token, TOKEN_PREFIX, strict=False))
        return right_length and wrong <= 2
    return not right_length or _checksum(token[:-_CHECK]) != token[-_CHECK:]


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode("utf-8", "surrogatepass")), _CHECK)


def _base62(number: int, width: int) -> str:
    digits = []
    for _ in range(width):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))
