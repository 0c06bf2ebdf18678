"""Private keys: the only module that handles their bytes, used by the keeper and by `signer ca`.

`load_ca_key` opens the file once and checks the open descriptor. The result signs and has public properties; the
private key cannot be read from it. `ServiceKey` is one of the keeper's own keys, each for one purpose.
"""

from __future__ import annotations

import base64
import errno
import grp
import os
import pwd
import re
import stat
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Final, NoReturn, ParamSpec, Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from signer.errors import BadKeyFile, Unavailable, write_hint
from signer.files import create_unnamed, name_unnamed, open_directory, open_unread, os_errors, sync_directory
from signer.model import PublicKey
from signer.ssh.publickey import MIN_CA_RSA_BITS, fingerprint_of, parse_public_key, render_public_key
from signer.ssh.wire import Reader, mpint, string

MAX_KEY_FILE: Final = 16 * 1024
MIN_RSA_BITS: Final = MIN_CA_RSA_BITS
_HASHES: Final[dict[str, HashAlgorithm]] = {
    "secp256r1": SHA256(),
    "secp384r1": SHA384(),
    "secp521r1": SHA512(),
}  # RFC 5656 section 6.2.1

_PrivateKey = Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
_GENERATORS: Final[dict[str, Callable[[], _PrivateKey]]] = {
    "ed25519": Ed25519PrivateKey.generate,
    "ecdsa256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ecdsa384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ecdsa521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "rsa4096": lambda: rsa.generate_private_key(65_537, 4096),
}
_SELF_TEST: Final = b"signer self-test"
_OPENSSH: Final = "OPENSSH PRIVATE KEY"
_ARMOUR: Final = (f"-----BEGIN {_OPENSSH}-----", f"-----END {_OPENSSH}-----")  # PROTOCOL.key
_MAGIC: Final = b"openssh-key-v1\0"  # PROTOCOL.key section 1
_BASE64: Final = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_LINE: Final = 70  # characters of base64 in a line, as ssh-keygen writes them
_STORE_THE_KEY: Final = "store the whole file of the CA key, with its line breaks, and nothing else"
_RENDER_AGAIN: Final = "render it again with `signer ca render`, or write it with ssh-keygen"
# How stores and shells write a line break in one line: \n (also escaped twice), <br>, &#10;, %0A.
_BREAKS: Final = re.compile(r"\\{1,4}r\\{1,4}n|\\{1,4}[nr]|<br ?/?>|&#(?:10|13|x[aAdD]);|%0[aAdD]")
_UNSEEN: Final = dict.fromkeys([0, 0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF]) | dict.fromkeys([0xA0, 0x202F], " ")
_AROUND: Final = " \t\n\"'`,;:\\-\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # dashes, also those of word processors
_BEGIN: Final = re.compile(r"BEGIN ((?:[A-Z0-9]{1,12} )?PRIVATE KEY)")
_FIRST_LINE: Final = re.compile(rb"^-----BEGIN (?:[A-Z0-9]{1,12} )?PRIVATE KEY-----", re.MULTILINE)
_LABEL: Final = re.compile(r"BEGIN ([A-Z0-9 ]{1,40})-")


class _Secret:
    """What holds a private key, and is never serialised."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is never serialised")


class CaKey(_Secret):
    """A loaded CA key. `kind` and `blob` are its public key, `fingerprint` its `SHA256:…`, `bits` its size."""

    __slots__ = ("_key", "bits", "blob", "fingerprint", "kind")

    def __init__(self, key: _PrivateKey) -> None:
        line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        public = parse_public_key(line)
        self._key = key
        self.kind, self.blob, self.bits = public.kind, public.blob, public.bits
        self.fingerprint = fingerprint_of(public.blob)

    @property
    def public(self) -> PublicKey:
        return PublicKey(self.kind, self.blob, self.bits, self.fingerprint)

    def __repr__(self) -> str:
        return f"CaKey({self.kind}, {self.fingerprint})"

    def sign(self, data: bytes) -> bytes:
        """An SSH signature blob over `data` (RFC 8709 section 6, RFC 5656 section 3.1.2, RFC 8332 section 3)."""
        key = self._key
        if isinstance(key, Ed25519PrivateKey):
            return string(b"ssh-ed25519") + string(key.sign(data))
        if isinstance(key, rsa.RSAPrivateKey):
            return string(b"rsa-sha2-512") + string(key.sign(data, padding.PKCS1v15(), SHA512()))
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(_HASHES[key.curve.name])))
        return string(self.kind.encode()) + string(mpint(r) + mpint(s))

    def self_test(self) -> None:
        """Signs and verifies once; raises `BadKeyFile` if private and public half do not match."""
        data, key = _SELF_TEST, self._key
        try:
            if isinstance(key, Ed25519PrivateKey):
                key.public_key().verify(key.sign(data), data)
            elif isinstance(key, rsa.RSAPrivateKey):
                signature = key.sign(data, padding.PKCS1v15(), SHA512())
                key.public_key().verify(signature, data, padding.PKCS1v15(), SHA512())
            else:
                algorithm = ec.ECDSA(_HASHES[key.curve.name])
                key.public_key().verify(key.sign(data, algorithm), data, algorithm)
        except InvalidSignature:
            raise BadKeyFile(
                "ca_key_self_test_failed", "the CA key cannot verify its own signature", "render it again"
            ) from None


class KeyMaterial(_Secret):
    """A checked CA key as the bytes of its file, which can only be written to a descriptor."""

    __slots__ = ("_data", "fingerprint", "kind", "public_line")

    def __init__(self, data: bytes) -> None:
        key = CaKey(_parse(data))
        key.self_test()
        self._data = data
        self.kind, self.fingerprint = key.kind, key.fingerprint
        self.public_line = render_public_key(key.kind, key.blob)

    @classmethod
    def generate(cls, kind: str) -> KeyMaterial:
        """A new key of `kind`: `ed25519`, `ecdsa256`, `ecdsa384`, `ecdsa521` or `rsa4096`."""
        key = _GENERATORS[kind]()
        return cls(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))

    @classmethod
    def repair(cls, text: str, pin: str) -> KeyMaterial:
        """A key from a secret store as the file that ssh-keygen reads, whatever the store did to its text.

        The pin proves a repaired key right: line breaks, quotes, other text around the key, lost first and last lines,
        base64 of the whole file, and the older forms PKCS#1, PKCS#8 and SEC 1. Raises `BadKeyFile` for any other
        fault, with the kind of text that the secret is, and unless the fingerprint is `pin`.
        """
        if not text.translate(_UNSEEN).strip():
            raise BadKeyFile("ca_key_empty", "the secret is empty", "put the CA key into Infisical")
        data = _repaired(text)
        if len(data) > MAX_KEY_FILE:
            raise _too_large()
        try:
            found = cls(data)
        except BadKeyFile as error:
            raise _damaged() if error.code == "ca_key_not_a_private_key" else error from None
        if found.fingerprint != pin:
            raise BadKeyFile(
                "ca_key_fingerprint_differs",
                f"Infisical holds the key {found.fingerprint}, SIGNER_CA_FINGERPRINT is {pin}",
                "store the pinned key in Infisical, or pin the other one here and in policy.toml",
            )
        return found

    def __repr__(self) -> str:
        return f"KeyMaterial({self.kind}, {self.fingerprint})"

    def write(self, descriptor: int) -> None:
        """Writes the whole file and brings it to the disk; raises `OSError`."""
        rest = memoryview(self._data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)

    def is_content_of(self, descriptor: int) -> bool:
        """True if the open file has exactly this content; raises `OSError`."""
        return os.read(descriptor, MAX_KEY_FILE + 1) == self._data


def _repaired(text: str, *, is_inner: bool = False) -> bytes:
    """The one private key in a text, as the bytes of its file; raises `BadKeyFile` if it has none or several.

    `is_inner`: the text was base64 in another text. Every pattern is linear in the text.
    """
    text = _BREAKS.sub("\n", text.translate(_UNSEEN).replace("\r\n", "\n").replace("\r", "\n")).replace("\\/", "/")
    lines = [" ".join(line.split()) for line in text.split("\n")]
    if (lines := [line for line in lines if line]) and _is_file_of_one_key(lines):
        return "".join(f"{line}\n" for line in lines).encode()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    begins = list(_BEGIN.finditer(text))
    if len(begins) > 1:
        raise _several(len(begins), "the secret")
    if not begins:
        body = "".join(text.split()).strip(_AROUND)
        if (bare := _decoded(body.partition("-----")[0])).startswith(_MAGIC):
            return _armoured(bare)  # its first line was lost
        if not is_inner and b"PRIVATE KEY" in (inner := _decoded(body)):
            return _repaired(inner.decode("ascii", "replace"), is_inner=True)
        if len(text) > MAX_KEY_FILE:
            raise _too_large()
        raise BadKeyFile("ca_key_not_a_private_key", f"the secret {_described(text)}", _STORE_THE_KEY)
    label = begins[0][1]
    body, end, _ = text[begins[0].end() :].partition(f"END {label}")
    if "ENCRYPTED" in label or "ENCRYPTED" in body:
        raise _has_passphrase()
    raw = _decoded("".join(body.strip(_AROUND).translate(dict.fromkeys(map(ord, "\"'`,;\\>|"))).split()))
    if not raw:
        raise _damaged() if end else _damaged("is cut off: its last line is missing")
    return _armoured(raw) if label == _OPENSSH else _converted(label, raw)


def _is_file_of_one_key(lines: list[str]) -> bool:
    return (lines[0], lines[-1]) == _ARMOUR and all(_BASE64.fullmatch(line) for line in lines[1:-1])


def _decoded(text: str) -> bytes:
    """The bytes of a base64 text, with or without its padding; empty if it is none."""
    bare = text.rstrip("=")
    if _BASE64.fullmatch(bare) is None or len(bare) % 4 == 1:
        return b""
    return base64.b64decode(bare + "=" * (-len(bare) % 4))


def _armoured(raw: bytes) -> bytes:
    """A file as ssh-keygen writes it (PROTOCOL.key)."""
    body = base64.b64encode(raw).decode()
    lines = [body[at : at + _LINE] for at in range(0, len(body), _LINE)]
    return "".join(f"{line}\n" for line in (_ARMOUR[0], *lines, _ARMOUR[1])).encode()


def _converted(label: str, raw: bytes) -> bytes:
    """A PKCS#1, PKCS#8 or SEC 1 key in OpenSSH's form, the same bytes each time; raises `BadKeyFile`."""
    try:
        pem = f"-----BEGIN {label}-----\n{base64.encodebytes(raw).decode()}-----END {label}-----\n"
        key = load_pem_private_key(pem.encode(), password=None)
        if not isinstance(key, Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
            raise BadKeyFile(
                "ca_key_kind_not_allowed", "the CA key is not of type ed25519, ecdsa or rsa", "use ed25519"
            )
        text = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    except TypeError:
        raise _has_passphrase() from None
    except (ValueError, UnsupportedAlgorithm):
        raise _damaged() from None
    made = bytearray(base64.b64decode(b"".join(text.splitlines()[1:-1])))
    reader = Reader(bytes(made))
    reader.take(len(_MAGIC))
    for _ in range(3):
        reader.string()  # cipher, kdf, its options
    reader.uint32()  # number of keys
    public = reader.string()
    at = len(made) - len(reader.string())  # the private section is the last one; two equal random numbers begin it
    made[at : at + 8] = sha256(public).digest()[:4] * 2
    return _armoured(bytes(made))


def _described(text: str) -> str:
    """What a secret is that holds no private key, in words that contain none of it."""
    first = text.strip(_AROUND).partition("\n")[0]
    label = _LABEL.search(text)
    if first.startswith(("ssh-", "ecdsa-sha2-", "sk-")) or (label and "PUBLIC" in label[1]):
        return "is a public key, not the private one"
    if label:
        return f"is of type {label[1].strip().lower()}, not an OpenSSH private key"
    if first.startswith("PuTTY-User-Key-File"):
        return "is a key of PuTTY; convert it with `puttygen FILE -O private-openssh`"
    if first.startswith("/") and " " not in first:
        return "is a path, not the content of the file"
    if "{{" in text or "${" in text:
        return "is a reference to another secret that was not resolved"
    if "begin openssh private key" in text.lower():
        return "is a key whose letters have lost their case"
    return "is not an OpenSSH private key"


def _several(count: int, what: str) -> BadKeyFile:
    return BadKeyFile("ca_key_several", f"{what} contains {count} private keys", "keep the pinned one and nothing else")


def _too_large() -> BadKeyFile:
    return BadKeyFile("ca_key_too_large", f"the secret is larger than {MAX_KEY_FILE} bytes", _STORE_THE_KEY)


def _damaged(how: str = "is damaged: what its lines hold is not a key") -> BadKeyFile:
    return BadKeyFile("ca_key_not_a_private_key", f"the private key in the secret {how}", _STORE_THE_KEY)


def _has_passphrase() -> BadKeyFile:
    return BadKeyFile("ca_key_has_passphrase", "the CA key has a passphrase", "store the key without one in Infisical")


def load_ca_key(path: Path, owner: str, *pins: str | None) -> CaKey:
    """The checked key in `path`; `owner` is `user:group`, `pins` are the allowed fingerprints (None: any).

    Raises `BadKeyFile`, whose code names the failed check. `path` must be a regular file with one link, that owner,
    mode 0400 or 0600, and 1 byte to 16 KiB, with an OpenSSH private key without passphrase.
    """
    return read_ca_key(open_ca_key(path), owner, *pins)


def open_ca_key(path: Path) -> int:
    """Opens the file without reading it or following a link; raises `BadKeyFile`."""
    with os_errors(cannot_open):
        return open_unread(path)


def read_ca_key(descriptor: int, owner: str, *pins: str | None) -> CaKey:
    """As `load_ca_key`, from an open file, which it closes."""
    try:
        facts = os.fstat(descriptor)
        for _, check in _FILE_CHECKS:
            check(facts, owner)
        data = _read(descriptor)
    finally:
        os.close(descriptor)
    key = CaKey(_parse(data))
    check_pin(key, *pins)
    key.self_test()
    return key


def examine_ca_key(
    path: Path, owner: str, *pins: str | None
) -> tuple[CaKey | None, list[tuple[str, BadKeyFile | None]]]:
    """The key, if it can be read, and each check of `load_ca_key` by name with its error or None.

    Continues after an error, to report all at once; reads only a regular file of valid size.
    """
    try:
        descriptor = open_ca_key(path)
    except BadKeyFile as fault:
        return None, [("open", fault)]
    found: list[tuple[str, BadKeyFile | None]] = [("open", None)]
    key: CaKey | None = None
    try:
        facts = os.fstat(descriptor)
        found += [(name, _fault(check, facts, owner)) for name, check in _FILE_CHECKS]
        if stat.S_ISREG(facts.st_mode) and 0 < facts.st_size <= MAX_KEY_FILE:
            key = CaKey(_parse(_read(descriptor)))
    except BadKeyFile as fault:
        return None, [*found, ("content", fault)]
    finally:
        os.close(descriptor)
    if key is not None:
        found += [("content", None), ("pin", _fault(check_pin, key, *pins)), ("self-test", _fault(key.self_test))]
    return key, found


_P = ParamSpec("_P")


def _fault(check: Callable[_P, None], *values: _P.args, **named: _P.kwargs) -> BadKeyFile | None:
    try:
        check(*values, **named)
    except BadKeyFile as fault:
        return fault
    return None


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, MAX_KEY_FILE + 1)
    except OSError as error:
        raise BadKeyFile("ca_key_unreadable", f"the CA key file cannot be read: {error.strerror}") from None


def check_pin(key: CaKey, *pins: str | None) -> None:
    """Raises `BadKeyFile` unless the key is one of `pins`; without pins, accepts any key."""
    named = [pin for pin in pins if pin is not None]
    if named and key.fingerprint not in named:
        raise BadKeyFile(
            "ca_key_fingerprint_differs",
            f"the CA key is {key.fingerprint}, policy.toml pins {' and, as next, '.join(named)}",
            "render the pinned key, or change ca.fingerprint in policy.toml",
        )


def cannot_open(error: OSError) -> BadKeyFile:
    """The `BadKeyFile` for an `OSError` at the opening of the key file."""
    if error.errno == errno.ELOOP:
        return BadKeyFile("ca_key_is_a_link", "the CA key file is a symbolic link", "name the file itself")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return BadKeyFile("ca_key_missing", "there is no CA key file at SIGNER_CA_KEY_FILE", "render the key first")
    return BadKeyFile(
        "ca_key_unreadable",
        f"the CA key file cannot be opened: {error.strerror}",
        "start as root, or as the user that owns the file",
    )


def _check_regular(facts: os.stat_result, _owner: str) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise BadKeyFile("ca_key_not_a_regular_file", "the CA key file is not a regular file", "render it to a file")


def _check_links(facts: os.stat_result, _owner: str) -> None:
    if facts.st_nlink == 0:
        raise BadKeyFile(
            "ca_key_replaced",
            "the CA key file was replaced or removed after it was opened",
            "send SIGHUP or start again",
        )
    if facts.st_nlink != 1:
        raise BadKeyFile("ca_key_has_links", f"the CA key file has {facts.st_nlink} hard links", "render it again")


def _check_owner(facts: os.stat_result, owner: str) -> None:
    if (facts.st_uid, facts.st_gid) != _owner_ids(owner):
        raise BadKeyFile(
            f"ca_key_owner_must_be_{owner}",
            f"the CA key file is owned by {facts.st_uid}:{facts.st_gid}",
            f"chown {owner} the file, or fix the render job",
        )


def _check_mode(facts: os.stat_result, _owner: str) -> None:
    mode = stat.S_IMODE(facts.st_mode)
    if mode not in (0o400, 0o600):
        raise BadKeyFile(
            "ca_key_mode_must_be_0400_or_0600",
            f"the CA key file has mode {mode:04o}",
            "chmod 0400 the file, or fix the mode in the render job",
        )


def _check_size(facts: os.stat_result, _owner: str) -> None:
    if facts.st_size == 0:
        raise BadKeyFile("ca_key_empty", "the CA key file is empty", "render the key again")
    if facts.st_size > MAX_KEY_FILE:
        raise BadKeyFile(
            "ca_key_too_large",
            f"the CA key file has {facts.st_size} bytes, above the limit of {MAX_KEY_FILE}",
            "render one OpenSSH private key and nothing else",
        )


_FILE_CHECKS: Final = (
    ("regular file", _check_regular),
    ("one link", _check_links),
    ("owner", _check_owner),
    ("mode", _check_mode),
    ("size", _check_size),
)


def _owner_ids(owner: str) -> tuple[int, int]:
    """Converts `user:group` (names or numbers) to ids; raises `BadKeyFile` for an unknown name."""
    user, _, group = owner.partition(":")
    try:
        uid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
        gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise BadKeyFile(
            "ca_key_owner_unknown",
            f"SIGNER_CA_KEY_OWNER {owner!a} is not a user:group of this host",
            "set it to root:root, or omit it",
        ) from None
    return uid, gid


def _check_form(data: bytes) -> None:
    """Raises `BadKeyFile` unless ssh-keygen reads the file, and reads all of it: the preflight has the same rule."""
    begin, end = (line.encode() for line in _ARMOUR)
    found = _FIRST_LINE.findall(data)
    if len(found) > 1:
        raise _several(len(found), "the CA key file")
    if found != [begin]:
        raise _not_a_key()
    *lines, rest = data.split(b"\n")
    if b"\r" in data:
        raise _malformed("has line ends of Windows (CRLF)")
    if rest:
        raise _malformed("has no newline at its end")
    if (lines[0], lines[-1]) != (begin, end) or not all(
        _BASE64.fullmatch(line.decode("latin-1")) for line in lines[1:-1]
    ):
        raise _malformed("has other text before, in or after the key")


def _malformed(how: str) -> BadKeyFile:
    return BadKeyFile("ca_key_malformed", f"the CA key file {how}", _RENDER_AGAIN)


def _not_a_key() -> BadKeyFile:
    return BadKeyFile(
        "ca_key_not_a_private_key",
        "the CA key file does not contain an OpenSSH private key",
        f"it must start with {_ARMOUR[0]}",
    )


def _parse(data: bytes) -> _PrivateKey:
    _check_form(data)  # `cryptography` also accepts other text around and inside a key
    try:
        key = load_ssh_private_key(data, password=None)
    except TypeError:
        raise _has_passphrase() from None
    except (ValueError, UnsupportedAlgorithm, NotImplementedError):  # the last for a compressed ECDSA point
        raise _not_a_key() from None
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size < MIN_RSA_BITS:
        raise BadKeyFile(
            "ca_key_rsa_too_short",
            f"the RSA CA key has {key.key_size} bits, below the minimum of {MIN_RSA_BITS}",
            "use ed25519",
        )
    if not isinstance(key, Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise BadKeyFile("ca_key_kind_not_allowed", "the CA key is not of type ed25519, ecdsa or rsa", "use ed25519")
    return key


# --- the keeper's own keys --------------------------------------------------------------------------------------------


class ServiceKey(_Secret):
    """An Ed25519 key that the keeper makes for one purpose, such as `ledger.key` for checkpoints.

    `line` is its public half for an `authorized_keys` file, `raw_public` the same as 32 bytes, `fingerprint` its
    `SHA256:…`; `is_new` is true for the call that made the file.
    """

    __slots__ = ("_key", "fingerprint", "is_new", "line", "raw_public")

    def __init__(self, key: Ed25519PrivateKey, comment: str, *, is_new: bool) -> None:
        public = key.public_key()
        line = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        self._key = key
        self.is_new = is_new
        self.line = f"{line} {comment}"
        self.raw_public = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.fingerprint = fingerprint_of(string(b"ssh-ed25519") + string(self.raw_public))  # RFC 8709 section 4

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

    def sign(self, message: bytes) -> bytes:
        """The 64 bytes of an Ed25519 signature over `message` (RFC 8032 section 5.1)."""
        return self._key.sign(message)


def _make_service_key(path: Path) -> bool:
    """Writes a new key to `path`; False if another process was faster. Raises `OSError`."""
    material = KeyMaterial.generate("ed25519")
    folder = open_directory(path.parent)
    try:
        unnamed = create_unnamed(folder, 0o600)
        try:
            material.write(unnamed)
            name_unnamed(folder, unnamed, path.name)
        finally:
            os.close(unnamed)
    except FileExistsError:
        return False
    finally:
        os.close(folder)
    return True


def _read_service_key(path: Path, place: str) -> Ed25519PrivateKey:
    """The checked key in `path`; raises `BadKeyFile`."""
    try:
        descriptor = open_unread(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_a_service_key_file(path, place) from None
        raise _service_key_unreadable(path, error) from None
    try:
        _check_service_key_file(path, place, os.fstat(descriptor))
        data = os.read(descriptor, MAX_KEY_FILE + 1)
    except OSError as error:
        raise _service_key_unreadable(path, error) from None
    finally:
        os.close(descriptor)
    try:
        key = _parse(data)
        if isinstance(key, Ed25519PrivateKey):
            key.public_key().verify(key.sign(_SELF_TEST), _SELF_TEST)
    except (BadKeyFile, InvalidSignature):  # the sentences of `BadKeyFile` are about the CA key
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise BadKeyFile(
            "service_key_malformed",
            f"{path.name} does not contain one Ed25519 key in OpenSSH's form without a passphrase",
            "restore the file from a backup; to start with a new key, delete it, and give the new public key to all "
            "who check signatures by the old one",
        )
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


def _service_key_unreadable(path: Path, error: OSError) -> BadKeyFile:
    return BadKeyFile(
        "service_key_unreadable", f"{path.name} cannot be read: {error.strerror}", f"make user {os.geteuid()} its owner"
    )
