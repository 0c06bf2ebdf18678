"""Verifies the assertion of a passkey over the statement of an approval: WebAuthn Level 3 section 7.2. Pure.

`verify_assertion` is the one function. An assertion is made for exactly one statement: its challenge is the SHA-256 of
the statement's bytes. Extensions and attested data are refused, so that no CBOR is read. Raises `BadSignature` only.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256

from signer.errors import BadSignature
from signer.model import Assertion, Passkey
from signer.policy import passkeys

MAX_CLIENT_DATA: Final = 2_048  # bytes; Chrome writes about 250, with the longest origin 500
MAX_SIGNATURE: Final = 72  # bytes; an ECDSA signature with P-256 in DER
_AUTHENTICATOR_DATA: Final = 37  # bytes: section 6.1 without attested data and extensions
_USER_PRESENT: Final = 0x01  # flags of section 6.1
_USER_VERIFIED: Final = 0x04
_BACKUP_ELIGIBLE: Final = 0x08
_BACKED_UP: Final = 0x10
_HAS_KEY_OR_EXTENSIONS: Final = 0xC0
_TYPE: Final = "webauthn.get"
_SIGN_AGAIN: Final = "reload the request's page and approve again"


@dataclass(frozen=True, slots=True)
class VerifiedAssertion:
    """What a verified assertion says: the passkey's fingerprint, its flags and its counter.

    `content` is the SHA-256 in hex of what was signed; the same assertion again has the same.
    """

    fingerprint: str
    user_present: bool
    user_verified: bool
    counter: int
    content: str


def verify_assertion(assertion: Assertion, statement: bytes, passkey: Passkey) -> VerifiedAssertion:
    """Checks that `passkey` made `assertion` for `statement`; the caller judges flags and counter.

    The numbers are the steps of WebAuthn Level 3 section 7.2. Steps that concern sessions, accounts, attestation and
    extensions have no counterpart: the caller is authenticated by a token, and extensions are refused.
    """
    # 5-6 the credential is the one of the line in policy.toml
    _decode(assertion.id, "id", passkeys.MAX_ID)
    if assertion.id != passkey.id:
        raise BadSignature(
            "signature_by_another_key",
            "the assertion is by another passkey than the one of the line in policy.toml",
            "approve with a passkey that policy.toml lists in approval_keys",
        )
    # 7-10 the parts, and the client data as JSON
    raw_client_data = _decode(assertion.client_data, "client_data", MAX_CLIENT_DATA)
    data = _decode(assertion.authenticator_data, "authenticator_data", _AUTHENTICATOR_DATA)
    signature = _decode(assertion.signature, "signature", MAX_SIGNATURE)
    client_data = _read_client_data(raw_client_data)
    # 11 the type
    if client_data.get("type") != _TYPE:
        raise _malformed(f"the type of its client data is not {_TYPE}")
    # 12 the challenge
    challenge = client_data.get("challenge")
    if not isinstance(challenge, str) or not hmac.compare_digest(
        challenge.encode("utf-8", "surrogatepass"), challenge_of(statement).encode()
    ):
        raise BadSignature(
            "assertion_for_another_statement",
            "the assertion is for another request, waiver or approver: its challenge is not this statement's",
            _SIGN_AGAIN,
        )
    # 13-15 the page, which is not inside a page of another origin
    if client_data.get("origin") not in passkey.origins:
        raise _wrong_place(f"it was made on {str(client_data.get('origin'))[:80]!a}, not on {passkey.origins[0]}")
    if client_data.get("crossOrigin", False) is not False or "topOrigin" in client_data:
        raise _wrong_place("it was made inside a page of another origin")
    # 16 the relying party
    if len(data) != _AUTHENTICATOR_DATA:
        raise _malformed(f"its authenticator data has {len(data)} bytes, not {_AUTHENTICATOR_DATA}")
    if data[:32] != sha256(passkey.rp.encode()).digest():
        raise _wrong_place(f"it was made for another relying party than {passkey.rp}")
    # 17-20 the flags; the caller judges presence and verification of the user
    flags = data[32]
    if flags & _HAS_KEY_OR_EXTENSIONS:
        raise _malformed("its authenticator data has attested data or extensions, which nobody asked for")
    if flags & _BACKED_UP and not flags & _BACKUP_ELIGIBLE:
        raise _malformed("its flags say that a key is backed up which cannot be")
    # 22-23 the signature over authenticator data and the hash of the client data
    signed = data + sha256(raw_client_data).digest()
    _check_signature(passkey, signature, signed)
    counter = int.from_bytes(data[33:], "big")
    content = sha256(signed).hexdigest()
    return VerifiedAssertion(
        passkey.fingerprint, bool(flags & _USER_PRESENT), bool(flags & _USER_VERIFIED), counter, content
    )


def challenge_of(statement: bytes) -> str:
    """The challenge for a statement, as client data has it: base64url of its SHA-256."""
    return passkeys.encode_base64url(sha256(statement).digest())


def _decode(text: str, name: str, limit: int) -> bytes:
    try:
        return passkeys.decode_base64url(text, limit)
    except ValueError as fault:
        raise _malformed(f"its {name} {fault}") from None


def _read_client_data(raw: bytes) -> dict[str, Any]:
    """The members of CollectedClientData (section 5.8.1); unknown ones are allowed, because browsers add some.

    A byte order mark, which no browser writes, is refused, and so is a name that comes twice.
    """
    try:
        return passkeys.read_json_object(raw)
    except ValueError:
        raise _malformed("its client data is not a JSON object in UTF-8 with each name once") from None


def _check_signature(passkey: Passkey, signature: bytes, signed: bytes) -> None:
    try:
        key = passkeys.load_passkey(passkeys.decode_base64url(passkey.public_key, passkeys.MAX_PUBLIC_KEY))
        if isinstance(key, Ed25519PublicKey):
            key.verify(signature, signed)
        else:
            key.verify(signature, signed, ec.ECDSA(SHA256()))
    except (InvalidSignature, ValueError):
        raise BadSignature(
            "signature_wrong",
            "the assertion does not verify: it is not by this passkey, or was changed",
            _SIGN_AGAIN,
        ) from None


def _malformed(why: str) -> BadSignature:
    return BadSignature("assertion_malformed", f"the assertion is malformed: {why}", _SIGN_AGAIN)


def _wrong_place(why: str) -> BadSignature:
    return BadSignature(
        "assertion_from_another_page",
        f"the assertion does not count: {why}",
        "open the request on a page that the passkey's line in policy.toml names in origins",
    )
