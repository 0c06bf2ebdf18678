"""The fingerprint of a public key. Apart from `publickey.py`, whose `sshpubkeys` some processes do without."""

from __future__ import annotations

import binascii
from hashlib import sha256


def fingerprint_of(blob: bytes) -> str:
    """`SHA256:` and the unpadded base64 of the blob's SHA-256, as `ssh-keygen -l` prints it."""
    return "SHA256:" + binascii.b2a_base64(sha256(blob).digest(), newline=False).decode().rstrip("=")
