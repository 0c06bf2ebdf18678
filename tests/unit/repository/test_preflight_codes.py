"""The preflight's codes: its runbook has each one with the script's own next action, and the keeper uses the same."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from signer.settings import SETTINGS
from tests.parts.documents import ROOT, document, tables
from tests.parts.source import PACKAGE, calls, texts, trees

PREFLIGHT: Final = ROOT / "scripts" / "cutover" / "safe-session-local-ca-preflight.sh"
RUNBOOK: Final = "runbooks/preflight.md"
HEADER: Final = ["code", "what it says", "what to do"]
STATUSES: Final = {"ok", "warn", "FAIL"}
# Of the keeper alone: root reads every file, signs nothing, and knows no other owner than root:root.
KEEPER_ALONE: Final = {"ca_key_unreadable", "ca_key_self_test_failed", "ca_key_owner_unknown", "ca_key_replaced"}
DEFAULT_OWNER: Final = {name: default for name, default, _ in SETTINGS}["SIGNER_CA_KEY_OWNER"]


class Code(NamedTuple):
    """One line of the preflight's catalogue; `action` is empty for what needs none."""

    code: str
    status: str
    action: str


def read_catalogue(script: Path) -> list[Code]:
    """The codes as bash has them; nothing else of the script runs."""
    printed = 'load_catalogue; for c in "${codes[@]}"; do echo "$c|${status_of[$c]}|${next_of[$c]}"; done'
    command: list[str | Path] = ["bash", "-c", f'. "$1"; {printed}', "bash", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [Code(*line.split("|")) for line in done.stdout.splitlines()]


def catalogue_faults(catalogue: list[Code]) -> list[str]:
    codes = [line.code for line in catalogue]
    return [
        line.code
        for line in catalogue
        if re.fullmatch(r"[a-z0-9_:]+", line.code) is None or line.status not in STATUSES or codes.count(line.code) > 1
    ]


def read_table(page: str) -> dict[str, str]:
    """Code and what to do, of each row of the runbook's table."""
    (table,) = [table for table in tables(page) if table[0] == HEADER]
    assert all(re.fullmatch(r"`[^`]+`", row[0]) and row[1] and row[2] for row in table[1:]), table
    found = {row[0].strip("`"): row[2].replace("`", "") for row in table[1:]}
    assert len(found) == len(table) - 1, "a code has two rows"
    return found


def differing_actions(catalogue: list[Code], table: dict[str, str]) -> list[str]:
    return [line.code for line in catalogue if line.action and table.get(line.code) != line.action]


def key_codes(tree: ast.AST) -> set[str]:
    """The codes with which the keeper refuses a key file, for the default owner."""
    raised = {text for _, argument in calls(tree, {"BadKeyFile"}) for text in texts(argument)}
    return {code.replace("…", DEFAULT_OWNER) for code in raised if code.startswith("ca_key_")}


CATALOGUE: Final = read_catalogue(PREFLIGHT)
CODES: Final = [line.code for line in CATALOGUE]


def test_the_catalogue_has_each_code_once_with_a_status() -> None:
    assert len(CATALOGUE) > 60
    assert catalogue_faults(CATALOGUE) == []
    assert all(line.action for line in CATALOGUE if line.status == "FAIL")


@pytest.mark.parametrize(
    "line, fault",
    [
        ('"oops ca_key_new"', "ca_key_new"),
        ("ca_key_new", "y_new"),
        ('"ok   ca_key_path"', "ca_key_path"),
    ],
    ids=["status", "no status", "twice"],
)
def test_a_fault_of_the_catalogue_is_found(line: str, fault: str, tmp_path: Path) -> None:
    marker = "    # status, code, next action\n"
    text = PREFLIGHT.read_text()
    assert marker in text
    (tmp_path / "preflight.sh").write_text(text.replace(marker, f"{marker}    {line}\n"))
    assert set(catalogue_faults(read_catalogue(tmp_path / "preflight.sh"))) == {fault}


def test_codes_prints_the_catalogue() -> None:
    printed = subprocess.run(["bash", PREFLIGHT, "--codes"], capture_output=True, text=True, check=True).stdout
    assert printed.split() == CODES


def test_the_runbook_has_each_code_in_order() -> None:
    assert list(read_table(document(RUNBOOK))) == CODES


def test_the_runbook_says_what_to_do_in_the_scripts_words() -> None:
    assert differing_actions(CATALOGUE, read_table(document(RUNBOOK))) == []


@pytest.mark.parametrize(
    "before, after",
    [
        ("| `ca_key_has_links` |", "| `ca_key_has_link` |"),
        ("| `clock_unknown` |", "| `ca_key_path` |"),
        ("| `ca_key_has_links` |", "| ca_key_has_links |"),
        ("| code | what it says", "| codes | what it says"),
    ],
    ids=["another code", "a code twice", "no code", "another table"],
)
def test_a_fault_of_the_runbooks_codes_is_found(before: str, after: str) -> None:
    assert document(RUNBOOK).count(before) == 1
    with pytest.raises((AssertionError, ValueError)):
        assert list(read_table(document(RUNBOOK).replace(before, after))) == CODES


def test_other_words_than_the_scripts_are_found() -> None:
    page = document(RUNBOOK).replace("| name the file itself |", "| name the file |")
    assert differing_actions(CATALOGUE, read_table(page)) == ["ca_key_is_a_link"]


def test_a_code_of_the_keeper_about_its_key_file_is_the_preflights() -> None:
    raised = key_codes(trees()[PACKAGE / "ca" / "key.py"])
    assert f"ca_key_owner_must_be_{DEFAULT_OWNER}" in raised
    assert raised > KEEPER_ALONE
    assert raised - KEEPER_ALONE - set(CODES) == set()


def test_a_code_of_the_keeper_is_found_in_every_form() -> None:
    tree = ast.parse('BadKeyFile("ca_key_a", "x")\nBadKeyFile(f"ca_key_owner_must_be_{owner}")\nBadFile("ca_key_b")')
    assert key_codes(tree) == {"ca_key_a", f"ca_key_owner_must_be_{DEFAULT_OWNER}"}
