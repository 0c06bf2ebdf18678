"""People and agents: who there is, and what each may get, in plain words."""

from __future__ import annotations

import time
from typing import Final

from flask import Response

from signer.api.console.certificates import read_words
from signer.api.console.session import Console, Session, next_url
from signer.api.console.words import explain_role
from signer.model import RIGHTS
from signer.protocol.replies import CertificatePage, IdentityDetails, IdentityPage, expect

ROWS: Final = 50
MOST_ROLES: Final = 20  # roles, tokens and keys on the page of one identity
LAST: Final = 10  # certificates on it


def register(console: Console) -> None:
    def show(session: Session) -> Response:
        wanted = read_words(("part", "after"))
        page = expect(IdentityPage, session.ask("identities", {**wanted, "limit": ROWS}))
        return console.page(
            "people.html",
            rows=page.identities,
            part=wanted.get("part", ""),
            sees_all=session.may("ledger.read"),
            next_url=next_url({name: value for name, value in wanted.items() if name == "part"}, "after", page.after),
        )

    def show_one(session: Session, name: str) -> Response:
        found = expect(IdentityDetails, session.ask("identity", {"identity": name}))
        identity = found.identity
        last = expect(CertificatePage, session.ask("certificates", {"identity": name, "limit": LAST}))
        return console.page(
            "identity.html",
            now=int(time.time()),
            found=found,
            roles=[(role, list(explain_role(role, identity.kind))) for role in found.roles[:MOST_ROLES]],
            rights=[(right, RIGHTS.get(right, "")) for right in identity.may],
            tokens=found.tokens[:MOST_ROLES],
            keys=found.approval_keys[:MOST_ROLES],
            last=last.certificates,
            most=MOST_ROLES,
        )

    console.get("/console/people", show)
    console.get("/console/people/<name>", show_one)
