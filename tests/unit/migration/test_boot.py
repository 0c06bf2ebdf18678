"""What cutover and rollback record for a reboot, and what `scripts/container/start-recorded` makes of it."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from signer.errors import SignerError
from signer.migration.boot import boot_file, is_recorded, record_boot, render_boot
from signer.migration.compose import Compose
from signer.migration.config import ComposeFacts
from tests.parts import missing
from tests.parts.documents import ROOT
from tests.parts.hosts import make_place

SCRIPT = ROOT / "scripts" / "container" / "start-recorded"
UNIT = (ROOT / "scripts" / "systemd" / "signer-container.service").read_text()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of root's alone: the script trusts no other."""
    place = make_place(f"boot-{os.getpid()}")
    yield place
    subprocess.run(["rm", "-rf", "--one-file-system", place], check=True)


def composed(folder: Path, **variables: str) -> Compose:
    """A compose command that shows how it was run."""
    program = folder / "compose"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{folder}/words; env >{folder}/variables\n')
    program.chmod(0o755)
    for name in ("base.yaml", "local ca.yaml"):
        (folder / name).write_text("services: {}\n")
    facts = ComposeFacts(
        (str(program), "two words"), "podman", "safe-session", folder / "base.yaml", folder / "local ca.yaml",
        "safe-session-api", variables,
    )  # fmt: skip
    return Compose(facts, {"PATH": "/usr/bin:/bin", "HOME": "/root", "SECRET": "not passed on"})


def start(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *words, "--file", folder / "boot"],
        capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin", "CALLERS": "own"},
    )  # fmt: skip


def test_the_file_lies_beside_the_evidence_where_the_unit_looks_for_it() -> None:
    place = boot_file(Path("/var/lib/safe-session/evidence"))
    assert f"ConditionPathExists={place}\n" in UNIT
    assert f"record={place} " in SCRIPT.read_text()


def test_the_key_is_rendered_and_the_agent_runs_before_the_container_starts() -> None:
    after = {name for line in re.findall(r"^After=(.*)$", UNIT, re.MULTILINE) for name in line.split()}
    renders = {"signer-ca-render.service", "signer-ca-credential.service"}
    assert renders | {"signer-agent.service", "network-online.target", "podman.service"} <= after
    runbook = (ROOT / "runbooks" / "ca-key.md").read_text()
    for name in renders:
        assert f"{name} /etc/systemd/system/" in runbook
        text = (ROOT / "scripts" / "systemd" / name).read_text()
        assert "\nBefore=signer-keeper.service signer-container.service\n" in text
    rivals = re.search(r"^Conflicts=(.*)$", UNIT, re.MULTILINE)
    assert rivals is not None
    assert rivals[1].split() == ["signer-keeper.service", "signer-api.service", "signer-api.socket"]


@missing.needs_root
@pytest.mark.parametrize("with_overlay", [True, False])
def test_a_reboot_starts_exactly_what_was_recorded(folder: Path, with_overlay: bool) -> None:
    compose = composed(folder, PLATFORM_RUNTIME_X="a 'b' $c\\d", SIGNER_Y="")
    record_boot(folder / "boot", compose, with_overlay=with_overlay)
    assert stat.S_IMODE((folder / "boot").stat().st_mode) == 0o600
    assert is_recorded(folder / "boot", compose, with_overlay=with_overlay)
    assert not is_recorded(folder / "boot", compose, with_overlay=not with_overlay)
    shown = start(folder, "--show")
    assert shlex.split(shown.stdout) == compose.up_line(with_overlay)
    assert not (folder / "words").exists()
    done = start(folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "words").read_text().splitlines() == compose.up_line(with_overlay)[1:]
    variables = set((folder / "variables").read_text().splitlines()) - {f"PWD={Path.cwd()}"}
    expected = {"PATH=/usr/bin:/bin", "HOME=/root", "PLATFORM_RUNTIME_X=a 'b' $c\\d", "SIGNER_Y="}
    assert {line for line in variables if not line.startswith(("_=", "SHLVL=", "OLDPWD="))} == expected
    assert start(folder, "--stop").returncode == 0
    assert (folder / "words").read_text().splitlines()[-2:] == ["stop", "safe-session-api"]


def _others_may_write(folder: Path) -> None:
    (folder / "boot").chmod(0o620)


def _another_user_owns_it(folder: Path) -> None:
    os.chown(folder / "boot", 65534, 65534)


def _others_may_replace_it(folder: Path) -> None:
    folder.chmod(0o777)


def _it_is_a_link(folder: Path) -> None:
    (folder / "boot").rename(folder / "real")
    (folder / "boot").symlink_to("real")


def _a_line_is_strange(folder: Path) -> None:
    with (folder / "boot").open("a") as file:
        file.write("exec=/bin/sh\n")


def _a_file_is_gone(folder: Path) -> None:
    (folder / "base.yaml").unlink()


def _there_is_none(folder: Path) -> None:
    (folder / "boot").unlink()


@missing.needs_root
@pytest.mark.parametrize(
    "spoil, why",
    [
        (_others_may_write, "can be written by others"),
        (_another_user_owns_it, "can be written by others"),
        (_others_may_replace_it, "can be written by others"),
        (_it_is_a_link, "is not a regular file"),
        (_a_line_is_strange, "a line that is not understood"),
        (_a_file_is_gone, "base.yaml is missing"),
        (_there_is_none, "no cutover or rollback has recorded"),
    ],
)
def test_a_record_that_is_not_roots_alone_or_not_whole_starts_nothing(
    folder: Path, spoil: Callable[[Path], None], why: str
) -> None:
    record_boot(folder / "boot", composed(folder), with_overlay=True)
    spoil(folder)
    done = start(folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert why in done.stderr
    assert not (folder / "words").exists()


@missing.needs_root
def test_a_folder_that_is_not_there_yet_is_named_and_nothing_is_started(folder: Path) -> None:
    key_dir = folder / "signer-ca"
    compose = composed(folder, PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_DIR=str(key_dir))
    record_boot(folder / "boot", compose, with_overlay=True)
    ended = start(folder)
    assert ended.returncode == 1
    assert f"the folder {key_dir} is missing, which PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_DIR" in ended.stderr
    assert not (folder / "words").exists()
    assert start(folder, "--stop").returncode == 0
    (folder / "words").unlink()
    key_dir.mkdir()
    assert start(folder).returncode == 0


@missing.needs_root
@pytest.mark.parametrize("engine", ["podman-compose", "docker-compose"])
def test_a_folder_that_only_the_compose_files_name_is_named_too(folder: Path, engine: str) -> None:
    """What `${NAME:-/folder}` means is in no record; the compose command says it. It starts nothing here."""
    real = Path(sys.executable).with_name(engine)
    if lacking := (missing.podman_compose if engine == "podman-compose" else missing.docker_compose)():
        pytest.skip(lacking)
    compose = composed(folder)
    program = folder / "compose"
    fake = program.read_text().split("\n", 1)[1]
    program.write_text(
        f'#!/bin/sh\nshift\ncase " $* " in *" config "*) exec {shlex.quote(str(real))} "$@" ;; esac\n{fake}'
    )
    policy, vault, made = folder / "policy", folder / "vault of it", folder / "made"
    (folder / "base.yaml").write_text(
        "services:\n"
        "  safe-session-api:\n"
        "    image: x\n"
        "    volumes:\n"
        "      - ledger:/var/lib/signer\n"
        f"      - {{ type: bind, source: '${{POLICY:-{policy}}}', target: /etc/signer, "
        "bind: { create_host_path: false } }\n"
        f"      - {{ type: bind, source: '${{VAULT:-{vault}}}', target: /run/vault, "
        "bind: { create_host_path: false } }\n"
        f"      - {{ type: bind, source: {made}, target: /made, bind: {{ create_host_path: true }} }}\n"
        "  another:\n"
        "    image: x\n"
        "    volumes:\n"
        f"      - {{ type: bind, source: {folder}/elsewhere, target: /e, bind: {{ create_host_path: false }} }}\n"
        "volumes:\n"
        "  ledger:\n"
    )
    record_boot(folder / "boot", compose, with_overlay=False)
    for path, target in ((policy, "/etc/signer"), (vault, "/run/vault")):
        ended = start(folder)
        assert ended.returncode == 1
        assert f"{path} is missing, which the compose files mount at {target}" in ended.stderr
        assert not (folder / "words").exists()
        path.mkdir()
    assert start(folder).returncode == 0
    assert (folder / "words").exists()


def test_a_record_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SignerError) as failed:
        record_boot(tmp_path / "none" / "boot", composed(tmp_path), with_overlay=True)
    assert failed.value.code == "boot_not_recorded"


def test_a_value_of_two_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SignerError, match="more than one line"):
        render_boot(composed(tmp_path, X="a\nfile=/b"), with_overlay=False)
