"""`scripts/test` gives pytest what is not its own, wherever its own options stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.parts.documents import ROOT

_UNIT_TESTS: Final = """
import pytest

@pytest.mark.long
def test_one_that_takes_long(): pass

@pytest.mark.slow
def test_one_that_is_slow(): pass

def test_another_one(): pass

def test_what_nobody_asked_for(): pass
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with four unit tests and one other, and everything else as here."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("tests/unit", "tests/system", "scripts"):
        (folder / name).mkdir(parents=True)
    for name in ("pyproject.toml", "tests/conftest.py", "scripts/test"):
        shutil.copy(ROOT / name, folder / name)
    for name in (".venv", "tests/parts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "tests/unit/test_it.py").write_text(_UNIT_TESTS)
    (folder / "tests/system/test_that.py").write_text("def test_one_of_the_system(): pass\n")
    return folder


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [tree / "scripts" / "test", *arguments],
        env=environ | {"SIGNER_TEST_NO_SETUP": "1"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    "words, passed, skipped",
    [
        ("--long -k one", 4, 0),
        ("-k one --long", 4, 0),
        ("-k one", 3, 1),
        ("--long tests/unit", 4, 0),
        ("tests/unit --long", 4, 0),
        ("tests/unit/test_it.py::test_another_one", 1, 0),
        ("--fast", 2, 1),
        ("--fast --long -k one", 2, 0),
        ("-k one --long --fast", 2, 0),
        ("--fast tests/system", 1, 0),
    ],
)
def test_pytest_gets_what_is_not_the_scripts_own(tree: Path, words: str, passed: int, skipped: int) -> None:
    done = run(tree, *words.split())
    assert done.returncode == 0, done.stdout + done.stderr
    expected = {name: count for name, count in (("passed", passed), ("skipped", skipped)) if count}
    counts = re.findall(r"(\d+) (passed|skipped)", done.stdout.splitlines()[-2])
    assert {name: int(count) for count, name in counts} == expected, done.stdout


@pytest.mark.parametrize("words", ["--lint -k one", "-k one --lint", "--long --lint"])
def test_linters_take_no_argument_of_pytest(tree: Path, words: str) -> None:
    done = run(tree, *words.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert "--lint takes no other argument" in done.stderr
