"""Every kind of user key under every kind of CA key: read by `ssh-keygen -L`, verified by `cryptography`.

tests/data/golden/CA-KIND.txt holds what ssh-keygen prints, with the names of keys in place of fingerprints, since the
keys are made anew; the file's first line is the command.
`WRITE_GOLDEN=1 pytest tests/system/signing/test_golden_certificates.py` writes the files again: look at the difference
before you commit it.
"""

from __future__ import annotations

import base64
import os
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.hazmat.primitives.serialization import (
    SSHCertificate,
    SSHCertificateType,
    load_ssh_public_identity,
    load_ssh_public_key,
)

from signer.authority.certificates import prepare_certificate
from signer.ca.key import CaKey, load_ca_key
from signer.model import Grant
from signer.ssh.certificate import append_signature, decode_certificate
from signer.ssh.publickey import certificate_kind, parse_public_key, render_public_key
from signer.ssh.wire import Reader
from tests.parts import builders
from tests.parts.builders import certificate_of
from tests.parts.keys import CA_KINDS, KINDS, SK_KINDS, KeyRing, ssh_keygen

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
COMMAND = "$ TZ=UTC ssh-keygen -L -f certificates.pub"
USER_KINDS = (*KINDS, *SK_KINDS)
OPTIONS = (("force-command", '/usr/bin/deploy --to "prod"'), ("source-address", "192.0.2.0/24,2001:db8::/32"))


def grant_for(keyring: KeyRing, kind: str) -> Grant:
    """A grant that depends on the kind only; FIDO keys get the options that are for them."""
    fido = kind.startswith("sk-")
    return builders.grant(
        public_key=parse_public_key(keyring(kind).public_line),
        principals=("backup", "deploy-agent", "llmops"),
        critical_options=(*OPTIONS, ("verify-required", "")) if fido else OPTIONS,
        extensions=("no-touch-required", "permit-pty") if fido else ("permit-pty", "permit-user-rc"),
    )


def issue(keyring: KeyRing, kind: str, ca: CaKey, given: Grant | None = None) -> str:
    """A certificate as a line; its serial is the kind's place in the list, from 1."""
    nonce = sha256(kind.encode()).digest()
    serial = USER_KINDS.index(kind) + 1
    draft = prepare_certificate(given or grant_for(keyring, kind), serial, nonce, builders.NOW, ca.blob)
    certificate = append_signature(draft.unsigned, ca.sign(draft.unsigned))
    return render_public_key(certificate_kind(draft.fields.key_kind), certificate)


def load(keyring: KeyRing, ca_kind: str) -> CaKey:
    path = keyring(ca_kind, "ca").private
    facts = path.stat()
    return load_ca_key(path, f"{facts.st_uid}:{facts.st_gid}", keyring(ca_kind, "ca").fingerprint)


@pytest.mark.parametrize("ca_kind", CA_KINDS)
def test_ssh_keygen_reads_every_certificate_as_it_was_granted(keyring: KeyRing, ca_kind: str, tmp_path: Path) -> None:
    ca = load(keyring, ca_kind)
    path = tmp_path / "certificates.pub"
    path.write_text("".join(f"{issue(keyring, kind, ca)}\n" for kind in USER_KINDS))
    text = ssh_keygen("-L", "-f", path).replace(f"{path}", "certificates.pub").replace(ca.fingerprint, "<the CA key>")
    for kind in USER_KINDS:
        text = text.replace(keyring(kind).fingerprint, f"<the {kind} key>")
    assert "SHA256:" not in text
    golden = GOLDEN / f"{ca_kind}.txt"
    found = "\n".join([COMMAND, *(line.rstrip() for line in text.splitlines()), ""])
    if os.environ.get("WRITE_GOLDEN"):
        golden.write_text(found)
    assert found == golden.read_text()


@pytest.mark.parametrize("ca_kind", CA_KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_cryptography_reads_every_field_and_verifies(keyring: KeyRing, kind: str, ca_kind: str) -> None:
    ca, given = load(keyring, ca_kind), grant_for(keyring, kind)
    line = issue(keyring, kind, ca)
    read = load_ssh_public_identity(line.encode())
    assert isinstance(read, SSHCertificate)
    read.verify_cert_signature()
    assert read.type == SSHCertificateType.USER
    assert read.serial == USER_KINDS.index(kind) + 1
    assert read.key_id == given.key_id.encode()
    assert read.valid_principals == [name.encode() for name in given.principals]
    assert (read.valid_after, read.valid_before) == (builders.NOW - 30, builders.NOW + 900)
    assert read.critical_options == {name.encode(): value.encode() for name, value in given.critical_options}
    assert read.extensions == {name.encode(): b"" for name in given.extensions}
    assert read.nonce == sha256(kind.encode()).digest()


@pytest.mark.parametrize("ca_kind", CA_KINDS)
@pytest.mark.parametrize("kind", SK_KINDS)
def test_cryptography_verifies_a_fido_keys_certificate_over_its_bytes(
    keyring: KeyRing, kind: str, ca_kind: str
) -> None:
    """It does not read these certificates; `ssh-keygen -L` does, and refuses one whose signature is wrong."""
    line = issue(keyring, kind, load(keyring, ca_kind))
    with pytest.raises(UnsupportedAlgorithm):
        load_ssh_public_identity(line.encode())
    fields, unsigned, signature = decode_certificate(certificate_of({"certificate": line}))
    assert fields.key == keyring(kind).blob
    verify(keyring(ca_kind, "ca").public_line, signature, unsigned)
    with pytest.raises(InvalidSignature):
        verify(keyring(ca_kind, "ca").public_line, signature, unsigned[:-1] + b"\0")


def verify(ca_line: str, blob: bytes, data: bytes) -> None:
    """By the RFCs, with none of our code but the reader of strings; raises `InvalidSignature`."""
    reader = Reader(blob)
    algorithm, signature = reader.text(), reader.string()
    ca = load_ssh_public_key(ca_line.encode())
    if isinstance(ca, Ed25519PublicKey):
        assert algorithm == "ssh-ed25519"
        ca.verify(signature, data)
    elif isinstance(ca, rsa.RSAPublicKey):
        assert algorithm == "rsa-sha2-512"
        ca.verify(signature, data, padding.PKCS1v15(), SHA512())
    else:
        assert isinstance(ca, ec.EllipticCurvePublicKey)
        assert algorithm == f"ecdsa-sha2-nistp{ca.key_size}"
        inner = Reader(signature)
        hashes = {256: SHA256(), 384: SHA384(), 521: SHA512()}
        ca.verify(encode_dss_signature(inner.mpint(), inner.mpint()), data, ec.ECDSA(hashes[ca.key_size]))


@pytest.mark.parametrize("ca_kind", ["rsa3072", "rsa4096"])
def test_rsa_signs_with_sha_512_only(keyring: KeyRing, ca_kind: str, tmp_path: Path) -> None:
    line = issue(keyring, "ed25519", load(keyring, ca_kind))
    _, _, signature = decode_certificate(certificate_of({"certificate": line}))
    assert Reader(signature).text() == "rsa-sha2-512"
    path = tmp_path / "rsa-cert.pub"
    path.write_text(line + "\n")
    assert "(using rsa-sha2-512)" in ssh_keygen("-L", "-f", path)


@pytest.mark.parametrize("ca_kind", CA_KINDS)
def test_ssh_keygen_refuses_a_certificate_with_one_changed_byte(keyring: KeyRing, ca_kind: str, tmp_path: Path) -> None:
    kind, encoded = issue(keyring, "ed25519", load(keyring, ca_kind)).split()
    path = tmp_path / "changed-cert.pub"
    blob = base64.b64decode(encoded).replace(b"backup", b"backuq")
    path.write_text(f"{kind} {base64.b64encode(blob).decode()}\n")
    with pytest.raises(RuntimeError):
        ssh_keygen("-L", "-f", path)


@pytest.mark.parametrize("count,key_id", [(1, "a"), (256, "a" * 256)])
def test_ssh_keygen_reads_the_largest_certificate_that_is_granted(
    keyring: KeyRing, tmp_path: Path, count: int, key_id: str
) -> None:
    names = tuple(f"p{number:03}" for number in range(count))
    given = builders.grant(principals=names, key_id=key_id, critical_options=(), extensions=())
    path = tmp_path / "large-cert.pub"
    path.write_text(issue(keyring, "ed25519", load(keyring, "ed25519"), given) + "\n")
    text = ssh_keygen("-L", "-f", path)
    assert f'Key ID: "{key_id}"' in text
    assert [line.strip() for line in text.splitlines() if line.strip() in names] == list(names)
    assert "Critical Options: (none)" in text
    assert "Extensions: (none)" in text
