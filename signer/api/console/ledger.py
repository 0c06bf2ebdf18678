"""The ledger: the state of the chain, and its events by kind, identity and time."""

from __future__ import annotations

import re
import time
from typing import Final

from flask import Response

from signer.api.console.certificates import read_number, read_words
from signer.api.console.session import Console, Session, next_url, show_time
from signer.api.console.words import age, done, size, summarize
from signer.api.native import bad_query
from signer.errors import SignerError
from signer.protocol.replies import EventPage, SignedCheckpoint, Status, expect
from signer.units import parse_duration, parse_timestamp

ROWS: Final = 40
ALL_BUT_CERTIFICATES: Final = "others"
# What the form offers; an address may name any kind, or what kinds begin with.
KINDS: Final = (
    ("", "everything"), (ALL_BUT_CERTIFICATES, "everything but certificates"),
    ("certificate", "certificates"), ("certificates.revoked", "revocations"),
    ("request.refused", "refusals"), ("refusals.repeated", "repeated refusals"),
    ("approval", "requests and approvals"), ("waiver", "waivers"), ("incident", "incidents"), ("freeze", "freezes"),
    ("policy", "policy"), ("ca", "CA key"), ("keeper", "keeper"), ("console", "console sessions"),
    ("operation", "operations"), ("host", "hosts' keys"), ("list", "revocation list"), ("publishing", "publishing key"),
    ("ledger", "ledger"), ("shadow", "shadow mode"),
)  # fmt: skip
_TIME: Final = re.compile(r"(\d{4}-\d\d-\d\d)(?:T(\d\d:\d\d:\d\d)Z)?", re.ASCII)
_KIND: Final = re.compile(r"[a-z_]{1,32}(?:\.[a-z_]{1,32})?", re.ASCII)


def register(console: Console) -> None:
    def show(session: Session) -> Response:
        now = int(time.time())
        wanted = read_words(("kind", "identity", "since"))
        fields: dict[str, object] = {"limit": ROWS, **read_number("before"), **read_kind(wanted.get("kind", ""))}
        if "identity" in wanted:
            fields["identity"] = wanted["identity"]
        if "since" in wanted:
            fields["since"] = read_since(wanted["since"], now) * 1000
        page = expect(EventPage, session.ask("events", fields))
        return console.page(
            "ledger.html",
            rows=[(entry, summarize(entry)) for entry in page.entries],
            kinds=KINDS,
            wanted={name: wanted.get(name, "") for name in ("kind", "identity", "since")},
            chain=describe_chain(session, now),
            next_url=next_url(wanted, "before", page.before),
        )

    console.get("/console/ledger", show)


def read_kind(kind: str) -> dict[str, object]:
    """The fields of the command for the kind that the form names; raises `BadRequest`."""
    if kind == ALL_BUT_CERTIFICATES:
        return {"only_others": True}
    if not kind:
        return {}
    if _KIND.fullmatch(kind) is None:
        raise bad_query("kind must be the kind of an event, such as freeze.set", "choose a kind")
    return {"kind": kind}


def read_since(text: str, now: int) -> int:
    """Seconds since 1970 of a duration before `now` (24h), a date or a time in UTC; raises `BadRequest`."""
    try:
        if (time_of_day := _TIME.fullmatch(text)) is None:
            return max(now - parse_duration(text), 0)
        return max(parse_timestamp(f"{time_of_day[1]}T{time_of_day[2] or '00:00:00'}Z"), 0)
    except (ValueError, OverflowError):
        hint = "write 24h, 7d, 2026-11-22 or 2026-11-22T09:30:00Z"
        raise bad_query("since must be a duration or a time", hint) from None


def describe_chain(session: Session, now: int) -> list[tuple[str, str]]:
    """The head, the last verification, the newest checkpoint, and its cosignature by witnesses."""
    ledger = expect(Status, session.ask("status")).ledger
    if ledger is None:
        return [("State", "the ledger cannot be read: see the service's log")]
    rows = [("Events", f"{ledger.events:,} in {size(ledger.bytes)}"), ("Head", f"{ledger.events}:{ledger.head}")]
    if ledger.time is not None:
        rows.append(("Newest event", f"{show_time(ledger.time)}, {age(ledger.time, now)}"))
    verified, cosigned = "never: run signer ledger verify", "by no witness: see runbooks/operate/witness.md"
    rows.append(("Last verified", verified if ledger.verified is None else done(ledger.verified, now)))
    rows.append(("Checkpoint", _describe_checkpoint(session)))
    rows.append(("Cosigned", cosigned if ledger.cosigned is None else done(ledger.cosigned, now)))
    return rows


def _describe_checkpoint(session: Session) -> str:
    try:
        note = expect(SignedCheckpoint, session.ask("checkpoint")).note
    except SignerError as error:
        return f"none: {error.text}"
    origin, size_of_tree, root, *_ = [*note.splitlines(), "", "", ""]
    return f"{origin}, {size_of_tree} events, root {root}"
