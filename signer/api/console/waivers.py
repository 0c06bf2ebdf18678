"""Waivers, which let requests through without asking, and incidents, which break-glass leaves behind."""

from __future__ import annotations

import json
from functools import partial
from typing import Final

from flask import Response, request

from signer.api.console.session import Console, Session, redirect
from signer.api.native import read_word
from signer.protocol.replies import Incidents, Waivers, expect

MAX_WAIVERS: Final = 25  # of the page, which should have 50 kB at most
MAX_INCIDENTS: Final = 60  # of the page


def register(console: Console) -> None:
    console.get("/console/waivers", partial(_waivers, console))
    console.post("/console/waivers/<name>/end", _end)
    console.get("/console/incidents", partial(_incidents, console))


def _waivers(console: Console, session: Session) -> Response:
    rows = expect(Waivers, session.ask("waivers")).waivers
    return console.page("waivers.html", rows=rows[:MAX_WAIVERS], more=len(rows) > MAX_WAIVERS)


def _end(session: Session, name: str) -> Response:
    reason = request.form.get("reason", "").strip()
    session.ask("end_waiver", {"waiver": read_word("id", name)}, json.dumps({"reason": reason}).encode())
    return redirect("/console/waivers")


def _incidents(console: Console, session: Session) -> Response:
    is_all = request.args.get("state") == "all"
    rows = expect(Incidents, session.ask("incidents", {"state": "all" if is_all else "open"})).incidents
    return console.page("incidents.html", rows=rows[:MAX_INCIDENTS], is_all=is_all, more=len(rows) > MAX_INCIDENTS)
