"""`signer check`, `signer ca inspect`, `signer ca bundle`: what a start would meet, a key file is, hosts must trust.

They only read.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from signer.ca.bundle import render_bundle, trusted_keys
from signer.ca.key import MIN_RSA_BITS, examine_ca_key, load_ca_key
from signer.cli import output
from signer.cli.catalogue import VERBS
from signer.cli.keys import load_public_key
from signer.errors import BadFile, BadKeyFile, BadSettings
from signer.hardening import forbid_dumps
from signer.policy.file import load_policy
from signer.service.check_repository import check_repository, is_checkout
from signer.service.checks import Check, check_start, key_checks
from signer.settings import Settings
from signer.ssh.publickey import CA_KEY_KINDS, render_public_key

ABOVE_PACKAGE: Final = Path(__file__).parents[2]
_LOGIN_VERBS: Final = frozenset({"safe-session ssh", "safe-session exec"})
_SHOWN: Final = {"ok": "ok", "warn": "warn", "fail": "FAIL"}


def check(arguments: Namespace, _settings: Callable[[], Settings]) -> int:
    """One line for each check, and whether it would start; in a checkout, whether its files fit the program, too."""
    forbid_dumps()
    checks = list(check_start(os.environ, int(time.time())))
    if is_checkout(ABOVE_PACKAGE):
        checks += check_repository(ABOVE_PACKAGE, {f"signer {verb.words}" for verb in VERBS} | _LOGIN_VERBS)
    if arguments.json:
        output.show_json({"ready": not _count(checks, "fail"), **_summary(checks)})
    else:
        _show(checks)
        output.show(_sentence(checks, "ready", "not ready"))
    return 1 if _count(checks, "fail") else 0


def ca_inspect(arguments: Namespace, settings: Callable[[], Settings]) -> int:
    """Public facts and checks of one key file."""
    path = Path(arguments.file)
    if path.suffix == ".pub":
        facts, checks = _inspect_public(path)
    else:
        facts, checks = _inspect_private(path, settings())
    if arguments.json:
        output.show_json({**facts, "usable": not _count(checks, "fail"), **_summary(checks)})
    else:
        output.show_table([(name.replace("_", " "), value) for name, value in facts.items()])
        output.show()
        _show(checks)
        output.show(_sentence(checks, "usable", "not usable"))
    return 1 if _count(checks, "fail") else 0


def ca_bundle(arguments: Namespace, settings: Callable[[], Settings]) -> int:
    """Every CA line that hosts must trust."""
    told = settings()
    if told.asks_vault:
        raise BadSettings(
            "bundle_incomplete",
            f"in mode {told.mode} hosts must trust Vault's key, too, which only the running service knows",
            "ask the service: GET /api/ca",
        )
    policy = load_policy(told.policy_file)
    in_use = None
    if policy.ca.public is None:
        forbid_dumps()
        in_use = load_ca_key(told.ca_key_file, told.ca_key_owner, *policy.ca.may_sign).public
    if arguments.json:
        keys = [
            {"is": what, "fingerprint": key.fingerprint, "public_key": render_public_key(key.kind, key.blob)}
            for what, key in trusted_keys(policy.ca, in_use)
        ]
        output.show_json({"keys": keys, "policy": policy.digest})
    else:
        output.show(render_bundle(policy.ca, in_use).rstrip("\n"))
    return 0


def _inspect_private(path: Path, settings: Settings) -> tuple[dict[str, object], list[Check]]:
    forbid_dumps()
    try:
        pins = load_policy(settings.policy_file).ca.may_sign
    except BadFile as error:
        output.warn(f"the pin is not looked at: {error.text}")
        pins = ()
    key, found = examine_ca_key(path, settings.ca_key_owner, *pins)
    if found[0][1] is not None and found[0][1].code == "ca_key_missing":  # whose words are about the setting
        found = [("open", BadKeyFile("ca_key_missing", f"there is no file {path}", "name a file that is there"))]
    facts: dict[str, object] = {"file": str(path), "holds": "a private key" if key else "nothing readable"}
    if key is not None:
        facts |= _facts(key.kind, key.bits, key.fingerprint, key.blob)
    return facts, list(key_checks(key, found, settings.ca_key_owner, pins))


def _inspect_public(path: Path) -> tuple[dict[str, object], list[Check]]:
    key = load_public_key(path)
    facts = {"file": str(path), "holds": "a public key", **_facts(key.kind, key.bits, key.fingerprint, key.blob)}
    if key.kind not in CA_KEY_KINDS:
        fault = BadKeyFile("ca_key_kind_not_allowed", "a CA key is ed25519, ecdsa or rsa", "use ed25519")
    elif key.kind == "ssh-rsa" and key.bits < MIN_RSA_BITS:
        fault = BadKeyFile("ca_key_rsa_too_short", f"it has {key.bits} bits, RSA needs {MIN_RSA_BITS}", "use ed25519")
    else:
        return facts, [Check("ok", "ca_key_kind", f"{key.kind} of {key.bits} bits can be a CA key")]
    return facts, [Check("fail", fault.code, fault.text, fault.hint)]


def _facts(kind: str, bits: int, fingerprint: str, blob: bytes) -> dict[str, object]:
    return {"kind": kind, "bits": bits, "fingerprint": fingerprint, "public_key": render_public_key(kind, blob)}


def _count(checks: Sequence[Check], outcome: str) -> int:
    return sum(check.outcome == outcome for check in checks)


def _summary(checks: Sequence[Check]) -> dict[str, object]:
    listed = [{"outcome": c.outcome, "code": c.code, "detail": c.detail, "hint": c.hint} for c in checks]
    return {
        "failed": _count(checks, "fail"),
        "warnings": _count(checks, "warn"),
        "ok": _count(checks, "ok"),
        "checks": listed,
    }


def _show(checks: Sequence[Check]) -> None:
    """The lines of the checks; below each that is not ok, what to do about it, once for a run with the same hint."""
    width = min(max((len(check.code) for check in checks), default=0), 40)
    for check, following in zip(checks, [*checks[1:], None], strict=True):
        output.show(f"{_SHOWN[check.outcome]:<5} {output.plain(check.code):<{width}}  {output.plain(check.detail)}")
        if check.hint and (following is None or following.hint != check.hint):
            output.show(f"{'':5} {output.plain(check.hint)}")


def _sentence(checks: Sequence[Check], good: str, bad: str) -> str:
    failed, warnings = _count(checks, "fail"), _count(checks, "warn")
    parts = [f"{failed} failed"] if failed else []
    parts += [output.count(warnings, "warning")] if warnings else []
    parts += [f"{_count(checks, 'ok')} ok"]
    return f"{bad if failed else good}: {', '.join(parts)}"
