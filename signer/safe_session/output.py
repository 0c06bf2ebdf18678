"""All output of `safe-session`.

1. Errors and remarks go to stderr; stdout belongs to the command. Only `--help` and `--version` use stdout.
2. `safe-session: error: <lowercase, no full stop>`, then `safe-session: hint: <next action>`.
3. Text from outside (server, arguments, file names) is printed only through `plain`.
"""

from __future__ import annotations

import sys
import time

from signer.errors import SignerError

_LONGEST_LINE = 600


def plain(text: str) -> str:
    """`text` as one printable line, so that a hostile server cannot move the cursor, set the title or fake a line.

    Not `plain` of `signer/units.py`, which each login would have to import.
    """
    shown = "".join(c if c.isprintable() else " " for c in text[: 2 * _LONGEST_LINE])
    return " ".join(shown.split())[:_LONGEST_LINE]


def say(text: str) -> None:
    """Prints one line on stderr; a closed stderr is not an error."""
    try:
        sys.stderr.write(f"safe-session: {plain(text)}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # stderr is the only place to report it


def say_error(error: SignerError) -> None:
    say(f"error: {error.text}")
    if error.hint:
        say(f"hint: {error.hint}")


def say_certificate(role: str, serial: int, lifetime: int) -> None:
    """Prints the line of `-v`; `lifetime` is in seconds."""
    until = time.strftime("%H:%M", time.localtime(time.time() + lifetime))
    span = f"{round(lifetime / 60)} min" if lifetime >= 60 else f"{lifetime} s"
    say(f"{role} for {span} (serial {serial}, until {until}), key only in a private agent")


def show(text: str) -> None:
    """Prints `text` on stdout."""
    sys.stdout.write(text)
    sys.stdout.flush()
