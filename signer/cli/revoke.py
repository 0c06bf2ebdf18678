"""`signer revoke` and `signer revocations`: have every host refuse certificates or a key, and see what was revoked."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from signer.cli import output
from signer.cli.arguments import REASON
from signer.cli.connection import Service, service_options
from signer.cli.host_keys import count_with
from signer.cli.parser import verb
from signer.cli.usage import UsageError
from signer.errors import SignerError
from signer.units import plain

if TYPE_CHECKING:
    from signer.api_client import ApiClient

_WAYS = ("serial", "identity", "key", "since", "ca")


@verb(
    "revoke",
    'signer revoke --identity deploy-agent --reason "its laptop was stolen" --yes',
    "signer revoke --serial 4711-4720 --reason INC-812",
    "signer revoke --since 2027-01-15T08:00:00Z --reason INC-812",
)
@click.option("--serial", metavar="N[-M]", help="this certificate, or a range of serials")
@click.option("--identity", metavar="NAME", help="all certificates of an identity, which is also frozen")
@click.option("--key", metavar="SHA256:…", help="a public key: all of its certificates, for ever")
@click.option("--since", metavar="TIME", help="all certificates issued since then, such as 2027-01-15T08:00:00Z")
@click.option("--ca", metavar="SHA256:…", help="a CA key: all certificates that it ever signed or will sign")
@click.option("--reason", type=REASON, metavar="TEXT", required=True, help="for the ledger")
@click.option("--yes", is_flag=True, help="revoke without asking")
@service_options
def revoke(*, reason: str, yes: bool, service: Service, as_json: bool, **ways: str | None) -> None:
    """Has every host refuse certificates that were issued, with the next revocation list that it fetches. It
    cannot be taken back. Shows first what it would hit, and at the end how many hosts have the new list, if the
    token may see hosts (`hosts` or `ledger.read`). Needs a token with the right `revoke`, which no agent
    has; --identity also needs `freeze`. Exit status 3 if you say no, or without a terminal and --yes."""
    given = [(by, value) for by in _WAYS if (value := ways[by]) is not None]
    if len(given) != 1:
        flags = ", ".join(f"--{by}" for by in _WAYS)
        raise UsageError(f"{len(given)} of {flags} are given", "give exactly one of them")
    ((by, value),) = given
    with service.open() as api:
        preview = api.get("revocations", "preview", by=by, value=value)
        if not as_json:
            _show_preview(by, value, preview)
        if not yes:
            output.require_yes(
                f"revoke {by} {plain(value)}? it cannot be taken back; yes or no",
                "nothing is revoked",
                "add --yes to revoke unasked",
                "nothing was sent",
            )
        made = api.post("revocations", body={"by": by, "value": value, "reason": reason})
        hosts, text = _hosts_with(api, int(made["seq"]))
    if as_json:
        output.show_json({**made, "hit": preview, "hosts": hosts})
        return
    frozen = f", and identity:{value} is frozen" if made.get("frozen") else ""
    output.show(plain(f"revoked by {by} {value}: list version {made['seq']}{frozen}"))
    output.show(plain(text))
    output.note("hosts refuse with the list that they fetch next; `signer hosts seen` shows which have it")


def _hosts_with(api: ApiClient, version: int) -> tuple[dict[str, int] | None, str]:
    """How many hosts have list `version` or a newer one, and the line that says so; None if that cannot be read.

    The revocation is recorded by now, so nothing here may end the verb as a failure.
    """
    try:
        seen, current = count_with(api.hosts(), version, int(time.time()))
    except SignerError as error:
        return None, f"which hosts have version {version} is not known: {error.text}"
    if not seen:
        return {"seen": 0, "current": 0}, "no host fetched the list in the last 15 minutes"
    hosts = output.count(seen, "host")
    text = f"{current} of {hosts} seen in the last 15 minutes have version {version} or a newer one"
    return {"seen": seen, "current": current}, text


def _show_preview(by: str, value: str, preview: Mapping[str, Any]) -> None:
    output.note(plain(f"{by} {value} hits {output.count(preview['certificates'], 'valid certificate')}"))
    for title, name in (("of", "identities"), ("for", "principals")):
        if found := preview[name]:
            names = ", ".join(f"{row['name']} ({row['certificates']})" for row in found)
            output.note_bare(plain(f"  {title} {names}"))
    for row in preview["newest"]:
        facts = f"{row['serial']}  {row['identity']}  {','.join(row['principals'])}  until {row['valid_before']}"
        output.note_bare(plain(f"  serial {facts}"))


@verb("revocations", "signer revocations", "signer revocations --json | jq -r '.revocations[].value'")
@service_options
def revocations(*, service: Service, as_json: bool) -> None:
    """Shows all revocations, newest first, also of certificates that have expired since and are on no list any
    more. Needs the right `revoke` or `ledger.read`."""
    with service.open() as api:
        found = list(api.revocations())
    titles = ("VERSION", "TIME", "BY", "WHAT", "VALUE", "REASON")
    rows = [tuple(str(row[name]) for name in ("seq", "time", "actor", "by", "value", "reason")) for row in found]
    output.show_rows({"revocations": found}, titles, rows, "nothing was revoked", as_json=as_json)
