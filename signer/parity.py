"""Are we the same as Vault? A role beside Vault's role, a certificate beside Vault's certificate, field by field. Pure.

An `error` is anything by which ours gives more than Vault's, or names other principals: with it nobody may cut over.
A `note` is where ours gives less, or says the same in another way; each says why.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final, Literal

from signer.duration import render_duration
from signer.policy import BACKDATE
from signer.ssh.certificate import CertificateFields

# Seconds by which two clocks, and the way there and back, may make two certificates of one request differ.
CLOCKS: Final = 60
Severity = Literal["error", "note"]
Options = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """One field that is not the same; both values as text for people. `why` says what that means."""

    field: str
    ours: str
    vaults: str
    severity: Severity
    why: str

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def errors_in(found: list[Difference]) -> list[Difference]:
    """Those that stand against a cutover."""
    return [difference for difference in found if difference.severity == "error"]


# --- certificates ----------------------------------------------------------------------------------------------------


def compare_certificates(ours: CertificateFields, vaults: CertificateFields) -> list[Difference]:
    """What differs between two certificates made of one request; nonce, serial, CA key and signature must differ."""
    return [
        *_exact("key_kind", ours.key_kind, vaults.key_kind, "they are for keys of different types"),
        *_exact("public_key", ours.key.hex(), vaults.key.hex(), "they are for different keys"),
        *_exact("cert_type", str(ours.cert_type), str(vaults.cert_type), "one is not a user certificate"),
        *_key_ids(ours.key_id, vaults.key_id),
        *compare_principals("principals", ours.principals, vaults.principals),
        *_times(ours, vaults),
        *compare_critical_options("critical_options", ours.critical_options, vaults.critical_options),
        *_extensions(ours.extensions, vaults.extensions),
    ]


def _exact(field: str, ours: str, vaults: str, why: str) -> Iterator[Difference]:
    if ours != vaults:
        yield Difference(field, ours, vaults, "error", why)


def _key_ids(ours: str, vaults: str) -> Iterator[Difference]:
    if ours != vaults:
        why = "Vault makes it of its token and the key, we of identity and role; hosts log it and decide nothing by it"
        yield Difference("key_id", ours, vaults, "note", why)


def compare_principals(field: str, ours: tuple[str, ...], vaults: tuple[str, ...]) -> Iterator[Difference]:
    """Both ways an error: one more opens accounts, one less (or another) is not the login that there was."""
    added, missing = sorted(set(ours) - set(vaults)), sorted(set(vaults) - set(ours))
    if added:
        why = f"ours adds {', '.join(added)}: principals may never widen"
    elif missing:
        why = f"ours leaves out {', '.join(missing)}: who logs in with it today could not any more"
    else:
        return
    yield Difference(field, _names(ours), _names(vaults), "error", why)


def _times(ours: CertificateFields, vaults: CertificateFields) -> Iterator[Difference]:
    life, theirs = ours.valid_before - ours.valid_after, vaults.valid_before - vaults.valid_after
    if life > theirs + BACKDATE:
        yield Difference("lifetime", _span(life), _span(theirs), "error", "ours lives longer")
    elif life > theirs:
        why = f"ours begins {BACKDATE} s before it was made, for hosts whose clock is behind"
        yield Difference("lifetime", _span(life), _span(theirs), "note", why)
    elif life < theirs:
        yield Difference("lifetime", _span(life), _span(theirs), "note", "ours lives shorter")
    for field, mine, other in (
        ("valid_after", ours.valid_after, vaults.valid_after),
        ("valid_before", ours.valid_before, vaults.valid_before),
    ):
        is_told = field == "valid_before" and life != theirs  # as its lifetime
        if abs(mine - other) > CLOCKS and not is_told:
            wider = mine < other if field == "valid_after" else mine > other
            why = f"they differ by more than {CLOCKS} s: are both clocks right"
            yield Difference(field, str(mine), str(other), "error" if wider else "note", why)


def compare_critical_options(field: str, ours: Options, vaults: Options) -> Iterator[Difference]:
    """Critical options restrict, so one that ours lacks, or that lets more through, is an error."""
    mine, others = dict(ours), dict(vaults)
    for name in sorted({*mine, *others}):
        at = f"{field}.{name}"
        if name not in mine:
            yield Difference(at, "none", _value(others[name]), "error", "ours does not restrict this")
        elif name not in others:
            yield Difference(at, _value(mine[name]), "none", "note", "ours restricts this, Vault does not")
        elif mine[name] != others[name]:
            if name == "source-address" and _lies_within(mine[name], others[name]):
                yield Difference(at, mine[name], others[name], "note", "every address of ours is one of Vault's")
            else:
                yield Difference(at, _value(mine[name]), _value(others[name]), "error", "ours restricts something else")


def _lies_within(ours: str, vaults: str) -> bool:
    """True if both are lists of CIDR blocks and each block of ours lies in one of Vault's."""
    try:
        mine = [ipaddress.ip_network(block) for block in ours.split(",")]
        others = [ipaddress.ip_network(block) for block in vaults.split(",")]
    except ValueError:
        return False
    return all(any(_in(block, other) for other in others) for block in mine)


def _in(
    block: ipaddress.IPv4Network | ipaddress.IPv6Network, other: ipaddress.IPv4Network | ipaddress.IPv6Network
) -> bool:
    if isinstance(block, ipaddress.IPv4Network) and isinstance(other, ipaddress.IPv4Network):
        return block.subnet_of(other)
    if isinstance(block, ipaddress.IPv6Network) and isinstance(other, ipaddress.IPv6Network):
        return block.subnet_of(other)
    return False


def _extensions(ours: Options, vaults: Options) -> Iterator[Difference]:
    added, missing = sorted(set(ours) - set(vaults)), sorted(set(vaults) - set(ours))
    shown = _names(tuple(map(_option, ours))), _names(tuple(map(_option, vaults)))
    if added:
        why = f"ours adds {', '.join(map(_option, added))}"
        yield Difference("extensions", *shown, "error", why)
    elif missing:
        why = f"ours leaves out {', '.join(map(_option, missing))}: logins that need it will miss it"
        yield Difference("extensions", *shown, "note", why)


def _option(option: tuple[str, str]) -> str:
    name, value = option
    return f"{name}={value}" if value else name


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"


def _value(value: str) -> str:
    return value or "set"


def _span(seconds: int) -> str:
    return render_duration(seconds) if seconds >= 0 else f"-{render_duration(-seconds)}"
