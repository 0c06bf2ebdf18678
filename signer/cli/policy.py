"""`signer policy check|explain` and `signer key enrol`: policy.toml. Nothing is written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from signer.cli import output
from signer.cli.arguments import ADDRESS, DURATION, FILE, read_settings
from signer.cli.parser import verb
from signer.cli.places import Place, with_places
from signer.cli.suggestions import similar
from signer.errors import BadFile, BadPublicKey, BadSettings, Refused
from signer.model import Finding, Identity, PublicKey, Role, SignRequest, UsageCounts
from signer.units import plain, render_span

if TYPE_CHECKING:
    from signer.policy.decide import Policy
    from signer.protocol.replies import Explanation
    from signer.settings import Settings

NOT_CHECKED: Final = ("limits", "freezes")  # only the running keeper knows them


@verb("policy check", "signer policy check", "signer policy check policy.toml --json")
@click.argument("file", type=FILE, metavar="FILE", required=False, help="default: SIGNER_POLICY_FILE")
def policy_check(file: Path | None, as_json: bool) -> int:
    """Reads the policy file as the keeper would, with the settings if there are any, and warns of approvals that a
    token alone can avoid.

    Exit status 1 if it has a problem; a warning is none.
    """
    from signer.policy.concerns import check_callers, find_concerns
    from signer.policy.file import parse_policy
    from signer.policy.reading import POLICY_SETTING, read_policy

    settings = None
    if file is None:
        settings = read_settings()
        path, named_by = settings.policy_file, POLICY_SETTING
    else:
        path, named_by = file, "FILE"
        settings = _settings_at_hand()
    try:
        raw = read_policy(path, named_by)
        policy = parse_policy(raw, path.name)
        if settings is not None:
            check_callers(raw, path.name, policy, settings)
    except BadFile as error:
        if error.code != "policy_refused":
            raise
        _show_problems(Place(str(path), named_by), error, as_json=as_json)
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
    concerns = list(find_concerns(policy))
    if as_json:
        warnings = [concern._asdict() for concern in concerns]
        output.show_json({"file": str(path), "good": True, "problems": [], "warnings": warnings, **facts})
    else:
        output.show(f"{plain(path)}: good")
        output.show_fields({name: value for name, value in facts.items() if value not in (None, [])}, "  ")
        for concern in concerns:
            output.warn(plain(f"{concern.text}: {concern.hint}"))
    return 0


def _settings_at_hand() -> Settings | None:
    """The settings if the environment says where the API listens; a FILE is checked without them as well."""
    if "SIGNER_LISTEN" not in os.environ:
        return None
    try:
        return read_settings()
    except BadSettings as error:
        output.warn(f"not compared with the settings: {error.text}")
        return None


def _show_problems(place: Place, error: BadFile, *, as_json: bool) -> None:
    if as_json:
        problems = [" ".join(problem.split()) for problem in error.problems]
        output.show_json({"file": place.path, "good": False, "problems": problems})
        return
    output.show(plain(with_places(error.text, [place])))
    for problem in error.problems:
        output.show(f"  {plain(problem)}")


@verb(
    "policy explain",
    "signer policy explain llmops --as deploy-agent",
    "signer policy explain llmops --as deploy-agent --key id.pub --ttl 2h --address 10.0.0.7",
)
@click.argument("role", metavar="ROLE", help="the requested role")
@click.option("--as", "identity", metavar="IDENTITY", required=True, help="the identity that requests it")
@click.option("--key", type=FILE, metavar="FILE", help="the public key to be certified, such as id.pub")
@click.option("--ttl", type=DURATION, metavar="TTL", help="such as 15m or 1h30m; default: the role's")
@click.option("--principal", "principals", multiple=True, metavar="NAME", help="repeat for more; default: the role's")
@click.option("--extension", "extensions", multiple=True, metavar="NAME", help="repeat for more; default: the role's")
@click.option("--reason", metavar="REASON", help="the reason, for roles that require one")
@click.option("--address", type=ADDRESS, metavar="IP", help="the address that the request comes from")
def policy_explain(
    *,
    role: str,
    identity: str,
    key: Path | None,
    ttl: int | None,
    principals: tuple[str, ...],
    extensions: tuple[str, ...],
    reason: str | None,
    address: str | None,
    as_json: bool,
) -> int:
    """Applies every rule of the policy file, also those after one that refuses; signs and records nothing.
    Limits and freezes are known only to the running keeper and are not checked. Exit status 1 if refused."""
    from signer.policy.concerns import LOCKED_OUT, pins_own_address
    from signer.policy.file import load_policy

    settings = read_settings()
    policy = load_policy(settings.policy_file)
    if role in pins_own_address(policy, settings):
        output.warn(f"roles.{role}.source_address: {LOCKED_OUT}")
    ask = SignRequest(
        role=role,
        public_key="",
        principals=principals or None,
        ttl=ttl,
        extensions=tuple((name, "") for name in extensions),
        reason=reason,
    )
    found = _explain(policy, identity, ask, _read_key(key) if key else None, address, int(time.time()))
    if as_json:
        output.show_json({**found.model_dump(exclude_unset=True), "not_looked_at": list(NOT_CHECKED)})
    else:
        _show_explanation(found)
    return 0 if found.granted else 1


def _read_key(path: Path) -> PublicKey | BadPublicKey:
    """The key, or what is wrong with it, which is a finding. Raises `BadFile` for a file that cannot be read."""
    from signer.cli.keys import load_public_key

    try:
        return load_public_key(path)
    except BadPublicKey as fault:
        return fault


def _explain(
    policy: Policy, name: str, ask: SignRequest, key: PublicKey | BadPublicKey | None, address: str | None, now: int
) -> Explanation:
    """As the keeper explains (`queries`), preceded by the checks of identity and role."""
    from signer.authority.queries import explanation
    from signer.policy.decide import explain

    identity, role = policy.identities.get(name), policy.roles.get(ask.role)
    first = [_judge("identity", lambda: _see_identity(policy, name, now))]
    first.append(_judge("role", lambda: _see_role(policy, identity, ask.role)))
    rest: list[tuple[Finding, Refused | None]] = []
    if identity is not None and role is not None:
        fault = key.text if isinstance(key, BadPublicKey) else "no key was given"
        vetted = key if isinstance(key, PublicKey) else None
        for finding, refusal in explain(identity, role, ask, vetted, address, UsageCounts(), fault):
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
    """The identity's kind and when its last token expires; raises `Refused`."""
    identity = policy.identities.get(name)
    if identity is None:
        raise Refused("unknown_identity", f"there is no identity {name[:64]}", _nearest(name, policy.identities))
    ends = sorted(token.expires for token in policy.tokens.values() if token.identity == name)
    if not ends:
        raise Refused("no_token", f"{name} has no token", f"make one: `signer token new {name} --expires 90d`")
    if ends[-1] <= now:
        raise Refused(
            "token_expired",
            f"the last token of {name} expired {render_span(now - ends[-1])} ago",
            f"make another one: `signer token new {name} --expires 90d`",
        )
    which = "token" if len(ends) == 1 else f"the last of {len(ends)} tokens"
    return f"{name}, {identity.kind}, {which} expires in {render_span(ends[-1] - now)}"


def _see_role(policy: Policy, identity: Identity | None, name: str) -> str:
    if name not in policy.roles:
        raise Refused("unknown_role", f"there is no role {name[:64]}", _nearest(name, policy.roles))
    if identity is None:
        return "there is such a role"
    policy.role_for(identity, name)
    return f"{identity.name} may ask for {name}"


def _see_limits(role: Role) -> Finding:
    limits = role.limits
    said = [f"{limits.per_minute} a minute"] if limits.per_minute is not None else []
    said += [f"{limits.live} live"] if limits.live is not None else []
    return Finding("limits", f"{', '.join(said)}: the keeper counts" if said else "none", "skipped" if said else "ok")


def _nearest(name: str, known: Mapping[str, object]) -> str:
    return similar(name, known, f"add it; policy.toml has {', '.join(sorted(known)[:8])}")


def _show_explanation(found: Explanation) -> None:
    what = f"{found.identity} would get a certificate of role {found.role}"
    if any(rule.rule == "key" and rule.outcome == "skipped" for rule in found.rules):
        what += ", for a key that it allows"
    output.show(plain(f"granted: {what}" if found.granted else f"refused: {found.text}"))
    output.show()
    output.show_table([(rule.rule, rule.detail, rule.outcome) for rule in found.rules], "  ")
    output.show()
    if found.hint:
        output.show(plain(f"hint: {found.hint}"))
    output.show(f"not looked at: {' and '.join(NOT_CHECKED)}, which only the running keeper knows")


@verb("key enrol", "signer key enrol id_ed25519_sk.pub", "signer key enrol id.pub --json")
@click.argument("file", type=FILE, metavar="FILE", help="the public key, such as id_ed25519_sk.pub")
def key_enrol(file: Path, as_json: bool) -> None:
    """Prints the line for `[identities.NAME]` or `[roles.NAME]` in policy.toml: with it only this key, and the
    others in its list, get certificates. Nothing in a public key proves that it is in hardware or asks for a
    PIN: enrol a key that you saw being made."""
    from signer.cli.keys import load_public_key

    key = load_public_key(file)
    line = f'keys = ["{key.fingerprint}"]'
    if as_json:
        output.show_json({"fingerprint": key.fingerprint, "key_type": key.kind, "policy_line": line})
        return
    output.show_exactly(line)
    output.note("put into [identities.NAME] or [roles.NAME] in policy.toml, then `signer reload`;")
    output.note("add further fingerprints to the same list")
    if key.kind.startswith("sk-"):
        output.warn(
            "nothing attests that this key is in hardware or asks for a PIN: enrol a key that you saw being made"
        )
