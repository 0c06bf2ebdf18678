"""`signer` as a whole: its help, made from the table of verbs, and the error of a command line that is not valid.

Imports no click, which takes longer to import than all that `signer --help` needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from signer.cli.catalogue import GROUPS, VERBS, starting_with
from signer.errors import SignerError

HELP_FLAGS: Final = ("-h", "--help")
COMPLETION_VARIABLE: Final = "_SIGNER_COMPLETE"  # set by a completion script that asks `signer` for completions


class UsageError(SignerError):
    """The command line is not valid; nothing was done."""

    def __init__(self, text: str, hint: str = "see `signer --help`") -> None:
        super().__init__("usage", text, hint)


def answer(words: Sequence[str]) -> str | None:
    """What `signer --help`, `signer help` and `signer --version` print; None for every other command line."""
    if words and words[0] == "--version":
        from signer import __version__

        return f"signer {__version__}"
    return render_help() if words and (words[0] in HELP_FLAGS or list(words) == ["help"]) else None


def render_help() -> str:
    lines = ["signer: an SSH user-certificate authority for one platform", "", "usage: signer VERB [arguments]"]
    section = ""
    for entry in VERBS:
        if entry.section != section:
            section = entry.section
            lines += ["", f"{section}:"]
        lines.append(f"  {entry.words:<21}{entry.summary}")
    return "\n".join([*lines, "", _CLOSING])


def render_group_help(words: Sequence[str]) -> str:
    group = " ".join(words)
    rows = "\n".join(f"  {f'signer {entry.words}':<29}{entry.summary}" for entry in starting_with(words))
    return f"signer {group}: {GROUPS[group]}\n\nusage: signer {group} VERB [arguments]\n\n{rows}\n\nEach takes --help."


_CLOSING: Final = """\
Every verb takes --help; all but serve, api and keeper take --json. Settings come from SIGNER_*
environment variables: `signer serve --help` lists them, `signer check` checks them.

examples:
  signer token new deploy-agent --expires 90d      a token, and its line for policy.toml
  signer policy explain llmops --as deploy-agent   what it would get, rule by rule
  signer certs list --active                       certificates that are valid now
  signer ledger verify                             proof that no record was changed

exit status: 0 done, 1 refused or failed, 2 usage error, 3 not approved, 4 state has changed
since the plan"""
