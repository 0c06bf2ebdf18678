"""scripts/quickstart, run as a newcomer would: what it shows, and that nothing of it stays, however it ends."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripts.tour.steps import STEPS
from tests.parts import missing
from tests.parts.kit_hosts import why_not_here

ROOT = Path(__file__).parents[3]
QUICKSTART = str(ROOT / "scripts" / "quickstart")
AS_NOBODY = ("setpriv", "--reuid=nobody", f"--regid={os.getgid() or 65534}", "--clear-groups")

pytestmark = [missing.needs_ssh_keygen, pytest.mark.timeout(180)]


def environment(**more: str) -> dict[str, str]:
    """A caller's environment; what it says of a service or a token must not reach the throwaway one."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": "/nonexistent",
        "QUICKSTART_NO_SETUP": "1",  # this very process runs in .venv
        "SIGNER_TLS_CERT_FILE": "/nonexistent/tls.pem",
        "SAFE_SESSION_ADDR": "http://192.0.2.1",
        **more,
    }


def quickstart(*words: str, before: tuple[str, ...] = (), **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, QUICKSTART, *words],
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
    )


def started(*words: str) -> subprocess.Popen[str]:
    """One that runs, as the leader of a group of processes; all that it says is in `stdout`."""
    return subprocess.Popen(
        [QUICKSTART, *words],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_listen_to_ctrl_c,  # noqa: PLW1509 - nothing else runs in this process meanwhile
    )


def folder_of(said: str) -> Path:
    found = re.search(r"/tmp/signer-quickstart\.\w+", said)
    assert found is not None, said
    return Path(found[0])


def processes_of(folder: Path) -> list[str]:
    """Command lines of what still runs with this folder in its arguments or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:  # it ended meanwhile, or is somebody else's
            continue
        if bytes(folder) in words + variables and int(process.name) != os.getpid():
            found.append(words.replace(b"\0", b" ").decode(errors="replace"))
    return found


def check_gone(folder: Path) -> None:
    assert not folder.exists()
    deadline = time.monotonic() + 60  # the api's worker may still be on its way out
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


@missing.needs_sshd
def test_a_real_login_is_shown_with_its_record_and_nothing_is_left() -> None:
    done = quickstart()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^login .*uid=", done.stdout, re.MULTILINE)
    assert re.search(r"^sshd says +Accepted publickey .*ID deploy-agent:llmops \(serial 1\)", done.stdout, re.MULTILINE)
    assert re.search(r"^agent waits .*->  r-\w{10} waits for a human", done.stdout, re.MULTILINE)
    assert re.search(
        r"^human agrees .* is approved: needs 1, given by operator with software key", done.stdout, re.MULTILINE
    )
    assert re.search(r"^agent is in +uid=", done.stdout, re.MULTILINE)
    assert re.search(r"1 +local +deploy-agent +llmops", done.stdout)
    assert re.search(r"2 +deploy-agent +production +ticket 4711 +operator ", done.stdout)
    assert re.search(r"^verify +intact", done.stdout, re.MULTILINE)
    assert len(done.stdout.splitlines()) <= 23
    check_gone(folder_of(done.stdout))


@missing.needs_sshd
def test_the_tour_walks_the_whole_day_and_nothing_is_left() -> None:
    """Each step checks what its command prints, and its exit status."""
    done = quickstart("--tour")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert re.findall(r"^ ?\d+  (.+)$", done.stdout, re.MULTILINE) == [step.title for step in STEPS]
    missed = 0 if why_not_here() == "" else sum(step.on_host for step in STEPS)
    assert done.stdout.count("(left out: ") == missed
    check_gone(folder_of(done.stdout))


@missing.needs_sshd
def test_the_console_is_served_and_an_agent_waits_there_until_ctrl_c() -> None:
    process = started("--console")
    assert process.stdout is not None
    said = ""

    def read_until(pattern: str) -> re.Match[str]:
        nonlocal said
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"it ended without {pattern}:\n{said}")

    try:
        waits = read_until(r"^agent waits (.*)  ->  (r-\w{10}) waits for you")
        words = f"ssh -F {folder_of(said) / 'ssh_config'} quickstart id"
        request, reason = waits[2], "'restart the queue, ticket 4711'"
        assert waits[1].strip() == f"safe-session --role production --reason {reason} --wait 1h {words}"
        address = re.search(r"^console +(http://localhost:\d+/console);", said, re.MULTILINE)
        assert address is not None, said
        with urllib.request.urlopen(address[1], timeout=10) as page:
            assert "Your token" in page.read().decode()
        approve = folder_of(said) / "approve"
        done = subprocess.run([approve, request, "--yes"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        read_until(r"^agent is in +uid=")
        assert read_until(r"^agent waits .*->  (r-\w{10}) waits for you")[1] != request
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said += process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert said.splitlines()[-1].startswith("cleaned up ")
    check_gone(folder_of(said))


@missing.needs_softhsm
@missing.needs_sshd
def test_with_a_ca_key_in_a_token_a_real_login_is_shown_and_nothing_is_left() -> None:
    done = quickstart("--ca", "agent")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^CA +ecdsa-sha2-nistp256 SHA256:\S+ made in a SoftHSM token", done.stdout, re.MULTILINE)
    assert re.search(r"^login .*uid=", done.stdout, re.MULTILINE)
    assert re.search(r"^sshd says +Accepted publickey .*\(serial 1\) CA ECDSA SHA256:", done.stdout, re.MULTILINE)
    assert re.search(r"^verify +intact", done.stdout, re.MULTILINE)
    check_gone(folder_of(done.stdout))


@missing.needs_softhsm
def test_with_a_ca_key_in_a_token_and_without_root_the_certificate_is_shown() -> None:
    if os.getuid() != 0:
        pytest.skip(missing.root())
    if subprocess.run([*AS_NOBODY, "test", "-r", QUICKSTART]).returncode != 0:
        pytest.skip("this tree is closed to user nobody")
    done = quickstart("--ca", "agent", before=AS_NOBODY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Signing CA: ECDSA SHA256:", done.stdout)
    check_gone(folder_of(done.stdout))


def test_where_nobody_can_log_in_the_certificate_is_shown_instead() -> None:
    if os.getuid() != 0:
        pytest.skip(missing.root())
    if subprocess.run([*AS_NOBODY, "test", "-r", QUICKSTART]).returncode != 0:
        pytest.skip("this tree is closed to user nobody")
    done = quickstart(before=AS_NOBODY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the shell of nobody lets nobody log in" in done.stdout
    assert 'Key ID: "deploy-agent:llmops"' in done.stdout
    assert re.search(r"^verify +intact", done.stdout, re.MULTILINE)
    check_gone(folder_of(done.stdout))


@missing.needs_sshd
def test_a_login_that_fails_is_status_1_with_the_logs_and_nothing_is_left(tmp_path: Path) -> None:
    broken = tmp_path / "ssh"
    broken.write_text("#!/bin/sh\necho this ssh is broken >&2\nexit 255\n")
    broken.chmod(0o755)
    done = quickstart(PATH=f"{tmp_path}:{environment()['PATH']}")
    assert done.returncode == 1
    assert "this ssh is broken" in done.stderr
    assert "quickstart: error: the login failed" in done.stderr
    assert "signer: serving on" in done.stderr
    check_gone(folder_of(done.stdout))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ended_halfway_it_leaves_nothing(number: signal.Signals, status: int) -> None:
    process = started()
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("service "):
            break
    os.killpg(process.pid, number)  # as a terminal does
    said += process.communicate(timeout=60)[0]
    assert process.returncode == status, said
    check_gone(folder_of(said))


def _listen_to_ctrl_c() -> None:
    """A test run in the background hands on an ignored SIGINT, which no shell can trap."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def kept() -> Iterator[str]:
    """What --keep printed; stopped at the end, as it says."""
    done = quickstart("--keep")
    folder = folder_of(done.stdout)
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        assert folder.is_dir()
        yield done.stdout
    finally:
        subprocess.run([str(folder / "stop")], check=True, timeout=60)
    check_gone(folder)


def pasted(said: str, begins: str) -> subprocess.CompletedProcess[str]:
    """Runs the printed line that begins so, after all the lines that it asks to be pasted first."""
    lines = [line.strip() for line in said.partition("Paste this")[2].splitlines()]
    first = [line for line in lines if line.startswith(("Q=", "export "))]
    (line,) = [line for line in lines if line.startswith(begins)]
    script = "\n".join([*first, line])
    shell = {name: environment()[name] for name in ("PATH", "HOME")}
    return subprocess.run(["bash", "-ec", script], env=shell, capture_output=True, text=True, timeout=60)


@missing.needs_sshd
def test_kept_running_each_printed_line_works_until_it_is_stopped() -> None:
    with kept() as said:
        uptime = pasted(said.replace("ssh_config quickstart", "ssh_config quickstart id"), "safe-session")
        assert "uid=" in uptime.stdout, uptime.stderr
        assert pasted(said, "signer certs list").stdout.count("deploy-agent") >= 2
        refused = pasted(said, "signer policy explain")
        assert (refused.returncode, "2h" in refused.stdout) == (1, True), refused.stderr
        signed = pasted(said, "python -c")
        assert "signed_key" in signed.stdout, signed.stderr
        if not missing.bao():
            assert "cert-v01@openssh.com" in pasted(said, "bao write").stdout


def test_its_folder_is_closed_and_each_secret_in_it_is_its_owners_alone() -> None:
    with kept() as said:
        folder = folder_of(said)
        secrets = [
            folder / name for name in ("ca", "id", "deploy-agent.token", "operator.token", "deploy-agent.header")
        ]
        assert [oct(path.stat().st_mode & 0o777) for path in secrets] == ["0o600"] * len(secrets)
        assert folder.stat().st_mode & 0o066 == 0  # nobody else lists or writes it


@pytest.mark.parametrize(
    "words",
    [
        ("--kept",),
        ("--ca",),
        ("--ca", "hsm"),
        ("--keep", "now"),
        ("--ca", "agent", "x"),
        ("--tour", "--keep"),
        ("--console", "--keep"),
        ("--console", "--tour"),
    ],
)
def test_another_word_than_those_is_wrong_use(words: tuple[str, ...]) -> None:
    done = quickstart(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert shlex.split(done.stderr)[0] == "usage:"
