"""Passkeys of approvers: the values of a line of policy.toml, and what a browser's enrolment page gives. Pure.

WebAuthn Level 3. A public key is what `getPublicKey()` returns (section 5.2.1.1), a DER SubjectPublicKeyInfo, so that
no CBOR is read anywhere. Assertions are verified by `authority/webauthn.py`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from signer.errors import BadFile
from signer.model import Passkey, hide_tokens
from signer.ssh.fingerprint import fingerprint_of

MAX_ENROLMENT: Final = 8 * 1024  # bytes of the file; one with an id of 1,023 bytes has 1,800
MAX_ID: Final = 1023  # bytes, section 4, "Credential ID"
MAX_PUBLIC_KEY: Final = 1024  # bytes of DER; a P-256 key has 91, an RSA key, which is refused as such, 300
MAX_ORIGINS: Final = 8
ENROLMENT_FIELDS: Final = ("id", "public_key", "rp", "origin")
_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]*", re.ASCII)
_LABEL: Final = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_DOMAIN: Final = re.compile(rf"(?:{_LABEL}\.)+[a-z][a-z0-9-]{{0,61}}[a-z0-9]", re.ASCII)  # not an IP address
_ORIGIN: Final = re.compile(r"(https?)://([a-z0-9.-]{1,253})(?::([1-9][0-9]{0,4}))?", re.ASCII)
_DEFAULT_PORTS: Final = {"https": 443, "http": 80}
_LOCALHOST: Final = "localhost"

PasskeyPublicKey = ec.EllipticCurvePublicKey | Ed25519PublicKey
Problem = tuple[tuple[str | int, ...], str]  # the key of the line, and what is wrong with it


def decode_base64url(text: str, limit: int) -> bytes:
    """The bytes of base64url without padding (RFC 4648 section 5), of which each value has one text.

    Raises `ValueError` with a sentence, also for more than `limit` bytes or none.
    """
    if not text or len(text) > -(-limit * 4 // 3):
        raise ValueError(f"is not 1 to {limit} bytes in base64url")
    if _BASE64URL.fullmatch(text) is None or len(text) % 4 == 1:
        raise ValueError("is not base64url without padding")
    raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if encode_base64url(raw) != text:
        raise ValueError("is not base64url without padding: its last character has bits that belong to no byte")
    return raw


def encode_base64url(raw: bytes) -> str:
    """Base64url without padding."""
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def read_json_object(raw: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8 without a byte order mark, in which no object has a name twice; raises `ValueError`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) != len(dict(pairs)):
            raise ValueError("a name comes twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        found = json.loads(raw.decode(), object_pairs_hook=once, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError("it is not an object")  # noqa: TRY004 - a fault of the text, not of the caller
    return found


def load_passkey(der: bytes) -> PasskeyPublicKey:
    """The public key of a SubjectPublicKeyInfo: P-256 (ES256) or Ed25519 (EdDSA); raises `ValueError`."""
    try:
        key = load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("is not the DER of a public key, as getPublicKey() returns it") from None
    is_p256 = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
    if not isinstance(key, ec.EllipticCurvePublicKey | Ed25519PublicKey) or not (
        is_p256 or isinstance(key, Ed25519PublicKey)
    ):
        raise ValueError("is not a P-256 or Ed25519 key: enrol with pubKeyCredParams -7 (ES256) or -8 (EdDSA)")
    if key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != der:
        raise ValueError("is not in the form that getPublicKey() returns (DER, uncompressed point)")
    return key


def read_passkey(name: str, public_key: str, rp: str, origins: list[str]) -> tuple[Passkey | None, list[Problem]]:
    """The passkey of a line's values, and what is wrong with them; no passkey if its id or its key cannot be read."""
    problems: list[Problem] = []
    der = b""
    for key, text, limit in (("id", name, MAX_ID), ("public_key", public_key, MAX_PUBLIC_KEY)):
        try:
            raw = decode_base64url(text, limit)
            if key == "public_key":
                load_passkey(raw)
                der = raw
        except ValueError as fault:
            problems.append(((key,), str(fault)))
    is_readable = not problems
    problems += _place_problems(rp, origins)
    passkey = Passkey(name, public_key, rp, tuple(origins), fingerprint_of(der)) if is_readable else None
    return passkey, problems


def _place_problems(rp: str, origins: list[str]) -> Iterator[Problem]:
    """What is wrong with a relying party and the origins of its pages."""
    if rp != _LOCALHOST and (len(rp) > 253 or _DOMAIN.fullmatch(rp) is None):
        yield ("rp",), f"{rp[:64]!a} is not a domain in lower case, such as signer.example.org"
    elif hide_tokens(rp) != rp:  # the ledger would hide it, and the approval would not verify later
        yield ("rp",), f"{rp[:64]!a} has the form of a token: use another domain"
    if not origins:
        yield ("origins",), "is empty: name the origin of a page"
    if len(origins) > MAX_ORIGINS:
        yield ("origins",), f"has {len(origins)} origins; {MAX_ORIGINS} are allowed"
    for index, origin in enumerate(origins):
        if origin in origins[:index]:
            yield ("origins", index), f"{origin[:64]!a} is listed twice"
        if (sentence := _origin_problem(origin, rp)) is not None:
            yield ("origins", index), sentence


def _origin_problem(origin: str, rp: str) -> str | None:
    """What is wrong with the origin of a page: its form (RFC 6454 section 6.2), or that it is not one of `rp`'s."""
    found = _ORIGIN.fullmatch(origin)
    if found is None:
        return f"{origin[:64]!a} is not an origin as browsers write it, such as https://signer.example.org"
    scheme, host, port = found.groups()
    if host != _LOCALHOST and _DOMAIN.fullmatch(host) is None:
        return f"{host[:64]!a} is not a domain: browsers offer no passkeys on pages of IP addresses"
    if port is not None and (int(port) > 65_535 or int(port) == _DEFAULT_PORTS[scheme]):
        return f"{origin[:64]!a} has a port that browsers do not write: leave it out"
    if scheme == "http" and host != _LOCALHOST:
        return f"{origin[:64]!a} is not https; only http://localhost may be without TLS"
    if host != rp and not host.endswith(f".{rp}"):
        return f"{origin[:64]!a} is not a page of {rp[:64]!a}: its host must be rp, or end in a dot and rp"
    if hide_tokens(origin) != origin:
        return f"{origin[:64]!a} has the form of a token: use another host"
    return None


# --- enrolment --------------------------------------------------------------------------------------------------------


def read_enrolment(raw: bytes) -> tuple[Passkey, dict[str, object]]:
    """The passkey that an enrolment page gives, and the entry of `approval_keys` for it.

    `raw` is a JSON object with the texts `id`, `public_key`, `rp` and `origin`, and nothing else. Raises `BadFile`.
    """
    found = _read_object(raw)
    passkey, problems = read_passkey(found["id"], found["public_key"], found["rp"], [found["origin"]])
    if passkey is None or problems:
        raise _bad_enrolment(
            "; ".join(f"{'origin' if at[0] == 'origins' else at[0]} {sentence}" for at, sentence in problems)
        )
    entry: dict[str, object] = {
        "kind": "webauthn",
        "id": passkey.id,
        "public_key": passkey.public_key,
        "rp": passkey.rp,
        "origins": list(passkey.origins),
    }
    return passkey, entry


def _read_object(raw: bytes) -> dict[str, str]:
    if len(raw) > MAX_ENROLMENT:
        raise _bad_enrolment(f"it has more than {MAX_ENROLMENT} bytes")
    try:
        found = read_json_object(raw)
    except ValueError:
        raise _bad_enrolment("it is not a JSON object in UTF-8 with each name once") from None
    if set(found) != set(ENROLMENT_FIELDS):
        raise _bad_enrolment(f"it does not have {', '.join(ENROLMENT_FIELDS)} and nothing else")
    if not all(isinstance(value, str) for value in found.values()):
        raise _bad_enrolment("a value in it is not text")
    return found


def _bad_enrolment(why: str) -> BadFile:
    return BadFile("enrolment_malformed", f"the enrolment cannot be used: {why}", "save what the page gave, unchanged")
