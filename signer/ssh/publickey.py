"""OpenSSH public keys: parses and checks a line of text, and renders it.

Formats: RFC 4253 section 6.6 (ssh-rsa), RFC 5656 section 3.1 (ecdsa), RFC 8709 section 4 (ssh-ed25519), OpenSSH
PROTOCOL.u2f (sk-*). `sshpubkeys` checks form and size; the strict reader here keeps the exact blob, which is
certified. Contains no policy about allowed kinds and sizes.
"""

from __future__ import annotations

import binascii
import re
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

# Here and not where it is used: the first key would be read only if a descriptor is free and the disk answers.
from sshpubkeys import SSHKey
from sshpubkeys.exceptions import InvalidKeyError

from signer.errors import BadFormat, BadKeyFile, BadPublicKey
from signer.model import MAX_PUBLIC_KEY, PublicKey
from signer.ssh.fingerprint import fingerprint_of
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
MIN_CA_RSA_BITS: Final = 3072

CERT_SUFFIX: Final = "-cert-v01@openssh.com"
MAX_RSA_EXPONENT_BITS: Final = 24  # as Go has it; nearly all keys have 65537
MAX_RSA_BITS: Final = 16_384  # OPENSSL_RSA_MAX_MODULUS_BITS, OpenSSH's own limit
_CURVES: Final = {
    "nistp256": (256, ec.SECP256R1()),
    "nistp384": (384, ec.SECP384R1()),
    "nistp521": (521, ec.SECP521R1()),
}


def check_ca_kind(kind: str, bits: int) -> None:
    """Raises `BadKeyFile` for a key that is of no kind of CA keys, or too short."""
    if kind not in CA_KEY_KINDS:
        text = f"the CA key is {kind}, not of type ed25519, ecdsa or rsa"
        raise BadKeyFile("ca_key_kind_not_allowed", text, "use ed25519")
    if kind == "ssh-rsa" and bits < MIN_CA_RSA_BITS:
        text = f"the RSA CA key has {bits} bits, below the minimum of {MIN_CA_RSA_BITS}"
        raise BadKeyFile("ca_key_rsa_too_short", text, "use ed25519")


def parse_public_key(text: str) -> PublicKey:
    """Parses and checks a line `[type ]base64[ comment]`, as in `id.pub`; drops the comment.

    Raises `BadPublicKey`, whose code identifies the fault.
    """
    text = text.removeprefix("\ufeff")  # the byte order mark that editors on Windows write
    if not text:
        raise BadPublicKey("public_key_missing", "missing public_key", "send the text of your id_….pub file")
    if len(text) > MAX_PUBLIC_KEY:
        raise BadPublicKey("public_key_too_long", f"the public key is longer than {MAX_PUBLIC_KEY} characters")
    fields = text.split(" ")
    label, encoded = (fields[0].strip("\r\n"), fields[1]) if len(fields) > 1 else ("", fields[0])
    blob = _decode_base64(encoded)
    reader = Reader(blob)
    kind = _kind_of(reader)
    bits = _read_blob(kind, reader)
    _vet_with_sshpubkeys(kind, blob)
    if label and label != kind:
        raise BadPublicKey(
            "public_key_label_differs",
            f"the key is labelled {label[:64]!a} but its content is {kind}",
            "send the unchanged line of your id_….pub file",
        )
    return PublicKey(kind, blob, bits, fingerprint_of(blob))


def render_public_key(kind: str, blob: bytes) -> str:
    """`type base64`, without comment and newline; also the text form of a certificate."""
    return f"{kind} {binascii.b2a_base64(blob, newline=False).decode()}"


def certificate_kind(kind: str) -> str:
    """The certificate type name of a key type (draft-ietf-sshm-cert, section 2)."""
    return kind.removesuffix("@openssh.com") + CERT_SUFFIX


def _decode_base64(encoded: str) -> bytes:
    at = _first_fault(encoded.encode("utf-8", "replace"))
    if at is not None:
        raise BadPublicKey(
            "public_key_not_base64",
            f"the public key is not base64 from character {at} on",
            "send the unchanged line of your id_….pub file",
            {"at": at},
        )
    blob = binascii.a2b_base64(encoded)
    if not blob:
        raise _short()
    return blob


_ALPHABET = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
_WELL_FORMED: Final = re.compile(rb"(?:[A-Za-z0-9+/]{4})*+(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?+")


def _first_fault(encoded: bytes) -> int | None:
    """The byte at which Go's encoding/base64 stops, None if it reads everything; line ends are allowed anywhere."""
    if _WELL_FORMED.fullmatch(encoded):
        return None
    in_group = 0
    for at, byte in enumerate(encoded):
        if byte in b"\r\n":
            continue
        if byte in _ALPHABET:
            in_group = (in_group + 1) % 4
        elif byte == ord("=") and in_group >= 2:
            return _fault_of_padding(encoded, at, in_group)
        else:
            return at
    return len(encoded) - in_group if in_group else None


def _fault_of_padding(encoded: bytes, at: int, in_group: int) -> int | None:
    """Position of the fault in padding that begins at `at`, after 2 or 3 characters of its group; None if valid."""

    def past_line_ends(place: int) -> int:
        while place < len(encoded) and encoded[place] in b"\r\n":
            place += 1
        return place

    end = at + 1
    if in_group == 2:
        end = past_line_ends(end)
        if end == len(encoded):
            return end
        if encoded[end] != ord("="):
            return end - 1
        end += 1
    end = past_line_ends(end)
    return None if end == len(encoded) else end


def _short() -> BadPublicKey:
    return BadPublicKey(
        "public_key_truncated",
        "the public key ends before it is complete",
        "send the unchanged line of your id_….pub file",
    )


def _kind_of(reader: Reader) -> str:
    try:
        kind = reader.string().decode("ascii")
    except BadFormat:
        raise _short() from None
    except UnicodeDecodeError:
        kind = "?"
    if kind.endswith(CERT_SUFFIX):
        raise BadPublicKey(
            "public_key_is_a_certificate",
            "the public key is a certificate",
            "send the plain id_….pub, not id_…-cert.pub",
            {"kind": _shown(kind)},
        )
    if kind not in KEY_PARTS:
        raise BadPublicKey(
            "public_key_kind_unknown",
            f"keys of kind {kind[:64]!a} cannot be certified",
            f"use one of {', '.join(sorted(KEY_PARTS))}",
            {"kind": _shown(kind)},
        )
    return kind


def _read_blob(kind: str, reader: Reader) -> int:
    """Reads every field of the blob after its kind, strictly; returns the key's size in bits."""
    if reader.at_end():
        raise _malformed("it contains only a kind", "empty")
    try:
        if kind == "ssh-rsa":
            bits = _rsa_bits(reader)
        elif "ed25519" in kind:
            size = len(reader.string())
            if size != 32:
                raise _malformed(f"an ed25519 key has 32 bytes, not {size}", "ed25519_size", size)
            bits = 256
        else:
            bits = _ecdsa_bits(kind, reader)
        if kind.startswith("sk-") and not reader.text():
            raise _malformed("the application of a FIDO key is empty", "application")
    except BadFormat as fault:
        if isinstance(fault, BadPublicKey):
            raise
        if fault.text == ENDS_EARLY:
            raise _short() from None
        raise _malformed(fault.text, "form") from None
    if not reader.at_end():
        raise _malformed("there is data after the last value", "trailing")
    return bits


def _malformed(why: str, fault: str, detail: object = "") -> BadPublicKey:
    """`fault` and `detail` are for edges with their own sentences."""
    return BadPublicKey(
        "public_key_malformed", f"the public key is malformed: {why}", facts={"fault": fault, "detail": detail}
    )


def _rsa_bits(reader: Reader) -> int:
    exponent, modulus = reader.mpint(), reader.mpint()
    if exponent.bit_length() > MAX_RSA_EXPONENT_BITS:
        raise _malformed("its exponent is too large", "exponent_large")
    if exponent < 3 or exponent % 2 == 0:
        raise _malformed("its exponent is not valid for RSA", "exponent")
    if modulus % 2 == 0:
        raise _malformed("its modulus is even", "modulus")
    if modulus <= exponent:
        raise _malformed("its modulus is below its exponent", "modulus")
    if modulus.bit_length() > MAX_RSA_BITS:
        raise _malformed(f"its modulus is longer than {MAX_RSA_BITS} bits", "modulus")
    return modulus.bit_length()


def _ecdsa_bits(kind: str, reader: Reader) -> int:
    curve_name = reader.text()
    if kind.removeprefix("sk-").removesuffix("@openssh.com") != f"ecdsa-sha2-{curve_name}":
        detail = {"kind": kind, "curve": _shown(curve_name)}
        raise _malformed("the curve differs from the key's kind", "curve", detail)
    bits, curve = _CURVES[curve_name]
    point = reader.string()
    try:
        ec.EllipticCurvePublicKey.from_encoded_point(curve, point)
    except ValueError:
        raise _malformed("the point is not on its curve", "point") from None
    if point[0] != 4:
        raise _malformed("the point is compressed", "point")
    return bits


def _shown(name: str) -> str:
    """A caller's text, shortened, or `?`: `plain` is not imported here, as `safe-session` imports this module."""
    return name[:64] if name.isprintable() else "?"


def _vet_with_sshpubkeys(kind: str, blob: bytes) -> None:
    """A second, independent check of form and size (RSA of 1024 to 16384 bits, key lengths, curves)."""
    if "ed25519" in kind:
        # Any 32 bytes are such a key, so what is checked is the rest of the blob, which is nearly always the same.
        start = 4 + len(kind) + 4
        _vet_form(kind, blob[:start] + _ANY_ED25519 + blob[start + len(_ANY_ED25519) :])
    else:
        _vet(kind, blob)


def _vet(kind: str, blob: bytes) -> None:
    try:
        # The constructor would parse the key twice.
        SSHKey(strict=True).parse(render_public_key(kind, blob))
    except (InvalidKeyError, ValueError, NotImplementedError, UnsupportedAlgorithm):
        # Its parser does not catch errors of `cryptography` (ValueError for an exponent above its modulus).
        raise _malformed("its form or size is not valid for its kind", "form") from None


_ANY_ED25519: Final = bytes(32)
_vet_form: Final = lru_cache(maxsize=64)(_vet)  # remembers no refusal
