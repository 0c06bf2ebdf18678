"""What documents show to be typed exists: the verbs of both programs, and files of this repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from signer.cli.catalogue import VERBS
from signer.safe_session.arguments import parse_arguments
from signer.safe_session.statuses import UsageError
from tests.parts.documents import ROOT, read_documents
from tests.parts.shown import shown_commands

SAFE_SESSION_VERBS: Final = {  # with what they need
    "ssh": ["ssh", "host"],
    "exec": ["exec", "--", "true"],
    "whoami": ["whoami"],
    "requests": ["requests"],
    "wait": ["wait", "r-a"],
    "withdraw": ["withdraw", "r-a"],
}
KNOWN: Final = {f"signer {entry.words}" for entry in VERBS} | {f"safe-session {verb}" for verb in SAFE_SESSION_VERBS}
GROUPS: Final = {verb.rpartition(" ")[0] for verb in KNOWN}
VERB: Final = re.compile(r"(?<![\w./-])(?:[\w./-]*/bin/)?(signer|safe-session) +([a-z][a-z-]*)(?: +([a-z][a-z-]*))?")
PATH: Final = re.compile(r"(?<![\w/.~$}*-])(?:\.ci|overlays|runbooks|scripts|signer|tests)/[\w./*-]*\w")
DOCUMENTS: Final = {
    name: text for name, text in read_documents().items() if name == "README.md" or name.startswith("runbooks/")
}


def unknown_verbs(text: str) -> list[str]:
    """The verbs of commands that a document shows and that do not exist; the name of a group alone is one."""
    found = []
    for shown in shown_commands(text):
        for program, first, second in VERB.findall(shown.command):
            one, two = f"{program} {first}", f"{program} {first} {second}".rstrip()
            if not {one, two} & KNOWN and not (one in GROUPS and not second):
                found.append(two)
    return found


def missing_paths(name: str, text: str, root: Path = ROOT) -> list[str]:
    """The files that a runbook names anywhere, or README in a command, and that are not in the repository."""
    named = "\n".join(shown.command for shown in shown_commands(text)) if name == "README.md" else text
    return [path for path in sorted(set(PATH.findall(named))) if not any(root.glob(path))]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_verbs_that_a_document_shows_exist(name: str) -> None:
    assert unknown_verbs(DOCUMENTS[name]) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_a_document_shows_exist(name: str) -> None:
    assert missing_paths(name, DOCUMENTS[name]) == []


def test_documents_show_verbs_and_files() -> None:
    """Else the two tests above look at nothing."""
    whole = "\n".join(DOCUMENTS.values())
    shown = [found for command in shown_commands(whole) for found in VERB.findall(command.command)]
    assert {"signer", "safe-session"} == {program for program, _, _ in shown}
    assert len({first for _, first, _ in shown}) > 10
    assert len(set(PATH.findall(whole))) > 30


@pytest.mark.parametrize(
    "text, verb",
    [
        ("Then `signer ledger dump`.", "signer ledger dump"),
        ("Then `signer policies check`.", "signer policies check"),
        ("Then `safe-session login rs2000`.", "safe-session login rs"),
        ("    /opt/signer/.venv/bin/signer ledgers\n", "signer ledgers"),
        ("```sh\ntrue && signer \\\n  check-all\n```", "signer check-all"),
        ("| a |\n|---|\n| `signer ca old` |\n", "signer ca old"),
        ("# Then `signer nothing`\n", "signer nothing"),
    ],
)
def test_a_verb_that_does_not_exist_is_found(text: str, verb: str) -> None:
    assert unknown_verbs(text) == [verb]


@pytest.mark.parametrize(
    "text",
    ["`signer ca`", "`signer check`", "`signer ca new FILE`", "`safe-session ssh host`", "signer nothing", "`signer`"],
)
def test_what_exists_or_is_not_code_is_no_fault(text: str) -> None:
    assert unknown_verbs(text) == []


@pytest.mark.parametrize(
    "name, text, path",
    [
        ("runbooks/ledger.md", "See scripts/cutover/other.sh. First", "scripts/cutover/other.sh"),
        ("runbooks/ledger.md", "See runbooks/gone.md", "runbooks/gone.md"),
        ("README.md", "    scripts/quickstarts  # try it\n", "scripts/quickstarts"),
        ("README.md", "`tests/nothing/*.py`", "tests/nothing/*.py"),
    ],
)
def test_a_file_that_does_not_exist_is_found(name: str, text: str, path: str) -> None:
    assert missing_paths(name, text) == [path]


def test_safe_session_has_these_verbs() -> None:
    for verb, words in SAFE_SESSION_VERBS.items():
        assert parse_arguments(words).verb == verb
    with pytest.raises(UsageError):
        parse_arguments(["login", "host"])
