"""`signer completion`: the script that teaches a shell the verbs, flags and values of `signer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from signer.cli import output
from signer.cli.arguments import OneOf
from signer.cli.parser import PROGRAM, ROOT, verb
from signer.cli.usage import COMPLETION_VARIABLE, UsageError

if TYPE_CHECKING:
    from click.shell_completion import ShellComplete

SHELLS: Final = ("bash", "zsh", "fish")


@verb(
    "completion",
    "source <(signer completion bash)",
    "signer completion zsh > ~/.zfunc/_signer",
    "signer completion fish > ~/.config/fish/completions/signer.fish",
)
@click.argument("shell", type=OneOf(SHELLS), metavar="SHELL", help="bash, zsh or fish")
def completion(shell: str, as_json: bool) -> None:
    """Load the script in the shell's start-up file. For zsh, the directory of the file must be in `fpath` before
    `compinit` runs."""
    script = _side_of(shell).source()
    output.show_result(
        {"shell": shell, "script": script}, *script.rstrip("\n").split("\n"), as_json=as_json, exactly=True
    )


def complete(instruction: str) -> int:
    """Prints the completions that a script asks for with `SHELL_complete`; returns the exit status."""
    shell = instruction.removesuffix("_complete")
    try:
        answer = _side_of(shell).complete()
    except (KeyError, ValueError):  # not one of our shells, or its COMP_WORDS and COMP_CWORD are missing or not valid
        raise UsageError(f"{COMPLETION_VARIABLE} is for the completion script only", "unset it") from None
    output.show_exactly(answer)
    return 0


def _side_of(shell: str) -> ShellComplete:
    from click.shell_completion import BashComplete, FishComplete, ZshComplete

    classes = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}
    return classes[shell](ROOT, {}, PROGRAM, COMPLETION_VARIABLE)
