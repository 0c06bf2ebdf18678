"""From a grant to a signed certificate: build the bytes, read them back, compare, record, reply.

`prepare_certificate` makes an `UnsignedCertificate` once, and nothing else is ever signed. Nothing here reads a
request: every field comes from the grant, the clock, the serial and the nonce that are passed in. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

from signer.errors import CertificateMismatch
from signer.model import Caller, Event, Grant
from signer.protocol.replies import Certificate
from signer.ssh.certificate import (
    NONCE_BYTES,
    USER_CERTIFICATE,
    CertificateFields,
    append_signature,
    decode_unsigned,
    encode_unsigned,
)
from signer.ssh.publickey import certificate_kind, render_public_key
from signer.units import timestamp


class Signing(Protocol):
    """The key that signs: its public facts, and one act."""

    kind: str
    blob: bytes
    fingerprint: str

    def sign(self, data: bytes) -> bytes: ...


@dataclass(frozen=True, slots=True)
class UnsignedCertificate:
    """A certificate that is recorded and not yet signed: made once, by step 7, and signed once, by step 9."""

    grant: Grant
    fields: CertificateFields
    unsigned: bytes


def prepare_certificate(grant: Grant, serial: int, nonce: bytes, now: int, ca_key: bytes) -> UnsignedCertificate:
    """The certificate of a grant, ready to be signed; raises `CertificateMismatch` if its bytes say anything else."""
    fields = CertificateFields(
        key_kind=grant.public_key.kind,
        key=grant.public_key.blob,
        nonce=nonce,
        serial=serial,
        cert_type=USER_CERTIFICATE,
        key_id=grant.key_id,
        principals=grant.principals,
        valid_after=now - grant.backdate,
        valid_before=now + grant.ttl,
        critical_options=grant.critical_options,
        extensions=tuple((name, "") for name in grant.extensions),
        ca_key=ca_key,
    )
    unsigned = encode_unsigned(fields)
    check_matches_grant(decode_unsigned(unsigned), grant, now, serial, nonce, ca_key)
    return UnsignedCertificate(grant, fields, unsigned)


def check_matches_grant(
    fields: CertificateFields, grant: Grant, now: int, serial: int, nonce: bytes, ca_key: bytes
) -> None:
    """Raises `CertificateMismatch` if a certificate, as read back from its bytes, is not exactly what was granted."""
    for what, found, granted in (
        ("key type", fields.key_kind, grant.public_key.kind),
        ("public key", fields.key, grant.public_key.blob),
        ("nonce", fields.nonce, nonce),
        ("nonce's length", len(fields.nonce), NONCE_BYTES),
        ("serial", fields.serial, serial),
        ("type", fields.cert_type, USER_CERTIFICATE),
        ("key id", fields.key_id, grant.key_id),
        ("principals", fields.principals, grant.principals),
        ("valid after", fields.valid_after, now - grant.backdate),
        ("valid before", fields.valid_before, now + grant.ttl),
        ("critical options", fields.critical_options, grant.critical_options),
        ("extensions", fields.extensions, tuple((name, "") for name in grant.extensions)),
        ("CA key", fields.ca_key, ca_key),
    ):
        if found != granted:
            raise CertificateMismatch("certificate_differs_from_grant", f"the certificate's {what} is not the grant's")
    if not fields.principals:
        raise CertificateMismatch("certificate_differs_from_grant", "the certificate names no principal")


class Recordable(Protocol):
    """A certificate, ours or another CA's, about which everything is known but the signature."""

    @property
    def grant(self) -> Grant: ...
    @property
    def fields(self) -> CertificateFields: ...
    @property
    def unsigned(self) -> bytes: ...


def issued_event(made: Recordable, caller: Caller, policy_digest: str, backend: str, ca_fingerprint: str) -> Event:
    """The record of one certificate: enough to find it on any host, and to tell its exact bytes."""
    grant, fields = made.grant, made.fields
    return Event(
        "certificate.issued",
        grant.identity,
        {
            "serial": str(fields.serial),
            "backend": backend,
            "identity": grant.identity,
            "kind": grant.kind,
            "role": grant.role,
            "principals": list(fields.principals),
            "key_id": fields.key_id,
            "key_type": fields.key_kind,
            "fingerprint": grant.public_key.fingerprint,
            "valid_after": fields.valid_after,
            "valid_before": fields.valid_before,
            "critical_options": dict(fields.critical_options),
            "extensions": [name for name, _ in fields.extensions],
            "reason": grant.reason,
            "address": grant.address,
            "request_id": caller.request_id,
            "policy": policy_digest,
            "ca": ca_fingerprint,
            "to_be_signed_sha256": sha256(made.unsigned).hexdigest(),
        },
    )


def certificate_line(draft: UnsignedCertificate, signature: bytes) -> str:
    """The whole certificate as text. `signature` is an SSH signature blob over the draft's bytes."""
    return render_public_key(certificate_kind(draft.fields.key_kind), append_signature(draft.unsigned, signature))


def issued_reply(made: Recordable, line: str, ca_fingerprint: str, expires_in: int) -> Certificate:
    """What the caller gets; the edges translate it. `expires_in` is seconds from now."""
    grant, fields = made.grant, made.fields
    return Certificate(
        certificate=line,
        serial=str(fields.serial),
        key_id=fields.key_id,
        identity=grant.identity,
        role=grant.role,
        principals=list(fields.principals),
        valid_after=timestamp(fields.valid_after),
        valid_before=timestamp(fields.valid_before),
        expires_in=expires_in,
        ca_fingerprint=ca_fingerprint,
    )
