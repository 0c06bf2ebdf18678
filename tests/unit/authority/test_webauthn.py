"""Assertions of passkeys: `webauthn` and `fido2` take the same ones, and each way to spoil one is refused.

Where our rules are narrower than theirs, a test says so; nothing may be accepted here that they refuse.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
from fido2.server import Fido2Server
from fido2.webauthn import Aaguid, AttestedCredentialData, PublicKeyCredentialRpEntity, UserVerificationRequirement
from hypothesis import given
from hypothesis import strategies as st
from webauthn import verify_authentication_response

from signer.authority.webauthn import MAX_CLIENT_DATA, VerifiedAssertion, challenge_of, verify_assertion
from signer.errors import BadSignature
from signer.model import Assertion, Passkey
from tests.parts.passkeys import (
    ALGORITHMS,
    ATTESTED,
    BACKED_UP,
    ELIGIBLE,
    EXTENDED,
    GREASE,
    ORIGIN,
    PRESENT,
    VERIFIED,
    SoftPasskey,
    b64url,
    flipped,
    unb64url,
)

STATEMENT = b'{"purpose":"signer-approval","request":"r-abcdefghij"}'
FIELDS = ("authenticator_data", "client_data", "signature")


@pytest.fixture(params=ALGORITHMS)
def key(request: pytest.FixtureRequest) -> SoftPasskey:
    return SoftPasskey(algorithm=request.param)


def code_of(assertion: Assertion, passkey: Passkey, statement: bytes = STATEMENT) -> str:
    with pytest.raises(BadSignature) as caught:
        verify_assertion(assertion, statement, passkey)
    assert caught.value.text
    assert caught.value.hint
    return caught.value.code


def spoiled(key: SoftPasskey, raw: bytes) -> str:
    """The code for an assertion that is signed over this client data."""
    return code_of(key.sign(raw, key.authenticator_data()), key.line)


# --- the oracles -----------------------------------------------------------------------------------------------------


def response_of(assertion: Assertion) -> dict[str, Any]:
    """AuthenticationResponseJSON, as `toJSON()` of a browser gives it."""
    return {
        "id": assertion.id,
        "rawId": assertion.id,
        "type": "public-key",
        "clientExtensionResults": {},
        "response": {
            "authenticatorData": assertion.authenticator_data,
            "clientDataJSON": assertion.client_data,
            "signature": assertion.signature,
        },
    }


def webauthn_takes(assertion: Assertion, key: SoftPasskey, statement: bytes) -> bool:
    try:
        verify_authentication_response(
            credential=response_of(assertion),
            expected_challenge=sha256(statement).digest(),
            expected_rp_id=key.rp,
            expected_origin=[key.origin],
            credential_public_key=key.cose_bytes,
            credential_current_sign_count=0,
            require_user_verification=True,
        )
    except Exception:  # its parsers raise errors of every kind
        logging.getLogger(__name__).debug("refused", exc_info=True)
        return False
    return True


def fido2_takes(assertion: Assertion, key: SoftPasskey, statement: bytes) -> bool:
    server = Fido2Server(PublicKeyCredentialRpEntity(name="signer", id=key.rp), verify_origin=lambda o: o == key.origin)
    state = {
        "challenge": b64url(sha256(statement).digest()),
        "user_verification": UserVerificationRequirement.REQUIRED,
    }
    credential = AttestedCredentialData.create(Aaguid.NONE, key.id, key.cose)
    try:
        server.authenticate_complete(state, [credential], response_of(assertion))
    except Exception:
        logging.getLogger(__name__).debug("refused", exc_info=True)
        return False
    return True


def taken(assertion: Assertion, passkey: Passkey, statement: bytes = STATEMENT) -> VerifiedAssertion | None:
    """What it says, if it counts as an approval."""
    try:
        found = verify_assertion(assertion, statement, passkey)
    except BadSignature:
        return None
    return found if found.user_present and found.user_verified else None


# --- good ones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [PRESENT | VERIFIED, PRESENT | VERIFIED | ELIGIBLE | BACKED_UP])
@pytest.mark.parametrize("counter", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("more", [{}, GREASE, {"crossOrigin": None}])
def test_a_real_assertion_is_good_here_and_for_the_oracles(
    key: SoftPasskey, flags: int, counter: int, more: dict[str, Any]
) -> None:
    key.flags, key.counter = flags, counter
    made = key.approve(STATEMENT, **more)
    found = verify_assertion(made, STATEMENT, key.line)
    assert (found.fingerprint, found.user_present, found.user_verified) == (key.fingerprint, True, True)
    assert found.counter == counter
    assert webauthn_takes(made, key, STATEMENT)
    assert fido2_takes(made, key, STATEMENT)


def test_flags_are_told_and_not_judged(key: SoftPasskey) -> None:
    for flags, expected in ((0, (False, False)), (PRESENT, (True, False)), (VERIFIED, (False, True))):
        key.flags = flags
        found = verify_assertion(key.approve(STATEMENT), STATEMENT, key.line)
        assert (found.user_present, found.user_verified) == expected


def test_the_same_bytes_have_the_same_content_and_others_another(key: SoftPasskey) -> None:
    first, again = (verify_assertion(key.approve(STATEMENT), STATEMENT, key.line).content for _ in range(2))
    assert first == again
    key.counter += 1
    assert verify_assertion(key.approve(STATEMENT), STATEMENT, key.line).content != first


def test_each_of_several_origins_is_good(key: SoftPasskey) -> None:
    line = replace(key.line, origins=("https://a.signer.example.org", ORIGIN))
    assert taken(key.approve(STATEMENT), line) is not None


# --- spoiled ones ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes,code",
    [
        ({"type": "webauthn.create"}, "assertion_malformed"),
        ({"type": None}, "assertion_malformed"),
        ({"type": ["webauthn.get"]}, "assertion_malformed"),
        ({"challenge": b64url(sha256(b"another").digest())}, "assertion_for_another_statement"),
        ({"challenge": challenge_of(STATEMENT) + "="}, "assertion_for_another_statement"),
        ({"challenge": challenge_of(STATEMENT)[:-1]}, "assertion_for_another_statement"),
        ({"challenge": None}, "assertion_for_another_statement"),
        ({"challenge": 7}, "assertion_for_another_statement"),
        ({"challenge": "\ud800"}, "assertion_for_another_statement"),
        ({"origin": "https://evil.example.org"}, "assertion_from_another_page"),
        ({"origin": "http://signer.example.org"}, "assertion_from_another_page"),
        ({"origin": ORIGIN + "/"}, "assertion_from_another_page"),
        ({"origin": ORIGIN + ":443"}, "assertion_from_another_page"),
        ({"origin": ORIGIN.upper()}, "assertion_from_another_page"),
        ({"origin": ORIGIN + ".evil.example"}, "assertion_from_another_page"),
        ({"origin": [ORIGIN]}, "assertion_from_another_page"),
        ({"origin": None}, "assertion_from_another_page"),
        ({"crossOrigin": True}, "assertion_from_another_page"),
        ({"crossOrigin": "false"}, "assertion_from_another_page"),
        ({"crossOrigin": 0}, "assertion_from_another_page"),
        ({"topOrigin": ORIGIN}, "assertion_from_another_page"),
        ({"topOrigin": ""}, "assertion_from_another_page"),
    ],
)
def test_client_data_for_something_else_is_refused(key: SoftPasskey, changes: dict[str, Any], code: str) -> None:
    assert code_of(key.approve(STATEMENT, **changes), key.line) == code


def test_client_data_is_read_strictly(key: SoftPasskey) -> None:
    good = key.client_data(STATEMENT)
    member = good[1:-1]
    for raw in (
        b"\xef\xbb\xbf" + good,
        good.decode().encode("utf-16"),
        good[:-1],
        good + b"x",
        good + good,
        b"[" + good + b"]",
        b"null",
        b'"text"',
        b"[" * 1000 + b"]" * 1000,
        b"{" + member + b"," + member + b"}",
        good[:-1] + b',"challenge":"other"}',
        good[:-1] + b',"deep":{"a":1,"a":2}}',
        good[:-1] + b',"number":NaN}',
        good[:-1] + b',"text":"\xff"}',
    ):
        assert spoiled(key, raw) == "assertion_malformed", raw
    wide = good[:-1] + b',"x":"' + b"a" * MAX_CLIENT_DATA + b'"}'
    assert spoiled(key, wide) == "assertion_malformed"


@pytest.mark.parametrize("flag", [ATTESTED, EXTENDED, ATTESTED | EXTENDED, BACKED_UP])
def test_authenticator_data_that_nobody_asked_for_is_refused(key: SoftPasskey, flag: int) -> None:
    key.flags |= flag
    assert code_of(key.approve(STATEMENT), key.line) == "assertion_malformed"


@pytest.mark.parametrize("more", [b"\xa0", b"\0" * 64])
def test_authenticator_data_with_something_behind_it_is_refused(key: SoftPasskey, more: bytes) -> None:
    made = key.sign(key.client_data(STATEMENT), key.authenticator_data(more))
    assert code_of(made, key.line) == "assertion_malformed"
    short = key.sign(key.client_data(STATEMENT), key.authenticator_data()[:-1])
    assert code_of(short, key.line) == "assertion_malformed"


def test_another_relying_party_is_refused(key: SoftPasskey) -> None:
    key.rp = "example.org"
    made = key.approve(STATEMENT)
    assert code_of(made, replace(key.line, rp="signer.example.org")) == "assertion_from_another_page"


def test_another_passkey_is_refused(key: SoftPasskey) -> None:
    other = SoftPasskey("ben", key.algorithm)
    assert code_of(other.approve(STATEMENT), key.line) == "signature_by_another_key"
    renamed = replace(other.approve(STATEMENT), id=key.line.id)
    assert code_of(renamed, key.line) == "signature_wrong"
    foreign = SoftPasskey("anna", next(name for name in ALGORITHMS if name != key.algorithm))
    assert code_of(replace(foreign.approve(STATEMENT), id=key.line.id), key.line) == "signature_wrong"


def test_another_statement_is_refused(key: SoftPasskey) -> None:
    assert code_of(key.approve(STATEMENT), key.line, STATEMENT + b" ") == "assertion_for_another_statement"


@pytest.mark.parametrize("field", FIELDS)
def test_each_flipped_bit_is_refused(key: SoftPasskey, field: str) -> None:
    made = key.approve(STATEMENT)
    for bit in range(8 * len(unb64url(getattr(made, field)))):
        assert taken(flipped(made, field, bit), key.line) is None, bit
    assert taken(made, key.line) is not None


@pytest.mark.parametrize("field", ["id", *FIELDS])
def test_each_value_has_one_text(key: SoftPasskey, field: str) -> None:
    """Padding, the other alphabet, blanks, line ends, and bits behind the last byte are refused."""
    made = key.approve(STATEMENT)
    text = getattr(made, field)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    variants = ["", text + "=", text + "==", text + "\n", " " + text, text + "A" * 3_000, text[:-1] + "+", text + "é"]
    if len(text) % 4:
        variants.append(text[:-1] + alphabet[alphabet.index(text[-1]) ^ 1])
        assert unb64url(variants[-1]) == unb64url(text)
    for variant in variants:
        found = code_of(replace(made, **{field: variant}), key.line)
        assert found in ("assertion_malformed", "signature_by_another_key"), variant


def test_the_order_of_checks_is_that_of_the_specification() -> None:
    """A challenge for something else is told before the page, and the page before the signature."""
    key = SoftPasskey()
    made = key.approve(b"another", origin="https://evil.example.org")
    assert code_of(replace(made, signature=b64url(b"x")), key.line) == "assertion_for_another_statement"
    made = key.approve(STATEMENT, origin="https://evil.example.org")
    assert code_of(replace(made, signature=b64url(b"x")), key.line) == "assertion_from_another_page"


def test_work_is_linear_in_what_is_sent() -> None:
    """Whatever is too long is refused by its length alone."""
    key = SoftPasskey()
    made = key.approve(STATEMENT)
    for field in ("id", *FIELDS):
        huge = replace(made, **{field: "A" * 10_000_000})
        assert code_of(huge, key.line) == "assertion_malformed"


# --- against the oracles ---------------------------------------------------------------------------------------------

_TEXTS = st.one_of(st.text(max_size=20), st.sampled_from([ORIGIN, "webauthn.get", challenge_of(STATEMENT), "", "null"]))
_VALUES = st.one_of(st.none(), st.booleans(), st.integers(), _TEXTS, st.lists(_TEXTS, max_size=2))
_NAMES = st.sampled_from(["type", "challenge", "origin", "crossOrigin", "topOrigin", "tokenBinding", "x"])


@st.composite
def changed(draw: st.DrawFn) -> tuple[SoftPasskey, Assertion]:
    """A signed assertion whose client data, flags, counter or bytes may be anything."""
    key = SoftPasskey(algorithm=draw(st.sampled_from(ALGORITHMS)))
    key.flags = draw(st.sampled_from([PRESENT | VERIFIED, PRESENT | VERIFIED | ELIGIBLE, draw(st.integers(0, 255))]))
    key.counter = draw(st.integers(0, 2**32 - 1))
    members = draw(st.dictionaries(_NAMES, _VALUES, max_size=2))
    raw = key.client_data(STATEMENT, **members)
    raw = draw(
        st.sampled_from([raw, json.dumps(json.loads(raw), indent=1).encode(), raw + b"\n", b"\xef\xbb\xbf" + raw])
    )
    made = key.sign(raw, key.authenticator_data(draw(st.sampled_from([b"", b"", b"\xa0"]))))
    if draw(st.booleans()):
        field = draw(st.sampled_from(FIELDS))
        made = flipped(made, field, draw(st.integers(0, 8 * len(unb64url(getattr(made, field))) - 1)))
    return key, made


@given(changed())
def test_nothing_is_good_here_that_an_oracle_refuses(case: tuple[SoftPasskey, Assertion]) -> None:
    key, made = case
    if taken(made, key.line) is not None:
        assert webauthn_takes(made, key, STATEMENT)
        assert fido2_takes(made, key, STATEMENT)


@given(st.binary(max_size=300), st.binary(max_size=60), st.binary(max_size=90))
def test_no_bytes_raise_anything_else(client_data: bytes, data: bytes, signature: bytes) -> None:
    key = SoftPasskey()
    made = Assertion(key.line.id, *map(b64url, (data, client_data, signature)))
    assert taken(made, key.line) is None
    signed = key.sign(client_data, data)
    assert taken(signed, key.line) is None


@given(st.text(max_size=60), st.sampled_from(["id", *FIELDS]))
def test_no_text_raises_anything_else(text: str, field: str) -> None:
    key = SoftPasskey()
    assert taken(replace(key.approve(STATEMENT), **{field: text}), key.line) is None
