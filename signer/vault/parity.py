"""Compares signer's roles and certificates with Vault's, field by field. Pure.

An `error` is a difference that grants more than Vault or changes principals; it prevents a cutover. A `note` is a
difference that grants less or has no effect. Each difference has an explanation.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from signer.model import BACKDATE, Role
from signer.ssh.certificate import CertificateFields
from signer.units import render_duration
from signer.vault.role import MountTtls, VaultRole, read_vault_role

# Seconds by which clocks and network delay may make two certificates for one request differ.
CLOCKS: Final = 60
Severity = Literal["error", "note"]
Options = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """One field that differs, with both values as text; `why` explains the difference."""

    field: str
    ours: str
    vaults: str
    severity: Severity
    why: str


def errors_in(found: list[Difference]) -> list[Difference]:
    """The differences that prevent a cutover."""
    return [difference for difference in found if difference.severity == "error"]


# --- certificates ----------------------------------------------------------------------------------------------------


def compare_certificates(ours: CertificateFields, vaults: CertificateFields) -> list[Difference]:
    """The differences between two certificates for one request; ignores nonce, serial, CA key and signature."""
    return [
        *_exact("key_kind", ours.key_kind, vaults.key_kind, "the certificates are for keys of different types"),
        *_exact("public_key", ours.key.hex(), vaults.key.hex(), "the certificates are for different keys"),
        *_exact(
            "cert_type", str(ours.cert_type), str(vaults.cert_type), "one of the certificates is not a user certificate"
        ),
        *_exact(
            "key_id",
            ours.key_id,
            vaults.key_id,
            "Vault derives it from token and key, signer from identity and role; hosts only log it",
            "note",
        ),
        *compare_principals("principals", ours.principals, vaults.principals),
        *_times(ours, vaults),
        *compare_critical_options("critical_options", ours.critical_options, vaults.critical_options),
        *_extensions(ours.extensions, vaults.extensions),
    ]


def _exact(field: str, ours: str, vaults: str, why: str, severity: Severity = "error") -> Iterator[Difference]:
    if ours != vaults:
        yield Difference(field, ours, vaults, severity, why)


def compare_principals(field: str, ours: tuple[str, ...], vaults: tuple[str, ...]) -> Iterator[Difference]:
    """An error in both directions: a new principal opens accounts, a missing one breaks logins."""
    added, missing = sorted(set(ours) - set(vaults)), sorted(set(vaults) - set(ours))
    if added:
        why = f"signer adds {', '.join(added)}: principals may never widen"
    elif missing:
        why = f"signer omits {', '.join(missing)}: logins that use it would fail"
    else:
        return
    yield Difference(field, _names(ours), _names(vaults), "error", why)


def _compare_sets(
    field: str, ours: Iterable[str], vaults: Iterable[str], more: str, less: str, shown: tuple[str, str] | None = None
) -> Iterator[Difference]:
    """An error if signer has `more`, else a note if it has `less`; both are sentences with the names in place of {}."""
    mine, theirs = set(ours), set(vaults)
    values = shown or (_names(tuple(sorted(mine))), _names(tuple(sorted(theirs))))
    if added := sorted(mine - theirs):
        yield Difference(field, *values, "error", more.format(", ".join(added)))
    elif missing := sorted(theirs - mine):
        yield Difference(field, *values, "note", less.format(", ".join(missing)))


def _times(ours: CertificateFields, vaults: CertificateFields) -> Iterator[Difference]:
    life, theirs = ours.valid_before - ours.valid_after, vaults.valid_before - vaults.valid_after
    if life > theirs + BACKDATE:
        yield Difference("lifetime", _span(life), _span(theirs), "error", "signer's certificates live longer")
    elif life > theirs:
        why = f"signer backdates certificates by {BACKDATE} s for hosts with a slow clock"
        yield Difference("lifetime", _span(life), _span(theirs), "note", why)
    elif life < theirs:
        yield Difference("lifetime", _span(life), _span(theirs), "note", "signer's certificates live shorter")
    for field, mine, other in (
        ("valid_after", ours.valid_after, vaults.valid_after),
        ("valid_before", ours.valid_before, vaults.valid_before),
    ):
        is_reported = field == "valid_before" and life != theirs  # as a difference in lifetime
        if abs(mine - other) > CLOCKS and not is_reported:
            wider = mine < other if field == "valid_after" else mine > other
            why = f"the times differ by more than {CLOCKS} s: check both clocks"
            yield Difference(field, str(mine), str(other), "error" if wider else "note", why)


def compare_critical_options(field: str, ours: Options, vaults: Options) -> Iterator[Difference]:
    """Critical options restrict use, so a missing or weaker one is an error."""
    mine, others = dict(ours), dict(vaults)
    for name in sorted({*mine, *others}):
        at = f"{field}.{name}"
        if name not in mine:
            yield Difference(at, "none", _value(others[name]), "error", "signer does not restrict this")
        elif name not in others:
            yield Difference(at, _value(mine[name]), "none", "note", "signer restricts this, Vault does not")
        elif mine[name] != others[name]:
            if name == "source-address" and _lies_within(mine[name], others[name]):
                yield Difference(at, mine[name], others[name], "note", "all of signer's addresses are within Vault's")
            else:
                yield Difference(
                    at, _value(mine[name]), _value(others[name]), "error", "signer has a different restriction"
                )


def _lies_within(ours: str, vaults: str) -> bool:
    """True if both are lists of CIDR blocks and each of signer's blocks is within one of Vault's."""
    try:
        mine = [ipaddress.ip_network(block) for block in ours.split(",")]
        others = [ipaddress.ip_network(block) for block in vaults.split(",")]
    except ValueError:
        return False
    return all(
        any(block.version == other.version and block.subnet_of(other) for other in others)  # type: ignore[arg-type]
        for block in mine
    )


def _extensions(ours: Options, vaults: Options) -> Iterator[Difference]:
    mine, theirs = tuple(map(_option, ours)), tuple(map(_option, vaults))
    less = "signer omits {}: it is missing in logins that need it"
    yield from _compare_sets("extensions", mine, theirs, "signer adds {}", less, (_names(mine), _names(theirs)))


def _option(option: tuple[str, str]) -> str:
    name, value = option
    return f"{name}={value}" if value else name


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"


def _value(value: str) -> str:
    return value or "set"


def _span(seconds: int) -> str:
    return render_duration(seconds) if seconds >= 0 else f"-{render_duration(-seconds)}"


# --- roles -----------------------------------------------------------------------------------------------------------


def compare_roles(vault_role: Mapping[str, object], role: Role, mount: MountTtls | None = None) -> list[Difference]:
    """The differences between a role from Vault's API and signer's; fields have Vault's names where it has one.

    `mount` has the lifetimes for a role without its own; None means Vault's default of 768h. Raises `Unavailable` for
    a role that cannot be parsed.
    """
    vaults = read_vault_role(vault_role)
    found: list[Difference] = []
    if not vaults.issues_user_certificates:
        why = "Vault's role issues no user certificates, signer's does"
        found.append(Difference("allow_user_certificates", "true", "false", "error", why))
    return [
        *found,
        *_allowed_principals(vaults, role),
        *compare_principals("default_user", tuple(sorted(set(role.default_principals))), vaults.default_users),
        *_role_ttls(vaults, role, mount or MountTtls()),
        *_key_types(vaults, role),
        *_role_extensions(vaults, role),
        *_role_critical_options(vaults, role),
        *_role_rest(vaults, role),
    ]


def _allowed_principals(vaults: VaultRole, role: Role) -> Iterator[Difference]:
    shown = _names(role.principals), "*" if vaults.any_user else _names(vaults.users)
    if vaults.any_user:
        yield Difference("allowed_users", *shown, "note", "Vault allows any principal, signer only the listed ones")
        return
    more, less = "signer adds {}: principals may never widen", "signer does not allow {}"
    yield from _compare_sets("allowed_users", role.principals, vaults.users, more, less, shown)
    for field in ("allowed_users_template", "default_user_template"):
        if vaults.flag(field):
            why = "Vault has templates with details of the caller, signer only {identity}"
            yield Difference(field, "none", "true", "note", why)


def _role_ttls(vaults: VaultRole, role: Role, mount: MountTtls) -> Iterator[Difference]:
    default, most = vaults.ttls(mount)
    for field, mine, other in (("ttl", role.default_ttl, default), ("max_ttl", role.max_ttl, most)):
        if mine > other:
            yield Difference(field, _span(mine), _span(other), "error", "signer's certificates live longer")
        elif mine < other:
            yield Difference(field, _span(mine), _span(other), "note", "signer's certificates live shorter")
    if vaults.number("not_before_duration") != role.backdate:
        shown = _span(role.backdate), _span(vaults.number("not_before_duration"))
        yield Difference("not_before_duration", *shown, "note", "the time by which certificates are backdated")


def _key_types(vaults: VaultRole, role: Role) -> Iterator[Difference]:
    keys, field = vaults.keys(), "allowed_user_key_lengths"
    shown = _names(tuple(sorted(role.key_types))), _names(tuple(sorted(keys.kinds)))
    added, missing = sorted(role.key_types - keys.kinds), sorted(keys.kinds - role.key_types)
    if added:
        yield Difference(field, *shown, "error", f"signer also accepts {', '.join(added)}")
    elif missing or keys.unknown:
        yield Difference(field, *shown, "note", f"signer does not accept {', '.join([*missing, *keys.unknown])}")
    if "ssh-rsa" not in role.key_types & keys.kinds:
        return
    mine = f"from {role.rsa_min_bits} bits"
    if keys.rsa_sizes is None:
        yield Difference(f"{field}.rsa", mine, "any size", "note", "signer accepts no shorter keys")
        return
    sizes = ", ".join(map(str, sorted(keys.rsa_sizes)))
    if role.rsa_min_bits < min(keys.rsa_sizes):
        yield Difference(f"{field}.rsa", mine, sizes, "error", "signer accepts shorter keys")
    else:
        why = "Vault accepts exactly these sizes, signer also longer keys"
        yield Difference(f"{field}.rsa", mine, sizes, "note", why)


def _role_extensions(vaults: VaultRole, role: Role) -> Iterator[Difference]:
    values = dict(role.extension_values)
    defaults = tuple((name, values.get(name, "")) for name in role.default_extensions)
    if role.no_touch_required:
        defaults += (("no-touch-required", ""),)
    always = vaults.pairs("default_extensions")
    for found in _extensions(tuple(sorted(defaults)), always):
        yield Difference("default_extensions", found.ours, found.vaults, found.severity, found.why)
    if vaults.flag("default_extensions_template"):
        why = "Vault has templates with details of the caller, signer has none"
        yield Difference("default_extensions_template", "none", "true", "note", why)
    if vaults.any_extension:
        shown = _names(tuple(sorted(role.allowed_extensions))), "*"
        yield Difference(
            "allowed_extensions", *shown, "note", "Vault allows any extension, signer only the listed ones"
        )
        return
    shown = _names(tuple(sorted(role.allowed_extensions))), _names(tuple(sorted(vaults.extensions)))
    added = role.allowed_extensions - vaults.extensions
    outside = sorted(added - {name for name, _ in always})
    missing = sorted(vaults.extensions - role.allowed_extensions)
    if outside:
        yield Difference(
            "allowed_extensions", *shown, "error", f"signer also lets callers request {', '.join(outside)}"
        )
    elif added or missing:
        why = (
            f"signer does not allow {', '.join(missing)}" if missing else "every certificate has the others by default"
        )
        yield Difference("allowed_extensions", *shown, "note", why)


def _role_critical_options(vaults: VaultRole, role: Role) -> Iterator[Difference]:
    forced = vaults.pairs("default_critical_options")
    pinned = {"force-command": role.force_command} if role.force_command is not None else {}
    if role.verify_required:
        pinned["verify-required"] = ""
    if isinstance(role.source_address, tuple):
        pinned["source-address"] = ",".join(role.source_address)
    elif role.source_address is not None:
        pinned["source-address"] = role.source_address  # `caller`: not a list of blocks, so never within one
    yield from compare_critical_options("default_critical_options", tuple(sorted(pinned.items())), forced)
    if forced:
        why = "Vault drops them if a caller requests another option, signer never does"
        yield Difference("default_critical_options", "pinned", "default", "note", why)
    mine = role.allowed_critical_options
    if vaults.any_critical_option:
        why = "Vault lets callers set or replace any option, signer only the listed ones"
        yield Difference("allowed_critical_options", _names(tuple(sorted(mine))), "any", "note", why)
        return
    more, less = "signer also lets callers set {}", "signer does not let callers set {}"
    yield from _compare_sets("allowed_critical_options", mine, vaults.critical_options, more, less)


def _role_rest(vaults: VaultRole, role: Role) -> Iterator[Difference]:
    field, theirs = "allow_user_key_ids", vaults.flag("allow_user_key_ids")
    if role.allow_key_id and not theirs:
        yield Difference(field, "true", "false", "error", "signer lets callers choose the key id")
    elif theirs and not role.allow_key_id:
        yield Difference(field, "false", "true", "note", "signer does not let callers choose the key id")
    if vaults.text("key_id_format"):
        why = "signer's default key id"
        yield Difference("key_id_format", "IDENTITY:ROLE", vaults.text("key_id_format"), "note", why)
    for field, why in (
        ("allow_host_certificates", "signer issues no host certificates"),
        ("allow_empty_principals", "signer never issues a certificate without principals"),
    ):
        if vaults.flag(field):
            yield Difference(field, "false", "true", "note", why)
    if vaults.text("algorithm_signer") != "default":
        why = "signer uses rsa-sha2-512 for an RSA CA key"
        yield Difference("algorithm_signer", "none", vaults.text("algorithm_signer"), "note", why)
    if vaults.text("issuer_ref") != "default":
        why = "Vault signs for this role with a key other than its default; hosts must trust signer's key"
        yield Difference("issuer_ref", "none", vaults.text("issuer_ref"), "note", why)
    if role.reason_required:
        yield Difference(
            "reason_required", "true", "none", "note", "signer requires a reason in each request; Vault ignores it"
        )
    if role.approval is not None:
        yield Difference("approval", "needed", "none", "note", "signer requires a human approval for some requests")
    limits = [f"{role.limits.per_minute} a minute"] if role.limits.per_minute is not None else []
    limits += [f"{role.limits.live} live"] if role.limits.live is not None else []
    if limits:
        yield Difference("limits", ", ".join(limits), "none", "note", "signer limits certificates per identity")
