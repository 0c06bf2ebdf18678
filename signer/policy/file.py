"""Reads policy.toml into a `Policy`. Reports every problem; a file with a problem is rejected as a whole.

Each table has two types: the raw one of `tables.py`, which refuses unknown keys, and the frozen one of `model.py`.
Pure but for `load_policy`, which reads the file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from signer.errors import BadPublicKey
from signer.model import (
    APPROVAL_KEY_KINDS,
    BREAK_GLASS_TTL,
    LONGEST_VALIDITY,
    MAX_VALID_FOR,
    OPTION_NAMES,
    PRINCIPAL,
    RIGHTS,
    Approval,
    ApprovalKey,
    CaKeys,
    Identity,
    Limits,
    Passkey,
    PublicKey,
    Role,
    SshApprovalKey,
    Token,
)
from signer.policy import passkeys, tables
from signer.policy.decide import Policy
from signer.policy.reading import MAX_POLICY_BYTES, POLICY_SETTING, read_policy
from signer.policy.rules import CLOSED_BY_FORCE_COMMAND, check_cidr_list
from signer.ssh.certificate import MAX_PRINCIPALS
from signer.ssh.publickey import CA_KEY_KINDS, MIN_CA_RSA_BITS, USER_KEY_KINDS, parse_public_key
from signer.toml import Faults, Place, parse_toml
from signer.units import render_duration

CEILING: Final = LONGEST_VALIDITY
DEFAULT_CEILING: Final = 3600
DEFAULT_TTL: Final = 15 * 60
MIN_RSA_BITS: Final = 2048

# Vault's syntax of role names, so that every role has a path for Vault clients.
ROLE_NAME: Final = re.compile(r"\w(?:[\w.@-]*\w)?", re.ASCII)
MAX_ROLE_NAME: Final = 128  # characters; `identity:role` is the key id, which has 256 bytes at most
IDENTITY_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9._@-]{0,62}[a-z0-9])?", re.ASCII)
_FINGERPRINT: Final = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
# Texts of examples, as documents show them: a file that still has one is not finished.
_PLACEHOLDER_PIN: Final = "SHA256:" + "A" * 43
_PLACEHOLDER_DIGESTS: Final = frozenset({"0" * 64, "1" * 64})
_EXTENSIONS: Final = CLOSED_BY_FORCE_COMMAND | {"permit-pty"}
# Actors of events that are not identities; no identity may have such a name.
RESERVED_NAMES: Final = frozenset({"keeper", "unauthenticated", "many"})
# An extension that is not a flag of OpenSSH's, such as login@github.com; the role pins its value.
_EXTENSION_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}", re.ASCII)
_EXTENSION_VALUE: Final = re.compile(r"[\x20-\x7e]{1,256}", re.ASCII)
MAX_BACKDATE: Final = 300  # seconds
MAX_APPROVERS: Final = 5  # people whose approval one certificate may need
MAX_APPROVAL_KEYS: Final = 8  # of one identity
MIN_APPROVAL_RSA_BITS: Final = 3072
_NEVER_APPROVE: Final = {"agent": "an agent", "workload": "a workload"}
_NEVER_WITHOUT_HUMAN: Final = {
    "hosts": "change the keys of hosts",
    "revoke": "revoke certificates",
}  # besides `approve`


def load_policy(path: Path, named_by: str = POLICY_SETTING) -> Policy:
    """Reads and validates policy.toml; raises `BadFile` with every problem found.

    `named_by` is the setting or the argument that names the file.
    """
    return parse_policy(read_policy(path, named_by), path.name)


def parse_policy(raw: bytes, name: str = "policy.toml") -> Policy:
    """The file's bytes as a `Policy`; raises `BadFile` with every problem found."""
    faults = Faults("policy_refused", name, "fix them and run `signer policy check`")
    top = faults.table(tables.RawPolicy, (), parse_toml(raw, MAX_POLICY_BYTES, faults))
    ca = _read_ca(faults, top.ca)
    roles = dict(_read_roles(faults, top.roles))
    identities, tokens = _read_identities(faults, top.identities, top.roles)
    _check_approvers(faults, roles, identities)
    faults.check()
    return Policy(
        digest=sha256(raw).hexdigest(),
        ca=ca,
        roles=MappingProxyType(roles),
        identities=MappingProxyType(identities),
        tokens=MappingProxyType(tokens),
    )


def _read_ca(faults: Faults, data: object) -> CaKeys:
    if data is None:
        faults.add(("ca",), "is missing: pin the fingerprint of the CA key")
        return CaKeys("")
    raw = faults.table(tables.RawCa, ("ca",), data)
    faults.require(("ca",), data, "fingerprint")
    if raw.next is not None:
        # Without it, `ca bundle` could not show the pinned key to hosts once the next one is in use.
        faults.require(("ca",), data, "public_key")
    if raw.fingerprint is not None:
        _check_fingerprint(faults, ("ca",), raw.fingerprint)
    public = None
    if raw.fingerprint is not None and raw.public_key is not None:
        public = _read_ca_key(faults, ("ca",), tables.RawCaKey(fingerprint=raw.fingerprint, public_key=raw.public_key))
    others: list[tuple[Place, tables.RawCaKey]] = [
        (("ca", "retired", at), key) for at, key in enumerate(raw.retired or [])
    ]
    if raw.next is not None:
        others.insert(0, (("ca", "next"), raw.next))
    places = {raw.fingerprint: "ca.fingerprint"}
    found: dict[Place, PublicKey | None] = {}
    for place, key in others:
        _check_fingerprint(faults, place, key.fingerprint)
        found[place] = _read_ca_key(faults, place, key)
        if key.fingerprint in places:
            faults.add((*place, "fingerprint"), f"is also {places[key.fingerprint]}")
        places.setdefault(key.fingerprint, ".".join(map(str, place)))
    next_key = found.pop(("ca", "next"), None)
    return CaKeys(raw.fingerprint or "", public, next_key, tuple(key for key in found.values() if key is not None))


def _check_fingerprint(faults: Faults, place: Place, fingerprint: str) -> None:
    if _FINGERPRINT.fullmatch(fingerprint) is None:
        faults.add((*place, "fingerprint"), "is not a fingerprint such as SHA256:… with 43 characters")
    elif fingerprint == _PLACEHOLDER_PIN:
        faults.add((*place, "fingerprint"), "is a placeholder: `signer ca inspect FILE` shows that of the CA key")


def _check_fingerprints(faults: Faults, place: Place, fingerprints: list[str]) -> None:
    _check_unique(faults, place, fingerprints)
    for index, fingerprint in enumerate(fingerprints):
        if _FINGERPRINT.fullmatch(fingerprint) is None:
            faults.add((*place, index), "is not a fingerprint such as SHA256:… with 43 characters")


def _read_ca_key(faults: Faults, place: Place, raw: tables.RawCaKey) -> PublicKey | None:
    """The public half of a CA key; None, and a problem, if it is invalid."""
    place = (*place, "public_key")
    try:
        key = parse_public_key(raw.public_key.strip())
    except BadPublicKey as error:
        faults.add(place, f"cannot be read: {error.text}")
        return None
    if key.kind not in CA_KEY_KINDS:
        faults.add(place, f"is {key.kind}: a CA key is ed25519, ecdsa or rsa")
    elif key.kind == "ssh-rsa" and key.bits < MIN_CA_RSA_BITS:
        faults.add(place, f"has {key.bits} bits; an RSA CA key requires {MIN_CA_RSA_BITS}")
    elif key.fingerprint != raw.fingerprint:
        faults.add(place, f"does not match fingerprint: its own is {key.fingerprint}")
    else:
        return key
    return None


def _read_roles(faults: Faults, data: object) -> Iterator[tuple[str, Role]]:
    if not isinstance(data, dict) or not data:
        faults.add(("roles",), "is missing: define at least one role")
        return
    for name, table in data.items():
        place: Place = ("roles", name)
        if ROLE_NAME.fullmatch(name) is None:
            faults.add(
                place, "a role's name has letters, digits, _ . - @ and starts and ends with a letter, a digit or _"
            )
        if len(name) > MAX_ROLE_NAME:
            faults.add(place, f"a role's name has at most {MAX_ROLE_NAME} characters, this one {len(name)}")
        raw = faults.table(tables.RawRole, place, table)
        faults.require(place, table, "principals", "key_types")
        _check_role(faults, place, raw)
        yield name, _freeze_role(name, raw)


def _ttls(raw: tables.RawRole) -> tuple[int, int]:
    max_ttl = DEFAULT_CEILING if raw.max_ttl is None else raw.max_ttl
    return min(DEFAULT_TTL, max_ttl) if raw.default_ttl is None else raw.default_ttl, max_ttl


def _freeze_role(name: str, raw: tables.RawRole) -> Role:
    default_ttl, max_ttl = _ttls(raw)
    source = raw.source_address
    return Role(
        name=name,
        principals=tuple(raw.principals or ()),
        default_principals=tuple(raw.default_principals or ()),
        default_ttl=default_ttl,
        max_ttl=max_ttl,
        key_types=frozenset(raw.key_types or ()),
        rsa_min_bits=raw.rsa_min_bits,
        allowed_extensions=frozenset(raw.extensions.allowed if raw.extensions else ()),
        default_extensions=tuple(sorted(raw.extensions.default or ()) if raw.extensions else ()),
        allowed_critical_options=frozenset(raw.critical_options.allowed if raw.critical_options else ()),
        force_command=raw.force_command,
        source_address=tuple(source) if isinstance(source, list) else source,
        verify_required=raw.verify_required,
        no_touch_required=raw.no_touch_required,
        allow_key_id=raw.allow_key_id,
        reason_required=raw.reason_required,
        approval=None if raw.approval is None else _freeze_approval(raw.approval),
        limits=Limits(raw.limits.per_minute, raw.limits.live),
        extension_values=tuple(sorted((raw.extensions.values or {}).items()) if raw.extensions else ()),
        unlisted_extensions=raw.extensions.unlisted if raw.extensions else "refuse",
        backdate=raw.backdate,
        keys=None if raw.keys is None else frozenset(raw.keys),
        presence=raw.presence,
        break_glass=raw.break_glass,
    )


def _freeze_approval(raw: tables.RawApproval) -> Approval:
    kinds = frozenset(APPROVAL_KEY_KINDS if raw.with_ is None else raw.with_)
    return Approval(frozenset(raw.for_), tuple(raw.by), raw.valid_for, raw.count, raw.waivers, kinds)


def _check_role(faults: Faults, place: Place, raw: tables.RawRole) -> None:
    _check_principals(faults, place, raw)
    _check_ttls(faults, place, raw)
    _check_keys(faults, place, raw)
    _check_options(faults, place, raw)
    _check_approval(faults, place, raw)


def _check_principals(faults: Faults, place: Place, raw: tables.RawRole) -> None:
    for key, names in (("principals", raw.principals or []), ("default_principals", raw.default_principals or [])):
        if len(names) > MAX_PRINCIPALS:
            faults.add((*place, key), f"has {len(names)} names; a certificate may have {MAX_PRINCIPALS}")
        _check_unique(faults, (*place, key), names)
        for index, name in enumerate(names):
            if PRINCIPAL.fullmatch(name.replace("{identity}", "x")) is None:
                faults.add(
                    (*place, key, index),
                    f"{name[:64]!a} is not a valid principal: use only letters, digits and ._@:+=/$~-",
                )
    for index, name in enumerate(raw.default_principals or []):
        if raw.principals and name not in raw.principals:
            faults.add((*place, "default_principals", index), f"{name[:64]!a} is not among principals")


def _check_unique(faults: Faults, place: Place, names: list[str]) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            faults.add((*place, index), f"{name[:64]!a} is listed twice")


def _check_ttls(faults: Faults, place: Place, raw: tables.RawRole) -> None:
    default_ttl, max_ttl = _ttls(raw)
    if max_ttl > CEILING:
        faults.add((*place, "max_ttl"), f"{render_duration(max_ttl)} is above {render_duration(CEILING)}, the maximum")
    if default_ttl > max_ttl:
        shown = render_duration(max_ttl) + ("" if raw.max_ttl else ", the default")
        faults.add((*place, "default_ttl"), f"{render_duration(default_ttl)} is above max_ttl {shown}")
    for key, value in (("default_ttl", default_ttl), ("max_ttl", max_ttl)):
        if value < 1:
            faults.add((*place, key), "is below one second")
    if raw.backdate > MAX_BACKDATE:
        faults.add((*place, "backdate"), f"{render_duration(raw.backdate)} is above {render_duration(MAX_BACKDATE)}")


def _check_approval(faults: Faults, place: Place, raw: tables.RawRole) -> None:
    if (approval := raw.approval) is not None:
        at = (*place, "approval")
        if approval.valid_for < 1:
            faults.add((*at, "valid_for"), "is below one second")
        if approval.valid_for > MAX_VALID_FOR:
            most = render_duration(MAX_VALID_FOR)
            faults.add((*at, "valid_for"), f"{render_duration(approval.valid_for)} is above {most}, the maximum")
        if approval.count > MAX_APPROVERS:
            faults.add((*at, "count"), f"{approval.count} is above {MAX_APPROVERS}, the maximum")
        _check_unique(faults, (*at, "for"), list(approval.for_))
        _check_unique(faults, (*at, "by"), approval.by)
        _check_unique(faults, (*at, "with"), list(approval.with_ or []))
    if raw.break_glass:
        if raw.approval is not None:
            faults.add((*place, "break_glass"), "contradicts approval: break-glass does not wait for anybody")
        _, max_ttl = _ttls(raw)
        if max_ttl > BREAK_GLASS_TTL:
            shown = render_duration(max_ttl) + ("" if raw.max_ttl else ", the default of max_ttl,")
            most = render_duration(BREAK_GLASS_TTL)
            key = "max_ttl" if raw.max_ttl else "break_glass"
            faults.add((*place, key), f"{shown} is above {most}, the maximum of a break-glass role")


def _check_keys(faults: Faults, place: Place, raw: tables.RawRole) -> None:
    _check_unique(faults, (*place, "key_types"), raw.key_types or [])
    _check_fingerprints(faults, (*place, "keys"), raw.keys or [])
    for index, kind in enumerate(raw.key_types or []):
        if kind not in USER_KEY_KINDS:
            near = difflib.get_close_matches(kind, sorted(USER_KEY_KINDS), 1)
            also = f", did you mean {near[0]}" if near else f"; use one of {', '.join(sorted(USER_KEY_KINDS))}"
            faults.add((*place, "key_types", index), f"{kind[:64]!a} is not a valid key type{also}")
    if raw.rsa_min_bits < MIN_RSA_BITS:
        faults.add((*place, "rsa_min_bits"), f"{raw.rsa_min_bits} is below {MIN_RSA_BITS}")
    for key in ("verify_required", "no_touch_required"):
        if getattr(raw, key) and not all(kind.startswith("sk-") for kind in raw.key_types or []):
            faults.add((*place, key), "applies only to FIDO keys: every key_types entry must start with sk-")
    if raw.verify_required and raw.no_touch_required:
        faults.add((*place, "no_touch_required"), "contradicts verify_required")


def _check_options(faults: Faults, place: Place, raw: tables.RawRole) -> None:
    if raw.extensions is not None:
        _check_choice(faults, (*place, "extensions"), raw.extensions)
    if raw.force_command is not None:
        if not raw.force_command.strip() or not raw.force_command.isprintable():
            faults.add((*place, "force_command"), "is not one line of printable text")
        for index, name in enumerate(raw.extensions.allowed if raw.extensions else []):
            if name in CLOSED_BY_FORCE_COMMAND:
                faults.add((*place, "extensions", "allowed", index), f"{name} would bypass force_command")
    pinned = {
        "force-command": raw.force_command is not None,
        "source-address": raw.source_address is not None,
        "verify-required": raw.verify_required,
    }
    for index, name in enumerate(raw.critical_options.allowed if raw.critical_options else []):
        if name not in OPTION_NAMES:
            faults.add((*place, "critical_options", "allowed", index), f"{name[:64]!a} is not a critical option")
        elif pinned[name]:
            faults.add((*place, "critical_options", "allowed", index), f"{name} is pinned by this role")
    if isinstance(raw.source_address, list):
        for index, block in enumerate(raw.source_address):
            try:
                check_cidr_list(block)
            except ValueError as error:
                faults.add((*place, "source_address", index), str(error))


def _check_choice(faults: Faults, place: Place, raw: tables.RawChoice) -> None:
    _check_unique(faults, (*place, "allowed"), raw.allowed)
    for index, name in enumerate(raw.allowed):
        if name == "no-touch-required":
            faults.add((*place, "allowed", index), "is not listed here; set no_touch_required = true instead")
        elif name not in _EXTENSIONS and name not in (raw.values or {}):
            faults.add(
                (*place, "allowed", index),
                f"{name[:64]!a} is not an extension; use {', '.join(sorted(_EXTENSIONS))}, or pin its value in values",
            )
    for name, value in (raw.values or {}).items():
        at = (*place, "values", name)
        if name in _EXTENSIONS or name == "no-touch-required":
            faults.add(at, "is a flag of OpenSSH's and takes no value")
        elif _EXTENSION_NAME.fullmatch(name) is None:
            faults.add(at, "is not the name of an extension: use letters, digits and ._@-")
        if name not in raw.allowed:
            faults.add(at, f"{name[:64]!a} is not among allowed")
        if _EXTENSION_VALUE.fullmatch(value.replace("{identity}", "x")) is None:
            faults.add(at, "is not 1 to 256 printable characters of ASCII")
    for index, name in enumerate(raw.default or []):
        if name not in raw.allowed:
            faults.add((*place, "default", index), f"{name[:64]!a} is not among allowed")


def _read_identities(faults: Faults, data: object, role_tables: object) -> tuple[dict[str, Identity], dict[str, Token]]:
    identities: dict[str, Identity] = {}
    tokens: dict[str, Token] = {}
    if not isinstance(data, dict) or not data:
        faults.add(("identities",), "is missing: define at least one identity")
        return identities, tokens
    known_roles = list(role_tables) if isinstance(role_tables, dict) else []
    known = frozenset(data)
    owners: dict[str, str] = {}  # of approval keys, by fingerprint, and by id for passkeys
    for name, table in data.items():
        place: Place = ("identities", name)
        if IDENTITY_NAME.fullmatch(name) is None:
            faults.add(place, "an identity's name has at most 64 lower case letters and digits, with . _ @ - inside")
        if name in RESERVED_NAMES:
            faults.add(place, f"{name} is reserved for the ledger: use another name")
        raw = faults.table(tables.RawIdentity, place, table)
        faults.require(place, table, "kind")
        for index, role in enumerate(raw.roles or []):
            if role not in known_roles:
                faults.add((*place, "roles", index), f"there is no role {role[:64]!a}")
        for index, right in enumerate(raw.may or []):
            if right not in RIGHTS:
                faults.add((*place, "may", index), f"{right[:64]!a} is not one of {', '.join(RIGHTS)}")
            elif right == "approve" and raw.kind in _NEVER_APPROVE:
                faults.add((*place, "may", index), f"{_NEVER_APPROVE[raw.kind]} can never approve")
            elif right in _NEVER_WITHOUT_HUMAN and raw.kind in _NEVER_APPROVE:
                faults.add(
                    (*place, "may", index), f"{_NEVER_APPROVE[raw.kind]} can never {_NEVER_WITHOUT_HUMAN[right]}"
                )
            elif right == "approve" and isinstance(table, dict) and "approval_keys" not in table:
                faults.add(
                    (*place, "may", index), "requires approval_keys: an approval is a signature, never a token alone"
                )
        identities[name] = Identity(
            name,
            raw.kind or "agent",
            frozenset(raw.groups or ()),
            frozenset(raw.roles or ()),
            frozenset(raw.may or ()),
            None if raw.keys is None else frozenset(raw.keys),
            known,
            _read_approval_keys(faults, place, name, raw, owners),
        )
        _check_fingerprints(faults, (*place, "keys"), raw.keys or [])
        _read_tokens(faults, (*place, "tokens"), name, raw.tokens or [], tokens)
    return identities, tokens


def _read_approval_keys(
    faults: Faults, place: Place, identity: str, raw: tables.RawIdentity, owners: dict[str, str]
) -> tuple[ApprovalKey, ...]:
    """The keys whose signatures approve; `owners` has those of the identities before, and gets these."""
    lines = raw.approval_keys or []
    place = (*place, "approval_keys")
    if lines and raw.kind in _NEVER_APPROVE:
        faults.add(place, f"{_NEVER_APPROVE[raw.kind]} can never approve")
    if len(lines) > MAX_APPROVAL_KEYS:
        faults.add(place, f"has {len(lines)} keys; {MAX_APPROVAL_KEYS} are allowed")
    found: list[ApprovalKey] = []
    for index, line in enumerate(lines):
        at = (*place, index)
        key = (_read_passkey if line.kind == "webauthn" else _read_ssh_key)(faults, at, line)
        if key is None:
            continue
        names = {"key": key.fingerprint}
        if isinstance(key, Passkey):
            names = {"public_key": key.fingerprint, "id": key.id}
        for field, name in names.items():
            owner = owners.get(name)
            if owner == identity:
                faults.add((*at, field), f"{name[:64]} is listed twice")
            elif owner is not None:
                faults.add((*at, field), f"is also an approval key of {owner}: each person has their own")
            owners.setdefault(name, identity)
        found.append(key)
    return tuple(found)


def _refuse_fields(faults: Faults, place: Place, line: tables.RawApprovalKey, *wanted: str) -> bool:
    """Records each key of an entry that its kind does not have, and each of `wanted` that it lacks; True for none."""
    foreign = sorted(line.model_fields_set - {"kind", "software", "verify", *wanted})
    if line.kind == "webauthn":
        foreign += sorted({"software", "verify"} & line.model_fields_set)
    for name in foreign:
        faults.add((*place, name), f"does not go with kind {line.kind}: remove it")
    lacking = [name for name in wanted if getattr(line, name) is None]
    for name in lacking:
        faults.add((*place, name), "is missing")
    return not lacking


def _read_passkey(faults: Faults, place: Place, line: tables.RawApprovalKey) -> Passkey | None:
    """The passkey of an entry; None, and each of its problems, if it is not one."""
    if not _refuse_fields(faults, place, line, "id", "public_key", "rp", "origins"):
        return None
    passkey, problems = passkeys.read_passkey(line.id or "", line.public_key or "", line.rp or "", line.origins or [])
    for at, sentence in problems:
        faults.add((*place, *at), sentence)
    return passkey


def _read_ssh_key(faults: Faults, place: Place, line: tables.RawApprovalKey) -> SshApprovalKey | None:
    """The key of an entry; None, and a problem, if it cannot be read."""
    if not _refuse_fields(faults, place, line, "key") or line.key is None:
        return None
    at = (*place, "key")
    try:
        key = parse_public_key(line.key.strip())
    except BadPublicKey as error:
        faults.add(at, f"cannot be read: {error.text}")
        return None
    if key.kind.startswith("sk-"):
        if line.software:
            faults.add((*place, "software"), f"contradicts the key, which is {key.kind}: remove it")
        return SshApprovalKey(key, line.software, line.verify)
    if not line.software:
        faults.add(
            at, f"is {key.kind}, with which a program signs unseen: use an sk-… key, or accept it with software = true"
        )
    if line.verify:
        faults.add((*place, "verify"), f"applies only to FIDO keys, not to {key.kind}")
    if key.kind == "ssh-rsa" and key.bits < MIN_APPROVAL_RSA_BITS:
        faults.add(at, f"has {key.bits} bits; an RSA key that approves requires {MIN_APPROVAL_RSA_BITS}")
    return SshApprovalKey(key, line.software, line.verify)


def _read_tokens(
    faults: Faults, place: Place, identity: str, raw_tokens: list[dict[str, Any]], tokens: dict[str, Token]
) -> None:
    for index, data in enumerate(raw_tokens):
        at = (*place, index)
        raw = faults.table(tables.RawToken, at, data)
        faults.require(at, data, "sha256", "expires")
        if raw.sha256 is not None and _SHA256.fullmatch(raw.sha256) is None:
            faults.add((*at, "sha256"), "is not a SHA-256: 64 lower case hexadecimal digits")
        if raw.sha256 in _PLACEHOLDER_DIGESTS:
            faults.add((*at, "sha256"), "is a placeholder: `signer token new` prints that of a token")
        if raw.sha256 in tokens:
            faults.add((*at, "sha256"), f"is also the token of {tokens[raw.sha256].identity}")
        if raw.expires is not None and raw.expires.tzinfo is None:
            faults.add((*at, "expires"), "has no time zone; end it with Z")
        elif raw.expires is not None and raw.sha256 is not None:
            tokens.setdefault(raw.sha256, Token(identity, raw.sha256, int(raw.expires.timestamp())))


def _check_approvers(faults: Faults, roles: dict[str, Role], identities: dict[str, Identity]) -> None:
    approvers = [identity for identity in identities.values() if "approve" in identity.may]
    for name, role in roles.items():
        if (approval := role.approval) is None:
            continue
        place: Place = ("roles", name, "approval")
        for index, group in enumerate(approval.by):
            if not any(group in identity.groups for identity in approvers):
                faults.add((*place, "by", index), f"no identity in group {group[:64]!a} has the right approve")
        members = [identity for identity in approvers if not identity.groups.isdisjoint(approval.by)]
        able = sum(identity.holds_key_of(role.key_kinds) for identity in members)
        if not able and any(identity.approval_keys for identity in members):
            kinds = " or ".join(sorted(role.key_kinds))
            faults.add((*place, "with"), f"nobody who may approve has an approval key of kind {kinds}")
        if 0 < able < approval.count:
            groups = ", ".join(group[:64] for group in approval.by)
            faults.add((*place, "count"), f"{approval.count} is above {able}, the members of {groups} who may approve")
    for name, identity in identities.items():
        if identity.kind == "human":
            continue
        for role_name in sorted(identity.roles):
            if role_name in roles and roles[role_name].break_glass:
                faults.add(("identities", name, "roles"), f"{role_name} is a break-glass role, for humans only")
