"""The keeper's own keys: made once, whole or not at all, and refused if anyone else could have them."""

from __future__ import annotations

import binascii
import copy
import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from signer.ca import service_key as keys
from signer.ca.key_text import MAX_KEY_FILE
from signer.ca.service_key import ServiceKey
from signer.errors import BadKeyFile, SignerError, Unavailable
from signer.files import name_unnamed
from tests.parts.keys import KeyRing


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.key"


def code_of(path: Path) -> str:
    with pytest.raises(SignerError) as caught:
        ServiceKey.open(path)
    assert str(path.parent) not in f"{caught.value.text} {caught.value.hint}"
    return caught.value.code


def test_the_first_start_makes_a_key_and_later_ones_load_it(path: Path) -> None:
    made, again = ServiceKey.open(path), ServiceKey.open(path)
    assert (made.is_new, again.is_new) == (True, False)
    assert made.line == again.line
    assert made.line.endswith(" signer-ledger")
    assert made.raw_public == again.raw_public
    facts = path.lstat()
    assert (facts.st_mode, facts.st_uid, facts.st_nlink) == (0o100600, os.geteuid(), 1)
    assert [file.name for file in path.parent.iterdir()] == ["ledger.key"]


def test_two_files_have_two_keys(tmp_path: Path) -> None:
    assert ServiceKey.open(tmp_path / "ledger.key").line != ServiceKey.open(tmp_path / "publishing.key").line


def test_ssh_keygen_reads_the_file_and_the_signature_verifies(path: Path) -> None:
    key = ServiceKey.open(path)
    shown = subprocess.run(["ssh-keygen", "-y", "-f", path], capture_output=True, text=True, check=True).stdout
    assert shown.split()[:2] == key.line.split()[:2]
    listed = subprocess.run(["ssh-keygen", "-lf", path], capture_output=True, text=True, check=True).stdout
    assert listed.split()[1] == key.fingerprint
    public = load_ssh_public_key(key.line.encode())
    assert isinstance(public, Ed25519PublicKey)
    assert public.public_bytes_raw() == key.raw_public
    public.verify(key.sign(b"what is signed"), b"what is signed")
    assert len(key.sign(b"")) == 64


@pytest.mark.parametrize("_", range(8))
def test_another_implementation_reads_the_file(path: Path, _: int) -> None:
    key = ServiceKey.open(path)
    read = load_ssh_private_key(path.read_bytes(), password=None)
    assert isinstance(read, Ed25519PrivateKey)
    assert read.public_key().public_bytes_raw() == key.raw_public
    assert read.sign(b"what is signed") == key.sign(b"what is signed")


def test_a_file_that_an_earlier_version_wrote_is_loaded(path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    read = ServiceKey.open(path)
    assert read.raw_public == key.public_key().public_bytes_raw()
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    assert read.line == f"{line} signer-ledger"


def test_a_key_of_which_any_byte_was_changed_is_refused(path: Path) -> None:
    ServiceKey.open(path)
    first, *lines, last, _ = path.read_text().split("\n")
    raw = binascii.a2b_base64("".join(lines))
    for at in range(len(raw)):
        bent = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        path.write_text(f"{first}\n{binascii.b2a_base64(bent).decode()}{last}\n")
        assert code_of(path) == "service_key_malformed", at
    for bent in (raw + b"\0", raw[:-1], raw + raw, b""):
        path.write_text(f"{first}\n{binascii.b2a_base64(bent).decode()}{last}\n")
        assert code_of(path) == "service_key_malformed", len(bent)


@pytest.mark.parametrize("mode", [0o400, 0o600])
def test_a_key_that_ssh_keygen_wrote_is_loaded(path: Path, keyring: KeyRing, mode: int) -> None:
    rendered = keyring("ed25519", "ca")
    path.write_bytes(rendered.private.read_bytes())
    path.chmod(mode)
    key = ServiceKey.open(path)
    assert not key.is_new
    assert key.fingerprint == rendered.fingerprint


@pytest.mark.parametrize("mode", [0o000, 0o440, 0o604, 0o640, 0o644, 0o660, 0o700, 0o4600])
def test_a_mode_that_lets_others_in_is_refused(path: Path, mode: int) -> None:
    ServiceKey.open(path)
    path.chmod(mode)
    is_closed_to_us = mode & 0o400 == 0 and os.geteuid() != 0
    assert code_of(path) == ("service_key_unreadable" if is_closed_to_us else "service_key_not_private")


def test_another_owner_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ServiceKey.open(path)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert code_of(path) == "service_key_not_private"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused_by_root_too(path: Path) -> None:
    ServiceKey.open(path)
    os.chown(path, 65534, 65534)
    assert code_of(path) == "service_key_not_private"


def test_a_second_name_is_refused(path: Path) -> None:
    ServiceKey.open(path)
    os.link(path, path.with_name("copy"))
    assert code_of(path) == "service_key_not_private"


def test_a_link_is_neither_followed_nor_replaced(path: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "key"
    path.symlink_to(elsewhere)
    assert code_of(path) == "service_key_not_a_regular_file"  # one that leads nowhere would become the attacker's file
    elsewhere.parent.mkdir()
    ServiceKey.open(elsewhere)
    assert code_of(path) == "service_key_not_a_regular_file"
    assert path.is_symlink()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [Path.mkdir, lambda path: os.mkfifo(path, 0o600)], ids=["directory", "pipe"])
def test_what_is_no_file_is_refused(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    assert code_of(path) == "service_key_not_a_regular_file"


def test_other_content_is_refused_and_kept(path: Path, keyring: KeyRing) -> None:
    good = keyring("ed25519", "ca").private.read_bytes()
    contents = (
        b"",
        b"\n",
        good[:-40],
        good + good,
        good.replace(b"\n", b"\r\n"),
        good + b"\n" * MAX_KEY_FILE,
        keyring("ecdsa256", "other").private.read_bytes(),
        keyring("rsa3072", "other").private.read_bytes(),
    )
    for content in contents:
        path.write_bytes(content)
        path.chmod(0o600)
        assert code_of(path) == "service_key_malformed", content[-60:]
        assert path.read_bytes() == content


def test_a_key_with_a_passphrase_is_refused(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", path], check=True)
    assert code_of(path) == "service_key_malformed"


def test_no_error_and_no_repr_has_anything_of_the_key(path: Path) -> None:
    key = ServiceKey.open(path)
    assert repr(key) == f"ServiceKey({key.fingerprint})"
    secret = "".join(path.read_text().splitlines()[3:-1])
    path.write_text(path.read_text() + "one line more\n")
    with pytest.raises(BadKeyFile) as caught:
        ServiceKey.open(path)
    assert secret[:20] not in repr(caught.value) + caught.value.hint
    for copies in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="never serialised"):
            copies(key)


def _start(path: Path, gate: multiprocessing.synchronize.Barrier, found: multiprocessing.queues.Queue[object]) -> None:
    gate.wait()
    key = ServiceKey.open(path)
    found.put((key.line, key.is_new))


def test_starts_at_the_same_time_have_one_key(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate, found = context.Barrier(6), context.Queue()
    processes = [context.Process(target=_start, args=(path, gate, found)) for _ in range(6)]
    for process in processes:
        process.start()
    results = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len({line for line, _ in results}) == 1
    assert [is_new for _, is_new in results].count(True) == 1


def test_the_slower_of_two_starts_takes_the_key_of_the_faster(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faster: list[ServiceKey] = []

    def late(directory: int, descriptor: int, name: str) -> None:
        monkeypatch.setattr(keys, "name_unnamed", name_unnamed)
        faster.append(ServiceKey.open(path))
        name_unnamed(directory, descriptor, name)

    monkeypatch.setattr(keys, "name_unnamed", late)
    slower = ServiceKey.open(path)
    assert (slower.is_new, faster[0].is_new) == (False, True)
    assert slower.line == faster[0].line


_KILLED = """
import os, signal, sys
from pathlib import Path
from signer.ca import service_key as keys
step, path = sys.argv[1], Path(sys.argv[2])
owner = keys if hasattr(keys, step) else os
real = getattr(owner, step)
def fatal(*arguments, **named):
    if sys.argv[3] == "after":
        real(*arguments, **named)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, step, fatal)
keys.ServiceKey.open(path)
"""
_STEPS = ("create_unnamed", "write", "fsync", "name_unnamed", "sync_directory")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", _STEPS)
def test_a_start_that_is_killed_leaves_no_file_or_a_good_one(path: Path, step: str, when: str) -> None:
    killed = subprocess.run([sys.executable, "-c", _KILLED, step, str(path), when], stderr=subprocess.PIPE)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = [file.name for file in path.parent.iterdir()]
    has_name = (step, when) == ("name_unnamed", "after") or step == "sync_directory"
    assert left == (["ledger.key"] if has_name else [])
    assert ServiceKey.open(path).is_new is not has_name


@pytest.mark.parametrize("step", _STEPS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_no_key_is_reported(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(keys if hasattr(keys, step) else os, step, full)
        with pytest.raises(Unavailable) as caught:
            ServiceKey.open(path)
    assert caught.value.code == "service_key_not_written"
    assert os.strerror(number) in caught.value.text
    assert "SIGNER_DATA_DIR" in caught.value.hint
    if path.exists():  # the directory alone could not be synced
        assert step == "sync_directory"
    ServiceKey.open(path)


def test_a_missing_directory_is_reported(path: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        ServiceKey.open(path.parent / "none" / path.name)
    assert caught.value.code == "service_key_not_written"
