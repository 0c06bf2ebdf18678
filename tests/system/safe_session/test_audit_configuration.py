"""The session's options reach every ssh that runs inside: jump hosts, scp, sftp, rsync, git and scripts."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.keys import Key, make_key
from tests.parts.sshd import Sshd, StartSshd
from tests.parts.standin import Client, Signer, Standin

pytestmark = missing.needs_sshd

HIDING = [
    ("IdentitiesOnly yes",),
    ("IdentityAgent none",),
    ("IdentityAgent /nowhere/agent",),
    ("PubkeyAuthentication no",),
]
hiding = pytest.mark.parametrize("lines", HIDING, ids=lambda lines: lines[0])


@pytest.fixture
def api(client: Client, ca: Key) -> Iterator[Standin]:
    with Standin(Signer(client.folder, ca)) as running:
        yield running
    assert client.left_behind() == []


@pytest.fixture
def sshd(start_sshd: StartSshd, ca: Key) -> Sshd:
    return start_sshd(ca.public_line)


@pytest.fixture
def jump(start_sshd: StartSshd, ca: Key) -> Sshd:
    return start_sshd(ca.public_line)


def configure(client: Client, hosts: dict[str, Sshd], *lines: str) -> Path:
    """A user's ssh_config for these hosts; ssh finds the home in the password database, hence -F."""
    text = list(lines)
    for name, sshd in hosts.items():
        options = [word.removeprefix("-o").replace("=", " ", 1) for word in sshd.ssh_options()[2:]]
        options = [line for line in options if not line.startswith("PreferredAuthentications")]
        text += [f"Host {name}", "HostName 127.0.0.1", *options]
    path = client.folder / "config"
    path.write_text("\n".join(text) + "\n")
    return path


def logins(sshd: Sshd) -> int:
    return sshd.log().count("Accepted publickey for ")


@hiding
@pytest.mark.parametrize("way", ["-J", "ProxyJump", "ProxyCommand"])
def test_audit_f4_a_jump_host_is_offered_the_certificate(
    client: Client, api: Standin, sshd: Sshd, jump: Sshd, lines: tuple[str, ...], way: str
) -> None:
    words = ["-J", "jump"] if way == "-J" else []
    more = {
        "ProxyJump": ("ProxyJump jump",),
        "ProxyCommand": (f"ProxyCommand ssh -F {client.folder}/config -W %h:%p jump",),
    }
    config = configure(client, {"rs2000": sshd, "jump": jump}, *lines)
    if words == []:
        config.write_text("\n".join(["Host rs2000", *more[way], "Host *", config.read_text()]))
    done = client.run(api.address, "ssh", "-F", str(config), *words, "rs2000", "echo in")
    assert (done.returncode, done.stdout) == (0, "in\n"), done.stderr
    assert (logins(jump), logins(sshd)) == (1, 1)
    assert len(api.asked) == 1


@hiding
def test_audit_f5_ssh_scp_sftp_and_scripts_inside_exec_offer_the_certificate(
    client: Client, api: Standin, sshd: Sshd, lines: tuple[str, ...]
) -> None:
    config = configure(client, {"rs2000": sshd}, *lines)
    there = client.folder / "there"
    there.mkdir()
    (client.folder / "file").write_text("content")
    batch = client.folder / "batch"
    batch.write_text(f"put {client.folder}/file {there}/by-sftp\n")
    scp = shutil.which("scp")
    assert scp
    commands = [
        ["scp", "-F", str(config), f"{client.folder}/file", f"rs2000:{there}/by-scp"],
        [scp, "-F", str(config), f"{client.folder}/file", f"rs2000:{there}/by-path"],
        ["scp", "-O", "-F", str(config), f"{client.folder}/file", f"rs2000:{there}/by-old-scp"],
        ["sftp", "-F", str(config), "-b", str(batch), "rs2000"],
        ["ssh", "-F", str(config), "rs2000", f"cp {client.folder}/file {there}/by-ssh"],
        ["sh", "-c", f"scp -F {config} {client.folder}/file rs2000:{there}/by-script"],
    ]
    for command in commands:
        done = client.run(api.address, "exec", "--", *command)
        assert done.returncode == 0, (command, done.stderr)
    names = ["by-old-scp", "by-path", "by-scp", "by-script", "by-sftp", "by-ssh"]
    assert sorted(path.name for path in there.iterdir()) == names
    assert {path.read_text() for path in there.iterdir()} == {"content"}


@hiding
@pytest.mark.skipif(shutil.which("rsync") is None, reason="no rsync")
def test_audit_f5_rsync_inside_exec_offers_the_certificate(
    client: Client, api: Standin, sshd: Sshd, lines: tuple[str, ...]
) -> None:
    config = configure(client, {"rs2000": sshd}, *lines)
    (client.folder / "file").write_text("content")
    words = ["rsync", "-e", f"ssh -F {config}", f"{client.folder}/file", f"rs2000:{client.folder}/by-rsync"]
    done = client.run(api.address, "exec", "--", *words)
    assert done.returncode == 0, done.stderr
    assert (client.folder / "by-rsync").read_text() == "content"


@hiding
def test_audit_f5_git_inside_exec_offers_the_certificate(
    client: Client, api: Standin, sshd: Sshd, lines: tuple[str, ...]
) -> None:
    config = configure(client, {"rs2000": sshd}, *lines)
    origin = client.folder / "origin"
    subprocess.run(["git", "init", "-q", "--bare", str(origin)], check=True)
    done = client.run(
        api.address, "exec", "--", "git", "ls-remote", f"rs2000:{origin}", GIT_SSH_COMMAND=f"ssh -F {config}"
    )
    assert done.returncode == 0, done.stderr
    assert logins(sshd) == 1


def test_audit_f5_a_key_of_the_users_own_is_not_used_inside(
    client: Client, api: Standin, start_sshd: StartSshd, ca: Key
) -> None:
    """As with `safe-session ssh`: a session logs in with its certificate and with nothing else."""
    mine = make_key(client.folder, "ed25519", "mine")
    (client.folder / "authorized").write_text(mine.public_line + "\n")
    sshd = start_sshd(ca.public_line, principals=("other",), extra=[f"AuthorizedKeysFile {client.folder}/authorized"])
    assert sshd.login(identity=mine.private).ok, "the key must open the door for this test to mean something"
    config = configure(client, {"rs2000": sshd}, f"IdentityFile {mine.private}")
    done = client.run(api.address, "exec", "--", "ssh", "-F", str(config), "rs2000", "true")
    assert done.returncode == 255


def test_audit_f5_arguments_and_signals_reach_the_real_ssh(client: Client, api: Standin, sshd: Sshd) -> None:
    config = configure(client, {"rs2000": sshd})
    words = ["ssh", "-F", str(config), "rs2000", "printf '%s|' 'a b' \"it's\" '$HOME' '*' '\u00e9'; yes"]
    script = '"$@" | head -c 20; echo'
    done = client.run(api.address, "exec", "--", "bash", "-c", script, "-", *words)
    assert done.stdout == "a b|it's|$HOME|*|\u00e9|\n"


def test_audit_f5_a_session_inside_a_session_uses_its_own_agent(client: Client, api: Standin, sshd: Sshd) -> None:
    config = configure(client, {"rs2000": sshd}, "IdentitiesOnly yes")
    inner = [client.environment("")["PATH"], "-m", "signer.safe_session", "ssh", "-F", str(config), "rs2000", "echo in"]
    done = client.run(api.address, "exec", "--", sys.executable, *inner[1:])
    assert (done.returncode, done.stdout) == (0, "in\n"), done.stderr
    assert len(api.asked) == 2


def test_audit_f5_killed_with_9_no_script_outlives_us(client: Client, api: Standin) -> None:
    mark = client.folder / "running"
    process = client.start(
        api.address, "exec", "--", "sh", "-c", f"which ssh > {mark}.tmp; mv {mark}.tmp {mark}; exec sleep 60"
    )
    deadline = time.monotonic() + 20
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    script = Path(mark.read_text().strip())
    assert client.runtime in script.parents
    assert (script.stat().st_mode & 0o777, script.parent.stat().st_mode & 0o777) == (0o700, 0o700)
    process.kill()
    while client.left_behind() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not script.exists()


@missing.needs_root
def test_audit_f5_a_runtime_folder_mounted_noexec_is_not_used(client: Client, api: Standin) -> None:
    folder = client.folder / "noexec"
    folder.mkdir(mode=0o700)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec,mode=700", "none", folder], check=False).returncode:
        pytest.skip("no right to mount")
    try:
        done = client.run(api.address, "exec", "--", "sh", "-c", "command -v ssh", XDG_RUNTIME_DIR=str(folder))
    finally:
        subprocess.run(["umount", folder], check=True)
    assert done.stdout.startswith("/tmp/safe-session-")
    assert done.stderr == ""


def test_audit_f5_it_says_why_the_options_cannot_be_handed_down(client: Client, api: Standin) -> None:
    spy = client.folder / "spy"
    spy.mkdir()
    (spy / "sitecustomize.py").write_text(
        "import os\nmkdir = os.mkdir\n"
        "def fail(path, mode=0o777):\n"
        "    if path.endswith('/bin'): raise OSError(28, 'No space left on device')\n"
        "    mkdir(path, mode)\n"
        "os.mkdir = fail\n"
    )
    path = f"{spy}:{client.environment('')['PYTHONPATH']}"
    done = client.run(api.address, "exec", "--", "sh", "-c", "ssh-add -l", PYTHONPATH=path)
    assert "ED25519-CERT" in done.stdout
    assert "note: cannot put a script for ssh into" in done.stderr
    assert "no space left on device" in done.stderr


def test_audit_f11_no_master_stays_logged_in_after_exec(client: Client, api: Standin, sshd: Sshd) -> None:
    shared = ("ControlMaster auto", f"ControlPath {client.runtime}/master-%C", "ControlPersist 60")
    config = configure(client, {"rs2000": sshd}, *shared)
    for command in (
        ["ssh", "-F", str(config), "rs2000", "echo in"],
        [
            "ssh",
            "-F",
            str(config),
            "-o",
            "ControlMaster=yes",
            "-o",
            f"ControlPath={client.runtime}/m",
            "rs2000",
            "echo in",
        ],
        ["sh", "-c", f"ssh -F {config} rs2000 echo in"],
    ):
        done = client.run(api.address, "exec", "--", *command)
        assert (done.returncode, done.stdout) == (0, "in\n"), done.stderr
        assert client.left_behind() == []
    said = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(client.runtime) not in said


@pytest.mark.parametrize(
    "words", [["-V"], ["-Q", "cipher"], ["-G", "rs2000"], ["-TG", "rs2000"], ["-O", "check", "rs2000"]], ids=" ".join
)
def test_audit_f5_a_question_to_ssh_itself_fetches_nothing(client: Client, words: list[str]) -> None:
    """Editors and git ask before they log in; no setting is needed for it, either."""
    config = client.folder / "config"
    config.write_text("Host rs2000\nHostName 127.0.0.1\nIdentityAgent none\n")
    plain = subprocess.run(["ssh", "-F", str(config), *words], capture_output=True, text=True)
    with Standin(lambda _: b"") as api:
        done = client.run(
            api.address, "ssh", "-F", str(config), *words, SAFE_SESSION_TOKEN_FILE="", SAFE_SESSION_ROLE=""
        )
        assert api.asked == []
    assert done.returncode == plain.returncode
    assert client.left_behind() == []
    if words[0] in ("-V", "-Q"):
        assert (done.stdout, done.stderr) == (plain.stdout, plain.stderr)
    elif words[0] != "-O":
        assert "identityagent SSH_AUTH_SOCK" in done.stdout
        assert "hostname 127.0.0.1" in done.stdout
