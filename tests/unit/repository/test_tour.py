"""The steps of `scripts/quickstart --tour`: each is an entry that can be read, and names commands that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.tour import walk as tour
from scripts.tour.steps import STEPS, Step
from scripts.tour.walk import Unexpected, Walk, shown
from signer.cli.catalogue import VERBS

_WORDS = re.compile(r"(?:^|[|&;] ?|<)signer ([a-z-]+)(?: ([a-z-]+))?")


def verbs(command: str) -> list[str]:
    """The verbs of `signer` in a command line."""
    known = [verb.words for verb in VERBS]
    pairs = [(first, f"{first} {second}") for first, second in _WORDS.findall(command)]
    return [pair if pair in known else first for first, pair in pairs]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.title)
def test_every_command_of_signer_exists(step: Step) -> None:
    known = {verb.words for verb in VERBS}
    assert set(verbs(step.command)) <= known
    assert step.title[0].isupper() and not step.title.endswith(".")  # noqa: PT018
    re.compile(step.expects)


def test_every_title_is_there_once() -> None:
    titles = [step.title for step in STEPS]
    assert sorted(set(titles)) == sorted(titles)


def test_the_day_has_the_verbs_of_an_operator() -> None:
    walked = {verb for step in STEPS for verb in verbs(step.command)}
    assert {"init", "check", "serve", "reload", "status", "freeze", "unfreeze"} <= walked
    assert {"policy list", "token renew", "token revoke", "identity add", "role add", "certs who"} <= walked


# --- the walk --------------------------------------------------------------------------------------------------------


def test_a_step_has_the_settings_of_the_folder_and_its_output(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "environment").write_text("A=init\nB=init\n")
    (tmp_path / "tour.env").write_text("B=tour\n")
    step = Step("Shows", "env | grep '^[AB]=' | sort; exit 3", "B=tour", status=3, lines=1)
    said = Walk(tmp_path).step(step)
    assert said == "A=init\nB=tour\n"
    assert list(shown(step, 1, said))[2:] == ["      A=init", "      … 1 more lines", "      (exit status 3)"]


@pytest.mark.parametrize(
    "step, why",
    [
        (Step("", "exit 1", ""), "exit status 1, not 0"),
        (Step("", "true", "", status=1), "exit status 0, not 1"),
        (Step("", "echo other", "this"), "nothing of 'this'"),
        (Step("", "true", "this", log="log"), "it did not start"),
    ],
)
def test_a_step_that_differs_ends_the_walk(tmp_path: Path, step: Step, why: str) -> None:
    with pytest.raises(Unexpected, match=why):
        Walk(tmp_path).step(step)


def test_what_goes_on_in_the_background_is_ended(tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    program = 'import time; print("up", flush=True); time.sleep(600)'
    walk.step(Step("", f"{sys.executable} -c '{program}'", "up", log="log"))
    (process,) = walk._running
    walk.end()
    assert process.returncode is not None


# --- the throwaway host ----------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[3]
HOST = ROOT / "scripts" / "tour" / "throwaway-host"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_without_root_there_is_no_host_and_it_says_why() -> None:
    before = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "bash", "-s", "check"]
    done = subprocess.run(before, input=HOST.read_text(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "not root\n", "")


def test_a_host_runs_only_what_it_is_asked_to() -> None:
    for words in ((), ("run", "web2"), ("check", "more"), ("start",)):
        done = subprocess.run([HOST, *words], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("usage: throwaway-host ")


def test_steps_on_a_host_are_left_out_where_none_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = (
        Step("First", "echo 1", "1"),
        Step("On it", "touch ran; false", "x", on_host=True),
        Step("Last", "true", ""),
    )
    monkeypatch.setattr(tour, "STEPS", steps)
    monkeypatch.setattr(tour, "why_no_host", lambda: "not root")
    assert tour.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert " 2  On it\n    $ touch ran; false\n      (left out: not root)\n\n 3  Last\n" in said
    assert "\n2 steps, 1 left out, " in said
    assert not (tmp_path / "ran").exists()


def test_no_step_needs_what_a_step_on_a_host_leaves() -> None:
    """Where none can be made, the others still follow from each other."""
    for step in STEPS:
        assert step.on_host == ("throwaway-host" in step.command or "-F web2/" in step.command)
        assert step.on_host or not re.search(r"web2(?!/publisher)", step.command)
