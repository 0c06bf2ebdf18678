"""`scripts/container/compose`: our sentence where an engine prints a traceback, and else compose itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.documents import ROOT

SCRIPT = ROOT / "scripts" / "container" / "compose"
FILES = ("-f", "overlays/safe-session.yaml", "-f", "overlays/safe-session-local-ca.yaml")
RECORDED = (ROOT / "tests" / "data" / "preflight" / "compose-versions.txt").read_text().partition("\n")[2]
VERSIONS = {part.splitlines()[0]: part.split("\n", 1)[1] for part in RECORDED.split("\n\n")}
TARGETS = {"POLICY": "/etc/signer", "VAULT": "/run/signer-vault", "CA_KEY": "/run/signer-ca"}
REAL = [
    pytest.param("podman-compose", marks=missing.needs_podman_compose),
    pytest.param("docker-compose", marks=missing.needs_docker_compose),
]


def compose(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *words], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": "/root"} | variables,
    )  # fmt: skip


def fake(folder: Path, version: str) -> str:
    """A compose command with the words of a recorded version; it starts nothing, and writes how it was run."""
    program = folder / "compose"
    (folder / "version").write_text(version)
    program.write_text(
        f'#!/bin/sh\nif [ "$1" = version ]; then exec cat {folder}/version; fi\nprintf "%s\\n" "$@" >{folder}/words\n'
    )
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("command", ["up", "down"])
def test_a_compose_command_that_is_too_old_runs_nothing(tmp_path: Path, name: str, command: str) -> None:
    done = compose(*FILES[:2], command, PLATFORM_RUNTIME_COMPOSE=fake(tmp_path, VERSIONS[name]))
    if name.endswith(": too old"):
        assert done.returncode == 1
        assert done.stderr.startswith("compose: error: compose_too_old: ")
        assert "\ncompose: hint: install a later one: runbooks/install/container.md" in done.stderr
        assert not (tmp_path / "words").exists()
    else:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "words").read_text().split() == [*FILES[:2], command]


@pytest.mark.parametrize("engine", REAL)
def test_a_missing_folder_is_named_by_our_sentence(tmp_path: Path, engine: str) -> None:
    variables = {"PLATFORM_RUNTIME_COMPOSE": engine}
    for name in TARGETS:
        folder = tmp_path / name
        variables[f"PLATFORM_RUNTIME_SAFE_SESSION_{name}_DIR"] = str(folder)
    for name, target in TARGETS.items():
        folder = tmp_path / name
        done = compose(*FILES, "-p", "never-started", "up", "-d", **variables)
        assert done.returncode == 1
        told = f"compose: error: {folder} is missing, which the service mounts at {target}"
        assert done.stderr.splitlines()[0] == told
        assert done.stderr.count("\n") == 2
        assert not folder.exists()
        folder.mkdir()


@pytest.mark.parametrize("engine", REAL)
def test_a_variable_without_a_value_is_named_with_what_it_is_for(engine: str) -> None:
    done = compose(*FILES, "up", "-d", PLATFORM_RUNTIME_COMPOSE=engine)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "compose: error: PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_DIR has no value\n"
        "compose: hint: name the folder that holds the rendered CA key as ca\n"
    )


@pytest.mark.parametrize("engine", REAL)
def test_files_that_compose_does_not_understand_are_said_in_one_line(tmp_path: Path, engine: str) -> None:
    (tmp_path / "bad.yaml").write_text("services: {a: [}\n")
    done = compose("-f", str(tmp_path / "bad.yaml"), "up", "-d", PLATFORM_RUNTIME_COMPOSE=engine)
    assert done.returncode == 1
    assert done.stderr.startswith("compose: error: compose does not understand its files: ")
    assert done.stderr.count("\n") == 2


@pytest.mark.parametrize(
    "words, sentence, hint",
    [
        ((), "no command of compose is given", "`up -d` starts the service"),
        (FILES, "no command of compose is given", "`up -d` starts the service"),
        (("-f", "overlays/none.yaml", "up"), "overlays/none.yaml is missing", "run it in a checkout"),
    ],
)
def test_wrong_use_is_said(tmp_path: Path, words: tuple[str, ...], sentence: str, hint: str) -> None:
    done = compose(*words, PLATFORM_RUNTIME_COMPOSE=fake(tmp_path, "podman-compose version 1.6.0\n"))
    assert done.returncode == 1
    assert sentence in done.stderr.splitlines()[0]
    assert hint in done.stderr.splitlines()[1]
    assert not (tmp_path / "words").exists()


@pytest.mark.parametrize("value", ["next", "up", "-f", "--help"])
def test_the_value_of_an_option_is_never_a_command(tmp_path: Path, value: str) -> None:
    words = [*FILES[:2], "-p", value, "down"]
    done = compose(*words, PLATFORM_RUNTIME_COMPOSE=fake(tmp_path, "podman-compose version 1.6.0\n"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "words").read_text().split() == words


@pytest.mark.parametrize("command", ["no-such-compose", "docker no-such-plugin"])
def test_a_compose_command_that_is_not_there_is_missing(command: str) -> None:
    done = compose(*FILES, "up", PLATFORM_RUNTIME_COMPOSE=command)
    assert done.returncode == 1
    assert done.stderr.startswith(f"compose: error: compose_missing: there is no {command}\n")
