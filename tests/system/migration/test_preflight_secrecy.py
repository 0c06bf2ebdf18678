"""The preflight gives no key material away and writes nothing: seen from outside, by strace and in /proc."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parts import missing
from tests.parts.hosts import SCRIPT, Host
from tests.parts.keys import make_key

Change = Callable[[Host], None]


def _as_it_is(host: Host) -> None:
    """A good key."""


def _with_a_passphrase(host: Host) -> None:
    host.put_key(make_key(host.folder, "ed25519", "locked", passphrase="correct horse").private.read_bytes())


def _readable_by_all(host: Host) -> None:
    host.key.chmod(0o644)


def _of_the_old_form(host: Host) -> None:
    other = make_key(host.folder, "rsa3072", "old")
    subprocess.run(["ssh-keygen", "-q", "-p", "-m", "PEM", "-N", "", "-f", other.private], check=True)
    host.put_key(other.private.read_bytes())


def _with_something_before_it(host: Host) -> None:
    host.put_key(b"# rendered\n" + host.key.read_bytes())


def _cut_off(host: Host) -> None:
    host.put_key(host.key.read_bytes()[:-60])


def _of_one_line(host: Host) -> None:
    host.put_key(b"a-token-that-is-no-key-but-a-secret-all-the-same\n")


def _large(host: Host) -> None:
    host.put_key(host.key.read_bytes() * 60)


def _rsa(host: Host) -> None:
    host.put_key(make_key(host.folder, "rsa3072", "rsa").private.read_bytes())


KEYS: list[Change] = [
    _as_it_is, _with_a_passphrase, _readable_by_all, _of_the_old_form, _with_something_before_it, _cut_off,
    _of_one_line, _large, _rsa,
]  # fmt: skip


def _lines_of(host: Host) -> list[bytes]:
    lines = host.secrets()
    assert lines
    return lines


@pytest.mark.parametrize("change", KEYS)
@pytest.mark.parametrize("bash", [(), ("-x",), ("-v",), ("-xv",)], ids=["plain", "x", "v", "xv"])
def test_no_line_of_a_key_is_in_what_it_says_or_traces(host: Host, change: Change, bash: tuple[str, ...]) -> None:
    change(host)
    told = host.run("--json", bash=bash)  # compares all that was said with all lines of the key
    assert told.stdout.startswith("{")
    if "-x" in bash:
        assert "+ check_key_content" in told.stderr
    assert _lines_of(host)


def test_audit_4e4_the_environment_cannot_ask_for_a_trace(host: Host) -> None:
    host.environ |= {"SHELLOPTS": "xtrace:verbose", "PS4": "+$LINENO "}
    told = host.run()
    assert told.stderr == ""
    assert "check_key_content" not in told.stdout


@pytest.mark.parametrize("name", ["podman-compose", "docker-compose"])
def test_other_secrets_in_the_configuration_are_not_traced(host: Host, name: str) -> None:
    """Compose's answer holds the service's whole environment."""
    if name == "docker-compose":
        host.use_docker()
    secret = "hvs.a-token-that-nobody-should-see"
    host.change(
        "merged.yaml", "      SIGNER_MODE: local\n", f"      SIGNER_MODE: local\n      SIGNER_MOUNTS: {secret}\n"
    )
    host.authorize("root", f'environment="T={secret}" {make_key(host.folder, "ed25519", "mine").public_line}')
    host.write("compose-message", f"{secret} PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_DIR\n")
    told = host.run(bash=("-x",))
    assert told.codes("FAIL", "warn") == set()
    assert secret not in told.stdout + told.stderr


@missing.needs_strace
@pytest.mark.parametrize("change", KEYS)
def test_system_calls_pass_no_key_on_and_write_no_file(host: Host, tmp_path: Path, change: Change) -> None:
    """Arguments and environment of every program, every write to a pipe or a file, every file opened for writing."""
    change(host)
    log = tmp_path / "strace"
    calls = "execve,write,writev,pwrite64,sendto,sendmsg,openat,open,creat,memfd_create,mkdir,mkdirat,rename,renameat2,"
    calls += (
        "unlink,unlinkat,link,linkat,symlink,symlinkat,chmod,fchmod,fchmodat,chown,fchownat,lchown,utimensat,setxattr"
    )
    strace = ("strace", "-f", "-qq", "-v", "-s", "1000000", "-e", f"trace={calls}", "-o", str(log))
    subprocess.run(host.command(under=strace), capture_output=True, env=host.environment(), cwd="/", timeout=110)
    text = log.read_bytes()
    assert b'"ssh-keygen"' in text or change in (_readable_by_all, _of_the_old_form, _of_one_line, _large,
                                                 _with_something_before_it, _cut_off)  # fmt: skip
    assert host.secrets_in(text) == []
    assert [call for call in text.decode(errors="replace").splitlines() if _CHANGES.search(call)] == []


# A call that could change a file system: opening to write anything but a device or a pipe, and all that neither opens,
# writes to what is open, nor starts a program.
_CHANGES = re.compile(
    r"(?:open|openat|creat)\((?!.*\"/dev/(?:null|tty|fd/)).*O_(?:WRONLY|RDWR|CREAT)"
    r"|^\d+ +(?!open|creat|write|send|execve|pwrite|<|\+|-|\?)\w+\("
)


def test_key_is_opened_by_no_program_but_three_and_read_by_the_shell_never(host: Host, tmp_path: Path) -> None:
    if reason := missing.strace():
        pytest.skip(reason)
    log = tmp_path / "strace"
    strace = ("strace", "-f", "-qq", "-s", "1000", "-e", "trace=execve,openat,open", "-o", str(log))
    subprocess.run(host.command(under=strace), capture_output=True, env=host.environment(), cwd="/", timeout=110)
    asked: dict[str, str] = {}
    running: dict[str, str] = {}
    openers = set()
    for line in log.read_text(errors="replace").splitlines():
        pid, call = line.split(maxsplit=1)
        if started := re.match(r'execve\("([^"]+)"', call):
            asked[pid] = Path(started[1]).name
        if "execve" in call and call.endswith(" = 0"):  # in one line, or resumed after another process's
            running[pid] = asked[pid]
        if call.startswith("open") and f'"{host.key}"' in call:
            openers.add(running.get(pid, "a shell"))
    assert openers == {"grep", "ssh-keygen", "wc"}


def test_process_lists_never_show_a_line_of_the_key(host: Host) -> None:
    """Looks at every process of this machine again and again while the script runs."""
    secrets = [part for line in _lines_of(host) for part in (line[:32], line[-32:])]
    done, looks = threading.Event(), 0
    found: list[bytes] = []

    def watch() -> None:
        nonlocal looks
        while not done.is_set():
            looks += 1
            for process in os.listdir("/proc"):  # noqa: PTH208 - names are enough, and quick
                if process.isdecimal() and process != str(os.getpid()):
                    for file in ("cmdline", "environ"):
                        try:
                            text = Path("/proc", process, file).read_bytes()
                        except OSError:
                            continue  # it has ended, or is not ours to look at
                        found.extend(part for part in secrets if part in text)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(3):
            host.run()
    finally:
        done.set()
        watcher.join()
    assert looks > 3
    assert found == []


def test_snapshot_of_a_host_would_notice_a_change(host: Host) -> None:
    """The check that every run in these tests ends with can fail."""
    before = host.snapshot()
    host.key.chmod(0o600)
    host.key.chmod(0o400)
    assert host.snapshot() != before


def test_search_for_secrets_would_find_one(host: Host) -> None:
    assert host.secrets_in(b"+ key='" + host.key.read_bytes().splitlines()[2] + b"'")


def test_script_holds_no_way_to_read_the_key_into_a_variable() -> None:
    """Other tests watch it run; this one reads it."""
    script = SCRIPT.read_text()
    uses = [line.strip() for line in script.splitlines() if re.search(r'<\s*"?\$\{?(key|!VARIABLE)\b', line)]
    assert uses == []
