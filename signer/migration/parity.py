"""Comparison of the local CA with Vault: each role, then the certificates of real requests to both.

`signer/vault/parity.py` defines the differences and which of them prevent a cutover. The caller chooses the local
signer: the running service or a trial. The keys of the requests are random and have no private half, so a certificate
for them opens nothing.
"""

from __future__ import annotations

import binascii
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Protocol

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from signer.errors import BadFormat, NotAuthenticated, NotFound, SignerError, Unavailable
from signer.model import Role
from signer.policy.decide import Policy
from signer.ssh.certificate import CertificateFields, decode_certificate
from signer.ssh.publickey import parse_public_key, render_public_key
from signer.ssh.wire import string
from signer.units import render_duration
from signer.vault.parity import Difference, compare_certificates, compare_roles, errors_in
from signer.vault.role import MountTtls, read_vault_role

SAMPLES: Final = 20
_BY_USAGE: Final = ("rate_limited", "too_many_live")
SignLocally = Callable[[str, dict[str, Any]], str]


class VaultSide(Protocol):
    """The part of `VaultAdmin` that the comparison uses."""

    def role(self, mount: str, name: str) -> dict[str, Any]: ...
    def mount_ttls(self, mount: str) -> MountTtls | None: ...
    def sign(self, mount: str, role: str, fields: Mapping[str, object]) -> str: ...


@dataclass(frozen=True, slots=True)
class SampleResult:
    """One request to both: `outcome` is `granted` or `refused` by both, or names the only side that granted it."""

    sample: Sample
    fingerprint: str
    outcome: str
    serials: tuple[str, ...]
    differences: tuple[Difference, ...]

    def as_json(self) -> dict[str, object]:
        facts = asdict(self)
        asked = facts.pop("sample")
        return {"name": asked["name"], "key_type": asked["key_type"], "asked": asked["asked"], **facts}


@dataclass(frozen=True, slots=True)
class RoleParity:
    """One role: its differences and its samples; `left_out` is the reason for missing samples."""

    role: str
    principals: str
    differences: tuple[Difference, ...]
    samples: tuple[SampleResult, ...] = ()
    left_out: str = ""

    @property
    def all_differences(self) -> list[Difference]:
        return [*self.differences, *(found for sample in self.samples for found in sample.differences)]

    @property
    def is_parity(self) -> bool:
        return not errors_in(self.all_differences)

    def as_json(self) -> dict[str, object]:
        samples = [sample.as_json() for sample in self.samples]
        return {**asdict(self), "parity": self.is_parity, "samples": samples}


@dataclass(frozen=True, slots=True)
class ParityReport:
    """All roles. Without a difference of severity error the local CA may replace Vault."""

    roles: tuple[RoleParity, ...]

    @property
    def is_parity(self) -> bool:
        return bool(self.roles) and all(role.is_parity for role in self.roles)

    @property
    def errors(self) -> list[Difference]:
        return [found for role in self.roles for found in errors_in(role.all_differences)]

    @property
    def sample_count(self) -> int:
        return sum(len(role.samples) for role in self.roles)

    @property
    def summary(self) -> str:
        """One line, such as `llmops -> llmops, none added; 20 samples, 0 errors`."""
        principals = "; ".join(role.principals for role in self.roles)
        return f"{principals}; {self.sample_count} samples, {len(self.errors)} errors"

    def as_json(self) -> dict[str, object]:
        return {
            "parity": self.is_parity,
            "summary": self.summary,
            "errors": len(self.errors),
            "samples": self.sample_count,
            "roles": [role.as_json() for role in self.roles],
        }


def check_parity(
    policy: Policy,
    vault: VaultSide,
    mount: str,
    sign_locally: SignLocally,
    roles: Sequence[str],
    samples: int = SAMPLES,
) -> ParityReport:
    """Compares each role, then about `samples` certificates in total, at least one of each role.

    `sign_locally(role, native body)` returns a certificate line or raises the `SignerError` of the refusal. Raises
    `Unavailable`, `NotAuthenticated` or `NotFound` if either side cannot be queried.
    """
    ttls = vault.mount_ttls(mount)
    each = max(1, -(-samples // max(1, len(roles))))
    found = []
    for name in roles:
        role = policy.roles.get(name)
        if role is None:
            why = "current users of the role would lose access: import it, or leave it out of the cutover"
            missing = Difference("role", "none", name, "error", why)
            found.append(RoleParity(name, f"{name} -> no such role", (missing,)))
            continue
        theirs = vault.role(mount, name)
        results, left_out = _compare_samples(role, theirs, vault, mount, sign_locally, each)
        differing = tuple(compare_roles(theirs, role, ttls))
        found.append(RoleParity(name, _principals(role, theirs), differing, tuple(results), left_out))
    return ParityReport(tuple(found))


def _principals(role: Role, theirs: Mapping[str, object]) -> str:
    vaults = read_vault_role(theirs)
    old, new = vaults.default_users, tuple(sorted(set(role.default_principals)))
    added = sorted({*role.principals} - {*vaults.users}) if not vaults.any_user else []
    added = sorted({*added, *new} - {*old} if not vaults.any_user else {*new} - {*old})
    return f"{', '.join(old) or 'none'} -> {', '.join(new) or 'none'}, {', '.join(added) or 'none'} added"


def _rsa_bits(role: Role, theirs: Mapping[str, object]) -> int:
    """A size that both accept, if there is one; Vault's sizes are exact."""
    sizes = read_vault_role(theirs).keys().rsa_sizes or ()
    return min((size for size in sizes if size >= role.rsa_min_bits and size % 8 == 0), default=role.rsa_min_bits)


def _compare_samples(
    role: Role, theirs: Mapping[str, object], vault: VaultSide, mount: str, sign_locally: SignLocally, count: int
) -> tuple[list[SampleResult], str]:
    """The results, and the reason if there are fewer than `count`."""
    bits = _rsa_bits(role, theirs)
    limits = [limit for limit in (role.limits.per_minute, role.limits.live) if limit is not None]
    bound = min([count, *limits])
    left_out = f"{count - bound} of {count} left out: the role's limits allow {bound}" if bound < count else ""
    results = []
    for sample in make_samples(role, bound):
        line = throwaway_key(sample.key_type, bits)
        vaults = _ask(vault.sign, mount, role.name, sample.vaults(line))
        ours = _ask(sign_locally, role.name, sample.native(line))
        results.append(_compare_sample(role, sample, line, ours, vaults))
        if isinstance(ours, SignerError) and ours.code in _BY_USAGE:
            left_out = f"{count - len(results)} of {count} left out: {ours.code}, its limit is used up"
            break
    if not results:
        left_out = "all left out: the role has no principal but {identity}"
    return results, left_out


def _compare_sample(
    role: Role,
    sample: Sample,
    line: str,
    ours: CertificateFields | SignerError,
    vaults: CertificateFields | SignerError,
) -> SampleResult:
    if isinstance(ours, SignerError) or isinstance(vaults, SignerError):
        differences = _refusals(sample, ours, vaults)
    else:
        differences = _merged(compare_certificates(ours, vaults), role, sample, ours, vaults)
    made = tuple(str(fields.serial) for fields in (ours, vaults) if isinstance(fields, CertificateFields))
    fingerprint = parse_public_key(line).fingerprint
    return SampleResult(sample, fingerprint, _outcome(ours, vaults), made, tuple(differences))


def _ask(sign: Callable[..., str], *request: object) -> CertificateFields | SignerError:
    """The certificate or the refusal; raises any other error."""
    try:
        line = sign(*request)
    except (Unavailable, NotAuthenticated, NotFound, BadFormat):
        raise
    except SignerError as refusal:
        return refusal
    try:
        return decode_certificate(binascii.a2b_base64(line.split()[1].encode(), strict_mode=True))[0]
    except (BadFormat, ValueError, IndexError):
        raise Unavailable(
            "certificate_not_understood", "the answer is not a certificate", "check signer.address and vault.address"
        ) from None


def _refusals(
    sample: Sample, ours: CertificateFields | SignerError, vaults: CertificateFields | SignerError
) -> list[Difference]:
    mine = f"refused: {ours.code}" if isinstance(ours, SignerError) else "granted"
    theirs = f"refused: {vaults.code}" if isinstance(vaults, SignerError) else "granted"
    if mine == "granted":
        return [Difference("outcome", mine, theirs, "error", "signer grants what Vault refuses")]
    if theirs != "granted":
        why = "neither grants it, so nothing was compared" + (", not even for the plain request" * sample.is_plain)
        return [Difference("outcome", mine, theirs, "error" if sample.is_plain else "note", why)]
    if sample.is_plain:
        return [Difference("outcome", mine, theirs, "error", "signer refuses the plain request, which Vault grants")]
    return [Difference("outcome", mine, theirs, "note", "signer refuses what Vault grants")]


def _outcome(ours: CertificateFields | SignerError, vaults: CertificateFields | SignerError) -> str:
    if isinstance(ours, SignerError):
        return "refused" if isinstance(vaults, SignerError) else "granted by Vault only"
    return "granted by signer only" if isinstance(vaults, SignerError) else "granted"


def _merged(
    found: list[Difference], role: Role, sample: Sample, ours: CertificateFields, vaults: CertificateFields
) -> list[Difference]:
    """Turns an extensions difference into a note if only default extensions of the role were added.

    Vault drops the role's defaults when a request names extensions; signer keeps them, which grants nothing new.
    """
    added = {name for name, _ in ours.extensions} - {name for name, _ in vaults.extensions}
    if "extensions" not in sample.asked or not added <= set(role.default_extensions):
        return found
    why = "the role's own extensions stay when a request names others; Vault drops them"
    return [
        replace(difference, severity="note", why=why) if difference.field == "extensions" else difference
        for difference in found
    ]


# --- samples --------------------------------------------------------------------------------------------------------


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
