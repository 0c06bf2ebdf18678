"""What a mistyped word was meant to be. A suggestion is a correction of typing errors, never another act."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from signer.cli.catalogue import GROUPS, VERBS, next_words

_LONG: Final = 8  # characters from which a word may have two errors
_SHORT: Final = 2  # characters up to which a word may have none


def distance(one: str, other: str) -> int:
    """The insertions, deletions, substitutions and swaps of neighbours that make `other` of `one`."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for at, letter in enumerate(one, 1):
        before, last, row = row, before, [at]
        for place, wanted in enumerate(other, 1):
            cost = min(before[place] + 1, row[-1] + 1, before[place - 1] + (letter != wanted))
            if last and place > 1 and letter == other[place - 2] and one[at - 2] == wanted:
                cost = min(cost, last[place - 2] + 1)
            row.append(cost)
    return row[-1]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` is with few typing errors; None if there is none, or more than one."""
    word = word[:64]
    allowed = 0 if len(word) <= _SHORT else 1 if len(word) < _LONG else 2
    by_distance: dict[int, list[str]] = {}
    for other in known:
        by_distance.setdefault(distance(word, other), []).append(other)
    closest = min(by_distance, default=allowed + 1)
    found = by_distance[closest] if closest <= allowed else []
    return found[0] if len(found) == 1 else None


def similar(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The hint for a name of the operator's own that is not known: the most similar one, else `otherwise`."""
    from difflib import get_close_matches

    near = get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]}" if near else otherwise


def suggest_verb(words: Sequence[str]) -> str | None:
    """The verb that the first words of a command line are with few typing errors."""
    found: list[str] = []
    for word in words:
        names = list(next_words(found))
        match = word if word in names else nearest(word, names)
        if match is None:
            break
        found.append(match)
        if not next_words(found):
            return " ".join(found)
    return None


def list_verbs(words: Sequence[str]) -> str:
    """The verbs of a group, also of a mistyped one, or those with this second word; empty if there is none."""
    word = words[0] if words else ""
    group = word if word in GROUPS else nearest(word, GROUPS)
    if group is not None:
        return f"signer {group} {'|'.join(next_words([group]))}"
    return ", ".join(f"signer {entry.words}" for entry in VERBS if entry.words.split()[1:] == [word])
