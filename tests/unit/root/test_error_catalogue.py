"""The error catalogue: every code of the program and no other, the statuses that clients rely on, readable texts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http import HTTPStatus
from itertools import groupby
from pathlib import Path

import pytest

from signer.api.problems import status_of
from signer.api.vault.responses import STATUSES, render_error
from signer.error_catalogue import (
    CATALOGUE,
    COUNTED_CODES,
    OPEN_END,
    ErrorEntry,
    find_entry,
    nearest_codes,
    render_markdown,
)
from signer.errors import SignerError
from tests.parts.command import run
from tests.parts.source import called_with, error_classes, texts

GOLDEN = Path(__file__).parents[2] / "data" / "error_statuses.txt"


def raised_codes() -> set[str]:
    """The codes of all errors, blockers and findings, read from the syntax trees."""
    # A class of its own may take the sentence first (`UsageError`); a sentence has blanks, a code has none.
    return {
        text
        for _, argument in called_with(error_classes() | {"__init__", "Blocker", "Defect", "Faults", "SlowSigner"})
        for text in texts(argument)
        if re.fullmatch(r"[a-z0-9_]+…?", text)
    }


def golden() -> Iterator[tuple[str, int, int, bool]]:
    """Code, native status, status of the Vault edge, whether it is counted from 0."""
    for line in GOLDEN.read_text().splitlines():
        if not line.startswith("#"):
            code, native, vault, counted = line.split()
            yield code, int(native), int(vault), counted == "counted"


# --- its codes -------------------------------------------------------------------------------------------------------


def test_the_search_for_codes_finds_some_of_every_form() -> None:
    forms = {"frozen", "usage", "ca_key_owner_must_be_…", "vault_token_malformed", "soak_not_over", "evidence_mode"}
    assert forms <= raised_codes()


def test_every_code_that_is_raised_has_an_entry() -> None:
    assert raised_codes() - CATALOGUE.keys() == set()


def test_every_entry_is_raised_somewhere() -> None:
    assert CATALOGUE.keys() - raised_codes() == set()


def test_codes_are_sorted_within_their_subject_and_subjects_are_not_split() -> None:
    subjects = [
        (subject, list(entries)) for subject, entries in groupby(CATALOGUE.values(), lambda entry: entry.subject)
    ]
    assert len({subject for subject, _ in subjects}) == len(subjects)
    for subject, entries in subjects:
        codes = [entry.code for entry in entries]
        assert codes == sorted(codes), subject


def test_an_entry_is_found_under_its_own_code() -> None:
    assert all(entry.code == code for code, entry in CATALOGUE.items())


# --- statuses and counters -------------------------------------------------------------------------------------------


def test_statuses_are_those_that_clients_know() -> None:
    known = {code: native for code, native, _, _ in golden()}
    assert {code: entry.status for code, entry in CATALOGUE.items() if entry.status is not None} == known


@pytest.mark.parametrize("code, native, vault", [row[:3] for row in golden()])
def test_both_edges_answer_with_the_known_status(code: str, native: int, vault: int) -> None:
    error = SignerError(code, "text")
    assert status_of(error) == native
    assert render_error(error).status == vault


def test_an_error_that_is_not_sent_over_http_is_an_internal_one_there() -> None:
    local = [code for code, entry in CATALOGUE.items() if entry.status is None]
    assert len(local) > 150
    assert {status_of(SignerError(code, "text")) for code in local} == {HTTPStatus.INTERNAL_SERVER_ERROR}


def test_the_vault_edge_keeps_only_statuses_that_differ() -> None:
    assert [code for code, status in STATUSES.items() if CATALOGUE[code].status in (status, None)] == []


def test_counters_are_those_that_dashboards_know() -> None:
    assert tuple(code for code, _, _, counted in golden() if counted) == COUNTED_CODES


# --- its texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=lambda entry: entry.code)
def test_meaning_and_action_are_in_the_voice_of_errors(entry: ErrorEntry) -> None:
    for text in (entry.meaning, entry.action):
        assert text.strip() == text
        assert text
        assert "|" not in text  # they are cells of a Markdown table
        assert not text.endswith(".")
        assert text.count("`") % 2 == 0


def test_texts_name_only_pages_and_commands_that_exist() -> None:
    root = Path(__file__).parents[3]
    text = "\n".join(f"{entry.meaning}\n{entry.action}" for entry in CATALOGUE.values())
    pages = set(re.findall(r"`(runbooks/[^`]+)`", text))
    assert "runbooks/ledger.md" in pages
    assert [page for page in pages if not (root / page).is_file()] == []
    commands = set(re.findall(r"`signer ([a-z]+(?: [a-z]+)?)", text))
    assert "ledger rebuild" in commands
    for command in commands:
        assert run(*command.split(), "--help").status == 0, command


# --- looking codes up ------------------------------------------------------------------------------------------------


def test_a_code_with_a_part_of_its_own_is_found() -> None:
    entry = find_entry("ca_key_owner_must_be_root:root")
    assert entry is not None
    assert entry.code == f"ca_key_owner_must_be_{OPEN_END}"


@pytest.mark.parametrize("code", ["", "frozn", "FROZEN", "ca_key_owner_must_be", "frozen "])
def test_another_code_is_not_found(code: str) -> None:
    assert find_entry(code) is None


def test_the_nearest_codes_are_suggested() -> None:
    assert nearest_codes("frozn")[0] == "frozen"
    assert nearest_codes("-----") == []


def test_the_list_has_a_line_for_each_code() -> None:
    lines = run("error").out.splitlines()
    assert [line.split()[0] for line in lines] == list(CATALOGUE)
    assert [line.split()[1] for line in lines] == [str(entry.status or "-") for entry in CATALOGUE.values()]
    assert all(line.endswith(f"  {entry.meaning}") for line, entry in zip(lines, CATALOGUE.values(), strict=True))


def test_the_list_as_json_has_all_fields() -> None:
    listed = json.loads(run("error", "--json").out)["errors"]
    assert [ErrorEntry(**fields) for fields in listed] == list(CATALOGUE.values())


# --- the reference page ----------------------------------------------------------------------------------------------


def test_the_reference_page_has_a_section_for_each_subject_and_a_row_for_each_code() -> None:
    page = render_markdown()
    subjects = list(dict.fromkeys(entry.subject for entry in CATALOGUE.values()))
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == subjects
    assert re.findall(r"^\| `(.*?)` \|", page, re.MULTILINE) == list(CATALOGUE)
    entry = CATALOGUE["frozen"]
    assert f"| `frozen` | 403 | {entry.meaning} | {entry.action} |" in page.splitlines()
    assert page.splitlines()[-1].startswith("| `wrong_scheme` | |"), "no status, no blank cell"
