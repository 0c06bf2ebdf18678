"""The words after `signer`: which verb, with which arguments, or which help; and what is wrong with them.

What verbs there are is in `cli/catalogue.py`. Only the verb that is asked for gets a parser. No printing here.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from signer.cli.catalogue import VERBS, Verb
from signer.errors import SignerError

_WIDTH: Final = 96


class Usage(SignerError):
    """The command line cannot be understood; nothing was done."""

    def __init__(self, text: str, hint: str = "see `signer --help`") -> None:
        super().__init__("usage", text, hint)


@dataclass(frozen=True, slots=True)
class Help:
    """What was asked for is help."""

    text: str


_BY_WORDS: Final = {tuple(verb.words.split()): verb for verb in VERBS}


def read_words(words: Sequence[str]) -> tuple[Verb, argparse.Namespace] | Help:
    """The words after `signer`; raises `Usage`."""
    if not words:
        raise Usage("no verb given", "see `signer --help`, or begin with `signer check`")
    if words[0] == "help":
        words = [*words[1:], "--help"]
    if words[0] in ("-h", "--help"):
        return Help(render_help())
    if words[0] == "--version":
        from signer import __version__

        return Help(f"signer {__version__}")
    if words[0].startswith("-"):
        raise Usage(f"{words[0][:60]} stands before any verb", "write the verb first: `signer VERB --flag`")
    for length in (2, 1):
        verb = _BY_WORDS.get(tuple(words[:length]))
        if verb is not None:
            return _read_arguments(verb, list(words[length:]))
    return _read_group(words)


def _read_group(words: Sequence[str]) -> Help:
    """Help for the first word of several verbs, such as `policy`; raises `Usage` for anything else."""
    first, second = words[0], words[1] if len(words) > 1 else ""
    group = [verb for verb in VERBS if verb.words.split()[0] == first]
    if group and second in ("-h", "--help"):
        rows = "\n".join(f"  {'signer ' + verb.words:<28}{verb.summary}" for verb in group)
        return Help(f"{rows}\n\nEach takes --help.")
    if group and (not second or second.startswith("-")):
        raise Usage(f"{first} needs a second word", f"write one of {', '.join('signer ' + v.words for v in group)}")
    asked = f"{first} {second}" if group else first
    known = [verb.words for verb in VERBS]
    near = difflib.get_close_matches(asked, known, 1) or difflib.get_close_matches(f"{first} {second}", known, 1)
    near = near or [verb.words for verb in VERBS if first in verb.words.split()][:1]
    raise Usage(f"there is no verb {asked[:60]}", f"did you mean `signer {near[0]}`" if near else "see `signer --help`")


def _read_arguments(verb: Verb, words: list[str]) -> tuple[Verb, argparse.Namespace] | Help:
    parser = _parser(verb)
    own = words[: words.index("--")] if "--" in words else words
    if "-h" in own or "--help" in own:
        return Help(parser.format_help().rstrip("\n"))
    flags = [name for argument in verb.arguments for name in argument.names if name.startswith("-")]
    for word in own:
        name = word.split("=", 1)[0]
        if word.startswith("-") and word != "-" and name not in flags and not word[1:].isdecimal():
            near = difflib.get_close_matches(name, flags, 1)
            hint = f"did you mean {near[0]}" if near else f"see `signer {verb.words} --help`"
            raise Usage(f"signer {verb.words} has no flag {name[:60]}", hint)
    arguments, left = parser.parse_known_args(words)
    if left:
        raise Usage(f"{left[0][:60]} is one word too many", f"see `signer {verb.words} --help`")
    return verb, arguments


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaints in our voice."""

    def error(self, message: str) -> NoReturn:
        for pattern, sentence in _SENTENCES:
            message = re.sub(pattern, sentence, message, flags=re.DOTALL)
        raise Usage(message, f"see `{self.prog} --help`")


_SENTENCES: Final = (
    (r"^argument (?:[^ :]+/)?([^ :]+): ", r"\1: "),
    (r": expected one argument$", r" needs a value"),
    (r": ignored explicit argument .*$", r" takes no value"),
    (r"^the following arguments are required: (.*)$", r"missing: \1"),
)


def _parser(verb: Verb) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"signer {verb.words}",
        description=f"{verb.summary[0].upper()}{verb.summary[1:]}\n\n{verb.about}",
        epilog=_epilog(verb),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=_WIDTH),
        allow_abbrev=False,
    )
    for argument in verb.arguments:
        parser.add_argument(*argument.names, **argument.how)
    return parser


def _epilog(verb: Verb) -> str:
    text = "\n".join([f"example{'s' if len(verb.examples) > 1 else ''}:", *(f"  {line}" for line in verb.examples)])
    if verb.lists_settings:
        from signer.settings import SETTINGS

        rows = [f"  {name:<24}{meaning}{f' ({default})' if default else ''}" for name, default, meaning in SETTINGS]
        text += "\n\nsettings, from the environment (default):\n" + "\n".join(rows)
    return text


def render_help() -> str:
    """What `signer --help` says."""
    lines = ["signer: an SSH user-certificate authority for one platform", "", "usage: signer VERB [arguments]"]
    group = ""
    for verb in VERBS:
        if verb.group != group:
            group = verb.group
            lines += ["", f"{group}:"]
        lines.append(f"  {verb.words:<20}{verb.summary}")
    return "\n".join([*lines, "", _CLOSING])


_CLOSING: Final = """\
Every verb takes --help; all but serve and keeper take --json. Settings come from SIGNER_*
environment variables: `signer serve --help` lists them, `signer check` looks at them.

examples:
  signer token new deploy-agent --expires 90d      a credential, and its line for policy.toml
  signer policy explain llmops --as deploy-agent   what it could get, rule by rule
  signer certs list --active                       what is out there now
  signer ledger verify                             nothing was changed since

exit status: 0 done, 1 refused or failed, 2 wrong use, 3 not approved, 4 not the planned world"""
