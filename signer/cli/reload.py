"""`signer reload`: has the running service read its files again, and shows what that changed."""

from __future__ import annotations

from typing import Any

from signer.cli import output
from signer.cli.arguments import read_settings
from signer.cli.parser import verb
from signer.errors import BadFile


@verb("reload", "signer reload", "signer reload --json | jq .keeper.policy.tokens")
def reload(as_json: bool) -> int:
    """Has `signer serve` read the policy, the CA key, the TLS certificate and the channels of notices again,
    waits, and shows what changed. A file that is not valid is rejected as a whole: the service keeps what it has,
    and the exit status is 1. Run it as root or as the keeper's user, with the SIGNER_RUN_DIR of the service."""
    from signer.service.control import ask_launcher

    reply = ask_launcher(read_settings(), "reload")
    keeper, api, notices = (_mapping(reply.get(name)) for name in ("keeper", "api", "notices"))
    problems = _problems(keeper, api, notices)
    if as_json:
        output.show_json({"reloaded": not problems, **reply})
        return 1 if problems else 0
    output.show_table([*_rows(keeper, api), *_notices_rows(notices)])
    if problems:
        raise BadFile("reload_refused", "not everything was taken", "fix the problem, then reload", tuple(problems))
    return 0


def _rows(keeper: dict[str, Any], api: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    policy, key = _mapping(keeper.get("policy")), keeper.get("key")
    if "error" in policy:
        rows.append(("policy", f"kept, digest {_text(policy, 'digest')[:16]}"))
    else:
        is_same = "changed" if policy.get("changed") else "unchanged"
        rows.append(("policy", f"{is_same}, digest {_text(policy, 'digest')[:16]}"))
        for name in ("roles", "identities", "tokens"):
            differences = _mapping(policy.get(name))
            rows += [
                (name, f"{what} {', '.join(map(str, _list(differences.get(what))))}")
                for what in ("added", "changed", "removed")
                if _list(differences.get(what))
            ]
    rows.append(("CA key", _key_row(_mapping(key))))
    if api:
        rows.append(("TLS", _tls_row(api)))
    return rows


def _notices_rows(notices: dict[str, Any]) -> list[tuple[str, str]]:
    """The channels in use; nothing if none are configured."""
    if not notices:
        return []
    names = ", ".join(map(str, _list(notices.get("channels")))) or "none"
    return [("notices", f"kept, {names}" if "error" in notices else names)]


def _key_row(key: dict[str, Any]) -> str:
    if "error" in key:
        return f"kept, {_text(key, 'kept')}"
    return f"rotated from {_text(key, 'from')} to {_text(key, 'to')}" if key else "unchanged"


def _tls_row(api: dict[str, Any]) -> str:
    if "error" in api:
        return f"kept, digest {_text(api, 'kept')[:16]}"
    renewed = "another certificate" if api.get("changed") else "unchanged"
    return f"{renewed}, {_text(api, 'subject')}, valid until {_text(api, 'expires')}"


def _problems(keeper: dict[str, Any], api: dict[str, Any], notices: dict[str, Any]) -> list[str]:
    """One line for each thing that was refused, or taken without a record."""
    problems = []
    policy = _mapping(keeper.get("policy"))
    for name, part in (("policy", policy), ("CA key", _mapping(keeper.get("key"))), ("TLS", api), ("notices", notices)):
        if error := _mapping(part.get("error")):
            problems.append(f"{name}: {_text(error, 'text')} ({_text(error, 'code')})")
            problems += [f"  {line}" for line in _list(error.get("problems"))]
    if policy.get("unrecorded"):
        problems.append(f"policy: in force, but its change could not be recorded: {_text(policy, 'unrecorded')}")
    return problems


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _text(values: dict[str, Any], name: str) -> str:
    return str(values.get(name, ""))
