"""The rules of a decision, in Vault's order of errors.

A rule reads a `Case` and sets its part of the certificate in it, or raises `Refused`; a second function describes what
it found, which only an explanation shows. A new rule is two functions here and an entry in `RULES`.
`runbooks/develop/vault-contract.md`, section 3, has the order. Pure.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import msgspec

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


class Case(msgspec.Struct):
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
    critical_options: dict[str, str] = msgspec.field(default_factory=dict)
    extensions: tuple[str, ...] = ()
    extension_values: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """`check` raises `Refused`, or sets its part of the case; `describe` says in words what that is, before the next
    rule is checked."""

    name: str
    check: Callable[[Case], None]
    describe: Callable[[Case], str]


def allowed_principals(role: Role, identity: Identity) -> frozenset[str]:
    """The role's principals with `{identity}` filled in."""
    return _fill(role.principals, identity.name)


@lru_cache(maxsize=1024)  # of roles and identities of the policy
def _fill(names: tuple[str, ...], identity: str) -> frozenset[str]:
    return frozenset(name.replace("{identity}", identity) for name in names)


def _check_key(case: Case) -> None:
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


def _describe_key(case: Case) -> str:
    key = case.key
    return "no key" if key is None else f"{key.kind} {key.fingerprint}, allowed"


def _check_key_id(case: Case) -> None:
    asked = case.request.key_id
    if asked is None:
        case.key_id = f"{case.identity.name}:{case.role.name}"
        return
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


def _source(asked: object, otherwise: str = "default") -> str:
    return otherwise if asked is None else "requested"


def _check_certificate_type(case: Case) -> None:
    if case.request.cert_type == "user":
        return
    if case.request.cert_type == "host":
        raise Refused("cert_type_not_allowed", "host certificates are not issued here", "request cert_type user")
    raise Refused("cert_type_unknown", "cert_type must be user", "omit cert_type")


def _check_principals(case: Case) -> None:
    asked = case.request.principals
    if asked is None:
        case.principals = tuple(sorted(_fill(case.role.default_principals, case.identity.name)))
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


def _check_ttl(case: Case) -> None:
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


def _describe_ttl(case: Case) -> str:
    if case.request.ttl is None:
        return f"{render_duration(case.ttl)} (default)"
    return f"{render_duration(case.ttl)} requested, {render_duration(case.role.max_ttl)} allowed"


def _check_critical_options(case: Case) -> None:
    role, options = case.role, case.critical_options
    if case.request.critical_options:
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


def _check_source_address(case: Case) -> None:
    pinned = case.role.source_address
    if pinned is None:
        return
    if pinned == "caller":
        if case.address is None:
            raise Refused(
                "caller_address_unknown",
                f"role {case.role.name} binds to the caller's address, which is unknown",
                "connect without a proxy, or have the operator set SIGNER_TRUSTED_PROXIES",
            )
        address = ipaddress.ip_address(case.address)
        case.critical_options["source-address"] = f"{address}/{address.max_prefixlen}"
    else:
        case.critical_options["source-address"] = ",".join(pinned)


def _describe_source_address(case: Case) -> str:
    pinned = case.role.source_address
    if pinned is None:
        return "not pinned"
    if pinned == "caller":
        return f"pinned to the caller, {case.critical_options['source-address'].partition('/')[0]}"
    return f"pinned to {', '.join(pinned)}"


def _check_extensions(case: Case) -> None:
    role = case.role
    values = {name: value.replace("{identity}", case.identity.name) for name, value in role.extension_values}
    asked = _asked_extensions(case, values) if case.request.extensions else {}
    wanted = {*role.default_extensions, *asked}
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
    if values:
        case.extension_values = tuple((name, values[name]) for name in case.extensions if name in values)


def _asked_extensions(case: Case, values: Mapping[str, str]) -> dict[str, str]:
    """What a request asks for and the role does not drop; raises `Refused`. `values` are those that the role pins."""
    role, asked = case.role, dict(case.request.extensions)
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
    for name, value in asked.items():
        if value and value != values.get(name):
            what = f"extension {name} has another value than the role pins"
            if name not in values:
                what = "an extension is a flag and takes no value"
            raise Refused("extension_has_value", what, 'send "" as its value')
    return asked


def _describe_extensions(case: Case) -> str:
    values = dict(case.extension_values)
    listed = _list_options({name: values.get(name, "") for name in case.extensions})
    dropped = sorted(name for name in dict(case.request.extensions) if name not in case.role.allowed_extensions)
    return f"{listed}; dropped: {', '.join(map(_show, dropped[:8]))}" if dropped else listed


def _check_reason(case: Case) -> None:
    reason = case.request.reason
    if not reason:
        if case.role.reason_required:
            raise Refused("reason_missing", f"role {case.role.name} requires a reason", "pass `--reason TEXT`")
        return
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


def _is_letter_or_digit(character: str) -> bool:
    return unicodedata.category(character)[0] in "LN" and character not in _BLANK_LETTERS


def _check_limits(case: Case) -> None:
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


def _check_approval(case: Case) -> None:
    """Does not refuse what humans have to approve: the core asks them."""
    if case.role.break_glass and case.identity.kind != "human":
        raise Refused("break_glass_humans_only", f"role {case.role.name} is for humans only", "ask a human")


def _describe_approval(case: Case) -> str:
    role, kind = case.role, case.identity.kind
    if role.break_glass:
        return f"break-glass: {case.identity.name} signs, and an incident opens"
    needed = []
    if (approval := role.approval) is not None and kind in approval.kinds:
        needed.append(f"{kind}s need {approval.count} of {' or '.join(approval.by)}")
    if role.presence and kind == "human":
        needed.append("humans sign for themselves")
    return f"would be asked: {', '.join(needed)}" if needed else "not needed"


RULE_KEY: Final = Rule("key", _check_key, _describe_key)
RULES: Final = (
    RULE_KEY,
    Rule("key id", _check_key_id, lambda case: f"{case.key_id} ({_source(case.request.key_id, 'generated')})"),
    Rule("certificate type", _check_certificate_type, lambda _: "user"),
    Rule(
        "principals",
        _check_principals,
        lambda case: f"{', '.join(case.principals[:8])} ({_source(case.request.principals)})",
    ),
    Rule("ttl", _check_ttl, _describe_ttl),
    Rule("critical options", _check_critical_options, lambda case: _list_options(case.critical_options)),
    Rule("source address", _check_source_address, _describe_source_address),
    Rule("extensions", _check_extensions, _describe_extensions),
    Rule("reason", _check_reason, lambda case: "given" if case.request.reason else "none, not required"),
    Rule("limits", _check_limits, lambda case: f"{case.usage.last_minute} in the last minute, {case.usage.live} live"),
    Rule("approval", _check_approval, _describe_approval),
)
CHECKS: Final = tuple(rule.check for rule in RULES)


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
