"""Names, in an error about a file, the path and the argument or setting that it came from.

What opens a file knows only its path, and what needs a setting only its name. The edge knows both, so it adds the other
one: `/etc/signer/p.toml (--file) cannot be read`, `there is no CA key file at SIGNER_CA_KEY_FILE (/run/signer-ca/ca)`,
`the plan file (plan.json, PLAN) cannot be read`.

It reads sentences on purpose. Errors about files are raised at about 140 places, and some must not say a path, because
the service sends them to callers: a place as a type would be one more argument at each of them, and where it belongs in
the sentence would still have to be searched for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from signer.errors import BadFile, SignerError
from signer.units import plain

_ENDINGS: Final = ("_FILE", "_DIR", "_SOCKET")
_CLIENT: Final = ("SAFE_SESSION_TOKEN_FILE", "SAFE_SESSION_PUBLISHERS_FILE")
_BEFORE_WORD: Final = r"(?:^|(?<=\bfile )|(?<=\bin )|(?<=\bmade ))"  # a name such as `link` is also a word
_AFTER: Final = r"(?![\w-]|[./]\w)"


# What an error calls a file whose path it must not know, as it may also be sent to a caller of the service; and the
# arguments and settings that can have named that file.
_NOUNS: Final = (
    ("the CA key file", ("FILE", "SIGNER_CA_KEY_FILE")),
    ("the policy file", ("FILE", "--file", "--policy", "SIGNER_POLICY_FILE")),
    ("the cutover file", ("--config",)),
    ("the plan file", ("PLAN", "--out")),
    ("the state of the witness", ("--state",)),
    ("the backup", ("FILE",)),
    ("the target", ("--out", "--to")),
    ("Vault's CA file", ("--ca-file", "SIGNER_VAULT_CA_FILE")),
    ("the public key", ("FILE", "--key")),
    ("not a usable host key", ("--keys",)),
    ("the enrolment", ("--webauthn",)),
    ("the signed note", ("--checkpoint",)),
    ("SHA256SUMS", ("DIR",)),
    ("the ssh-agent of the CA key", ("SIGNER_CA_AGENT_SOCKET",)),
)


class Place(NamedTuple):
    """A path, and the argument or setting that gave it."""

    path: str
    name: str


def places_of_settings(environ: Mapping[str, str]) -> Iterator[Place]:
    """The files and directories that the settings of this environment name, or their defaults; absolute paths only."""
    from signer.settings import INFISICAL_SETTINGS, SETTINGS  # which a verb that ends well may not need

    known = [(name, default) for name, default, _ in (*SETTINGS, *INFISICAL_SETTINGS)]
    for name, default in (*known, *((name, "") for name in _CLIENT)):
        path = environ.get(name) or default
        if name.endswith(_ENDINGS) and path.startswith("/"):  # anything else may be a secret that was put in its place
            yield Place(path, name)


def name_places(error: SignerError, arguments: Sequence[Place], environ: Mapping[str, str]) -> None:
    """Adds to text and problems what they lack: to each path its argument or setting, to a setting its path.

    Where the text names no file, the hint may: `fix owner and mode of SIGNER_DATA_DIR (/var/lib/signer)`.
    """
    places = [*arguments, *places_of_settings(environ)]
    text, error.text = error.text, with_places(error.text, places)
    if error.text == text and not any(place.name in text for place in places):
        error.hint = with_places(error.hint, places)
    if isinstance(error, BadFile):
        error.problems = tuple(with_places(problem, places) for problem in error.problems)
        error.facts["problems"] = list(error.problems)


def with_places(text: str, places: Sequence[Place]) -> str:
    """`text` with each place named; of two places with one path the first counts."""
    named: set[str] = set()
    for place in places:
        for path in dict.fromkeys((plain(place.path), plain(Path(place.path).absolute()))):
            if path in ("/", ".") or path in named:
                continue
            text, is_named = _with_place(text, Place(path, place.name))
            if is_named:
                named.add(path)
                break
    return text if named else _with_noun(text, places)


def _with_place(text: str, place: Place) -> tuple[str, bool]:
    """The text, and whether it names the place now."""
    path, name = re.escape(place.path), _find(rf"(?<![\w-]){re.escape(place.name)}(?![\w=-])", text)
    before = r"(?<![\w./-])" if set(place.path) & set("/.") else _BEFORE_WORD
    exact = _find(rf"{before}{path}{_AFTER}", text)
    if exact is None:  # an error about what a file says begins with its last name
        last = _find(rf"(?:^|(?<=: )|(?<=this edit )){re.escape(Path(place.path).name)}(?=: \d+ problem)", text)
        if last is not None:
            return f"{text[: last.start()]}{place.path} ({place.name}){text[last.end() :]}", True
    if exact is not None:
        return text if name else _inserted(text, exact.end(), place.name), True
    if name is not None and place.name.isupper() and "_" in place.name:
        return _inserted(text, name.end(), place.path), True
    inside = _find(rf"(?<![\w./-]){path.rstrip('/')}/[\w./@+-]*\w", text)
    if inside is not None:
        return text if name else _inserted(text, inside.end(), f"in {place.name}"), True
    return text, False


def _with_noun(text: str, places: Sequence[Place]) -> str:
    for noun, names in _NOUNS:
        at = text.find(noun)
        for name in names if at >= 0 else ():
            path = next((plain(place.path) for place in places if place.name == name), None)
            if path is not None:
                return text if name in text else _inserted(text, at + len(noun), f"{path}, {name}")
    return text


def _find(pattern: str, text: str) -> re.Match[str] | None:
    """The first match that is not in a command in backticks."""
    return next((found for found in re.finditer(pattern, text) if not text.count("`", 0, found.start()) % 2), None)


def _inserted(text: str, at: int, what: str) -> str:
    """`text` with ` (what)` at a place, after the quotes that end there."""
    while text[at : at + 1] in ("'", '"'):
        at += 1
    if text.startswith(" (", at):
        return f"{text[:at]} ({what}, {text[at + 2 :]}"
    return f"{text[:at]} ({what}){text[at:]}"
