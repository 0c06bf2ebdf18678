"""All output of `safe-session`.

1. Errors and remarks go to stderr; stdout belongs to the command. stdout gets the answer of what runs no command, and
   the one line of JSON that says why none was run: with `--json`, and to a program that has to wait for humans.
2. `safe-session: error: <lowercase, no full stop>`, then `safe-session: hint: <next action>`.
3. Text from outside (server, arguments, file names) is printed only through `plain`; JSON is ASCII.
4. Each line of JSON is an object whose `state` is one word; remarks go to stderr as JSON, too.
5. On a terminal, sentences and tables take its width, 100 columns at most. Elsewhere each is one line.
"""

from __future__ import annotations

import os
import sys
import time
from _json import encode_basestring_ascii as quoted

from signer.errors import SignerError
from signer.safe_session.statuses import LATER, NOT_REACHABLE, Internal, NotWritten, judge

TYPE_CHECKING = False  # type checkers know the name; importing it from typing costs 20 ms
if TYPE_CHECKING:
    from signer.safe_session.response import Certificate

_LONGEST_LINE = 600
_NAME_WIDTH = 12


def plain(text: str) -> str:
    """`text` as one printable line, so that a hostile server cannot move the cursor, set the title or fake a line.

    Not `plain` of `signer/units.py`, which each login would have to import.
    """
    shown = "".join(c if c.isprintable() else " " for c in text[: 2 * _LONGEST_LINE])
    return " ".join(shown.split())[:_LONGEST_LINE]


def say(text: str) -> None:
    """Prints one line on stderr, or several that fit the terminal; a closed stderr is not an error."""
    _write_stderr("".join(f"{line}\n" for line in _fitted(f"safe-session: {plain(text)}", 2)))


def say_over(text: str) -> None:
    """A line on a terminal's stderr that the next one overwrites; an empty one removes it."""
    from signer.safe_session.terminal import MAX_WIDTH, width_of

    width = width_of(2) or MAX_WIDTH
    line = plain(f"safe-session: {text}")[: width - 1] if text else ""
    _write_stderr(f"\r{line}\x1b[K")


def say_row(name: str, value: str) -> None:
    """A name and its value below a line of `say`."""
    line = f"safe-session:   {name.ljust(_NAME_WIDTH)}{plain(value)}"
    hang = len(line) - len(plain(value))
    _write_stderr("".join(f"{part}\n" for part in _fitted(line, 2, hang)))


def remark(text: str, *, as_json: bool, state: str = "note", **facts: object) -> None:
    """A remark on stderr beside the running command: `text`, or a line of JSON with it and `facts`."""
    if as_json:
        _write_stderr(render_json({"state": state, "text": plain(text), **facts}) + "\n")
    else:
        say(text)


def report(error: SignerError, *, as_json: bool, to_stderr: bool = False) -> int:
    """Says why no command is run, on stderr or as a line of JSON on stdout; returns the exit status. `to_stderr` is for
    JSON in place of a command whose stdout has a protocol of its own, as rsync's and git's have."""
    status, state = judge(error)
    if as_json:
        try:
            (_write_stderr if to_stderr else show)(render_json(error_facts(error, status, state)) + "\n")
        except NotWritten as failure:
            error = failure
        else:
            return status
    say(f"error: {error.text}")
    if error.hint:
        say(f"hint: {error.hint}")
    return judge(error)[0]


def error_facts(error: SignerError, status: int, state: str) -> dict[str, object]:
    """What the JSON line of an error holds. `may_retry` is true where the same command may succeed later."""
    return {
        "state": state,
        "code": error.code,
        "text": plain(error.text),
        "hint": plain(error.hint),
        **{name: value for name, value in error.facts.items() if value != []},
        "may_retry": status in (LATER, NOT_REACHABLE),
        "exit_status": status,
    }


def render_json(value: object) -> str:
    """JSON as ASCII on one line. Only for what `parse_object` returns and this program makes: no `json`, whose import
    takes 15 ms."""
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{quoted(str(key))}:{render_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(render_json, value)) + "]"
    raise TypeError(type(value).__name__)


def say_certificate(role: str, serial: int, lifetime: int, *, as_json: bool) -> None:
    """Prints the line of `-v`; `lifetime` is in seconds."""
    until = time.strftime("%H:%M", time.localtime(time.time() + lifetime))
    span = f"{round(lifetime / 60)} min" if lifetime >= 60 else f"{lifetime} s"
    text = f"{role} for {span} (serial {serial}, until {until}), key only in a private agent"
    remark(text, as_json=as_json, state="issued", role=role, serial=str(serial), lifetime_s=lifetime)


def say_refused_login(certificate: Certificate, *, as_json: bool) -> None:
    """Prints, after the command, that a host did not accept the certificate, and what it can have been about it."""
    import binascii

    from signer.safe_session.keypair import sha256

    principals, source = certificate.principals, certificate.source_address
    ca = "SHA256:" + binascii.b2a_base64(sha256(certificate.ca_key), newline=False).decode().rstrip("=")
    names = ", ".join(principals)
    causes = f"its TrustedUserCAKeys lacks this CA, or the account does not accept principal {names}"
    if source:
        causes += f", or it sees you come from elsewhere than {source}"
    text = (
        f"the host refused the certificate (serial {certificate.serial}, principals {names},"
        f" from {source or 'any address'}, CA {ca}): {causes}"
    )
    facts = {"serial": str(certificate.serial), "principals": principals, "source_address": source, "ca": ca}
    remark(text if as_json else f"note: {text}", as_json=as_json, state="login_refused", **facts)


def say_internal_error(error: Exception, *, as_json: bool) -> int:
    """An error of this program, with the place where it was raised; returns the exit status."""
    import traceback

    last = traceback.extract_tb(error.__traceback__)[-1]
    text = f"internal error, {type(error).__name__} in {os.path.basename(last.filename)}:{last.lineno}"  # noqa: PTH119
    return report(Internal(text), as_json=as_json)


def show(text: str) -> None:
    """Prints `text` on stdout, at once. Raises `NotWritten`."""
    data = text.encode(errors="backslashreplace")
    try:
        while data:
            data = data[os.write(1, data) :]
    except OSError as error:
        raise NotWritten((error.strerror or "unknown reason").lower()) from None


def show_line(text: str) -> None:
    """A sentence on stdout, in as many lines as the terminal needs."""
    show("".join(f"{line}\n" for line in _fitted(text, 1)))


def show_help(text: str) -> None:
    from signer.safe_session.terminal import MAX_WIDTH, fit, width_of

    show(fit(text, width_of(1) or MAX_WIDTH))


def show_table(rows: list[tuple[str, ...]], *, titled: bool = False) -> None:
    """Prints a table on stdout; `titled` if its first row has the titles of the columns."""
    from signer.safe_session.terminal import lay_out, width_of

    cells = [[plain(cell) for cell in row] for row in rows]
    show("".join(f"{line}\n" for line in lay_out(cells, width_of(1), titled=titled)))


def _fitted(line: str, descriptor: int, hang: int | None = None) -> list[str]:
    """The lines in which a terminal shows `line`; elsewhere it is one."""
    try:
        if not os.isatty(descriptor):  # asked here, as the import costs the start of each login
            return [line]
    except OSError:
        return [line]
    from signer.safe_session.terminal import width_of, wrap

    width = width_of(descriptor)
    return [line] if width is None else wrap(line, width, hang)


def _write_stderr(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # stderr is the only place to report it
