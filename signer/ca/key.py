"""The CA's private key: loaded, made and repaired, for the keeper and for `signer ca`. With `service_key.py` the only
module that handles the bytes of private keys.

`load_ca_key` opens the file once and checks the open descriptor. The result signs and has public properties; the
private key cannot be read from it.
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
from typing import Final, NoReturn, ParamSpec

from cryptography.exceptions import UnsupportedAlgorithm
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

from signer.ca.key_text import (
    ARMOUR,
    BASE64,
    MAGIC,
    MAX_KEY_FILE,
    OPENSSH,
    armoured,
    check_form,
    not_a_key,
    several_keys,
    write_key,
)
from signer.errors import BadFormat, BadKeyFile
from signer.files import held, open_unread
from signer.model import PublicKey
from signer.ssh.fingerprint import fingerprint_of
from signer.ssh.publickey import check_ca_kind, parse_public_key, render_public_key
from signer.ssh.signature import check_signature
from signer.ssh.wire import Reader, mpint, string

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
_STORE_THE_KEY: Final = "store the whole file of the CA key, with its line breaks, and nothing else"
# How stores and shells write a line break in one line: \n (also escaped twice), <br>, &#10;, %0A.
_BREAKS: Final = re.compile(r"\\{1,4}r\\{1,4}n|\\{1,4}[nr]|<br ?/?>|&#(?:10|13|x[aAdD]);|%0[aAdD]")
_UNSEEN: Final = dict.fromkeys([0, 0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF]) | dict.fromkeys([0xA0, 0x202F], " ")
_AROUND: Final = " \t\n\"'`,;:\\-\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # dashes, also those of word processors
_BEGIN: Final = re.compile(r"BEGIN ((?:[A-Z0-9]{1,12} )?PRIVATE KEY)")
_LABEL: Final = re.compile(r"BEGIN ([A-Z0-9 ]{1,40})-")


class CaKey:
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

    def __reduce__(self) -> NoReturn:
        raise TypeError("a CA key is never serialised")

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
        try:
            check_signature(self.blob, _SELF_TEST, self.sign(_SELF_TEST))
        except BadFormat:
            raise BadKeyFile(
                "ca_key_self_test_failed", "the CA key cannot verify its own signature", "render it again"
            ) from None


class KeyMaterial:
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

    def __reduce__(self) -> NoReturn:
        raise TypeError("a CA key is never serialised")

    def write(self, descriptor: int) -> None:
        """Writes the whole file and brings it to the disk; raises `OSError`."""
        write_key(descriptor, self._data)

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
        raise several_keys(len(begins), "the secret")
    if not begins:
        body = "".join(text.split()).strip(_AROUND)
        if (bare := _decoded(body.partition("-----")[0])).startswith(MAGIC):
            return armoured(bare)  # its first line was lost
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
    return armoured(raw) if label == OPENSSH else _converted(label, raw)


def _is_file_of_one_key(lines: list[str]) -> bool:
    return (lines[0], lines[-1]) == ARMOUR and all(BASE64.fullmatch(line) for line in lines[1:-1])


def _decoded(text: str) -> bytes:
    """The bytes of a base64 text, with or without its padding; empty if it is none."""
    bare = text.rstrip("=")
    if BASE64.fullmatch(bare) is None or len(bare) % 4 == 1:
        return b""
    return base64.b64decode(bare + "=" * (-len(bare) % 4))


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
    reader.take(len(MAGIC))
    for _ in range(3):
        reader.string()  # cipher, kdf, its options
    reader.uint32()  # number of keys
    public = reader.string()
    at = len(made) - len(reader.string())  # the private section is the last one; two equal random numbers begin it
    made[at : at + 8] = sha256(public).digest()[:4] * 2
    return armoured(bytes(made))


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
    try:
        return open_unread(path)
    except OSError as error:
        raise cannot_open(error) from None


def read_ca_key(descriptor: int, owner: str, *pins: str | None) -> CaKey:
    """As `load_ca_key`, from an open file, which it closes."""
    with held(descriptor):
        facts = os.fstat(descriptor)
        for _, check in _FILE_CHECKS:
            check(facts, owner)
        data = _read(descriptor)
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


def _parse(data: bytes) -> _PrivateKey:
    check_form(data)  # `cryptography` also accepts other text around and inside a key
    try:
        key = load_ssh_private_key(data, password=None)
    except TypeError:
        raise _has_passphrase() from None
    except (ValueError, UnsupportedAlgorithm, NotImplementedError):  # the last for a compressed ECDSA point
        raise not_a_key() from None
    if isinstance(key, rsa.RSAPrivateKey):
        check_ca_kind("ssh-rsa", key.key_size)
    if not isinstance(key, Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise BadKeyFile("ca_key_kind_not_allowed", "the CA key is not of type ed25519, ecdsa or rsa", "use ed25519")
    return key
