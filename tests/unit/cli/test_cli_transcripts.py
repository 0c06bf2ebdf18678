"""`signer` as a person sees it: tests/data/transcripts/*.txt hold commands with what they print and their exit status.

A transcript's lines:  `# …` says what is shown;  `$ signer …` is run;  `| …` is its stdout,  `! …` its stderr,
`? n` its exit status where it is not 0;  `% …` prepares something (see `World.prepare`). Each starts in a fresh
folder with policy.toml, a CA key `ca` and `ca.pub`, a user's `user.pub`, and a ledger of seven events in `data/`.
`<dir>` in a command is that folder, `<ca>` the CA key's fingerprint. What Infisical holds is the file `infisical`.

What differs from run to run stands there as `<ca>`, `<token>` and so on (`World.steady`); all else is compared exactly.
`WRITE_TRANSCRIPTS=1 pytest …` writes what was printed into the files, for a person to read before committing it.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from signer.cli import output
from signer.cli.catalogue import VERBS
from tests.parts.command import World, make_world, run
from tests.parts.keys import KeyRing
from tests.parts.service import ROOT

NARROW = 60  # columns
TRANSCRIPTS = Path(__file__).parents[2] / "data" / "transcripts"


@pytest.fixture
def world(tmp_path: Path, keyring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> World:
    return make_world(tmp_path, keyring, monkeypatch)


def _replay(lines: Sequence[str], world: World) -> Iterator[str]:
    """The transcript as this program would have written it."""
    for line in lines:
        if line.startswith(("| ", "! ", "? ")) or line in ("|", "!"):
            continue
        yield line
        if line.startswith("% "):
            world.prepare(shlex.split(line[2:]))
        elif line.startswith("$ signer"):
            ran = run(*(world.filled(word) for word in shlex.split(line)[2:]))
            yield from (f"| {text}".rstrip() for text in world.steady(ran.out).splitlines())
            yield from (f"! {text}".rstrip() for text in world.steady(ran.err).splitlines())
            if ran.status:
                yield f"? {ran.status}"
        else:
            assert not line or line.startswith("#"), f"what is this line: {line}"


@pytest.mark.parametrize("name", sorted(path.stem for path in TRANSCRIPTS.glob("*.txt")))
def test_transcript(name: str, world: World) -> None:
    path = TRANSCRIPTS / f"{name}.txt"
    expected = path.read_text()
    found = "".join(f"{line}\n" for line in _replay(expected.splitlines(), world))
    if os.environ.get("WRITE_TRANSCRIPTS"):
        path.write_text(found)
    assert found == expected


@pytest.mark.parametrize("name", sorted(path.stem for path in TRANSCRIPTS.glob("*.txt") if "width" not in path.stem))
def test_a_narrow_terminal_gets_the_same_words(name: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line fits, or is one word; only what people copy, and JSON and CSV, stay as they are."""
    copied: set[str] = set()

    def remember(print_lines: Callable[[str], None]) -> Callable[[str], None]:
        def remembering(text: str) -> None:
            caller = sys._getframe(1)
            if caller.f_globals["__name__"] != "signer.cli.output" or caller.f_locals.get(
                "exactly"
            ):  # a verb's own call
                copied.update(f"{start} {line}".rstrip() for line in world.steady(text).splitlines() for start in "|!")
            print_lines(text)

        return remembering

    for printing in ("show_exactly", "note_exactly"):
        monkeypatch.setattr(output, printing, remember(getattr(output, printing)))
    world.show_on_terminal(NARROW)
    expected = (TRANSCRIPTS / f"{name}.txt").read_text().splitlines()
    found = list(_replay(expected, world))
    assert _words(found) == _words(expected)
    command = ""
    for line in found:
        command = line if line.startswith("$ ") else command
        if line.startswith(("| ", "! ")) and not re.search(r" (--json|--csv|export)\b", command) and line not in copied:
            assert len(line) - 2 <= NARROW or len(line[2:].split()) == 1, command


def _words(lines: Sequence[str]) -> Counter[str]:
    """The words of what was printed. What `World.steady` finds only where a sentence is on one line counts alike, and
    the backslash that ends a line of a command not at all."""
    differing = r"[0-9a-f]{64}|<hash>|<sha256>|AAAA\S{64}|<new-key>|SHA256:\S{43}|<new>|\d+\.\d|<n>"
    words = [word for line in lines if line[:1] in "|!" for word in line[1:].split()]
    users = {"<users>", "keeper", "api", "runs", "as", "daemon,", "nobody"}
    return Counter(re.sub(differing, "#", word) for word in words if word != "\\" and word not in users)


def test_every_verb_but_the_services_has_a_transcript_of_success_and_of_failure() -> None:
    services = ("serve", "api", "keeper", "notices run", "witness serve")
    seen: dict[str, set[bool]] = {verb.words: set() for verb in VERBS if verb.words not in services}
    # Requests, waivers and incidents succeed only with a service and keys: tests/system/approvals holds those pages.
    pages = [ROOT / "runbooks" / "operate" / name for name in ("approvals.md", "break-glass.md")]
    for path in [*TRANSCRIPTS.glob("*.txt"), *pages]:
        for block in path.read_text().split("\n$ signer ")[1:]:
            verb = next((words for words in seen if re.match(rf"{words}\s", block)), None)
            if verb is not None and "--help" not in block.split("\n", 1)[0]:
                seen[verb].add("\n? " in block)
    assert {verb: sorted(ends) for verb, ends in seen.items()} == {verb: [False, True] for verb in seen}


def test_errors_and_hints_are_said_in_one_voice() -> None:
    lines = [
        line[2:]
        for path in sorted(TRANSCRIPTS.glob("*.txt"))
        for line in path.read_text().splitlines()
        if line.startswith("! ") and not line.startswith("!   ")
        if re.match(r"! [ \d]\d [✓✗] |! rolling back$", line) is None
    ]
    # Lower case, but for a name that is written so; no full stop at the end. Steps of a run have a form of their own.
    voice = re.compile(r"signer: ((error|hint|warning): )?([^A-Z\s]|[A-Z]{4}[A-Z_]*\b).*[^.]")
    assert len(lines) > 100
    assert [line for line in lines if voice.fullmatch(line) is None] == []
