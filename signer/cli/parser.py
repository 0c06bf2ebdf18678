"""The words after `signer`, read by click: the verb and its values, or the help that is asked for. Prints nothing.

This module adds what click lacks: a verb is imported when it is asked for, help has our layout, errors have our voice.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import click

from signer.cli.arguments import JSON, File, NotOneOf, quoted
from signer.cli.catalogue import VERBS, Entry, find, next_words, starting_with
from signer.cli.places import Place
from signer.cli.suggestions import list_verbs, nearest, suggest_verb
from signer.cli.usage import HELP_FLAGS, UsageError, answer, render_group_help, render_help

PROGRAM: Final = "signer"
_WIDTH: Final = 96
_NO_BREAK: Final = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True, slots=True)
class Call:
    """A command line that asks for a verb, with its values."""

    verb: Verb
    context: click.Context

    def run(self) -> int:
        with self.context:
            status: int | None = self.verb.invoke(self.context)
        return status or 0

    @property
    def places(self) -> list[Place]:
        """The files that the command line names, each with its argument or option."""
        found = []
        for param in self.verb.params:
            if isinstance(param.type, File):
                value = self.context.params.get(param.name or "")
                values = value if isinstance(value, tuple) else (value,)
                found += [Place(str(path), _name(param)) for path in values if path is not None]
        return found

    @property
    def wants_json(self) -> bool:
        return bool(self.context.params.get("as_json"))


# --- verbs ------------------------------------------------------------------------------------------------------


class Verb(click.Command):
    """One verb of `signer`. The docstring of its function is its help; its short help is in the table of verbs."""

    def __init__(
        self,
        *values: Any,
        words: str,
        examples: Sequence[str],
        is_service: bool = False,
        lists_settings: bool = False,
        **attributes: Any,
    ) -> None:
        super().__init__(*values, **attributes)
        # `parse_args` reports unknown flags and extra arguments in our words; `-1` is a value.
        self.context_settings = {
            "help_option_names": HELP_FLAGS,
            "allow_extra_args": True,
            "ignore_unknown_options": True,
        }
        if not is_service:
            self.params.append(JSON)
        self.words = words
        self.examples = tuple(examples)
        self.is_service = is_service
        self.lists_settings = lists_settings

    @property
    def flags(self) -> dict[str, click.Option]:
        """The options by each of their names, without `--help`."""
        return {name: param for param in self.params if isinstance(param, click.Option) for name in param.opts}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Reads the words into `ctx.params`; raises `UsageError`."""
        if ctx.resilient_parsing:  # completion of a line that is not finished
            return super().parse_args(ctx, args)
        self._check_flags(_before_dashes(args))
        try:
            left = super().parse_args(ctx, args)
        except click.UsageError as error:
            near = nearest(error.word, error.known) if isinstance(error, NotOneOf) else None
            raise self._usage_error(_sentence(self, ctx, error), near) from None
        if left:
            raise self._usage_error(f"unexpected argument {quoted(left[0], 60)}")
        return left

    def _usage_error(self, text: str, meant: str | None = None) -> UsageError:
        return UsageError(text, f"did you mean {meant}" if meant else f"see `signer {self.words} --help`")

    def _check_flags(self, words: Sequence[str]) -> None:
        """Every word that looks like a flag must be one, and a flag is never the value of another one."""
        flags = self.flags
        for place, word in enumerate(words):
            if not _looks_like_flag(word):
                continue
            name = word.split("=", 1)[0]
            if name not in flags:
                raise self._usage_error(f"signer {self.words} has no flag {name[:60]}", nearest(name, self.flags))
            following = words[place + 1] if place + 1 < len(words) else None
            lacks_value = "=" not in word and (following is None or following.split("=", 1)[0] in flags)
            if lacks_value and not flags[name].is_flag:
                raise self._usage_error(f"{name} needs a value")

    def render_help(self) -> str:
        summary = next(entry.summary for entry in VERBS if entry.words == self.words)
        formatter = click.HelpFormatter(width=_WIDTH)
        formatter.write(f"{self._render_usage()}\n\n{summary[0].upper()}{summary[1:]}\n\n{self.text}\n")
        arguments, options = self.help_rows()
        for title, rows in (("arguments", arguments), ("options", options)):
            if rows:
                formatter.write(f"\n{title}:\n")
                formatter.indent()
                formatter.write_dl(rows)
                formatter.dedent()
        formatter.write(f"\nexample{'s' if len(self.examples) > 1 else ''}:\n")
        formatter.write("".join(f"  {line}\n" for line in self.examples))
        if self.lists_settings:
            formatter.write(_render_settings())
        return formatter.getvalue().rstrip("\n")

    @property
    def text(self) -> str:
        """The paragraphs of the help: the docstring of the verb's function."""
        return inspect.cleandoc(self.help or "")

    def help_rows(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """(name, help) of each argument, and (flags with their value, help) of each option that is not hidden."""
        arguments = [(_name(param), param.help or "") for param in self.params if isinstance(param, click.Argument)]
        options = [
            (f"{', '.join(param.opts)}{_value(param)}", param.help or "")
            for param in self.params
            if isinstance(param, click.Option) and not param.hidden
        ]
        return arguments, [(", ".join(HELP_FLAGS), "show this help and exit"), *options]

    def _render_usage(self) -> str:
        """`usage: signer VERB`, each option, each argument; optional ones in brackets. A line breaks between them."""
        pieces = ["[-h]"]
        for kind in (click.Option, click.Argument):
            for param in self.params:
                if isinstance(param, kind) and not getattr(param, "hidden", False):
                    piece = f"{_name(param)}{_value(param)}".replace(" ", _NO_BREAK)
                    pieces.append(piece if param.required else f"[{piece}]")
        start = f"usage: {PROGRAM} {self.words} "
        lines = textwrap.wrap(" ".join(pieces), _WIDTH - len(start), break_on_hyphens=False)
        return (start + f"\n{' ' * len(start)}".join(lines)).replace(_NO_BREAK, " ")


def verb(words: str, *examples: str, **attributes: Any) -> Callable[[Callable[..., int | None]], Verb]:
    """The decorator of a verb's function, above the `click.option` and `click.argument` that it takes.

    All verbs but services also take `--json`, as `as_json`. The function returns the exit status; None is 0.
    """
    return click.command(words.rsplit(maxsplit=1)[-1], cls=Verb, words=words, examples=examples, **attributes)


def load(entry: Entry) -> Verb:
    found: Verb = getattr(importlib.import_module(f"signer.cli.{entry.module}"), entry.function)
    return found


def load_all() -> Iterator[tuple[Entry, Verb]]:
    """Every verb in the order of the table, for documents that are made from it: `Entry.words`, `.section` and
    `.summary`; `Verb.text`, `.examples`, `.help_rows()` and `.render_help()`."""
    return ((entry, load(entry)) for entry in VERBS)


def _name(param: click.Parameter) -> str:
    return param.human_readable_name if isinstance(param, click.Argument) else param.opts[-1]


def _value(param: click.Parameter) -> str:
    """What stands after the name of an option that takes a value: a blank and the value's name."""
    if not isinstance(param, click.Option) or param.is_flag:
        return ""
    return f" {param.metavar or '|'.join(map(str, getattr(param.type, 'choices', ())))}"


def _sentence(verb: Verb, ctx: click.Context, error: click.UsageError) -> str:
    if isinstance(error, click.MissingParameter):  # click has read all values that are given by now
        return f"missing: {', '.join(_name(one) for one in verb.params if one.required and one.name not in ctx.params)}"
    if isinstance(error, click.BadParameter) and error.param is not None:
        return f"{_name(error.param)}: {error.message}"
    if isinstance(error, click.BadOptionUsage):  # `_check_flags` has found the ones without a value
        return f"{error.option_name} takes no value"
    return error.format_message()


def _looks_like_flag(word: str) -> bool:
    return word.startswith("-") and word != "-" and not word[1:].isdecimal()


def _before_dashes(words: Sequence[str]) -> Sequence[str]:
    return words[: words.index("--")] if "--" in words else words


def _render_settings() -> str:
    from signer.settings import SETTINGS

    rows = (f"  {name:<28}{meaning}{f' ({default})' if default else ''}\n" for name, default, meaning in SETTINGS)
    return "\nsettings, from the environment (default):\n" + "".join(rows)


# --- groups -----------------------------------------------------------------------------------------------------


class Group(click.Group):
    """The verbs that begin with the same words; `Group(())` is `signer` itself. A verb is imported when needed."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__(
            words[-1] if words else PROGRAM, no_args_is_help=False, context_settings={"help_option_names": HELP_FLAGS}
        )
        self.words = tuple(words)

    def get_command(self, ctx: click.Context, cmd_name: str) -> Verb | Group | None:
        words = (*self.words, cmd_name)
        entry = find(words)
        if entry is not None:
            return load(entry)
        return Group(words) if starting_with(words) else None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """As click does it, from the table instead of every verb's module."""
        from click.shell_completion import CompletionItem

        items = [CompletionItem(name, help=text) for name, text in next_words(self.words).items()]
        found = [item for item in items if item.value.startswith(incomplete)]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def get_help(self, ctx: click.Context) -> str:
        return render_group_help(self.words) if self.words else render_help()


ROOT: Final = Group(())


def read_words(words: Sequence[str]) -> Call | str:
    """Reads the words after `signer`; a line that asks for help becomes that help. Raises `UsageError`."""
    if not words:
        raise UsageError("no verb given", "see `signer --help`, or begin with `signer check`")
    if (text := answer(words)) is not None:
        return text
    if words[0] == "help":
        words = [*words[1:], "--help"]
    context, left = ROOT.make_context(PROGRAM, []), list(words)
    group = ROOT
    while True:
        name = left[0] if left else ""
        if name in HELP_FLAGS:
            return group.get_help(context)
        command = group.get_command(context, name)
        if command is None:
            raise _no_such_verb(group.words, left)
        left = left[1:]
        if isinstance(command, Verb):
            break
        group, context = command, command.make_context(name, [], parent=context)
    if not set(HELP_FLAGS).isdisjoint(_before_dashes(left)):
        return command.render_help()
    return Call(command, command.make_context(name, left, parent=context))


def _no_such_verb(group: Sequence[str], left: Sequence[str]) -> UsageError:
    """The error for words that are not a verb: `group` is what is known of them, `left` the rest."""
    name = left[0] if left else ""
    if not group and name.startswith("-"):
        return UsageError(f"unexpected option {quoted(name, 60)}", "options go after the verb: `signer VERB --flag`")
    if group and (not name or name.startswith("-")):
        return UsageError(f"{' '.join(group)} needs a second word", f"write {list_verbs(group)}")
    asked = [*group, *left[: 2 - len(group)]]
    meant, verbs = suggest_verb(asked), list_verbs(asked)
    hint = f"did you mean `signer {meant}`" if meant else f"write {verbs}" if verbs else "see `signer --help`"
    return UsageError(f"there is no verb {quoted(' '.join([*group, name]), 60)}", hint)
