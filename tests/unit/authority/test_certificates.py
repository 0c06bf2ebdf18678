"""What is about to be signed is compared with the grant, field by field and byte by byte, before the key is touched."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import pytest
from msgspec.structs import replace

from signer.authority import certificates
from signer.authority.certificates import check_matches_grant, prepare_certificate
from signer.errors import BadFormat, CertificateMismatch
from signer.model import Grant
from signer.ssh.certificate import CertificateFields, decode_certificate, decode_unsigned, encode_unsigned
from tests.parts import builders
from tests.parts.builders import NOW, PretendKey, grant

NONCE = bytes(range(100, 132))
SERIAL = 4711
CA = PretendKey()


def unsigned_of(given: Grant) -> bytes:
    return prepare_certificate(given, SERIAL, NONCE, NOW, CA.blob).unsigned


def fields_of(given: Grant) -> CertificateFields:
    """What the certificate of a grant has to hold."""
    return CertificateFields(
        key_kind=given.public_key.kind,
        key=given.public_key.blob,
        nonce=NONCE,
        serial=SERIAL,
        cert_type=1,
        key_id=given.key_id,
        principals=given.principals,
        valid_after=NOW - given.backdate,
        valid_before=NOW + given.ttl,
        critical_options=given.critical_options,
        extensions=tuple((name, "") for name in given.extensions),
        ca_key=CA.blob,
    )


def obeys(fields: CertificateFields, given: Grant | None = None) -> None:
    check_matches_grant(fields, given or grant(), NOW, SERIAL, NONCE, CA.blob)


def test_a_draft_says_what_was_granted_and_when() -> None:
    draft = prepare_certificate(grant(), SERIAL, NONCE, NOW, CA.blob)
    assert decode_unsigned(draft.unsigned) == draft.fields == fields_of(grant())
    assert (draft.fields.valid_after, draft.fields.valid_before) == (NOW - 30, NOW + 900)
    assert draft.fields.cert_type == 1
    assert draft.fields.nonce == NONCE
    obeys(draft.fields)


@pytest.mark.parametrize(
    "kind", ["ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp521", "sk-ecdsa-sha2-nistp256@openssh.com"]
)
def test_any_changed_byte_is_noticed(kind: str) -> None:
    given = grant(public_key=builders.public_key(kind))
    unsigned = unsigned_of(given)
    for at in range(len(unsigned)):
        for flip in (0x01, 0x80, 0x20):
            other = bytearray(unsigned)
            other[at] ^= flip
            try:
                fields = decode_unsigned(bytes(other))
            except BadFormat:
                continue
            with pytest.raises(CertificateMismatch):
                obeys(fields, given)


@pytest.mark.parametrize(
    "change",
    [
        {"key_kind": "ssh-rsa"},
        {"key": builders.public_key(name="another").blob},
        {"nonce": b"\0" * 32},
        {"nonce": NONCE[:31]},
        {"serial": SERIAL + 1},
        {"serial": 0},
        {"cert_type": 2},
        {"key_id": "deploy-agent:llmops\n"},
        {"key_id": ""},
        {"principals": ()},
        {"principals": ("backup", "llmops", "root")},
        {"principals": ("llmops", "backup")},
        {"principals": ("llmops",)},
        {"valid_after": NOW - 31},
        {"valid_before": NOW + 901},
        {"valid_before": 2**64 - 1},
        {"critical_options": ()},
        {"critical_options": (("force-command", "/bin/sh"), ("source-address", "192.0.2.7/32"))},
        {"critical_options": (("source-address", "192.0.2.7/32"),)},
        {"extensions": ()},
        {"extensions": (("permit-port-forwarding", ""), ("permit-pty", ""))},
        {"extensions": (("permit-pty", "x"),)},
        {"ca_key": PretendKey("another").blob},
    ],
)
def test_each_changed_field_is_noticed(change: dict[str, Any]) -> None:
    fields = decode_unsigned(unsigned_of(grant()))
    obeys(fields)
    with pytest.raises(CertificateMismatch):
        obeys(replace(fields, **change))


@pytest.mark.parametrize(
    "change, what",
    [
        ({"key_kind": "ssh-rsa", "serial": 0}, "key type"),
        ({"key": b""}, "public key"),
        ({"cert_type": 2}, "type"),
        ({"valid_before": NOW}, "valid before"),
        ({"ca_key": b""}, "CA key"),
    ],
)
def test_the_error_names_the_first_field_that_differs(change: dict[str, Any], what: str) -> None:
    with pytest.raises(CertificateMismatch) as raised:
        obeys(replace(fields_of(grant()), **change))
    assert raised.value.text == f"the certificate differs from its grant: {what}"


@pytest.mark.parametrize("change", [{"principals": ("llmops", "root")}, {"valid_before": 2**64 - 1}, {"cert_type": 2}])
def test_a_mistake_on_the_way_from_the_grant_is_found_in_the_bytes(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be signed is compared with the grant itself, and not with what it was encoded from."""
    monkeypatch.setattr(certificates, "CertificateFields", lambda **fields: CertificateFields(**fields | change))
    with pytest.raises(CertificateMismatch, match="the certificate differs from its grant"):
        prepare_certificate(grant(), SERIAL, NONCE, NOW, CA.blob)


def test_a_grant_without_principals_is_never_drafted() -> None:
    with pytest.raises(CertificateMismatch, match="no principal"):
        prepare_certificate(grant(principals=()), SERIAL, NONCE, NOW, CA.blob)


def test_a_grant_whose_options_are_not_sorted_is_never_drafted() -> None:
    with pytest.raises(BadFormat):
        prepare_certificate(grant(extensions=("permit-pty", "permit-X11-forwarding")), SERIAL, NONCE, NOW, CA.blob)


@pytest.mark.parametrize("nonce", [b"", b"\0" * 31, b"\0" * 33])
def test_a_nonce_has_32_bytes(nonce: bytes) -> None:
    with pytest.raises(CertificateMismatch, match="the certificate differs from its grant: nonce length"):
        prepare_certificate(grant(), SERIAL, nonce, NOW, CA.blob)


def test_the_record_tells_the_exact_bytes_and_everything_a_host_will_log() -> None:
    bench = builders.Bench()
    certificate = builders.certificate_of(bench.sign(reason="ticket 812", ttl=60))
    fields, unsigned, _ = decode_certificate(certificate)
    (body,) = bench.store.bodies("certificate.issued")
    assert body["to_be_signed_sha256"] == sha256(unsigned).hexdigest() == sha256(encode_unsigned(fields)).hexdigest()
    assert (body["serial"], body["key_id"], body["key_type"]) == ("1", "deploy-agent:llmops", "ssh-ed25519")
    assert (body["critical_options"], body["extensions"]) == ({}, ["permit-pty"])
    assert (body["reason"], body["address"], body["request_id"]) == ("ticket 812", "192.0.2.7", "r-1")
    assert body["fingerprint"] == builders.public_key().fingerprint


def test_the_reply_carries_the_certificate_and_times_that_people_read() -> None:
    reply = builders.Bench().sign(ttl=900)
    assert str(reply["certificate"]).startswith("ssh-ed25519-cert-v01@openssh.com AAAA")
    assert (reply["valid_after"], reply["valid_before"]) == ("2027-01-15T07:59:30Z", "2027-01-15T08:15:00Z")
    assert (reply["serial"], reply["expires_in"], reply["ca_fingerprint"]) == ("1", 900, CA.fingerprint)
