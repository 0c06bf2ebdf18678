"""The overview: what happens, what waits for humans, and whether the service is well."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from flask import Response

from signer.api.console.charts import Span, activity_chart, holders_chart
from signer.api.console.session import Console, Session, show_time
from signer.api.console.words import age, done, size
from signer.protocol import replies
from signer.units import parse_timestamp, timestamp

Check = tuple[str, str, str, str]  # what is looked at, "ok", "warn" or "bad", the state in a word, and the facts
MOST: Final = 8  # of the requests, freezes and incidents that it lists


def register(console: Console) -> None:
    def show(session: Session) -> Response:
        now = int(time.time())
        live = replies.expect(replies.LiveByIdentity, session.ask("live"))
        shown = {
            "requests": replies.expect(replies.RequestPage, session.ask("requests", {"state": "pending"})),
            "freezes": replies.expect(replies.Freezes, session.ask("freezes")).freezes,
            "incidents": replies.expect(replies.Incidents, session.ask("incidents", {"state": "open"})).incidents,
            "live": live,
            "holders": render_holders(live),
            "activity": None,
            "spans": [],
            "checks": [],
            "status": None,
        }
        if session.may("ledger.read"):
            activity = replies.expect(replies.Activity, session.ask("activity"))
            status = replies.expect(replies.Status, session.ask("status"))
            shown["spans"] = spans = spans_of(activity)
            shown["activity"] = activity_chart(spans, f"the last {activity.step * len(spans) // 3600} hours")
            shown["checks"] = list(check_health(status, now))
            shown["status"] = status
        return console.page("overview.html", most=MOST, **shown)

    console.get("/console", show)


def render_holders(live: replies.LiveByIdentity) -> object:
    """The chart of live certificates; the smaller holders share one bar."""
    shown = [(row.identity, row.count) for row in live.identities[:12]]
    left = live.holders - len(shown)
    return holders_chart(shown, (left, live.certificates - sum(count for _, count in shown)))


def spans_of(activity: replies.Activity) -> list[Span]:
    """The spans of the chart, each named by its hour (UTC)."""
    found = []
    for row in activity.rows:
        start, end = row.start[11:16], timestamp(parse_timestamp(row.start) + activity.step)[11:16]
        found.append(Span(start, f"{start} to {end} UTC", row.signatures, row.refusals))
    return found


def check_health(status: replies.Status, now: int) -> Iterator[Check]:
    """The state of keeper, ledger, witness and revocation list, then what to look after.

    The keeper decides what is late: `signer status` shows the same.
    """
    if status.fault is None:
        facts = f"mode {status.mode}, version {status.version}, since {show_time(status.started)}"
        yield "Keeper", "ok", "ready", facts
    else:
        yield "Keeper", "bad", "not ready", f"{status.fault.text}: {status.fault.hint}"
    if status.ca_fingerprint:
        yield "CA key", "ok", "loaded", f"{status.ca_fingerprint}, since {show_time(status.key_since)}"
    else:
        yield "CA key", "bad", "missing", "no key can sign now"
    yield "Policy", "ok", "in force", f"since {show_time(status.policy_since)}, digest {status.policy[:16]}…"
    yield from _check_ledger(status, now)
    published = status.revocation_list
    facts = "no host has fetched it in the last day"
    if published.hosts:
        facts = f"{published.hosts_current} of {published.hosts} hosts of the last day have it"
    if published.version is None:
        yield "Revocation list", "warn", "none yet", "see the service's log"
    elif published.behind:
        facts = f"the ledger asks for version {published.wanted}: see the service's log"
        yield "Revocation list", "bad", f"version {published.version} is behind", facts
    else:
        as_of = f", current {age(published.as_of, now)}" if published.as_of else ""
        yield "Revocation list", "ok", f"version {published.version}", f"{facts}{as_of}"
    for token in status.tokens[:MOST]:
        over = parse_timestamp(token.expires) <= now
        state = "has ended" if over else "ends soon"
        yield f"Token of {token.identity}", "warn", state, f"{token.id} on {show_time(token.expires)}"
    for warning in status.warnings:
        yield "Attention", "warn", "look into it", warning


def _check_ledger(status: replies.Status, now: int) -> Iterator[Check]:
    ledger = status.ledger
    if ledger is None:
        yield "Ledger", "bad", "cannot be read", "see the service's log"
        return
    newest = f", the newest {age(ledger.time, now)}" if ledger.time else ""
    yield "Ledger", "ok", "writable", f"{ledger.events:,} events{newest}; {size(ledger.bytes)}"
    if ledger.verified is None:
        yield "Verified", "warn", "never", "run signer ledger verify each day"
    else:
        late = ledger.verified.late
        yield "Verified", "warn" if late else "ok", "long ago" if late else "intact", done(ledger.verified, now)
    if ledger.cosigned is None:
        yield "Witness", "warn", "none", "nobody else holds the history: runbooks/operate/witness.md"
    else:
        late = ledger.cosigned.late
        yield "Witness", "bad" if late else "ok", "long ago" if late else "cosigned", done(ledger.cosigned, now)
