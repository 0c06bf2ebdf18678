"""The rules of a decision, one function each, in Vault's order of errors.

A rule reads a `Case`, sets its part of the certificate in it and returns a finding, or raises `Refused`. A new rule is
a function here and an entry in `RULES`. `runbooks/develop/vault-contract.md`, section 3, has the order. Pure.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from signer.errors import Refused
from signer.model import KEY_ID, MAX_KEY_ID, MAX_REASON, Identity, PublicKey, Role, SignRequest, UsageCounts
from signer.ssh.certificate import MAX_PRINCIPALS
from signer.units import plain, render_duration

# Extensions that bypass a forced command (measured: -W reaches its target despite force-command).
CLOSED_BY_FORCE_COMMAND: Final = frozenset(
    {"permit-port-forwarding", "permit-agent-forwarding", "permit-X11-forwarding", "permit-user-rc"}
)
MIN_REASON_LETTERS: Final = 3  # characters of the Unicode categories L and N
_BLANK_LETTERS: Final = "\u115f\u1160\u3164\uffa0"  # Hangul fillers: letters by category, and invisible
_CIDR: Final = re.compile(r"[0-9A-Fa-f.:]+(?:/\d{1,3})?", re.ASCII)


@dataclass(slots=True)
class Case:
    """One request, and the parts of its certificate that the rules set."""

    identity: Identity
    role: Role
    request: SignRequest
    key: PublicKey | None
    address: str | None
    usage: UsageCounts
    key_id: str = ""
    principals: tuple[str, ...] = ()
    ttl: int = 0
    critical_options: dict[str, str] = field(default_factory=dict)
    extensions: tuple[str, ...] = ()
    extension_values: tuple[tuple[str, str], ...] = ()


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
            {"key_type": key.kind, "bits": key.bits, "allowed": sorted(role.key_types)},
        )
    if key.kind == "ssh-rsa" and key.bits < role.rsa_min_bits:
        raise Refused(
            "rsa_key_too_short",
            f"the RSA key has {key.bits} bits, role {role.name} requires {role.rsa_min_bits}",
            "use an ssh-ed25519 key",
            {"bits": key.bits},
        )
    for keys, place in ((case.identity.keys, f"identities.{case.identity.name}"), (role.keys, f"roles.{role.name}")):
        if keys is not None and key.fingerprint not in keys:
            raise Refused(
                "key_not_enrolled",
                f"the key {key.fingerprint} is not among {place}.keys",
                "use an enrolled key, or have the operator enrol this one (`signer key enrol`)",
                {"fingerprint": key.fingerprint},
            )
    return f"{key.kind} {key.fingerprint}, allowed"


def _rule_key_id(case: Case) -> str:
    asked = case.request.key_id
    if asked is None:
        case.key_id = f"{case.identity.name}:{case.role.name}"
        return f"{case.key_id} (generated)"
    if not case.role.allow_key_id:
        raise Refused(
            "key_id_not_allowed",
            f"role {case.role.name} does not let the caller choose the key id",
            "omit key_id",
        )
    if len(asked) > MAX_KEY_ID or KEY_ID.fullmatch(asked) is None:
        raise Refused(
            "key_id_malformed",
            f"key_id must have at most {MAX_KEY_ID} characters, only letters, digits and ._@=:+/-",
            "shorten key_id, or omit it",
        )
    owner = asked.partition(":")[0].lower()
    if owner in case.identity.known and owner != case.identity.name:
        raise Refused(
            "key_id_of_another_identity",
            f"key_id begins with the name of another identity, {owner}",
            f"begin it with {case.identity.name}: or another word, or omit it",
        )
    case.key_id = asked
    return f"{asked} (requested)"


def _rule_certificate_type(case: Case) -> str:
    if case.request.cert_type == "user":
        return "user"
    if case.request.cert_type == "host":
        raise Refused("cert_type_not_allowed", "host certificates are not issued here", "request cert_type user")
    raise Refused("cert_type_unknown", "cert_type must be user", "omit cert_type")


def _rule_principals(case: Case) -> str:
    asked = case.request.principals
    if asked is None:
        case.principals = tuple(sorted(set(_fill(case.role.default_principals, case.identity))))
    else:
        case.principals = tuple(sorted(set(asked)))
    if not case.principals:
        raise Refused(
            "no_principals",
            "a certificate must have at least one principal",
            f"name one of the principals of role {case.role.name}",
        )
    if len(case.principals) > MAX_PRINCIPALS:
        raise Refused(
            "too_many_principals",
            f"{len(case.principals)} principals requested; a certificate may have {MAX_PRINCIPALS}",
            "request fewer principals",
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
    return f"{', '.join(case.principals[:8])} ({'default' if asked is None else 'requested'})"


def _rule_ttl(case: Case) -> str:
    asked, role = case.request.ttl, case.role
    case.ttl = role.default_ttl if asked is None else asked
    if case.ttl > role.max_ttl:
        raise Refused(
            "ttl_above_max",
            f"ttl is above the role's maximum: {render_duration(case.ttl)} requested, "
            f"{render_duration(role.max_ttl)} allowed",
            f"request {render_duration(role.max_ttl)} or less, or change roles.{role.name}.max_ttl in policy.toml",
            {"max_ttl": role.max_ttl},
        )
    if case.ttl < 1:
        raise Refused(
            "ttl_too_short",
            f"ttl is below 1 second: {case.ttl} s",
            "omit ttl to get the role's default",
            {"max_ttl": role.max_ttl},
        )
    if asked is None:
        return f"{render_duration(case.ttl)} (default)"
    return f"{render_duration(case.ttl)} requested, {render_duration(role.max_ttl)} allowed"


def _rule_critical_options(case: Case) -> str:
    role, options = case.role, case.critical_options
    asked = dict(case.request.critical_options)
    outside = sorted(set(asked) - role.allowed_critical_options)
    if outside:
        raise Refused(
            "critical_option_not_allowed",
            f"role {role.name} does not allow critical options {', '.join(map(_show, outside[:8]))}",
            "omit critical_options",
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
                f"role {case.role.name} binds to the caller's address, which is unknown",
                "connect without a proxy, or have the operator set SIGNER_TRUSTED_PROXIES",
            )
        address = ipaddress.ip_address(case.address)
        case.critical_options["source-address"] = f"{address}/{address.max_prefixlen}"
        return f"pinned to the caller, {address}"
    case.critical_options["source-address"] = ",".join(pinned)
    return f"pinned to {', '.join(pinned)}"


def _rule_extensions(case: Case) -> str:
    role, asked = case.role, dict(case.request.extensions)
    dropped = [name for name in asked if name not in role.allowed_extensions]
    if role.unlisted_extensions == "drop":
        asked = {name: value for name, value in asked.items() if name in role.allowed_extensions}
    outside = sorted(set(asked) - role.allowed_extensions)
    if outside:
        raise Refused(
            "extension_not_allowed",
            f"role {role.name} does not allow {', '.join(map(_show, outside[:8]))}",
            f"it allows {', '.join(sorted(role.allowed_extensions)) or 'no extensions'}",
            {"extensions": outside},
        )
    values = {name: _fill((value,), case.identity)[0] for name, value in role.extension_values}
    for name, value in asked.items():
        if value and value != values.get(name):
            what = f"extension {name} has another value than the role pins"
            if name not in values:
                what = "an extension is a flag and takes no value"
            raise Refused("extension_has_value", what, 'send "" as its value')
    wanted = set(role.default_extensions) | set(asked)
    if "force-command" in case.critical_options:
        clash = sorted(CLOSED_BY_FORCE_COMMAND & set(asked))
        if clash:
            raise Refused(
                "extension_against_force_command",
                f"{clash[0]} would bypass the forced command",
                f"omit {', '.join(clash)}",
            )
        wanted -= CLOSED_BY_FORCE_COMMAND
    if role.no_touch_required:
        wanted.add("no-touch-required")
    case.extensions = tuple(sorted(wanted))
    case.extension_values = tuple((name, values[name]) for name in case.extensions if name in values)
    listed = _list_options({name: values.get(name, "") for name in case.extensions})
    return f"{listed}; dropped: {', '.join(map(_show, sorted(dropped)[:8]))}" if dropped else listed


def _rule_reason(case: Case) -> str:
    reason = case.request.reason
    if not reason:
        if case.role.reason_required:
            raise Refused("reason_missing", f"role {case.role.name} requires a reason", "pass `--reason TEXT`")
        return "none, not required"
    if case.role.reason_required and sum(map(_is_letter_or_digit, reason)) < MIN_REASON_LETTERS:
        raise Refused(
            "reason_too_short",
            f"the reason has fewer than {MIN_REASON_LETTERS} letters and digits",
            "pass `--reason TEXT` with a ticket or a few words",
        )
    if len(reason) > MAX_REASON or not reason.isprintable():
        raise Refused(
            "reason_malformed",
            f"the reason must be one line of at most {MAX_REASON} printable characters",
            "shorten it",
        )
    return "given"


def _is_letter_or_digit(character: str) -> bool:
    return unicodedata.category(character)[0] in "LN" and character not in _BLANK_LETTERS


def _rule_limits(case: Case) -> str:
    limits, usage = case.role.limits, case.usage
    if limits.per_minute is not None and usage.last_minute >= limits.per_minute:
        raise Refused(
            "rate_limited",
            f"{case.identity.name} had {limits.per_minute} certificates of role {case.role.name} within 60 s",
            f"retry in {usage.minute_frees_in} s",
            {"retry_after_s": usage.minute_frees_in},
        )
    if limits.live is not None and usage.live >= limits.live:
        raise Refused(
            "too_many_live",
            f"{case.identity.name} holds {limits.live} certificates of role {case.role.name} that are still valid",
            f"the first of them expires in {usage.live_frees_in} s",
            {"retry_after_s": usage.live_frees_in},
        )
    return f"{usage.last_minute} in the last minute, {usage.live} live"


def _rule_approval(case: Case) -> str:
    """Reports whose signatures the core will ask for; to ask them is no refusal."""
    role, kind = case.role, case.identity.kind
    if role.break_glass and kind != "human":
        raise Refused("break_glass_humans_only", f"role {role.name} is for humans only", "ask a human")
    if role.break_glass:
        return f"break-glass: {case.identity.name} signs, and an incident opens"
    needed = []
    if (approval := role.approval) is not None and kind in approval.kinds:
        needed.append(f"{kind}s need {approval.count} of {' or '.join(approval.by)}")
    if role.presence and kind == "human":
        needed.append("humans sign for themselves")
    return f"would be asked: {', '.join(needed)}" if needed else "not needed"


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
    """The name of a rule in an explanation, such as `certificate type`."""
    return rule.__name__.removeprefix("_").removeprefix("rule_").replace("_", " ")


def _check_option_value(name: str, value: str) -> None:
    """Raises `Refused` for a value that sshd would reject."""
    if name == "verify-required" and value:
        raise Refused("critical_option_malformed", "verify-required is a flag and takes no value", 'send ""')
    if name == "force-command" and (not value or not value.isprintable()):
        raise Refused(
            "critical_option_malformed", "force-command must be one line of printable text", "correct its value"
        )
    if name == "source-address":
        try:
            check_cidr_list(value)
        except ValueError as fault:
            raise Refused(
                "critical_option_malformed", f"source-address: {fault}", "send a comma list of CIDR blocks"
            ) from None


def check_cidr_list(text: str) -> tuple[str, ...]:
    """The CIDR blocks of a comma list, as sshd parses them; raises `ValueError` with a message."""
    blocks = text.split(",")
    for block in blocks:
        try:
            # ip_network accepts netmasks and zones; sshd does not, and rejects every login with such a list.
            if _CIDR.fullmatch(block) is None:
                raise ValueError
            ipaddress.ip_network(block)
        except ValueError:
            raise ValueError(f"{block[:64]!a} is not a CIDR block with all host bits zero") from None
    return tuple(blocks)


def _list_options(options: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" if value else name for name, value in sorted(options.items())) or "none"


def _show(name: str) -> str:
    """A caller's text for a message: shortened, with control characters escaped."""
    return plain(name[:64]) or "''"
