"""What a verb of the `signer` command is, and how its arguments are read. The verbs are in `catalogue.py`."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any, Final

from signer.units import parse_duration

SHORTEST_TOKEN: Final = 60  # seconds
LONGEST_PAUSE: Final = 86_400  # seconds
LONGEST_TOKEN: Final = 3_650 * 86_400


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument as argparse takes it."""

    names: tuple[str, ...]
    how: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Verb:
    """One thing that `signer` does. `words` is what is typed, `module` and `function` do it; empty for the services."""

    words: str
    group: str
    summary: str
    about: str
    examples: tuple[str, ...]
    arguments: tuple[Argument, ...] = ()
    module: str = ""
    function: str = ""
    lists_settings: bool = False


def argument(*names: str, **how: Any) -> Argument:
    return Argument(names, how)


def whole(low: int, high: int) -> Any:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or len(text) > 20 or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]!a} is no whole number from {low} to {high}")
        return int(text)

    return read


def reason(text: str) -> str:
    """As the ledger takes it: told before anything is changed, not when it is to be recorded."""
    from signer.policy.rules import MAX_REASON

    if not text.strip() or len(text) > MAX_REASON or not text.isprintable():
        raise argparse.ArgumentTypeError(f"must be one line of at most {MAX_REASON} printable characters")
    return text


def duration(text: str) -> int:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def token_life(text: str) -> int:
    seconds = duration(text)
    if not SHORTEST_TOKEN <= seconds <= LONGEST_TOKEN:
        raise argparse.ArgumentTypeError(f"{text} is not between 1m and 3650d")
    return seconds


def identity(text: str) -> str:
    from signer.policy.file import IDENTITY_NAME, RESERVED_NAMES

    if IDENTITY_NAME.fullmatch(text) is None:
        sentence = "cannot be an identity: lower case letters, digits and . _ @ - inside, 64 at most"
        raise argparse.ArgumentTypeError(f"{text[:64]!a} {sentence}")
    if text in RESERVED_NAMES:
        raise argparse.ArgumentTypeError(f"{text} is the ledger's own word for an actor: take another name")
    return text


def address(text: str) -> str:
    import ipaddress

    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:60]!a} is no IP address") from None


def fingerprint(text: str) -> str:
    if re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}", text) is None:
        raise argparse.ArgumentTypeError(f"{text[:60]!a} is no fingerprint such as SHA256:… with 43 characters")
    return text


def head(text: str) -> tuple[int, str]:
    match = re.fullmatch(r"(\d{1,18}):([0-9a-f]{64})(?:\s.*)?", text.strip(), re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is no SEQ:HASH as `signer ledger head` prints it")
    return int(match[1]), match[2]


def pause(text: str) -> int:
    seconds = duration(text)
    if not 1 <= seconds <= LONGEST_PAUSE:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is not between 1s and {LONGEST_PAUSE}s")
    return int(seconds)


KEY_KINDS: Final = ("ed25519", "ecdsa256", "ecdsa384", "ecdsa521", "rsa4096")
MAX_SEQ: Final = 2**63 - 1  # SQLite's largest integer
MAX_SERIAL: Final = 2**64 - 1
JSON: Final = argument("--json", action="store_true", help="the same facts as JSON on stdout")
