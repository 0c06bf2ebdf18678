"""Shell completion: the scripts ask `signer`, which answers from the table of verbs and from the verbs' own options."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from signer.cli import main as cli
from signer.cli.catalogue import GROUPS, VERBS, find
from signer.cli.parser import load_all
from tests.parts.command import run

ROOT = Path(cli.__file__).parents[2]


def test_the_table_and_the_functions_name_the_same_verbs() -> None:
    assert [entry.words for entry in VERBS] == [verb.words for _, verb in load_all()]
    assert {entry.words.split()[0] for entry in VERBS if " " in entry.words} == set(GROUPS)
    assert find(["ledger"]) is None


def bash(folder: Path, line: str) -> list[str]:
    """The completions of `line` in a bash that has loaded the script; a last blank asks for a new word."""
    (folder / "signer").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m signer "$@"\n')
    (folder / "signer").chmod(0o755)
    words = [*line.split(), ""] if line.endswith(" ") else line.split()
    program = (
        'source <(signer completion bash); complete -p signer >&2; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1));'
        '_signer_completion signer; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", program, "bash", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(folder)},
    )
    assert "-F _signer_completion signer" in done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "line, completions",
    [
        ("signer led", ["ledger"]),
        ("signer ledger v", ["verify"]),
        (
            "signer ledger ",
            [
                "verify",
                "checkpoint",
                "key",
                "witness",
                "head",
                "export",
                "backup",
                "restore",
                "follow",
                "promote",
                "archive",
                "rebuild",
            ],
        ),
        ("signer certs list --b", ["--by", "--backend", "--before"]),
        ("signer certs list --active --backend ", ["local", "vault"]),
        ("signer completion ", ["bash", "zsh", "fish"]),
    ],
)
def test_bash_completes(tmp_path: Path, line: str, completions: list[str]) -> None:
    assert bash(tmp_path, line) == completions


def ask(monkeypatch: pytest.MonkeyPatch, instruction: str, words: str, current: str) -> list[str]:
    for name, value in {"_SIGNER_COMPLETE": instruction, "COMP_WORDS": words, "COMP_CWORD": current}.items():
        monkeypatch.setenv(name, value)
    ran = run()
    assert (ran.status, ran.err) == (0, "")
    return ran.out.splitlines()


def test_zsh_is_told_words_with_their_help(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, "zsh_complete", "signer ledger v", "2") == [
        "plain",
        "verify",
        "verify every event, every view and the files",
    ]
    assert ask(monkeypatch, "zsh_complete", "signer ce", "1") == ["plain", "certs", GROUPS["certs"]]


def test_fish_is_told_words(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ask(monkeypatch, "fish_complete", "signer token n", "n")
    assert [line.split("\t")[0] for line in found] == ["plain,new"]


@pytest.mark.parametrize("words", ["signer ca inspect ", "signer policy explain --key ", "signer cutover plan --out "])
def test_a_file_is_left_to_the_shell(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    assert ask(monkeypatch, "bash_complete", words, str(len(words.split()))) == ["file,"]


@pytest.mark.parametrize("instruction", ["bash_complete", "zsh_complete", "bash_source", "tcsh_complete", "1"])
def test_the_variable_without_a_line_is_an_error(monkeypatch: pytest.MonkeyPatch, instruction: str) -> None:
    monkeypatch.setenv("_SIGNER_COMPLETE", instruction)
    monkeypatch.delenv("COMP_WORDS", raising=False)
    ran = run("ledger", "head")
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("signer: error: _SIGNER_COMPLETE is for the completion script only\n")


@pytest.mark.parametrize(
    "words, current, modules",
    [
        ("signer ", "1", []),
        ("signer led", "1", []),
        ("signer ledger v", "2", []),
        ("signer certs list --", "3", ["ledger"]),
    ],
)
def test_completion_imports_only_the_verb_that_is_asked_for(words: str, current: str, modules: list[str]) -> None:
    verbs = sorted({entry.module for entry in VERBS} - {"completion"})
    program = (
        "import sys; from signer.cli.main import main; main();"
        f"print([name for name in {verbs} if f'signer.cli.{{name}}' in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        env={**os.environ, "_SIGNER_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": current},
    )
    assert done.stdout.splitlines()[-1] == str(modules)
