"""FIDO keys without hardware; `FidoAgent` of agents.py holds them, and `ssh-keygen -Y sign` signs through it.

By OpenSSH's PROTOCOL.u2f; shares no code with signer/ssh, which is tested with it. A key signs with the flags that a
test sets: touched or not, verified or not.
"""

from __future__ import annotations

import base64
import re
import subprocess
from hashlib import sha256, sha512
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.parts.keys import Key

SK_ED25519 = "sk-ssh-ed25519@openssh.com"
SK_ECDSA = "sk-ecdsa-sha2-nistp256@openssh.com"
PRESENT = 0x01
VERIFIED = 0x04


class FidoKey:
    """A security key. `flags` and `counter` are those of its next signature."""

    def __init__(self, kind: str = SK_ED25519, name: str = "anna", application: str = "ssh:") -> None:
        seed = sha256(f"{kind} {name}".encode()).digest()
        self.kind, self.application = kind, application.encode()
        self.flags, self.counter = PRESENT, 7
        self._ed25519 = Ed25519PrivateKey.from_private_bytes(seed) if kind == SK_ED25519 else None
        self._ecdsa = ec.derive_private_key(int.from_bytes(seed, "big") >> 1, ec.SECP256R1())
        if self._ed25519:
            fields = [self._ed25519.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)]
        else:
            public = self._ecdsa.public_key()
            fields = [b"nistp256", public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)]
        self.blob = b"".join(map(_string, (kind.encode(), *fields, self.application)))
        self.line = f"{kind} {base64.b64encode(self.blob).decode()}"
        self.fingerprint = "SHA256:" + base64.b64encode(sha256(self.blob).digest()).decode().rstrip("=")

    def sign(self, data: bytes) -> bytes:
        """The signature blob that an ssh-agent returns."""
        tail = bytes([self.flags]) + self.counter.to_bytes(4, "big")
        signed = sha256(self.application).digest() + tail + sha256(data).digest()
        if self._ed25519:
            raw = self._ed25519.sign(signed)
        else:
            raw = b"".join(map(_mpint, decode_dss_signature(self._ecdsa.sign(signed, ec.ECDSA(SHA256())))))
        return _string(self.kind.encode()) + _string(raw) + tail


def fill_fido_keys(policy: str) -> str:
    """A policy text with each `{fido:NAME}` as the public line of `FidoKey(name=NAME)`."""
    return re.sub(r"\{fido:([^}]+)\}", lambda found: FidoKey(name=found[1]).line, policy)


def sign_by_hand(key: FidoKey, message: bytes, namespace: str = "approval.v1@signer") -> str:
    """What `ssh-keygen -Y sign` prints for a key, without a process (PROTOCOL.sshsig)."""
    hashed = b"".join(map(_string, (namespace.encode(), b"", b"sha512", sha512(message).digest())))
    fields = (key.blob, namespace.encode(), b"", b"sha512", key.sign(b"SSHSIG" + hashed))
    text = base64.b64encode(b"SSHSIG\0\0\0\1" + b"".join(map(_string, fields))).decode()
    lines = [text[at : at + 70] for at in range(0, len(text), 70)]
    return "\n".join(("-----BEGIN SSH SIGNATURE-----", *lines, "-----END SSH SIGNATURE-----", ""))


def sign_through_agent(socket: Path, key: FidoKey, message: bytes, namespace: str, folder: Path) -> str:
    """What `ssh-keygen -Y sign` prints for a key of the agent at `socket`."""
    public = folder / f"{key.kind.partition('@')[0]}.pub"
    public.write_text(key.line + "\n")
    return _ssh_keygen_sign(public, message, namespace, ("-U",), {"SSH_AUTH_SOCK": str(socket)})


def sign_with_file(key: Key, message: bytes, namespace: str, *options: str) -> str:
    """What `ssh-keygen -Y sign` prints for a private key in a file; `options` such as `-O hashalg=sha256`."""
    return _ssh_keygen_sign(key.private, message, namespace, options, {})


def _ssh_keygen_sign(
    key: Path, message: bytes, namespace: str, options: tuple[str, ...], environ: dict[str, str]
) -> str:
    done = subprocess.run(
        ["ssh-keygen", "-Y", "sign", *options, "-n", namespace, "-f", str(key)],
        input=message,
        capture_output=True,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C.UTF-8", **environ},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def _string(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _mpint(number: int) -> bytes:
    return _string(number.to_bytes(number.bit_length() // 8 + 1, "big"))
