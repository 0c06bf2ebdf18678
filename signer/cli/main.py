"""The `signer` command: finds the verb, runs it, and turns what it raises into words and an exit status.

Exit status: 0 done, 1 refused or failed, 2 usage error, 3 not approved, 4 state has changed since the plan, 130
interrupted, 141 when nothing reads the output any more. The verbs are in `catalogue.py`, all printing in `output.py`.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import Final

from signer.cli import output
from signer.cli.usage import COMPLETION_VARIABLE, UsageError, answer
from signer.errors import ApprovalRefused, Drift, SignerError

DONE, FAILED, WRONG_USE, NOT_APPROVED, DRIFTED, INTERRUPTED, UNREAD = 0, 1, 2, 3, 4, 130, 141
_STATUS: Final[dict[type[SignerError], int]] = {
    ApprovalRefused: NOT_APPROVED,
    Drift: DRIFTED,
    UsageError: WRONG_USE,
}
# New objects before Python looks for unused cycles. Nearly all that a start makes stays: with the default of 700,
# looking through it again and again takes 15 % of the time.
_COLLECT_AFTER: Final = 50_000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    gc.set_threshold(_COLLECT_AFTER)
    output.prepare()
    try:
        status = _run(words)
        output.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        output.abandon_stdout()
        return UNREAD
    except SignerError as error:
        output.report_error(error)
        return _STATUS.get(type(error), FAILED)
    return status


def _run(words: Sequence[str]) -> int:
    if instruction := os.environ.get(COMPLETION_VARIABLE):
        from signer.cli.completion import complete

        return complete(instruction)
    if (text := answer(words)) is not None:
        output.show_help(text)
        return DONE
    from signer.cli.parser import read_words

    asked = read_words(words)
    if isinstance(asked, str):
        output.show_help(asked)
        return DONE
    try:
        return asked.run()
    except BrokenPipeError:
        raise
    except Exception as error:  # an operator at a terminal gets a sentence and the place, no stack
        if asked.verb.is_service and not isinstance(error, SignerError):
            raise  # an internal error leaves its stack in the log
        fault = _as_signer_error(error)
    from signer.cli.places import name_places

    name_places(fault, asked.places, os.environ)
    if asked.wants_json:
        output.show_error_json(fault)
    raise fault


def _as_signer_error(error: Exception) -> SignerError:
    if isinstance(error, SignerError):
        return error
    if isinstance(error, OSError):
        return _as_file_error(error)
    text = f"internal error, {type(error).__name__} in {_place(error)}"
    return SignerError("fault_of_ours", text, "report this line with the command that led to it")


def _as_file_error(error: OSError) -> SignerError:
    """Names the file, and whose it is if this user may not use it."""
    reason = error.strerror or "input or output failed"
    if not isinstance(error.filename, str | bytes):
        return SignerError("io_failed", reason)
    name = os.fsdecode(error.filename)
    if not isinstance(error, PermissionError):
        return SignerError("io_failed", f"{name}: {reason}", "check the path, and the option or setting that names it")
    from pathlib import Path

    from signer.files import belongs_to

    hint = "run it as that user or as root, or name another file"
    return SignerError("io_failed", f"{name}: {reason}; {belongs_to(Path(name))}", hint)


def _place(error: Exception) -> str:
    import traceback

    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{os.path.basename(last.filename)}:{last.lineno}"  # noqa: PTH119 - pathlib costs start-up time
