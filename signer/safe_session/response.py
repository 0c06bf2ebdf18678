"""What the signing service said: a certificate for our key, or a refusal to pass on. Pure; trusts nothing it reads."""

from __future__ import annotations

import binascii
from _json import make_scanner  # the C parser inside `json`; the package around it costs 15 ms for `re`

from signer.errors import BadFormat, NotAuthenticated, Refused, SignerError, Unavailable
from signer.safe_session.http import Answer, not_ours
from signer.ssh.wire import Reader

CERTIFICATE_TYPE = "ssh-ed25519-cert-v01@openssh.com"
_USER_CERTIFICATE = 1
_LONGEST_LIFETIME = 24 * 3600  # the service's own ceiling; an agent is never told more


class Certificate:
    """`blob` as it goes to the agent, `serial` from its own bytes, `lifetime` in seconds from now."""

    __slots__ = ("blob", "lifetime", "serial")

    def __init__(self, blob: bytes, serial: int, lifetime: int) -> None:
        self.blob = blob
        self.serial = serial
        self.lifetime = lifetime


class _Strict:
    """The settings that `_json.make_scanner` reads from its argument; those of `json.loads`, without NaN."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int

    @staticmethod
    def parse_constant(name: str) -> object:
        raise ValueError(name)


def parse_object(text: str) -> dict[str, object]:
    """A JSON object with nothing but white space around it. Raises `BadFormat` for all else."""
    text = text.strip(" \t\r\n")
    try:
        value, end = make_scanner(_Strict)(text, 0)  # type: ignore[arg-type]  # any object with those names will do
    except (ValueError, StopIteration, RecursionError):
        raise BadFormat("bad_json", "this is no JSON") from None
    if end != len(text) or type(value) is not dict:
        raise BadFormat("bad_json", "this is no JSON object")
    return value


def read_answer(answer: Answer, public: bytes, place: str) -> Certificate:
    """The certificate in a 201 for the 32 bytes `public`. `place` is the service's address, for errors.

    Raises what the service refused with (`Refused`, `NotAuthenticated`, `Unavailable`), or `BadFormat` if the answer or
    the certificate is not what was asked for.
    """
    try:
        said = parse_object(answer.body.decode())
    except (BadFormat, UnicodeDecodeError):
        raise not_ours(place, f"status {answer.status}, and no JSON") from None
    if answer.status != 201:
        raise _problem(answer, said, place)
    words = said.get("certificate")
    expires_in = said.get("expires_in")
    if type(words) is not str or type(expires_in) is not int:
        raise not_ours(place, "no certificate in it")
    return check_certificate(words, public, expires_in)


def _problem(answer: Answer, said: dict[str, object], place: str) -> SignerError:
    """An RFC 9457 problem as the error to show: the service's own sentence and hint."""
    detail, hint, code = said.get("detail"), said.get("hint"), said.get("code")
    if type(detail) is not str or not detail:
        return not_ours(place, f"status {answer.status} without a reason")
    kind: type[SignerError] = Refused
    if answer.status == 401:
        kind = NotAuthenticated
    elif answer.status >= 500:
        kind = Unavailable
    return kind(code if type(code) is str else "refused", detail, hint if type(hint) is str else "")


def check_certificate(words: str, public: bytes, expires_in: int) -> Certificate:
    """Reads `<type> <base64>` as draft-ietf-sshm-cert section 2.1 lays it out, and checks what this side can know:

    1. it is an Ed25519 certificate, whole, with nothing after it;
    2. it certifies our key and no other;
    3. it is for a user, not a host;
    4. it is not over. Its lifetime counts from the service's clock (`expires_in`), ours may be wrong, but it is never
       longer than the certificate's own span.

    Raises `BadFormat`. The CA's signature is for sshd to check: this side does not know the CA.
    """
    kind, _, encoded = words.strip().partition(" ")
    try:
        blob = binascii.a2b_base64(encoded.partition(" ")[0].encode("ascii"), strict_mode=True)
        reader = Reader(blob)
        inner_kind = reader.text()
        reader.string()  # nonce
        certified = reader.string()
        serial = reader.uint64()
        purpose = reader.uint32()
        reader.string()  # key id
        reader.string()  # principals
        span = -reader.uint64() + reader.uint64()
        for _field in ("critical options", "extensions", "reserved", "CA key", "signature"):
            reader.string()
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
        raise _unusable("it is over already")
    return Certificate(blob, serial, lifetime)


def _unusable(why: str) -> BadFormat:
    return BadFormat(
        "bad_certificate",
        f"the service sent a certificate that is of no use: {why}",
        "check SAFE_SESSION_ADDR; if it is right, tell the service's operator",
    )
