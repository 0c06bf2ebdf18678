"""runbooks/operate/hosts.md names each code that the host kit refuses a host with, and the help each option."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from tests.parts.documents import ROOT, section

KIT: Final = ROOT / "scripts" / "host"
PAGES: Final = {name: (ROOT / "runbooks" / name).read_text() for name in ("operate/hosts.md", "install/hosts.md")}


def codes_of_install() -> set[str]:
    text = (KIT / "install").read_text()
    found = set(re.findall(r"\brefuse ([a-z_]+) ", text))
    found |= set(re.findall(r"\bcode=([a-z_]+) hint", text))
    for name in set(re.findall(r'\bcheck_keys "\$\w+" (\w+) ', text)):
        found |= {f"{name}_{end}" for end in re.findall(r'refuse "\$\{name\}_([a-z_]+)"', text)}
    return found


def test_every_refusal_is_explained() -> None:
    table = section("What it refuses", PAGES["operate/hosts.md"])
    named = set(re.findall(r"`([a-z_]+)`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line)))
    assert len(named) > 20
    assert named == codes_of_install()


@pytest.mark.parametrize("program", ["install", "update", "verify"])
def test_help_names_every_option(program: str) -> None:
    text = (KIT / program).read_text()
    parsed = set(re.findall(r"^ +(--[a-z-]+(?: \| --[a-z-]+)*)\)", text, re.MULTILINE))
    options = {option for group in parsed for option in group.split(" | ")}
    shown = set(re.findall(r"--[a-z-]+", text[text.index("<<HELP") : text.index("\nHELP\n")]))
    assert len(options) > 2
    assert options <= shown


def test_the_lines_by_hand_are_those_of_the_drop_in() -> None:
    block = re.search(r"```text\n(TrustedUserCAKeys .*?)```", PAGES["install/hosts.md"], re.DOTALL)
    assert block
    places = dict(re.findall(r"(FOLDER|CA_FILE|LIST|PRINCIPALS)=(\S+)", (KIT / "common").read_text()))
    written = re.search(r"""printf '%s\\n' ("TrustedUserCAKeys .*)$""", (KIT / "install").read_text(), re.MULTILINE)
    assert written
    lines = re.findall(r'"([^"]+)"', written[1])
    for name in ("CA_FILE", "LIST", "PRINCIPALS", "FOLDER"):
        lines = [line.replace(f"${name}", places[name]) for line in lines]
    assert block[1].splitlines() == lines


def test_every_program_of_the_kit_is_installed() -> None:
    """A part that is forgotten in the list is missing on the host only."""
    text = (KIT / "install").read_text()
    parts = re.search(r"^readonly PARTS=\((.*)\)$", text, re.MULTILINE)
    units = re.search(r"^readonly UNITS=\((.*)\)$", text, re.MULTILINE)
    assert parts
    assert units
    assert {*parts[1].split(), *units[1].split()} == {path.name for path in Path(KIT).iterdir()}
