"""`signer token new|list|renew|revoke`: the tokens of policy.toml, of which it contains only the SHA-256; `whoami`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from signer.cli import output
from signer.cli.arguments import IDENTITY, TOKEN_LIFE
from signer.cli.connection import Service, service_options
from signer.cli.edits import Edit, PolicyFile, edit_options, file_option, read_policy_file, write_option
from signer.cli.parser import verb
from signer.cli.places import Place, name_places
from signer.cli.suggestions import similar
from signer.errors import NotFound, Refused, SignerError
from signer.policy.tokens import ENDS_SOON, ID_DIGITS, token_id
from signer.units import timestamp

if TYPE_CHECKING:
    from signer.model import Token
    from signer.policy.decide import Policy

_ID: Final = re.compile(r"[0-9a-f]{6,64}")
token_argument: Final = click.argument(
    "token", metavar="TOKEN", help="its id in `token list`, or an identity that has one token"
)
expires_option: Final = click.option(
    "--expires", type=TOKEN_LIFE, metavar="TIME", required=True, help="from now, such as 90d"
)


def token_state(token: Token, now: int) -> str:
    """`good`, `ends soon` or `expired`."""
    if token.expires <= now:
        return "expired"
    return "ends soon" if token.expires <= now + ENDS_SOON else "good"


@verb("token new", "signer token new deploy-agent --expires 90d", "signer token new ci --expires 12h --write")
@click.argument("identity", type=IDENTITY, metavar="IDENTITY", help="the identity of the token")
@expires_option
@file_option
@write_option
def token_new(*, identity: str, expires: int, file: Path | None, write: bool, as_json: bool) -> None:
    """Prints the token on stdout, once: it is stored nowhere. The line for policy.toml, which contains only
    the token's SHA-256, goes to stderr, or with --write into the file; with --json everything is on stdout."""
    from signer.policy.edit import add_token, token_entry
    from signer.policy.tokens import SECRET_BYTES, render_token, token_digest

    token = render_token(os.urandom(SECRET_BYTES))
    digest, ends = token_digest(token), timestamp(int(time.time()) + expires)
    line = f"tokens = [{token_entry(digest, ends)}]"
    edit: Edit | None = None
    known = 0
    if write:
        found = read_policy_file(file, writes=True)
        _check_identity(found.policy, identity)
        edit = found.edit(lambda text: add_token(text, identity, digest, ends))
    else:
        known = _known_tokens(identity, file)
    facts = {"token": token, "sha256": digest, "expires": ends, "policy_line": line}
    output.show_result({**facts, **(edit.facts() if edit else {})}, token, as_json=as_json, exactly=True)
    output.note("this token is shown once and stored nowhere; keep it where only its owner can read it")
    if edit is not None:
        edit.show_next()
    elif known:
        output.note(f"add to identities.{identity}.tokens in policy.toml (--write does), then `signer reload`:")
        output.note_exactly(f"  {token_entry(digest, ends)}")
    else:
        output.note(f"put into [identities.{identity}] in policy.toml (--write does), then `signer reload`:")
        output.note_exactly(f"  {line}")


@verb("token list", "signer token list", "signer token list deploy-agent --json")
@click.argument("identity", type=IDENTITY, metavar="IDENTITY", required=False, help="default: all identities")
@file_option
def token_list(identity: str | None, file: Path | None, as_json: bool) -> None:
    """Lists the tokens of policy.toml, the next one to expire first. The id is the beginning of the SHA-256 of
    the token, which stands in the file; nothing of the token itself is known. Times are UTC."""
    now = int(time.time())
    policy = read_policy_file(file).policy
    if identity is not None:
        _check_identity(policy, identity)
    tokens = [token for token in in_order(policy.tokens.values()) if identity in (None, token.identity)]
    facts = [{**_token_facts(token, now), "sha256": token.sha256} for token in tokens]
    rows = [tuple(_token_facts(token, now).values()) for token in tokens]
    titles = ("TOKEN", "IDENTITY", "EXPIRES", "STATE")
    output.show_rows({"tokens": facts}, titles, rows, "no tokens", as_json=as_json)


def _token_facts(token: Token, now: int) -> dict[str, str]:
    ends, state = timestamp(token.expires), token_state(token, now)
    return {"id": token_id(token), "identity": token.identity, "expires": ends, "state": state}


@verb("token renew", "signer token renew deploy-agent --expires 90d --write")
@token_argument
@expires_option
@edit_options
def token_renew(*, token: str, expires: int, found: PolicyFile, as_json: bool) -> None:
    """Gives a token another end, counted from now; the token itself stays the same, so its owner does nothing.
    To replace a token that others may know: token new, then token revoke."""
    from signer.policy.edit import renew_token

    chosen = _choose(found.policy, token)
    ends = timestamp(int(time.time()) + expires)
    facts = {"id": token_id(chosen), "identity": chosen.identity, "expires": ends}
    found.edit(lambda text: renew_token(text, chosen.sha256, ends)).show(facts, as_json=as_json)


@verb("token revoke", "signer token revoke deploy-agent --write", "signer token revoke 1f0a77c2b9e4 --write")
@token_argument
@click.option("--all", "every", is_flag=True, help="every token of the identity")
@edit_options
def token_revoke(*, token: str, every: bool, found: PolicyFile, as_json: bool) -> None:
    """Removes a token from policy.toml. It is refused from the next `signer reload` on; certificates that it got
    remain valid until they end, minutes later. A freeze stops an identity at once."""
    from signer.policy.edit import remove_tokens

    chosen = _all_of(found.policy, token) if every else [_choose(found.policy, token)]
    facts = {"ids": [token_id(one) for one in chosen], "identity": chosen[0].identity}
    found.edit(lambda text: remove_tokens(text, {one.sha256 for one in chosen})).show(facts, as_json=as_json)


# --- tokens of a policy -----------------------------------------------------------------------------------------------


def in_order(tokens: Iterable[Token]) -> list[Token]:
    """The tokens, the next one to expire first."""
    return sorted(tokens, key=lambda token: (token.expires, token.identity, token.sha256))


def _check_identity(policy: Policy, name: str) -> None:
    if name not in policy.identities:
        raise unknown_identity(name, policy, f"add it: `signer identity add {name}`")


def unknown_identity(name: str, policy: Policy, otherwise: str = "see `signer policy list`") -> NotFound:
    """The error for a name that policy.toml lacks; its hint is a similar one, else `otherwise`."""
    hint = similar(name, policy.identities, otherwise)
    return NotFound("unknown_identity", f"there is no identity {name[:64]}", hint)


def _all_of(policy: Policy, name: str) -> list[Token]:
    """Every token of an identity; raises `NotFound`."""
    _check_identity(policy, name)
    found = in_order(token for token in policy.tokens.values() if token.identity == name)
    if not found:
        raise NotFound("unknown_token", f"{name} has no token", "see `signer token list`")
    return found


def _choose(policy: Policy, word: str) -> Token:
    """The one token that an id or an identity names; raises `NotFound` or `Refused`."""
    if word in policy.identities:
        found, what = _all_of(policy, word), word
    elif _ID.fullmatch(word):
        found = in_order(token for token in policy.tokens.values() if token.sha256.startswith(word))
        what = word[:ID_DIGITS]
    else:
        found, what = [], word[:64]
    if not found:
        raise NotFound("unknown_token", f"no identity and no token is named {what}", "see `signer token list`")
    if len(found) > 1:
        listed = ", ".join(f"{token_id(token)} (ends {timestamp(token.expires)})" for token in found[:8])
        raise Refused("token_ambiguous", f"{what} names {len(found)} tokens: {listed}", "name one by its id")
    return found[0]


def _known_tokens(name: str, file: Path | None) -> int:
    """The number of tokens of the identity in policy.toml; a policy that cannot be read is only a warning."""
    try:
        policy = read_policy_file(file).policy
    except SignerError as error:
        name_places(error, [] if file is None else [Place(str(file), "--file")], os.environ)
        output.warn(f"not compared with the policy: {error.text}")
        return 0
    if name not in policy.identities:
        near = similar(name, policy.identities)
        output.warn(f"the policy has no identity {name}" + (f", {near}" if near else ""))
    return sum(token.identity == name for token in policy.tokens.values())


@verb("whoami", "signer whoami --token-file operator.token")
@service_options
def whoami(service: Service, as_json: bool) -> None:
    """Shows the identity of the token, its roles, groups and rights, and when the token ends. Times are UTC."""
    with service.open() as client:
        caller = client.whoami()
    if as_json:
        output.show_json(caller)
        return
    token = caller.get("token")
    ends = token.get("expires") if isinstance(token, dict) else None
    rows = [("identity", caller.get("identity")), ("kind", caller.get("kind"))]
    rows += [(name, output.readable(caller.get(name))) for name in ("roles", "groups", "may")]
    output.show_table([*rows, ("token ends", ends or "never")])
