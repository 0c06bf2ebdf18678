"""Operations on the platform: cutovers, rollbacks and decommissions, each with its record and its evidence."""

from __future__ import annotations

from typing import Final

from flask import Response

from signer.api.console.certificates import read_number
from signer.api.console.session import Console, Session, next_url
from signer.errors import NotFound
from signer.protocol.replies import OperationPage, OperationRow, expect

ROWS: Final = 30
MOODS: Final = {"applied": "ok", "rolled_back": "warn", "failed": "warn", "stopped": "bad", "rollback_failed": "bad"}


def register(console: Console) -> None:
    def show(session: Session) -> Response:
        page = expect(OperationPage, session.ask("operations", {"limit": ROWS, **read_number("before")}))
        return console.page(
            "operations.html",
            rows=page.operations,
            moods=MOODS,
            next_url=next_url({}, "before", page.before),
        )

    def show_one(session: Session, number: str) -> Response:
        found = _find(session, number)
        same = []
        if found.evidence:
            page = expect(OperationPage, session.ask("operations", {"evidence": found.evidence, "limit": ROWS}))
            same = [row for row in page.operations if row.seq != found.seq]
        return console.page("operation.html", found=found, same=same, moods=MOODS)

    console.get("/console/operations", show)
    console.get("/console/operations/<number>", show_one)


def _find(session: Session, number: str) -> OperationRow:
    """The operation that event `number` records; raises `NotFound`."""
    if number.isascii() and number.isdigit() and len(number) <= 18:
        fields = {"before": int(number) + 1, "limit": 1}
        for row in expect(OperationPage, session.ask("operations", fields)).operations:
            if row.seq == int(number):
                return row
    raise NotFound("unknown_route", f"no operation is recorded as event {number[:20]!a}", "see the list of operations")
