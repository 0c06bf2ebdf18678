"""The commands that a document shows, and which of them would end Vault."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from markdown_it.token import Token

from signer.migration.approval import PHRASES
from tests.parts.documents import parse_markdown

# The phrase that approves the removal of Vault; it opens the one section that may show how.
GATE: Final = PHRASES["decommission"]

_VAULT: Final = r"(?<![A-Za-z0-9])(?:vault|openbao|bao)(?![A-Za-z0-9])"
# How a service, its data or its secrets are ended, in the command lines of engines, systems and Vault itself.
_ENDING: Final = re.compile(
    r"\b(?:stop|kill|pkill|killall|rm|rmi|rmdir|unlink|shred|truncate|down|disable|mask|delete|destroy|purge|remove"
    r"|uninstall|prune|seal|step-down|revoke\w*|wipe\w*|umount|drop|autoremove|--remove-orphans|scale\s+\S+=0|mkfs\S*"
    r"|dd)\b|-X\s*DELETE"
)
# These end Vault's key or role whether or not they name Vault.
_ALWAYS: Final = re.compile(
    rf"{_VAULT}\s+(?:secrets\s+disable|operator\s+seal|delete|token\s+revoke|lease\s+revoke|kv\s+destroy)"
)


class Shown(NamedTuple):
    """A command that a document shows, and whether the section that holds it is gated."""

    command: str
    is_gated: bool


def shown_commands(text: str) -> Iterator[Shown]:
    """Each command that a document shows.

    Commands are the lines of code blocks and of raw HTML (comments excepted), and code in a text, a heading or a
    table. A line that ends in a backslash continues in the next. In a block of `text` that begins with a prompt, `$ `,
    the lines after a prompt are commands, the others are output. A section is gated when its heading, or its text
    before its first block, names the phrase; so are the sections inside it.
    """
    gates: list[tuple[int, bool]] = []  # level and gate of each section that is open
    shows_block = False  # in this section, so far
    tokens = parse_markdown(text)
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            level, title = int(token.tag[1:]), tokens[number + 1].content
            gates = [*(gate for gate in gates if gate[0] < level), (level, GATE in title)]
            shows_block = False
        elif token.type == "inline":
            for part in token.children or ():
                if part.type == "code_inline" and part.content != GATE:
                    yield Shown(part.content.strip(), any(is_open for _, is_open in gates))
                if GATE in part.content and gates and not shows_block:
                    gates[-1] = (gates[-1][0], True)
        elif token.type in {"fence", "code_block", "html_block"} and not token.content.startswith("<!--"):
            shows_block = True
            is_gated = any(is_open for _, is_open in gates)
            yield from (Shown(command, is_gated) for command in _commands(token))


def _commands(block: Token) -> Iterator[str]:
    """The commands of a code block, continued lines joined, without prompts."""
    lines = block.content.splitlines()
    is_session = block.info.strip() == "text" and block.content.startswith("$ ")
    command = ""
    for line in [*lines, ""]:
        if is_session and not command and not line.startswith("$ "):
            continue
        command += f" {line.strip().removesuffix(chr(92))}"
        if not line.rstrip().endswith("\\"):
            if command.strip():
                yield " ".join(command.split()).removeprefix("$ ")
            command = ""


def ends_vault(command: str) -> bool:
    """Whether a command would stop Vault or take away what it holds."""
    bare = re.sub(r"#.*", "", command)
    return bool(_ALWAYS.search(bare) or (re.search(_VAULT, bare, re.IGNORECASE) and _ENDING.search(bare)))


def ungated_endings(text: str) -> list[str]:
    """The commands of a document that would end Vault, outside the section that may show them."""
    return [shown.command for shown in shown_commands(text) if not shown.is_gated and ends_vault(shown.command)]
