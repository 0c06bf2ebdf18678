"""What a document in Markdown shows to be typed: its commands, and which of them would end Vault.

Read from the text alone; nothing is looked up and nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

# The phrase without which nobody removes Vault; it opens the one section that may show how.
GATE: Final = "m04-vault-destructive-cleanup-approved"

_VAULT: Final = r"(?<![A-Za-z0-9])(?:vault|openbao|bao)(?![A-Za-z0-9])"
# How a service, its data or what it knows is ended, in the command lines of engines, systems and Vault itself.
_ENDING: Final = re.compile(
    r"\b(?:stop|kill|pkill|killall|rm|rmi|rmdir|unlink|shred|truncate|down|disable|mask|delete|destroy|purge|remove"
    r"|uninstall|prune|seal|step-down|revoke\w*|wipe\w*|umount|drop|autoremove|--remove-orphans|scale\s+\S+=0|mkfs\S*"
    r"|dd)\b|-X\s*DELETE"
)
# These end Vault's key or role whether or not they name Vault.
_ALWAYS: Final = re.compile(
    rf"{_VAULT}\s+(?:secrets\s+disable|operator\s+seal|delete|token\s+revoke|lease\s+revoke|kv\s+destroy)"
)


def shown_commands(text: str) -> Iterator[tuple[bool, str]]:
    """Each command that a runbook shows, and whether the section that holds it is gated.

    A section is gated when its heading's own text, or that of a section around it, names the phrase before the first
    command. Commands are the lines of code blocks, fenced or indented, and what stands in backquotes. In a block of
    `text` that begins with a prompt, `$ `, those after a prompt are: the others are what was printed.
    """
    gates: list[tuple[int, bool]] = []
    fence, command = "", ""
    is_session: bool | None = None  # of the block; None before its first line
    shown_here = False
    for line in text.splitlines():
        mark = re.match(r"\s*(```+|~~~+)", line)
        if mark and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else mark[1]
            is_session = None if line.strip() == f"{fence}text" else False
            continue
        heading = re.match(r"(#+) ", line)
        if heading and not fence:
            level = len(heading[1])
            gates = [gate for gate in gates if gate[0] < level]
            gates.append((level, GATE in line))
            shown_here = False
            continue
        if fence and is_session is None:
            is_session = line.startswith("$ ")
        if fence and is_session and not command and not line.startswith("$ "):
            continue
        if fence or re.match(r"(?: {4}|\t)", line):
            command += line.strip().removesuffix("\\") + " "
            if line.rstrip().endswith("\\"):
                continue
            yield any(is_open for _, is_open in gates), " ".join(command.split())
            command, shown_here = "", True
            continue
        for inline in re.findall(r"`([^`]+)`", line):
            if inline != GATE:
                yield any(is_open for _, is_open in gates), inline
        if GATE in line and gates and not shown_here:
            gates[-1] = (gates[-1][0], True)


def ends_vault(command: str) -> bool:
    """Whether a command would stop Vault or take away what it holds."""
    bare = re.sub(r"#.*", "", command)
    return bool(_ALWAYS.search(bare) or (re.search(_VAULT, bare, re.IGNORECASE) and _ENDING.search(bare)))


def ungated_endings(text: str) -> list[str]:
    """The commands of a runbook that would end Vault, outside the section that may show them."""
    return [command for is_gated, command in shown_commands(text) if not is_gated and ends_vault(command)]
