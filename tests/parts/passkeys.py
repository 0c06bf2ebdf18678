"""Passkeys without hardware or browser: an authenticator and the client data that Chrome writes, by WebAuthn Level 3.

Shares no code with signer/authority/webauthn.py, which is tested with it, and with `webauthn` and `fido2`.
"""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from hashlib import sha256
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from fido2 import cbor
from fido2.cose import CoseKey

from signer.model import Assertion, Passkey

RP, ORIGIN = "signer.example.org", "https://signer.example.org"
PRESENT, VERIFIED, ELIGIBLE, BACKED_UP, ATTESTED, EXTENDED = 0x01, 0x04, 0x08, 0x10, 0x40, 0x80
ALGORITHMS = ("ES256", "EdDSA")
# Chrome adds it now and then, so that nobody compares client data with a template.
GREASE = {"other_keys_can_be_added_here": "do not compare clientDataJSON against a template. See https://goo.gl/yabPex"}


def b64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def unb64url(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class SoftPasskey:
    """A passkey. `flags` and `counter` are those of its next assertion; a synced one always counts 0."""

    def __init__(self, name: str = "anna", algorithm: str = "ES256", rp: str = RP, origin: str = ORIGIN) -> None:
        seed = sha256(f"passkey {algorithm} {name}".encode()).digest()
        self.algorithm, self.rp, self.origin = algorithm, rp, origin
        self.flags, self.counter = PRESENT | VERIFIED, 0
        self.id = sha256(f"id {algorithm} {name}".encode()).digest()[:16]
        self.cose: CoseKey
        if algorithm == "EdDSA":
            self._ed25519: Ed25519PrivateKey | None = Ed25519PrivateKey.from_private_bytes(seed)
            public: Any = self._ed25519.public_key()
            raw = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
            self.cose = CoseKey.parse({1: 1, 3: -8, -1: 6, -2: raw})
        else:
            self._ed25519 = None
            self._ecdsa = ec.derive_private_key(int.from_bytes(seed, "big") >> 1, ec.SECP256R1())
            public = self._ecdsa.public_key()
            point = public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
            self.cose = CoseKey.parse({1: 2, 3: -7, -1: 1, -2: point[1:33], -3: point[33:]})  # RFC 9053 section 7
        self.der: bytes = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    @property
    def cose_bytes(self) -> bytes:
        return cbor.encode(dict(self.cose))

    @property
    def pkcs8(self) -> bytes:
        """The private key, for an authenticator that is given one."""
        private: Any = self._ed25519 or self._ecdsa
        raw: bytes = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        return raw

    @property
    def fingerprint(self) -> str:
        return "SHA256:" + base64.b64encode(sha256(self.der).digest()).decode().rstrip("=")

    @property
    def line(self) -> Passkey:
        """The passkey as the policy has it."""
        return Passkey(b64url(self.id), b64url(self.der), self.rp, (self.origin,), self.fingerprint)

    @property
    def entry(self) -> str:
        """Its entry in `approval_keys` of policy.toml."""
        line = self.line
        return (
            f'{{ kind = "webauthn", id = "{line.id}", public_key = "{line.public_key}", rp = "{self.rp}",'
            f' origins = ["{self.origin}"] }}'
        )

    @property
    def enrolment(self) -> dict[str, str]:
        """What an enrolment page gives."""
        return {"id": b64url(self.id), "public_key": b64url(self.der), "rp": self.rp, "origin": self.origin}

    def client_data(self, statement: bytes, **changes: Any) -> bytes:
        """What Chrome writes for a challenge, with members changed; None leaves one out."""
        members = {
            "type": "webauthn.get",
            "challenge": b64url(sha256(statement).digest()),
            "origin": self.origin,
            "crossOrigin": False,
            **changes,
        }
        kept = {name: value for name, value in members.items() if value is not None}
        return json.dumps(kept, separators=(",", ":")).encode()

    def authenticator_data(self, more: bytes = b"") -> bytes:
        head = sha256(self.rp.encode()).digest() + bytes([self.flags])
        return head + self.counter.to_bytes(4, "big") + more

    def sign(self, client_data: bytes, data: bytes) -> Assertion:
        """The assertion over exactly these bytes."""
        signed = data + sha256(client_data).digest()
        if self._ed25519 is not None:
            signature = self._ed25519.sign(signed)
        else:
            signature = self._ecdsa.sign(signed, ec.ECDSA(SHA256(), deterministic_signing=True))
        return Assertion(b64url(self.id), b64url(data), b64url(client_data), b64url(signature))

    def approve(self, statement: bytes, **changes: Any) -> Assertion:
        """The assertion for a statement; `changes` are to the members of its client data."""
        return self.sign(self.client_data(statement, **changes), self.authenticator_data())


def resigned(assertion: Assertion) -> Assertion:
    """The assertion with the other signature by ECDSA that is valid for the same bytes, which needs no key."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    r, s = decode_dss_signature(unb64url(assertion.signature))
    return replace(assertion, signature=b64url(encode_dss_signature(r, order - s)))


def flipped(assertion: Assertion, field: str, bit: int) -> Assertion:
    """The assertion with one bit of a field flipped."""
    raw = bytearray(unb64url(getattr(assertion, field)))
    raw[bit // 8] ^= 1 << bit % 8
    return replace(assertion, **{field: b64url(bytes(raw))})


def body_of(assertion: Assertion, waiver: dict[str, object] | None = None) -> dict[str, Any]:
    """The body of the approve route."""
    fields = {name: getattr(assertion, name) for name in ("id", "authenticator_data", "client_data", "signature")}
    return {"assertion": fields, "waiver": waiver}
