"""Signatures of approvers: those that `ssh-keygen -Y sign` makes are good, and each way to spoil one is refused.

FIDO keys are software here; `ssh-keygen` signs with them through an agent, as it does with a key that is plugged in.
"""

from __future__ import annotations

import base64
import string as letters
from hashlib import sha512
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from signer.errors import BadSignature
from signer.model import PublicKey
from signer.ssh.publickey import parse_public_key
from signer.ssh.sshsig import MAX_ARMOR, SshSignature, sign_armored, signature_key, verify
from signer.ssh.wire import string, uint32
from tests.parts.agents import FidoAgent
from tests.parts.fido import (
    PRESENT,
    SK_ECDSA,
    SK_ED25519,
    VERIFIED,
    FidoKey,
    sign_through_agent,
    sign_with_file,
)
from tests.parts.keys import KINDS, KeyRing

pytestmark = pytest.mark.unix_socket

NAMESPACE = "approval.v1@signer"
MESSAGE = b'{"purpose":"signer-approval"}'
BEGIN, END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
# A FIDO key signs here what `ssh-keygen -Y sign` gives to an agent, so that bytes can be spoiled one by one.
PREFIX = b"SSHSIG"


def code_of(armored: str, key: PublicKey, message: bytes = MESSAGE, namespace: str = NAMESPACE) -> str:
    with pytest.raises(BadSignature) as caught:
        verify(armored, message, namespace, key)
    assert caught.value.text
    assert caught.value.hint
    return caught.value.code


def armor(blob: bytes, width: int = 70) -> str:
    text = base64.b64encode(blob).decode()
    return "\n".join((BEGIN, *(text[at : at + width] for at in range(0, len(text), width)), END)) + "\n"


def blob_of(armored: str) -> bytes:
    return base64.b64decode("".join(armored.splitlines()[1:-1]))


def made(key: FidoKey, /, **changes: bytes) -> str:
    """A signature of a FIDO key, by the layout of PROTOCOL.sshsig, with fields changed after signing."""
    fields = {
        "magic": PREFIX,
        "version": uint32(1),
        "key": key.blob,
        "namespace": NAMESPACE.encode(),
        "reserved": b"",
        "hash": b"sha512",
        "end": b"",
    }
    signed = PREFIX + string(fields["namespace"]) + string(b"") + string(b"sha512") + string(sha512(MESSAGE).digest())
    fields = {**fields, "signature": key.sign(signed), **changes}
    head = fields["magic"] + fields["version"]
    middle = b"".join(string(fields[name]) for name in ("key", "namespace", "reserved", "hash", "signature"))
    return armor(head + middle + fields["end"])


@pytest.fixture(scope="module")
def fido() -> FidoKey:
    return FidoKey()


# --- what ssh-keygen makes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hash_name", ["sha512", "sha256"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_signature_by_ssh_keygen_is_good(keyring: KeyRing, kind: str, hash_name: str) -> None:
    pair = keyring(kind)
    armored = sign_with_file(pair, MESSAGE, NAMESPACE, "-O", f"hashalg={hash_name}")
    key = parse_public_key(pair.public_line)
    assert signature_key(armored) == key
    assert verify(armored, MESSAGE, NAMESPACE, key) == SshSignature(pair.fingerprint, False, False, None)
    assert verify(armored.rstrip("\n"), MESSAGE, NAMESPACE, key).fingerprint == pair.fingerprint


@pytest.mark.parametrize("flags", [0, PRESENT, VERIFIED, PRESENT | VERIFIED, PRESENT | 0x18])
@pytest.mark.parametrize("kind", [SK_ED25519, SK_ECDSA])
def test_the_flags_of_a_fido_key_are_those_that_it_signed(tmp_path: Path, kind: str, flags: int) -> None:
    held = FidoKey(kind)
    held.flags, held.counter = flags, 4_294_967_295
    with FidoAgent(held) as agent:
        armored = sign_through_agent(agent.socket, held, MESSAGE, NAMESPACE, tmp_path)
    key = parse_public_key(held.line)
    found = verify(armored, MESSAGE, NAMESPACE, key)
    assert found == SshSignature(held.fingerprint, bool(flags & PRESENT), bool(flags & VERIFIED), 4_294_967_295)
    assert signature_key(armored) == key


@pytest.mark.parametrize("kind", [SK_ED25519, SK_ECDSA])
def test_a_signature_made_by_hand_is_the_one_that_ssh_keygen_makes(tmp_path: Path, kind: str) -> None:
    """`made` stands in for it below; only Ed25519 signs the same bytes twice."""
    held = FidoKey(kind)
    with FidoAgent(held) as agent:
        armored = sign_through_agent(agent.socket, held, MESSAGE, NAMESPACE, tmp_path)
    if kind == SK_ED25519:
        assert made(held) == armored
    verify(made(held), MESSAGE, NAMESPACE, parse_public_key(held.line))


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa256", "rsa3072"])
def test_another_message_namespace_or_key_is_refused(keyring: KeyRing, kind: str) -> None:
    pair, other = keyring(kind), keyring(kind, "other")
    armored = sign_with_file(pair, MESSAGE, NAMESPACE)
    key, stranger = parse_public_key(pair.public_line), parse_public_key(other.public_line)
    assert code_of(armored, key, message=MESSAGE + b" ") == "signature_wrong"
    assert code_of(armored, key, namespace="file") == "signature_for_another_namespace"
    assert code_of(sign_with_file(pair, MESSAGE, "git"), key) == "signature_for_another_namespace"
    assert code_of(armored, stranger) == "signature_by_another_key"


@pytest.mark.parametrize("kind", [SK_ED25519, SK_ECDSA])
def test_another_application_is_another_key(kind: str) -> None:
    held = FidoKey(kind)
    elsewhere = FidoKey(kind, application="ssh:elsewhere")
    assert code_of(made(elsewhere), parse_public_key(held.line)) == "signature_by_another_key"
    held_key = parse_public_key(held.line)
    assert code_of(made(elsewhere, key=held.blob), held_key) == "signature_wrong"


# --- what is spoiled -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SK_ED25519, SK_ECDSA])
def test_flags_and_counter_are_part_of_what_is_signed(kind: str) -> None:
    held = FidoKey(kind)
    held.flags = 0
    blob = blob_of(made(held))
    for at in range(len(blob) - 5, len(blob)):
        for bit in range(8):
            spoiled = bytearray(blob)
            spoiled[at] ^= 1 << bit
            assert code_of(armor(bytes(spoiled)), parse_public_key(held.line)) == "signature_wrong", (at, bit)


@pytest.mark.parametrize("kind", [SK_ED25519, SK_ECDSA])
def test_a_changed_byte_anywhere_spoils_a_signature(kind: str) -> None:
    held = FidoKey(kind)
    blob, key = blob_of(made(held)), parse_public_key(held.line)
    for at in range(len(blob)):
        spoiled = bytearray(blob)
        spoiled[at] ^= 1
        code_of(armor(bytes(spoiled)), key)


@pytest.mark.parametrize("kind", ["ed25519", "rsa2048", "ecdsa521"])
def test_a_changed_byte_anywhere_spoils_a_plain_signature(keyring: KeyRing, kind: str) -> None:
    pair = keyring(kind)
    blob, key = blob_of(sign_with_file(pair, MESSAGE, NAMESPACE)), parse_public_key(pair.public_line)
    for at in range(len(blob)):
        spoiled = bytearray(blob)
        spoiled[at] ^= 1
        code_of(armor(bytes(spoiled)), key)


def test_a_signature_cut_short_or_followed_by_anything_is_refused(fido: FidoKey) -> None:
    blob, key = blob_of(made(fido)), parse_public_key(fido.line)
    for end in range(len(blob)):
        assert code_of(armor(blob[:end]), key) == "signature_malformed", end
    assert code_of(armor(blob + b"\0"), key) == "signature_malformed"


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"magic": b"SSHSIH"}, "does not begin with SSHSIG"),
        ({"version": uint32(0)}, "its version is 0, not 1"),
        ({"version": uint32(2)}, "its version is 2, not 1"),
        ({"reserved": b"x"}, "its reserved field is not empty"),
        ({"hash": b"sha1"}, "its hash algorithm is 'sha1', not sha256 or sha512"),
        ({"hash": b"SHA512"}, "its hash algorithm is 'SHA512'"),
        ({"hash": b""}, "its hash algorithm is ''"),
        ({"hash": b"\x1b[2J" * 100}, r"its hash algorithm is '\x1b[2J"),
        ({"namespace": b"\xff"}, "a text field is not UTF-8"),
        ({"end": b"more"}, "there is data after the last value"),
    ],
)
def test_a_field_that_ssh_keygen_never_writes_is_refused(fido: FidoKey, changes: dict[str, bytes], words: str) -> None:
    with pytest.raises(BadSignature) as caught:
        verify(made(fido, **changes), MESSAGE, NAMESPACE, parse_public_key(fido.line))
    assert caught.value.code == "signature_malformed"
    assert words in caught.value.text
    assert caught.value.text.isprintable()


def test_the_other_hash_of_the_two_is_not_taken_for_the_one_that_was_signed(fido: FidoKey) -> None:
    assert code_of(made(fido, hash=b"sha256"), parse_public_key(fido.line)) == "signature_wrong"


@pytest.mark.parametrize("namespace", ["", "approval.v1@signer\0", "approval.v2@signer", "APPROVAL.V1@signer"])
def test_a_namespace_is_compared_whole(fido: FidoKey, namespace: str) -> None:
    armored = made(fido, namespace=namespace.encode())
    assert code_of(armored, parse_public_key(fido.line)) == "signature_for_another_namespace"


@pytest.mark.parametrize("kind", [SK_ED25519, SK_ECDSA])
@pytest.mark.parametrize(
    "algorithm",
    [
        b"ssh-ed25519",
        b"ecdsa-sha2-nistp256",
        b"webauthn-sk-ecdsa-sha2-nistp256@openssh.com",
        b"",
        SK_ED25519.encode(),
        SK_ECDSA.encode(),
    ],
)
def test_a_signature_under_the_name_of_another_algorithm_is_refused(kind: str, algorithm: bytes) -> None:
    held = FidoKey(kind)
    if algorithm != kind.encode():
        signature = string(algorithm) + held.sign(b"x")[len(string(kind.encode())) :]
        assert code_of(made(held, signature=signature), parse_public_key(held.line)) == "signature_wrong"


def test_a_plain_signature_is_none_of_a_fido_key(keyring: KeyRing) -> None:
    """An agent on its owner's laptop signs silently with a plain key; it must not pass for the security key."""
    pair, held = keyring("ed25519"), FidoKey()
    plain = blob_of(sign_with_file(pair, MESSAGE, NAMESPACE))
    as_fido = plain.replace(string(pair.blob), string(held.blob))
    assert code_of(armor(as_fido), parse_public_key(held.line)) == "signature_wrong"


def test_rsa_with_sha_1_is_refused(keyring: KeyRing) -> None:
    pair = keyring("rsa2048")
    blob = blob_of(sign_with_file(pair, MESSAGE, NAMESPACE))
    assert blob.count(string(b"rsa-sha2-512")) == 1
    old = blob.replace(string(b"rsa-sha2-512"), string(b"ssh-rsa"))
    size = len(blob) - blob.index(string(b"rsa-sha2-512"))
    old = old.replace(uint32(size) + string(b"ssh-rsa"), uint32(size - 5) + string(b"ssh-rsa"))
    assert code_of(armor(old), parse_public_key(pair.public_line)) == "signature_wrong"


# --- the armor -------------------------------------------------------------------------------------------------------


def test_one_signature_has_one_text(fido: FidoKey) -> None:
    key, good = parse_public_key(fido.line), made(fido)
    blob = blob_of(good)
    bare = good.removesuffix("\n")
    others = {
        "wider lines": armor(blob, 76),
        "narrower lines": armor(blob, 64),
        "one line": armor(blob, 10**6),
        "carriage returns": good.replace("\n", "\r\n"),
        "a line before": "\n" + good,
        "a line after": good + "\n",
        "a blank at the end": bare + " ",
        "a blank in the base64": good.replace("\n", " \n", 2),
        "an empty line": good.replace(BEGIN, BEGIN + "\n"),
        "two signatures": good + good,
        "another frame": good.replace("SSH", "PGP"),
        "no frame": "\n".join(good.splitlines()[1:-1]),
        "no end": good.replace(END, ""),
        "no content": f"{BEGIN}\n{END}",
        "the frame alone": BEGIN,
        "nothing": "",
        "a letter outside ASCII": good.replace("U1NIU0lH", "U1NIU0l\N{CYRILLIC SMALL LETTER EN}"),
        "a byte order mark": "\ufeff" + good,
        "padding": bare.replace(f"\n{END}", f"=\n{END}"),
    }
    verify(good, MESSAGE, NAMESPACE, key)
    for name, text in others.items():
        assert text != good, name
        assert code_of(text, key) == "signature_malformed", name


def test_needless_bits_in_the_last_character_are_refused() -> None:
    fido = FidoKey(application="ssh:a")  # one byte more, so that the base64 ends with padding
    key, good = parse_public_key(fido.line), made(fido)
    *_, last, end = good.splitlines()
    assert last.endswith("=")
    alphabet = letters.ascii_uppercase + letters.ascii_lowercase + letters.digits + "+/"
    at = len(last.rstrip("=")) - 1
    other = last[:at] + alphabet[alphabet.index(last[at]) ^ 1] + last[at + 1 :]
    assert base64.b64decode(other) == base64.b64decode(last)
    assert code_of(good.replace(f"{last}\n{end}", f"{other}\n{end}"), key) == "signature_malformed"


def test_a_signature_longer_than_any_is_refused_unread(fido: FidoKey) -> None:
    assert code_of("A" * (MAX_ARMOR + 1), parse_public_key(fido.line)) == "signature_too_long"


def test_the_longest_signature_of_any_key_fits(keyring: KeyRing) -> None:
    assert len(sign_with_file(keyring("rsa4096"), MESSAGE, NAMESPACE)) * 16384 // 4096 < MAX_ARMOR


@given(st.text() | st.binary(max_size=400).map(armor) | st.binary(max_size=400).map(lambda raw: armor(PREFIX + raw)))
def test_nothing_but_bad_signature_is_raised(text: str) -> None:
    key = parse_public_key(FidoKey().line)
    with pytest.raises(BadSignature):
        verify(text, MESSAGE, NAMESPACE, key)
    with pytest.raises(BadSignature):
        signature_key(text)


FIDO_KEYS = {kind: FidoKey(kind) for kind in (SK_ED25519, SK_ECDSA)}
MADE = {kind: made(key) for kind, key in FIDO_KEYS.items()}  # once: ECDSA signatures differ in length


@given(st.sampled_from([SK_ED25519, SK_ECDSA]), st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255))))
def test_no_spoiled_bytes_raise_anything_but_bad_signature(kind: str, changes: list[tuple[int, int]]) -> None:
    good = blob_of(MADE[kind])
    spoiled = bytearray(good)
    for at, byte in changes:
        spoiled[at % len(good)] = byte
    key = parse_public_key(FIDO_KEYS[kind].line)
    if bytes(spoiled) == good:
        assert verify(armor(good), MESSAGE, NAMESPACE, key).user_present
    else:
        code_of(armor(bytes(spoiled)), key)


@pytest.mark.parametrize("key", [b"", b"\0\0\0\x01", string(b"ssh-dss") + string(b"x"), string(b"\xff")])
def test_a_key_that_is_not_one_is_named_as_such(fido: FidoKey, key: bytes) -> None:
    with pytest.raises(BadSignature) as caught:
        signature_key(made(fido, key=key))
    assert caught.value.code == "signature_malformed"
    assert code_of(made(fido, key=key), parse_public_key(fido.line)) == "signature_malformed"


def test_a_certificate_does_not_stand_in_for_its_key(fido: FidoKey) -> None:
    key = parse_public_key(fido.line)
    certificate = string(b"sk-ssh-ed25519-cert-v01@openssh.com") + fido.blob
    assert code_of(made(fido, key=certificate), key) == "signature_malformed"
    assert code_of(made(fido), replace(key, blob=certificate)) == "signature_by_another_key"


# --- making ----------------------------------------------------------------------------------------------------------


@given(message=st.binary(max_size=300))
def test_what_an_ed25519_key_signs_here_is_what_it_signs_with_ssh_keygen(keyring: KeyRing, message: bytes) -> None:
    """The reader here is tested against ssh-keygen; Ed25519 signatures have one form, so the texts are equal."""
    key = keyring("ed25519", "publisher")
    private = load_ssh_private_key(key.private.read_bytes(), None)
    assert isinstance(private, Ed25519PrivateKey)
    raw = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    armored = sign_armored(message, NAMESPACE, raw, private.sign)
    assert verify(armored, message, NAMESPACE, parse_public_key(key.public_line)).fingerprint == key.fingerprint


def test_the_text_is_the_one_that_ssh_keygen_writes(keyring: KeyRing) -> None:
    key = keyring("ed25519", "publisher")
    private = load_ssh_private_key(key.private.read_bytes(), None)
    assert isinstance(private, Ed25519PrivateKey)
    raw = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    assert sign_armored(MESSAGE, NAMESPACE, raw, private.sign) == sign_with_file(key, MESSAGE, NAMESPACE)
