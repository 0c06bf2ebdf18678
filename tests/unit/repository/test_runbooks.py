"""The documents say what the program takes: keys of cutover.toml, codes, command lines, phrases."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest

from signer.cli.parser import read_words
from signer.errors import SignerError
from signer.migration import config as cutoverfile
from signer.migration.approval import PHRASES
from signer.migration.config import parse_cutover_file
from signer.migration.plan import Operation
from tests.parts.documents import blocks, read_documents

ROOT = Path(__file__).parents[3]
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "runbooks").glob("*.md"))}
CUTOVER, REMOVAL = PAGES["safe-session-local-ca-cutover.md"], PAGES["vault-decommission.md"]
GATES: dict[Operation, str] = {"cutover": CUTOVER, "decommission": REMOVAL}


def whole_file() -> str:
    """cutover.toml as the two pages show it."""
    (file,) = [text for text in blocks(CUTOVER, "toml") if text.startswith("evidence_dir")]
    (table,) = [text for text in blocks(REMOVAL, "toml") if text.startswith("[decommission]")]
    return file + table


def keys_of(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def test_the_cutover_file_of_the_runbooks_is_one() -> None:
    found = parse_cutover_file(whole_file().encode())
    assert [target.name for target in found.smoke] == ["rs2000", "edge1"]
    assert found.decommission is not None


def test_every_key_of_the_cutover_file_is_shown_and_explained() -> None:
    shown = tomllib.loads(whole_file())
    assert set(shown) == keys_of(cutoverfile.CutoverFile) - {"digest"}
    tables = {
        "compose": cutoverfile.ComposeFacts,
        "preflight": cutoverfile.PreflightFacts,
        "signer": cutoverfile.SignerFacts,
        "vault": cutoverfile.VaultFacts,
        "decommission": cutoverfile.DecommissionFacts,
    }
    for name, kind in tables.items():
        assert set(shown[name]) == keys_of(kind), name
    assert set(shown["smoke"][0]) == keys_of(cutoverfile.Target)
    first, _, second = whole_file().partition('[[smoke]]\nname            = "edge1"')
    lines = (first + second[second.index("[decommission]") :]).splitlines()
    for above, line in pairwise(["#", *lines]):
        assert not re.match(r"\w+ *= ", line) or " # " in line or above.startswith("#"), line


def codes_of_blockers() -> set[str]:
    tree = ast.parse((ROOT / "signer" / "migration" / "decommission" / "blockers.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    firsts = [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Blocker"]
    return {str(first.value) for first in firsts if isinstance(first, ast.Constant)}


def test_the_table_of_blockers_has_each_code_of_the_program_once() -> None:
    told = re.findall(r"^\| `([a-z_]+)` \| [^|]+[^| ] \| [^|]+[^| ] \|$", REMOVAL.split("## 3.")[0], re.MULTILINE)
    assert sorted(told) == sorted(codes_of_blockers())
    assert len(told) > 10


@pytest.mark.parametrize("operation", sorted(GATES))
def test_a_phrase_stands_in_section_4_of_its_page_and_never_opens_the_other(operation: Operation) -> None:
    page = GATES[operation]
    sections = re.split(r"^## (?=\d)", page, flags=re.MULTILINE)
    holding = [section[0] for section in sections if PHRASES[operation] in section]
    assert holding == ["4"]
    assert all(phrase not in page for other, phrase in PHRASES.items() if other != operation)


# What stands for the output of another command: a fingerprint, or a head of the ledger.
CAPTURED = {False: f"SHA256:{'A' * 43}", True: f"1:{'0' * 64}"}


def command_lines() -> Iterator[tuple[str, str]]:
    """(document, command line) of each `signer …` that one shows to be typed, up to a pipe and the like."""
    for name, page in read_documents().items():
        if name == "runbooks/reference/commands.md":  # made from the help, which has tests of its own
            continue
        for line in re.findall(r"^(?:\$ | {4}| {7})(?:\w+=\S+ )?(signer [a-z].*)$", page, re.MULTILINE):
            plain = re.sub(r'"\$\(.*?\)"|"\$HEAD"', lambda found: CAPTURED[found[0] == '"$HEAD"'], line)
            yield name, re.split(r" (?:\||>|&&) |;", plain.replace("SEQ:HASH", CAPTURED[True]))[0]


@pytest.mark.parametrize("page, line", sorted(set(command_lines())))
def test_a_command_line_of_a_page_is_understood(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    try:
        found = read_words(words[1:])
    except SignerError as error:
        pytest.fail(f"{page}: {line}: {error.text}")
    assert not isinstance(found, str)


# Left as they are while others work on them.
OTHERS = {"actions.py", "preconditions.py", "moves.py"}


def said_by(path: Path) -> Iterator[str]:
    """The texts of a module, but for what documents it; `{}` for what is put in."""
    tree = ast.parse(path.read_text())
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and {id(node)}.isdisjoint(documents | parts)
        ):
            yield node.value


def test_a_command_that_the_program_names_has_what_it_cannot_do_without() -> None:
    commands = r"signer (?:(?:cutover|decommission|\{\}) plan|cutover (?:parity|status|rollback)|decommission status)"
    said = [(path.name, text) for path in (ROOT / "signer").rglob("*.py") for text in said_by(path)]
    named = [(module, text, end) for module, text in said for end in re.findall(rf"{commands}(.{{0,12}})", text)]
    assert len(named) > 10
    lacking = [f"{module}: {text}" for module, text, end in named if not end.startswith(" --config ")]
    assert [line for line in lacking if line.split(":")[0] not in OTHERS] == []


def test_the_page_of_the_cutover_ends_nothing_of_vaults_and_says_so() -> None:
    last = re.split(r"^## ", CUTOVER, flags=re.MULTILINE)[-1]
    assert last.startswith("8. Where this page ends")
    assert "**Nothing on this page removes anything of Vault's**" in last
    assert "`runbooks/vault-decommission.md`" in last


def test_the_point_of_no_return_is_named_in_so_many_words() -> None:
    section = re.split(r"^## ", REMOVAL, flags=re.MULTILINE)[5]
    assert section.startswith("5. The point of no return")
    assert 'Step 4, "disable the SSH mount", is the point of no return' in section
    assert " 4 ✓ disable the SSH mount" in REMOVAL
