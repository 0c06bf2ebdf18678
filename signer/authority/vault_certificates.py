"""Certificates that Vault signed: decoding and verification against the grant. Pure.

The bytes come from another CA, so every field is checked; Vault chooses serial, nonce and key id. Certificates of the
local key are in `certificates.py`.
"""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass
from typing import Final

from signer.errors import BadFormat, ForeignCertificate
from signer.model import KEY_ID, MAX_KEY_ID, Consent, Grant, Returned
from signer.protocol.commands import Claim, Sign
from signer.ssh.certificate import USER_CERTIFICATE, CertificateFields, decode_certificate
from signer.ssh.fingerprint import fingerprint_of
from signer.ssh.publickey import certificate_kind
from signer.ssh.signature import check_signature
from signer.ssh.signing import CertifyInPool

# Seconds by which times may differ, from Vault's clock and the round trip.
TOLERANCE: Final = 60
_VAULT_KEY_ID: Final = re.compile(f"(?:{KEY_ID.pattern})?")  # Vault may leave it empty


@dataclass(frozen=True, slots=True, eq=False)
class PendingCertificate:
    """A grant that waits for Vault's certificate; `asked_at` is the time of the decision, in seconds.

    `consent` is of the humans who were asked, if any. Compared by identity: each is one outstanding certificate.
    """

    command: Sign | Claim
    grant: Grant
    asked_at: int
    policy_digest: str
    order: CertifyInPool
    consent: Consent | None = None

    def obtain(self) -> Returned:
        """The certificate that Vault makes; raises what the client raises. Slow, safe in any thread."""
        return self.order.certify(self.grant)


@dataclass(frozen=True, slots=True)
class VaultCertificate:
    """A certificate of Vault's, verified to be within its grant."""

    grant: Grant
    fields: CertificateFields
    unsigned: bytes
    line: str
    ca_fingerprint: str


def read_vault_certificate(returned: Returned, pending: PendingCertificate) -> VaultCertificate:
    """Verifies grant and signature; raises `ForeignCertificate` if the certificate exceeds the grant."""
    grant = pending.grant
    label, _, encoded = returned.line.partition(" ")
    try:
        if label != certificate_kind(grant.public_key.kind):
            raise BadFormat("bad_format", "another kind of certificate than the key's")
        blob = binascii.a2b_base64(encoded.encode("ascii"), strict_mode=True)
        fields, unsigned, signature = decode_certificate(blob)
        check_signature(returned.ca_key, unsigned, signature)
    except (BadFormat, binascii.Error, UnicodeEncodeError):
        raise outside_grant("form or signature") from None
    _check_within(fields, grant, pending.asked_at, returned.ca_key)
    return VaultCertificate(grant, fields, unsigned, f"{label} {encoded}", fingerprint_of(returned.ca_key))


def _check_within(fields: CertificateFields, grant: Grant, asked_at: int, ca_key: bytes) -> None:
    """Raises `ForeignCertificate` for a certificate that permits more, or restricts less, than its grant."""
    for what, holds in (
        ("CA key", fields.ca_key == ca_key),
        ("public key", fields.key == grant.public_key.blob),
        ("type", fields.cert_type == USER_CERTIFICATE),
        ("principals", bool(fields.principals) and sorted(fields.principals) == sorted(set(grant.principals))),
        ("key id", len(fields.key_id) <= MAX_KEY_ID and _VAULT_KEY_ID.fullmatch(fields.key_id) is not None),
        ("valid after", asked_at - grant.backdate - TOLERANCE <= fields.valid_after <= asked_at + TOLERANCE),
        ("valid before", asked_at < fields.valid_before <= asked_at + grant.ttl + TOLERANCE),
        ("lifetime", fields.valid_after < fields.valid_before),
        ("critical options", fields.critical_options == grant.critical_options),
        ("extensions", set(fields.extensions) <= set(grant.extension_fields)),
    ):
        if not holds:
            raise outside_grant(what)


def outside_grant(what: str) -> ForeignCertificate:
    """The error for a certificate of Vault's whose `what` is outside the grant."""
    return ForeignCertificate(
        "vault_outside_grant",
        f"Vault's certificate is outside the grant: {what}",
        "align Vault's role with policy.toml",
    )
