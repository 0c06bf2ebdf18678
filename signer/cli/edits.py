"""The edit of policy.toml that a command makes: shown as a diff, and made in the file with `--write`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from signer.cli import output
from signer.cli.arguments import FILE, read_settings
from signer.errors import BadFile

if TYPE_CHECKING:
    from signer.policy.decide import Policy

TAKE_IT: Final = "the service takes it with `signer reload`"
file_option: Final = click.option("--file", type=FILE, metavar="FILE", help="default: SIGNER_POLICY_FILE")
write_option: Final = click.option("--write", is_flag=True, help="make the edit in the file, which is else only shown")


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """A valid policy.toml: its path, its bytes, and what they say; an edit of it is written if `writes`."""

    path: Path
    raw: bytes
    policy: Policy
    writes: bool = False

    def edit(self, change: Callable[[str], str]) -> Edit:
        """Applies a change of the text, checks the result as the keeper would, and writes it if asked; raises
        `BadFile`."""
        from signer.policy.edit import decode_policy, encode_policy, render_difference, write_policy
        from signer.policy.file import parse_policy

        before = decode_policy(self.raw)
        text = change(before)
        after = encode_policy(text, self.raw)
        try:
            parse_policy(after, self.path.name)
        except BadFile as error:
            problems = f"with this edit {error.text}"
            raise BadFile(error.code, problems, "nothing is written: correct the command", error.problems) from None
        if self.writes:
            write_policy(self.path, self.raw, after)
        return Edit(self, after, render_difference(before, text, self.path.name))


@dataclass(frozen=True, slots=True)
class Edit:
    """An edit that leaves a valid file: the file, the new bytes, and the lines of the difference."""

    file: PolicyFile
    after: bytes
    difference: list[str]

    def facts(self) -> dict[str, object]:
        return {"file": str(self.file.path), "written": self.file.writes, "edit": self.difference}

    def show(self, facts: Mapping[str, object], *, as_json: bool) -> None:
        """The lines on stdout, and on stderr what comes next; or the edit with the facts of its command as JSON."""
        output.show_result({**facts, **self.facts()}, *self.difference, as_json=as_json, exactly=True)
        if not as_json:
            self.show_next()

    def show_next(self) -> None:
        """On stderr, whether the file was written and what comes next."""
        if self.file.writes:
            output.note(f"{self.file.path} is written; {TAKE_IT}")
        else:
            output.note("nothing is written: repeat it with --write, or make this edit where the file is kept")


def read_policy_file(file: Path | None, *, writes: bool = False) -> PolicyFile:
    """The file of `--file`, otherwise of SIGNER_POLICY_FILE; raises `BadFile`."""
    from signer.policy.file import parse_policy
    from signer.policy.reading import POLICY_SETTING, read_policy

    path = file or read_settings().policy_file
    raw = read_policy(path, "--file" if file else POLICY_SETTING)
    return PolicyFile(path, raw, parse_policy(raw, path.name), writes)


def edit_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds `--file` and `--write`, as the value `found`: the file to edit."""

    @wraps(function)
    def call(*, file: Path | None, write: bool, **values: Any) -> None:
        function(found=read_policy_file(file, writes=write), **values)

    return file_option(write_option(call))
