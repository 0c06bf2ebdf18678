"""The page on which a human makes a passkey; the browser shows the result and sends nothing."""

from __future__ import annotations

from flask import Response

from signer.api.console.session import Console, Session


def register(console: Console) -> None:
    """Adds the page."""

    def show(_session: Session) -> Response:
        return console.page("enrol.html")

    console.get("/console/enrol", show)
