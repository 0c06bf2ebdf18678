"""`signer status`: one screen about the running service, read on its host without a token."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from signer.cli import output
from signer.cli.arguments import read_settings
from signer.cli.parser import verb
from signer.cli.places import name_places
from signer.units import plain

if TYPE_CHECKING:
    from signer.service.status import Report

_MANY = 12  # roles, freezes or tokens in one screen


@verb("status", "signer status", "signer status --json | jq .problems")
def status(as_json: bool) -> int:
    """Shows version, mode, CA, policy, keeper, API, ledger, live certificates, freezes, tokens that end within 30
    days, ages and clock. Run it as root or as the keeper's user, with the settings of the service; it needs no
    token. Exit status 0 if the service is well, 1 if it is degraded."""
    from signer.service.status import gather

    report = gather(read_settings(), os.environ, int(time.time()))
    for problem in report.problems:
        name_places(problem, (), os.environ)
    if as_json:
        problems = [one.as_json() for one in report.problems]
        output.show_json({"well": not problems, "problems": problems, "notes": report.notes, **report.facts})
        return 1 if report.problems else 0
    output.show_table(list(_rows(report)))
    for note in report.notes[:_MANY]:
        output.warn(note)
    if len(report.notes) > _MANY:
        output.warn("there are more: see --json")
    for problem in report.problems:
        output.note(f"error: {problem.text}")
        if problem.hint:
            output.note(f"hint: {problem.hint}")
    return 1 if report.problems else 0


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    facts = report.facts
    yield "signer", f"{facts['version']}, mode {facts['mode']}, {'degraded' if report.problems else 'well'}"
    keeper = facts["keeper"]
    yield "keeper", f"{keeper['state']}{', started ' + keeper['started'] if 'started' in keeper else ''}"
    for row in facts["api"]:
        yield "api", f"{row['address']} {row['state']}"
    if "ca" in facts:
        yield "CA", f"{facts['ca']['fingerprint'] or 'unknown'}, {_since(facts['ca'])}"
    policy = facts["policy"]
    yield (
        "policy",
        f"sha256 {policy['digest'][:16]}…, in force {_since(policy)}" if "digest" in policy else policy["file"],
    )
    yield from _ledger_rows(facts["ledger"])
    if "live" in facts:
        yield "live", _first(f"{role} {count}" for role, count in facts["live"].items())
    if "freezes" in facts:
        yield "freezes", _first(row["scope"] for row in facts["freezes"])
    if "requests" in facts:
        yield "requests", f"open {facts['requests']['open']}"
        yield "incidents", f"open {facts['incidents']['open']}, overdue {facts['incidents']['overdue']}"
    if "revocation_list" in facts:
        yield from _list_rows(facts["revocation_list"])
    if "tokens" in facts:
        ending = (f"{row['identity']} until {row['expires']}" for row in facts["tokens"])
        yield "tokens", _first(ending) if facts["tokens"] else "none ends within 30 days"
    if "clock" in facts:
        yield "clock", f"{facts['clock']['keeper']}, newest event {facts['clock']['newest_event'] or 'none'}"
    for name, title in (("vault", "Vault"), ("infisical", "Infisical")):
        if name in facts:
            yield title, f"{facts[name]['address']} {facts[name]['state']}"


def _list_rows(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if row["version"] is None:
        yield "revoked", "no list is published"
    else:
        yield "revoked", f"list version {row['version']}, as of {row['as_of']} ({row['age']} ago)"
    yield "hosts", f"{row['hosts']} seen, {row['hosts_current']} have the newest list"


def _ledger_rows(ledger: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if ledger["events"] is None:
        yield "ledger", "none"
        return
    yield "ledger", f"events {ledger['events']}, bytes {ledger['bytes']}"
    yield "head", f"{ledger['events']}:{ledger['head']}"
    for title, done in (("verified", ledger["verified"]), ("backed up", ledger["backed_up"])):
        yield title, f"up to event {done['events']}, {_since(done)}" if done else "not recorded"
    if done := ledger["cosigned"]:
        yield "cosigned", f"up to event {done['events']}, {_since(done)}"


def _since(facts: Mapping[str, str]) -> str:
    return f"since {facts['since']} ({facts['age']})"


def _first(texts: Iterator[str]) -> str:
    found = [plain(text) for text in texts]
    return (", ".join(found[:_MANY]) + (", …" if len(found) > _MANY else "")) or "none"
