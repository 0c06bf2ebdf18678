"""`signer hosts add`, `list` and `remove`: the list of host keys that clients verify hosts by."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from signer.cli import output
from signer.cli.arguments import FILE, json_option
from signer.cli.connection import connection_options, open_api
from signer.cli.parser import verb
from signer.errors import BadFile, BadRequest, Refused
from signer.model import MAX_HOST_PRINCIPALS
from signer.units import plain

if TYPE_CHECKING:
    from signer.model import PublicKey

_STDIN: Final = "-"
_MOST: Final = 64 * 1024  # bytes of a file of keys


@verb(
    "hosts add",
    examples=[
        "signer hosts add edge1 --also 192.0.2.7 --keys edge1.pub --principals llmops,ops",
        "signer hosts add '[edge1]:2222' --keys - --yes <edge1.pub",
    ],
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
@connection_options
@json_option
def hosts_add(
    *,
    name: str,
    keys: Path,
    addresses: tuple[str, ...],
    principals: str | None,
    replace: bool,
    yes: bool,
    address: str | None,
    token_file: Path | None,
    as_json: bool,
) -> int:
    """Lists the public keys of a host: `safe-session` then logs in to it without a question and refuses
    any other key. Compare the fingerprints with those on the host's console (`ssh-keygen -lf`): whoever
    sits between you and the host answers ssh-keyscan, too. --principals records whom the host lets in,
    for `signer certs list --on`: the names in its principals files, which this changes nothing about.
    Needs the right `hosts`, which only humans have. Recorded. Exit status 3 if you say no, or without a
    terminal and --yes."""
    from signer.ssh.known_hosts import key_line, parse_host_name, parse_host_principals, read_key_file

    names = list(dict.fromkeys(map(parse_host_name, (name, *addresses))))
    found = read_key_file(_read(keys), names)
    body = {"name": names[0], "addresses": names[1:], "keys": [key_line(key) for key in found], "replace": replace}
    if principals is not None:
        body["principals"] = list(parse_host_principals(principals.split(",")))
    if not as_json:
        _show_keys(names, found)
    if not yes:
        output.require_yes(
            f"are these the keys of {names[0]}? yes or no",
            f"{names[0]} is not listed",
            "add --yes to list it unasked",
            "nothing was sent",
            can_ask=str(keys) != _STDIN,
        )
    with open_api(address, token_file) as api:
        listed = api.add_host_keys(body)
    if as_json:
        output.show_json(listed)
    else:
        output.show(f"{names[0]} is listed with {output.count(len(found), 'key')}")
    return 0


def _show_keys(names: Sequence[str], keys: Sequence[PublicKey]) -> None:
    output.note(", ".join(names))
    for key in keys:
        output.note_bare(f"  {key.kind}  {key.bits}  {key.fingerprint}")


def _read(path: Path) -> str:
    """The text of a file with keys; raises `BadFile`."""
    try:
        if str(path) == _STDIN:
            raw = sys.stdin.buffer.read(_MOST + 1)
        else:
            with path.open("rb") as file:
                raw = file.read(_MOST + 1)
    except OSError as error:
        raise BadFile(
            "file_unreadable", f"{path} cannot be read: {error.strerror}", "name a file that is there"
        ) from None
    if b"PRIVATE KEY-----" in raw:
        raise BadFile("file_is_a_private_key", f"{path} holds a private key", "name its .pub file")
    if len(raw) > _MOST:
        raise BadFile("file_too_large", f"{path} has more than {_MOST} bytes", "name a file of one host's keys")
    return raw.decode("utf-8", "replace")


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
    for line in text[:_MOST].splitlines():
        with suppress(BadRequest):
            keys.append(parse_host_key(" ".join(line.split()[:2])))
    names = Question(shutil.which("ssh") or "", list(words)).names()
    try:
        return SeenKeys(parse_host_name(names[-1]), keys) if names and keys else None
    except BadRequest:
        return None


def offer_keys(
    found: SeenKeys, principals: Sequence[str], where: tuple[str | None, Path | None] | None, *, as_json: bool
) -> dict[str, object]:
    """Shows the keys, and lists them, and the principals that the host lets in, at the service with this address and
    token, if any; returns the facts."""
    from signer.ssh.known_hosts import key_line

    if not as_json:
        _show_keys([found.name], found.keys)
    if where is not None:
        body = {
            "name": found.name,
            "addresses": [],
            "keys": [key_line(key) for key in found.keys],
            "replace": False,
            "principals": list(principals),
        }
        with open_api(*where) as api:
            api.add_host_keys(body)
        if not as_json:
            output.show(f"{found.name} is listed with {output.count(len(found.keys), 'key')}")
    elif not as_json:
        output.note("clients do not know these keys unless you list them: --add-keys, or `signer hosts add`")
    fingerprints = [key.fingerprint for key in found.keys]
    return {"name": found.name, "fingerprints": fingerprints, "listed": where is not None}


def check_may_list(address: str | None, token_file: Path | None) -> None:
    """Raises `Refused` unless the token has the right `hosts`: before anything is done on a host."""
    with open_api(address, token_file) as api:
        caller = api.whoami()
    if "hosts" not in caller.get("may", ()):
        raise Refused(
            "not_permitted", f"{caller.get('identity')} lacks the right hosts", "leave out --add-keys, or ask a human"
        )


@verb("hosts list", examples=["signer hosts list", "signer hosts list --json | jq -r '.hosts[].name'"])
@connection_options
@json_option
def hosts_list(*, address: str | None, token_file: Path | None, as_json: bool) -> int:
    """Shows the listed hosts, their names and addresses, the principals that they let in, as far as these are
    recorded, their keys, and who listed them when. Needs the right `hosts` or `ledger.read`."""
    with open_api(address, token_file) as api:
        found = api.host_keys()
    if as_json:
        output.show_json({"hosts": found})
    elif found:
        titles = ("HOST", "ADDRESSES", "PRINCIPALS", "KEY", "FINGERPRINT", "BY", "SINCE")
        output.show_table((row for host in found for row in _rows(host)), titles=titles)
    else:
        output.note("no hosts are listed")
    return 0


def _rows(host: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each key; the facts of the host are in the first one."""
    known = host.get("principals")
    principals = ",".join(map(str, known)) if isinstance(known, list) else "unknown"
    first = (
        str(host.get("name")),
        ",".join(map(str, host.get("addresses") or [])) or "-",
        principals if len(principals) <= 40 else f"{principals[:39]}…",
    )
    last = (str(host.get("by")), str(host.get("since")))
    rows: list[tuple[str, ...]] = []
    for key in host.get("keys") or []:
        rows.append((*first, str(key.get("kind")), str(key.get("fingerprint")), *last))
        first, last = ("", "", ""), ("", "")
    return rows


@verb("hosts remove", examples=["signer hosts remove edge1"])
@click.argument("name", metavar="NAME", help="as `hosts list` shows it")
@connection_options
@json_option
def hosts_remove(*, name: str, address: str | None, token_file: Path | None, as_json: bool) -> int:
    """Takes a host off the list. From then on `safe-session` treats it as a host that it does not know: ssh does
    what its own configuration says. Needs the right `hosts`. Recorded."""
    with open_api(address, token_file) as api:
        removed = api.remove_host_keys(name)
    if as_json:
        output.show_json(removed)
    else:
        output.show(plain(f"{removed.get('name')} is no longer listed"))
    return 0
