"""What humans read of a request before they decide, in words: at the command line and in the console. Pure.

`frozen` is always the object of a request's frozen fields, whose digest is signed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from signer.errors import BadFormat
from signer.units import parse_timestamp, render_duration

_DIFFERENCES: Final = ("role", "key_id", "principals", "critical_options", "extensions", "ttl", "address")
_ROUNDING: Final = 2  # seconds by which two times to live may differ: both clocks are cut to the second


def opens(frozen: Mapping[str, Any]) -> str:
    """What the certificate opens, a forced command first."""
    names = frozen["principals"]
    hosts = f"every host that accepts principal {' or '.join(names)}"
    if (command := frozen["critical_options"].get("force-command")) is not None:
        return f"runs only `{command}` on {hosts}"
    return f"opens {hosts}, for any command"


def as_ssh_keygen(frozen: Mapping[str, Any]) -> Iterator[str]:
    """The lines of `ssh-keygen -L` for the certificate, with words for what is set when it is issued."""
    # `requests list` does not need it.
    from signer.ssh.fingerprint import fingerprint_of
    from signer.ssh.publickey import certificate_kind, parse_public_key

    binding = frozen["binding"]
    kind, key = "", f"made when it is claimed, with the secret {binding.get('claim_sha256', '?')}"
    if (line := binding.get("public_key")) is not None:
        found = parse_public_key(line)
        kind, key = f"{certificate_kind(found.kind)} ", fingerprint_of(found.blob)
    yield f"Type: {kind}user certificate"
    yield f"Public key: {key}"
    yield f'Key ID: "{frozen["key_id"]}"'
    yield "Serial: allotted when it is issued"
    yield f"Valid: {render_duration(frozen['ttl'])} from when it is claimed"
    yield from _listed("Principals", frozen["principals"])
    yield from _listed(
        "Critical Options", [f"{name} {value}".strip() for name, value in _sorted(frozen, "critical_options")]
    )
    yield from _listed("Extensions", [f"{name} {value}".strip() for name, value in _sorted(frozen, "extensions")])


def _sorted(frozen: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    return sorted(frozen[name].items())


def _listed(title: str, values: Sequence[str]) -> Iterator[str]:
    yield f"{title}:" if values else f"{title}: (none)"
    yield from (f"        {value}" for value in values)


def of_certificate(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a certificate, as far as a frozen request can be compared with it; raises `BadFormat`."""
    return {
        **record,
        "ttl": seconds_of(str(record["valid_before"])) - seconds_of(str(record["recorded"]["time"])),
        "extensions": dict(name.partition("=")[::2] for name in record["extensions"]),
    }


def differences(frozen: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, value now and value before of each field that differs; `before` is another frozen request, or what
    `of_certificate` returns."""
    for name in _DIFFERENCES:
        old, new = before.get(name), frozen[name]
        if name == "ttl" and old is not None and abs(new - old) <= _ROUNDING:
            continue
        if old != new:
            yield name.replace("_", " "), _value(name, new), _value(name, old)


def _value(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if name == "ttl":
        return render_duration(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {text}".strip() for key, text in sorted(value.items())) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def seconds_of(text: str) -> int:
    """Seconds since 1970 of a time of the service; raises `BadFormat`."""
    try:
        return parse_timestamp(text)
    except (ValueError, OverflowError):
        raise BadFormat("bad_approval_request", "the service sent an invalid time", "check its address") from None
