"""The `signer` command: finds the verb, runs it, turns what it raises into words and an exit status.

Exit status: 0 done, 1 refused or failed, 2 wrong use, 3 not approved, 4 the world is not the planned one, 130
interrupted, 141 when nobody reads the result any more. What verbs there are is in `cli/catalogue.py`, what they do in
`verbs_*.py`, all printing in `printing.py`. Heavy modules are imported by the verb that needs them.
"""

from __future__ import annotations

import importlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from signer.cli import output as printing
from signer.cli.catalogue import VERBS, Verb
from signer.cli.parser import Help, Usage, read_words
from signer.errors import ApprovalRefused, Drift, SignerError

if TYPE_CHECKING:
    from signer.settings import Settings

__all__ = ["VERBS", "main"]

DONE, FAILED, WRONG_USE, NOT_APPROVED, DRIFTED, INTERRUPTED, UNREAD = 0, 1, 2, 3, 4, 130, 141
_Run = Callable[[Namespace, Callable[[], "Settings"]], int]
_STATUS: Final[dict[type[SignerError], int]] = {ApprovalRefused: NOT_APPROVED, Drift: DRIFTED, Usage: WRONG_USE}
_SERVICES: Final = ("serve", "keeper")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    printing.prepare()
    try:
        status = _run(words)
        printing.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        printing.abandon_stdout()
        return UNREAD
    except SignerError as error:
        printing.say_error(error)
        return _STATUS.get(type(error), FAILED)
    return status


def _run(words: list[str]) -> int:
    try:
        asked = read_words(words)
    except Usage as error:
        printing.say_error(error)
        return WRONG_USE
    if isinstance(asked, Help):
        printing.show(asked.text)
        return DONE
    verb, arguments = asked
    if verb.words in _SERVICES:
        return _serve(verb, arguments)
    run: _Run = getattr(importlib.import_module(f"signer.cli.{verb.module}"), verb.function)
    try:
        return run(arguments, _settings)
    except SignerError as error:
        if arguments.json:
            printing.show_error_json(error)
        raise
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        fault = SignerError("io_failed", error.strerror or "input or output failed")
    except Exception as error:  # noqa: BLE001 - a person at a terminal gets a sentence and the place, no stack
        text = f"a fault of ours, {type(error).__name__} in {_place(error)}"
        fault = SignerError("fault_of_ours", text, "report this line with the command that led to it")
    if arguments.json:
        printing.show_error_json(fault)
    printing.say_error(fault)
    return FAILED


def _place(error: Exception) -> str:
    import traceback

    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{os.path.basename(last.filename)}:{last.lineno}"  # noqa: PTH119 - pathlib costs start-up time


def _settings() -> Settings:
    """The settings of this environment; what is no setting is warned about. Raises `BadSettings`."""
    from signer.settings import load_settings

    settings = load_settings(os.environ)
    for warning in settings.warnings:
        printing.warn(warning)
    return settings


def _serve(verb: Verb, arguments: Namespace) -> int:
    """The two verbs that stay: their log is on stderr, and a fault of ours leaves its stack there."""
    import logging

    from signer.settings import load_settings

    logging.basicConfig(level=logging.WARNING, format="signer: %(message)s", stream=sys.stderr)
    settings = load_settings(os.environ)
    if verb.words == "keeper":
        from signer.service.startup import run_keeper

        run_keeper(settings, arguments.key_channel)
    else:
        from signer.service.launcher import run_service

        run_service(settings)
    return DONE
