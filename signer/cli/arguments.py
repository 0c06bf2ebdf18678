"""What verbs take: the types of their arguments with one sentence for each error, the options that they share, and
the settings of the environment."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from signer.units import parse_duration, render_duration

if TYPE_CHECKING:
    from signer.ledger.checkpoint import VerifierKey
    from signer.settings import Settings

KEY_KINDS: Final = ("ed25519", "ecdsa256", "ecdsa384", "ecdsa521", "rsa4096")
SHORTEST_TOKEN: Final = 60  # seconds
LONGEST_TOKEN: Final = 3_650 * 86_400
LONGEST_PAUSE: Final = 86_400
MAX_REFERENCE: Final = 200  # characters
MAX_SEQ: Final = 2**63 - 1  # SQLite's largest integer
MAX_SERIAL: Final = 2**64 - 1


def quoted(word: str, length: int = 40) -> str:
    """A word of the command line as errors show it: in double quotes, escaped, cut off at `length` characters."""
    return json.dumps(word[:length])


class Checked(click.ParamType[Any]):
    """A value that `read` makes of a word; the text of its `ValueError` is what is wrong with the word."""

    def __init__(self, name: str, read: Callable[[str], Any]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):  # a default
            return value
        try:
            return self._read(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class File(Checked):
    """The path of a file, which a shell completes; whether the file exists is the verb's business."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


class NotOneOf(click.BadParameter):
    """A word that is not one of `known`."""

    def __init__(
        self, word: str, known: Sequence[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> None:
        super().__init__(f"{quoted(word)} is not one of {', '.join(known)}", ctx, param)
        self.word, self.known = word, known


class OneOf(click.Choice[str]):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            raise NotOneOf(str(value), self.choices, param, ctx)
        return str(value)


# --- values -----------------------------------------------------------------------------------------------------


def _read_path(word: str) -> Path:
    if not word:
        raise ValueError("the name of a file must not be empty")
    return Path(word)


def is_whole(word: str, low: int, high: int) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= 20 and low <= int(word) <= high


def whole(low: int, high: int) -> Checked:
    def read(word: str) -> int:
        if not is_whole(word, low, high):
            raise ValueError(f"{quoted(word)} is not a whole number from {low} to {high}")
        return int(word)

    return Checked("integer", read)


def _read_serial(word: str) -> int:
    if not is_whole(word, 0, MAX_SERIAL):
        raise ValueError(f"{quoted(word)} is not a serial number")
    return int(word)


def _read_reason(word: str) -> str:
    """A reason that the ledger accepts: it is checked before anything is changed."""
    from signer.model import MAX_REASON

    if not word.strip() or len(word) > MAX_REASON or not word.isprintable():
        raise ValueError(f"must be one line of at most {MAX_REASON} printable characters")
    return word


def _lasting(least: int, most: int) -> Checked:
    def read(word: str) -> int:
        seconds = parse_duration(word)
        if not least <= seconds <= most:
            raise ValueError(f"{quoted(word)} is not between {render_duration(least)} and {render_duration(most)}")
        return seconds

    return Checked("duration", read)


def _read_identity(word: str) -> str:
    from signer.policy.file import IDENTITY_NAME, RESERVED_NAMES

    if IDENTITY_NAME.fullmatch(word) is None:
        sentence = "is not a valid identity: lower case letters, digits, and . _ @ - inside, at most 64"
        raise ValueError(f"{quoted(word, 64)} {sentence}")
    if word in RESERVED_NAMES:
        raise ValueError(f"{quoted(word)} is reserved: the ledger uses it as an actor")
    return word


def _read_address(word: str) -> str:
    import ipaddress

    try:
        return str(ipaddress.ip_address(word))
    except ValueError:
        raise ValueError(f"{quoted(word, 60)} is not an IP address") from None


def _read_since(word: str) -> int:
    """Seconds since 1970: a time in UTC, or a duration before now."""
    import calendar
    import time

    for form in ("%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%SZ"):
        with suppress(ValueError):
            return max(calendar.timegm(time.strptime(word, form)), 0)
    try:
        return max(int(time.time()) - parse_duration(word), 0)
    except ValueError:
        raise ValueError(f"{quoted(word)} is neither a duration such as 24h nor a time such as 2026-11-22") from None


def _read_fingerprint(word: str) -> str:
    if re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}", word) is None:
        raise ValueError(f"{quoted(word, 60)} is not a fingerprint: SHA256:… with 43 characters")
    return word


def _read_head(word: str) -> tuple[int, str]:
    match = re.fullmatch(r"(\d{1,18}):([0-9a-f]{64})(?:\s.*)?", word.strip(), re.ASCII)
    if match is None:
        raise ValueError(f"{quoted(word)} is not SEQ:HASH as `signer ledger head` prints it")
    return int(match[1]), match[2]


def _id(prefix: str, what: str) -> Checked:
    """The id of a request, waiver or incident: `prefix` and ten letters of base32."""

    def read(word: str) -> str:
        if re.fullmatch(prefix + "-[a-z2-7]{10}", word) is None:
            raise ValueError(f"{quoted(word)} is not the id of {what}: {prefix}-… with ten letters")
        return word

    return Checked("id", read)


def _read_reference(word: str) -> str:
    if not word or len(word) > MAX_REFERENCE or not word.isprintable():
        raise ValueError(f"must be a commit or a link to it, at most {MAX_REFERENCE} printable characters")
    return word


def read_vkey(word: str, *, of_log: bool) -> VerifierKey:
    """The verifier key of a log or of a witness; raises `ValueError`."""
    from signer.errors import BadNote
    from signer.ledger.checkpoint import COSIGNATURE_KIND, NOTE_KIND, parse_vkey

    try:
        key = parse_vkey(word)
    except BadNote as error:
        raise ValueError(error.text) from None
    if key.kind != (NOTE_KIND if of_log else COSIGNATURE_KIND):
        wanted, other = ("a log", "a witness") if of_log else ("a witness", "a log")
        raise ValueError(f"{key.name} is the key of {other}, not of {wanted}")
    return key


FILE: Final = File("file", _read_path)
SERIAL: Final = Checked("serial", _read_serial)
DURATION: Final = Checked("duration", parse_duration)  # seconds
TOKEN_LIFE: Final = _lasting(SHORTEST_TOKEN, LONGEST_TOKEN)
PAUSE: Final = _lasting(1, LONGEST_PAUSE)
REASON: Final = Checked("text", _read_reason)
IDENTITY: Final = Checked("identity", _read_identity)
ADDRESS: Final = Checked("address", _read_address)
SINCE: Final = Checked("time", _read_since)  # seconds since 1970
FINGERPRINT: Final = Checked("fingerprint", _read_fingerprint)
HEAD: Final = Checked("head", _read_head)  # (seq, hash)
REQUEST: Final = _id("r", "a request")
WAIVER: Final = _id("w", "a waiver")
INCIDENT: Final = _id("i", "an incident")
REFERENCE: Final = Checked("reference", _read_reference)
WITNESS_KEY: Final = Checked("vkey", partial(read_vkey, of_log=False))


# --- shared options ---------------------------------------------------------------------------------------------

JSON: Final = click.Option(["--json", "as_json"], is_flag=True, help="print the same facts as JSON on stdout")
config_option: Final = click.option(
    "--config", type=FILE, metavar="FILE", required=True, help="cutover.toml of the platform"
)
approve_option: Final = click.option(
    "--approve", metavar="PHRASE", help="the approval phrase; without it, `signer` asks on the terminal"
)
plan_argument: Final = click.argument("plan", type=FILE, metavar="PLAN", help="a plan file that `plan --out` wrote")
out_option: Final = click.option("--out", type=FILE, metavar="PLAN", help="write the plan to this file, for `apply`")
commands_option: Final = click.option("--commands", is_flag=True, help="also show the commands that would be run")


MAX_PAGE: Final = 1_000
segment_option: Final = click.option(
    "--segment", type=FILE, metavar="FILE", help="read this file of `signer ledger archive` instead of the ledger"
)


def page_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds `--limit`, the rows of a page, and `--before`, which asks for the page after another."""
    limit = click.option(
        "--limit", type=whole(1, MAX_PAGE), metavar="N", default=50, help=f"at most {MAX_PAGE}; default 50"
    )
    before = click.option(
        "--before", type=whole(1, MAX_SEQ), metavar="SEQ", help="the next page; a full page shows the number"
    )
    return limit(before(function))


# --- settings ---------------------------------------------------------------------------------------------------


def read_settings() -> Settings:
    """The settings of the environment; warns about each name that is not a setting. Raises `BadSettings`."""
    import os

    from signer.cli import output
    from signer.settings import load_settings

    settings = load_settings(os.environ)
    for warning in settings.warnings:
        output.warn(warning)
    return settings
