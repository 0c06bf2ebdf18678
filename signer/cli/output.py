"""All printing of the `signer` command, and the rules for it; `safe-session` has its own in `safe_session/output.py`.

1. Results go to stdout, everything else to stderr. With `--json` stdout holds one JSON value (`export`: one a line).
2. `signer: error: <lowercase, no full stop>`, then `signer: hint: <next action>`; `signer: warning:` likewise.
3. Nothing from a file, the ledger or an argument is shown before `plain` has been over it; JSON is ASCII.
4. On a terminal, sentences and tables take its width, 100 columns at most; `show_exactly` is for what people copy.
   Elsewhere a row is a line, whatever its length, so that programs can read it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, TextIO

from signer.errors import ApprovalRefused, BadFile, SignerError, Unavailable, write_hint
from signer.safe_session import terminal
from signer.units import plain

_BAR: Final = 24  # characters
_REDRAW: Final = 0.1  # seconds
_SAID: Final = 20  # lines of what a failed command printed


def prepare() -> None:
    """A character that the terminal's encoding lacks is shown as an escape instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a closed stream is None
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def width_of(stream: TextIO | None) -> int | None:
    """The columns to use of the terminal that shows `sys.stdout` or `sys.stderr`; None if none does."""
    try:
        return None if stream is None else terminal.width_of(stream.fileno())
    except (OSError, ValueError):  # closed, or no file
        return None


def show(line: str = "") -> None:
    """One line of the result on stdout, or several that fit a terminal; its variable parts must have been through
    `plain`."""
    width = width_of(sys.stdout)
    for part in [line] if width is None else terminal.wrap(line, width):
        show_exactly(part)


def show_command(line: str) -> None:
    """A command line that people paste into a shell, on stdout."""
    width = width_of(sys.stdout)
    for part in [line] if width is None else terminal.wrap_command(line, width):
        show_exactly(part)


def show_help(text: str) -> None:
    """A text of several lines, laid out for the terminal or for 100 columns, on stdout."""
    show_exactly(terminal.fit(text, width_of(sys.stdout) or terminal.MAX_WIDTH))


def show_exactly(text: str) -> None:
    """What people and programs copy: a key, a digest, lines of a file, JSON. Its lines are never broken."""
    try:
        print(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _output_failed(error) from None


def show_json(value: object, *, on_one_line: bool = False) -> None:
    show_exactly(json.dumps(value, indent=None if on_one_line else 2))


def show_table(rows: Iterable[Sequence[object]], indent: str = "") -> None:
    """Rows of text in columns as wide as their widest cell; the last column ends where its text does. A first row in
    capitals has the titles. A row that is wider than the terminal takes several lines."""
    cells = [[plain(cell) for cell in row] for row in rows]
    titled = bool(cells) and all(cell.isupper() for cell in cells[0])
    for line in terminal.lay_out(cells, width_of(sys.stdout), indent, titled=titled):
        show_exactly(line)


def show_fields(facts: Mapping[str, object], indent: str = "") -> None:
    """Each value beside its name."""
    show_table([(name.replace("_", " "), readable(value)) for name, value in facts.items()], indent)


def readable(value: object) -> str:
    """A value of JSON as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        value = [f"{key} = {text}" for key, text in value.items()]
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value) or '""'


def show_result(facts: object, *lines: str, as_json: bool, exactly: bool = False) -> None:
    """The result of a verb: `facts` as JSON, or the lines, which go through `plain`; `exactly` if people copy them."""
    if as_json:
        show_json(facts)
        return
    for line in lines:
        (show_exactly if exactly else show)(plain(line))


def show_rows(
    facts: object, titles: Sequence[str], rows: Iterable[Sequence[object]], nothing: str, *, as_json: bool
) -> None:
    """A list: `facts` as JSON, or a table of `rows` below `titles`, or the note `nothing` if there are none."""
    if as_json:
        show_json(facts)
    elif cells := list(rows):
        show_table([titles, *cells])
    else:
        note(nothing)


def show_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """RFC 4180, with a line of titles. A cell that a spreadsheet would compute begins with an apostrophe: what callers
    wrote is in them."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = [_csv_cell(row.get(name)) for name in columns]
        writer.writerow([f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell for cell in cells])
    show_exactly(text.getvalue().rstrip("\n"))


def _csv_cell(value: object) -> str:
    if value is None:
        return ""
    return plain(",".join(map(str, value)) if isinstance(value, list) else str(value))


def flush() -> None:
    """Everything shown has reached its reader; raises `Unavailable` or `BrokenPipeError`."""
    try:
        if sys.stdout is not None:  # it is None when started with stdout closed
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        abandon_stdout()
        raise _output_failed(error) from None


def abandon_stdout() -> None:
    """Nothing reads stdout any more: discards what Python still buffers for it, so that the exit is quiet."""
    with suppress(OSError, ValueError):  # a stdout without descriptor has nothing that could complain
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _output_failed(error: OSError) -> Unavailable:
    hint = write_hint(error, "the output")
    return Unavailable("output_failed", f"the result cannot be written: {error.strerror}", hint)


def note(text: str) -> None:
    """One line on stderr; a stderr that nothing reads is not an error."""
    note_bare(f"signer: {text}")


def note_bare(text: str) -> None:
    """A line on stderr without `signer:`, which belongs to the line before it."""
    width = width_of(sys.stderr)
    line = plain(text)
    with suppress(OSError, ValueError):
        for part in [line] if width is None else terminal.wrap(line, width):
            print(part, file=sys.stderr, flush=True)


def note_exactly(text: str) -> None:
    """A line on stderr that people copy; it is never broken."""
    with suppress(OSError, ValueError):
        print(plain(text), file=sys.stderr, flush=True)


def ask(question: str, default: str) -> str:
    """The answer that a person types on the terminal, or `default` for an empty line or no more input."""
    line = f"{plain(question)} [{plain(default)}]:"
    width = width_of(sys.stderr)
    shown = line if width is None else "\n".join(terminal.wrap(line, width - 1))
    with suppress(OSError, ValueError):
        print(shown, end=" ", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() or default


def require_yes(question: str, refused: str, unasked: str, hint: str = "", *, can_ask: bool = True) -> None:
    """Raises `ApprovalRefused` with the text `refused` unless a person at the terminal answers `yes`.

    `unasked` is the hint where no terminal can be asked at, `hint` that after another answer. `can_ask` is false where
    stdin is read for something else.
    """
    if not (can_ask and sys.stdin is not None and sys.stdin.isatty()):
        raise ApprovalRefused("not_approved", f"{refused}: there is no terminal to ask at", unasked)
    if ask(question, "no") != "yes":
        raise ApprovalRefused("not_approved", refused, hint)


def note_over(text: str) -> None:
    """A line on a terminal's stderr that the next one overwrites; an empty one removes it."""
    width = width_of(sys.stderr)
    line = plain(text) if width is None else plain(text)[: width - 1]  # what it broke in two it could not take back
    with suppress(OSError, ValueError):
        print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    note(f"warning: {text}")


def report_error(error: SignerError) -> None:
    """The error, its problems if it lists any, the end of what a failed command printed, and the hint."""
    note(f"error: {error.text}")
    if isinstance(said := error.facts.get("said"), str):
        for line in said.splitlines()[-_SAID:]:
            note_bare(f"  {line}")
    if isinstance(error, BadFile):
        for problem in error.problems:
            note_bare(f"  {problem}")
    if error.hint:
        note(f"hint: {error.hint}")


def show_error_json(error: SignerError, *, on_one_line: bool = False) -> None:
    """The same facts on stdout, for a caller that asked for JSON."""
    show_json({"error": error_facts(error)}, on_one_line=on_one_line)


def error_facts(error: SignerError) -> dict[str, object]:
    return {**error.facts, **error.as_json()}


def count(number: int, one: str, many: str = "") -> str:
    """`1 event`, `4,711 events`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


class Progress:
    """A bar on stderr while something long runs, if stderr is a terminal. Use as a context manager; call it with
    (done, all). `hidden` where the result itself scrolls over the same terminal."""

    def __init__(self, what: str, *, hidden: bool = False) -> None:
        self._what = what
        self._drawn = not hidden and sys.stderr is not None and sys.stderr.isatty()
        self._started = time.monotonic()
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        if not self._drawn:
            return
        now = time.monotonic()
        if now - self._last < _REDRAW and done < total:
            return
        self._last = now
        share = min(done / total, 1.0) if total else 1.0
        bar = ("#" * round(share * _BAR)).ljust(_BAR, "-")
        rate = done / max(now - self._started, 0.001)
        note_over(f"{self._what} [{bar}] {share:4.0%}  {done:,} of {total:,}  {rate:,.0f}/s")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._drawn and self._last:
            note_over("")
