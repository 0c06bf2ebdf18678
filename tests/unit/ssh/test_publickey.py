"""Public keys: every kind is read as ssh-keygen writes it, and whatever else comes is refused in our own words."""

from __future__ import annotations

import base64
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sshpubkeys import SSHKey

from signer.errors import BadPublicKey
from signer.model import MAX_PUBLIC_KEY
from signer.ssh.publickey import KEY_PARTS, certificate_kind, parse_public_key, render_public_key
from signer.ssh.wire import mpint, string, uint32
from tests.parts import builders
from tests.parts.keys import KINDS, SK_KINDS, KeyRing, sign_with_ssh_keygen

P256 = (
    b"\x04"
    + bytes.fromhex("6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296")
    + bytes.fromhex("4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5")
)


BITS = {"ecdsa384": 384, "ecdsa521": 521, "rsa2048": 2048, "rsa3072": 3072, "rsa4096": 4096}


def line(*parts: bytes, label: str = "") -> str:
    """A key's text from the parts of its blob."""
    return f"{label} {base64.b64encode(b''.join(parts)).decode()}".strip()


def code_of(text: str) -> str:
    with pytest.raises(BadPublicKey) as caught:
        parse_public_key(text)
    return caught.value.code


@pytest.mark.parametrize("kind", [*KINDS, *SK_KINDS])
def test_every_kind_is_read_as_ssh_keygen_sees_it(keyring: KeyRing, kind: str) -> None:
    key = keyring(kind)
    read = parse_public_key(key.public_line)
    assert read.blob == key.blob
    assert read.fingerprint == key.fingerprint
    assert read.kind == key.public_line.split()[0]
    assert read.bits == BITS.get(kind, 256)


@given(st.binary(min_size=32, max_size=32))
@example(bytes(32))
@example(b"\xff" * 32)
def test_sshpubkeys_decides_on_an_ed25519_key_by_its_form_alone(key: bytes) -> None:
    """So its verdict on one with the same form is remembered."""
    for kind, rest in (("ssh-ed25519", b""), ("sk-ssh-ed25519@openssh.com", string(b"ssh:"))):
        text = line(string(kind.encode()), string(key), rest, label=kind)
        SSHKey(strict=True).parse(text)  # raises for a key that it refuses
        assert parse_public_key(text).blob == base64.b64decode(text.split()[1])


def test_what_sshpubkeys_refuses_of_an_ed25519_key_it_refuses_again() -> None:
    kind = b"sk-ssh-ed25519@openssh.com"
    good, other = string(b"ssh:"), string(b"https://example.com")
    for application, key in ((other, 1), (good, 1), (other, 1), (other, 2), (good, 2)):
        text = line(string(kind), string(bytes([key]) * 32), application)
        if application == other:
            assert code_of(text) == "public_key_malformed"
        else:
            assert parse_public_key(text).bits == 256


@pytest.mark.parametrize("kind", [*KINDS, *SK_KINDS])
def test_a_key_is_written_as_it_was_read(keyring: KeyRing, kind: str) -> None:
    text = " ".join(keyring(kind).public_line.split()[:2])
    read = parse_public_key(text + " a comment with blanks")
    assert render_public_key(read.kind, read.blob) == text
    assert parse_public_key(text.split()[1]) == read
    assert parse_public_key(f"\n{text}\r\n") == read


@pytest.mark.parametrize(
    "text,code",
    [
        ("", "public_key_missing"),
        ("ssh-ed25519 AAAA!", "public_key_not_base64"),
        ("ssh-ed25519 AAA", "public_key_not_base64"),
        ("ssh-ed25519 " + "A" * MAX_PUBLIC_KEY, "public_key_too_long"),
        ("AAAA", "public_key_truncated"),
        (line(string(b"ssh-ed25519")[:10]), "public_key_truncated"),
        (line(string(b"ssh-ed25519")), "public_key_malformed"),
        (line(string(b"ssh-ed25519"), string(b"\0" * 31)), "public_key_malformed"),
        (line(string(b"ssh-ed25519"), string(b"\0" * 32), b"\0"), "public_key_malformed"),
        (line(string(b"ssh-ed25519"), string(b"\0" * 32), label="ssh-rsa"), "public_key_label_differs"),
        (line(string(b"ssh-dss"), *[mpint(3)] * 4), "public_key_kind_unknown"),
        (line(string(b"ssh-ed448"), string(b"\0" * 57)), "public_key_kind_unknown"),
        (line(string(b"\xff\xfe")), "public_key_kind_unknown"),
        (line(string(b"ecdsa-sha2-nistp256"), string(b"nistp384"), string(P256)), "public_key_malformed"),
        (line(string(b"ecdsa-sha2-nistp256"), string(b"nistp256"), string(P256[:-1] + b"\0")), "public_key_malformed"),
        (line(string(b"ecdsa-sha2-nistp256"), string(b"nistp256"), string(b"\3" + P256[1:33])), "public_key_malformed"),
        (line(string(b"ecdsa-sha2-nistp256"), string(b"nistp256"), string(b"\0")), "public_key_malformed"),
        (line(string(b"ecdsa-sha2-nistp256"), string(b"nistp256"), string(b"")), "public_key_malformed"),
        (line(string(b"sk-ssh-ed25519@openssh.com"), string(b"\1" * 32), string(b"")), "public_key_malformed"),
        (line(string(b"sk-ssh-ed25519@openssh.com"), string(b"\1" * 32), string(b"http://x")), "public_key_malformed"),
        (line(string(b"sk-ssh-ed25519@openssh.com"), string(b"\1" * 32), string(b"ssh:\xff")), "public_key_malformed"),
    ],
)
def test_each_fault_has_its_code(text: str, code: str) -> None:
    assert code_of(text) == code


@pytest.mark.parametrize(
    "exponent,modulus",
    [
        (65537, 7),  # an exponent above its modulus: the library raised ValueError here
        (65537, 65537),
        (3, 3),
        (1, 2**2047 + 1),
        (2, 2**2047 + 1),
        (65536, 2**2047 + 1),
        (65537, 2**2048),
        (65537, 2**16384 + 1),
        (65537, 2**511 + 1),
        (2**64 + 1, 2**2047 + 1),
        (0, 0),
        (3, 0),
    ],
    ids=range(12),
)
def test_numbers_that_no_rsa_key_has_are_refused(exponent: int, modulus: int) -> None:
    text = line(string(b"ssh-rsa"), mpint(exponent), mpint(modulus))
    assert code_of(text) == "public_key_malformed"


def test_rsa_numbers_in_a_second_form_are_refused() -> None:
    modulus = (2**2047 + 1).to_bytes(256, "big")
    for exponent in (b"\0\1\0\1", b"\1\0\1"):
        padded = line(string(b"ssh-rsa"), string(exponent), string(modulus if exponent[0] else b"\0\0" + modulus))
        assert code_of(padded) == "public_key_malformed"


def test_a_certificate_is_no_public_key(keyring: KeyRing) -> None:
    certificate = sign_with_ssh_keygen(keyring("ed25519", "ca"), keyring("ed25519"), name="not-a-key").read_text()
    assert code_of(certificate) == "public_key_is_a_certificate"


@given(st.text())
@example("ssh-ed25519 \ud800")
@example("ssh-rsa \n")
@example(" ")
@example("= =")
def test_no_text_raises_anything_else(text: str) -> None:
    with pytest.raises(BadPublicKey):
        parse_public_key(text)


@given(
    st.sampled_from(sorted(KEY_PARTS)), st.lists(st.binary(max_size=80) | st.integers(0, 2**600).map(mpint), max_size=4)
)
def test_no_blob_of_a_known_kind_raises_anything_else(kind: str, parts: list[bytes]) -> None:
    try:
        parse_public_key(line(string(kind.encode()), *(string(part) for part in parts)))
    except BadPublicKey:
        return
    assert kind.endswith(("ed25519", "ed25519@openssh.com", "rsa"))


@given(st.integers(0, 2**70), st.integers(0, 2**1100))
@example(65537, 2**1024 - 1)
def test_no_rsa_numbers_raise_anything_else(exponent: int, modulus: int) -> None:
    try:
        read = parse_public_key(line(string(b"ssh-rsa"), mpint(exponent), mpint(modulus)))
    except BadPublicKey:
        return
    assert read.bits == modulus.bit_length() >= 1024


def test_no_changed_byte_of_a_good_key_raises_anything_else() -> None:
    rng = random.Random(5)
    for kind in sorted(KEY_PARTS):
        blob = base64.b64decode(builders.public_line(kind).split()[1])
        for at in range(len(blob)):
            other = bytearray(blob)
            other[at] = rng.randrange(256)
            try:
                read = parse_public_key(base64.b64encode(other).decode())
            except BadPublicKey:
                continue
            assert read.blob == bytes(other)


def test_a_length_beyond_the_blob_is_refused() -> None:
    assert code_of(line(uint32(2**32 - 1), b"ssh-ed25519")) == "public_key_truncated"


def test_certificate_kinds_are_openssh_s_names() -> None:
    assert {certificate_kind(kind) for kind in KEY_PARTS} == {
        "ssh-ed25519-cert-v01@openssh.com",
        "ssh-rsa-cert-v01@openssh.com",
        "ecdsa-sha2-nistp256-cert-v01@openssh.com",
        "ecdsa-sha2-nistp384-cert-v01@openssh.com",
        "ecdsa-sha2-nistp521-cert-v01@openssh.com",
        "sk-ssh-ed25519-cert-v01@openssh.com",
        "sk-ecdsa-sha2-nistp256-cert-v01@openssh.com",
    }
