"""`signer policy check|explain` and `signer token new`: policy.toml and what goes into it. Nothing is written."""

from __future__ import annotations

import difflib
import os
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from signer.authority.queries import explanation
from signer.cli import output
from signer.cli.keys import load_public_key
from signer.errors import BadFile, BadPublicKey, Refused, SignerError
from signer.model import Ask, Finding, Identity, PublicKey, Role, Usage
from signer.policy.decide import Policy, explain
from signer.policy.file import load_policy
from signer.policy.tokens import SECRET_BYTES, render_token, token_digest
from signer.settings import Settings
from signer.units import render_duration, timestamp

_DAY: Final = 86_400
NOT_LOOKED_AT: Final = ("limits", "freezes")  # only the running keeper knows them


def policy_check(arguments: Namespace, settings: Callable[[], Settings]) -> int:
    """What a policy file holds, or everything that is wrong with it."""
    path = Path(arguments.file) if arguments.file else settings().policy_file
    try:
        policy = load_policy(path)
    except BadFile as error:
        if error.code != "policy_refused":
            raise
        _show_problems(path, error, as_json=arguments.json)
        return 1
    facts: dict[str, object] = {
        "roles": sorted(policy.roles),
        "identities": sorted(policy.identities),
        "tokens": len(policy.tokens),
        "ca_fingerprint": policy.ca.fingerprint,
        "ca_next": policy.ca.next.fingerprint if policy.ca.next else None,
        "ca_retired": [key.fingerprint for key in policy.ca.retired],
        "sha256": policy.digest,
    }
    if arguments.json:
        output.show_json({"file": str(path), "good": True, "problems": [], **facts})
    else:
        output.show(f"{output.plain(path)}: good")
        output.show_table(
            [
                (name.replace("_", " "), ", ".join(value) if isinstance(value, list) else value)
                for name, value in facts.items()
                if value not in (None, [])
            ],
            "  ",
        )
    return 0


def _show_problems(path: Path, error: BadFile, *, as_json: bool) -> None:
    if as_json:
        problems = [" ".join(problem.split()) for problem in error.problems]
        output.show_json({"file": str(path), "good": False, "problems": problems})
        return
    output.show(output.plain(error.text))
    for problem in error.problems:
        output.show(f"  {output.plain(problem)}")


def policy_explain(arguments: Namespace, settings: Callable[[], Settings]) -> int:
    """Every rule that was looked at for one request, and whether it would be granted."""
    policy = load_policy(settings().policy_file)
    ask = Ask(
        role=arguments.role,
        public_key="",
        principals=tuple(arguments.principal) if arguments.principal else None,
        ttl=arguments.ttl,
        extensions=tuple((name, "") for name in arguments.extension or ()),
        reason=arguments.reason,
    )
    key = _read_key(Path(arguments.key)) if arguments.key else None
    answer = _explain(policy, arguments.identity, ask, key, arguments.address, int(time.time()))
    if arguments.json:
        output.show_json({**answer, "not_looked_at": list(NOT_LOOKED_AT)})
    else:
        _show_explanation(answer)
    return 0 if answer["granted"] else 1


def _read_key(path: Path) -> PublicKey | BadPublicKey:
    """The key; one that is malformed is a finding of its own. Raises `BadFile` for a file that cannot be read."""
    try:
        return load_public_key(path)
    except BadPublicKey as fault:
        return fault


def _explain(
    policy: Policy, name: str, ask: Ask, key: PublicKey | BadPublicKey | None, address: str | None, now: int
) -> dict[str, Any]:
    """As the keeper explains (`queries`), with what precedes the rules: who asks, and may they at all."""
    identity, role = policy.identities.get(name), policy.roles.get(ask.role)
    first = [_judge("identity", lambda: _see_identity(policy, name, now))]
    first.append(_judge("role", lambda: _see_role(policy, identity, ask.role)))
    rest: list[tuple[Finding, Refused | None]] = []
    if identity is not None and role is not None:
        fault = key.text if isinstance(key, BadPublicKey) else "no key was given"
        vetted = key if isinstance(key, PublicKey) else None
        for finding, refusal in explain(identity, role, ask, vetted, address, Usage(), fault):
            rest.append((_see_limits(role), None) if finding.rule == "limits" else (finding, refusal))
        if isinstance(key, BadPublicKey):
            refusal = Refused(key.code, key.text, key.hint)
            rest[0] = (Finding("key", key.text, "refused"), refusal)
    return explanation(name, ask.role, [*first, *rest])


def _judge(rule: str, see: Callable[[], str]) -> tuple[Finding, Refused | None]:
    try:
        return Finding(rule, see(), "ok"), None
    except Refused as refusal:
        return Finding(rule, refusal.text, "refused"), refusal


def _see_identity(policy: Policy, name: str, now: int) -> str:
    """Who that is and until when they can prove it; raises `Refused`."""
    identity = policy.identities.get(name)
    if identity is None:
        hint = _nearest(name, policy.identities, "add it")
        raise Refused("unknown_identity", f"there is no identity {name[:64]}", hint)
    ends = sorted(token.expires for token in policy.tokens.values() if token.identity == name)
    if not ends:
        raise Refused("no_token", f"{name} has no token", f"make one: `signer token new {name} --expires 90d`")
    if ends[-1] <= now:
        raise Refused(
            "token_expired",
            f"the last token of {name} expired {_span(now - ends[-1])} ago",
            f"make another one: `signer token new {name} --expires 90d`",
        )
    which = "token" if len(ends) == 1 else f"the last of {len(ends)} tokens"
    return f"{name}, {identity.kind}, {which} expires in {_span(ends[-1] - now)}"


def _see_role(policy: Policy, identity: Identity | None, name: str) -> str:
    if name not in policy.roles:
        raise Refused("unknown_role", f"there is no role {name[:64]}", _nearest(name, policy.roles, "add it"))
    if identity is None:
        return "there is such a role"
    policy.role_for(identity, name)
    return f"{identity.name} may ask for {name}"


def _see_limits(role: Role) -> Finding:
    limits = role.limits
    said = [f"{limits.per_minute} a minute"] if limits.per_minute is not None else []
    said += [f"{limits.live} live"] if limits.live is not None else []
    return Finding("limits", f"{', '.join(said)}: the keeper counts" if said else "none", "skipped" if said else "ok")


def _nearest(name: str, known: Mapping[str, object], otherwise: str) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]}" if near else f"{otherwise}; policy.toml has {', '.join(sorted(known)[:8])}"


def _span(seconds: int) -> str:
    """A span as a person says it: its largest unit or two."""
    if seconds >= 2 * _DAY:
        return f"{seconds // _DAY} days"
    return render_duration(seconds - seconds % 60 if seconds >= 60 else seconds)


def _show_explanation(answer: dict[str, Any]) -> None:
    what = f"{answer['identity']} would get a certificate of role {answer['role']}"
    if any(rule["rule"] == "key" and rule["outcome"] == "skipped" for rule in answer["rules"]):
        what += ", for a key that it allows"
    output.show(output.plain(f"granted: {what}" if answer["granted"] else f"refused: {answer['text']}"))
    output.show()
    output.show_table([(rule["rule"], rule["detail"], rule["outcome"]) for rule in answer["rules"]], "  ")
    output.show()
    if answer.get("hint"):
        output.show(output.plain(f"hint: {answer['hint']}"))
    output.show(f"not looked at: {' and '.join(NOT_LOOKED_AT)}, which only the running keeper knows")


def token_new(arguments: Namespace, settings: Callable[[], Settings]) -> int:
    """A new token, and what policy.toml needs to know of it."""
    name, span = arguments.identity, arguments.expires
    known = _known_tokens(name, settings)
    token = render_token(os.urandom(SECRET_BYTES))
    digest, expires = token_digest(token), timestamp(int(time.time()) + span)
    entry = f'{{ sha256 = "{digest}", expires = {expires} }}'
    line = f"tokens = [{entry}]"
    if arguments.json:
        output.show_json({"token": token, "sha256": digest, "expires": expires, "policy_line": line})
    else:
        output.show(token)
    output.say("this token is shown once and stored nowhere; keep it where only its owner can read it")
    if known:
        output.say(f"add to the list identities.{name}.tokens in policy.toml, and send the keeper SIGHUP:")
        output.say_bare(f"  {entry}")
    else:
        output.say(f"put into [identities.{name}] in policy.toml, and send the keeper SIGHUP:")
        output.say_bare(f"  {line}")
    return 0


def _known_tokens(name: str, settings: Callable[[], Settings]) -> int:
    """How many tokens policy.toml holds for the identity already; what cannot be read is only worth a warning."""
    try:
        policy = load_policy(settings().policy_file)
    except SignerError as error:
        output.warn(f"not compared with the policy: {error.text}")
        return 0
    if name not in policy.identities:
        near = difflib.get_close_matches(name, list(policy.identities), 1)
        output.warn(f"the policy has no identity {name}" + (f", did you mean {near[0]}" if near else ""))
    return sum(token.identity == name for token in policy.tokens.values())
