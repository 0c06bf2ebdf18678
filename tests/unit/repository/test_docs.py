"""What the documents say is so: generated blocks, tables and examples are as the code has them, names and links exist.

A new module, setting, policy key, verb, route, error code, event kind or metric fails here until `scripts/docs` was run
and its cells were filled in.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping

import pytest

from scripts.documents import pages
from scripts.documents.facts import FACTS, Fact, Table
from signer import __version__
from signer.api.vault import routes as vault
from signer.api.vault import system
from signer.errors import BadFile
from signer.ledger.schema import EVENT_KINDS
from signer.model import RIGHTS
from signer.policy import file as policy_file
from signer.policy import tables
from tests.parts.documents import (
    ROOT,
    anchors,
    blocks,
    document,
    links,
    names,
    read_documents,
    reference,
    rows,
    section,
)
from tests.parts.parity_differences import DIFFERENCES
from tests.parts.source import PACKAGE, called_with, texts, trees

DOCUMENTS = read_documents()
README, SECURITY = DOCUMENTS["README.md"], DOCUMENTS["SECURITY.md"]


# --- generated blocks ------------------------------------------------------------------------------------------------


def test_generated_blocks_are_what_the_code_says() -> None:
    wrong = list(pages.differences(pages.read_pages()))
    assert not wrong, "run scripts/docs, and fill in empty cells: " + "\n".join(wrong)


def test_every_part_of_the_reference_is_generated() -> None:
    assert FACTS.keys() >= {
        "settings",
        "policy keys",
        "commands",
        "routes",
        "event kinds",
        "metrics",
        "limits",
        "modules",
    }


def test_the_kinds_of_events_are_those_that_the_code_records() -> None:
    assert list(EVENT_KINDS) == sorted({text for _, kind in called_with({"Event"}) for text in texts(kind)})


PAGE = """\
# Words

<!-- generated: words -->
| word | meaning |
|---|---|
| `a` | first |
<!-- end -->

By hand.
"""


def words(*found: str) -> Mapping[str, Fact]:
    return {"words": lambda: Table(("word", "meaning"), [(f"`{word}`",) for word in found], by_hand=1)}


def test_a_page_as_the_code_has_it_is_left_alone() -> None:
    assert list(pages.differences({"page.md": PAGE}, words("a"))) == []
    assert pages.render(PAGE, words("a")) == PAGE


def test_a_new_fact_is_named_with_page_and_line_and_its_cell_is_asked_for() -> None:
    facts = words("a", "b")
    assert list(pages.differences({"page.md": PAGE}, facts)) == [
        "page.md:7: the page has '<!-- end -->', the code says '| `b` | |'"
    ]
    written = pages.render(PAGE, facts)
    assert "| `a` | first |\n| `b` | |\n" in written
    assert written.endswith("\n\nBy hand.\n")
    assert list(pages.differences({"page.md": written}, facts)) == ["page.md: the row of `b` has an empty cell"]


def test_a_fact_that_is_gone_loses_its_row() -> None:
    assert "first" not in pages.render(PAGE, words("b"))


@pytest.mark.parametrize(
    "found, sentence",
    [
        ({"page.md": "# Words\n"}, "the block 'words' is on no page"),
        ({"a.md": PAGE, "b.md": PAGE}, "the block 'words' is on a.md and b.md"),
        ({"page.md": PAGE + PAGE.replace(": words", ": word")}, "page.md: no fact is called 'word'"),
        ({"page.md": PAGE + "<!-- generated: words -->\n"}, "page.md: a generated block has no <!-- end -->"),
    ],
    ids=["missing", "twice", "unknown", "without end"],
)
def test_a_block_that_is_out_of_place_is_named(found: dict[str, str], sentence: str) -> None:
    assert sentence in list(pages.differences(found, words("a")))


def test_check_ends_with_1_and_another_word_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "read_pages", lambda: {"page.md": PAGE})
    assert pages.main(["--check"]) == 1
    assert pages.main(["--write"]) == 2


# --- README ----------------------------------------------------------------------------------------------------------


def test_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 260


@pytest.mark.parametrize("page", ["README.md", "runbooks/install/systemd.md"])
def test_the_lines_that_install_the_units_copy_every_kind_of_them(page: str) -> None:
    kinds = {path.suffix for path in (ROOT / "scripts" / "systemd").iterdir()}
    (copied,) = re.findall(r"scripts/systemd/\*\.\{([\w,]+)\}", (ROOT / page).read_text())
    assert {f".{kind}" for kind in copied.split(",")} == kinds


def test_readme_leads_to_a_first_login_in_eight_commands() -> None:
    """They are run by `test_the_day_on_a_host`."""
    shown = section("Install", README).split("With **systemd**")[1]
    commands = re.findall(r"^ {4}(\S.*)", shown, re.MULTILINE)
    assert "/setup-venv run" in commands[0]
    assert "safe-session ssh" in commands[-1]
    assert len(commands) <= 8


def test_readme_names_the_scripts_to_begin_with() -> None:
    shown = re.findall(r"^ {4}(scripts/\S+)", section("Try it", README), re.MULTILINE)
    assert shown == [*["scripts/quickstart"] * 3, "scripts/rehearse-cutover", "scripts/test"]


def test_readme_links_to_every_runbook_that_its_table_of_tasks_needs() -> None:
    for row in rows(section("Operate", README), "task"):
        assert list(links(row[2])), row


def test_the_page_of_all_runbooks_links_to_each() -> None:
    linked = {file for file, _ in links(DOCUMENTS["runbooks/README.md"])}
    real = {name.removeprefix("runbooks/") for name in DOCUMENTS if name.startswith("runbooks/")} - {"README.md"}
    assert not real - linked


# --- policy.toml -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "runbooks/reference/policy-file.md", "runbooks/install/first-policy.md"])
def test_policy_example_is_a_policy(name: str) -> None:
    """With its placeholders filled in, each of which is a problem of the file as it is shown."""
    example = blocks(DOCUMENTS[name], "toml")[0]
    filled = example.replace("A" * 43, "x" * 43).replace("0" * 64, "a0" * 32).replace("1" * 64, "b0" * 32)
    read = policy_file.parse_policy(filled.encode())
    assert set(read.roles) == set(tomllib.loads(example)["roles"])
    with pytest.raises(BadFile) as caught:
        policy_file.parse_policy(example.encode())
    assert [text for text in caught.value.problems if "is a placeholder" not in text] == []
    assert len(caught.value.problems) == 1 + len(read.tokens)


def test_policy_defaults_and_rights_are_those_of_the_code() -> None:
    text = {row[0].strip("`"): row for row in rows(reference("policy-file"), "key")}
    role = tables.RawRole.model_fields
    assert text["roles.NAME.rsa_min_bits"][2] == f"`{role['rsa_min_bits'].default}`"
    for flag in ("verify_required", "no_touch_required", "allow_key_id", "reason_required"):
        assert text[f"roles.NAME.{flag}"][2] == f"`{str(role[flag].default).lower()}`"
    for right in RIGHTS:
        assert f"`{right}`" in text["identities.NAME.may"][3]


# --- Vault's routes --------------------------------------------------------------------------------------------------


def test_vault_routes_are_those_of_the_code() -> None:
    table = rows(section("Routes", reference("vault-compatibility")), "route")
    told = [name.split(" ")[-1] for name in names(table) if "/v1/" in name]
    mounted = [path.removeprefix("/v1/ssh/") for path in told if path.startswith("/v1/ssh/")]
    patterns = [pattern for pattern, _ in vault._ROUTES]
    examples = {path: path.replace("<role>", "llmops").replace("<ref>", "default") for path in mounted}
    for pattern in patterns:
        assert any(pattern.fullmatch(example) for example in examples.values()), f"{pattern} is not documented"
    for path, example in examples.items():
        assert any(pattern.fullmatch(example) for pattern in patterns), f"there is no {path}"
    outside = {path.removeprefix("/v1/") for path in told if not path.startswith("/v1/ssh/")}
    assert outside >= system.UNAUTHENTICATED
    written = {text for node in ast.walk(trees()[PACKAGE / "api" / "vault" / "system.py"]) for text in texts(node)}
    assert {path.replace("<mount>", "") for path in outside} <= written


def test_differences_from_vault_are_those_that_are_shown() -> None:
    page = section("Differences from Vault", reference("vault-compatibility"))
    told = [row for row in page.splitlines() if row.startswith("|")][2:]
    assert told == [difference.row() for difference in DIFFERENCES]


# --- what documents and the program name -----------------------------------------------------------------------------


def test_benches_are_named_with_the_figures() -> None:
    real = {
        f"scripts/bench/{path.name}"
        for path in (ROOT / "scripts" / "bench").glob("*")
        if path.is_file() and not path.suffix and path.stat().st_mode & 0o100
    }
    told = re.findall(r"^ {4}(scripts/bench/\w+)", document("runbooks/develop/benchmarks.md"), re.MULTILINE)
    assert sorted(told) == sorted(real)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_documents_name_exist(name: str) -> None:
    wrong = [
        path
        for path in re.findall(r"`((?:signer|tests|scripts|runbooks|overlays)/[\w./-]+)`", DOCUMENTS[name])
        if not (ROOT / path).exists()
    ]
    assert not wrong, f"{name} names what is not there: {wrong}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_of_documents_lead_somewhere(name: str) -> None:
    for file, anchor in links(DOCUMENTS[name]):
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), f"{name} links to {file}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{name} links to {file}#{anchor}"


def named_documents(text: str) -> Iterator[tuple[str, str]]:
    """(document, section) that a sentence names; a section is what follows in quotes, or `section N`."""
    page = r"\b((?:runbooks/[\w/-]+|README|SECURITY|CHANGELOG|CONTRIBUTING)\.md)"
    for name, anchor, quoted, number in re.findall(
        rf'{page}`?(?:#([\w-]+))?(?:,\s(?:"([^"]+)"|sections?\s(\d)))?', text
    ):
        yield name, anchor or quoted or number


def sentences() -> Iterator[tuple[str, str]]:
    """Every text of the package with its module, docstrings included, and each file that is no Python but is shown."""
    for path, tree in trees().items():
        yield from ((str(path.relative_to(PACKAGE)), text) for node in ast.walk(tree) for text in texts(node))
    for path in (*PACKAGE.rglob("*.html"), *PACKAGE.rglob("*.css")):
        yield str(path.relative_to(PACKAGE)), path.read_text()


def test_documents_that_the_program_names_exist() -> None:
    found = [(module, name, part) for module, text in sentences() for name, part in named_documents(text)]
    assert {"runbooks/rollback.md", "runbooks/vault-decommission.md"} <= {name for _, name, _ in found}
    for module, name, part in found:
        assert name in DOCUMENTS, f"signer/{module} names {name}"
        headings = re.findall(r"^#+ (.+)$", DOCUMENTS[name], re.MULTILINE)
        assert (
            not part
            or part in anchors(DOCUMENTS[name])
            or any(heading == part or heading.startswith(f"{part}. ") for heading in headings)
        ), f"signer/{module} names {name}, {part}"


def test_a_document_is_named_by_its_path() -> None:
    """Somebody who reads a hint has to find the page: no `README, Ledger`, and nothing outside the repository."""
    pattern = r"README(?!\.md)|\.\./\w+/[\w/]+\.md|shared/"
    assert [(module, text) for module, text in sentences() if re.search(pattern, text)] == []


def test_every_promise_is_told_with_its_tests() -> None:
    table = rows(section("Promises", SECURITY), "promise")
    assert [row[0][0] for row in table] == ["1", "2", "3", "4", "5", "6", "7", "8"]
    for row in table[:5]:
        assert re.search(r"`tests/[\w/]+\.py[`:]", row[1]), row


def test_tests_that_documents_name_exist() -> None:
    for path, function in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", "".join(DOCUMENTS.values())):
        tree = ast.parse((ROOT / path).read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in ast.walk(tree)), function


def test_the_changelog_leads_with_what_is_not_released() -> None:
    headings = re.findall(r"^## \[?([^\]\n]+)", DOCUMENTS["CHANGELOG.md"], re.MULTILINE)
    assert headings[0] == f"Unreleased: {__version__}"


def test_the_licence_is_the_one_that_the_package_names() -> None:
    project = tomllib.loads(document("pyproject.toml"))["project"]
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert "Apache License\n                           Version 2.0, January 2004" in document("LICENSE")
