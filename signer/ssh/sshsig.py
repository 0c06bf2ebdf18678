"""Verifies SSH signature blobs, and what `ssh-keygen -Y sign` makes (OpenSSH PROTOCOL.sshsig), also with FIDO keys; and
makes the latter with Ed25519 keys.

Blobs: RFC 4253 section 6.6, RFC 8332 section 3 (rsa-sha2), RFC 5656 section 3.1.2 (ecdsa), RFC 8709 section 6
(ed25519); of FIDO keys OpenSSH PROTOCOL.u2f. One sshsig over one message has one text: an armor that `ssh-keygen` would
write otherwise is refused, and only `BadSignature` is raised. Pure.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256, sha512
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm

from signer.errors import BadFormat, BadPublicKey, BadSignature
from signer.model import PublicKey
from signer.ssh.publickey import parse_public_key, render_public_key
from signer.ssh.wire import Reader, string, uint32

MAX_ARMOR: Final = 16 * 1024  # characters; with an RSA key of 16,384 bits it has 5,900
_BEGIN: Final = "-----BEGIN SSH SIGNATURE-----"
_END: Final = "-----END SSH SIGNATURE-----"
_WIDTH: Final = 70  # characters of base64 in a line
_MAGIC: Final = b"SSHSIG"
_VERSION: Final = 1
_HASHES: Final = {"sha256": sha256, "sha512": sha512}
_SIGN_HASH: Final = "sha512"
_USER_PRESENT: Final = 0x01  # PROTOCOL.u2f, "SSH U2F Signatures": flags
_USER_VERIFIED: Final = 0x04
_SIGN_AGAIN: Final = "sign with `ssh-keygen -Y sign` and send its whole output"

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


# --- sshsig -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SshSignature:
    """What a verified signature says: the key's fingerprint, and for a FIDO key its flags and its counter.

    A plain key says nothing of its user: both flags are False and `counter` is None.
    """

    fingerprint: str
    user_present: bool = False
    user_verified: bool = False
    counter: int | None = None


@dataclass(frozen=True, slots=True)
class _Unverified:
    """The fields of PROTOCOL.sshsig, "Blob format"; nothing is checked but their form."""

    key: bytes
    namespace: str
    hash_name: str
    signature: bytes


def signature_key(armored: str) -> PublicKey:
    """The key that the signature names as its own; proves nothing. Raises `BadSignature`."""
    return _parse_key(_parse(armored).key)


def verify(armored: str, message: bytes, namespace: str, key: PublicKey) -> SshSignature:
    """Checks that `key` signed `message` in `namespace`; the caller judges the flags.

    Raises `BadSignature`, whose code identifies the fault.
    """
    # 1 the form
    found = _parse(armored)
    # 2 the key and the namespace, whole and exact
    if found.key != key.blob:
        raise BadSignature(
            "signature_by_another_key",
            f"the signature is by {_parse_key(found.key).fingerprint}, not by {key.fingerprint}",
            "sign with the key that policy.toml lists in approval_keys",
        )
    if found.namespace != namespace:
        raise BadSignature(
            "signature_for_another_namespace",
            f"the signature is for the namespace {found.namespace[:64]!a}, not {namespace}",
            f"sign with `ssh-keygen -Y sign -n {namespace}`",
        )
    # 3 the signature over the message's hash
    signed = _signed_data(message, namespace, found.hash_name)
    try:
        if key.kind.startswith("sk-"):
            flags, counter = _check_fido_signature(key.blob, signed, found.signature)
            return SshSignature(key.fingerprint, bool(flags & _USER_PRESENT), bool(flags & _USER_VERIFIED), counter)
        check_signature(key.blob, signed, found.signature)
    except BadFormat as fault:
        raise BadSignature(
            "signature_wrong",
            f"{fault.text}: it is not for what it was sent with, or was changed",
            "show the request again and sign what it shows",
        ) from None
    return SshSignature(key.fingerprint)


def sign_armored(message: bytes, namespace: str, public: bytes, sign: Callable[[bytes], bytes]) -> str:
    """What `ssh-keygen -Y sign -n NAMESPACE` writes for `message` with an Ed25519 key.

    `public` is the key's 32 bytes; `sign` returns the 64 bytes of its signature over what it is given.
    """
    key, signed = string(b"ssh-ed25519") + string(public), _signed_data(message, namespace, _SIGN_HASH)
    signature = string(b"ssh-ed25519") + string(sign(signed))
    fields = (key, namespace.encode(), b"", _SIGN_HASH.encode(), signature)
    return _render_armor(_MAGIC + uint32(_VERSION) + b"".join(map(string, fields))) + "\n"


def _signed_data(message: bytes, namespace: str, hash_name: str) -> bytes:
    """The bytes that a key signs for `message` (PROTOCOL.sshsig, "Signed Data")."""
    digest = _HASHES[hash_name](message).digest()
    return _MAGIC + b"".join(map(string, (namespace.encode(), b"", hash_name.encode(), digest)))


def _parse(armored: str) -> _Unverified:
    if len(armored) > MAX_ARMOR:
        raise BadSignature("signature_too_long", f"the signature is longer than {MAX_ARMOR} characters", _SIGN_AGAIN)
    text = armored.removesuffix("\n")
    lines = text.split("\n")
    if len(lines) < 3 or lines[0] != _BEGIN or lines[-1] != _END:
        raise _malformed(f"it is not framed by {_BEGIN} and {_END}")
    try:
        blob = binascii.a2b_base64("".join(lines[1:-1]).encode("ascii"), strict_mode=True)
    except (UnicodeEncodeError, binascii.Error):
        raise _malformed("its content is not base64") from None
    if _render_armor(blob) != text:
        raise _malformed(f"its base64 is not in lines of {_WIDTH} characters as ssh-keygen writes it")
    return _read_blob(blob)


def _render_armor(blob: bytes) -> str:
    encoded = binascii.b2a_base64(blob, newline=False).decode()
    lines = [encoded[at : at + _WIDTH] for at in range(0, len(encoded), _WIDTH)]
    return "\n".join((_BEGIN, *lines, _END))


def _read_blob(blob: bytes) -> _Unverified:
    reader = Reader(blob)
    try:
        if reader.take(len(_MAGIC)) != _MAGIC:
            raise _malformed("it does not begin with SSHSIG")
        version = reader.uint32()
        if version != _VERSION:
            raise _malformed(f"its version is {version}, not {_VERSION}")
        key, namespace, reserved, hash_name = reader.string(), reader.text(), reader.string(), reader.text()
        signature = reader.string()
        reader.expect_end()
    except BadFormat as fault:
        if isinstance(fault, BadSignature):
            raise
        raise _malformed(fault.text) from None
    if reserved:
        raise _malformed("its reserved field is not empty")
    if hash_name not in _HASHES:
        raise _malformed(f"its hash algorithm is {hash_name[:32]!a}, not {' or '.join(_HASHES)}")
    return _Unverified(key, namespace, hash_name, signature)


def _parse_key(blob: bytes) -> PublicKey:
    try:
        kind = Reader(blob).text()
        return parse_public_key(render_public_key(kind, blob))
    except BadPublicKey as fault:
        raise _malformed(fault.text) from None
    except BadFormat:
        raise _malformed("the public key in it ends before it is complete") from None


def _malformed(why: str) -> BadSignature:
    return BadSignature("signature_malformed", f"the signature is malformed: {why}", _SIGN_AGAIN)


def _check_fido_signature(key_blob: bytes, signed: bytes, signature_blob: bytes) -> tuple[int, int]:
    """The flags and the counter of a FIDO key's signature (PROTOCOL.u2f, "SSH U2F Signatures"); raises `BadFormat`.

    The key signs the hash of its application, its flags, its counter and the hash of what is signed. `webauthn-…`,
    which a browser makes, is another algorithm and is refused.
    """
    key, reader = Reader(key_blob), Reader(signature_blob)
    kind = key.text()
    if reader.text() != kind:
        raise BadFormat("bad_signature", "the signature's algorithm does not match the key")
    is_ecdsa = kind.startswith("sk-ecdsa-")
    if is_ecdsa:
        key.string()  # the curve; parse_public_key() knows but one for FIDO keys
    public, application = key.string(), key.string()
    raw, flags, counter = reader.string(), reader.byte(), reader.uint32()
    reader.expect_end()
    data = sha256(application).digest() + bytes([flags]) + uint32(counter) + sha256(signed).digest()
    try:
        if is_ecdsa:
            numbers = Reader(raw)
            der = encode_dss_signature(numbers.mpint(), numbers.mpint())
            numbers.expect_end()
            point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), public)
            point.verify(der, data, ec.ECDSA(SHA256()))
        else:
            Ed25519PublicKey.from_public_bytes(public).verify(raw, data)
    except (InvalidSignature, ValueError):
        raise BadFormat("bad_signature", "the signature does not verify") from None
    return flags, counter
