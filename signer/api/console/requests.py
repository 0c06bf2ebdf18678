"""Requests that wait for humans: the list, one request as it is signed, and the decisions about it.

The digest and the statement that a passkey signs are computed here from the fields that the page shows, never taken
from the reply. What decides is the keeper's: it checks the assertion and the policy.
"""

from __future__ import annotations

import json
import time
from functools import partial
from typing import Any, Final

from flask import Response, request

from signer.api.console.session import FRAGMENT, LIVE_PARAMETERS, Console, Session, next_url, redirect
from signer.api.native import bad_query, read_whole, read_word
from signer.errors import SignerError, Unavailable
from signer.model import REQUEST_STATES, WAIVER_SECONDS, WAIVER_USES
from signer.protocol.replies import CertificateDetails, CertificatePage, RequestDetails, RequestPage, expect
from signer.protocol.request_text import as_ssh_keygen, differences, of_certificate, opens
from signer.ssh.statement import approval_statement, request_digest
from signer.units import render_duration, timestamp

MAX_ROWS: Final = 60  # of a page, which should have 50 kB at most
WAIVER_CHOICES: Final = (1_800, 3_600, 7_200, WAIVER_SECONDS)  # seconds
WAIVER_USES_SHOWN: Final = 5
_ASSERTION: Final = ("id", "authenticator_data", "client_data", "signature")
_STATES: Final = ("pending", "all", *(state for state in REQUEST_STATES if state != "pending"))
MOODS: Final = {"pending": "warn", "approved": "ok", "issued": "ok", "denied": "bad"}  # of states
_TOLD_MOODS: Final = {"sent": "ok", "failed": "bad", "dropped": "bad"}


def register(console: Console) -> None:
    console.get("/console/requests", partial(_list, console))
    console.get("/console/requests/<name>", partial(_show, console))
    console.post("/console/requests/<name>/deny", _deny)
    console.post("/console/requests/<name>/withdraw", lambda session, name: _decide(session, "withdraw", name, {}))
    console.post("/console/requests/<name>/approve", _approve)


def _list(console: Console, session: Session) -> Response:
    state = request.args.get("state", "pending")
    if state not in _STATES:
        raise bad_query(f"state must be one of {', '.join(_STATES)}", "choose one on the page")
    filters: dict[str, object] = {} if state == "all" else {"state": state}
    for name in ("identity", "before"):
        if request.args.get(name):
            filters[name] = read_word(name, request.args[name])
    page = expect(RequestPage, session.ask("requests", filters))
    rows = page.requests[:MAX_ROWS]
    kept = {name: value for name, value in request.args.items() if name not in LIVE_PARAMETERS}
    before = rows[-1].request if len(page.requests) > MAX_ROWS else page.before
    return console.live_page(
        "requests.html",
        "_requests.html",
        state=state,
        states=_STATES,
        moods=MOODS,
        identity=filters.get("identity", ""),
        rows=[(row, opens(frozen_of(row))) for row in rows],
        next_url=next_url(kept, "before", before),
    )


def _show(console: Console, session: Session, name: str) -> Response:
    shown = expect(RequestDetails, session.ask("request", {"request": read_word("id", name)}))
    frozen = frozen_of(shown)
    digest = request_digest(frozen)
    if digest != shown.digest or frozen["id"] != name:
        raise Unavailable("internal_error", "the digest of the request is not that of its fields", "do not approve")
    is_asker = session.name == frozen["identity"]
    return console.live_page(
        "request.html",
        "_request.html",
        shown=shown,
        moods=MOODS,
        frozen=frozen,
        opens=opens(frozen),
        certificate="\n".join(as_ssh_keygen(frozen)),
        ttl=render_duration(frozen["ttl"]),
        compared=None if FRAGMENT in request.args else _compare(session, frozen),  # the live part has none
        is_asker=is_asker,
        may_approve=shown.state == "pending" and session.name in shown.may_approve,
        may_deny=shown.state == "pending" and not is_asker and session.may("approve"),
        may_withdraw=is_asker and shown.state in ("pending", "approved"),
        statement=approval_statement(name, digest, session.name, None).decode(),
        waivers=_waiver_choices() if shown.waivers and not is_asker else (),
        uses=WAIVER_USES_SHOWN,
        most_uses=WAIVER_USES,
        told_moods=_TOLD_MOODS,
    )


def _deny(session: Session, name: str) -> Response:
    return _decide(session, "deny", name, {"reason": request.form.get("reason", "").strip()})


def _approve(session: Session, name: str) -> Response:
    form = request.form
    waiver: dict[str, object] | None = None
    if form.get("until"):
        waiver = {"until": form["until"], "uses": read_whole("uses", form.get("uses", ""))}
    assertion = {field: form.get(field, "") for field in _ASSERTION}
    return _decide(session, "approve", name, {"assertion": assertion, "waiver": waiver})


def frozen_of(shown: RequestDetails) -> dict[str, Any]:
    """The frozen fields of a request as they are signed."""
    fields: dict[str, Any] = json.loads(shown.frozen.as_json())
    return fields


def _decide(session: Session, op: str, name: str, body: dict[str, object]) -> Response:
    session.ask(op, {"request": read_word("id", name)}, json.dumps(body).encode())
    return redirect(f"/console/requests/{name}")


def _waiver_choices() -> list[tuple[str, str]]:
    """Ends of a waiver, as they are signed, and how long that is."""
    now = int(time.time())
    return [(timestamp(now + seconds), render_duration(seconds)) for seconds in WAIVER_CHOICES]


def _compare(session: Session, frozen: dict[str, Any]) -> dict[str, Any]:
    """How a request differs from the last certificate of the same identity, as far as the reader may see that.

    Who may not read the ledger compares with the last request that was issued, of those that the keeper still shows.
    """
    try:
        if session.may("ledger.read"):
            page = session.ask("certificates", {"identity": frozen["identity"], "limit": 1})
            rows = expect(CertificatePage, page).certificates
            if not rows:
                return {"missing": f"it is the first certificate of {frozen['identity']}"}
            found = session.ask("certificate", {"serial": int(rows[0].serial)})
            record = json.loads(expect(CertificateDetails, found).as_json())
            with_what = f"the last certificate of {frozen['identity']}, serial {record['serial']}"
            return _differences(frozen, of_certificate(record), with_what, record["recorded"]["time"])
        page = session.ask("requests", {"identity": frozen["identity"], "state": "issued"})
        issued = expect(RequestPage, page).requests
    except SignerError as error:
        return {"missing": error.text}
    if not issued:
        return {"missing": "no request of this identity was issued within a day, and you may not read the ledger"}
    before = frozen_of(issued[0])
    return _differences(frozen, before, f"request {before['id']} of {frozen['identity']}", before["asked"])


def _differences(frozen: dict[str, Any], before: dict[str, Any], with_what: str, since: str) -> dict[str, Any]:
    return {"with": with_what, "since": since, "rows": list(differences(frozen, before)), "missing": None}
