"""The Ed25519 keys that a process makes for itself, each for one purpose: `ledger.key`, `publishing.key`, a witness's.

Beside `key.py` the only module that handles the bytes of private keys. A witness, which is to take 30 megabytes, loads
it, so it reads and writes its one form of file itself: `cryptography`'s loaders and the checks of a CA key take 3.
"""

from __future__ import annotations

import binascii
import errno
import os
import stat
from pathlib import Path
from typing import Final, NoReturn, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from signer.ca.key_text import MAGIC, MAX_KEY_FILE, armoured, read_armour, write_key
from signer.errors import BadFormat, BadKeyFile, Unavailable, write_hint
from signer.files import create_unnamed, held, name_unnamed, open_directory, open_unread, sync_directory
from signer.ssh.fingerprint import fingerprint_of
from signer.ssh.wire import Reader, string, uint32

_KIND: Final = b"ssh-ed25519"
_SELF_TEST: Final = b"signer self-test"
_SEED: Final = 32  # bytes of a private key (RFC 8032 section 5.1.5)
_BLOCK: Final = 8  # bytes that a section without a cipher is padded to


class ServiceKey:
    """An Ed25519 key that a process makes for one purpose, such as `ledger.key` for checkpoints.

    `line` is its public half for an `authorized_keys` file, `raw_public` the same as 32 bytes, `fingerprint` its
    `SHA256:…`; `is_new` is true for the call that made the file.
    """

    __slots__ = ("_key", "fingerprint", "is_new", "line", "raw_public")

    def __init__(self, key: Ed25519PrivateKey, comment: str, *, is_new: bool) -> None:
        self._key = key
        self.is_new = is_new
        self.raw_public = key.public_key().public_bytes_raw()
        blob = _blob(self.raw_public)
        self.line = f"{_KIND.decode()} {binascii.b2a_base64(blob, newline=False).decode()} {comment}"
        self.fingerprint = fingerprint_of(blob)

    @classmethod
    def open(cls, path: Path, place: str = "SIGNER_DATA_DIR") -> Self:
        """The key in `path`, an OpenSSH private key without passphrase; makes one if there is no such file. `place` is
        what hints call its directory.

        The file must belong to this process's user, be a regular file with one link and mode 0400 or 0600. A new one is
        complete and on the disk before it gets its name, so that an interrupted start leaves either no file or a
        valid one; of two starts at once, both get the key of one. Raises `BadKeyFile` or `Unavailable`.
        """
        try:
            is_new = not os.path.lexists(path) and _make_service_key(path)
            sync_directory(path.parent)  # the start that made the file may have been interrupted before this
        except OSError as error:
            raise Unavailable(
                "service_key_not_written",
                f"{path.name} cannot be written: {error.strerror}",
                write_hint(error, place),
            ) from None
        return cls(_read_service_key(path, place), f"signer-{path.stem}", is_new=is_new)

    def __repr__(self) -> str:
        return f"ServiceKey({self.fingerprint})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a service key is never serialised")

    def sign(self, message: bytes) -> bytes:
        """The 64 bytes of an Ed25519 signature over `message` (RFC 8032 section 5.1)."""
        return self._key.sign(message)


def _make_service_key(path: Path) -> bool:
    """Writes a new key to `path`; False if another process was faster. Raises `OSError`."""
    data = armoured(_encode(Ed25519PrivateKey.generate(), os.urandom(4), b""))
    try:
        with held(open_directory(path.parent)) as folder, held(create_unnamed(folder, 0o600)) as unnamed:
            write_key(unnamed, data)
            name_unnamed(folder, unnamed, path.name)
    except FileExistsError:
        return False
    return True


def _read_service_key(path: Path, place: str) -> Ed25519PrivateKey:
    """The checked key in `path`; raises `BadKeyFile`."""
    try:
        with held(open_unread(path)) as descriptor:
            _check_service_key_file(path, place, os.fstat(descriptor))
            data = os.read(descriptor, MAX_KEY_FILE + 1)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_a_service_key_file(path, place) from None
        text, hint = f"{path.name} cannot be read: {error.strerror}", f"make user {os.geteuid()} its owner"
        raise BadKeyFile("service_key_unreadable", text, hint) from None
    if (key := _parse(data)) is None:
        raise BadKeyFile(
            "service_key_malformed",
            f"{path.name} does not contain one Ed25519 key in OpenSSH's form without a passphrase",
            "restore the file from a backup; to start with a new key, delete it, and give the new public key to all "
            "who check signatures by the old one",
        )
    return key


def _parse(data: bytes) -> Ed25519PrivateKey | None:
    """The one Ed25519 key of a file in OpenSSH's form without a passphrase; None if the file is anything else."""
    try:
        key = _decode(read_armour(data))
        key.public_key().verify(key.sign(_SELF_TEST), _SELF_TEST)
    except (BadKeyFile, BadFormat, ValueError, InvalidSignature):  # the sentences of `BadKeyFile` are about the CA key
        return None
    return key


def _blob(raw_public: bytes) -> bytes:
    """A public key blob (RFC 8709 section 4)."""
    return string(_KIND) + string(raw_public)


def _encode(key: Ed25519PrivateKey, check: bytes, comment: bytes) -> bytes:
    """A key as OpenSSH stores it without a passphrase (PROTOCOL.key); `check` are its four random bytes."""
    raw_public = key.public_key().public_bytes_raw()
    section = check * 2 + _blob(raw_public) + string(key.private_bytes_raw() + raw_public) + string(comment)
    section += bytes(range(1, 1 + -len(section) % _BLOCK))
    no_passphrase = string(b"none") + string(b"none") + string(b"")  # cipher, key derivation, its options
    return MAGIC + no_passphrase + uint32(1) + string(_blob(raw_public)) + string(section)


def _decode(raw: bytes) -> Ed25519PrivateKey:
    """The key that `_encode` gives these bytes for; raises `BadFormat` or `ValueError` if there is none.

    Only what `_encode` cannot know is read; the comparison checks everything else.
    """
    reader = Reader(raw)
    reader.take(len(MAGIC))
    for _ in range(3):
        reader.string()
    reader.uint32()
    reader.string()
    section = Reader(reader.string())
    check = section.take(8)[:4]
    section.string()
    section.string()
    key = Ed25519PrivateKey.from_private_bytes(section.string()[:_SEED])
    if _encode(key, check, section.string()) != raw:
        raise ValueError("it is not one Ed25519 key without a passphrase")
    return key


def _check_service_key_file(path: Path, place: str, facts: os.stat_result) -> None:
    """Raises `BadKeyFile` unless this user alone can use the file."""
    if not stat.S_ISREG(facts.st_mode):
        raise _not_a_service_key_file(path, place)
    mode = stat.S_IMODE(facts.st_mode)
    if facts.st_uid != os.geteuid() or facts.st_nlink != 1 or mode not in (0o400, 0o600):
        raise BadKeyFile(
            "service_key_not_private",
            f"{path.name} has owner {facts.st_uid}, mode {mode:04o} and {facts.st_nlink} links",
            f"it must have owner {os.geteuid()}, mode 0600 or 0400 and one link; if others could read it, replace it",
        )


def _not_a_service_key_file(path: Path, place: str) -> BadKeyFile:
    return BadKeyFile(
        "service_key_not_a_regular_file",
        f"{path.name} is a link, a directory or a device",
        f"put the key file itself into {place}",
    )
