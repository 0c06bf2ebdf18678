"""`signer hosts add`, `list` and `remove`: the list of host keys that clients verify hosts by; `hosts seen`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from signer.cli import output
from signer.cli.arguments import DURATION, FILE
from signer.cli.connection import Service, service_options
from signer.cli.keys import MAX_KEYS, STDIN, read_public_keys
from signer.cli.parser import verb
from signer.errors import BadRequest, Refused
from signer.model import MAX_HOST_PRINCIPALS
from signer.units import cut, timestamp

if TYPE_CHECKING:
    from signer.model import PublicKey


@verb(
    "hosts add",
    "signer hosts add edge1 --also 192.0.2.7 --keys edge1.pub --principals llmops,ops",
    "signer hosts add '[edge1]:2222' --keys - --yes <edge1.pub",
)
@click.argument("name", metavar="NAME", help="as it is given to ssh: a name or an address, or [NAME]:PORT")
@click.option(
    "--keys", type=FILE, metavar="FILE", required=True, help="its .pub files, or ssh-keyscan's output; - is stdin"
)
@click.option("--also", "addresses", multiple=True, metavar="NAME", help="another name or address; repeat for more")
@click.option(
    "--principals",
    metavar="P,...",
    help=f"the principals that it lets in, at most {MAX_HOST_PRINCIPALS}; else those that are recorded stay",
)
@click.option("--replace", is_flag=True, help="take the place of the keys that are listed")
@click.option("--yes", is_flag=True, help="list the keys without asking")
@service_options
def hosts_add(
    *,
    name: str,
    keys: Path,
    addresses: tuple[str, ...],
    principals: str | None,
    replace: bool,
    yes: bool,
    service: Service,
    as_json: bool,
) -> None:
    """Lists the public keys of a host: `safe-session` then logs in to it without a question and refuses
    any other key. Compare the fingerprints with those on the host's console (`ssh-keygen -lf`): whoever
    sits between you and the host answers ssh-keyscan, too. --principals records whom the host lets in,
    for `signer certs list --on`: the names in its principals files, which this changes nothing about.
    Needs the right `hosts`, which only humans have. Recorded. Exit status 3 if you say no, or without a
    terminal and --yes."""
    from signer.ssh.known_hosts import parse_host_name, parse_host_principals, read_key_file

    names = list(dict.fromkeys(map(parse_host_name, (name, *addresses))))
    found = read_key_file(read_public_keys(keys).decode("utf-8", "replace"), names)
    listed_principals = None if principals is None else parse_host_principals(principals.split(","))
    if not as_json:
        _show_keys(names, found)
    if not yes:
        output.require_yes(
            f"are these the keys of {names[0]}? yes or no",
            f"{names[0]} is not listed",
            "add --yes to list it unasked",
            "nothing was sent",
            can_ask=str(keys) != STDIN,
        )
    listed = _list_keys(service, names, found, listed_principals, replace=replace)
    output.show_result(listed, f"{names[0]} is listed with {output.count(len(found), 'key')}", as_json=as_json)


def _list_keys(
    service: Service, names: list[str], keys: Sequence[PublicKey], principals: Sequence[str] | None, *, replace: bool
) -> dict[str, Any]:
    """The service's answer; without `principals` those that are recorded stay."""
    from signer.ssh.known_hosts import key_line

    body = {"name": names[0], "addresses": names[1:], "keys": [key_line(key) for key in keys], "replace": replace}
    if principals is not None:
        body["principals"] = list(principals)
    with service.open() as api:
        reply: dict[str, Any] = api.post("host-keys", body=body)
    return reply


def _show_keys(names: Sequence[str], keys: Sequence[PublicKey]) -> None:
    output.note(", ".join(names))
    for key in keys:
        output.note_bare(f"  {key.kind}  {key.bits}  {key.fingerprint}")


class SeenKeys(NamedTuple):
    """The keys that a host has in use, and the name by which ssh knows it."""

    name: str
    keys: list[PublicKey]


def read_seen_keys(words: Sequence[str], text: str) -> SeenKeys | None:
    """The keys in `text`, which the host has sent; `words` are ssh's, with which it was reached. Leaves out those that
    cannot be listed; None if nothing is left, or if clients cannot know the host by this name."""
    import shutil

    from signer.safe_session.listed import Question
    from signer.ssh.known_hosts import parse_host_key, parse_host_name

    keys = []
    for line in text[:MAX_KEYS].splitlines():
        with suppress(BadRequest):
            keys.append(parse_host_key(" ".join(line.split()[:2])))
    names = Question(shutil.which("ssh") or "", list(words)).names()
    try:
        return SeenKeys(parse_host_name(names[-1]), keys) if names and keys else None
    except BadRequest:
        return None


def offer_keys(
    found: SeenKeys, principals: Sequence[str], service: Service | None, *, as_json: bool
) -> dict[str, object]:
    """Shows the keys, and lists them, and the principals that the host lets in, at the service, if any; returns the
    facts."""
    if not as_json:
        _show_keys([found.name], found.keys)
    if service is not None:
        _list_keys(service, [found.name], found.keys, principals, replace=False)
        if not as_json:
            output.show(f"{found.name} is listed with {output.count(len(found.keys), 'key')}")
    elif not as_json:
        output.note("clients do not know these keys unless you list them: --add-keys, or `signer hosts add`")
    fingerprints = [key.fingerprint for key in found.keys]
    return {"name": found.name, "fingerprints": fingerprints, "listed": service is not None}


def check_may_list(service: Service) -> None:
    """Raises `Refused` unless the token has the right `hosts`: before anything is done on a host."""
    with service.open() as api:
        caller = api.whoami()
    if "hosts" not in caller.get("may", ()):
        raise Refused(
            "not_permitted", f"{caller.get('identity')} lacks the right hosts", "leave out --add-keys, or ask a human"
        )


@verb("hosts list", "signer hosts list", "signer hosts list --json | jq -r '.hosts[].name'")
@service_options
def hosts_list(*, service: Service, as_json: bool) -> None:
    """Shows the listed hosts, their names and addresses, the principals that they let in, as far as these are
    recorded, their keys, and who listed them when. Needs the right `hosts` or `ledger.read`."""
    with service.open() as api:
        found = api.host_keys()
    titles = ("HOST", "ADDRESSES", "PRINCIPALS", "KEY", "FINGERPRINT", "BY", "SINCE")
    rows = (row for host in found for row in _rows(host))
    output.show_rows({"hosts": found}, titles, rows, "no hosts are listed", as_json=as_json)


def _rows(host: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each key; the facts of the host are in the first one."""
    known = host.get("principals")
    principals = ",".join(map(str, known)) if isinstance(known, list) else "unknown"
    first = (
        str(host.get("name")),
        ",".join(map(str, host.get("addresses") or [])) or "-",
        cut(principals, 40),
    )
    last = (str(host.get("by")), str(host.get("since")))
    rows: list[tuple[str, ...]] = []
    for key in host.get("keys") or []:
        rows.append((*first, str(key.get("kind")), str(key.get("fingerprint")), *last))
        first, last = ("", "", ""), ("", "")
    return rows


@verb("hosts remove", "signer hosts remove edge1")
@click.argument("name", metavar="NAME", help="as `hosts list` shows it")
@service_options
def hosts_remove(*, name: str, service: Service, as_json: bool) -> None:
    """Takes a host off the list. From then on `safe-session` treats it as a host that it does not know: ssh does
    what its own configuration says. Needs the right `hosts`. Recorded."""
    with service.open() as api:
        removed = api.delete("host-keys", name)
    output.show_result(removed, f"{removed.get('name')} is no longer listed", as_json=as_json)


# --- hosts seen -----------------------------------------------------------------------------------------------------


LATELY: Final = 900  # seconds; a host that is up fetches each minute, and raises an alarm after so long
_PAUSE: Final = 1.0  # seconds between two questions


@verb("hosts seen", "signer hosts seen", "signer hosts seen --wait 2m")
@click.option("--wait", type=DURATION, metavar="DURATION", help="until each host seen lately has it, at most so long")
@service_options
def hosts_seen(*, wait: int | None, service: Service, as_json: bool) -> int:
    """Shows the hosts that fetched the revocation list in the last day, and which version each has. Their names
    are what they say of themselves. Exit status 1 with --wait if the time is over and a host that was seen in
    the last 15 minutes does not have the newest version. Needs the right `hosts` or `ledger.read`."""
    deadline = time.monotonic() + (wait or 0)
    with service.open() as api:
        found = api.hosts()
        while wait is not None and not is_everywhere(found, int(time.time())) and time.monotonic() < deadline:
            time.sleep(_PAUSE)
            found = api.hosts()
    done = is_everywhere(found, int(time.time()))
    if as_json:
        output.show_json({**found, "everywhere": done})
    else:
        rows = sorted(found["hosts"], key=lambda row: (row["current"], row["name"]))
        if rows:
            names = ("name", "version", "current", "seen")
            cells = [[output.readable(row[name]) for name in names] for row in rows]
            output.show_table([("HOST", "VERSION", "NEWEST", "SEEN"), *cells])
        output.show(summary(found, int(time.time())))
    return 0 if done or wait is None else 1


def _lately(found: Mapping[str, Any], now: int) -> list[Mapping[str, Any]]:
    return [row for row in found["hosts"] if row["seen"] and row["seen"] >= timestamp(now - LATELY)]


def is_everywhere(found: Mapping[str, Any], now: int) -> bool:
    """Whether the newest list is published, and each host that was seen lately has it; `found` is of `/api/hosts`."""
    return found["version"] == found["wanted"] and all(row["current"] for row in _lately(found, now))


def summary(found: Mapping[str, Any], now: int) -> str:
    """One line: how many of the hosts that were seen lately have the newest list."""
    lately = _lately(found, now)
    current = sum(bool(row["current"]) for row in lately)
    wanted = found["version"] if found["wanted"] is None else found["wanted"]
    return f"{current} of {output.count(len(lately), 'host')} seen in the last 15 minutes have version {wanted}"


def count_with(found: Mapping[str, Any], version: int, now: int) -> tuple[int, int]:
    """How many hosts were seen lately, and how many of them have list `version` or a newer one.

    It goes by the version that each host fetched, not by `current`: just after a revocation, the newest list that
    `/api/hosts` knows can still be the one before.
    """
    lately = _lately(found, now)
    return len(lately), sum((row["version"] or 0) >= version for row in lately)
