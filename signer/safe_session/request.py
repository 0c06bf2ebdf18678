"""Requests a certificate and retries while the signing service restarts, or for as long as `--wait` says."""

from __future__ import annotations

import binascii
import time
from _json import encode_basestring_ascii as quoted

from signer.errors import Refused, Unavailable
from signer.safe_session.claims import load_claim
from signer.safe_session.http import MAX_RESPONSE, HttpResponse, NoResponse, Server, send
from signer.safe_session.keypair import make_key
from signer.safe_session.response import Certificate, problem_code, read_certificate, retry_after

TYPE_CHECKING = False  # type checkers know the name; importing it from typing costs 20 ms
if TYPE_CHECKING:
    from collections.abc import Callable

    from signer.safe_session.arguments import Invocation
    from signer.safe_session.claims import Claim
    from signer.safe_session.keypair import NewKey
    from signer.safe_session.settings import Settings

# A restarted service is back within 2 s, and one that is too busy for callers whom it does not know yet says when to
# come back. A retry is safe: at worst it issues and records a second certificate for the same key. Refusals, malformed
# and late responses are final, so that retries never multiply the load of a fault.
SECONDS_FOR_RETRIES = 3.0
_PAUSES = (0.2, 0.6, 1.6)
_LAST_PAUSE = 3.0  # between later attempts, which only --wait makes
# What --wait waits for beside `NoResponse`; the causes of others do not pass.
_AWAY = frozenset({"service_unreachable", "service_slow"})
_ASKS_HUMANS = 202
_PATH_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


class Patience:
    """Until when to try again. `seconds` is what `--wait` says; without it (None) a service that restarts is waited
    for, and one that is away is not. `waits` is told once, with `--wait`, that the service is away."""

    def __init__(self, seconds: int | None, waits: Callable[[Unavailable], None] | None = None) -> None:
        self._waits_for_absent = bool(seconds)
        self._seconds = max(float(seconds or 0), SECONDS_FOR_RETRIES)
        self._deadline = time.monotonic() + self._seconds
        self._waits = waits
        self._pauses = iter(_PAUSES)

    def allows_for(self, response: HttpResponse) -> bool:
        """Sleeps and returns true if a response passes by itself in time."""
        passes = response.status == 503 or (response.status == 429 and problem_code(response) == "edge_busy")
        seconds = retry_after(response)
        if not passes or (seconds is None and not self._waits_for_absent):
            return False
        return self._sleep(float(seconds or 0))

    def allows_after(self, error: Unavailable) -> bool:
        """Sleeps and returns true if the request may be sent again after `error`."""
        if not isinstance(error, NoResponse) and not (self._waits_for_absent and is_away(error)):
            return False
        if self._waits and self._waits_for_absent:
            self._waits(error)
            self._waits = None
        return self._sleep(0.0)

    def _sleep(self, seconds: float) -> bool:
        """Sleeps at least `seconds`; false if there is no time for it, or has been none left since the last call."""
        left = self._deadline - time.monotonic()
        if left <= 0 or seconds > self._seconds:
            return False
        pause = next(self._pauses, _LAST_PAUSE if self._waits_for_absent else 0.0)
        if not pause:
            return False
        time.sleep(min(max(pause, seconds), left))
        return True


def call(
    server: Server, method: str, path: str, body: bytes, patience: Patience, *, largest: int = MAX_RESPONSE
) -> HttpResponse:
    """The first response, of at most `largest` bytes, that does not pass by itself, or the last one. Raises the errors
    of `send`."""
    while True:
        try:
            response = send(server, method, path, body, largest=largest)
        except Unavailable as error:
            if patience.allows_after(error):
                continue
            raise
        if not patience.allows_for(response):
            return response


def is_away(error: Unavailable) -> bool:
    """True if the service may be back later; the causes of other errors do not pass."""
    return isinstance(error, NoResponse) or error.code in _AWAY


def obtain_certificate(settings: Settings, invocation: Invocation, patience: Patience) -> tuple[NewKey, Certificate]:
    """A certificate and its new key, which the caller wipes; waits for humans where the role asks them.

    Raises the errors of `send`, `read_certificate` and `approval.await_certificate`.
    """
    while True:
        claim = load_claim(settings, invocation)
        key = make_key()
        try:
            response = _ask(settings, invocation, key, claim, patience)
            if response.status != _ASKS_HUMANS:
                return key, read_certificate(response, key.public, settings.server.address.text)
        except BaseException as error:
            key.wipe()
            if claim.is_kept and isinstance(error, Refused) and error.code == "request_denied":
                from signer.safe_session.approval import read_end

                raise read_end(settings, claim.request, error) from None
            raise
        key.wipe()  # the certificate may come hours later, for a key that is made then
        from signer.safe_session.approval import AskedTwice, await_certificate

        try:
            return await_certificate(settings, invocation, claim, response)
        except AskedTwice:
            continue


def _ask(settings: Settings, invocation: Invocation, key: NewKey, claim: Claim, patience: Patience) -> HttpResponse:
    """The response to the request, without what the service does not take: a short lifetime of our own choice that is
    above the role's is left to the role's default, and a service older than approvals knows no claim."""
    path = f"/api/sign/{quoted_path(settings.role)}"
    claim_sha256, short = claim.digest(), True
    while True:
        body = render_body(invocation, key.blob(), claim_sha256, short=short)
        response = call(settings.server, "POST", path, body, patience)
        code = problem_code(response)
        if short and invocation.short_ttl() and code == "ttl_above_max":
            short = False
        elif claim_sha256 and code == "field_malformed" and b"claim_sha256" in response.body:
            claim_sha256 = ""
        else:
            return response


def quoted_path(text: str) -> str:
    """A segment of a path, or a value of a query (RFC 3986 section 2.1)."""
    data = text.encode(errors="surrogateescape")
    return "".join(chr(b) if chr(b) in _PATH_LETTERS else f"%{b:02X}" for b in data)


def render_key(blob: bytes) -> str:
    """`ssh-ed25519 <base64>`."""
    return "ssh-ed25519 " + binascii.b2a_base64(blob, newline=False).decode()


def render_body(invocation: Invocation, blob: bytes, claim_sha256: str, *, short: bool = True) -> bytes:
    """The request's JSON; options that were not given are omitted, so that the role's defaults apply. `short` asks for
    the short lifetime that suits a single login. Where a human is asked, the request is bound to the claim secret with
    this digest, otherwise the key is certified at once."""
    fields = ['"public_key":' + quoted(render_key(blob))]
    if claim_sha256:
        fields.append('"claim_sha256":' + quoted(claim_sha256))
    if invocation.principals:
        fields.append('"principals":[' + ",".join(map(quoted, invocation.principals)) + "]")
    if invocation.ttl:
        fields.append('"ttl":' + (str(int(invocation.ttl)) if invocation.ttl.isdigit() else quoted(invocation.ttl)))
    elif short and (seconds := invocation.short_ttl()):
        fields.append(f'"ttl":{seconds}')
    if invocation.reason:
        fields.append('"reason":' + quoted(invocation.reason))
    if command := invocation.force_command():
        fields.append('"critical_options":{"force-command":' + quoted(command) + "}")
    return ("{" + ",".join(fields) + "}").encode("ascii")
