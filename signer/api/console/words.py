"""What the console says of roles, events and times in plain words. Pure; templates escape all of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from signer.protocol.replies import GrantedRole, LedgerEntry, MarkRow
from signer.units import cut, parse_timestamp, plain, render_span

Line = tuple[str, str]  # what it is about, and a sentence
LONGEST: Final = 160  # characters of one value, and of the facts of one event
_KINDS: Final = {"agent": "agents", "human": "humans", "workload": "workloads"}
_A_KEY: Final = {"ssh": "a key of OpenSSH", "webauthn": "a passkey"}
_DIGEST: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
# The fields that describe an event, best first; all other values are on the page of the ledger as they are.
_DESCRIBING: Final = (
    "serial", "role", "principals", "code", "text", "scope", "reason", "why", "count", "request", "waiver", "incident",
    "operation", "outcome", "by", "value", "from", "to", "name", "reference", "error", "policy", "version", "mode",
    "session", "public_key", "address",
)  # fmt: skip


def explain_role(role: GrantedRole, kind: str) -> Iterator[Line]:
    """What the role gives to an identity of that kind (human, agent, workload), line by line."""
    yield "Logs in as", _principals(role)
    default, longest = render_span(role.default_ttl), render_span(role.max_ttl)
    yield "For", f"{default}; at most {longest} if it asks for that" if default != longest else f"{default}, no longer"
    yield "Who agrees", who_agrees(role, kind)
    if role.force_command is not None:
        yield "Runs", f"only {role.force_command}"
    elif "force-command" in role.critical_options:
        yield "Runs", "any command, or the one that the certificate is asked for"
    else:
        yield "Runs", "any command"
    yield "From", _addresses(role.source_address)
    yield "May use", _extensions(role)
    yield "Keys", _keys(role)
    if role.per_minute is not None or role.live is not None:
        limits = [f"{role.per_minute} certificates a minute"] if role.per_minute is not None else []
        limits += [f"{role.live} that are valid at once"] if role.live is not None else []
        yield "At most", " and ".join(limits)
    if role.reason_required:
        yield "Has to say", "why, for each certificate"
    yield "Holds now", f"{role.holds:,} certificate{'' if role.holds == 1 else 's'}"


def who_agrees(role: GrantedRole, kind: str) -> str:
    """Whose signature a certificate of the role needs."""
    if role.break_glass:
        return (
            "nobody else: the asker signs with an approval key, and an incident stays open until it is closed. With "
            "an open incident, a second human has to agree"
        )
    own = "the asker signs with an approval key" if role.presence and kind == "human" else ""
    approval = role.approval
    if approval is None or kind not in approval.kinds:
        if own:
            return own
        kinds = "" if approval is None else " and ".join(_KINDS[name] for name in approval.kinds)
        return f"nobody; {kinds} need a human" if kinds else "nobody"
    humans = "one human" if approval.count == 1 else f"{approval.count} humans"
    keys = " or ".join(_A_KEY.get(name, name) for name in approval.key_kinds)
    agrees = f"{humans} of {' or '.join(approval.by)}, by {keys}"
    good = f"an approval is good for {render_span(approval.valid_for)}"
    waiver = "; a waiver may cover later requests" if approval.waivers and not own else ""
    return f"{own + ', and ' if own else ''}{agrees}; {good}{waiver}"


def _principals(role: GrantedRole) -> str:
    names = ", ".join(role.principals) or "nobody"
    if not role.default_principals:
        return f"{names}; it has to name one"
    chosen = ", ".join(role.default_principals)
    return names if chosen == names else f"{names}; {chosen} if it names none"


def _addresses(pinned: Sequence[str] | str | None) -> str:
    if pinned is None:
        return "any address"
    return "the address that it asked from" if isinstance(pinned, str) else ", ".join(pinned)


def _extensions(role: GrantedRole) -> str:
    extensions = role.extensions
    if not extensions.allowed:
        return "nothing besides the command"
    named = [f"{name}={extensions.values[name]}" if name in extensions.values else name for name in extensions.allowed]
    if set(extensions.default) == set(extensions.allowed):
        return f"{', '.join(named)}, without asking"
    if not extensions.default:
        return f"{', '.join(named)}, if it asks for them"
    return f"{', '.join(named)}; {', '.join(extensions.default)} without asking"


def _keys(role: GrantedRole) -> str:
    bits = f" from {role.rsa_min_bits:,} bits"
    kinds = ", ".join(f"{kind}{bits}" if kind == "ssh-rsa" else kind for kind in role.key_types)
    which = "" if role.any_key else "; only those that policy.toml names"
    verified = "; each login verifies the user (PIN or fingerprint)" if role.verify_required else ""
    return f"{kinds or 'none'}{which}{verified}"


# --- events and times -----------------------------------------------------------------------------------------------


def summarize(entry: LedgerEntry) -> str:
    """The most telling facts of an event on one line of at most `LONGEST` characters."""
    asked = entry.body.get("frozen")  # what a request asks for
    body = {**(asked if isinstance(asked, Mapping) else {}), **entry.body}
    found = [f"{name} {_value(body[name])}" for name in _DESCRIBING if body.get(name) not in (None, "", [])]
    return shorten(", ".join(found))


def _value(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={item}" for name, item in value.items())
    text = str(value)
    return f"{text[:16]}…" if _DIGEST.fullmatch(text) else text


def shorten(text: object, most: int = LONGEST) -> str:
    """`text` on one line, without control characters, cut off after `most` characters."""
    return cut(plain(text), most)


def facts(fields: Mapping[str, object]) -> Iterator[Line]:
    """Names and values of an object as they are, with those of objects in it."""
    for name, value in fields.items():
        title = name.replace("_", " ")
        if isinstance(value, Mapping) and value:
            for inner, text in facts(value):
                yield f"{title}: {inner}", text
        elif isinstance(value, bool):
            yield title, "yes" if value else "no"
        elif value in (None, "", [], {}):
            yield title, "none"
        else:
            yield title, plain(value if isinstance(value, str) else _value(value))


def time_left(until: str, now: int) -> str:
    """How long a certificate with that `valid_before` is still valid at `now` (seconds since 1970)."""
    seconds = parse_timestamp(until) - now
    return render_span(seconds) if seconds > 0 else "over"


def age(since: str, now: int) -> str:
    return f"{render_span(max(now - parse_timestamp(since), 0))} ago"


def done(mark: MarkRow, now: int) -> str:
    """Up to which event something was done, and how long ago."""
    return f"{mark.events:,} events, {age(mark.since, now)}"


def size(count: int) -> str:
    """A number of bytes for humans."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 10 else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
