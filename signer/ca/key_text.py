"""The text of an OpenSSH private key (PROTOCOL.key): its form is checked before a key is parsed from it.

No key is parsed here: `ca/key.py`, which also checks owner, mode and links of the file, and `ca/service_key.py` do. The
errors are about the CA key.
"""

from __future__ import annotations

import binascii
import os
import re
from typing import Final

from signer.errors import BadKeyFile

MAX_KEY_FILE: Final = 16 * 1024  # bytes
OPENSSH: Final = "OPENSSH PRIVATE KEY"
ARMOUR: Final = (f"-----BEGIN {OPENSSH}-----", f"-----END {OPENSSH}-----")  # PROTOCOL.key
MAGIC: Final = b"openssh-key-v1\0"  # PROTOCOL.key section 1
BASE64: Final = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_LINE: Final = 70  # characters of base64 in a line, as ssh-keygen writes them
_FIRST_LINE: Final = re.compile(rb"^-----BEGIN (?:[A-Z0-9]{1,12} )?PRIVATE KEY-----", re.MULTILINE)
_RENDER_AGAIN: Final = "render it again with `signer ca render`, or write it with ssh-keygen"


def check_form(data: bytes) -> None:
    """Raises `BadKeyFile` unless ssh-keygen reads the file, and reads all of it: the preflight has the same rule."""
    begin, end = (line.encode() for line in ARMOUR)
    found = _FIRST_LINE.findall(data)
    if len(found) > 1:
        raise several_keys(len(found), "the CA key file")
    if found != [begin]:
        raise not_a_key()
    *lines, rest = data.split(b"\n")
    if b"\r" in data:
        raise _malformed("has line ends of Windows (CRLF)")
    if rest:
        raise _malformed("has no newline at its end")
    if (lines[0], lines[-1]) != (begin, end) or not all(
        BASE64.fullmatch(line.decode("latin-1")) for line in lines[1:-1]
    ):
        raise _malformed("has other text before, in or after the key")


def read_armour(data: bytes) -> bytes:
    """What the lines of base64 of a file hold; raises `BadKeyFile` unless the file has the form of one key."""
    check_form(data)
    try:
        return binascii.a2b_base64(b"".join(data.splitlines()[1:-1]))
    except binascii.Error:
        raise not_a_key() from None


def armoured(raw: bytes) -> bytes:
    """A file as ssh-keygen writes it (PROTOCOL.key)."""
    body = binascii.b2a_base64(raw, newline=False).decode()
    lines = [body[at : at + _LINE] for at in range(0, len(body), _LINE)]
    return "".join(f"{line}\n" for line in (ARMOUR[0], *lines, ARMOUR[1])).encode()


def write_key(descriptor: int, data: bytes) -> None:
    """Writes the whole file and brings it to the disk; raises `OSError`."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)


def several_keys(count: int, what: str) -> BadKeyFile:
    """The error about a text with more than one private key."""
    return BadKeyFile("ca_key_several", f"{what} contains {count} private keys", "keep the pinned one and nothing else")


def not_a_key() -> BadKeyFile:
    """The error about a file that is not an OpenSSH private key."""
    return BadKeyFile(
        "ca_key_not_a_private_key",
        "the CA key file does not contain an OpenSSH private key",
        f"it must start with {ARMOUR[0]}",
    )


def _malformed(how: str) -> BadKeyFile:
    return BadKeyFile("ca_key_malformed", f"the CA key file {how}", _RENDER_AGAIN)
