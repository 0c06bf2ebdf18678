"""The console: pages for humans below `/console`, rendered by the server.

`register` is the only entry. Each module has the pages of one subject and adds them with `Console.get` and
`Console.post` of `session.py`; a page shows what the keeper answers to the session, and decides nothing.
"""

from __future__ import annotations

from typing import Final

from flask import Flask

from signer.api.console import (
    account,
    certificates,
    freezes,
    ledger,
    operations,
    overview,
    people,
    requests,
    waivers,
)
from signer.api.console.session import Console, render_fault
from signer.protocol.client import KeeperClient
from signer.settings import Settings

__all__ = ("PAGES", "register", "render_fault")

# What the navigation links to, in its order.
PAGES: Final = (
    ("/console", "Overview"),
    ("/console/requests", "Requests"),
    ("/console/certificates", "Certificates"),
    ("/console/people", "People and agents"),
    ("/console/ledger", "Ledger"),
    ("/console/incidents", "Incidents"),
    ("/console/waivers", "Waivers"),
    ("/console/freezes", "Freezes"),
    ("/console/operations", "Operations"),
    ("/console/enrol", "Enrol a passkey"),
    ("/console/session", "Session"),
)


def register(app: Flask, keeper: KeeperClient, settings: Settings) -> None:
    console = Console(app, keeper, settings, PAGES)
    for subject in (account, overview, requests, certificates, people, ledger, waivers, freezes, operations):
        subject.register(console)
