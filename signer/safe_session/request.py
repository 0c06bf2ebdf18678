"""Asks the signing service for a certificate, patiently enough that its restart loses no login."""

from __future__ import annotations

import binascii
import time
from _json import encode_basestring_ascii as quoted

from signer.safe_session.arguments import Invocation
from signer.safe_session.http import Answer, NoAnswer, post
from signer.safe_session.keypair import NewKey
from signer.safe_session.response import Certificate, read_answer
from signer.safe_session.settings import Settings

# A restarted service is back within 2 s. Repeating is safe: at worst a second certificate for the same key is issued
# and recorded. All else (refusals, garbage, a slow answer) is final, so that a fault never multiplies load.
SECONDS_FOR_RETRIES = 3.0
_PAUSES = (0.2, 0.6, 1.6)
_PATH_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def ask(settings: Settings, asked: Invocation, key: NewKey) -> Certificate:
    """Raises what `post` and `read_answer` raise, the last time they did."""
    role = settings.role.encode(errors="surrogateescape")
    path = "/api/sign/" + "".join(chr(b) if chr(b) in _PATH_LETTERS else f"%{b:02X}" for b in role)
    body = render_body(asked, key.blob())
    give_up = time.monotonic() + SECONDS_FOR_RETRIES
    for pause in _PAUSES:
        try:
            answer = post(settings.address, path, settings.token, body)
        except NoAnswer:
            asked_for = 0.0
        else:
            asked_for = _retry_after(answer)
            if not 0 <= asked_for <= SECONDS_FOR_RETRIES:
                return read_answer(answer, key.public, settings.address.text)
        time.sleep(max(0.0, min(max(pause, asked_for), give_up - time.monotonic())))
    answer = post(settings.address, path, settings.token, body)
    return read_answer(answer, key.public, settings.address.text)


def _retry_after(answer: Answer) -> float:
    """Seconds from the `Retry-After` of a 503 (RFC 9110 section 10.2.3, but no dates), -1 if there is none."""
    text = answer.headers.get("retry-after", "")
    if answer.status != 503 or not (text.isascii() and text.isdigit()):
        return -1
    return float(text[:6])


def render_body(asked: Invocation, blob: bytes) -> bytes:
    """The request's JSON; what was not given is left out, so that the role's defaults hold."""
    fields = ['"public_key":' + quoted("ssh-ed25519 " + binascii.b2a_base64(blob, newline=False).decode())]
    if asked.principals:
        fields.append('"principals":[' + ",".join(map(quoted, asked.principals)) + "]")
    if asked.ttl:
        fields.append('"ttl":' + (str(int(asked.ttl)) if asked.ttl.isdigit() else quoted(asked.ttl)))
    if asked.reason:
        fields.append('"reason":' + quoted(asked.reason))
    return ("{" + ",".join(fields) + "}").encode("ascii")
