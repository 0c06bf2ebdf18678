"""Requests a certificate and retries while the signing service restarts."""

from __future__ import annotations

import binascii
import time
from _json import encode_basestring_ascii as quoted

from signer.safe_session.arguments import Invocation
from signer.safe_session.http import HttpResponse, NoResponse, post
from signer.safe_session.keypair import NewKey
from signer.safe_session.response import Certificate, problem_code, read_certificate
from signer.safe_session.settings import Settings

# A restarted service is back within 2 s, and one that is too busy for callers whom it does not know yet says when to
# come back. A retry is safe: at worst it issues and records a second certificate for the same key. Refusals, malformed
# and late responses are final, so that retries never multiply the load of a fault.
SECONDS_FOR_RETRIES = 3.0
_PAUSES = (0.2, 0.6, 1.6)
_PATH_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def request_certificate(settings: Settings, invocation: Invocation, key: NewKey) -> Certificate:
    """The certificate for `key`. Raises the errors of `post` and `read_certificate` in the last attempt."""
    role = settings.role.encode(errors="surrogateescape")
    path = "/api/sign/" + "".join(chr(b) if chr(b) in _PATH_LETTERS else f"%{b:02X}" for b in role)
    body = render_body(invocation, key.blob())
    give_up = time.monotonic() + SECONDS_FOR_RETRIES
    for pause in _PAUSES:
        try:
            response = post(settings.address, path, settings.token, body, settings.trusted)
        except NoResponse:
            retry_after = 0.0
        else:
            retry_after = _retry_after(response)
            if not 0 <= retry_after <= SECONDS_FOR_RETRIES:
                return read_certificate(response, key.public, settings.address.text)
        time.sleep(max(0.0, min(max(pause, retry_after), give_up - time.monotonic())))
    response = post(settings.address, path, settings.token, body, settings.trusted)
    return read_certificate(response, key.public, settings.address.text)


def _retry_after(response: HttpResponse) -> float:
    """Seconds in the `Retry-After` (RFC 9110 section 10.2.3, without dates) of a response that passes by itself; -1 if
    there is none."""
    text = response.headers.get("retry-after", "")
    passes = response.status == 503 or (response.status == 429 and problem_code(response) == "edge_busy")
    if not passes or not (text.isascii() and text.isdigit()):
        return -1
    return float(text[:6])


def render_body(invocation: Invocation, blob: bytes) -> bytes:
    """The request's JSON; options that were not given are omitted, so that the role's defaults apply."""
    fields = ['"public_key":' + quoted("ssh-ed25519 " + binascii.b2a_base64(blob, newline=False).decode())]
    if invocation.principals:
        fields.append('"principals":[' + ",".join(map(quoted, invocation.principals)) + "]")
    if invocation.ttl:
        fields.append('"ttl":' + (str(int(invocation.ttl)) if invocation.ttl.isdigit() else quoted(invocation.ttl)))
    if invocation.reason:
        fields.append('"reason":' + quoted(invocation.reason))
    return ("{" + ",".join(fields) + "}").encode("ascii")
