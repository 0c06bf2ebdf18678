"""What README.md, SECURITY.md and CHANGELOG.md say is so: names, tables and examples are compared with the code.

A new module, setting, policy key, verb, route, event kind or metric fails here until README has its line.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from signer import __version__, model, settings
from signer.api.openapi import ROUTES
from signer.api.vault import routes as vault
from signer.api.vault import system
from signer.authority import core
from signer.ca import key as cakey
from signer.cli.catalogue import VERBS
from signer.cli.usage import render_help
from signer.policy import file as policyfile
from signer.policy import rules
from signer.policy import tables as policytables
from signer.protocol import commands, sign_request
from signer.safe_session import settings as login_settings
from signer.safe_session.usage import TEXT as SAFE_SESSION_HELP
from signer.service import metrics
from signer.ssh import publickey
from signer.ssh.certificate import MAX_PRINCIPALS
from tests.parts.parity_differences import DIFFERENCES
from tests.parts.source import PACKAGE, TREES, called_with, texts

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()
# The error catalogue is documented in runbooks/reference.
NOT_IN_README = {"signer/error_catalogue.py"}
DOCUMENTS = {name: (ROOT / name).read_text() for name in ("README.md", "SECURITY.md", "CHANGELOG.md")}


# --- reading README --------------------------------------------------------------------------------------------------


def section(title: str, text: str = README) -> str:
    """What stands under a heading, with the smaller headings below it."""
    match = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,6}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match is not None, f"there is no heading {title!r}"
    level = len(match[1])
    whole = re.search(
        rf"^#{{{level}}} {re.escape(title)}\n(.*?)(?=^#{{1,{level}}} |\Z)", text, re.MULTILINE | re.DOTALL
    )
    assert whole is not None
    return whole[1]


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table whose first header cell is `header`."""
    tables = [table for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE) if cells(table)[0][0] == header]
    assert tables, f"there is no table that begins with {header!r}"
    return [row for table in tables for row in cells(table)[2:]]


def cells(table: str) -> list[list[str]]:
    lines = table.strip().split("\n")
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]


def names(found: list[list[str]], column: int = 0) -> list[str]:
    """Every word in backquotes of a column."""
    return [name for row in found for name in re.findall(r"`([^`]+)`", row[column])]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def check_same(told: list[str], real: set[str], what: str) -> None:
    twice = {name for name in told if told.count(name) > 1}
    assert not twice, f"README names these {what} twice: {sorted(twice)}"
    assert not real - set(told), f"README does not tell these {what}: {sorted(real - set(told))}"
    assert not set(told) - real, f"README tells {what} that there are not: {sorted(set(told) - real)}"


# --- the tables ------------------------------------------------------------------------------------------------------


def test_every_module_has_a_line() -> None:
    told = names(rows(section("Reading order"), "room"), 1)
    check_same(told, {str(path.relative_to(ROOT)) for path in TREES} - NOT_IN_README, "modules")


def test_every_module_stands_in_its_room() -> None:
    room = ""
    for row in rows(section("Reading order"), "room"):
        room = row[0] or room
        _, *rooms, _ = row[1].strip("`").split("/")
        assert (rooms[0] if rooms else "root") == room, row


def test_settings_are_those_of_the_code() -> None:
    told = [(row[0].strip("`"), row[1].strip("`"), row[2]) for row in rows(section("Settings"), "setting")]
    assert told[: len(settings.SETTINGS)] == list(settings.SETTINGS)


def test_client_settings_are_those_of_the_code() -> None:
    table = [row for row in rows(section("Settings"), "setting") if row[0].startswith("`SAFE_SESSION_")]
    source = "".join(path.read_text() for path in TREES if path.is_relative_to(PACKAGE / "safe_session"))
    check_same(names(table), set(re.findall(r"SAFE_SESSION_[A-Z_]*[A-Z]", source)), "settings of safe-session")
    assert dict(zip(names(table), (row[1].strip("`") for row in table), strict=True))["SAFE_SESSION_ADDR"] == (
        login_settings.DEFAULT_ADDR
    )


def policy_keys(model: type[BaseModel], place: str) -> Iterator[str]:
    """Dotted names of all keys that a table of decide.toml may have."""
    for name, info in model.model_fields.items():
        here = f"{place}.{info.alias or name}"
        inner = [kind for kind in _classes(info.annotation) if issubclass(kind, BaseModel)]
        if name == "tokens":
            inner = [policytables.RawToken]
        if inner:
            yield from (key for kind in inner for key in policy_keys(kind, here))
        else:
            yield here


def _classes(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _classes(part)


def test_policy_keys_are_those_of_the_code() -> None:
    real = {
        *policy_keys(policytables.RawCa, "ca"),
        *policy_keys(policytables.RawRole, "roles.NAME"),
        *policy_keys(policytables.RawIdentity, "identities.NAME"),
    }
    check_same(names(rows(section("Policy file"), "key")), real, "policy keys")


def test_policy_example_is_a_policy() -> None:
    (example,) = blocks(section("Policy file"), "toml")
    read = policyfile.parse_policy(example.encode())
    assert set(read.roles) == set(tomllib.loads(example)["roles"])


def test_policy_defaults_and_rights_are_those_of_the_code() -> None:
    text = {row[0].strip("`"): row for row in rows(section("Policy file"), "key")}
    role = policytables.RawRole.model_fields
    assert text["roles.NAME.rsa_min_bits"][1] == f"`{role['rsa_min_bits'].default}`"
    for flag in ("verify_required", "no_touch_required", "allow_key_id", "reason_required"):
        assert text[f"roles.NAME.{flag}"][1] == f"`{str(role[flag].default).lower()}`"
    for right in policyfile._MAY:
        assert f"`{right}`" in text["identities.NAME.may"][2]


def test_limits_are_those_of_the_code() -> None:
    told = dict(rows(section("Limits"), "what"))
    real = {
        "body of a request": f"{sign_request.MAX_BODY // 1024} KiB",
        "public key in a request": f"{publickey.MAX_TEXT // 1024} KiB",
        "policy file": f"{policyfile.MAX_POLICY_BYTES // 1024**2} MiB",
        "name of a role": f"{policyfile.MAX_ROLE_NAME} characters",
        "CA key file": f"{cakey.MAX_KEY_FILE // 1024} KiB",
        "lifetime of a certificate": f"{policyfile.DEFAULT_CEILING // 3600} hour unless",
        "principals in a certificate": f"{MAX_PRINCIPALS}, each",
        "key id": f"{rules.MAX_KEY_ID} bytes",
        "reason": f"{model.MAX_REASON} printable",
        "page of certificates": f"{commands.MAX_PAGE}",
        "certificates are back-dated by": f"{model.BACKDATE} seconds",
        "clock behind the ledger's newest event": f"{core.CLOCK_TOLERANCE} seconds",
        "workers and threads of the api": f"{settings.MAX_WORKERS} and {settings.MAX_THREADS}",
    }
    assert told.keys() == real.keys()
    for what, start in real.items():
        assert told[what].startswith(start), what
    assert f"{policyfile.CEILING // 3600} hours whatever" in told["lifetime of a certificate"]


def test_help_of_safe_session_is_what_it_prints() -> None:
    assert f"$ safe-session --help\n{SAFE_SESSION_HELP}" in blocks(section("Commands"), "text")


def test_verbs_of_signer_are_those_of_the_code() -> None:
    table = rows(section("Commands"), "command")
    verbs = [(f"signer {entry.words}", entry.summary) for entry in VERBS]
    assert [(row[0].strip("`"), row[1]) for row in table] == verbs
    assert f"$ signer --help\n{render_help()}\n" in blocks(section("Commands"), "text")


# --- events, metrics -------------------------------------------------------------------------------------------------


def test_event_kinds_are_those_of_the_code() -> None:
    real = {text for _, argument in called_with({"Event"}) for text in texts(argument)}
    check_same(names(rows(section("Ledger"), "event")), real, "event kinds")


def test_metrics_are_those_of_the_code() -> None:
    gauges = {
        text
        for node in ast.walk(TREES[PACKAGE / "service" / "keeper.py"])
        if isinstance(node, ast.Dict)
        for key in node.keys
        if key is not None
        for text in texts(key)
        if text.startswith("signer_")
    }
    facts = dict.fromkeys(gauges, ("", 0.0))
    rendered = metrics.Metrics(lambda: facts, lambda: ["llmops"], metrics.Histogram([1.0])).render()
    check_same(names(rows(section("Metrics"), "metric")), set(re.findall(r"^# TYPE (\S+)", rendered, re.M)), "metrics")


# --- routes ----------------------------------------------------------------------------------------------------------


def test_routes_are_those_of_the_code() -> None:
    table = rows(section("HTTP"), "route")
    told = [(row[0].strip("`"), row[2]) for row in table if "/v1/" not in row[0]]
    assert told == [(f"{route.method} {route.path}", route.text) for route in ROUTES]
    assert [row[1] for row in table if "/v1/" not in row[0]] == ["no" if route.is_open else "yes" for route in ROUTES]


def test_vault_routes_are_those_of_the_code() -> None:
    told = [name.split(" ")[-1] for name in names(rows(section("HTTP"), "route")) if "/v1/" in name]
    mounted = [path.removeprefix("/v1/ssh/") for path in told if path.startswith("/v1/ssh/")]
    patterns = [pattern for pattern, _ in vault._ROUTES]
    examples = {path: path.replace("<role>", "llmops").replace("<ref>", "default") for path in mounted}
    for pattern in patterns:
        assert any(pattern.fullmatch(example) for example in examples.values()), f"README does not tell {pattern}"
    for path, example in examples.items():
        assert any(pattern.fullmatch(example) for pattern in patterns), f"there is no {path}"
    outside = {path.removeprefix("/v1/") for path in told if not path.startswith("/v1/ssh/")}
    assert outside >= system.UNAUTHENTICATED
    written = {text for node in ast.walk(TREES[PACKAGE / "api" / "vault" / "system.py"]) for text in texts(node)}
    assert {path.replace("<mount>", "") for path in outside} <= written


def test_differences_from_vault_are_those_that_are_shown() -> None:
    told = [row for row in section("Differences from Vault").splitlines() if row.startswith("|")][2:]
    assert told == [difference.row() for difference in DIFFERENCES]


# --- the rest --------------------------------------------------------------------------------------------------------


def test_benches_are_named_with_the_figures() -> None:
    real = {
        f"scripts/bench/{path.name}"
        for path in (ROOT / "scripts" / "bench").glob("*")
        if path.is_file() and not path.suffix and path.stat().st_mode & 0o100
    }
    check_same(re.findall(r"^ {4}(scripts/bench/\w+)", section("Figures"), re.MULTILINE), real, "benches")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_documents_name_exist(name: str) -> None:
    wrong = [
        path
        for path in re.findall(r"`((?:signer|tests|scripts|runbooks)/[\w./-]+)`", DOCUMENTS[name])
        if not (ROOT / path).exists()
    ]
    assert not wrong, f"{name} names what is not there: {wrong}"


def test_every_promise_is_told_with_its_tests() -> None:
    table = rows(section("Promises", DOCUMENTS["SECURITY.md"]), "promise")
    assert [row[0][0] for row in table] == ["1", "2", "3", "4", "5", "6", "7"]
    for row in table[:5]:
        assert re.search(r"`tests/[\w/]+\.py[`:]", row[1]), row


def test_tests_that_documents_name_exist() -> None:
    for path, function in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", "".join(DOCUMENTS.values())):
        tree = ast.parse((ROOT / path).read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in ast.walk(tree)), function


def test_the_changelog_leads_with_what_is_not_released() -> None:
    headings = re.findall(r"^## \[?([^\]\n]+)", DOCUMENTS["CHANGELOG.md"], re.MULTILINE)
    assert headings[0] == f"Unreleased: {__version__}"
