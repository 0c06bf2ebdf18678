"""Certificates that the local key signs: encoding, verification against the grant, event and reply.

Only an `UnsignedCertificate` from `prepare_certificate` is ever signed. No field comes from a request: all come from
the grant, the time, the serial and the nonce. Pure.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Final

import msgspec

from signer.errors import CertificateMismatch
from signer.model import BACKDATE, Caller, Consent, Event, Grant
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
from signer.ssh.signing import SigningKey
from signer.units import timestamp

if TYPE_CHECKING:
    from signer.authority.vault_certificates import VaultCertificate


class UnsignedCertificate(msgspec.Struct, frozen=True):
    """A certificate without its signature; made in step 7 of `Core._sign`, signed in step 9."""

    grant: Grant
    fields: CertificateFields
    unsigned: bytes


class PendingSignature(msgspec.Struct, frozen=True, eq=False):
    """A certificate that is to be signed with `key` once it is recorded. Compared by identity.

    `consent` is of the humans who were asked, if any.
    """

    certificate: UnsignedCertificate
    key: SigningKey
    consent: Consent | None = None

    def obtain(self) -> bytes:
        """The signature blob; raises what the key raises. The one call that may be slow, safe in any thread."""
        return self.key.sign(self.certificate.unsigned)


def prepare_certificate(grant: Grant, serial: int, nonce: bytes, now: int, ca_key: bytes) -> UnsignedCertificate:
    """Encodes the certificate of a grant; raises `CertificateMismatch` if its bytes, decoded, differ from the grant."""
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
        extensions=grant.extension_fields,
        ca_key=ca_key,
    )
    unsigned = encode_unsigned(fields)
    check_matches_grant(decode_unsigned(unsigned), grant, now, serial, nonce, ca_key)
    return UnsignedCertificate(grant, fields, unsigned)


def check_matches_grant(
    fields: CertificateFields, grant: Grant, now: int, serial: int, nonce: bytes, ca_key: bytes
) -> None:
    """Raises `CertificateMismatch` if a decoded certificate differs from its grant."""
    found = (
        fields.key_kind,
        fields.key,
        fields.nonce,
        len(fields.nonce),
        fields.serial,
        fields.cert_type,
        fields.key_id,
        fields.principals,
        fields.valid_after,
        fields.valid_before,
        fields.critical_options,
        fields.extensions,
        fields.ca_key,
    )
    granted = (
        grant.public_key.kind,
        grant.public_key.blob,
        nonce,
        NONCE_BYTES,
        serial,
        USER_CERTIFICATE,
        grant.key_id,
        grant.principals,
        now - grant.backdate,
        now + grant.ttl,
        grant.critical_options,
        grant.extension_fields,
        ca_key,
    )
    if found != granted:
        differ = [what for what, one, other in zip(_COMPARED, found, granted, strict=True) if one != other]
        raise CertificateMismatch(
            "certificate_differs_from_grant", f"the certificate differs from its grant: {differ[0]}"
        )
    if not fields.principals:
        raise CertificateMismatch("certificate_differs_from_grant", "the certificate has no principals")


# What is compared, in the order of both tuples above.
_COMPARED: Final = (
    "key type",
    "public key",
    "nonce",
    "nonce length",
    "serial",
    "type",
    "key id",
    "principals",
    "valid after",
    "valid before",
    "critical options",
    "extensions",
    "CA key",
)


def issued_event(
    made: UnsignedCertificate | VaultCertificate,
    caller: Caller,
    policy_digest: str,
    backend: str,
    ca_fingerprint: str,
    consent: Consent | None = None,
) -> Event:
    """The event of one certificate; hosts log its key id and serial, and the digest fixes its exact bytes."""
    grant, fields = made.grant, made.fields
    body: dict[str, object] = {
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
        "extensions": [f"{name}={value}" if value else name for name, value in fields.extensions],
        "reason": grant.reason,
        "address": grant.address,
        "request_id": caller.request_id,
        "policy": policy_digest,
        "ca": ca_fingerprint,
        "to_be_signed_sha256": sha256(made.unsigned).hexdigest(),
    }
    if grant.backdate != BACKDATE:
        body["backdate"] = grant.backdate
    if consent is not None:
        body |= {"request": consent.request, "approved_by": list(consent.approvers), "waiver": consent.waiver}
    return Event("certificate.issued", grant.identity, body)


def certificate_line(certificate: UnsignedCertificate, signature: bytes) -> str:
    """The line of a -cert.pub file. `signature` is an SSH signature blob over `certificate.unsigned`."""
    return render_public_key(
        certificate_kind(certificate.fields.key_kind), append_signature(certificate.unsigned, signature)
    )


def issued_reply(
    made: UnsignedCertificate | VaultCertificate, line: str, ca_fingerprint: str, expires_in: int
) -> Certificate:
    """The reply to a sign request. `expires_in` is in seconds from now."""
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
