"""The rules of a decision, one function each, in the order in which Vault's clients expect faults to be told
(`runbooks/develop/vault-contract.md`, section 3).

A rule looks at a `Case`, fills in the part of the certificate that it decides, and returns what it saw; or it raises
`Refused` with its code. A new rule is a function here and a line in `RULES`. Pure.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from signer.errors import Refused
from signer.model import MAX_REASON, Identity, PublicKey, Role, SignRequest, UsageCounts
from signer.ssh.certificate import MAX_PRINCIPALS
from signer.units import plain, render_duration

MAX_KEY_ID: Final = 256  # bytes; it is logged by every host at each login

# sshd hands the key id to AuthorizedPrincipalsCommand unsanitised, and writes it to its log.
KEY_ID: Final = re.compile(r"[A-Za-z0-9._@=:+/-]+")
# What forwards traffic or runs files past a forced command (measured: -W reaches its target despite force-command).
CLOSED_BY_FORCE_COMMAND: Final = frozenset(
    {"permit-port-forwarding", "permit-agent-forwarding", "permit-X11-forwarding", "permit-user-rc"}
)
_CIDR: Final = re.compile(r"[0-9A-Fa-f.:]+(?:/\d{1,3})?", re.ASCII)
OPTION_NAMES: Final = frozenset({"force-command", "source-address", "verify-required"})


@dataclass(slots=True)
class Case:
    """One request on its way through the rules; each rule fills in what it decided."""

    identity: Identity
    role: Role
    ask: SignRequest
    key: PublicKey | None
    address: str | None
    usage: UsageCounts
    key_id: str = ""
    principals: tuple[str, ...] = ()
    ttl: int = 0
    critical_options: dict[str, str] = field(default_factory=dict)
    extensions: tuple[str, ...] = ()


def allowed_principals(role: Role, identity: Identity) -> frozenset[str]:
    """The role's principals with `{identity}` filled in."""
    return frozenset(_fill(role.principals, identity))


def _fill(names: tuple[str, ...], identity: Identity) -> tuple[str, ...]:
    return tuple(name.replace("{identity}", identity.name) for name in names)


def rule_key(case: Case) -> str:
    key, role = case.key, case.role
    assert key is not None, "decide() always has a key"  # noqa: S101
    if key.kind not in role.key_types:
        raise Refused(
            "key_type_not_allowed",
            f"role {role.name} does not take keys of type {key.kind}",
            f"use one of {', '.join(sorted(role.key_types))}",
            {"key_type": key.kind},
        )
    if key.kind == "ssh-rsa" and key.bits < role.rsa_min_bits:
        raise Refused(
            "rsa_key_too_short",
            f"the RSA key has {key.bits} bits, role {role.name} wants {role.rsa_min_bits}",
            "use an ssh-ed25519 key",
            {"bits": key.bits},
        )
    return f"{key.kind} {key.fingerprint}, allowed"


def _rule_key_id(case: Case) -> str:
    asked = case.ask.key_id
    if asked is None:
        case.key_id = f"{case.identity.name}:{case.role.name}"
        return f"{case.key_id} (ours)"
    if not case.role.allow_key_id:
        raise Refused(
            "key_id_not_allowed",
            f"role {case.role.name} does not let the caller choose the key id",
            "leave key_id out",
        )
    if len(asked) > MAX_KEY_ID or KEY_ID.fullmatch(asked) is None:
        raise Refused(
            "key_id_malformed",
            f"a key id has at most {MAX_KEY_ID} characters, each a letter, a digit or one of ._@=:+/-",
            "leave key_id out or shorten it",
        )
    case.key_id = asked
    return f"{asked} (the caller's)"


def _rule_certificate_type(case: Case) -> str:
    if case.ask.cert_type == "user":
        return "user"
    if case.ask.cert_type == "host":
        raise Refused("cert_type_not_allowed", "signer issues no host certificates", "ask for cert_type user")
    raise Refused("cert_type_unknown", "cert_type must be user", "leave cert_type out")


def _rule_principals(case: Case) -> str:
    asked = case.ask.principals
    if asked is None:
        case.principals = tuple(sorted(set(_fill(case.role.default_principals, case.identity))))
    else:
        case.principals = tuple(sorted(set(asked)))
    if not case.principals:
        raise Refused(
            "no_principals",
            "a certificate without principals is never issued",
            f"name one of the principals of role {case.role.name}",
        )
    if len(case.principals) > MAX_PRINCIPALS:
        raise Refused(
            "too_many_principals",
            f"{len(case.principals)} principals asked, a certificate may name {MAX_PRINCIPALS}",
            "ask for fewer principals",
        )
    allowed = allowed_principals(case.role, case.identity)
    for name in case.principals:
        if name not in allowed:
            raise Refused(
                "principal_not_allowed",
                f"role {case.role.name} does not allow principal {_show(name)}",
                f"it allows {', '.join(sorted(allowed)[:8])}",
                {"principal": name},
            )
    return f"{', '.join(case.principals[:8])} ({'default' if asked is None else 'asked'})"


def _rule_ttl(case: Case) -> str:
    asked, role = case.ask.ttl, case.role
    case.ttl = role.default_ttl if asked is None else asked
    if case.ttl > role.max_ttl:
        raise Refused(
            "ttl_above_max",
            f"ttl is above the role's maximum: {render_duration(case.ttl)} asked, "
            f"{render_duration(role.max_ttl)} allowed",
            f"ask for {render_duration(role.max_ttl)} or less, or change roles.{role.name}.max_ttl in policy.toml",
            {"max_ttl": role.max_ttl},
        )
    if case.ttl < 1:
        raise Refused(
            "ttl_too_short",
            "a certificate lives for at least 1 second",
            "leave ttl out to get the role's default",
            {"max_ttl": role.max_ttl},
        )
    if asked is None:
        return f"{render_duration(case.ttl)} (default)"
    return f"{render_duration(case.ttl)} asked, {render_duration(role.max_ttl)} allowed"


def _rule_critical_options(case: Case) -> str:
    role, options = case.role, case.critical_options
    asked = dict(case.ask.critical_options)
    outside = sorted(set(asked) - role.allowed_critical_options)
    if outside:
        raise Refused(
            "critical_option_not_allowed",
            f"role {role.name} does not let the caller set {', '.join(map(_show, outside[:8]))}",
            "leave critical_options out",
            {"options": outside},
        )
    for name, value in asked.items():
        _check_option_value(name, value)
    options.update(asked)
    if role.force_command is not None:
        options["force-command"] = role.force_command
    if role.verify_required:
        options["verify-required"] = ""
    return _list_options(options)


def _rule_source_address(case: Case) -> str:
    pinned = case.role.source_address
    if pinned is None:
        return "not pinned"
    if pinned == "caller":
        if case.address is None:
            raise Refused(
                "caller_address_unknown",
                f"role {case.role.name} binds to the caller's address, which is not known",
                "ask the service directly, or have the operator set SIGNER_TRUSTED_PROXIES",
            )
        address = ipaddress.ip_address(case.address)
        case.critical_options["source-address"] = f"{address}/{address.max_prefixlen}"
        return f"pinned to the caller, {address}"
    case.critical_options["source-address"] = ",".join(pinned)
    return f"pinned to {', '.join(pinned)}"


def _rule_extensions(case: Case) -> str:
    role, asked = case.role, dict(case.ask.extensions)
    outside = sorted(set(asked) - role.allowed_extensions)
    if outside:
        raise Refused(
            "extension_not_allowed",
            f"role {role.name} does not allow {', '.join(map(_show, outside[:8]))}",
            f"it allows {', '.join(sorted(role.allowed_extensions)) or 'no extensions'}",
            {"extensions": outside},
        )
    if any(asked.values()):
        raise Refused("extension_has_value", "an extension is a flag and takes no value", 'send "" as its value')
    wanted = set(role.default_extensions) | set(asked)
    if "force-command" in case.critical_options:
        clash = sorted(CLOSED_BY_FORCE_COMMAND & set(asked))
        if clash:
            raise Refused(
                "extension_against_force_command",
                f"{clash[0]} would lead past the forced command",
                "leave forwarding and user-rc out",
            )
        wanted -= CLOSED_BY_FORCE_COMMAND
    if role.no_touch_required:
        wanted.add("no-touch-required")
    case.extensions = tuple(sorted(wanted))
    return ", ".join(case.extensions) or "none"


def _rule_reason(case: Case) -> str:
    reason = case.ask.reason
    if not reason:
        if case.role.reason_required:
            raise Refused("reason_missing", f"role {case.role.name} wants a reason", "say why with --reason or reason")
        return "not asked for"
    if len(reason) > MAX_REASON or not reason.isprintable():
        raise Refused(
            "reason_malformed",
            f"a reason is one line of at most {MAX_REASON} printable characters",
            "shorten it",
        )
    return "given"


def _rule_limits(case: Case) -> str:
    limits, usage = case.role.limits, case.usage
    if limits.per_minute is not None and usage.last_minute >= limits.per_minute:
        raise Refused(
            "rate_limited",
            f"{case.identity.name} had {limits.per_minute} certificates of role {case.role.name} within 60 s",
            "wait a minute and ask again",
        )
    if limits.live is not None and usage.live >= limits.live:
        raise Refused(
            "too_many_live",
            f"{case.identity.name} holds {limits.live} certificates of role {case.role.name} that are still valid",
            "wait until one expires",
        )
    return f"{usage.last_minute} in the last minute, {usage.live} live"


def _rule_approval(case: Case) -> str:
    approval = case.role.approval
    if approval is None or case.identity.kind not in approval.kinds:
        return "not needed"
    raise Refused(
        "approval_not_available",
        f"{case.identity.kind}s need the approval of {' or '.join(approval.by)}, and approvals are not built yet",
        f"use another role, or change roles.{case.role.name}.approval in policy.toml",
    )


RULES: Final[tuple[Callable[[Case], str], ...]] = (
    rule_key,
    _rule_key_id,
    _rule_certificate_type,
    _rule_principals,
    _rule_ttl,
    _rule_critical_options,
    _rule_source_address,
    _rule_extensions,
    _rule_reason,
    _rule_limits,
    _rule_approval,
)


def rule_name(rule: Callable[[Case], str]) -> str:
    """What a rule is called in an explanation, such as `certificate type`."""
    return rule.__name__.removeprefix("_").removeprefix("rule_").replace("_", " ")


def _check_option_value(name: str, value: str) -> None:
    """Values end in a certificate that sshd must be able to read; raises `Refused`."""
    if name == "verify-required" and value:
        raise Refused("critical_option_malformed", "verify-required is a flag and takes no value", 'send ""')
    if name == "force-command" and (not value or not value.isprintable()):
        raise Refused("critical_option_malformed", "force-command is one line of printable text")
    if name == "source-address":
        try:
            check_cidr_list(value)
        except ValueError as fault:
            raise Refused(
                "critical_option_malformed", f"source-address: {fault}", "send a comma list of CIDR blocks"
            ) from None


def check_cidr_list(text: str) -> tuple[str, ...]:
    """The blocks of a comma list of CIDR blocks as sshd reads them; raises `ValueError` with a sentence."""
    blocks = text.split(",")
    for block in blocks:
        try:
            # sshd knows neither netmasks nor zones, which ip_network takes; a list it cannot read locks the caller out.
            if _CIDR.fullmatch(block) is None:
                raise ValueError
            ipaddress.ip_network(block)
        except ValueError:
            raise ValueError(f"{block[:64]!a} is not a CIDR block with all host bits zero") from None
    return tuple(blocks)


def _list_options(options: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" if value else name for name, value in sorted(options.items())) or "none"


def _show(name: str) -> str:
    """A caller's word in a sentence: shortened, and without what could steer a terminal."""
    return plain(name[:64]) or "''"
