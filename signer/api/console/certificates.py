"""Certificates: a search with pages, and each with its complete record."""

from __future__ import annotations

import time
from typing import Final
from urllib.parse import quote

from flask import Response, request

from signer.api.console.session import Console, Session, next_url, redirect
from signer.api.console.words import facts
from signer.api.native import bad_query, read_whole, read_word
from signer.protocol.replies import CertificateDetails, CertificatePage, expect

FILTERS: Final = ("identity", "role", "principal", "fingerprint")
ROWS: Final = 50  # of a page; 50 kB hold them with long names
_SHOWN: Final = ("revoked", "recorded")  # of a record, in places of their own


def register(console: Console) -> None:
    def show(session: Session) -> Response:
        if serial := request.args.get("serial", "").strip():
            return redirect(f"/console/certificates/{quote(serial, safe='')}")
        wanted = read_words(FILTERS)
        # Without any filter it begins with what matters now: certificates that open a door.
        is_live = request.args.get("live") == "yes" or not request.args
        fields: dict[str, object] = {**wanted, "limit": ROWS, **read_number("before")}
        page = expect(CertificatePage, session.ask("certificates", {**fields, "active": is_live}))
        return console.page(
            "certificates.html",
            now=int(time.time()),
            rows=page.certificates,
            wanted={name: wanted.get(name, "") for name in FILTERS},
            is_live=is_live,
            sees_all=session.may("ledger.read"),
            next_url=next_url({**wanted, "live": "yes" if is_live else "no"}, "before", page.before),
        )

    def show_one(session: Session, serial: str) -> Response:
        if not serial.isascii() or not serial.isdigit() or len(serial) > 20:
            raise bad_query("a serial is a decimal number", "search by the number that the list shows")
        found = expect(CertificateDetails, session.ask("certificate", {"serial": int(serial)}))
        record = found.model_dump(exclude_unset=True)
        rows = facts({name: value for name, value in record.items() if name not in _SHOWN})
        return console.page("certificate.html", now=int(time.time()), found=found, facts=list(rows))

    console.get("/console/certificates", show)
    console.get("/console/certificates/<serial>", show_one)


def read_words(names: tuple[str, ...]) -> dict[str, str]:
    """The parameters of a search that are given; raises `BadRequest`. Empty fields of a form count as not given."""
    given = {name: request.args.get(name, "").strip() for name in names}
    return {name: read_word(name, value) for name, value in given.items() if value}


def read_number(name: str) -> dict[str, int]:
    """The parameter as a whole number, if it is given; raises `BadRequest`."""
    value = request.args.get(name, "")
    return {name: read_whole(name, value)} if value else {}
