"""`signer requests`: what waits for a human, exactly what would be issued, and the human's decision.

The operator's side trusts nothing of the service's reply but the fields that it shows: the digest that is signed is
computed from them here. The signature is made by `ssh-keygen` on this machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from signer.cli import output
from signer.cli.arguments import DURATION, FILE, IDENTITY, PAUSE, REASON, REQUEST, OneOf, whole
from signer.cli.connection import Service, service_options
from signer.cli.parser import verb
from signer.cli.usage import UsageError
from signer.errors import BadFormat, NotFound, Refused
from signer.model import REQUEST_STATES, WAIVER_SECONDS, WAIVER_USES
from signer.protocol.request_text import as_ssh_keygen, differences, of_certificate, opens, seconds_of
from signer.units import cut, plain, render_duration, timestamp

if TYPE_CHECKING:
    from signer.api_client import ApiClient

DEFAULT_USES: Final = 5
LOOKS_EVERY: Final = 2  # seconds between two looks of `requests watch`
# Fields of a frozen request that have a place of their own in what is shown; a field that is not here is shown as well.
_PLACED: Final = frozenset({
    "id", "nonce", "asked", "expires", "policy", "identity", "kind", "role", "key_id", "principals", "critical_options",
    "extensions", "ttl", "reason", "address", "binding",
})  # fmt: skip
_TEXTS: Final = ("id", "nonce", "asked", "expires", "policy", "identity", "kind", "role", "key_id")


@dataclass(frozen=True, slots=True)
class Shown:
    """A request of a reply. `digest` was computed here from `frozen`; the rest of `reply` is not signed."""

    id: str
    state: str
    digest: str
    frozen: Mapping[str, Any]
    reply: Mapping[str, Any]


def read_request(reply: Mapping[str, Any], asked_for: str | None = None) -> Shown:
    """The request of a reply; raises `BadFormat` if its digest is not that of its fields, or it is not `asked_for`."""
    from signer.ssh.statement import request_digest

    frozen = reply.get("frozen")
    if not isinstance(frozen, dict) or not _is_well_formed(frozen) or reply.get("state") not in REQUEST_STATES:
        raise BadFormat(
            "bad_approval_request", "the service sent a request that is not one", "do not approve it; check its address"
        )
    digest = request_digest(frozen)
    if digest != reply.get("digest") or asked_for not in (None, frozen["id"]) or reply.get("request") != frozen["id"]:
        raise BadFormat(
            "approval_request_differs",
            f"the service shows {frozen['id'][:64]!a} with an id or digest that is not that of its fields",
            "do not approve it: the service, or whoever stands before it, does not show what it records",
        )
    return Shown(frozen["id"], str(reply["state"]), digest, frozen, reply)


def _is_well_formed(frozen: Mapping[str, Any]) -> bool:
    """Whether the known fields have their types; an unknown one may have any, and is shown as it is."""
    return (
        all(isinstance(frozen.get(name), str) for name in _TEXTS)
        and all(isinstance(frozen.get(name), str | None) for name in ("reason", "address"))
        and isinstance(frozen.get("ttl"), int)
        and isinstance(frozen.get("principals"), list)
        and all(isinstance(name, str) for name in frozen["principals"])
        and all(
            isinstance(frozen.get(name), dict) and all(isinstance(value, str) for value in frozen[name].values())
            for name in ("critical_options", "extensions", "binding")
        )
    )


# --- the verbs --------------------------------------------------------------------------------------------------


_request_argument = click.argument("request", type=REQUEST, metavar="REQUEST", help="as `requests list` shows it")


@verb("requests list", "signer requests list", "signer requests list --state all --identity deploy-agent")
@click.option("--state", type=OneOf((*REQUEST_STATES, "all")), metavar="STATE", default="pending",
              help="pending (default), approved, denied, expired, withdrawn, issued, lapsed or all")  # fmt: skip
@click.option("--identity", type=IDENTITY, metavar="NAME", help="asked by this identity")
@service_options
def requests_list(*, state: str, identity: str | None, service: Service, as_json: bool) -> None:
    """Shows the requests that you may see, newest first: your own, those that you may approve, and with the
    right `ledger.read` all. Times are UTC."""
    filters = {} if state == "all" else {"state": state}
    if identity is not None:
        filters["identity"] = identity
    with service.open() as api:
        found = [read_request(reply) for reply in api.requests(**filters)]
    facts = {"requests": [dict(shown.reply) for shown in found]}
    titles = ("REQUEST", "STATE", "IDENTITY", "ROLE", "PRINCIPALS", "COMMAND", "EXPIRES", "REASON")
    nothing = "no requests" if state == "all" else f"no {state} requests"
    output.show_rows(facts, titles, map(_columns, found), nothing, as_json=as_json)


def _columns(shown: Shown) -> tuple[str, ...]:
    frozen = shown.frozen
    command = frozen["critical_options"].get("force-command", "any")
    expires = str(shown.reply.get("expires"))
    values = (",".join(frozen["principals"]), command, expires, frozen["reason"] or "none")
    return (shown.id, shown.state, frozen["identity"], frozen["role"], *(cut(value, 40) for value in values))


@verb("requests show", "signer requests show r-k3v9q2m7xa")
@_request_argument
@service_options
def requests_show(*, request: str, service: Service, as_json: bool) -> None:
    """Shows what would be issued, on which hosts it opens what, how it differs from the last certificate of the
    same identity, and which waiver would cover it. The comparison needs the right `ledger.read`."""
    with service.open() as api:
        shown = read_request(api.get("requests", request), request)
        if as_json:
            output.show_json(dict(shown.reply))
        else:
            _show(api, shown)


@verb(
    "requests approve",
    "signer requests approve r-k3v9q2m7xa",
    "signer requests approve r-k3v9q2m7xa --waive 2h --uses 5",
)
@_request_argument
@click.option("--key", type=FILE, metavar="FILE", help="your key, or its .pub file for a key in the ssh-agent")
@click.option("--waive", type=DURATION, metavar="DURATION", help="also approve the same ask for so long, 4h at most")
@click.option(
    "--uses", type=whole(1, WAIVER_USES), metavar="N", help=f"how often; with --waive, default {DEFAULT_USES}"
)
@click.option("--yes", is_flag=True, help="do not ask on the terminal; a FIDO key still asks for its touch")
@service_options
def requests_approve(
    *,
    request: str,
    key: Path | None,
    waive: int | None,
    uses: int | None,
    yes: bool,
    service: Service,
    as_json: bool,
) -> None:
    """Shows the request as `requests show` does, asks, and signs what it has shown with a key of your
    `approval_keys`: --key, or the only FIDO key (otherwise the only key) of your ssh-agent. Exit status 3 if
    you do not approve."""
    from signer.cli.ssh_signing import sign_statement
    from signer.ssh.statement import approval_statement

    if uses is not None and waive is None:
        raise UsageError("--uses goes with --waive", "see `signer requests approve --help`")
    if waive is not None and not 0 < waive <= WAIVER_SECONDS:
        raise UsageError(f"--waive: a waiver lasts for at most {render_duration(WAIVER_SECONDS)}", "shorten it")
    with service.open() as api:
        shown = read_request(api.get("requests", request), request)
        if shown.state != "pending":
            raise Refused("request_not_pending", f"{request} is {shown.state}", "see `signer requests list`")
        if not as_json:
            _show(api, shown)
        waiver = None if waive is None else {"until": timestamp(int(time.time()) + waive), "uses": uses or DEFAULT_USES}
        if not yes:
            _ask(shown, waiver)
        statement = approval_statement(shown.id, shown.digest, str(api.whoami()["identity"]), waiver)
        signature = sign_statement(statement, key)
        reply = api.post("requests", request, "approve", body={"signature": signature, "waiver": waiver})
    after = read_request(reply, request)
    output.show_result(dict(after.reply), f"{request} is {after.state}: {_approvals(after)}", as_json=as_json)


@verb("requests deny", 'signer requests deny r-k3v9q2m7xa --reason "not during the sale"')
@_request_argument
@click.option("--reason", type=REASON, metavar="TEXT", help="the asker reads it")
@service_options
def requests_deny(*, request: str, reason: str | None, service: Service, as_json: bool) -> None:
    """Needs no signature: no is the safe answer. The asker learns who denied it and why, and may not ask again
    for the same until the request would have expired."""
    with service.open() as api:
        after = read_request(api.post("requests", request, "deny", body={"reason": reason or ""}), request)
    output.show_result(dict(after.reply), f"{request} is {after.state}", as_json=as_json)


@verb("requests watch", "signer requests watch", "signer requests watch --json | while read -r line; do …")
@click.option("--for", "seconds", type=PAUSE, metavar="DURATION", help="end after it; otherwise at Ctrl-C")
@service_options
def requests_watch(*, seconds: int | None, service: Service, as_json: bool) -> None:
    """Prints one line for each request that begins to wait, and one when it was decided, by whom. Looks every
    2 s."""
    end = None if seconds is None else time.monotonic() + seconds
    waiting: dict[str, Shown] = {}
    with service.open() as api:
        while True:
            now_waiting = {shown.id: shown for shown in map(read_request, api.requests(state="pending"))}
            for name in waiting.keys() - now_waiting.keys():
                _tell(read_request(api.get("requests", name), name), as_json=as_json)
            for name in reversed(now_waiting):
                if name not in waiting:
                    _tell(now_waiting[name], as_json=as_json)
            waiting = now_waiting
            if end is not None and time.monotonic() + LOOKS_EVERY >= end:
                return
            time.sleep(LOOKS_EVERY)


def _tell(shown: Shown, *, as_json: bool) -> None:
    if as_json:
        output.show_json(dict(shown.reply), on_one_line=True)
    else:
        frozen = shown.frozen
        what = f"{frozen['identity']} asks for {opens(frozen)}: {frozen['reason'] or 'no reason'}"
        if shown.state != "pending":
            what = f"{shown.state}, {_approvals(shown)}"
        output.show(plain(f"{timestamp(int(time.time()))}  {shown.id}  {what}"))
    output.flush()


# --- what a human sees ------------------------------------------------------------------------------------------


def _show(api: ApiClient, shown: Shown) -> None:
    for line in describe(shown, _last_certificate(api, shown.frozen["identity"]), int(time.time())):
        output.show(plain(line))


def describe(shown: Shown, last: Mapping[str, Any] | str, now: int) -> Iterator[str]:
    """The lines that a human reads before they decide, everything that is signed among them.

    `last` is the record of the last certificate of the same identity, or a sentence why there is none to compare with.
    """
    frozen, reply = shown.frozen, shown.reply
    where = f"from {frozen['address']}" if frozen["address"] else "from an unknown address"
    yield f"{shown.id}  {_state(shown, now)}"
    yield ""
    yield f"  {opens(frozen)}"
    yield f"  for {frozen['identity']} ({frozen['kind']}), {where}, role {frozen['role']}"
    yield f"  reason: {frozen['reason'] or 'none given'}"
    yield ""
    yield "would be issued, as `ssh-keygen -L` prints it:"
    yield from (f"  {line}" for line in as_ssh_keygen(frozen))
    yield ""
    if isinstance(last, str):
        yield f"compared    {last}"
    else:
        rows = [f"{name}: {new}; was {old}" for name, new, old in differences(frozen, of_certificate(last))]
        since = f"serial {last['serial']}, valid from {last['valid_after']}"
        yield f"compared    with the last certificate of {frozen['identity']} ({since}):"
        yield from (f"  {line}" for line in rows or ["nothing differs"])
    yield f"asked       {frozen['asked']}; {_ordinal(reply.get('asked_today'))} request of the last 24 hours"
    yield f"approvals   {_approvals(shown)}"
    if isinstance(told := reply.get("told"), list):
        yield f"told        {_told(told)}"
    yield f"waiver      {reply.get('waiver') or 'none'} covers it"
    yield f"policy      {frozen['policy']}"
    yield f"nonce       {frozen['nonce']}"
    for name in sorted(frozen.keys() - _PLACED):
        yield f"{name}: {frozen[name]!r}"
    yield f"digest      {shown.digest}"


def _state(shown: Shown, now: int) -> str:
    if shown.state not in ("pending", "approved"):
        return shown.state
    expires = str(shown.reply.get("expires"))
    left = seconds_of(expires) - now
    to_do = "to decide" if shown.state == "pending" else "to claim it"
    return f"{shown.state}, {render_duration(left)} left {to_do} ({expires})" if left > 0 else f"over since {expires}"


def _last_certificate(api: ApiClient, identity: str) -> dict[str, Any] | str:
    """The record of the identity's last certificate, or a sentence."""
    try:
        if "ledger.read" not in api.whoami()["may"]:
            return "with nothing: your token may not read the ledger (ledger.read)"
        row = next(api.certificates(identity=identity, limit=1), None)
        return f"with nothing: the first of {identity}" if row is None else api.certificate(str(row.get("serial")))
    except (Refused, NotFound) as error:
        return f"with nothing: {error.text}"


def _approvals(shown: Shown) -> str:
    """Who has approved or denied, and who still may; malformed rows are left out."""
    reply = shown.reply
    if isinstance(denied := reply.get("denied"), dict):
        return f"denied by {denied.get('by')}" + (f": {denied['why']}" if denied.get("why") else "")
    given = [
        f"{row.get('by')} with {'software key ' if row.get('software') else ''}{row.get('key')}"
        + ("" if row.get("counts", True) else " (counts no more)")
        + (f", waiver until {row['waiver'].get('until')}" if isinstance(row.get("waiver"), dict) else "")
        for row in _rows(reply.get("approvals"))
    ]
    parts = [f"needs {reply.get('needs')}", f"given by {'; '.join(given)}" if given else "none yet"]
    if shown.state == "pending" and isinstance(names := reply.get("may_approve"), list) and names:
        parts.append(f"may approve: {', '.join(map(str, names))}")
    if (presence := reply.get("presence")) is not None:
        parts.append(f"the asker's own signature is {presence}")
    return ", ".join(parts)


def _told(rows: list[Any]) -> str:
    """Of each channel how it was told last, and why not; malformed rows are left out."""
    lines = {}
    for row in _rows(rows):
        names = row.get("people")
        people = f", read by {', '.join(map(str, names))}" if isinstance(names, list) and names else ""
        error = f": {row['error']}" if row.get("error") else ""
        channel = str(row.get("channel"))
        lines[channel] = f"{channel} ({row.get('kind')}{people}): {row.get('state')}{error}"
    return "; ".join(lines.values()) or "nobody"


def _rows(value: object) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _ordinal(number: object) -> str:
    if not isinstance(number, int):
        return "unknown"
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


# --- the decision -----------------------------------------------------------------------------------------------


def _ask(shown: Shown, waiver: Mapping[str, object] | None) -> None:
    also = f", and the same ask until {waiver['until']}, {waiver['uses']} times" if waiver else ""
    output.require_yes(
        f"approve {shown.id}{also}? yes or no",
        f"{shown.id} is not approved",
        "add --yes to sign unasked",
        "nothing was sent; deny it if you mean no",
    )
