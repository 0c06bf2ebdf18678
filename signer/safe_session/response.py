"""Reads the signing service's response: a certificate for the session's key, or an error. Pure; trusts no input."""

from __future__ import annotations

import binascii
from _json import make_scanner  # the C parser inside `json`; the package around it costs 15 ms for `re`

from signer.errors import BadFormat, NotAuthenticated, Refused, SignerError, Unavailable
from signer.safe_session.http import HttpResponse, unexpected_response
from signer.safe_session.statuses import Limited
from signer.ssh.wire import Reader

TYPE_CHECKING = False  # type checkers know the name; importing it from typing costs 20 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

CERTIFICATE_TYPE = "ssh-ed25519-cert-v01@openssh.com"
_USER_CERTIFICATE = 1
_LONGEST_LIFETIME = 24 * 3600  # the service's own limit
_LONGEST_NUMBER = 6  # digits of a Retry-After


class Certificate:
    """A checked certificate: `blob` for the agent, `serial` as read from it, `lifetime` in seconds from now; the names
    that it is for, the addresses that it is good from (a comma list, "" for any), and the blob of the CA's key."""

    def __init__(self, blob: bytes, serial: int, lifetime: int) -> None:
        self.blob = blob
        self.serial = serial
        self.lifetime = lifetime
        self.principals: list[str] = []
        self.source_address = ""
        self.ca_key = b""


class _Strict:
    """The settings of `json.loads` for `_json.make_scanner`, but without NaN."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int

    @staticmethod
    def parse_constant(name: str) -> object:
        raise ValueError(name)


def parse_object(text: str) -> dict[str, object]:
    """Parses a JSON object with optional white space around it. Raises `BadFormat`."""
    text = text.strip(" \t\r\n")
    try:
        value, end = make_scanner(_Strict)(text, 0)  # type: ignore[arg-type]  # any object with those names will do
    except (ValueError, StopIteration, RecursionError):
        raise BadFormat("bad_json", "the text is not JSON") from None
    if end != len(text) or type(value) is not dict:
        raise BadFormat("bad_json", "the text is not a JSON object")
    return value


def read_certificate(response: HttpResponse, public: bytes, place: str) -> Certificate:
    """The certificate in a 201 for the 32 bytes `public`. `place` is the service's address, for errors.

    Raises the service's error (`Refused`, `NotAuthenticated`, `Unavailable`), or `BadFormat` if the response or the
    certificate does not match the request.
    """
    fields = read_fields(response, place)
    if response.status != 201:
        raise read_problem(response, fields, place)
    line = fields.get("certificate")
    expires_in = fields.get("expires_in")
    if type(line) is not str or type(expires_in) is not int:
        raise unexpected_response(place, "no certificate in it")
    return check_certificate(line, public, expires_in)


def read_fields(response: HttpResponse, place: str) -> dict[str, object]:
    """The JSON object in a response of the service at `place`; raises `BadFormat`."""
    try:
        return parse_object(response.body.decode())
    except (BadFormat, UnicodeDecodeError):
        raise unexpected_response(place, f"status {response.status}, not JSON") from None


def read_problem(response: HttpResponse, fields: dict[str, object], place: str) -> SignerError:
    """The error for an RFC 9457 problem, with the service's own sentence and hint."""
    detail, hint, code = fields.get("detail"), fields.get("hint"), fields.get("code")
    if type(detail) is not str or not detail:
        return unexpected_response(place, f"status {response.status} without a reason")
    kind: type[SignerError] = Refused
    if response.status == 401:
        kind = NotAuthenticated
    elif response.status == 429:
        kind = Limited
    elif response.status >= 500:
        kind = Unavailable
    hint = hint if type(hint) is str else ""
    facts: dict[str, object] = {}
    seconds = retry_after(response)
    if seconds is not None and kind in (Limited, Unavailable):
        facts["retry_after_s"] = seconds
        if kind is Limited and f"{seconds} s" not in detail + hint:
            hint = f"try again in {seconds} s" + (f"; {hint}" if hint else "")
    return kind(code if type(code) is str else "refused", detail, hint, facts)


def retry_after(response: HttpResponse) -> int | None:
    """Seconds in `Retry-After` (RFC 9110 section 10.2.3, without dates)."""
    text = response.headers.get("retry-after", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _LONGEST_NUMBER else None


def problem_code(response: HttpResponse) -> str:
    """The code of an RFC 9457 problem, "" if there is none."""
    try:
        code = read_fields(response, "").get("code")
    except BadFormat:
        return ""
    return code if type(code) is str else ""


def check_certificate(line: str, public: bytes, expires_in: int) -> Certificate:
    """Reads `<type> <base64>` (draft-ietf-sshm-cert section 2.1) and checks all that a client can check:

    1. it is a complete Ed25519 certificate with no data after it;
    2. it certifies the key `public`;
    3. it is a user certificate;
    4. it has not expired. The lifetime is `expires_in`, by the service's clock, because the local clock may be wrong;
       at most the certificate's own validity period.

    Raises `BadFormat`. sshd checks the CA's signature: the client does not know the CA.
    """
    kind, _, encoded = line.strip().partition(" ")
    try:
        blob = binascii.a2b_base64(encoded.partition(" ")[0].encode("ascii"), strict_mode=True)
        reader = Reader(blob)
        inner_kind = reader.text()
        reader.string()  # nonce
        certified = reader.string()
        serial = reader.uint64()
        purpose = reader.uint32()
        reader.string()  # key id
        names = [name.decode(errors="replace") for name in _strings(reader.string())]
        span = -reader.uint64() + reader.uint64()
        source_address = _read_source_address(reader.string())
        _extensions, _reserved, ca_key, _signature = [reader.string() for _ in range(4)]
        reader.expect_end()
    except (ValueError, BadFormat):
        raise _unusable("it cannot be read") from None
    if kind != CERTIFICATE_TYPE or inner_kind != CERTIFICATE_TYPE:
        raise _unusable("it is not an Ed25519 certificate")
    if certified != public:
        raise _unusable("it is for another key")
    if purpose != _USER_CERTIFICATE:
        raise _unusable("it is not for a user")
    lifetime = min(expires_in, span, _LONGEST_LIFETIME)
    if lifetime <= 0:
        raise _unusable("it has expired")
    certificate = Certificate(blob, serial, lifetime)
    certificate.principals = names
    certificate.source_address = source_address
    certificate.ca_key = ca_key
    return certificate


def _read_source_address(options: bytes) -> str:
    """The value of the critical option `source-address`, "" without it. Raises `BadFormat`."""
    found = list(_strings(options))
    value = dict(zip(found[::2], found[1::2], strict=False)).get(b"source-address", b"")
    return Reader(value).string().decode(errors="replace") if value else ""


def _strings(blob: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(blob):
        piece = Reader(blob[at:]).string()
        yield piece
        at += 4 + len(piece)


def _unusable(why: str) -> BadFormat:
    return BadFormat(
        "bad_certificate",
        f"the service sent an unusable certificate: {why}",
        "check SAFE_SESSION_ADDR; if it is correct, report this to the service's operator",
    )
