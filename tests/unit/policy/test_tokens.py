"""Tokens carry 256 bits, and a typing error is told from a wrong token."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.model import TOKEN_PREFIX
from signer.policy.tokens import is_mistyped, render_token, token_digest

SECRETS = st.binary(min_size=32, max_size=32)
DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@given(SECRETS)
def test_a_token_is_recognisable_and_of_one_length(secret: bytes) -> None:
    token = render_token(secret)
    assert token.startswith(TOKEN_PREFIX)
    assert len(token) == 53
    assert not is_mistyped(token)
    assert token_digest(token) == sha256(token.encode()).hexdigest()


@given(SECRETS)
def test_all_256_bits_of_the_secret_are_in_the_token(secret: bytes) -> None:
    number = 0
    for digit in render_token(secret).removeprefix(TOKEN_PREFIX)[:-6]:
        number = number * 62 + DIGITS.index(digit)
    assert number.to_bytes(32, "big") == secret


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_token_of_less_than_256_bits_is_never_made(size: int) -> None:
    with pytest.raises(ValueError, match="exactly 32 bytes"):
        render_token(b"\0" * size)


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, bytes(range(32)), sha256(b"x").digest()])
def test_every_wrong_character_is_a_typing_error(secret: bytes) -> None:
    token = render_token(secret)
    for at, right in enumerate(token):
        for wrong in DIGITS + "_-. é":
            if wrong != right:
                assert is_mistyped(token[:at] + wrong + token[at + 1 :]), (at, wrong)


@pytest.mark.parametrize("secret", [bytes(range(32)), sha256(b"x").digest(), sha256(b"y").digest()])
def test_two_neighbours_that_changed_places_are_a_typing_error(secret: bytes) -> None:
    token = render_token(secret)
    for at in range(len(token) - 1):
        if token[at] != token[at + 1]:
            assert is_mistyped(token[:at] + token[at + 1] + token[at] + token[at + 2 :]), at


def test_a_character_too_few_or_too_many_is_a_typing_error() -> None:
    token = render_token(sha256(b"x").digest())
    for mistyped in (token[:-1], token + "x", token + " ", token[:20] + token[21:]):
        assert is_mistyped(mistyped)


@pytest.mark.parametrize("other", ["", "hvs.CAESIJ", "s.1234567890abcdefghij", "b.AAAA", "root", "ghp_" + "a" * 36])
def test_somebody_elses_token_is_not_taken_for_a_mistyped_one_of_ours(other: str) -> None:
    assert not is_mistyped(other)


@given(st.text())
def test_no_text_is_too_strange_to_be_judged(text: str) -> None:
    assert is_mistyped(text) in (True, False)
    assert is_mistyped(TOKEN_PREFIX + text) in (True, False)


@given(st.text(st.characters(categories=["Cs", "Lu"])))
def test_text_that_is_no_utf_8_is_only_an_unknown_token(text: str) -> None:
    assert len(token_digest(text)) == 64
