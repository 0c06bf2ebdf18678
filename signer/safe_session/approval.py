"""Waits for the humans whom a role asks, and claims the certificate that they have approved.

Imported only where the service answered with a request. Trusts nothing of the reply but its shape.
"""

from __future__ import annotations

import time

from signer.errors import BadFormat, BadSettings, SignerError, Unavailable
from signer.safe_session import output
from signer.safe_session.claims import Claim, is_request_id
from signer.safe_session.command import EndedBySignal
from signer.safe_session.http import HttpResponse, send, unexpected_response
from signer.safe_session.keypair import NewKey, make_key
from signer.safe_session.output import render_json
from signer.safe_session.request import Patience, call, is_away, render_key
from signer.safe_session.response import (
    Certificate,
    problem_code,
    read_certificate,
    read_fields,
    read_problem,
    retry_after,
)
from signer.safe_session.statuses import RequestOver, StillPending

TYPE_CHECKING = False  # type checkers know the name; importing it from typing costs 20 ms
if TYPE_CHECKING:
    from signer.safe_session.arguments import Invocation
    from signer.safe_session.settings import Settings

LONGEST_POLL = 50  # seconds; the service holds a request no longer
_SECONDS_FOR_ANSWER = 10.0  # more than a poll
_SECONDS_TO_WITHDRAW = 3.0
_PAUSE = 1.0  # between polls of a service that is away
_SHOWN_NAMES = 5
_OVER = frozenset({"denied", "expired", "withdrawn", "lapsed", "issued"})
_STATES = _OVER | {"pending", "approved"}


class HumanRequest:
    """A request to humans as the service shows it. `frozen` is what they approve, whole; `presence` is true while the
    asker's own signature is missing, which one of `presence_keys` (lines of authorized_keys) gives."""

    def __init__(self, fields: dict[str, object], place: str) -> None:
        """Raises `BadFormat`."""
        request, state, frozen = fields.get("request"), fields.get("state"), fields.get("frozen")
        if not is_request_id(request) or state not in _STATES or type(frozen) is not dict:
            raise unexpected_response(place, "no request in it")
        self.request = str(request)
        self.state = str(state)
        self.frozen: dict[str, object] = frozen
        self.digest = text(fields.get("digest"))
        self.expires = text(fields.get("expires"))
        self.approvers = texts(fields.get("may_approve"))
        self.presence = fields.get("presence") == "missing"
        self.presence_keys = texts(fields.get("presence_keys"))
        self.told = read_told(fields.get("told"))
        seconds = fields.get("retry_after_s")
        self.retry_after = seconds if type(seconds) is int else 0
        given = fields.get("approvals")
        rows = [row for row in given if type(row) is dict] if type(given) is list else []
        self.given_by = [text(row.get("by")) for row in rows]
        denied = fields.get("denied")
        self.denied_by = text(denied.get("by")) if type(denied) is dict else ""
        self.why = text(denied.get("why")) if type(denied) is dict else ""

    def facts(self) -> dict[str, object]:
        """What a line of JSON says of it."""
        return {"request": self.request, "digest": self.digest, "expires": self.expires}

    def pending_facts(self, following: str) -> dict[str, object]:
        return {
            **self.facts(),
            "may_approve": self.approvers,
            **({} if self.told is None else {"told": self.told}),
            "retry_after_s": self.retry_after,
            "next": following,
        }

    def end(self) -> RequestOver:
        """The error for a request that is over."""
        facts = self.facts()
        again = "ask again with another reason, or ask them" if self.state == "denied" else "run the same command again"
        text = f"request {self.request} is over: {self.state}"
        if self.state == "denied":
            facts |= {"by": self.denied_by, "why": self.why}
            text = f"{self.denied_by} denied request {self.request}" + (f": {self.why}" if self.why else "")
        elif self.state == "issued":
            text = f"the certificate of request {self.request} was issued to another command"
        return RequestOver(self.state, text, again, facts)


def read_told(rows: object) -> list[dict[str, str]] | None:
    """Of each channel how it was told last, and why it was not; None where no channel is configured."""
    if type(rows) is not list:
        return None
    last: dict[str, dict[str, str]] = {}
    for row in rows:
        if type(row) is dict:
            shown = {name: text(row.get(name)) for name in ("channel", "kind", "state", "error")}
            last[shown["channel"]] = {name: value for name, value in shown.items() if value}
    return list(last.values())


def text(value: object) -> str:
    return value if type(value) is str else ""


def texts(value: object) -> list[str]:
    return [item for item in value if type(item) is str] if type(value) is list else []


def read_request(response: HttpResponse, place: str) -> HumanRequest:
    """The request in a 200 or 202. Raises the service's error, or `BadFormat`."""
    fields = read_fields(response, place)
    if response.status not in (200, 202):
        raise read_problem(response, fields, place)
    return HumanRequest(fields, place)


def look(settings: Settings, request: str, seconds: int = 0, line: WaitingLine | None = None) -> HumanRequest:
    """The request as it is now, or after a decision within `seconds`. Raises the errors of `send`, or the service's."""
    path = f"/api/requests/{request}" + (f"?wait={seconds}" if seconds else "")
    tick = line.draw if line else None
    response = send(settings.server, "GET", path, seconds=seconds + _SECONDS_FOR_ANSWER, tick=tick)
    if response.status in (429, 503):
        raise Busy(float(retry_after(response) or _PAUSE), problem(response, settings))
    return read_request(response, settings.server.address.text)


class Busy(Exception):
    """The service has no room now; `error` says so, and `seconds` for how long."""

    def __init__(self, seconds: float, error: SignerError) -> None:
        super().__init__(error.text)
        self.seconds = seconds
        self.error = error


def problem(response: HttpResponse, settings: Settings) -> SignerError:
    place = settings.server.address.text
    try:
        return read_problem(response, read_fields(response, place), place)
    except BadFormat as error:
        return error


def wait_for_decision(
    settings: Settings, asked: HumanRequest, seconds: float | None, line: WaitingLine
) -> HumanRequest:
    """Waits while the request is pending, at most `seconds`, or until it is decided; a service that restarts or has no
    room is asked again. Raises the errors of `look` that do not pass."""
    deadline = None if seconds is None else time.monotonic() + seconds
    try:
        while asked.state == "pending":
            left = LONGEST_POLL if deadline is None else deadline - time.monotonic()
            if left <= 0:
                break
            line.draw()
            try:
                asked = look(settings, asked.request, max(1, min(LONGEST_POLL, round(left))), line)
            except (Unavailable, Busy) as failure:
                if isinstance(failure, Unavailable) and not is_away(failure):
                    raise
                pause = failure.seconds if isinstance(failure, Busy) else _PAUSE
                if deadline is not None and time.monotonic() + pause > deadline:
                    raise (failure.error if isinstance(failure, Busy) else failure) from None
                line.draw("the service is away; ")
                time.sleep(pause)
    finally:
        line.clear()
    return asked


# --- from the request to the certificate -----------------------------------------------------------------------------


class AskedTwice(Exception):
    """Another command has asked for the same meanwhile: its request goes on, and this one was withdrawn."""


def await_certificate(
    settings: Settings, invocation: Invocation, claim: Claim, response: HttpResponse
) -> tuple[NewKey, Certificate]:
    """The certificate of the request in `response` and its new key, which the caller wipes.

    1  keep the claim secret, so that a later command can go on from here
    2  give the asker's own signature where the role wants it
    3  wait as long as the command line says
    4  make the key and claim the certificate for it

    Raises `StillPending`, `RequestOver`, `AskedTwice`, `BadSettings` without a place for the secret, and the service's
    errors. Ctrl-C withdraws the request.
    """
    asked = read_request(response, settings.server.address.text)
    binding = asked.frozen.get("binding")
    if type(binding) is not dict or binding.get("claim_sha256") != claim.digest():
        raise unexpected_response(settings.server.address.text, "a request with another claim secret")
    line = WaitingLine(asked, invocation)
    try:
        # 1
        if not claim.is_kept and not claim.keep(asked.request):
            withdraw(settings, asked.request)
            raise AskedTwice
        seconds = line.seconds()
        if not claim.is_kept and seconds == 0:
            withdraw(settings, asked.request)
            raise BadSettings(
                "claim_folder_missing",
                "the role needs a human's approval, and there is no private folder in memory for the secret that claims"
                " the certificate later; the request is withdrawn",
                "wait in the same command with --wait 10m, or set XDG_RUNTIME_DIR to a folder of yours on a tmpfs, mode"
                " 0700",
            )
        line.show()
        # 2
        if asked.presence and asked.state == "pending":
            from signer.safe_session.presence import sign_presence

            asked = sign_presence(settings, invocation, asked)
        # 3
        asked = wait_for_decision(settings, asked, seconds, line)
        # 4
        if asked.state == "approved":
            line.say_approved(asked)
            return _claim(settings, claim, asked)
    except KeyboardInterrupt:
        withdraw(settings, asked.request)
        claim.drop()
        as_json = invocation.json or invocation.is_for_program()
        output.remark(f"request {asked.request} withdrawn", as_json=as_json, state="withdrawn", request=asked.request)
        raise
    except EndedBySignal:
        if not claim.is_kept:
            withdraw(settings, asked.request)
        raise
    if asked.state == "pending":
        raise _still_pending(settings, claim, asked)
    return _give_up(claim, asked)


def _still_pending(settings: Settings, claim: Claim, asked: HumanRequest) -> SignerError:
    if claim.is_kept:
        following = f"run `safe-session wait {asked.request} --for 50s`, then the same command again"
    else:
        withdraw(settings, asked.request)
        following = "nobody decided in time, and the request is withdrawn; run the same command with a longer --wait"
    text = f"request {asked.request} waits for {names(asked.approvers)}"
    return StillPending("request_pending", text, following, asked.pending_facts(following))


def _give_up(claim: Claim, asked: HumanRequest) -> tuple[NewKey, Certificate]:
    """Raises the error for a request that is over. After a denial the secret stays: the same ask is then the same
    request, which the service refuses until it would have expired, and no human is asked twice."""
    if asked.state != "denied":
        claim.drop()
    raise asked.end()


def read_end(settings: Settings, request: str, refusal: SignerError) -> SignerError:
    """The error for a denied request with who denied it and why; `refusal` if the service does not show it."""
    try:
        asked = look(settings, request)
    except (SignerError, Busy):
        return refusal
    return asked.end() if asked.state in _OVER else refusal


def _claim(settings: Settings, claim: Claim, asked: HumanRequest) -> tuple[NewKey, Certificate]:
    key = make_key()
    try:
        body = render_json({"public_key": render_key(key.blob()), "claim_secret": claim.secret()}).encode("ascii")
        path = f"/api/requests/{asked.request}/claim"
        response = call(settings.server, "POST", path, body, Patience(None))
        if problem_code(response).startswith("request_") and response.status in (403, 409):
            asked = look(settings, asked.request)
            if asked.state in _OVER:
                _give_up(claim, asked)
        certificate = read_certificate(response, key.public, settings.server.address.text)
    except BaseException:
        key.wipe()
        raise
    claim.drop()
    return key, certificate


def withdraw(settings: Settings, request: str) -> None:
    """Withdraws a request that nobody can claim any more; it expires by itself if this fails."""
    try:
        send(settings.server, "POST", f"/api/requests/{request}/withdraw", b"{}", seconds=_SECONDS_TO_WITHDRAW)
    except SignerError:
        pass  # the service is away, or the request is over


# --- what a person sees ----------------------------------------------------------------------------------------------


class WaitingLine:
    """Shows a request and how long it has waited, on a terminal; nothing for a program."""

    def __init__(self, asked: HumanRequest, invocation: Invocation) -> None:
        self._asked = asked
        self._wait = invocation.wait
        self._for_program = invocation.is_for_program()
        self._as_json = invocation.json
        self._shown = not self._for_program and not invocation.json
        self._began = time.monotonic()
        self._is_drawn = False

    def seconds(self) -> float | None:
        """How long to wait: what --wait says, otherwise as long as it takes on a terminal, and not at all for a
        program."""
        if self._wait is not None:
            return float(self._wait)
        return 0.0 if self._for_program else None

    def show(self) -> None:
        """The request as the humans see it, before the wait."""
        if self._asked.state != "pending":
            return
        if self._as_json and not self._for_program:
            facts = self._asked.pending_facts("waiting; Ctrl-C withdraws the request")
            output.remark(f"request {self._asked.request} waits", as_json=True, state="pending", **facts)
        if not self._shown:
            return
        frozen = self._asked.frozen
        output.say(f"request {self._asked.request} needs the approval of {names(self._asked.approvers)}:")
        for name, value in _shown_fields(frozen):
            output.say_row(name, value)
        output.say_row("digest", self._asked.digest)

    def draw(self, before: str = "") -> None:
        """The line of the wait, over the one before it."""
        if self._shown:
            seconds = round(time.monotonic() - self._began)
            output.say_over(
                f"{before}waiting for {names(self._asked.approvers)}, {seconds // 60}:{seconds % 60:02};"
                " Ctrl-C withdraws the request"
            )
            self._is_drawn = True

    def clear(self) -> None:
        if self._is_drawn:
            output.say_over("")
        self._is_drawn = False

    def say_approved(self, asked: HumanRequest) -> None:
        if self._shown and asked.given_by:
            output.say(f"request {asked.request} approved by {names(asked.given_by)}")


def _shown_fields(frozen: dict[str, object]) -> list[tuple[str, str]]:
    """Names and values of what is asked for, as text; empty ones are left out."""
    options = frozen.get("critical_options")
    forced = options.get("force-command") if type(options) is dict else None
    seconds = frozen.get("ttl")
    rows = [
        ("role", text(frozen.get("role"))),
        ("principals", ", ".join(texts(frozen.get("principals")))),
        ("command", text(forced)),
        ("lifetime", f"{seconds} s" if type(seconds) is int else ""),
        ("reason", text(frozen.get("reason"))),
        ("from", text(frozen.get("address"))),
        ("expires", text(frozen.get("expires"))),
    ]
    return [(name, value) for name, value in rows if value]


def names(names: list[str]) -> str:
    if not names:
        return "nobody"
    shown = names[:_SHOWN_NAMES]
    more = len(names) - len(shown)
    if more:
        return f"{', '.join(shown)} or {more} others"
    return " or ".join((", ".join(shown[:-1]), shown[-1])) if len(shown) > 1 else shown[0]
