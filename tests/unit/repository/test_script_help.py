"""`--help` of every script answers at once: in a tree without an environment, and nothing is built."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.parts.documents import ROOT
from tests.parts.terminal import shown_on_terminal

# Run elsewhere than here: the image's health check, and what the programs of the host kit source.
NOT_RUN: Final = {"scripts/container/ready", "scripts/host/common"}


def scripts() -> list[str]:
    paths = [*(ROOT / "scripts").rglob("*"), ROOT / ".ci" / "run"]
    found = [path for path in paths if path.is_file() and os.access(path, os.X_OK)]
    return sorted(str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts alone, as of a fresh clone whose environment was never made."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("scripts", ".ci"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize(
    "name, flag",
    [
        (name, flag)
        for name in sorted(set(scripts()) - NOT_RUN)
        for flag in ("--help", "-h")
        if flag == "--help" or not name.startswith("scripts/host/")  # these take long options alone
    ],
)
def test_help_of_a_script_builds_nothing(tree: Path, name: str, flag: str) -> None:
    before = sorted(tree.rglob("*"))
    done = subprocess.run(
        [tree / name, flag],
        cwd=tree,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/nonexistent"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(name).name in done.stdout
    assert len(done.stdout.splitlines()) >= 2
    assert sorted(tree.rglob("*")) == before


@pytest.mark.parametrize("name", sorted(set(scripts()) - NOT_RUN))
def test_help_of_a_script_fits_the_terminal(tree: Path, name: str) -> None:
    piped = _help(tree / name, None)
    for columns in (60, 80, 120):
        shown = _help(tree / name, columns)
        limit = min(columns, 100)
        assert [line for line in shown.splitlines() if len(line) > limit and len(line.split()) > 1] == []
        assert shown.split() == piped.split() or "bench/" in name  # argparse breaks words at hyphens
    assert [line for line in piped.splitlines() if len(line) > 100 and len(line.split()) > 1] == []


def _help(script: Path, columns: int | None) -> str:
    """What `--help` prints into a pipe, or on a terminal of so many columns."""
    environ = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/nonexistent", "LC_ALL": "C.UTF-8"}
    if columns is None:
        return subprocess.run([script, "--help"], env=environ, capture_output=True, text=True, timeout=60).stdout
    return shown_on_terminal([script, "--help"], environ, columns)


def test_those_that_are_not_run_here_are_still_there() -> None:
    assert set(scripts()) >= NOT_RUN
