"""The CA key file: each way to be wrong has its own code, and nothing of the key is ever shown."""

from __future__ import annotations

import base64
import copy
import os
import pickle
import shutil
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from signer.ca import key as cakey
from signer.ca.key import CaKey, load_ca_key
from signer.ca.key_text import MAX_KEY_FILE
from signer.errors import BadKeyFile
from signer.ssh.wire import Reader
from tests.parts.key_forms import FORMS
from tests.parts.keys import CA_KINDS, Key, KeyRing

OWNER = f"{os.getuid()}:{os.getgid()}"
NewKey = Callable[..., Key]


def code_of(path: Path, owner: str = OWNER, pin: str | None = None) -> str:
    with pytest.raises(BadKeyFile) as caught:
        load_ca_key(path, owner, pin)
    return caught.value.code


@pytest.fixture
def ca(keyring: KeyRing, tmp_path: Path) -> Path:
    """A good key file of the test's own."""
    path = tmp_path / "ca"
    shutil.copy(keyring("ed25519", "ca").private, path)
    path.chmod(0o400)
    return path


@pytest.mark.parametrize("kind", CA_KINDS)
@pytest.mark.parametrize("mode", [0o400, 0o600])
def test_a_good_key_of_every_kind_is_loaded(keyring: KeyRing, kind: str, mode: int) -> None:
    key = keyring(kind, "ca")
    key.private.chmod(mode)
    loaded = load_ca_key(key.private, OWNER, key.fingerprint)
    assert loaded.blob == key.blob
    assert loaded.fingerprint == key.fingerprint
    assert loaded.kind == key.public_line.split()[0]


@pytest.mark.parametrize("kind", CA_KINDS)
def test_signatures_are_openssh_s_and_never_sha_1(keyring: KeyRing, kind: str) -> None:
    key = keyring(kind, "ca")
    data = b"what is to be signed"
    reader = Reader(load_ca_key(key.private, OWNER, None).sign(data))
    algorithm, signature = reader.text(), reader.string()
    reader.expect_end()
    public = load_ssh_public_key(key.public_line.encode())
    if isinstance(public, Ed25519PublicKey):
        assert algorithm == "ssh-ed25519"
        public.verify(signature, data)
    elif isinstance(public, rsa.RSAPublicKey):
        assert algorithm == "rsa-sha2-512"
        public.verify(signature, data, padding.PKCS1v15(), SHA512())
    else:
        assert isinstance(public, ec.EllipticCurvePublicKey)
        assert algorithm == key.public_line.split()[0]
        inner = Reader(signature)
        numbers = encode_dss_signature(inner.mpint(), inner.mpint())
        inner.expect_end()
        hashes = {256: SHA256(), 384: SHA384(), 521: SHA512()}
        public.verify(numbers, data, ec.ECDSA(hashes[public.key_size]))


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    assert code_of(tmp_path / "none") == "ca_key_missing"
    (tmp_path / "file").write_text("")
    assert code_of(tmp_path / "file" / "none") == "ca_key_missing"


def test_a_link_is_not_followed(tmp_path: Path, ca: Path) -> None:
    (tmp_path / "link").symlink_to(ca)
    assert code_of(tmp_path / "link") == "ca_key_is_a_link"


def test_a_second_hard_link_is_refused(tmp_path: Path, ca: Path) -> None:
    os.link(ca, tmp_path / "second")
    assert code_of(ca) == "ca_key_has_links"


@pytest.mark.timeout(20)
def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o400)
    assert code_of(tmp_path / "pipe") == "ca_key_not_a_regular_file"


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/"])
def test_what_is_no_file_is_refused(path: str) -> None:
    assert code_of(Path(path)) == "ca_key_not_a_regular_file"


@pytest.mark.parametrize("mode", [0o000, 0o200, 0o440, 0o404, 0o500, 0o640, 0o644, 0o660, 0o700, 0o777, 0o4400, 0o1600])
def test_a_mode_that_is_not_exactly_0400_or_0600_is_refused(ca: Path, mode: int) -> None:
    ca.chmod(mode)
    if mode & 0o400 == 0 and os.geteuid() != 0:
        assert code_of(ca) == "ca_key_unreadable"
    else:
        assert code_of(ca) == "ca_key_mode_must_be_0400_or_0600"


def test_another_owner_is_refused_and_the_code_names_the_right_one(ca: Path) -> None:
    assert code_of(ca, f"{os.getuid() + 1}:{os.getgid()}") == f"ca_key_owner_must_be_{os.getuid() + 1}:{os.getgid()}"
    assert code_of(ca, f"{os.getuid()}:{os.getgid() + 1}").startswith("ca_key_owner_must_be_")
    assert code_of(ca, "nobody:nogroup") == "ca_key_owner_must_be_nobody:nogroup"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_root_is_named_as_the_owner_that_must_be(ca: Path) -> None:
    os.chown(ca, 65534, 65534)
    assert code_of(ca, "root:root") == "ca_key_owner_must_be_root:root"


@pytest.mark.parametrize("owner", ["no-such-user:root", "root:no-such-group", ":", "root", "root:"])
def test_an_owner_that_this_host_does_not_know_is_refused(ca: Path, owner: str) -> None:
    assert code_of(ca, owner) == "ca_key_owner_unknown"


def test_an_empty_file_and_one_that_is_too_large_are_refused(tmp_path: Path) -> None:
    for size, code in ((0, "ca_key_empty"), (MAX_KEY_FILE + 1, "ca_key_too_large"), (10**7, "ca_key_too_large")):
        path = tmp_path / str(size)
        path.write_bytes(b"x" * size)
        path.chmod(0o400)
        assert code_of(path) == code


def test_a_file_of_16_kib_is_still_read(ca: Path) -> None:
    ca.chmod(0o600)
    ca.write_text(ca.read_text() + "\n" * (MAX_KEY_FILE - ca.stat().st_size))
    assert code_of(ca) == "ca_key_malformed"


@pytest.mark.parametrize("name", FORMS)
def test_audit_4f10_only_the_form_that_ssh_keygen_reads_whole_is_a_key(name: str, ca: Path) -> None:
    """tests/system/migration/test_preflight_key.py has the preflight's verdicts for the same table."""
    code, change = FORMS[name]
    content = change(ca.read_bytes())
    ca.chmod(0o600)
    ca.write_bytes(content)
    assert code_of(ca) == code


def test_a_passphrase_is_told_apart(new_key: NewKey) -> None:
    assert code_of(new_key("ed25519", "locked", passphrase="open sesame").private) == "ca_key_has_passphrase"


def test_a_key_in_pem_or_a_public_key_or_noise_is_no_openssh_key(tmp_path: Path, keyring: KeyRing) -> None:
    pem = tmp_path / "pem"
    shutil.copy(keyring("rsa3072", "ca").private, pem)
    pem.chmod(0o600)
    subprocess.run(["ssh-keygen", "-q", "-p", "-m", "PEM", "-N", "", "-f", pem], check=True, capture_output=True)
    assert b"BEGIN RSA PRIVATE KEY" in pem.read_bytes()
    public = tmp_path / "public"
    public.write_text(keyring("ed25519", "ca").public_line)
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(range(256)) * 8)
    for path in (pem, public, noise):
        path.chmod(0o400)
        assert code_of(path) == "ca_key_not_a_private_key"


def test_every_cut_or_changed_file_is_refused_or_still_the_same_key(ca: Path, keyring: KeyRing) -> None:
    lines = ca.read_text().splitlines()
    raw = bytearray(base64.b64decode("".join(lines[1:-1])))
    ca.chmod(0o600)
    for at in range(0, len(raw), 3):
        other = bytearray(raw)
        other[at] ^= 0x41
        ca.write_text("\n".join([lines[0], base64.b64encode(other).decode(), lines[-1], ""]))
        try:
            loaded = load_ca_key(ca, OWNER, keyring("ed25519", "ca").fingerprint)
        except BadKeyFile:
            continue
        assert loaded.blob == keyring("ed25519", "ca").blob


@pytest.mark.filterwarnings("ignore:SSH DSA keys are deprecated")
def test_a_dsa_key_is_refused(new_key: NewKey, tmp_path: Path) -> None:
    made = subprocess.run(
        ["ssh-keygen", "-q", "-t", "dsa", "-N", "", "-f", tmp_path / "dsa"], capture_output=True, text=True
    )
    if made.returncode != 0:
        pytest.skip("this ssh-keygen makes no DSA keys any more")
    assert code_of(tmp_path / "dsa") in ("ca_key_kind_not_allowed", "ca_key_not_a_private_key")


def test_a_short_rsa_key_is_refused(keyring: KeyRing) -> None:
    assert code_of(keyring("rsa2048", "ca").private) == "ca_key_rsa_too_short"


def test_another_key_than_the_pinned_one_is_refused_with_both_fingerprints(ca: Path, keyring: KeyRing) -> None:
    other = keyring("ed25519", "another").fingerprint
    with pytest.raises(BadKeyFile) as caught:
        load_ca_key(ca, OWNER, other)
    assert caught.value.code == "ca_key_fingerprint_differs"
    assert other in caught.value.text
    assert keyring("ed25519", "ca").fingerprint in caught.value.text


def test_a_key_whose_halves_do_not_belong_together_fails_its_self_test(
    monkeypatch: pytest.MonkeyPatch, ca: Path
) -> None:
    key, stranger = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()

    class Mismatched(Ed25519PrivateKey):
        def public_key(self) -> Ed25519PublicKey:
            return stranger.public_key()

        def sign(self, data: Any) -> bytes:
            return key.sign(data)

        def private_bytes(self, *_: Any, **__: Any) -> bytes:
            return b""

        def private_bytes_raw(self) -> bytes:
            return b""

        def __copy__(self) -> Ed25519PrivateKey:
            return self

        def __deepcopy__(self, _memo: Any) -> Ed25519PrivateKey:
            return self

    monkeypatch.setattr(cakey, "load_ssh_private_key", lambda _data, password: Mismatched())
    assert code_of(ca) == "ca_key_self_test_failed"


# --- the key stays put -----------------------------------------------------------------------------------------------


def secrets_of(key: Key) -> list[str]:
    """The file's text, line by line, and its bytes as hex: what nobody may ever see."""
    lines = key.private.read_text().splitlines()[1:-1]
    return [line for line in lines if len(line) > 20] + [base64.b64decode("".join(lines)).hex()[-120:-20]]


def test_neither_repr_nor_str_nor_format_show_the_key(keyring: KeyRing) -> None:
    key = keyring("ed25519", "ca")
    loaded = load_ca_key(key.private, OWNER, None)
    shown = f"{loaded!r} {loaded!s} {loaded}"
    assert repr(loaded) == f"CaKey(ssh-ed25519, {key.fingerprint})"
    assert not [secret for secret in secrets_of(key) if secret in shown]


def test_the_key_cannot_be_pickled_or_copied_or_looked_into(keyring: KeyRing) -> None:
    loaded = load_ca_key(keyring("ed25519", "ca").private, OWNER, None)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="never serialised"):
            pickle.dumps(loaded, protocol)
    for attempt in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never serialised"):
            attempt(loaded)
    with pytest.raises(TypeError):
        vars(loaded)
    assert not [name for name in dir(CaKey) if "private" in name]


def test_no_fault_shows_what_was_in_the_file(tmp_path: Path, keyring: KeyRing) -> None:
    key = keyring("ed25519", "ca")
    text = key.private.read_text()
    path = tmp_path / "broken"
    for broken in (text.replace("OPENSSH", "OPEN"), text[:-60], text.replace("A", "B", 3), text[80:]):
        path.unlink(missing_ok=True)
        path.write_text(broken)
        path.chmod(0o400)
        with pytest.raises(BadKeyFile) as caught:
            load_ca_key(path, OWNER, "SHA256:" + "x" * 43)
        fault = caught.value
        told = "".join(traceback.format_exception(fault)) + repr(fault) + str(dict(fault.facts)) + fault.hint
        assert not [secret for secret in secrets_of(key) if secret in told]
        assert str(tmp_path) not in f"{fault.text} {fault.hint}"
