"""OpenSSH user certificates: fields to the bytes to be signed, and back.

Format: draft-ietf-sshm-cert section 2 and 3, OpenSSH PROTOCOL.certkeys. Pure. Does not sign, and sets no
defaults, because a default is a decision.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct
from typing import Final

import msgspec

from signer.errors import BadFormat
from signer.ssh.publickey import CERT_SUFFIX, KEY_PARTS, certificate_kind
from signer.ssh.wire import Reader, string

USER_CERTIFICATE: Final = 1  # SSH_CERT_TYPE_USER
NONCE_BYTES: Final = 32
MAX_PRINCIPALS: Final = 256  # SSHKEY_CERT_MAX_PRINCIPALS
MAX_CERTIFICATE: Final = 256 * 1024
REMEMBERED: Final = 64  # lists of principals or options, of each kind

# By the type name of a certificate: the kind of its key, that with its length, and how many strings follow it.
_KINDS_OF_CERTIFICATES: Final = {
    certificate_kind(kind).encode(): (kind, string(kind.encode()), parts) for kind, parts in KEY_PARTS.items()
}
_SERIAL_AND_TYPE: Final = Struct(">QI")
_VALIDITY: Final = Struct(">QQ")


class CertificateFields(msgspec.Struct, frozen=True):
    """Everything between the type name and the signature.

    `key` is the subject's whole public key blob. Times are seconds since 1970; the certificate is valid from
    `valid_after` to just before `valid_before`. Options are sorted by name; a flag has the value "".
    """

    key_kind: str
    key: bytes
    nonce: bytes
    serial: int
    cert_type: int
    key_id: str
    principals: tuple[str, ...]
    valid_after: int
    valid_before: int
    critical_options: tuple[tuple[str, str], ...]
    extensions: tuple[tuple[str, str], ...]
    ca_key: bytes


def encode_unsigned(fields: CertificateFields) -> bytes:
    """The bytes that the CA signs (draft-ietf-sshm-cert section 2: all fields up to the signature)."""
    kind, key_starts = _encode_kind(fields.key_kind)
    return b"".join(
        (
            kind,
            string(fields.nonce),
            fields.key[key_starts:],
            _SERIAL_AND_TYPE.pack(fields.serial, fields.cert_type),
            string(fields.key_id.encode()),
            _encode_principals(fields.principals),
            _VALIDITY.pack(fields.valid_after, fields.valid_before),
            _encode_options(fields.critical_options),
            _encode_options(fields.extensions),
            _NOTHING,  # reserved
            string(fields.ca_key),
        )
    )


def append_signature(unsigned: bytes, signature: bytes) -> bytes:
    """The whole certificate. `signature` is an SSH signature blob (RFC 4253 section 6.6)."""
    return unsigned + string(signature)


def decode_unsigned(unsigned: bytes) -> CertificateFields:
    """Reads bytes to be signed back into fields; raises `BadFormat` unless the format is strictly correct."""
    reader = Reader(unsigned)
    fields = _read_fields(reader)
    reader.expect_end()
    return fields


def decode_certificate(blob: bytes) -> tuple[CertificateFields, bytes, bytes]:
    """A whole certificate as (fields, the bytes that were signed, the signature blob); raises `BadFormat`."""
    if len(blob) > MAX_CERTIFICATE:
        raise BadFormat("bad_format", f"a certificate may have {MAX_CERTIFICATE} bytes at most")
    reader = Reader(blob)
    fields = _read_fields(reader)
    signature = reader.string()
    reader.expect_end()
    return fields, blob[: len(blob) - len(string(signature))], signature


def _read_fields(reader: Reader) -> CertificateFields:
    kind, nonce = reader.strings(2)
    known = _KINDS_OF_CERTIFICATES.get(kind)
    if known is None:
        raise BadFormat("bad_format", f"not a known certificate type ending in {CERT_SUFFIX}")
    key_kind, encoded_kind, parts = known
    key = encoded_kind + reader.encoded_strings(parts)
    serial, cert_type = reader.numbers(_SERIAL_AND_TYPE)
    key_id, principals = reader.text(), reader.string()
    valid_after, valid_before = reader.numbers(_VALIDITY)
    critical_options, extensions, reserved, ca_key = reader.strings(4)
    if reserved:
        raise BadFormat("bad_format", "the reserved field is not empty")
    return CertificateFields(
        key_kind=key_kind,
        key=key,
        nonce=nonce,
        serial=serial,
        cert_type=cert_type,
        key_id=key_id,
        principals=_read_principals(principals),
        valid_after=valid_after,
        valid_before=valid_before,
        critical_options=_read_options(critical_options),
        extensions=_read_options(extensions),
        ca_key=ca_key,
    )


# Most certificates of a role share these inputs. The results are cached, because reading the bytes back before each
# signature would otherwise take as long as the signature.

_NOTHING: Final = string(b"")


@lru_cache(maxsize=REMEMBERED)
def _encode_kind(kind: str) -> tuple[bytes, int]:
    """The type name of a certificate, and how many bytes the type name takes in the key's blob; both with lengths."""
    return string(certificate_kind(kind).encode()), len(string(kind.encode()))


@lru_cache(maxsize=REMEMBERED)
def _encode_principals(principals: tuple[str, ...]) -> bytes:
    return string(b"".join([string(name.encode()) for name in principals]))


@lru_cache(maxsize=REMEMBERED)
def _read_principals(data: bytes) -> tuple[str, ...]:
    reader = Reader(data)
    principals = []
    while not reader.at_end():
        principals.append(reader.text())
        if len(principals) > MAX_PRINCIPALS:
            raise BadFormat("bad_format", f"a certificate may name {MAX_PRINCIPALS} principals at most")
    return tuple(principals)


@lru_cache(maxsize=REMEMBERED)
def _encode_options(options: tuple[tuple[str, str], ...]) -> bytes:
    """Name and value pairs; a value is a string inside a string, a flag is an empty one."""
    pairs = [string(name.encode()) + string(string(value.encode()) if value else b"") for name, value in options]
    return string(b"".join(pairs))


@lru_cache(maxsize=REMEMBERED)
def _read_options(data: bytes) -> tuple[tuple[str, str], ...]:
    reader = Reader(data)
    options: list[tuple[str, str]] = []
    while not reader.at_end():
        name, inner = reader.text(), Reader(reader.string())
        value = ""
        if not inner.at_end():
            value = inner.text()
            if not value:  # a flag has no inner string; a second form would be ambiguous
                raise BadFormat("bad_format", "an option's value is an empty string")
            inner.expect_end()
        if options and name <= options[-1][0]:
            raise BadFormat("bad_format", "options are not sorted or not unique")
        options.append((name, value))
    return tuple(options)
