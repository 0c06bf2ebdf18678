"""Keys of every kind for tests, made by `ssh-keygen` into a temporary folder and nowhere else.

FIDO keys (`sk-…`) cannot be made without hardware; their public halves are put together here, from the bytes of an
ordinary key of the same curve, by the layout of OpenSSH's PROTOCOL.u2f. This file shares no code with signer/ssh,
as it makes what signer/ssh is tested with.
"""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Our name for the kind → ssh-keygen's type and size.
_MADE = {
    "ed25519": ("ed25519", ""),
    "ecdsa256": ("ecdsa", "256"),
    "ecdsa384": ("ecdsa", "384"),
    "ecdsa521": ("ecdsa", "521"),
    "rsa2048": ("rsa", "2048"),
    "rsa3072": ("rsa", "3072"),
    "rsa4096": ("rsa", "4096"),
}
_BUILT = {
    "sk-ed25519": ("ed25519", "sk-ssh-ed25519@openssh.com"),
    "sk-ecdsa256": ("ecdsa256", "sk-ecdsa-sha2-nistp256@openssh.com"),
}

KINDS = tuple(_MADE)  # private and public half
SK_KINDS = tuple(_BUILT)  # public half only
CA_KINDS = tuple(kind for kind in KINDS if kind != "rsa2048")


@dataclass(frozen=True)
class Key:
    """A key pair on disk; `private` does not exist for an `sk-…` kind."""

    kind: str
    private: Path
    public: Path

    @property
    def public_line(self) -> str:
        """As in a .pub file, without the line end."""
        return self.public.read_text().strip()

    @property
    def blob(self) -> bytes:
        return base64.b64decode(self.public_line.split()[1])

    @property
    def fingerprint(self) -> str:
        """`SHA256:…`, as ssh-keygen tells it."""
        return ssh_keygen("-l", "-E", "sha256", "-f", self.public).split()[1]


def ssh_keygen(*arguments: str | Path) -> str:
    """What `ssh-keygen` says; raises with its complaint if it fails. Times are UTC."""
    done = subprocess.run(
        ["ssh-keygen", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=_environment(),
    )
    if done.returncode != 0:
        raise RuntimeError(f"ssh-keygen {arguments!r}: {done.stdout}{done.stderr}")
    return done.stdout


def _environment() -> dict[str, str]:
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "TZ": "UTC", "LC_ALL": "C.UTF-8"}


def make_key(folder: Path, kind: str, name: str = "", *, comment: str = "", passphrase: str = "") -> Key:
    """A new key of `kind` in `folder`, under `name` (the kind by default)."""
    path = folder / (name or kind)
    public = path.with_name(path.name + ".pub")
    if kind in _BUILT:
        public.write_text(f"{_sk_public_line(folder, kind)} {comment}".strip() + "\n")
        return Key(kind, path, public)
    key_type, bits = _MADE[kind]
    size = ["-b", bits] if bits else []
    ssh_keygen("-q", "-t", key_type, *size, "-N", passphrase, "-C", comment, "-f", path)
    return Key(kind, path, public)


def _sk_public_line(folder: Path, kind: str, application: str = "ssh:") -> str:
    curve, name = _BUILT[kind]
    donor = make_key(folder, curve, f"donor-of-{kind}")
    fields = _strings(donor.blob)[1:]
    donor.private.unlink()
    donor.public.unlink()
    blob = b"".join(_string(part) for part in (name.encode(), *fields, application.encode()))
    return f"{name} {base64.b64encode(blob).decode()}"


def _string(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _strings(blob: bytes) -> list[bytes]:
    found = []
    while blob:
        end = 4 + int.from_bytes(blob[:4], "big")
        found.append(blob[4:end])
        blob = blob[end:]
    return found


def sign_with_ssh_keygen(
    ca: Key,
    user: Key,
    *,
    principals: Sequence[str] = ("llmops",),
    validity: str = "-1m:+5m",
    serial: int = 1,
    key_id: str = "test",
    options: Sequence[str] = (),
    name: str = "",
) -> Path:
    """A user certificate made by `ssh-keygen -s`, the oracle; lies beside the user's key as `<name>-cert.pub`.

    `validity` and `options` are as for `-V` and `-O`. With a `name` the public key is copied under it first, so that
    one key can have several certificates.
    """
    public = user.public
    if name:
        public = user.public.with_name(f"{name}.pub")
        public.write_text(user.public.read_text())
    flags = [flag for option in options for flag in ("-O", option)]
    who = ["-n", ",".join(principals)] if principals else []
    ssh_keygen("-q", "-s", ca.private, "-I", key_id, *who, "-V", validity, "-z", str(serial), *flags, public)
    return public.with_name(public.name.removesuffix(".pub") + "-cert.pub")


@dataclass
class KeyRing:
    """Makes each key once for each test session: RSA takes its time. `ring("rsa4096")`, `ring("ed25519", "ca")`."""

    folder: Path
    _made: dict[tuple[str, str], Key] = field(default_factory=dict)

    def __call__(self, kind: str, name: str = "user") -> Key:
        if (kind, name) not in self._made:
            self._made[kind, name] = make_key(self.folder, kind, f"{kind}-{name}", comment=f"{name}@test")
        return self._made[kind, name]
