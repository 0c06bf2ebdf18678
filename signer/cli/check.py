"""`signer check`, `signer ca inspect`, `signer ca bundle`: verbs that check and show what a start depends on. They only
read."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from signer.cli import output
from signer.cli.arguments import FILE, read_settings
from signer.cli.parser import verb
from signer.cli.places import Place, name_places, places_of_settings, with_places
from signer.errors import BadFile, BadKeyFile, BadSettings
from signer.hardening import forbid_dumps
from signer.units import plain

if TYPE_CHECKING:
    from signer.model import CaKeys, PublicKey
    from signer.service.checks import Check
    from signer.settings import Settings

_SHOWN: Final = {"ok": "ok", "warn": "warn", "fail": "FAIL"}


@verb("check", "signer check", "signer check --json | jq '.checks[] | select(.outcome != \"ok\")'", lists_settings=True)
def check(as_json: bool) -> int:
    """Checks everything a start depends on, changes nothing, and shows `ok`, `warn` or `FAIL` for each check.
    Run it as the user that starts the service. Exit status 1 if a check failed."""
    from signer.service.checks import check_start

    forbid_dumps()
    checks = list(check_start(os.environ, int(time.time())))
    return _show({}, _with_places(checks, [*places_of_settings(os.environ)]), "ready", as_json=as_json)


@verb("ca inspect", "signer ca inspect /run/signer-ca/ca", "signer ca inspect ca.pub --json")
@click.argument("file", type=FILE, metavar="FILE", help="a CA key file, or its .pub")
def ca_inspect(file: Path, as_json: bool) -> int:
    """Shows kind, size, fingerprint and public line of a key, and nothing of the private half. For a private
    key file it also shows what the keeper would find wrong with owner, mode, links, content and pin.
    A file whose name ends in .pub is read as a public key. Exit status 1 if a check failed."""
    if file.suffix == ".pub":
        facts, checks = _inspect_public(file)
    else:
        facts, checks = _inspect_private(file, read_settings())
    return _show(facts, _with_places(checks, [Place(str(file), "FILE")]), "usable", as_json=as_json)


@verb("ca bundle", "signer ca bundle > signer-ca.pub", "signer ca bundle --json | jq -r '.keys[].fingerprint'")
def ca_bundle(as_json: bool) -> None:
    """Prints the current, next and retired CA keys for TrustedUserCAKeys, as `GET /api/ca` of the running service
    does, from the policy file. The key file, or the ssh-agent, is read only if the policy does not contain
    `ca.public_key`."""
    from signer.ca.bundle import render_bundle, trusted_keys
    from signer.policy.file import load_policy
    from signer.ssh.publickey import render_public_key

    settings = read_settings()
    if settings.asks_vault:
        raise BadSettings(
            "bundle_incomplete",
            f"in mode {settings.mode} hosts must trust Vault's key, too, which only the running service knows",
            "ask the service: GET /api/ca",
        )
    policy = load_policy(settings.policy_file)
    in_use = None
    if policy.ca.public is None:
        forbid_dumps()
        in_use = _key_in_use(settings, policy.ca)
    if as_json:
        keys = [
            {"is": what, "fingerprint": key.fingerprint, "public_key": render_public_key(key.kind, key.blob)}
            for what, key in trusted_keys(policy.ca, in_use)
        ]
        output.show_json({"keys": keys, "policy": policy.digest})
    else:
        output.show_exactly(render_bundle(policy.ca, in_use).rstrip("\n"))


def _key_in_use(settings: Settings, ca: CaKeys) -> PublicKey:
    """The public half of the key in the file or, by its pin, in the ssh-agent."""
    from signer.ca.key import load_ca_key
    from signer.service.key_source import agent_for_check

    if settings.reads_key_file:
        return load_ca_key(settings.ca_key_file, settings.ca_key_owner, *ca.may_sign).public
    return agent_for_check(settings).find_key(ca.fingerprint).public


def _inspect_private(path: Path, settings: Settings) -> tuple[dict[str, object], list[Check]]:
    from signer.ca.key import examine_ca_key
    from signer.policy.file import load_policy
    from signer.service.checks import key_checks

    forbid_dumps()
    try:
        pins = load_policy(settings.policy_file).ca.may_sign
    except BadFile as error:
        name_places(error, (), os.environ)
        output.warn(f"the pin is not checked: {error.text}")
        pins = ()
    key, found = examine_ca_key(path, settings.ca_key_owner, *pins)
    if found[0][1] is not None and found[0][1].code == "ca_key_missing":  # whose words are about the setting
        found = [("open", BadKeyFile("ca_key_missing", f"there is no file {path}", "name a file that is there"))]
    facts: dict[str, object] = {"file": str(path), "holds": "a private key" if key else "nothing readable"}
    if key is not None:
        facts |= _facts(key.kind, key.bits, key.fingerprint, key.blob)
    return facts, list(key_checks(key, found, settings.ca_key_owner, pins))


def _inspect_public(path: Path) -> tuple[dict[str, object], list[Check]]:
    from signer.cli.keys import load_public_key
    from signer.service.checks import Check
    from signer.ssh.publickey import check_ca_kind

    key = load_public_key(path)
    facts = {"file": str(path), "holds": "a public key", **_facts(key.kind, key.bits, key.fingerprint, key.blob)}
    try:
        check_ca_kind(key.kind, key.bits)
    except BadKeyFile as fault:
        return facts, [Check("fail", fault.code, fault.text, fault.hint)]
    return facts, [Check("ok", "ca_key_kind", f"{key.kind} of {key.bits} bits can be a CA key")]


def _facts(kind: str, bits: int, fingerprint: str, blob: bytes) -> dict[str, object]:
    from signer.ssh.publickey import render_public_key

    return {"kind": kind, "bits": bits, "fingerprint": fingerprint, "public_key": render_public_key(kind, blob)}


def _with_places(checks: Sequence[Check], places: Sequence[Place]) -> list[Check]:
    """The checks; what is wrong with a file names its path and where that comes from."""
    return [
        check if check.outcome == "ok" else replace(check, detail=with_places(check.detail, places)) for check in checks
    ]


def _show(facts: Mapping[str, object], checks: Sequence[Check], good: str, *, as_json: bool) -> int:
    """Shows facts, checks, and whether all is `good`; returns the exit status."""
    count = Counter(check.outcome for check in checks)
    is_good = not count["fail"]
    if as_json:
        counts = {"failed": count["fail"], "warnings": count["warn"], "ok": count["ok"]}
        output.show_json({**facts, good: is_good, **counts, "checks": [asdict(check) for check in checks]})
        return 0 if is_good else 1
    if facts:
        output.show_fields(facts)
        output.show()
    _show_lines(checks)
    parts = [f"{count['fail']} failed"] if count["fail"] else []
    parts += [output.count(count["warn"], "warning")] if count["warn"] else []
    parts += [f"{count['ok']} ok"]
    output.show(f"{good if is_good else f'not {good}'}: {', '.join(parts)}")
    return 0 if is_good else 1


def _show_lines(checks: Sequence[Check]) -> None:
    """The lines of the checks; below each that is not ok, what to do about it, once for a run with the same hint."""
    width = min(max((len(check.code) for check in checks), default=0), 40)
    for check, following in zip(checks, [*checks[1:], None], strict=True):
        output.show(f"{_SHOWN[check.outcome]:<5} {plain(check.code):<{width}}  {plain(check.detail)}")
        if check.hint and (following is None or following.hint != check.hint):
            output.show(f"{'':5} {plain(check.hint)}")
