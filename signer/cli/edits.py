"""The edit of policy.toml that a command makes: shown as a diff, and made in the file with `--write`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from signer.cli import output
from signer.cli.arguments import FILE, read_settings
from signer.errors import BadFile
from signer.units import plain

if TYPE_CHECKING:
    from signer.policy.decide import Policy

TAKE_IT: Final = "the service takes it with `signer reload`"
file_option: Final = click.option("--file", type=FILE, metavar="FILE", help="default: SIGNER_POLICY_FILE")
write_option: Final = click.option("--write", is_flag=True, help="make the edit in the file, which is else only shown")


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """A valid policy.toml: its path, its bytes, and what they say."""

    path: Path
    raw: bytes
    policy: Policy


@dataclass(frozen=True, slots=True)
class Edit:
    """An edit that leaves a valid file: the file, the new bytes, and the lines of the difference."""

    file: PolicyFile
    after: bytes
    difference: list[str]
    is_written: bool

    def facts(self) -> dict[str, object]:
        """The edit as JSON shows it."""
        return {"file": str(self.file.path), "written": self.is_written, "edit": self.difference}

    def show(self) -> None:
        """The lines on stdout, and on stderr what comes next."""
        for line in self.difference:
            output.show_exactly(plain(line))
        self.show_next()

    def show_next(self) -> None:
        """On stderr, whether the file was written and what comes next."""
        if self.is_written:
            output.note(f"{self.file.path} is written; {TAKE_IT}")
        else:
            output.note("nothing is written: repeat it with --write, or make this edit where the file is kept")


def read_policy_file(file: Path | None) -> PolicyFile:
    """The file of `--file`, otherwise of SIGNER_POLICY_FILE; raises `BadFile`."""
    from signer.policy.file import parse_policy
    from signer.policy.reading import POLICY_SETTING, read_policy

    path = file or read_settings().policy_file
    raw = read_policy(path, "--file" if file else POLICY_SETTING)
    return PolicyFile(path, raw, parse_policy(raw, path.name))


def make_edit(file: PolicyFile, change: Callable[[str], str], *, write: bool) -> Edit:
    """Applies a change of the text, checks the result as the keeper would, and writes it if asked; raises `BadFile`."""
    from signer.policy.edit import decode_policy, encode_policy, render_difference, write_policy
    from signer.policy.file import parse_policy

    before = decode_policy(file.raw)
    text = change(before)
    after = encode_policy(text, file.raw)
    try:
        parse_policy(after, file.path.name)
    except BadFile as error:
        problems = f"with this edit {error.text}"
        raise BadFile(error.code, problems, "nothing is written: correct the command", error.problems) from None
    if write:
        write_policy(file.path, file.raw, after)
    return Edit(file, after, render_difference(before, text, file.path.name), is_written=write)


def finish(edit: Edit, facts: Mapping[str, object], *, as_json: bool) -> int:
    """Shows an edit with the facts of its command; returns the exit status."""
    if as_json:
        output.show_json({**facts, **edit.facts()})
    else:
        edit.show()
    return 0
