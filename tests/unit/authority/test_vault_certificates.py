"""A certificate of Vault's, held against its grant: every field that gives more, or restricts less, is found."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.authority.vault_certificates import TOLERANCE, PendingCertificate, VaultCertificate, read_vault_certificate
from signer.errors import ForeignCertificate
from signer.model import Grant, Returned
from signer.ssh.fingerprint import fingerprint_of
from signer.ssh.wire import string
from tests.parts import builders
from tests.parts.builders import NOW
from tests.parts.fake_vault import ForeignCa
from tests.parts.vault_episodes import backend

CA = ForeignCa()
GRANT = builders.grant(principals=("backup", "llmops"), extensions=("permit-port-forwarding", "permit-pty"))
OPTIONS = GRANT.critical_options


def forward(grant: Grant = GRANT) -> PendingCertificate:
    return PendingCertificate(builders.sign(), grant, NOW, "0" * 64, backend().order)


def returned(grant: Grant = GRANT, ca: ForeignCa = CA, **changes: Any) -> Returned:
    return Returned(ca.certify(ca.fields(grant, NOW, **changes)), CA.blob)


def read(**changes: Any) -> VaultCertificate:
    return read_vault_certificate(returned(**changes), forward())


def fault(answer: Returned, asked: PendingCertificate | None = None) -> str:
    """What is wrong with it, in the words of the error."""
    with pytest.raises(ForeignCertificate) as caught:
        read_vault_certificate(answer, asked or forward())
    assert caught.value.code == "vault_outside_grant"
    return caught.value.text.partition(": ")[2]


def test_what_was_granted_is_taken_with_all_that_vault_chose() -> None:
    made = read(serial=2**64 - 1, key_id="vault-token-1")
    assert made.fields.serial == 2**64 - 1
    assert made.fields.key_id == "vault-token-1"
    assert made.grant == GRANT
    assert made.line.split()[0] == "ssh-ed25519-cert-v01@openssh.com"
    assert made.ca_fingerprint == fingerprint_of(CA.blob)
    whole = base64.b64decode(made.line.split()[1])
    assert whole.startswith(made.unsigned)


@pytest.mark.parametrize("kind", ["ssh-rsa", "ecdsa-sha2-nistp256"])
def test_any_kind_of_ca_may_have_signed(kind: str) -> None:
    ca = ForeignCa(kind)
    answer = Returned(ca.certify(ca.fields(GRANT, NOW)), ca.blob)
    assert read_vault_certificate(answer, forward()).ca_fingerprint == fingerprint_of(ca.blob)


@pytest.mark.parametrize("kind", ["ssh-rsa", "ecdsa-sha2-nistp256", "sk-ssh-ed25519@openssh.com"])
def test_any_kind_of_user_key_may_be_in_it(kind: str) -> None:
    grant = builders.grant(public_key=builders.public_key(kind))
    assert read_vault_certificate(returned(grant), forward(grant)).fields.key == grant.public_key.blob


@pytest.mark.parametrize(
    "what, changes",
    [
        ("public key", {"key": builders.public_key(name="mallory").blob}),
        ("type", {"cert_type": 2}),
        ("type", {"cert_type": 0}),
        ("principals", {"principals": ()}),
        ("principals", {"principals": ("llmops",)}),
        ("principals", {"principals": ("backup", "llmops", "root")}),
        ("principals", {"principals": ("backup", "root")}),
        ("principals", {"principals": ("backup,llmops",)}),
        ("valid after", {"valid_after": NOW - GRANT.backdate - TOLERANCE - 1}),
        ("valid after", {"valid_after": 0}),
        ("valid after", {"valid_after": NOW + TOLERANCE + 1}),
        ("valid before", {"valid_before": NOW + GRANT.ttl + TOLERANCE + 1}),
        ("valid before", {"valid_before": 2**64 - 1}),
        ("valid before", {"valid_before": NOW}),
        ("valid before", {"valid_before": 0}),
        ("lifetime", {"valid_after": NOW + 20, "valid_before": NOW + 20}),
        ("critical options", {"critical_options": ()}),
        ("critical options", {"critical_options": OPTIONS[:1]}),
        ("critical options", {"critical_options": (("force-command", "/bin/sh"), OPTIONS[1])}),
        ("critical options", {"critical_options": (*OPTIONS, ("verify-required", ""))}),
        ("extensions", {"extensions": (("permit-agent-forwarding", ""), ("permit-pty", ""))}),
        ("extensions", {"extensions": (("permit-pty", "yes"),)}),
        ("key id", {"key_id": "x" * 257}),
        ("key id", {"key_id": "ü" * 129}),
        ("key id", {"key_id": "ok\nAccepted publickey for root"}),
        ("key id", {"key_id": "\x1b[31m"}),
        ("key id", {"key_id": "vault-$(id)"}),
        ("key id", {"key_id": 'vault-"root"'}),
        ("principals", {"principals": ("backup", "backup", "llmops")}),
    ],
    ids=repr,
)
def test_audit_8_each_field_alone_is_found_outside_the_grant(what: str, changes: dict[str, Any]) -> None:
    assert fault(returned(**changes)) == what


@pytest.mark.parametrize(
    "changes",
    [
        {"valid_after": NOW - GRANT.backdate - TOLERANCE},
        {"valid_after": NOW + TOLERANCE},
        {"valid_before": NOW + GRANT.ttl + TOLERANCE},
        {"valid_before": NOW + 1},
        {"extensions": ()},
        {"extensions": (("permit-pty", ""),)},
        {"principals": ("llmops", "backup")},
        {"key_id": ""},
        {"key_id": "x" * 256},
        {"serial": 0},
        {"nonce": b"\0" * 32},
    ],
    ids=repr,
)
def test_audit_8_what_gives_no_more_than_was_granted_is_taken(changes: dict[str, Any]) -> None:
    assert read(**changes).grant == GRANT


def test_a_grant_without_options_or_extensions_bears_none() -> None:
    bare = builders.grant(critical_options=(), extensions=())
    assert read_vault_certificate(returned(bare), forward(bare)).fields.extensions == ()
    assert fault(returned(bare, extensions=(("permit-pty", ""),)), forward(bare)) == "extensions"
    assert fault(returned(bare, critical_options=OPTIONS), forward(bare)) == "critical options"


def test_another_ca_than_the_one_vault_publishes_is_found() -> None:
    other = ForeignCa(name="other")
    assert fault(returned(ca=other)) == "form or signature"
    assert fault(returned(ca=other, ca_key=CA.blob)) == "form or signature"
    assert fault(returned(ca_key=other.blob)) == "CA key"


def test_a_sha1_signature_is_found() -> None:
    ca = ForeignCa("ssh-rsa")
    ca.algorithm = "ssh-rsa"
    assert fault(Returned(ca.certify(ca.fields(GRANT, NOW)), ca.blob)) == "form or signature"


def test_a_certificate_for_another_kind_of_key_is_found() -> None:
    other = builders.grant(public_key=builders.public_key("ecdsa-sha2-nistp256"))
    assert fault(returned(other)) == "form or signature"
    label, encoded = returned(other).line.split()
    assert fault(Returned(f"ssh-ed25519-cert-v01@openssh.com {encoded}", CA.blob)) == "public key"
    assert fault(Returned(f"{label} {returned().line.split()[1]}", CA.blob)) == "form or signature"


def test_what_is_no_certificate_is_found() -> None:
    line = returned().line
    label, encoded = line.split()
    plain = base64.b64encode(GRANT.public_key.blob).decode()
    for text in (
        "", " ", label, f"{label} ", f"{label} !", f"{label} {encoded} comment", f" {line}", f"{label}  {encoded}",
        f"{label}\n{encoded}", f"{label} {encoded[:-4]}", f"{label} {encoded}AAAA", f"{label} {plain}",
        f"ssh-ed25519 {plain}", f"{label} {encoded[:40]}ü{encoded[41:]}", f"{line}\n{line}", "x" * 100_000,
        f"{label} {base64.b64encode(string(b'x') * 100_000).decode()}",
    ):  # fmt: skip
        assert fault(Returned(text, CA.blob)) == "form or signature", text[:60]


@pytest.mark.parametrize("bit", [0x01, 0x80])
def test_a_changed_byte_anywhere_is_found(bit: int) -> None:
    label, encoded = returned().line.split()
    whole = base64.b64decode(encoded)
    for at in range(len(whole)):
        spoiled = bytearray(whole)
        spoiled[at] ^= bit
        assert fault(Returned(f"{label} {base64.b64encode(bytes(spoiled)).decode()}", CA.blob)), at


@given(st.text(max_size=300), st.binary(max_size=100))
def test_nothing_else_is_raised_for_any_text(text: str, key: bytes) -> None:
    for line in (text, f"ssh-ed25519-cert-v01@openssh.com {text}", returned().line):
        assert fault(Returned(line, key))
