"""Edits of policy.toml as text: every line that an edit does not concern stays as it is, with its comments.

An edit is made twice, in the text and in the plain tables; a text that does not come to the same tables is refused.
Pure but for `write_policy`. Names, digests and times are checked by `file.py`, which reads the result.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AoT, Array, InlineTable, Item

from signer.errors import BadFile, write_hint
from signer.files import belongs_to, write_atomically
from signer.toml import find_headers

Kind = Literal["identities", "roles"]
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


def token_entry(sha256: str, expires: str) -> str:
    """The entry of a token in a list `tokens`; `expires` has the form `2027-01-01T00:00:00Z`."""
    return f'{{ sha256 = "{sha256}", expires = {expires} }}'


def approval_key_entry(values: Mapping[str, object]) -> str:
    """The entry of a key in a list `approval_keys`."""
    return _rendered(values)


def add_token(text: str, identity: str, sha256: str, expires: str) -> str:
    """The text with one more token of an identity."""
    return _add_entry(text, identity, "tokens", token_entry(sha256, expires))


def add_approval_key(text: str, identity: str, values: Mapping[str, object]) -> str:
    """The text with one more approval key of an identity."""
    return _add_entry(text, identity, "approval_keys", approval_key_entry(values))


def _add_entry(text: str, identity: str, name: str, entry: str) -> str:
    """The text with one more inline table, `entry`, in the list `name` of an identity."""

    def change(identities: Any) -> None:
        table = identities[identity]
        if name not in table:
            table[name] = _parsed(f"[{entry}]")
        elif isinstance(table[name], AoT):
            row = tomlkit.table()
            row.update(_parsed(entry))
            table[name].append(row)
        else:
            _append(table, name, _parsed(entry))

    def change_plain(identities: dict[str, Any]) -> None:
        identities[identity].setdefault(name, []).append(tomllib.loads(f"x = {entry}")["x"])

    return _in_values(text, change, change_plain)


def renew_token(text: str, sha256: str, expires: str) -> str:
    """The text with another end of the token that has this digest."""

    def change(identities: Any, end: object) -> None:
        for table in identities.values():
            for row in table.get("tokens", []):
                if row["sha256"] == sha256:
                    row["expires"] = end

    plain_end = tomllib.loads(f"x = {expires}")["x"]
    return _in_values(text, partial(change, end=_parsed(expires)), partial(change, end=plain_end))


def remove_tokens(text: str, digests: Collection[str]) -> str:
    """The text without the tokens that have these digests; the list goes with its last token."""

    def change(identities: Any) -> None:
        for table in identities.values():
            rows = table.get("tokens", [])
            for index in reversed(range(len(rows))):
                if rows[index]["sha256"] in digests:
                    del rows[index]
            if "tokens" in table and not rows:
                del table["tokens"]

    return _in_values(text, change, change)


def add_table(text: str, kind: Kind, name: str, values: Mapping[str, object]) -> str:
    """The text with the table `[kind.name]` behind the last one of its kind; `values` that are None are left out."""
    given = {key: value for key, value in values.items() if value is not None}
    head = f"[{kind}.{_key(name)}]"
    block = [head, *(f"{_key(key)} = {_rendered(value)}" for key, value in given.items())]
    lines, newline = _lines(text)
    at = max((end for _, end in _blocks(text, lambda path: path[0] == kind)), default=len(lines))
    before, after = _stripped(lines[:at]), lines[at:]
    added = [f"{line}{newline}" for line in block]
    changed = [*before, *([newline] if before else []), *added, *([newline, *after] if after else [])]

    def change_plain(data: dict[str, Any]) -> None:
        data.setdefault(kind, {})[name] = tomllib.loads("\n".join(block[1:]))

    return _agreed(text, "".join(changed), change_plain)


def remove_table(text: str, kind: Kind, name: str) -> str:
    """The text without `[kind.name]` and the tables inside, and without the comments directly above them."""
    lines, newline = _lines(text)
    for start, end in reversed(_blocks(text, lambda path: path[:2] == (kind, name))):
        last = end
        while last > start and (not lines[last - 1].strip() or lines[last - 1].lstrip().startswith("#")):
            last -= 1
        before, after = _stripped(lines[:start]), lines[last:]
        while after and not after[0].strip():
            del after[0]
        lines = [*before, *([newline] if before and after else []), *after]

    def change_plain(data: dict[str, Any]) -> None:
        del data[kind][name]

    return _agreed(text, "".join(lines), change_plain)


def render_difference(before: str, after: str, name: str) -> list[str]:
    """The lines of a unified diff, which `patch` and `git apply` take."""
    old, new = ([line.rstrip("\r\n") for line in _lines(text)[0]] for text in (before, after))
    return list(difflib.unified_diff(old, new, name, name, lineterm=""))


def decode_policy(raw: bytes) -> str:
    """The text of policy.toml; `encode_policy` keeps the byte order mark that an editor wrote."""
    return raw.decode("utf-8-sig")


def encode_policy(text: str, before: bytes) -> bytes:
    """The bytes of an edited text, with a byte order mark if `before` has one."""
    return text.encode("utf-8-sig" if before.startswith(b"\xef\xbb\xbf") else "utf-8")


def write_policy(path: Path, before: bytes, after: bytes) -> None:
    """Replaces the file as a whole; owner, group and mode stay. Raises `BadFile`.

    A link is followed: the file behind it is replaced. A file that no longer is `before` is left as it is.
    """
    try:
        real = path.resolve(strict=True)
        facts = real.stat()
        if real.read_bytes() != before:
            raise BadFile(
                "policy_changed", f"{path} was changed by another program at the same time", "repeat the command"
            )
        write_atomically(real, after, stat.S_IMODE(facts.st_mode), like=facts)
    except OSError as error:
        whose = f"; {belongs_to(path.parent)}" if isinstance(error, PermissionError) else ""
        raise BadFile(
            "policy_not_written",
            f"{path} cannot be written: {os.strerror(error.errno or 0)}{whose}",
            f"{write_hint(error, str(path.parent))}, or edit the file where it is kept",
        ) from None


# --- values -----------------------------------------------------------------------------------------------------------


def _in_values(text: str, change: Callable[[Any], None], change_plain: Callable[[dict[str, Any]], None]) -> str:
    """Applies a change of values under `identities`, by tomlkit in the text and in the plain tables."""
    try:
        document = tomlkit.parse(text)
        change(document["identities"])
        after = tomlkit.dumps(document)
        if text.count("\n") == text.count("\r\n"):
            after = re.sub(r"(?<!\r)\n", "\r\n", after)  # tomlkit ends new lines with a line feed alone
    except (TOMLKitError, KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise _by_hand() from None
    return _agreed(text, after, lambda data: change_plain(data["identities"]))


def _parsed(value: str) -> Any:
    return tomlkit.parse(f"x = {value}\n")["x"]


def _append(table: Any, name: str, entry: InlineTable) -> None:
    """Appends to a list; one in a single line gets a line for each entry, because entries are long."""
    found = table[name]
    if not isinstance(found, Array):
        raise TypeError(f"{name} is not a list")
    if "\n" in found.as_string():
        found.append(entry)
        return
    entries = [item.as_string().strip() for item in (*found, entry) if isinstance(item, Item)]
    table[name] = _parsed("[\n" + "".join(f"    {item},\n" for item in entries) + "]")


def _rendered(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return tomlkit.string(value).as_string()
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_key(str(key))} = {_rendered(item)}' for key, item in value.items())} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_rendered, value))}]"
    return str(value)


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else json.dumps(name)


# --- tables -----------------------------------------------------------------------------------------------------------


def _lines(text: str) -> tuple[list[str], str]:
    """The lines with their ends, the last one too, and the end that a new line gets."""
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = [f"{line}\n" for line in text.split("\n")]  # `splitlines` also splits at characters that TOML does not
    return (lines[:-1] if text.endswith("\n") or not text else [*lines[:-1], f"{lines[-1][:-1]}{newline}"]), newline


def _blocks(text: str, matches: Callable[[tuple[str | int, ...]], bool]) -> list[tuple[int, int]]:
    """First line and the line after the last, from 0, of each table whose path matches.

    A table begins with the comments directly above its header, and ends where the next one begins.
    """
    lines, _ = _lines(text)
    headers = find_headers(text)
    starts = []
    for line, _ in headers:
        at = line - 1
        while at > 0 and lines[at - 1].lstrip().startswith("#"):
            at -= 1
        starts.append(at)
    ends = [*starts, len(lines)][1:]
    return [(start, end) for start, end, (_, path) in zip(starts, ends, headers, strict=False) if matches(path)]


def _stripped(lines: list[str]) -> list[str]:
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    return lines


def _agreed(before: str, after: str, change_plain: Callable[[dict[str, Any]], None]) -> str:
    """`after`, if it comes to the same tables as the change of the plain ones; raises `BadFile`."""
    expected = tomllib.loads(before)
    try:
        change_plain(expected)
        if tomllib.loads(after) == expected:
            return after
    except (KeyError, TypeError, ValueError):  # tables in a form that no command writes, such as `identities = 1`
        raise _by_hand() from None
    raise _by_hand()


def _by_hand() -> BadFile:
    return BadFile(
        "policy_edit_by_hand",
        "the file has this table in a form that a command cannot change without touching other lines",
        "edit it by hand, then run `signer policy check`",
    )
