"""`signer freeze`, `unfreeze` and `freezes`: stop issuing at once, issue again, and see what is stopped."""

from __future__ import annotations

import json
import os
import uuid
from typing import TYPE_CHECKING, Any, Final

import click

from signer.cli import output
from signer.cli.arguments import DURATION, REASON, OneOf, read_settings
from signer.cli.connection import Service, service_options
from signer.cli.parser import verb
from signer.cli.usage import UsageError
from signer.errors import BadSettings, SignerError
from signer.units import render_duration

if TYPE_CHECKING:
    from signer.protocol.replies import Reply

_KINDS: Final = OneOf(("identity", "role", "all"))
_OF_ALL: Final = "signer freeze all"  # the reason in an emergency, for which nobody should have to think of words


@verb("freeze", "signer freeze all", 'signer freeze identity deploy-agent --reason "its token leaked" --until 2h')
@click.argument("kind", type=_KINDS, metavar="KIND", help="identity, role or all")
@click.argument("name", metavar="NAME", required=False, help="of the identity or the role")
@click.option("--reason", type=REASON, metavar="TEXT", help="for the ledger and for those whom it stops")
@click.option("--until", "lasts", type=DURATION, metavar="DURATION", help="from now, such as 2h; default: until lifted")
@service_options
def freeze(
    *,
    kind: str,
    name: str | None,
    reason: str | None,
    lasts: int | None,
    service: Service,
    as_json: bool,
) -> None:
    """Issues nothing from the next request on, also to requests that wait for their signature; certificates
    that were issued stay valid until they end. Needs a token with the right `freeze`; on the signer's host root
    and the keeper's user need none, and a token that only the environment names does not stop them. An agent
    may freeze only itself. A second freeze never shortens the first."""
    scope = _scope(kind, name)
    if reason is None and scope != "all":
        raise UsageError("--reason is missing", "say in one line why, for the ledger and for those whom it stops")
    body = {"scope": scope, "reason": reason or _OF_ALL, **({} if lasts is None else {"lasts": render_duration(lasts)})}
    state = _freeze(body, service)
    end = f" until {state['until']}" if state.get("until") else ""
    output.show_result(state, f"{scope} is frozen{end}: nothing is issued to it", as_json=as_json)
    if not as_json:
        output.note(f"issue again with `signer unfreeze {' '.join(filter(None, (kind, name)))}`; see `signer freezes`")


@verb("unfreeze", "signer unfreeze all", "signer unfreeze identity deploy-agent")
@click.argument("kind", type=_KINDS, metavar="KIND", help="identity, role or all")
@click.argument("name", metavar="NAME", required=False, help="of the identity or the role")
@service_options
def unfreeze(*, kind: str, name: str | None, service: Service, as_json: bool) -> None:
    """Needs the token of a human with the right `freeze` who is not frozen by name; nobody lifts what stops
    themselves, and no agent lifts anything."""
    scope = _scope(kind, name)
    with service.open() as api:
        state = api.delete("freezes", scope)
    output.show_result(state, f"{scope} is no longer frozen", as_json=as_json)


@verb("freezes", "signer freezes", "signer freezes --json | jq -r '.freezes[].scope'")
@service_options
def freezes(*, service: Service, as_json: bool) -> None:
    """Shows those that stop you, and with the right `freeze` or `ledger.read` all of them; on the signer's host
    root and the keeper's user need no token."""
    if service.token_file is None and (not service.has_token or _may_ask_keeper(service)):
        found = _ask_keeper({"op": "freezes"})
    else:
        with service.open() as api:
            found = api.get("freezes")
    rows = [(row["scope"], row["since"], row.get("until", "-"), row["by"], row["reason"]) for row in found["freezes"]]
    titles = ("SCOPE", "SINCE", "UNTIL", "BY", "REASON")
    output.show_rows(found, titles, rows, "nothing is frozen", as_json=as_json)


def _freeze(body: dict[str, str], service: Service) -> dict[str, Any]:
    """The state after the freeze.

    A token of the environment may be an agent's, or have ended: it does not keep root from an emergency stop.
    """
    if service.has_token:
        try:
            with service.open() as api:
                state: dict[str, Any] = api.post("freezes", body=body)
                return state
        except SignerError as error:
            if service.token_file is not None or not _may_ask_keeper(service):
                raise
            output.note(f"the token of SAFE_SESSION_TOKEN_FILE did not do it: {error.text}; asked without it instead")
    return _ask_keeper({"op": "freeze"}, json.dumps(body).encode())


def _may_ask_keeper(service: Service) -> bool:
    """Whether this is root or the keeper's user on the host of the service that would be asked over HTTP."""
    if not service.is_local:
        return False
    try:
        path = read_settings().socket
        return path.exists() and (os.geteuid() == 0 or os.access(path, os.W_OK, effective_ids=True))
    except (SignerError, PermissionError):
        return False


def _scope(kind: str, name: str | None) -> str:
    """`all`, `identity:NAME` or `role:NAME`; raises `UsageError`."""
    if kind == "all":
        if name is not None:
            raise UsageError("all takes no name", "see `signer freeze --help`")
        return "all"
    if not name:
        raise UsageError(f"the name of the {kind} is missing", f"write its name after {kind}, as in policy.toml")
    return f"{kind}:{name}"


def _ask_keeper(header: dict[str, object], body: bytes = b"") -> dict[str, Any]:
    """The reply of the keeper on this host; raises what it answers, `Unavailable` or `BadSettings`."""
    from signer.protocol.client import KeeperClient
    from signer.service.file_access import become_reader

    settings = read_settings()
    if os.geteuid() == 0:  # in a container it may not use the keeper's socket either, and becomes the keeper's user
        become_reader(settings)
    path = settings.socket
    try:
        is_denied = path.exists() and not os.access(path, os.W_OK, effective_ids=True)
    except PermissionError:  # the directory may not be searched
        is_denied = True
    if is_denied:
        raise BadSettings(
            "token_file_missing",
            f"{path} is not yours to use, and no token was given",
            "run this as root or as the keeper's user, or give --token-file",
        )
    reply: Reply = KeeperClient(path).ask({**header, "local": True, "request_id": str(uuid.uuid4())}, body)
    return reply.model_dump(exclude_unset=True)
