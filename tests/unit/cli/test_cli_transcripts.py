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
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from signer.cli.catalogue import VERBS
from tests.parts.command import World, make_world, run
from tests.parts.keys import KeyRing
from tests.parts.service import ROOT

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
