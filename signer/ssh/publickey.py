"""OpenSSH public keys: one line of text to a vetted `PublicKey`, and back to text.

Formats: RFC 4253 section 6.6 (ssh-rsa), RFC 5656 section 3.1 (ecdsa), RFC 8709 section 4 (ssh-ed25519), OpenSSH
PROTOCOL.u2f (sk-*). `sshpubkeys` vets form and size; our own reader keeps the exact blob, because that is what is
certified. No policy here: which kinds and sizes a role takes is decided elsewhere.
"""

from __future__ import annotations

import binascii
from hashlib import sha256
from types import MappingProxyType
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec
from sshpubkeys import SSHKey
from sshpubkeys.exceptions import InvalidKeyError

from signer.errors import BadFormat, BadPublicKey
from signer.model import PublicKey
from signer.ssh.wire import ENDS_EARLY, Reader

# How many RFC 4251 strings (or mpints) follow the type name in a key blob; a certificate carries the same ones.
KEY_PARTS: Final = MappingProxyType(
    {
        "ssh-ed25519": 1,
        "ssh-rsa": 2,
        "ecdsa-sha2-nistp256": 2,
        "ecdsa-sha2-nistp384": 2,
        "ecdsa-sha2-nistp521": 2,
        "sk-ssh-ed25519@openssh.com": 2,
        "sk-ecdsa-sha2-nistp256@openssh.com": 3,
    }
)
USER_KEY_KINDS: Final = frozenset(KEY_PARTS)
CA_KEY_KINDS: Final = frozenset(kind for kind in KEY_PARTS if not kind.startswith("sk-"))

CERT_SUFFIX: Final = "-cert-v01@openssh.com"
MAX_TEXT: Final = 16 * 1024  # an RSA-16384 line has 2,800 characters
MAX_RSA_BITS: Final = 16_384  # OPENSSL_RSA_MAX_MODULUS_BITS, OpenSSH's own limit
_CURVES: Final = {
    "nistp256": (256, ec.SECP256R1()),
    "nistp384": (384, ec.SECP384R1()),
    "nistp521": (521, ec.SECP521R1()),
}


def parse_public_key(text: str) -> PublicKey:
    """A line `[type ]base64[ comment]`, as in `id.pub`, to a vetted key; the comment is dropped.

    Raises `BadPublicKey`, whose code tells the fault apart.
    """
    line = text.strip("\r\n")
    if not line:
        raise BadPublicKey("public_key_missing", "missing public_key", "send the text of your id_….pub file")
    if len(line) > MAX_TEXT:
        raise BadPublicKey("public_key_too_long", f"the public key is longer than {MAX_TEXT} characters")
    fields = line.split(" ")
    label, encoded = (fields[0], fields[1]) if len(fields) > 1 else ("", fields[0])
    blob = _decode_base64(encoded)
    kind = _kind_of(blob)
    if label and label != kind:
        raise BadPublicKey(
            "public_key_label_differs",
            f"the key is labelled {label[:64]!a} but its content is {kind}",
            "send the unchanged line of your id_….pub file",
        )
    bits = _read_blob(kind, blob)
    _vet_with_sshpubkeys(kind, encoded)
    return PublicKey(kind, blob, bits, fingerprint_of(blob))


def fingerprint_of(blob: bytes) -> str:
    """`SHA256:` and the unpadded base64 of the blob's SHA-256, as `ssh-keygen -l` prints it."""
    return "SHA256:" + binascii.b2a_base64(sha256(blob).digest(), newline=False).decode().rstrip("=")


def render_public_key(kind: str, blob: bytes) -> str:
    """`type base64`, without comment and newline; also the text form of a certificate."""
    return f"{kind} {binascii.b2a_base64(blob, newline=False).decode()}"


def certificate_kind(kind: str) -> str:
    """The certificate type name of a key type (draft-ietf-sshm-cert, section 2)."""
    return kind.removesuffix("@openssh.com") + CERT_SUFFIX


def _decode_base64(encoded: str) -> bytes:
    compact = encoded.replace("\n", "").replace("\r", "")
    try:
        blob = binascii.a2b_base64(compact.encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError):
        at = _first_fault(encoded)
        raise BadPublicKey(
            "public_key_not_base64",
            f"the public key is not base64 from character {at} on",
            "send the unchanged line of your id_….pub file",
            {"at": at},
        ) from None
    if not blob:
        raise _short()
    return blob


_ALPHABET = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")


def _first_fault(encoded: str) -> int:
    """Where Go's decoder stops: the first character that cannot stand where it stands, or a cut-off group's start."""
    group = 0
    byte_at = 0
    for char in encoded:
        if char not in "\r\n":
            if char == "=" and group >= 2:
                rest = encoded[encoded.index(char) :].strip("\r\n")
                return byte_at + (0 if len(rest) > 1 and group == 3 else 1)
            if char not in _ALPHABET:
                return byte_at
            group = (group + 1) % 4
        byte_at += len(char.encode("utf-8", "surrogatepass"))
    return byte_at - group


def _short() -> BadPublicKey:
    return BadPublicKey(
        "public_key_truncated",
        "the public key ends before it is complete",
        "send the unchanged line of your id_….pub file",
    )


def _kind_of(blob: bytes) -> str:
    try:
        kind = Reader(blob).string().decode("ascii")
    except BadFormat:
        raise _short() from None
    except UnicodeDecodeError:
        kind = "?"
    if kind.endswith(CERT_SUFFIX):
        raise BadPublicKey(
            "public_key_is_a_certificate",
            "a certificate was sent where a public key is wanted",
            "send the plain id_….pub, not id_…-cert.pub",
            {"kind": kind if kind.isprintable() else "?"},
        )
    if kind not in KEY_PARTS:
        raise BadPublicKey(
            "public_key_kind_unknown",
            f"keys of kind {kind[:64]!a} cannot be certified",
            f"use one of {', '.join(sorted(KEY_PARTS))}",
        )
    return kind


def _read_blob(kind: str, blob: bytes) -> int:
    """Reads every field of the blob strictly; returns the key's size in bits."""
    reader = Reader(blob)
    reader.string()
    try:
        if kind == "ssh-rsa":
            bits = _rsa_bits(reader)
        elif "ed25519" in kind:
            if len(reader.string()) != 32:
                raise BadFormat("bad_format", "an ed25519 key has 32 bytes")
            bits = 256
        else:
            bits = _ecdsa_bits(kind, reader)
        if kind.startswith("sk-") and not reader.text():
            raise BadFormat("bad_format", "the application of a FIDO key is empty")
        reader.expect_end()
    except BadFormat as fault:
        if fault.text == ENDS_EARLY:
            raise _short() from None
        raise _malformed(fault.text) from None
    return bits


def _malformed(why: str) -> BadPublicKey:
    return BadPublicKey("public_key_malformed", f"the public key is malformed: {why}")


def _rsa_bits(reader: Reader) -> int:
    exponent, modulus = reader.mpint(), reader.mpint()
    if exponent < 3 or exponent % 2 == 0 or exponent.bit_length() > 64 or modulus % 2 == 0:
        raise BadFormat("bad_format", "exponent or modulus is none that RSA can have")
    if modulus.bit_length() > MAX_RSA_BITS:
        raise BadFormat("bad_format", f"RSA keys may have {MAX_RSA_BITS} bits at most")
    return modulus.bit_length()


def _ecdsa_bits(kind: str, reader: Reader) -> int:
    curve_name = reader.text()
    if f"ecdsa-sha2-{curve_name}" not in kind:
        raise BadFormat("bad_format", "the curve differs from the key's type")
    bits, curve = _CURVES[curve_name]
    point = reader.string()
    try:
        ec.EllipticCurvePublicKey.from_encoded_point(curve, point)
    except ValueError:
        raise BadFormat("bad_format", "the point is not on its curve") from None
    if point[0] != 4:
        raise BadFormat("bad_format", "the point is compressed")
    return bits


def _vet_with_sshpubkeys(kind: str, encoded: str) -> None:
    """A second, independent opinion on form and size (RSA of 1024 to 16384 bits, key lengths, curves)."""
    try:
        # Given to the constructor, the key would be parsed twice.
        SSHKey(strict=True).parse(f"{kind} {encoded}")
    except InvalidKeyError:
        raise _malformed("form or size is not one that this kind of key has") from None
