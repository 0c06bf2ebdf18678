"""Freezes: what is stopped, and the form that stops. A freeze is lifted at the command line, with a token."""

from __future__ import annotations

import json
from functools import partial
from typing import Final

from flask import Response, request

from signer.api.console.session import Console, Session, redirect
from signer.api.native import bad_query
from signer.protocol.replies import Freezes, expect

MAX_FREEZES: Final = 80  # rows of the page, which should have 50 kB at most
KINDS: Final = ("identity", "role", "all")
# What the form offers: the value of `lasts`, and its words; an empty one lasts until somebody lifts it.
LASTS: Final = (("", "until it is lifted"), ("1h", "1 hour"), ("8h", "8 hours"), ("24h", "a day"), ("168h", "a week"))


def register(console: Console) -> None:
    console.get("/console/freezes", partial(_show, console))
    console.post("/console/freezes", _freeze)


def _show(console: Console, session: Session) -> Response:
    rows = expect(Freezes, session.ask("freezes")).freezes
    kind, _, name = request.args.get("scope", "").partition(":")
    return console.page(
        "freezes.html",
        rows=rows[:MAX_FREEZES],
        more=len(rows) > MAX_FREEZES,
        kinds=KINDS,
        kind=kind if kind in KINDS else KINDS[0],
        name=name[:128],
        lasts=LASTS,
    )


def _freeze(session: Session) -> Response:
    """Freezes. Everything only with a word that is typed, as its button is beside that of one identity."""
    form = request.form
    kind, name = form.get("kind", ""), form.get("name", "").strip()
    if kind not in KINDS:
        raise bad_query(f"kind must be one of {', '.join(KINDS)}", "choose one in the form")
    if kind == "all" and name != "all":
        raise bad_query("nothing was frozen: to freeze everything, type all as the name", "fill in the name")
    scope = "all" if kind == "all" else f"{kind}:{name}"
    body = {"scope": scope, "reason": form.get("reason", "").strip(), "lasts": form.get("lasts") or None}
    session.ask("freeze", body=json.dumps(body).encode())
    return redirect("/console/freezes")
