"""Sample sign requests for the comparison of Vault and the local CA, with throwaway public keys.

The keys are random and have no private half, so a certificate for them opens nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from signer.model import Role
from signer.ssh.publickey import render_public_key
from signer.ssh.wire import string
from signer.units import render_duration

REASON: Final = "parity with Vault, for a key without a private half"
SHORT: Final = 60  # seconds
USUAL_KIND: Final = "ssh-ed25519"  # of the keys that safe-session makes
_EXPONENT: Final = b"\x01\x00\x01"
_SOURCE: Final = "192.0.2.0/24"  # RFC 5737: reserved for documentation
_CURVES: Final[Mapping[str, ec.EllipticCurve]] = {
    "nistp256": ec.SECP256R1(),
    "nistp384": ec.SECP384R1(),
    "nistp521": ec.SECP521R1(),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. `asked` is the native body without the key; `is_plain` if it sets no field."""

    name: str
    key_type: str
    asked: Mapping[str, Any]
    is_plain: bool

    def native(self, public_line: str) -> dict[str, Any]:
        return {"public_key": public_line, **self.asked}

    def vaults(self, public_line: str) -> dict[str, Any]:
        """The body for Vault's API, which has no field for a reason."""
        body: dict[str, Any] = {"public_key": public_line, "cert_type": "user"}
        for name, value in self.asked.items():
            if name == "principals":
                body["valid_principals"] = ",".join(value)
            elif name == "extensions":
                body["extensions"] = dict.fromkeys(value, "")
            elif name != "reason":
                body[name] = value
        return body


def make_samples(role: Role, count: int) -> Iterator[Sample]:
    """`count` requests that the role grants: key types and request shapes in rotation; the plain one of `USUAL_KIND`
    is the first.

    `{identity}` is left out, as the identity is unknown here; a role without other principals has no samples.
    """
    kinds = sorted(role.key_types, key=lambda kind: (kind != USUAL_KIND, kind))
    shapes = list(_shapes(role))
    if not shapes:
        return
    said = {"reason": REASON} if role.reason_required else {}
    for number in range(count):
        # The offset keeps equal numbers of kinds and shapes from always pairing the same two.
        name, asked = shapes[number % len(shapes)]
        kind = kinds[(number + number // max(len(kinds), len(shapes))) % len(kinds)]
        yield Sample(name, kind, {**asked, **said}, is_plain=not asked)


def _shapes(role: Role) -> Iterator[tuple[str, dict[str, Any]]]:
    names = sorted(name for name in role.principals if "{" not in name)
    if not (names or role.default_principals):
        return
    base: dict[str, Any] = {} if role.default_principals else {"principals": names[:1]}
    defaults = sorted(role.default_extensions)
    yield "plain" if not base else "one principal", base
    yield "longest ttl", {**base, "ttl": render_duration(role.max_ttl)}
    yield "short ttl", {**base, "ttl": render_duration(min(SHORT, role.max_ttl))}
    for name in names[:16]:
        yield f"principal {name}", {**base, "principals": [name]}
    if len(names) > 1:
        yield "all principals", {**base, "principals": names[:256]}
    if role.allowed_extensions:
        yield "all extensions", {**base, "extensions": sorted({*role.allowed_extensions, *defaults})}
    for name in sorted(role.allowed_extensions):
        yield f"extension {name}", {**base, "extensions": [name]}
    if "source-address" in role.allowed_critical_options:
        yield "source address", {**base, "critical_options": {"source-address": _SOURCE}}
    if role.allow_key_id:
        yield "key id", {**base, "key_id": "parity"}
    if names:
        whole = {"principals": names[:256], "ttl": render_duration(min(SHORT, role.max_ttl))}
        yield "everything", whole | ({"extensions": sorted(role.allowed_extensions)} if role.allowed_extensions else {})


def throwaway_key(kind: str, rsa_bits: int = 3072) -> str:
    """A public key line of that kind, from random bytes instead of a private key."""
    name = kind.removeprefix("sk-").removesuffix("@openssh.com")
    parts = [kind.encode()]
    if name == "ssh-rsa":
        modulus = bytearray(os.urandom(rsa_bits // 8))
        modulus[0] |= 0x80  # exactly rsa_bits
        modulus[-1] |= 1
        parts += [_EXPONENT, b"\0" + modulus]
    elif name == "ssh-ed25519":
        parts.append(os.urandom(32))
    else:
        curve = name.removeprefix("ecdsa-sha2-")
        parts += [curve.encode(), _random_point(_CURVES[curve])]
    if kind.startswith("sk-"):
        parts.append(b"ssh:")
    return render_public_key(kind, b"".join(map(string, parts)))


def _random_point(curve: ec.EllipticCurve) -> bytes:
    size = (curve.key_size + 7) // 8
    while True:  # half of all numbers are the x coordinate of a point
        x = (int.from_bytes(os.urandom(size)) >> (size * 8 - curve.key_size)).to_bytes(size)
        try:
            key = ec.EllipticCurvePublicKey.from_encoded_point(curve, b"\x02" + x)
        except ValueError:
            continue
        return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
