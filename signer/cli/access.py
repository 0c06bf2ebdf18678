"""`signer policy list`, `identity add|remove`, `approval-key add` and `role add|show`: who may get what."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from signer.cli import output
from signer.cli.arguments import DURATION, FILE, IDENTITY, OneOf, whole
from signer.cli.edits import PolicyFile, edit_options, file_option, read_policy_file
from signer.cli.parser import verb
from signer.cli.suggestions import similar
from signer.cli.tokens import in_order, token_state, unknown_identity
from signer.errors import NotFound, Refused
from signer.model import RIGHTS
from signer.policy.tokens import token_id
from signer.units import render_duration, timestamp

if TYPE_CHECKING:
    from signer.model import ApprovalKey, Identity, Role
    from signer.policy.decide import Policy

_KINDS = ("human", "agent", "workload")


# --- lists ------------------------------------------------------------------------------------------------------------


@verb("policy list", "signer policy list", "signer policy list --json | jq -r '.identities[].name'")
@file_option
def policy_list(file: Path | None, as_json: bool) -> None:
    """Lists the identities, roles and tokens of policy.toml. Times are UTC."""
    now = int(time.time())
    policy = read_policy_file(file).policy
    identities = [_identity_facts(policy, identity, now) for _, identity in sorted(policy.identities.items())]
    roles = [_role_row(role) for _, role in sorted(policy.roles.items())]
    if as_json:
        output.show_json({"identities": identities, "roles": roles, "policy": policy.digest})
        return
    tokens = [{**token, "name": row["name"]} for row in identities for token in row["tokens"]]
    keys = [{**key, "name": row["name"]} for row in identities for key in row["approval_keys"]]
    for titles, names, rows in (
        (("IDENTITY", "KIND", "ROLES", "GROUPS", "RIGHTS"), ("name", "kind", "roles", "groups", "may"), identities),
        (
            ("ROLE", "PRINCIPALS", "TTL", "MAX TTL", "KEY TYPES"),
            ("name", "principals", "default_ttl", "max_ttl", "key_types"),
            roles,
        ),
        (("TOKEN", "IDENTITY", "EXPIRES", "STATE"), ("id", "name", "expires", "state"), tokens),
        (("APPROVAL KEY", "IDENTITY", "TYPE", "SIGNS WITH"), ("fingerprint", "name", "type", "requires"), keys),
    ):
        if rows:
            if rows is not identities:
                output.show()
            output.show_table([titles, *([output.readable(row[name]) for name in names] for row in rows)])


def _identity_facts(policy: Policy, identity: Identity, now: int) -> dict[str, Any]:
    tokens = in_order(token for token in policy.tokens.values() if token.identity == identity.name)
    return {
        "name": identity.name,
        "kind": identity.kind,
        "roles": sorted(identity.roles),
        "groups": sorted(identity.groups),
        "may": sorted(identity.may),
        "tokens": [
            {"id": token_id(token), "expires": timestamp(token.expires), "state": token_state(token, now)}
            for token in tokens
        ],
        "approval_keys": [_approval_key_facts(line) for line in identity.approval_keys],
    }


def _approval_key_facts(line: ApprovalKey) -> dict[str, Any]:
    from signer.model import SshApprovalKey

    facts: dict[str, Any] = {"kind": line.kind, "fingerprint": line.fingerprint}
    if isinstance(line, SshApprovalKey):
        touch = "touch and PIN or fingerprint" if line.verify else "touch"
        return {**facts, "type": line.key.kind, "requires": "nothing: software" if line.software else touch}
    more = {"id": line.id, "rp": line.rp, "origins": list(line.origins)}
    return {**facts, "type": f"passkey for {line.rp}", "requires": "touch and PIN or fingerprint", **more}


def _role_row(role: Role) -> dict[str, Any]:
    return {
        "name": role.name,
        "principals": sorted(role.principals),
        "default_ttl": render_duration(role.default_ttl),
        "max_ttl": render_duration(role.max_ttl),
        "key_types": sorted(role.key_types),
    }


@verb("role show", "signer role show llmops", "signer role show llmops --json")
@click.argument("name", metavar="ROLE", help="the name of a role")
@file_option
def role_show(name: str, file: Path | None, as_json: bool) -> None:
    """Shows every value of a role as it is in force, defaults included, and who may ask for it."""
    policy = read_policy_file(file).policy
    role = policy.roles.get(name)
    if role is None:
        hint = similar(name, policy.roles, f"policy.toml has {', '.join(sorted(policy.roles)[:8])}")
        raise NotFound("unknown_role", f"there is no role {name[:64]}", hint)
    facts = {**_role_row(role), **_role_rules(role)}
    facts["identities"] = sorted(one.name for one in policy.identities.values() if role.name in one.roles)
    if as_json:
        output.show_json(facts)
    else:
        output.show_fields(facts)


def _role_rules(role: Role) -> dict[str, Any]:
    approval = role.approval
    return {
        "default_principals": sorted(role.default_principals),
        "keys": None if role.keys is None else sorted(role.keys),
        "rsa_min_bits": role.rsa_min_bits,
        "allowed_extensions": sorted(role.allowed_extensions),
        "default_extensions": sorted(role.default_extensions),
        "extension_values": dict(role.extension_values),
        "unlisted_extensions": role.unlisted_extensions,
        "critical_options": sorted(role.allowed_critical_options),
        "force_command": role.force_command,
        "source_address": list(role.source_address) if isinstance(role.source_address, tuple) else role.source_address,
        "verify_required": role.verify_required,
        "no_touch_required": role.no_touch_required,
        "allow_key_id": role.allow_key_id,
        "reason_required": role.reason_required,
        "backdate": render_duration(role.backdate),
        "approval_for": sorted(approval.kinds) if approval else [],
        "approval_by": sorted(approval.by) if approval else [],
        "approval_count": approval.count if approval else None,
        "approval_valid_for": render_duration(approval.valid_for) if approval else None,
        "approval_waivers": approval.waivers if approval else None,
        "approval_with": sorted(role.key_kinds) if approval or role.presence or role.break_glass else [],
        "presence": role.presence,
        "break_glass": role.break_glass,
        "limit_per_minute": role.limits.per_minute,
        "limit_live": role.limits.live,
    }


# --- edits ------------------------------------------------------------------------------------------------------------


@verb("identity add", "signer identity add ci --kind workload --role llmops --write")
@click.argument("name", type=IDENTITY, metavar="IDENTITY", help="a name that policy.toml does not have yet")
@click.option("--kind", type=OneOf(_KINDS), required=True, help="what it is")
@click.option("--role", "roles", multiple=True, metavar="ROLE", help="a role that it may ask for; repeat for more")
@click.option("--group", "groups", multiple=True, metavar="GROUP", help="a group that it is in; repeat for more")
@click.option("--may", multiple=True, type=OneOf(tuple(RIGHTS)), help="a right; repeat for more")
@edit_options
def identity_add(
    *,
    name: str,
    kind: str,
    roles: tuple[str, ...],
    groups: tuple[str, ...],
    may: tuple[str, ...],
    found: PolicyFile,
    as_json: bool,
) -> None:
    """Adds an identity to policy.toml. It can do nothing before it has a token: `signer token new IDENTITY
    --expires 90d --write`."""
    from signer.policy.edit import add_table

    if name in found.policy.identities:
        raise Refused("identity_exists", f"policy.toml already has the identity {name}", "see `signer policy list`")
    values = {"kind": kind, "roles": roles or None, "groups": groups or None, "may": may or None}
    found.edit(lambda text: add_table(text, "identities", name, values)).show({"identity": name}, as_json=as_json)


@verb("identity remove", "signer identity remove ci --write")
@click.argument("name", metavar="IDENTITY", help="the name of an identity")
@edit_options
def identity_remove(*, name: str, found: PolicyFile, as_json: bool) -> None:
    """Removes an identity with its tokens from policy.toml. It is refused from the next `signer reload` on; its
    certificates remain valid until they end, minutes later. A freeze stops an identity at once."""
    from signer.policy.edit import remove_table

    if name not in found.policy.identities:
        raise unknown_identity(name, found.policy)
    found.edit(lambda text: remove_table(text, "identities", name)).show({"identity": name}, as_json=as_json)


@verb(
    "approval-key add",
    "signer approval-key add anna --webauthn enrolment.json",
    "signer approval-key add anna --webauthn enrolment.json --write",
)
@click.argument("name", metavar="IDENTITY", help="the name of a human in policy.toml")
@click.option(
    "--webauthn", "enrolment", type=FILE, required=True, metavar="FILE", help="the JSON that the enrolment page gave"
)
@edit_options
def approval_key_add(*, name: str, enrolment: Path, found: PolicyFile, as_json: bool) -> None:
    """Adds a passkey to `approval_keys` of a human. The file is a JSON object with the texts id, public_key
    (of `getPublicKey()`, both in base64url), rp and origin. It proves nothing of who made it: see the
    passkey being made, or compare the fingerprint with its owner."""
    from signer.cli.keys import load_enrolment
    from signer.policy.edit import add_approval_key, approval_key_entry

    passkey, entry = load_enrolment(enrolment)
    if name not in found.policy.identities:
        raise unknown_identity(name, found.policy)
    line = f"approval_keys = [{approval_key_entry(entry)}]"
    facts = {"identity": name, "fingerprint": passkey.fingerprint, "policy_line": line}
    found.edit(lambda text: add_approval_key(text, name, entry)).show(facts, as_json=as_json)
    if not as_json:
        output.note(f"the passkey's fingerprint is {passkey.fingerprint}: compare it with what its owner's page shows")


@verb("role add", "signer role add deploy --principal deploy --max-ttl 10m --force-command /usr/bin/deploy --write")
@click.argument("name", metavar="ROLE", help="a name that policy.toml does not have yet")
@click.option(
    "--principal", "principals", multiple=True, required=True, metavar="NAME", help="as sshd matches; repeat for more"
)
@click.option("--key-type", "key_types", multiple=True, metavar="TYPE", help="repeat for more; default ssh-ed25519")
@click.option("--default-ttl", type=DURATION, metavar="TTL", help="default 15m, or --max-ttl if that is shorter")
@click.option("--max-ttl", type=DURATION, metavar="TTL", help="default 30m")
@click.option("--extension", "extensions", multiple=True, metavar="NAME", help="granted by default; repeat for more")
@click.option("--force-command", metavar="COMMAND", help="the only command that its certificates run")
@click.option("--reason-required", is_flag=True, help="refuse a request without a reason")
@click.option("--per-minute", type=whole(1, 1_000_000), metavar="N", help="certificates per identity and minute")
@click.option("--live", type=whole(1, 1_000_000), metavar="N", help="certificates per identity that are valid at once")
@edit_options
def role_add(
    *,
    name: str,
    principals: tuple[str, ...],
    key_types: tuple[str, ...],
    default_ttl: int | None,
    max_ttl: int | None,
    extensions: tuple[str, ...],
    force_command: str | None,
    reason_required: bool,
    per_minute: int | None,
    live: int | None,
    found: PolicyFile,
    as_json: bool,
) -> None:
    """Adds a role to policy.toml. Nobody may ask for it before it is among `roles` of an identity."""
    from signer.policy.edit import add_table

    if name in found.policy.roles:
        raise Refused(
            "role_exists", f"policy.toml already has the role {name[:64]}", f"see `signer role show {name[:64]}`"
        )
    longest = 30 * 60 if max_ttl is None else max_ttl
    limits = {key: value for key, value in (("per_minute", per_minute), ("live", live)) if value is not None}
    values = {
        "principals": principals,
        "default_principals": principals,
        "default_ttl": render_duration(min(15 * 60, longest) if default_ttl is None else default_ttl),
        "max_ttl": render_duration(longest),
        "key_types": key_types or ("ssh-ed25519",),
        "extensions": {"allowed": extensions, "default": extensions} if extensions else None,
        "force_command": force_command,
        "reason_required": reason_required or None,
        "limits": limits or None,
    }
    found.edit(lambda text: add_table(text, "roles", name, values)).show({"role": name}, as_json=as_json)
