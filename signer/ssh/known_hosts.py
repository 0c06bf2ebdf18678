"""Names and keys of hosts as known_hosts has them (sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT"), and files of host keys.

Strict: what is written into a list for clients is a plain name and a plain key, never a pattern, a marker, a hash or a
certificate. Pure. Raises `BadRequest` only.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from typing import Final

from signer.errors import BadPublicKey, BadRequest
from signer.model import MAX_HOST_PRINCIPALS, MAX_PUBLIC_KEY, PRINCIPAL, PublicKey
from signer.ssh.publickey import CA_KEY_KINDS, parse_public_key, render_public_key

HOST_KEY_KINDS: Final = CA_KEY_KINDS  # a FIDO key needs a touch at each login
MIN_HOST_RSA_BITS: Final = 2048  # of a host's key
MAX_NAME: Final = 253  # characters of a host name (RFC 1035 section 2.3.4), without brackets and port
MAX_KEY_FILE: Final = 64 * 1024  # characters
_SSH_PORT: Final = 22
_LABEL: Final = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST_NAME: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*", re.ASCII)
_LOOKS_NUMERIC: Final = re.compile(
    r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)", re.ASCII
)  # the last label, as inet_aton reads it
_BEGINNINGS_OF_KINDS: Final = ("ssh-", "ecdsa-", "sk-")
_WITH_PORT: Final = re.compile(r"\[([^\[\]]+)\]:([0-9]{1,5})", re.ASCII)


def parse_host_name(text: str) -> str:
    """A host name or an IP address, `[NAME]:PORT` for another port than 22, as ssh looks it up: in lower case."""
    match = _WITH_PORT.fullmatch(text)
    host, port = (match[1], int(match[2])) if match else (text, _SSH_PORT)
    if not 1 <= port <= 65_535:
        raise _bad_name(text, "its port must be from 1 to 65535")
    name = _parse_bare(host.lower(), text)
    return name if port == _SSH_PORT else f"[{name}]:{port}"


def _parse_bare(host: str, text: str) -> str:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if len(host) > MAX_NAME or _HOST_NAME.fullmatch(host) is None or _LOOKS_NUMERIC.fullmatch(host):
            raise _bad_name(text, "it is neither a host name nor an IP address") from None
        return host
    if isinstance(address, ipaddress.IPv6Address) and (address.scope_id is not None or address.ipv4_mapped):
        raise _bad_name(text, "it is an address with a zone, or an IPv4 address written as IPv6")
    return str(address)


def _bad_name(text: str, why: str) -> BadRequest:
    return BadRequest(
        "host_name_malformed",
        f"{text[:80]!a} cannot be listed as a host: {why}",
        "write a name such as edge1.example, an IP address, or [NAME]:PORT; no patterns",
    )


def parse_host_principals(names: Iterable[str]) -> tuple[str, ...]:
    """The principals that a host lets in, sorted, each once; raises `BadRequest` unless they are 1 to 64 names that a
    certificate can have."""
    found = tuple(sorted(set(names)))
    if not found:
        raise _bad_principals(
            "the list of principals is empty", "name those of the host's principals files, or leave the list out"
        )
    if len(found) > MAX_HOST_PRINCIPALS:
        text = f"{len(found)} principals were given; a host may have {MAX_HOST_PRINCIPALS}"
        raise _bad_principals(text, "give fewer principals")
    for name in found:
        if PRINCIPAL.fullmatch(name) is None:
            hint = "use only letters, digits and ._@:+=/$~-, as in the host's principals files"
            raise _bad_principals(f"{name[:64]!a} is not a valid principal", hint)
    return found


def _bad_principals(text: str, hint: str) -> BadRequest:
    return BadRequest("host_principals_malformed", text, hint)


def parse_host_key(line: str) -> PublicKey:
    """The public key in a line `type base64[ comment]`, if it may be a host's."""
    line = line.strip()
    try:
        key = parse_public_key(line)
    except BadPublicKey as fault:
        if fault.code == "public_key_kind_unknown":
            raise _bad_key(f"its kind is not one of {', '.join(sorted(HOST_KEY_KINDS))}") from None
        raise _bad_key(fault.text) from None
    if key.kind not in HOST_KEY_KINDS:
        raise _bad_key(f"{key.kind} is not a kind of host keys")
    if key.kind == "ssh-rsa" and key.bits < MIN_HOST_RSA_BITS:
        raise _bad_key(f"an RSA key of {key.bits} bits; at least {MIN_HOST_RSA_BITS} are required")
    return key


def _bad_key(why: str) -> BadRequest:
    return BadRequest(
        "host_key_refused",
        f"not a usable host key: {why}",
        "send plain keys as in /etc/ssh/ssh_host_ed25519_key.pub, without certificates and markers",
    )


def key_line(key: PublicKey) -> str:
    """The key as the list has it: `type base64`."""
    return render_public_key(key.kind, key.blob)


def known_hosts_lines(names: Sequence[str], keys: Sequence[str]) -> str:
    """The lines of one host, of names as `parse_host_name` and keys as `key_line` returns them."""
    every = ",".join(names)
    return "".join(f"{every} {key}\n" for key in keys)


def read_key_file(text: str, names: Sequence[str]) -> list[PublicKey]:
    """The keys in the output of `ssh-keyscan`, or in `.pub` files of a host; each once, in the order of the file.

    Lines of ssh-keyscan must be about one of `names`: so that a file about several hosts gives none of them the keys of
    another. Raises `BadRequest`, which names the line.
    """
    if len(text) > MAX_KEY_FILE:
        raise BadRequest("host_keys_too_large", f"the keys have more than {MAX_KEY_FILE} characters", "give one host's")
    found: dict[bytes, PublicKey] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            key = _read_line(words, names)
        except BadRequest as fault:
            raise BadRequest(fault.code, f"line {number}: {fault.text}", fault.hint) from None
        found.setdefault(key.blob, key)
    if not found:
        raise BadRequest(
            "host_keys_missing", "there is no key", "give the output of ssh-keyscan, or /etc/ssh/ssh_host_*_key.pub"
        )
    return list(found.values())


def _read_line(words: list[str], names: Sequence[str]) -> PublicKey:
    if words[0].startswith("@"):
        raise _bad_key(f"it has the marker {words[0][:32]!a}")
    if len(words) > 2 and words[1].startswith(_BEGINNINGS_OF_KINDS):
        if words[0].startswith("|"):
            raise BadRequest("host_name_malformed", "the name is hashed", "run ssh-keyscan without -H")
        for name in words[0].split(","):
            if parse_host_name(name) not in names:
                raise BadRequest(
                    "host_key_of_another",
                    f"the key is of {name[:80]!a}, not of {', '.join(names)}",
                    "give the keys of one host, and its other names and addresses with --also",
                )
        words = words[1:]
    if len(words) < 2 or len(words[1]) > MAX_PUBLIC_KEY:
        raise _bad_key("it is not a line `type base64`")
    return parse_host_key(f"{words[0]} {words[1]}")
