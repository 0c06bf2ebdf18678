"""The client as one file: the same bytes each time, small, complete, and as good as the installed command."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.parts.keys import Key
from tests.parts.standin import ROOT, Client, Signer, Standin

MAX_SIZE = 250_000  # bytes


def build(file: Path, **more: str) -> str:
    """Builds the client into `file`; returns what the build says."""
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "build-client", file],
        env={"PATH": os.environ["PATH"]} | more,
        cwd=file.parent, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("client") / "safe-session"
    build(file)
    return file


def test_a_second_build_elsewhere_has_the_same_bytes(built: Path, tmp_path: Path) -> None:
    said = build(tmp_path / "client", PYTHONHASHSEED="7", TZ="Asia/Tokyo")
    assert (tmp_path / "client").read_bytes() == built.read_bytes()
    assert "sha256 " in said


def test_it_is_small_and_has_byte_code_beside_each_source(built: Path) -> None:
    assert built.stat().st_size < MAX_SIZE
    assert built.stat().st_mode & 0o777 == 0o755
    names = set(zipfile.ZipFile(built).namelist())
    sources = {name for name in names if name.endswith(".py")}
    assert names == sources | {name + "c" for name in sources}
    rooms = {name.split("/")[1] for name in sources if name.count("/") > 1}
    assert rooms == {"safe_session", "ssh"}, "no part of the service"
    in_tree = {f"signer/safe_session/{path.name}" for path in (ROOT / "signer" / "safe_session").glob("*.py")}
    assert in_tree - {"signer/safe_session/__main__.py"} <= sources


def test_the_byte_code_is_what_runs(built: Path, tmp_path: Path) -> None:
    """A copy whose sources all fail still works."""
    copy = tmp_path / "copy"
    with zipfile.ZipFile(built) as archive, zipfile.ZipFile(copy, "w") as changed:
        for name in archive.namelist():
            is_source = name.endswith(".py") and name != "__main__.py"
            changed.writestr(name, b"raise AssertionError" if is_source else archive.read(name))
    done = subprocess.run([sys.executable, "-I", copy, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout[:13]) == (0, "safe-session "), done.stderr


def test_it_starts_at_most_10_ms_slower_than_the_installed_command(built: Path) -> None:
    """By the processor's time, by turns, so that a busy machine does not decide."""
    installed = Path(sys.executable).with_name("safe-session")
    spent: dict[Path, list[float]] = {installed: [], built: []}
    for _ in range(15):
        for program, times in spent.items():
            process = subprocess.Popen([sys.executable, "-I", program, "--version"], stdout=subprocess.DEVNULL)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            assert process.returncode == 0
            times.append(used.ru_utime + used.ru_stime)
    before, after = (statistics.median(times) for times in spent.values())
    assert after - before < 0.010, spent


def run_built(built: Path, client: Client, address: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = client.environment(address)
    del environment["PYTHONPATH"]
    return subprocess.run(
        [sys.executable, "-IS", built, *words], env=environment, capture_output=True, text=True, timeout=60
    )


def test_it_logs_in_without_anything_installed(built: Path, client: Client, ca: Key) -> None:
    """-IS: neither site-packages nor this tree can be imported."""
    with Standin(Signer(client.folder, ca)) as api:
        done = run_built(built, client, api.address, "-v", "exec", "--", "ssh-add", "-L")
    assert done.returncode == 0, done.stderr
    assert "ssh-ed25519-cert-v01@openssh.com" in done.stdout
    assert "safe-session: llmops for 15 min (serial 4711" in done.stderr


@pytest.mark.parametrize("words,status", [(["--help"], 0), (["ssh"], 64), (["whoami"], 69), (["wait", "r-a"], 69)])
def test_every_command_is_in_it(built: Path, client: Client, words: list[str], status: int) -> None:
    assert run_built(built, client, "http://127.0.0.1:1", *words).returncode == status
