"""Verifies an SSH signature blob against a public key blob; `ca/key.py` signs.

RFC 4253 section 6.6, RFC 8332 section 3 (rsa-sha2), RFC 5656 section 3.1.2 (ecdsa), RFC 8709 section 6 (ed25519).
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm

from signer.errors import BadFormat
from signer.ssh.wire import Reader

_RSA_HASHES: Final[dict[str, HashAlgorithm]] = {"rsa-sha2-256": SHA256(), "rsa-sha2-512": SHA512()}  # never SHA-1
_CURVES: Final[dict[str, tuple[ec.EllipticCurve, HashAlgorithm]]] = {
    "ecdsa-sha2-nistp256": (ec.SECP256R1(), SHA256()),
    "ecdsa-sha2-nistp384": (ec.SECP384R1(), SHA384()),
    "ecdsa-sha2-nistp521": (ec.SECP521R1(), SHA512()),
}


def check_signature(public_blob: bytes, signed: bytes, signature_blob: bytes) -> None:
    """Raises `BadFormat` unless `signature_blob` is `public_blob`'s signature over `signed`."""
    key, signature = Reader(public_blob), Reader(signature_blob)
    kind, algorithm = key.text(), signature.text()
    try:
        if kind == "ssh-ed25519" == algorithm:
            Ed25519PublicKey.from_public_bytes(key.string()).verify(signature.string(), signed)
        elif kind == "ssh-rsa" and algorithm in _RSA_HASHES:
            exponent, modulus = key.mpint(), key.mpint()
            public = rsa.RSAPublicNumbers(exponent, modulus).public_key()
            public.verify(signature.string(), signed, padding.PKCS1v15(), _RSA_HASHES[algorithm])
        elif kind in _CURVES and kind == algorithm:
            curve, digest = _CURVES[kind]
            key.string()
            point, numbers = key.string(), Reader(signature.string())
            raw = encode_dss_signature(numbers.mpint(), numbers.mpint())
            numbers.expect_end()
            ec.EllipticCurvePublicKey.from_encoded_point(curve, point).verify(raw, signed, ec.ECDSA(digest))
        else:
            raise BadFormat("bad_signature", "the signature's algorithm does not match the key")
        signature.expect_end()
    except (InvalidSignature, ValueError):
        raise BadFormat("bad_signature", "the signature does not verify") from None
