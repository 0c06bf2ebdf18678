"""The commands of `safe-session` that run nothing: `whoami`, `requests`, `wait` and `withdraw`."""

from __future__ import annotations

from signer.safe_session import approval, output
from signer.safe_session.claims import is_request_id
from signer.safe_session.http import HttpResponse, send, unexpected_response
from signer.safe_session.output import render_json
from signer.safe_session.request import Patience, call, quoted_path
from signer.safe_session.response import read_fields
from signer.safe_session.statuses import StillPending, UsageError

TYPE_CHECKING = False  # type checkers know the name; importing it from typing costs 20 ms
if TYPE_CHECKING:
    from signer.safe_session.arguments import Invocation
    from signer.safe_session.settings import Settings

_MAX_LIST = 4 * 1024 * 1024  # bytes of a page of requests
_MAX_PAGES = 100


def answer(settings: Settings, invocation: Invocation) -> int:
    """Answers the question on stdout; returns the exit status. Raises the service's errors."""
    return _ANSWERS[invocation.verb](settings, invocation)


def answer_wait(settings: Settings, invocation: Invocation) -> int:
    """`safe-session wait ID`: 0 once it is approved. Raises `StillPending`, `RequestOver` and the service's errors."""
    _check_id(invocation.request)
    try:
        asked = approval.look(settings, invocation.request)
    except approval.Busy as busy:
        raise busy.error from None
    line = approval.WaitingLine(asked, invocation)
    seconds = float(invocation.wait) if invocation.wait is not None else None
    if seconds is None and invocation.is_for_program():
        seconds = float(approval.LONGEST_POLL)
    asked = approval.wait_for_decision(settings, asked, seconds, line)
    if asked.state == "pending":
        following = f"run `safe-session wait {asked.request} --for 50s` again"
        said = f"request {asked.request} waits for {approval.names(asked.approvers)}"
        raise StillPending("request_pending", said, following, asked.pending_facts(following))
    if asked.state not in ("approved", "issued"):
        raise asked.end()
    following = "run the same command again" if asked.state == "approved" else "its certificate has been issued"
    if invocation.json or invocation.is_for_program():
        output.show(render_json({"state": asked.state, **asked.facts(), "next": following}) + "\n")
    else:
        output.show_line(f"request {asked.request} is {asked.state}; {following}")
    return 0


def answer_withdraw(settings: Settings, invocation: Invocation) -> int:
    """`safe-session withdraw ID`."""
    _check_id(invocation.request)
    path = f"/api/requests/{invocation.request}/withdraw"
    asked = approval.read_request(
        call(settings.server, "POST", path, b"{}", Patience(invocation.wait)), settings.server.address.text
    )
    if invocation.json:
        output.show(render_json({"state": asked.state, **asked.facts()}) + "\n")
    else:
        output.show_line(f"request {asked.request} is {asked.state}")
    return 0


def answer_requests(settings: Settings, invocation: Invocation) -> int:
    """`safe-session requests`: the caller's own requests of the last day, newest first."""
    identity = approval.text(who_am_i(settings, invocation).get("identity"))
    requests: list[approval.HumanRequest] = []
    raw: list[object] = []
    page = ""
    for _ in range(_MAX_PAGES):
        path = f"/api/requests?identity={quoted_path(identity)}{page}"
        response = send(settings.server, "GET", path, largest=_MAX_LIST)
        fields = _object(response, settings)
        rows, before = fields.get("requests"), fields.get("before")
        if type(rows) is not list or not all(type(row) is dict for row in rows):
            raise unexpected_response(settings.server.address.text, "no list of requests in it")
        raw += rows
        requests += [approval.HumanRequest(row, settings.server.address.text) for row in rows]
        if not is_request_id(before):
            break
        page = f"&before={before}"
    if invocation.json:
        output.show(render_json({"requests": raw}) + "\n")
        return 0
    table = [
        (
            one.request,
            one.state,
            approval.text(one.frozen.get("role")),
            one.expires,
            approval.names(one.approvers),
            approval.text(one.frozen.get("reason")),
        )
        for one in requests
    ]
    if table:
        output.show_table([("REQUEST", "STATE", "ROLE", "EXPIRES", "MAY APPROVE", "REASON"), *table], titled=True)
    else:
        output.show_line("no requests of the last day")
    return 0


def answer_whoami(settings: Settings, invocation: Invocation) -> int:
    """`safe-session whoami`: identity, roles, and when the token ends."""
    fields = who_am_i(settings, invocation)
    if invocation.json:
        output.show(render_json(fields) + "\n")
        return 0
    token = fields.get("token")
    expires = approval.text(token.get("expires")) if type(token) is dict else ""
    rows = [
        ("identity", f"{approval.text(fields.get('identity'))} ({approval.text(fields.get('kind'))})"),
        ("roles", ", ".join(approval.texts(fields.get("roles"))) or "none"),
        ("groups", ", ".join(approval.texts(fields.get("groups")))),
        ("may", ", ".join(approval.texts(fields.get("may")))),
        ("token", f"ends {expires}" if expires else "does not end"),
        ("service", settings.server.address.text),
    ]
    output.show_table([row for row in rows if row[1]])
    return 0


def who_am_i(settings: Settings, invocation: Invocation) -> dict[str, object]:
    """The fields of GET /api/whoami. Raises the service's error, or `BadFormat`."""
    fields = _object(call(settings.server, "GET", "/api/whoami", b"", Patience(invocation.wait)), settings)
    if not approval.text(fields.get("identity")):
        raise unexpected_response(settings.server.address.text, "no identity in it")
    return fields


def _object(response: HttpResponse, settings: Settings) -> dict[str, object]:
    if response.status != 200:
        raise approval.problem(response, settings)
    return read_fields(response, settings.server.address.text)


def _check_id(request: str) -> None:
    if not is_request_id(request):
        raise UsageError(f"{request[:40]} is not the id of a request", "`safe-session requests` lists them")


_ANSWERS = {"whoami": answer_whoami, "requests": answer_requests, "wait": answer_wait, "withdraw": answer_withdraw}
